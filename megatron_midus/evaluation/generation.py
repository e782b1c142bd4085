"""A few lines of text from a model, greedy or seeded."""

from __future__ import annotations

from typing import Any

import torch

from megatron_midus.errors import UserError
from megatron_midus.evaluation.perplexity import Tokenizer


@torch.inference_mode()
def generate_text(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    add_bos: bool = False,
) -> str:
    """Continues ``prompt``.

    Args:
        model: a transformers model with ``generate``.
        tokenizer: of this model.
        prompt: text; an empty one starts behind an end-of-document token.
        max_new_tokens: at most so many tokens; an end-of-document token ends earlier.
        temperature: 0 = the most likely token every time, else sampling.
        seed: of the sampling.
        add_bos: put the tokenizer's beginning-of-sequence token first.

    Returns:
        The continuation without the prompt.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0:
        raise UserError(f"temperature={temperature} must be 0 or more")
    ids = tokenizer.encode_batch([prompt])[0]
    if add_bos and tokenizer.bos is not None:
        ids = [tokenizer.bos, *ids]
    elif not ids:
        ids = [tokenizer.eod]
    inputs = torch.tensor([ids], device=next(model.parameters()).device)  # [1, s]
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eod,
        pad_token_id=tokenizer.eod,
        **sampling,
    )
    continuation = output[0, len(ids) :].tolist()
    if continuation and continuation[-1] == tokenizer.eod:
        continuation.pop()
    # Decoded with the prompt: SentencePiece drops the space in front of a first word.
    before, whole = tokenizer.decode(ids), tokenizer.decode([*ids, *continuation])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(continuation)
