"""``midus background``: counts which slots text of the old domain reads, for training with --memory-update-slots."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from megatron_midus.config.background import BackgroundConfig
from megatron_midus.config.checkpoint import CheckpointConfig
from megatron_midus.config.fields import add_arguments
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.run_file import words_of_entries
from megatron_midus.config.training import TrainingConfig
from megatron_midus.training.arguments import Arguments, check_arguments
from megatron_midus.training.main import as_rank, prepare
from megatron_midus.verbs.pretrain import follow_ranks

# Not always in the latest checkpoint: a damaged one is passed over.
_PATH = re.compile(r"the counts are in (.*)")


def background(*, processes: int = 1, show_log: bool = True, **settings: Any) -> Path:
    """Counts in processes of its own; the keywords are the flags of ``midus background``. Returns the file of the counts.

    Args:
        processes: on this machine; more than one are started with torchrun.
        show_log: print the log as it comes.
        settings: flags, for instance ``load="run"``, ``data_path=["old"]``, ``num_batches=100``.

    Raises:
        UserError: what was refused.
        RuntimeError: the processes ended otherwise; the message ends with the last lines of their log.
    """
    parser = ArgumentParser()
    add_arguments(parser, BackgroundConfig)
    words = words_of_entries(parser, settings, where="background()")
    log = follow_ranks("background", processes, words, show_log=show_log)
    (path,) = (found[1] for line in log.tail if (found := _PATH.search(line)))
    return Path(path)


def command(config: BackgroundConfig) -> int:
    """Counts; every rank of a job calls it."""
    return as_rank(lambda: _count(config))


def _count(config: BackgroundConfig) -> int:
    start = prepare(_as_evaluation(config))
    # Megatron, after the environment that it reads is set.
    from megatron_midus.training.background import count_background

    count_background(start)
    return 0


def _as_evaluation(config: BackgroundConfig) -> Arguments:
    """The driver's arguments for passes over ``num_batches`` training batches that train nothing."""
    arguments = Arguments(
        training=TrainingConfig(
            train_iters=config.num_batches,
            skip_train=True,
            eval_iters=0,
            eval_interval=0,
            micro_batch_size=config.micro_batch_size,
            global_batch_size=config.global_batch_size,
            bf16=config.bf16,
            seed=config.seed,
        ),
        checkpoint=CheckpointConfig(load=config.load, ckpt_step=config.ckpt_step, exit_on_missing_checkpoint=True),
        data=config.data,
        # Activations that are computed again would be observed in a backward pass that there is not.
        parallel=dataclasses.replace(
            config.parallel, recompute_granularity=None, recompute_method=None, recompute_num_layers=None
        ),
    )
    check_arguments(arguments)
    return arguments
