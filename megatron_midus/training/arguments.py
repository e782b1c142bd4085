"""The driver's command line: one flag per field of the configuration dataclasses. Imports neither torch nor Megatron."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.config.checkpoint import CheckpointConfig
from megatron_midus.config.compatibility import CompatibilityConfig
from megatron_midus.config.data import DataConfig
from megatron_midus.config.fields import add_arguments, from_namespace, heading_of, part, parts_of
from megatron_midus.config.logging import LoggingConfig
from megatron_midus.config.memory_telemetry import MemoryTelemetryConfig
from megatron_midus.config.optimizer import OptimizationConfig
from megatron_midus.config.parallel import ParallelConfig
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.run_file import parse_arguments_with_file, write_run_file
from megatron_midus.config.training import TrainingConfig
from megatron_midus.errors import UserError

_ARCHITECTURE_TITLE = "Architecture (read from the checkpoint; for training from scratch, or to be checked)"
_MEMORY_TITLE = "Memory blocks (read from the checkpoint's plan; checked against it when given)"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Everything that the command line says.

    Attributes:
        architecture: fields of ``ModelConfig`` that were given, and no others.
        memory: fields of ``MemoryConfig`` that were given, and no others.
    """

    training: TrainingConfig = part(TrainingConfig)
    optimizer: OptimizationConfig = part(OptimizationConfig)
    parallel: ParallelConfig = part(ParallelConfig)
    checkpoint: CheckpointConfig = part(CheckpointConfig)
    logging: LoggingConfig = part(LoggingConfig)
    memory_telemetry: MemoryTelemetryConfig = part(MemoryTelemetryConfig)
    data: DataConfig = part(DataConfig)
    compatibility: CompatibilityConfig = part(CompatibilityConfig)
    architecture: dict[str, Any] = part(ModelConfig, title=_ARCHITECTURE_TITLE, given_only=True)
    memory: dict[str, Any] = part(MemoryConfig, title=_MEMORY_TITLE, given_only=True)

    def to_yaml(self, *, only_changed: bool = False) -> str:
        """A file for ``--config`` that makes these arguments again; with ``only_changed`` without the defaults."""
        groups = {
            field.metadata["title"] or heading_of(field.metadata["part"]): getattr(self, field.name)
            for field in parts_of(Arguments)
        }
        return write_run_file(groups, only_changed=only_changed)

    def without_saving(self) -> Arguments:
        """The same run without ``--save``."""
        return dataclasses.replace(self, checkpoint=dataclasses.replace(self.checkpoint, save=None, save_interval=None))

    def without_outputs(self) -> Arguments:
        """The same run, writing nothing, not even what a step needs that is computed again."""
        return dataclasses.replace(
            self.without_saving(),
            training=dataclasses.replace(self.training, rerun_mode="disabled"),
            logging=dataclasses.replace(
                self.logging, tensorboard_dir=None, wandb_project=None, log_progress=False, profile=False
            ),
        )


def build_parser() -> argparse.ArgumentParser:
    """The parser behind ``pretrain_midus.py --help``."""
    parser = ArgumentParser(
        prog="pretrain_midus.py",
        description="Continue the pre-training of an up-scaled model, or train a Llama-like model from scratch. "
        "Run it under torchrun, or as one process with python.",
        allow_abbrev=False,
    )
    add_arguments(parser, Arguments)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parses the command line; raises ``UserError`` for values that do not fit each other."""
    arguments = from_namespace(Arguments, parse_arguments_with_file(build_parser(), argv))
    if arguments.compatibility.untie_embeddings_and_output_weights:
        if arguments.architecture.get("tie_word_embeddings"):
            raise UserError(
                "--untie-embeddings-and-output-weights and --tie-word-embeddings contradict each other; give one"
            )
        arguments.architecture["tie_word_embeddings"] = False
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: Arguments) -> None:
    """Refuses what no single group can check. The checks that need the number of processes are in ``checks.py``."""
    training, optimizer, parallel = arguments.training, arguments.optimizer, arguments.parallel
    if not training.skip_train and optimizer.lr is None:
        raise UserError("no learning rate was given; give --lr")
    if training.skip_train and not (arguments.checkpoint.load or arguments.checkpoint.pretrained_checkpoint):
        raise UserError("skip_train evaluates a checkpoint; give --load DIR")
    for flag, length in (("--train-samples", training.train_samples), ("--train-epochs", training.train_epochs)):
        if length is not None and (optimizer.lr_decay_iters or optimizer.lr_warmup_iters):
            raise UserError(
                f"{flag} counts samples; give --lr-decay-samples and --lr-warmup-samples, or --lr-warmup-fraction, not the "
                "-iters flags"
            )
    if training.train_epochs is not None and arguments.data.mock_data:
        raise UserError(f"train_epochs={training.train_epochs}: --mock-data has no end; give --train-iters")
    if training.train_iters is not None and (optimizer.lr_decay_samples or optimizer.lr_warmup_samples):
        raise UserError(
            "--train-iters counts steps; give --lr-decay-iters and --lr-warmup-iters, not the -samples flags"
        )
    if optimizer.lr_decay_style == "WSD":
        unit = "iters" if training.train_iters is not None else "samples"
        if getattr(optimizer, f"lr_wsd_decay_{unit}") is None:
            raise UserError(f"lr_decay_style=WSD needs --lr-wsd-decay-{unit}, the length of its last phase")
    if not arguments.data.has_data:
        raise UserError("no data were given; give --data-path, --train-data-path or --mock-data")
    if arguments.logging.profile and not (arguments.logging.profile_dir or arguments.checkpoint.save):
        raise UserError("profile writes traces; give --profile-dir DIR, or --save DIR for DIR/profile")
    if arguments.data.reset_attention_mask and (
        parallel.transformer_impl == "transformer_engine" or parallel.context_parallel_size > 1
    ):
        # Its causal attention takes no other mask and would leave this one out without a word.
        raise UserError(
            "reset_attention_mask needs the local layers, because Transformer Engine's causal attention ignores the mask "
            "between documents; give --transformer-impl local and no context parallelism"
        )
    if training.fp16 and parallel.distributed_backend == "gloo":
        raise UserError("fp16 needs a GPU; use --bf16 or neither with --distributed-backend gloo")
