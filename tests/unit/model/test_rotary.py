"""Megatron's scaled rotary embeddings against those of the exported class, bit for bit; tests/unit/hf/test_rope.py holds
that one against transformers."""

import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor

from megatron_midus.config import ModelConfig
from megatron_midus.hf import MidusConfig
from megatron_midus.hf.modeling_midus import compute_attention_factor, compute_inverse_frequencies
from megatron_midus.model.rotary import attention_factor, attention_settings, scaled_frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = [
    {"rope_type": "linear", "factor": 3.7},
    {"rope_type": "dynamic", "factor": 2},
    {**LLAMA3, "original_max_position_embeddings": 8192},
    {**LLAMA3, "low_freq_factor": 1.5, "original_max_position_embeddings": 77},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 0.9,
    },
    {"rope_type": "yarn", "factor": 3.3, "original_max_position_embeddings": 77, "truncate": False, "beta_fast": 21.5},
    {"rope_type": "yarn", "factor": 3.3, "original_max_position_embeddings": 77, "attention_factor": 0.83},
    {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 77, "beta_slow": 2},
    {"rope_type": "longrope", "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "original_max_position_embeddings": 100, "factor": 3.3},
    {"rope_type": "longrope", "original_max_position_embeddings": 64, "attention_factor": 0.83},
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("channels, base", [(6, 10000.0), (128, 1e6)])
@pytest.mark.parametrize("percent", [1.0, 0.75])
def test_frequencies_are_those_of_the_exported_class(rope, channels, base, percent):
    if rope["rope_type"] == "longrope":
        pairs = torch.arange(int(channels * percent) // 2)
        rope = {**rope, "short_factor": (1 + 0.1 * pairs).tolist(), "long_factor": (1.3 + 0.7 * pairs).tolist()}
    model = ModelConfig(
        num_layers=1, hidden_size=2 * channels, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1,
        kv_channels=channels, vocab_size=11, max_position_embeddings=100, rotary_base=base, rope_scaling=rope,
        rotary_percent=percent,
    )  # fmt: skip
    exported = MidusConfig(
        head_dim=channels,
        max_position_embeddings=100,
        rope_theta=base,
        rope_scaling={**rope, "partial_rotary_factor": percent},
    )
    for length in (30, 100, 101, 333):
        follows = length > 100 or rope["rope_type"] == "longrope"
        wanted = compute_inverse_frequencies(exported, torch.tensor(length) if follows else None)
        assert torch.equal(scaled_frequencies(model, length), wanted)
    factor = compute_attention_factor(exported)
    assert attention_factor(model.rope_scaling, 100) == factor
    settings = attention_settings(model)
    # Megatron's own arithmetic, and the fp32 that cosines are multiplied in.
    made = _yarn_get_concentration_factor(*settings.values()) if settings else 1.0
    assert torch.tensor(made) == torch.tensor(factor)
