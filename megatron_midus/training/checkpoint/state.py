"""Training state in checkpoints: what is saved beside the weights, and how a run finds its way back into it.

Every layout of processes reads what any other wrote, but for the states of the random number generators.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_midus.checkpoint import common_state
from megatron_midus.config.optimizer import OptimizationConfig
from megatron_midus.errors import UserError
from megatron_midus.megatron_compat import load_checkpoint
from megatron_midus.model.checkpoint import sharded_state_dict
from megatron_midus.training.checkpoint.optimizer_state import load_optimizer_state, optimizer_metadata, stored_groups
from megatron_midus.training.messages import print_rank_0, warn_rank_0
from megatron_midus.training.schedule import describe_change, flags_of, without_effect
from megatron_midus.training.start_weights import StartWeights
from megatron_midus.training.weight_average import WeightAverage

_TRAINING_STATE = "training_state"
_SCHEDULE = "opt_param_scheduler"
_LAYOUT = "parallel_layout"
_SAMPLES_PER_EPOCH = "samples_per_epoch"
_AVERAGE_UPDATES = "average_updates"
_HAS_START_WEIGHTS = "has_start_weights"


@dataclasses.dataclass
class Progress:
    """How far a run is. Everything that decides which sample and which learning rate come next."""

    iteration: int = 0
    consumed_train_samples: int = 0
    floating_point_operations: float = 0.0
    consumed_train_tokens: int = 0


def parallel_layout() -> dict[str, int]:
    """The layout that decides whether saved random number states fit this run."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    }


