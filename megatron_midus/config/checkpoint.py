"""CheckpointConfig: where training state comes from, where it goes, and how much of it."""

from __future__ import annotations

import dataclasses

from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints"""

    load: str | None = None
    """Checkpoint directory to continue from. May be empty or equal to --save before the first run."""

    save: str | None = None
    """Directory for checkpoints; nothing is saved when absent. A run never begins before the latest iteration in it:
    it resumes there if --load or --pretrained-checkpoint is what that run began with, and is refused otherwise."""

    save_interval: int | None = None
    """Steps between checkpoints; only at the end of the run when absent."""

    ckpt_step: int | None = None
    """Iteration to load; the latest when absent."""

    verify_checkpoint: bool = True
    """Compare every file of a checkpoint with its checksum before it is loaded, each process a share. A damaged one
    is skipped for the newest whole one before it, or ends the run if --ckpt-step named it."""

    pretrained_checkpoint: str | None = None
    """Checkpoint directory whose weights begin a new run, used while --load holds nothing."""

    finetune: bool = False
    """Take only the weights of --load: iteration 0, new optimizer, new schedule, first sample."""

    load_optim: bool = True
    """Load the optimizer and the schedule."""

    load_rng: bool = True
    """Load the state of the random number generators."""

    save_optim: bool = True
    """Save the optimizer and the schedule."""

    save_rng: bool = True
    """Save the state of the random number generators."""

    async_save: bool = False
    """Write checkpoints in the background while training goes on."""

    ckpt_fully_parallel_save: bool = True
    """Data-parallel processes share the writing of the state that they all hold; otherwise the first writes
    everything."""

    keep_last: int = 0
    """Newest checkpoints of --save to keep, not counting the up-scaled model at iteration 0; 0 = all."""

    exit_on_missing_checkpoint: bool = False
    """End with an error instead of starting afresh when --load holds no checkpoint."""

    def __post_init__(self) -> None:
        if self.save_interval is not None and self.save_interval < 1:
            raise UserError(f"save_interval={self.save_interval} must be at least 1")
        if self.save_interval is not None and self.save is None:
            raise UserError(f"save_interval={self.save_interval} needs --save DIR")
        if self.keep_last < 0:
            raise UserError(f"keep_last={self.keep_last} must be 0 (all) or more")
        if self.ckpt_step is not None and self.load is None:
            raise UserError(f"ckpt_step={self.ckpt_step} needs --load DIR")
        if self.finetune and self.load is None:
            raise UserError("finetune takes weights from a checkpoint; give --load DIR")
