"""Tiny base models and their up-scaled MIDUS twins, made of random numbers."""

import pytest
import torch
import transformers

from megatron_midus.hf import MidusConfig, MidusForCausalLM

VOCAB = 97
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,  # so that of the 4 wavelengths one is kept, one interpolated, two stretched
}
SHAPES = {
    # grouped queries; 48 / 6 heads = 8 channels
    "llama": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE},
    "qwen2": {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    # a head is wider than hidden_size / heads
    "qwen3": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14},
    # three of five experts: their outputs are summed in one order or another
    "qwen3_moe": {
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14, "num_experts": 5,
        "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True,
    },
    "qwen3_moe whole softmax": {
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "num_experts": 5, "num_experts_per_tok": 3,
        "moe_intermediate_size": 24, "norm_topk_prob": False,
    },
    "mixtral": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_local_experts": 4},
}  # fmt: skip
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral"}
BLOCKS = ["transformer", "memory", "transformer", "transformer", "memory"]


def randomize(model, seed):
    """Every parameter random (biases and norms too), so that no term can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


@pytest.fixture
def make_base():
    def make(family="llama", **overrides):
        settings = {
            "vocab_size": VOCAB,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **SHAPES[family],
            **overrides,
        }
        name = CLASSES[family.split()[0]]
        config = getattr(transformers, f"{name}Config")(**settings)
        return randomize(getattr(transformers, f"{name}ForCausalLM")(config), seed=1).eval()

    return make


@pytest.fixture
def upscale():
    """``upscale(base, memory_num_keys=…)``: the MIDUS model whose Memory blocks copy the attention before them."""

    def make(base, *, blocks=BLOCKS, random_values=False, **settings):
        config = MidusConfig(**midus_settings(base.config, blocks), **{**MEMORY, **settings})
        model = randomize(MidusForCausalLM(config), seed=2)
        state = model.state_dict()
        base_state = {name: tensor for name, tensor in base.state_dict().items() if ".layers." not in name}
        source = -1
        for index, kind in enumerate(blocks):
            source += kind == "transformer"
            for name, tensor in base.state_dict().items():
                if not name.startswith(f"model.layers.{source}."):
                    continue
                name = name.removeprefix(f"model.layers.{source}.")
                if kind == "memory":
                    if name.startswith(("mlp", "post_attention")) or ".o_proj" in name:
                        continue
                    name = name.replace("self_attn", "mem_attn")
                    if name.startswith("mem_attn") and config.memory_attention == "none":
                        continue
                base_state[f"model.layers.{index}.{name}"] = tensor
        for name, tensor in base_state.items():
            state[name].copy_(tensor)
        if not random_values:
            for name, tensor in state.items():
                if name.endswith(("memory.value_bank", "memory.mixer")):
                    tensor.zero_()
        return model.eval()

    return make


MEMORY = {"memory_num_keys": 11, "memory_topk": 5, "memory_latent_size": 7}


def midus_settings(base, blocks):
    """Fields of a MidusConfig that a base's configuration gives."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "pad_token_id",
        "bos_token_id", "eos_token_id",
    )  # fmt: skip
    settings = {name: getattr(base, name) for name in names}
    settings["head_dim"] = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    settings["attention_bias"] = base.model_type == "qwen2"
    settings["qk_norm"] = base.model_type.startswith("qwen3")
    if hasattr(base, "num_local_experts"):
        settings |= {
            "num_experts": base.num_local_experts,
            "num_experts_per_tok": base.num_experts_per_tok,
            "moe_intermediate_size": getattr(base, "moe_intermediate_size", None),
            "norm_topk_prob": getattr(base, "norm_topk_prob", True),
            "router_scores_in_fp32": base.model_type == "mixtral",
        }
    return {**settings, "num_hidden_layers": len(blocks), "block_types": blocks}


@pytest.fixture
def tokens():
    """``[3, 13]`` token ids without special ones."""
    return torch.randint(3, VOCAB, (3, 13), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def midus(make_base, upscale):
    """A Llama-shaped MIDUS model whose memories speak."""
    return upscale(make_base(), random_values=True)
