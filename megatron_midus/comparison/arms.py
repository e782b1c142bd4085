"""What each arm amounts to for one base: its plan, its parameters, its FLOPs a token, how many steps it may train."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from megatron_midus.comparison.experiment import Arm, Experiment
from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.config.fields import add_arguments, from_namespace
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.run_file import words_of_entries
from megatron_midus.config.values import scalar
from megatron_midus.errors import UserError
from megatron_midus.upscaling import UpscalePlan, make_plan
from megatron_midus.upscaling.cost import (
    flops_per_token,
    forward_flops_per_token,
    total_parameters,
    trainable_parameters,
)
from megatron_midus.upscaling.policies import none

# What the tool itself says to the driver.
RESERVED_FLAGS = (
    "load", "save", "pretrained_checkpoint", "train", "train_iters", "train_samples", "train_epochs", "exit_interval", "seq_length",
    "micro_batch_size", "global_batch_size", "lr", "min_lr", "lr_decay_iters", "lr_decay_samples", "seed", "data_path",
    "train_data_path", "valid_data_path", "test_data_path", "split", "data_cache_path", "mock_data", "tokenizer_type",
    "tokenizer_model", "eval_interval", "eval_iters", "eval_at_start", "full_validation", "tensorboard_dir",
    "tensorboard_log_interval", "log_interval", "log_memory_to_tensorboard", "distributed_backend", "skip_train",
    "dry_run", "config",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ResolvedArm:
    """An arm beside what follows from it.

    Attributes:
        flops_per_token: of a training step, forward and backward; of a forward pass for an arm that does not train.
        iterations: optimizer steps; 0 when it does not train.
        eval_interval: steps between two points of the validation curve.
    """

    arm: Arm
    plan: UpscalePlan
    parameters: int
    added: int
    trainable: int
    flops_per_token: float
    iterations: int
    eval_interval: int

    @property
    def architecture(self) -> tuple[Any, ...]:
        """Equal for arms whose models run alike, whatever was trained."""
        return self.plan.num_base_layers, tuple(b.kind == "memory" for b in self.plan.blocks), self.plan.memory


def memory_of(arm: Arm, model: ModelConfig, where: str) -> MemoryConfig | None:
    """Memory settings of an arm; raises ``ValueError`` for those that no memory, or not this model's, can have."""
    if arm.policy != "interleave":
        return None
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    add_arguments(parser, MemoryConfig)
    entries = {f"memory_{name}": value for name, value in arm.memory.items()}
    words = words_of_entries(parser, entries, where=where)
    memory = from_namespace(MemoryConfig, parser.parse_args(words))
    memory.check_model(
        hidden_size=model.hidden_size, num_attention_heads=model.num_attention_heads, kv_channels=model.kv_channels
    )
    return memory


def resolve_arm(experiment: Experiment, arm: Arm, model: ModelConfig) -> ResolvedArm:
    """Raises ``ValueError`` that begins with the arm's name when it does not fit the base or the budget."""
    where = f"arm {arm.name!r}"
    try:
        plan = make_plan(
            arm.policy,
            num_layers=model.num_layers,
            num_blocks=arm.num_blocks,
            insert_after=arm.insert_after,
            memory=memory_of(arm, model, "memory"),
        )
        flops, trainable, iterations = forward_flops_per_token(model, plan, experiment.seq_length), 0, 0
        if arm.train != "none":
            driver = driver_flags(experiment, arm)
            rank = driver.get("lora_rank") if arm.train == "lora" else None
            if arm.train == "lora" and not isinstance(rank, int):
                raise UserError(f"train: lora needs driver: {{lora-rank: R}} with a whole number, not {rank!r}")
            kl_to_base = scalar(float, driver.get("kl_to_base") or 0) > 0
            flops = flops_per_token(
                model, plan, experiment.seq_length, train=arm.train, lora_rank=rank, kl_to_base=kl_to_base
            )
            trainable = trainable_parameters(model, plan, arm.train, lora_rank=rank)
            iterations = count_iterations(experiment, flops, arm.tokens)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    parameters = total_parameters(model, plan)
    return ResolvedArm(
        arm=arm,
        plan=plan,
        parameters=parameters,
        added=parameters - total_parameters(model, none(num_layers=model.num_layers)),
        trainable=trainable,
        flops_per_token=flops,
        iterations=iterations,
        eval_interval=max(1, iterations // experiment.evaluation.points),
    )


def driver_flags(experiment: Experiment, arm: Arm) -> dict[str, Any]:
    """Flags of midus pretrain of an arm, those of the experiment included, by their names with underscores."""
    given = {**experiment.driver, **arm.driver}
    return {name.lstrip("-").replace("-", "_"): value for name, value in given.items()}


def count_iterations(experiment: Experiment, flops: float, tokens: int | None = None) -> int:
    """Steps that the budget pays for, a multiple of the points of the validation curve where it is long enough.

    Args:
        experiment: with the budget and the batch.
        flops: of one token of a training step.
        tokens: instead of the budget.

    Raises:
        ValueError: the budget is below one step.
    """
    batch = experiment.global_batch_size * experiment.seq_length
    tokens = tokens or experiment.budget.tokens
    if tokens is None:
        assert experiment.budget.flops is not None
        tokens = int(experiment.budget.flops / flops)
    iterations, points = tokens // batch, experiment.evaluation.points
    if not iterations:
        raise UserError(
            f"the budget of {tokens:,} tokens is below one step of {experiment.global_batch_size} sequences of "
            f"{experiment.seq_length} tokens; raise it or choose a smaller global_batch_size"
        )
    return iterations // points * points if iterations >= points else iterations


def resolve(experiment: Experiment, model: ModelConfig, driver: argparse.ArgumentParser) -> list[ResolvedArm]:
    """All arms, checked against the base and against the driver's flags.

    Args:
        experiment: as read.
        model: architecture of the base.
        driver: parser of ``pretrain_midus.py``.

    Raises:
        ValueError: an arm that does not fit the base or the budget, a driver flag that is unknown or not to be given.
    """
    check_driver_flags(experiment.driver, driver, "driver")
    for arm in experiment.arms:
        check_driver_flags(arm.driver, driver, f"arm {arm.name!r}: driver")
    return [resolve_arm(experiment, arm, model) for arm in experiment.arms]


def check_driver_flags(entries: dict[str, Any], driver: argparse.ArgumentParser, where: str) -> None:
    """Raises ``ValueError`` for a flag that the driver does not know or that this tool gives itself."""
    words_of_entries(driver, entries, where=where)
    for name in entries:
        plain = name.lstrip("-").replace("-", "_")
        if plain in RESERVED_FLAGS:
            raise UserError(f"{where}: {name!r} is set by the experiment itself; leave it out")
