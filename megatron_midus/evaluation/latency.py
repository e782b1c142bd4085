"""Inference latency and memory of models side by side: prefill, decoding with the KV cache, weights, cache, peak.

Models are timed in turns, round by round, so that what else the machine does hits all of them alike; a ratio is the median
over rounds of the ratio to the first model within the same round.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class Latency:
    """Figures of one model; ratios are to the first model of the comparison."""

    prompt_tokens: int
    decode_tokens: int
    batch_size: int
    rounds: int
    prefill_seconds: float
    """Median of a forward pass over the prompts that fills the cache."""
    decode_seconds: float
    """Median of one decoding step, one token for each sequence of the batch."""
    prefill_ratio: float
    decode_ratio: float
    weight_bytes: int
    """Parameters and buffers, what is shared counted once."""
    cache_bytes_per_token: float
    """Keys and values of one token of one sequence, as the cache holds them after the prefill."""
    peak_bytes: int | None
    """Highest allocation of a prefill and the decoding, weights of this model included; CUDA only."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure_latency(
    models: Sequence[Any],
    *,
    prompt_tokens: int = 512,
    decode_tokens: int = 32,
    batch_size: int = 1,
    rounds: int = 7,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> list[Latency]:
    """Times ``models``, all of them in memory, on the same random prompts.

    Args:
        models: transformers models in evaluation mode.
        prompt_tokens: length of each prompt.
        decode_tokens: steps of decoding after it; a round's figure is their mean.
        batch_size: sequences at once.
        rounds: of all models in turn, one more for warming up.
        seed: of the prompts.
        progress: called with 1 after every model of every round.

    Raises:
        ValueError: a setting out of range.
    """
    sizes = {"prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens, "batch_size": batch_size, "rounds": rounds}
    for name, number in sizes.items():
        if number < 1:
            raise UserError(f"latency {name}={number} must be at least 1")
    vocabulary = min(model.get_input_embeddings().weight.shape[0] for model in models)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator)  # [b, s]
    times: list[list[tuple[float, float]]] = []  # [rounds, models] of (prefill, decoding step)
    for index in range(rounds + 1):
        times.append([])
        for model in models:
            times[-1].append(_time_once(model, prompts, decode_tokens))
            if progress is not None:
                progress(1)
        if index == 0:
            times.pop()  # kernels are chosen and memory is allocated in the first round
    return [
        _summary(model, index, times, prompts, decode_tokens, rounds)
        for index, model in enumerate(models)
    ]  # fmt: skip


def _summary(
    model: Any,
    index: int,
    times: list[list[tuple[float, float]]],
    prompts: torch.Tensor,
    decode_tokens: int,
    rounds: int,
) -> Latency:
    cache_bytes, peak = _measure_memory(model, prompts, decode_tokens)
    medians = [statistics.median(row[index][part] for row in times) for part in (0, 1)]
    ratios = [statistics.median(row[index][part] / row[0][part] for row in times) for part in (0, 1)]
    return Latency(
        prompt_tokens=prompts.shape[1],
        decode_tokens=decode_tokens,
        batch_size=prompts.shape[0],
        rounds=rounds,
        prefill_seconds=medians[0],
        decode_seconds=medians[1],
        prefill_ratio=ratios[0],
        decode_ratio=ratios[1],
        weight_bytes=weight_bytes(model),
        cache_bytes_per_token=cache_bytes / prompts.numel(),
        peak_bytes=peak,
    )


@torch.inference_mode()
def _time_once(model: Any, prompts: torch.Tensor, decode_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of a decoding step."""
    device = next(model.parameters()).device
    prompts = prompts.to(device)
    _wait(device)
    began = time.perf_counter()
    output = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    _wait(device)
    filled = time.perf_counter()
    _decode(model, output, prompts.shape[1], decode_tokens)
    _wait(device)
    return filled - began, (time.perf_counter() - filled) / decode_tokens


def _decode(model: Any, output: Any, position: int, steps: int) -> None:
    """Greedy steps on the cache that ``output`` carries."""
    for step in range(steps):
        tokens = output.logits[:, -1:].argmax(-1)  # [b, 1]
        place = torch.full_like(tokens, position + step)
        output = model(input_ids=tokens, position_ids=place, past_key_values=output.past_key_values, use_cache=True)


@torch.inference_mode()
def _measure_memory(model: Any, prompts: torch.Tensor, decode_tokens: int) -> tuple[int, int | None]:
    """Bytes in the cache after the prefill, and on CUDA the peak with this model's weights alone."""
    device = next(model.parameters()).device
    others = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_allocated(device) - weight_bytes(model)
    output = model(input_ids=prompts.to(device), use_cache=True, logits_to_keep=1)
    cache_bytes = sum(tensor.numel() * tensor.element_size() for tensor in _cache_tensors(output.past_key_values))
    _decode(model, output, prompts.shape[1], decode_tokens)
    return cache_bytes, torch.cuda.max_memory_allocated(device) - others if device.type == "cuda" else None


def _cache_tensors(cache: Any) -> list[torch.Tensor]:
    layers = getattr(cache, "layers", None)
    if layers is None:  # transformers before 4.54
        return [*cache.key_cache, *cache.value_cache]
    return [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; tied ones count once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
