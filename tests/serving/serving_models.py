"""Sizes of the tiny exports that vLLM serves, and what transformers says of a prompt."""

from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
VOCAB = 2048  # of the tokenizer in examples/tiny_base
BLOCKS = ["transformer", "memory", "transformer", "memory"]
SETTINGS = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden size / heads; vLLM's attention for CPUs knows no smaller ones
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,
    "block_types": BLOCKS,
    "memory_num_keys": 32,
    "memory_topk": 8,
    "memory_latent_size": 16,
    "qk_norm": True,
    "attention_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "hive": {},
    "dressed": {"memory_query_norm": "rms", "memory_query_temperature": True, "memory_output_projection": "linear"},
    "full": {
        "memory_variant": "full",
        "memory_attention": "full",
        "memory_output_projection": "silu",
        "memory_query": "concat",
    },
    "mixed": {
        "memory_query": "block",
        "memory_attention": "full",
        "memory_output_projection": "attention",
        "memory_score_activation": "sigmoid",
    },
    "block": {"memory_variant": "block", "memory_num_heads": 8},
    "token": {"memory_query": "token", "memory_attention": "none", "memory_domain_gate": True},
}
# Families of bases, and whether the plugin serves them here or the export's own code.
FAMILIES = {
    "llama": False,
    "mistral": False,
    "qwen2": False,
    "qwen3": True,
    "phi3": False,
    "smollm3": False,
    "olmo2": True,
    "olmo3": False,
    "mixtral": False,
    "granite": True,
    "gemma2": False,
    "gemma3": True,
    "qwen3_moe": True,
}
# What they need beside the sizes that vLLM's attention can have: of some, a head has hidden size / heads channels.
_WIDE = {"hidden_size": 128, "head_dim": None}
_CHANGES = {
    "qwen2": _WIDE,
    "granite": _WIDE,
    "olmo2": _WIDE,
    "olmo3": _WIDE,
    "phi3": {
        **_WIDE,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1 + 0.02 * channel for channel in range(12)],
            "long_factor": [1 + 0.4 * channel for channel in range(12)],
        },
    },
}
RANK, SCALE = 4, 2.0


def write_family(directory, family):
    """An export of a tiny base of ``family`` with Memory blocks between its layers, every tensor random."""
    from tiny_models import write_base, write_upscaled

    from megatron_midus.config import MemoryConfig
    from megatron_midus.upscaling import make_plan

    changes = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    changes |= {"vocab_size": VOCAB, "max_position_embeddings": 256, **_CHANGES.get(family, {})}
    changes = {name: value for name, value in changes.items() if value is not None}
    base = write_base(directory.with_name(f"{family}_base"), family, **changes)
    memory = MemoryConfig(memory_num_keys=12, memory_topk=5, memory_latent_size=7, memory_query_norm="rms")
    return write_upscaled(directory, base, make_plan("interleave", num_layers=3, num_blocks=2, memory=memory))


def load(directory, change=None, dtype=torch.float32):
    from megatron_midus.hf import MidusForCausalLM

    model = MidusForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    if change is not None:
        change(model)
    return model


@torch.no_grad()
def generate(model, prompt):
    ids = torch.tensor([prompt])
    whole = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    logprobs = model(whole[None]).logits[0].float().log_softmax(-1)[:-1].gather(1, whole[1:, None])[:, 0].tolist()
    cut = len(prompt) - 1
    return {"tokens": whole[len(prompt) :].tolist(), "logprobs": logprobs[cut:], "prompt_logprobs": logprobs[:cut]}
