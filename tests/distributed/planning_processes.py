"""What the processes of the planning tests do: one training step whose tensors and messages are counted."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from counting import CountMessages, KeptForBackward
from megatron.core import parallel_state
from scenarios import Layout, Setting, build, run_schedule, wrap

from megatron_midus.training.kl_to_base import KlToBase
from megatron_midus.training.start_weights import StartWeights
from megatron_midus.training.weight_average import WeightAverage
from megatron_midus.upscaling import UpscalePlan


def measure(setting: Setting, layout: Layout) -> dict[str, Any]:
    """Of one rank: its stage, parameters, optimizer bytes, bytes kept for one backward pass, bytes of messages."""
    chunks, plan = build(setting, layout)
    wrapped, optimizer = wrap(chunks, plan, setting)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    kept: list[KeptForBackward] = []
    with contextlib.ExitStack() as stack:
        for chunk in chunks:
            kept.append(_keep_first_forward(chunk, stack))
            if setting.kl_to_base:
                _run_base_before(chunk, plan)
        with CountMessages() as messages:
            run_schedule(wrapped, 0, logits=False)
            optimizer.step()
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters()),
        "trained": sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad),
        "optimizer": _state_bytes(optimizer),
        "copies": WeightAverage(wrapped, 0.9, optimizer).num_bytes() + StartWeights(wrapped, 1, optimizer).num_bytes(),
        "activations": sum(each.bytes for each in kept),
        "messages": dict(messages.bytes),
    }


def _run_base_before(chunk: torch.nn.Module, plan: UpscalePlan) -> None:
    """As the driver's forward step."""
    term, forward = KlToBase(chunk, plan, 1.0), chunk.forward

    def with_base(*inputs: Any, labels: torch.Tensor | None = None) -> Any:
        if labels is None:  # the base's pass itself
            return type(chunk).forward(chunk, *inputs)
        term.run_base(*inputs)
        return forward(*inputs, labels=labels)

    chunk.forward = with_base


def _keep_first_forward(chunk: torch.nn.Module, stack: contextlib.ExitStack) -> KeptForBackward:
    """Counts what the chunk's first forward pass keeps."""
    kept = KeptForBackward(chunk)
    state = {"calls": 0}
    forward = chunk.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        state["calls"] += 1
        with kept if state["calls"] == 1 else contextlib.nullcontext():
            return forward(*args, **kwargs)

    chunk.forward = counted
    stack.callback(lambda: setattr(chunk, "forward", forward))
    return kept


def _state_bytes(optimizer: Any) -> int:
    """Of all tensors of the torch optimizers inside, and of the fp32 copies of 16-bit weights."""
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        total += sum(
            value.nbytes
            for state in inner.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim()
        )
        if part.config.bf16:
            total += sum(p.nbytes for group in inner.param_groups for p in group["params"])
    return total