def training_state(
    model_chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    progress: Progress,
    *,
    train: str,
    sft: bool = False,
    samples_per_epoch: int | None = None,
    with_rng: bool,
    memory_usage: dict[str, Any] | None = None,
    flags: dict[str, Any] | None = None,
    average: WeightAverage | None = None,
    start_weights: StartWeights | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        model_chunks: of this rank, in DDP or not.
        optimizer, scheduler: ``None`` = leave them out.
        progress: where the run is.
        train: the resolved ``--train``, because optimizer state of other parameters cannot be resumed.
        sft: whether the run fine-tunes on conversations.
        samples_per_epoch: where the run counts epochs.
        with_rng: include the random number states.
        memory_usage: of ``MemoryTelemetry.state``.
        flags: of ``schedule_flags``.
        average: of the weights.
        start_weights: towards which the weights decay.
    """
    model_state = sharded_state_dict(model_chunks)
    state: dict[str, Any] = {
        **model_state,
        **(memory_usage or {}),
        **(average.state() if average is not None else {}),
        **(start_weights.state() if start_weights is not None else {}),
        _TRAINING_STATE: {
            **dataclasses.asdict(progress),
            "train": train,
            **({"sft": True} if sft else {}),
            **({} if samples_per_epoch is None else {_SAMPLES_PER_EPOCH: samples_per_epoch}),
            "has_optimizer": optimizer is not None,
            "has_rng": with_rng,
            **({_AVERAGE_UPDATES: average.updates} if average is not None else {}),
            **({_HAS_START_WEIGHTS: True} if start_weights is not None else {}),
        },
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_train_samples,
        _LAYOUT: parallel_layout(),
    }
    if optimizer is not None and scheduler is not None:
        synchronize_steps(optimizer)
        if not getattr(optimizer, "is_stub_optimizer", False):
            state["optimizer"] = optimizer.sharded_state_dict(dict(model_state), metadata=optimizer_metadata())
        state[_SCHEDULE] = {**_schedule_state(scheduler), "flags": flags}
    if with_rng:
        state["rng_state"] = _rng_state()
    return state


def synchronize_steps(optimizer: MegatronOptimizer) -> None:
    """Gives every group the step count that groups with parameters have, on all ranks.

    An Adam that counts steps per group leaves groups without parameters at 0. On a pipeline stage without trainable
    parameters all groups are empty, and groups are stored by rank 0 alone: the count would restart on resume.
    """
    counts = [group["step"] for group in optimizer.param_groups if "step" in group]
    highest = torch.tensor([max((int(c) for c in counts), default=0)], dtype=torch.int64, device="cuda")
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    if not int(highest):
        return
    for group in optimizer.param_groups:
        step = group.get("step")
        if isinstance(step, torch.Tensor):
            step.fill_(int(highest))
        else:
            group["step"] = int(highest)


def _rng_state(*, is_loading: bool = False) -> ShardedObject:
    """Random number states of this rank; one per tensor- and pipeline-parallel and data-parallel rank."""
    state = (
        None
        if is_loading
        else [
            {
                "python": random.getstate(),
                "numpy": numpy.random.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(),
                "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
            }
        ]
    )
    layout = parallel_layout()
    rank = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject("rng_state", state, (layout["pipeline"], layout["tensor"], layout["data"]), rank)


def _restore_rng(states: list[dict[str, Any]]) -> None:
    state = states[0]
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


# -- loading ---------------------------------------------------------------------------------------------------------
def read_common_state(directory: Path) -> dict[str, Any]:
    """The part of a checkpoint that every rank has alike; raises ``ValueError`` when it cannot be read."""
    with readable(directory):
        return common_state.read_common_state(directory)


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[None]:
    """Turns what broken files raise into one line."""
    try:
        yield
    # It depends on where a file was cut or changed: pickle, zip reader, torch's or Megatron's own exception.
    except (
        CheckpointingException,
        CheckpointException,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ImportError,
        AttributeError,
        LookupError,
        UnicodeDecodeError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{directory} cannot be read as a checkpoint ({reason}); choose another by --ckpt-step"
        ) from None


def read_progress(common: dict[str, Any]) -> Progress:
    """Where the run of a checkpoint was; the beginning for a checkpoint without training state."""
    stored = common.get(_TRAINING_STATE)
    if stored is None:
        return Progress()
    # What a checkpoint of an earlier version did not count yet begins at its default.
    return Progress(**{field.name: stored.get(field.name, field.default) for field in dataclasses.fields(Progress)})


def load_training_state(
    directory: Path,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    settings: OptimizationConfig,
    flags: dict[str, Any],
    train: str,
    load_optim: bool,
    load_rng: bool,
) -> Progress:
    """Restores everything but the weights, and returns where the run is. Collective over all ranks.

    Args:
        flags: of ``schedule_flags``, to name what differs.

    A checkpoint without training state (as up-scaling and conversion write it) begins a run at iteration 0.

    Raises:
        ValueError: optimizer state that is absent or of another set of parameters without a flag that says to go on,
            or a schedule that differs from the flags.
    """
    common = read_common_state(directory)
    stored = common.get(_TRAINING_STATE)
    progress = read_progress(common)
    if stored is None:
        return progress
    if load_optim and _has_matching_optimizer(stored, train, directory):
        _load_optimizer(directory, common, model_chunks, optimizer)
        _load_schedule(common, optimizer, scheduler, settings, flags, directory)
    else:
        # The schedule goes on where the run is, though the moments begin anew.
        scheduler.step(increment=progress.consumed_train_samples)
    if load_rng and stored["has_rng"]:
        _load_rng(directory, common)
    return progress


def check_epoch(directory: Path, samples_per_epoch: int | None) -> None:
    """Raises ``ValueError`` where a run that counts epochs goes on with data of which an epoch is another number of samples."""
    before = (read_common_state(directory).get(_TRAINING_STATE) or {}).get(_SAMPLES_PER_EPOCH)
    if None not in (before, samples_per_epoch) and before != samples_per_epoch:
        raise UserError(
            f"an epoch of these training data has {samples_per_epoch} samples, and {directory} was trained on data with {before}: the "
            "data, --split or --seq-length changed; give those of that run, --train-samples instead of --train-epochs, or --finetune to "
            "begin a new run"
        )


def load_average(directory: Path, average: WeightAverage | None, *, train: str) -> None:
    """Goes on with the average of a checkpoint; says so where one begins or ends instead. Collective over all ranks.

    Comes after ``load_training_state``: an average that begins takes the master weights.
    """
    stored = read_common_state(directory).get(_TRAINING_STATE)
    if stored is None:  # the beginning of a run
        return
    updates = stored.get(_AVERAGE_UPDATES)
    if average is None:
        if updates is not None:
            warn_rank_0(
                f"{directory} holds an average of weights, with which this run does not go on: no --ema-decay was given"
            )
    elif updates is None or stored["train"] != train:
        average.restart()
        reason = "none" if updates is None else f"one of other parameters (--train {stored['train']})"
        print_rank_0(f"average of weights: begins with the current weights; {directory} has {reason}")
    else:
        with readable(directory):
            average.load(directory, updates)
        print_rank_0(f"average of weights: goes on after {updates} updates")


def load_start_weights(directory: Path, start_weights: StartWeights | None, *, train: str) -> None:
    """Decays towards what the run of a checkpoint began with; says so where it is something else. Collective over all ranks.

    Comes after ``load_training_state``, as ``load_average`` does.
    """
    stored = read_common_state(directory).get(_TRAINING_STATE)
    if stored is None:  # the beginning of a run
        return
    is_there = stored.get(_HAS_START_WEIGHTS, False)
    if start_weights is None:
        if is_there:
            warn_rank_0(
                f"the run of {directory} decayed towards its start, and this one does not: no --l2-to-start was given"
            )
    elif not is_there or stored["train"] != train:
        start_weights.restart()
        reason = f"of other parameters (--train {stored['train']})" if is_there else "not kept there"
        print_rank_0(f"--l2-to-start: towards the weights of {directory}; what its run began with is {reason}")
    else:
        with readable(directory):
            start_weights.load_copies(directory)


def _has_matching_optimizer(stored: dict[str, Any], train: str, directory: Path) -> bool:
    if stored["train"] != train:
        warn_rank_0(
            f"{directory} was trained with --train {stored['train']} and this run trains {train}: the optimizer state "
            "is of other parameters and is DROPPED. Iteration, samples and learning-rate schedule continue; give "
            "--finetune to begin a new schedule with a warm-up"
        )
        return False
    if not stored["has_optimizer"]:
        raise UserError(
            f"{directory} holds no optimizer state (it was saved with --no-save-optim); give --no-load-optim to go on "
            "with fresh moments, or --finetune to begin a new run"
        )
    return True


def _load_optimizer(
    directory: Path, common: dict[str, Any], model_chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer
) -> None:
    if getattr(optimizer, "is_stub_optimizer", False):
        return
    fresh = [{key: group.get(key) for key in _GROUP_SETTINGS} for group in optimizer.param_groups]
    _check_groups(common, optimizer, directory)
    with readable(directory):
        load_optimizer_state(directory, common, sharded_state_dict(model_chunks), optimizer)
    for group, settings in zip(optimizer.param_groups, fresh):
        group.update({key: value for key, value in settings.items() if value is not None})


# Settings of this run, not state: a checkpoint's groups bring their own, and would win over the flags without a word.
_GROUP_SETTINGS = (
    "betas",
    "eps",
    "momentum",
    "max_lr",
    "min_lr",
    "default_config",
    "is_memory_values",
    "bias_correction",
)


def _check_groups(common: dict[str, Any], optimizer: MegatronOptimizer, directory: Path) -> None:
    """Names the setting when the groups of the checkpoint are others than this run's."""
    for name, flag in (("lr_mult", "--value-lr-mult"), ("wd_mult", "--value-weight-decay")):
        theirs = {g[name] for g in stored_groups(common)}
        ours = {g[name] for g in optimizer.param_groups}
        if theirs != ours:
            raise UserError(
                f"{flag}: the optimizer of {directory} has groups of {name} {sorted(theirs)}, this run {sorted(ours)}; "
                f"give the {flag} of that run, or --no-load-optim"
            )


def _schedule_state(scheduler: OptimizerParamScheduler) -> dict[str, Any]:
    """Also what Megatron-Core's own leaves out."""
    left_out = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")
    return {**scheduler.state_dict(), **{name: getattr(scheduler, name) for name in left_out}}


def _load_schedule(
    common: dict[str, Any],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    settings: OptimizationConfig,
    flags: dict[str, Any],
    directory: Path,
) -> None:
    stored = common[_SCHEDULE]
    mine = _schedule_state(scheduler)
    if settings.use_checkpoint_opt_param_scheduler:
        for group in optimizer.param_groups:
            group["max_lr"] = stored["max_lr"] * group.get("lr_mult", 1.0)
            group["min_lr"] = stored["min_lr"] * group.get("lr_mult", 1.0)
        for name in mine.keys() & stored.keys() - scheduler.state_dict().keys():
            setattr(scheduler, name, stored[name])
    elif not settings.override_opt_param_scheduler:
        free = without_effect(mine, stored)
        differing = {name for name in mine if name in stored and mine[name] != stored[name]} - free - {"num_steps"}
        if differing:
            raise UserError(_other_schedule(differing, stored, flags, directory))
        stored = {**stored, **{name: mine[name] for name in free}}
    scheduler.load_state_dict(stored)


def _other_schedule(names: set[str], stored: dict[str, Any], flags: dict[str, Any], directory: Path) -> str:
    change = describe_change(names, flags, stored.get("flags"))
    if change is None:
        said = f"has another schedule than this command ({flags_of(names)})"
    else:
        said = f"has the schedule of {change[0]}, and this command says {change[1]}"
    return (
        f"{directory} {said}; give --override-opt_param-scheduler to take the schedule of this command, "
        "--use-checkpoint-opt_param-scheduler to keep that of the checkpoint, or the same flags"
    )


def _load_rng(directory: Path, common: dict[str, Any]) -> None:
    if common.get(_LAYOUT) != parallel_layout():
        warn_rank_0(
            f"{directory} was saved by another layout of processes ({common.get(_LAYOUT)}), so the random number "
            "states are not loaded"
        )
        return
    with readable(directory):
        loaded = load_checkpoint({"rng_state": _rng_state(is_loading=True)}, directory)
    _restore_rng(loaded["rng_state"])
