"""What the processes of the tests of memory telemetry do: train with it or without, and keep what a look-up was given."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from scenarios import weights
from training_runs import Outcome, Run, train

from megatron_midus.training.memory.counters import memory_layers


def two_by_two(
    counted: dict[str, tuple[Run, str]], runs: dict[str, Run], layout_flags: str
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Steps to be counted by brute force, each with its flags, then whole runs: processes start slower than they train."""
    return {name: watched(run, flags) for name, (run, flags) in counted.items()}, outcomes(runs, layout_flags)


def outcomes(runs: dict[str, Run], layout_flags: str) -> dict[str, dict[str, Any]]:
    """Per run: curve, weights, random number state, and on the last rank the figures."""

    def seed(chunks: list) -> None:
        torch.manual_seed(0)

    return {name: _told(train(run, layout_flags, before_steps=seed)) for name, run in runs.items()}


def _told(outcome: Outcome) -> dict[str, Any]:
    return {
        "curve": outcome.curve,
        "weights": weights(outcome.chunks),
        "random": torch.get_rng_state(),
        "figures": outcome.figures,
        "revived": outcome.revived,
    }


def watched(run: Run, layout_flags: str) -> dict[str, Any]:
    """A run of one step, with all that a brute-force count of it needs, by block: what the memory and the block read
    and wrote in each micro-batch, and the memory's parameters before the step."""
    seen: dict[int, dict[str, Any]] = {}

    def watch(chunks: list) -> None:
        for layer in memory_layers(chunks):
            memory = layer.self_attention.linear_proj
            block: dict[str, Any] = {"queries": [], "inputs": [], "outputs": []}
            block["parameters"] = {name: p.detach().clone() for name, p in memory.named_parameters()}
            seen[memory.layer_index] = block
            memory.register_forward_hook(_keep_look_up(block))
            layer.register_forward_pre_hook(_keep_input(block), with_kwargs=True)

    outcome = train(run, layout_flags, before_steps=watch)
    return {
        "blocks": seen,
        "values": {
            m.layer_index: m.value_bank.detach().clone()
            for m in (layer.self_attention.linear_proj for layer in memory_layers(outcome.chunks))
        },
        "figures": outcome.figures,
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "data_rank": parallel_state.get_data_parallel_rank(),
    }


def _keep_look_up(block: dict[str, Any]) -> Any:
    def hook(module: Any, args: tuple, output: tuple) -> None:
        if torch.is_grad_enabled():
            block["queries"].append(module.queries(args[0].detach())[1].detach())
            block["outputs"].append(output[0].detach().clone())

    return hook


def _keep_input(block: dict[str, Any]) -> Any:
    def hook(module: Any, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():
            block["inputs"].append(kwargs["hidden_states"].detach().clone())

    return hook
