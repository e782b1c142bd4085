"""What the processes of the tests of sparse updates do: train or count, and keep what a brute-force count needs."""

from __future__ import annotations

import shlex
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from scenarios import weights
from training_runs import Run, train

from megatron_midus.memory import HeadWiseMemory
from megatron_midus.training.background import _count, _of_all_stages
from megatron_midus.training.masters import find_master
from megatron_midus.training.memory.counters import memories, watch
from megatron_midus.verbs.background import BackgroundConfig, _as_evaluation


def outcomes(
    runs: dict[str, tuple[Run, str]], switched: dict[str, Run], layout_flags: str, counted: str
) -> dict[str, Any]:
    """Per run what ``watched`` returns; of ``switched`` ones curve and weights; ``counted``: flags of midus background."""
    found = {name: watched(run, flags) for name, (run, flags) in runs.items()}
    for name, run in switched.items():
        steps: list[list] = []

        def keep(chunks: list, optimizer: Any = None, kept: list = steps) -> None:
            kept.append(weights(chunks))

        # Weights after each step only where that does not gather them before their average would.
        watching = {"before_steps": keep, "after_step": keep} if name == "watched" else {}
        outcome = train(run, layout_flags, **watching)
        found[name] = {"curve": outcome.curve, "weights": weights(outcome.chunks), "steps": steps}
        if outcome.average is not None:
            with outcome.average.in_place_of_weights():
                found[name]["average"] = weights(outcome.chunks)
            assert all(map(_equal, weights(outcome.chunks), found[name]["weights"]))
    return {**found, "count": count(counted)}


def _equal(first: tuple, second: tuple) -> bool:
    return torch.equal(first[-1], second[-1])


def watched(run: Run, layout_flags: str) -> dict[str, Any]:
    """A run, and of every step by block: the reads of this rank's heads, and what the step left of bank and optimizer."""
    reads: dict[int, list] = {}
    steps: list[dict[int, dict[str, Any]]] = []
    banks: dict[int, torch.Tensor] = {}

    def before(chunks: list) -> None:
        for memory in memories(chunks):
            banks[memory.layer_index] = memory.value_bank.detach().clone()
            reads[memory.layer_index] = []
            watch(memory, lambda indices, weights, kept=reads[memory.layer_index]: kept.append(indices.clone()))

    def after(chunks: list, optimizer: Any) -> None:
        step = {}
        for memory in memories(chunks):
            bank, master = memory.value_bank, find_master(optimizer, memory.value_bank)
            step[memory.layer_index] = {
                "reads": torch.cat(reads[memory.layer_index]),
                "bank": bank.detach().clone(),
                "gradient": bank.main_grad.clone(),
                "begin": None if master is None else master.begin,
                "state": {} if master is None else {n: t.clone() for n, t in _elementwise(master)},
            }
            reads[memory.layer_index].clear()
        steps.append(step)

    outcome = train(run, layout_flags, before_steps=before, after_step=after)
    return {"curve": outcome.curve, "start": banks, "steps": steps, **_ranks()}


def _elementwise(master: Any) -> list[tuple[str, torch.Tensor]]:
    state = [(n, t) for n, t in master.state.items() if isinstance(t, torch.Tensor) and t.shape == master.tensor.shape]
    return [("master", master.tensor.detach()), *state]


def _ranks() -> dict[str, int]:
    return {
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "data_rank": parallel_state.get_data_parallel_rank(),
    }


def count(flags: str) -> dict[str, Any]:
    """Three background batches: what is found, and the queries of every pass with the keys."""
    from megatron_midus.command import make_parser
    from megatron_midus.config.fields import from_namespace
    from megatron_midus.training.main import prepare

    config = from_namespace(BackgroundConfig, make_parser("background").parse_args(shlex.split(flags)))
    start = prepare(_as_evaluation(config))
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    seen: dict[int, dict[str, Any]] = {}

    def see(module: torch.nn.Module, args: tuple) -> None:
        if isinstance(module, HeadWiseMemory):
            block = seen.setdefault(module.layer_index, {"queries": []})
            block["keys"] = [getattr(module, name).detach().clone() for name in ("row_keys", "col_keys")]
            block["queries"].append(module.queries(args[0])[1].detach().clone())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        found = _of_all_stages(_count(start, config.num_batches))
    finally:
        handle.remove()
    return {"found": {index: (b.batches, b.reads) for index, b in found.items()}, "seen": seen, **_ranks()}
