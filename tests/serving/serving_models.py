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
RANK, SCALE = 4, 2.0


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
