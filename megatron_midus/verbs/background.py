"""``midus background``: counts which slots text of the old domain reads, for training with --memory-update-slots."""

from __future__ import annotations

import dataclasses

from megatron_midus.config.background import BackgroundConfig
from megatron_midus.config.checkpoint import CheckpointConfig
from megatron_midus.config.training import TrainingConfig
from megatron_midus.training.arguments import Arguments, check_arguments
from megatron_midus.training.main import as_rank, prepare


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
