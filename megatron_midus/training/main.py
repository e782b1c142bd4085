"""The driver from command line to exit code. Heavy imports wait until the arguments are known to be good."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from megatron_midus import cli
from megatron_midus.errors import is_users_mistake
from megatron_midus.training.architecture import resolve_model
from megatron_midus.training.arguments import Arguments, parse_arguments
from megatron_midus.training.checkpoint.source import find_start
from megatron_midus.training.checks import (
    check_background,
    check_environment,
    check_experts,
    check_kl_to_base,
    check_memory_settings,
    check_schedule,
    resolve_pipeline,
    resolve_sizes,
)
from megatron_midus.training.error_file import write_error_file
from megatron_midus.training.messages import warn_rank_0
from megatron_midus.training.preflight import check_data_contents, check_files, check_model_fits
from megatron_midus.training.schedule import schedule_lengths
from megatron_midus.training.start import Start

# Libraries read these when they start: cuBLAS workspaces of one size, attention kernels of Transformer Engine without
# atomic additions, and one order of summation in NCCL (not the switches').
DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "Ring",
}

# What rank 0 needs to report a mistake that all ranks made, before the others would repeat it.
_SECONDS_FOR_RANK_0 = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says; returns the exit code.

    Raises:
        ValueError: a user's mistake, in one line.
    """
    arguments = parse_arguments(argv)
    if arguments.training.skip_train:
        arguments = arguments.without_saving()
    start = prepare(arguments)
    from megatron_midus.platform.deferred_compile import deferred_compile

    with deferred_compile():
        from megatron_midus.training.pretrain import pretrain

    return pretrain(start)


def prepare(arguments: Arguments) -> Start:
    """Finds what a run begins with, refuses what cannot be, and sets up what Megatron looks at when it is imported.

    Raises:
        ValueError: a user's mistake, in one line.
    """
    check_environment(arguments)
    sizes = resolve_sizes(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    if not arguments.training.skip_train and arguments.training.train_epochs is None:
        schedule_lengths(arguments.optimizer, arguments.training, sizes.global_batch_size)
    check_files(arguments)
    checkpoint, source = find_start(arguments.checkpoint)
    arguments = dataclasses.replace(arguments, checkpoint=checkpoint)
    tokenizer, architecture = resolve_model(arguments, source)
    check_model_fits(arguments, architecture, warn_rank_0)
    parallel = resolve_pipeline(
        arguments.parallel,
        architecture.model,
        architecture.plan,
        seq_length=arguments.data.seq_length,
        train=architecture.train,
    )
    arguments = dataclasses.replace(arguments, parallel=parallel)
    check_schedule(arguments, sizes, architecture.plan.num_layers)
    check_memory_settings(arguments, architecture.plan)
    check_experts(arguments, architecture, sizes.world_size)
    check_kl_to_base(arguments, architecture)
    check_background(arguments, architecture)
    _prepare_environment(arguments)
    check_data_contents(arguments, tokenizer)
    from megatron_midus import platform

    platform.check_backend(arguments.parallel.distributed_backend)
    if arguments.parallel.distributed_backend == "gloo":
        # Before Megatron is imported: parts of it look at torch.cuda while they are.
        platform.activate_cpu_mapping()
    return Start(arguments, sizes, source, architecture, tokenizer)


def _prepare_environment(arguments: Arguments) -> None:
    """What libraries read once, when they are imported."""
    # Announcements on every rank of what a CPU does not have, and of what libraries plan for their future.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.parallel.distributed_backend == "nccl":
        # Kernels of tensor parallelism and their communication start in the order they are queued.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if arguments.parallel.deterministic_mode:
        for name, value in DETERMINISTIC_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


@contextlib.contextmanager
def _lost_ranks_named(rank: int) -> Iterator[None]:
    """Turns what a collective raises when another rank is gone into one line, an ``OSError``; the rank that is gone, or
    its launcher, says why."""
    try:
        yield
    except RuntimeError as error:
        import torch

        reason = " ".join(str(error).split())
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in reason.lower():
            raise
        # Source lines of the library and advice that comes after the reason.
        reason = re.sub(r"\[\S*gloo\S*\] ", "", reason).split(". This is typically")[0][:200]
        raise ConnectionError(
            f"rank {rank} lost another rank ({reason}), so this run cannot go on; the first message of the job says what "
            "happened there. Start it again: it goes on from the latest checkpoint in --load"
        ) from None


def run() -> NoReturn:
    """``main`` with the exit codes and the one-line errors of all tools, said once and not by every rank."""
    # SIGTERM has to end a rank that waits in a collective, where no handler of Python's runs.
    cli.run(lambda: as_rank(main), handle_signals=False)


def as_rank(function: Callable[[], int]) -> int:
    """Calls ``function`` as one rank of a job: what all ranks have to say is said once, and torchrun learns of it."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        with _lost_ranks_named(rank):
            return function()
    except Exception as error:
        if rank > 0 and is_users_mistake(error):
            # Mistakes are mostly everybody's. Rank 0 says so and the launcher ends us; otherwise we speak after a while.
            _wait_for_rank_0()
        _leave_for_torchrun(error)
        raise
    except KeyboardInterrupt:
        if rank > 0:
            sys.exit(130)  # everybody's as well
        raise
    finally:
        sys.stdout.flush()


def _leave_for_torchrun(error: Exception) -> None:
    """A user's mistake is one line there, too; a bug is its traceback."""
    if is_users_mistake(error) and not os.environ.get("MIDUS_TRACEBACK"):
        text = cli.describe(error)
    else:
        text = "".join(traceback.format_exception(error))
    write_error_file(text, kind=type(error).__name__)


def _wait_for_rank_0() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signals = sys.modules.get("megatron_midus.training.signals")
    if signals is not None and signals.TerminationSignal.received_here == signal.SIGTERM:
        sys.exit(1)  # the launcher was quicker than we
    time.sleep(_SECONDS_FOR_RANK_0)
