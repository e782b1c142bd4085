"""A tiny random Llama and a tokenizer of bytes for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 263  # 256 bytes, two special tokens, five rows that no token uses


class ByteTokenizer:
    """One token a byte."""

    bos, eod, vocab_size = 256, 257, 258

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def make_llama(seed=0, **changes):
    """Logits with a spread of several nats, so that a loss at a wrong position is far off."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": 256,
        "eos_token_id": 257,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.dim() > 1 else 1.0))
    return model
