"""With a zero value bank the up-scaled model computes its base, bit for bit."""

import sys

import pytest
import torch

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe whole softmax", "mixtral"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_base(make_base, upscale, tokens, family, attention):
    base = make_base(family)
    model = upscale(base)
    base.set_attn_implementation(attention)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base(tokens).logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_one_after_the_other_equal_the_base(make_base, upscale, tokens, family):
    """The way without fused kernels, which is the only one of transformers 4."""
    base = make_base(family)
    model = upscale(base)
    for m in (base, model):
        m.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base(tokens).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_logits_equal_the_base(make_base, upscale, tokens, attention):
    base = make_base()
    model = upscale(base)
    base.set_attn_implementation(attention)
    model.set_attn_implementation(attention)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = base(tokens, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(model(tokens, attention_mask=mask, position_ids=positions).logits, expected)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "default"}])
def test_rotary_kinds_equal_the_base(make_base, upscale, tokens, rope):
    base = make_base(rope_parameters={"rope_theta": 20000.0, **rope})
    positions = torch.arange(1000, 1000 + tokens.shape[1])[None]  # far out, where frequencies matter
    with torch.no_grad():
        assert torch.equal(
            upscale(base)(tokens, position_ids=positions).logits, base(tokens, position_ids=positions).logits
        )


@pytest.mark.parametrize("head_dim, factor", [(64, 32.0), (128, 8.0)])
def test_llama3_frequencies_are_those_of_transformers(head_dim, factor):
    """The settings of Llama-3.2-1B and Llama-3.1-8B."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from megatron_midus.hf import MidusConfig
    from megatron_midus.hf.modeling_midus import compute_inverse_frequencies

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    settings = {"head_dim": head_dim, "num_attention_heads": 32, "hidden_size": 32 * head_dim}
    theirs, scaling = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**settings, rope_parameters=dict(rope)))
    ours = compute_inverse_frequencies(MidusConfig(**settings, rope_parameters=rope))
    assert scaling == 1.0 and torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_equal_the_base(make_base, upscale, tokens, family, tmp_path):
    """Loaded in bf16 (a cast model would have its base's rotary frequencies cast as well, which loading does not)."""
    from transformers import AutoModelForCausalLM

    from megatron_midus.hf import MidusForCausalLM

    base = make_base(family)
    base.save_pretrained(tmp_path / "base")
    upscale(base).save_pretrained(tmp_path / "midus")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = MidusForCausalLM.from_pretrained(tmp_path / "midus", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base(tokens).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"memory_variant": "full"},
        {"memory_variant": "block", "memory_num_heads": 3},
        {"memory_output_projection": "linear", "memory_query_norm": "rms"},
        {"memory_output_projection": "attention", "memory_query_norm": "rms"},
        {"memory_output_projection": "silu", "memory_query_temperature": True},
        {"memory_attention": "full", "memory_score_activation": "sigmoid"},
        {"memory_query": "token", "memory_attention": "none"},
        {"memory_query": "token", "memory_output_projection": "attention"},
        {"memory_query": "sum", "memory_query_norm": "rms"},
        {"memory_query": "concat", "memory_domain_gate": True},
        {"memory_query": "block", "memory_attention": "full"},
    ],
)
def test_every_variant_starts_as_the_identity_and_then_speaks(make_base, upscale, tokens, settings):
    base = make_base()
    with torch.no_grad():
        expected = base(tokens).logits
        assert torch.equal(upscale(base, **settings)(tokens).logits, expected)
        assert (upscale(base, random_values=True, **settings)(tokens).logits - expected).abs().max() > 0.1


def test_sliding_window_equals_mistral(upscale, tokens):
    """Mistral is a Llama with a window on every block."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=97, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    base = MistralForCausalLM(config).eval()
    model = upscale(base, sliding_window=4)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base(tokens).logits)
        assert not torch.equal(upscale(base)(tokens).logits, base(tokens).logits)
        settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for cache in (None, "static"):
            expected = base.generate(tokens, **settings, cache_implementation=cache)
            assert torch.equal(model.generate(tokens, **settings, cache_implementation=cache), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_equal_the_base(make_base, upscale, tokens, attention):
    """Positions that start again separate sequences, which must not see each other."""
    base = make_base()
    model = upscale(base)
    base.set_attn_implementation(attention)
    model.set_attn_implementation(attention)
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    packed = {"input_ids": tokens[:1], "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        assert torch.equal(model(**packed).logits, base(**packed).logits)
        alone = model(tokens[:1, 6:]).logits
        # the same sums, blocked otherwise
        torch.testing.assert_close(model(**packed).logits[:, 6:], alone, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_attentions(make_base, upscale, tokens):
    base = make_base()
    model = upscale(base)
    for m in (base, model):
        m.set_attn_implementation("eager")
    ours = model(tokens, output_hidden_states=True, output_attentions=True)
    theirs = base(tokens, output_hidden_states=True, output_attentions=True)
    assert len(ours.hidden_states) == 6 and len(ours.attentions) == 5
    for physical, source in ((0, 0), (2, 1), (3, 2)):
        assert torch.equal(ours.attentions[physical], theirs.attentions[source])
    for physical, source in ((0, 0), (1, 1), (2, 1), (3, 2), (5, 3)):  # a silent Memory block hands on what it got
        assert torch.equal(ours.hidden_states[physical], theirs.hidden_states[source])


def test_sdpa_warns_and_returns_no_attentions(make_base, upscale, tokens, caplog):
    model = upscale(make_base(), random_values=True)
    model.set_attn_implementation("sdpa")
    modeling = sys.modules[type(model).__module__]
    modeling.logger.warning_once.cache_clear()
    modeling.logger.addHandler(caplog.handler)
    try:
        found = model(tokens, output_attentions=True)
    finally:
        modeling.logger.removeHandler(caplog.handler)
    assert found.attentions is None and torch.equal(found.logits, model(tokens).logits)
    assert "attn_implementation='eager'" in caplog.text
    model.set_attn_implementation("eager")
    assert len(model(tokens, output_attentions=True).attentions) == len(model.model.layers)
