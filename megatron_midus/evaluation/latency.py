"""How long a model takes to read a prompt and to write one token, with a KV cache, models in turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache


@dataclasses.dataclass(frozen=True)
class Latency:
    """Medians over the repetitions, milliseconds."""

    prefill_ms: float
    """The whole prompt, to its last logits."""
    decode_ms: float
    """One token of every sequence, the cache holding all that came before."""


def measure_latency(
    models: Sequence[Any], *, batch_size: int = 1, prompt_length: int = 128, new_tokens: int = 32, repetitions: int = 5
) -> list[Latency]:
    """Measures causal models of transformers with random tokens.

    The models take turns in every repetition, so that what else the machine does meets all of them alike; the first
    repetition warms up and does not count.

    Args:
        models: in evaluation mode; all on one device.
        batch_size: sequences.
        prompt_length, new_tokens: tokens read at once, and then one by one.
        repetitions: times that are measured.

    Raises:
        ValueError: a size below 1, or no models.
    """
    sizes = {"batch_size": batch_size, "prompt_length": prompt_length, "new_tokens": new_tokens, "repetitions": repetitions, "models": len(models)}  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    prefill: list[list[float]] = [[] for _ in models]
    decode: list[list[float]] = [[] for _ in models]
    for repetition in range(repetitions + 1):
        for index, model in enumerate(models):
            first, steps = _time_once(model, batch_size, prompt_length, new_tokens)
            if repetition:
                prefill[index].append(first)
                decode[index] += steps
    return [Latency(statistics.median(p), statistics.median(d)) for p, d in zip(prefill, decode)]


@torch.no_grad()
def _time_once(model: Any, batch_size: int, prompt_length: int, new_tokens: int) -> tuple[float, list[float]]:
    """Milliseconds of the prompt and of each token after it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, prompt_length + new_tokens), generator=generator)
    ids, cache = ids.to(model.device), DynamicCache()
    times = []
    for start, stop in [(0, prompt_length), *((n, n + 1) for n in range(prompt_length, prompt_length + new_tokens))]:
        _wait(model.device)
        begin = time.perf_counter()
        model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
        _wait(model.device)
        times.append(1000 * (time.perf_counter() - begin))
    return times[0], times[1:]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
