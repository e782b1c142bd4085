"""LoggingConfig: the log line, TensorBoard and Weights & Biases."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Logging"""

    log_interval: int = 100
    """Steps between log lines."""

    log_throughput: bool = False
    """Add TFLOP/s per device to the log line; tokens per second and the time left are always there."""

    log_params_norm: bool = False
    """Add the L2 norm of the parameters to the log line."""

    log_num_zeros_in_grad: bool = False
    """Add the number of zeros in the gradient to the log line."""

    log_progress: bool = True
    """Show a progress bar when the output is a terminal. Files only ever get whole lines."""

    timing_log_level: Literal[0, 1, 2] = 0
    """Timers printed with the log line: 0 = none, 1 = parts of a step, 2 = every transfer."""

    timing_log_option: Literal["max", "minmax", "all"] = "minmax"
    """Which ranks a timer shows: max = the slowest, minmax = fastest and slowest, all = each."""

    barrier_with_L1_time: bool = True
    """Wait for all ranks before timers of level 1 start, so that they measure work and not waiting."""

    profile: bool = False
    """Record the steps from --profile-step-start to --profile-step-end with torch's profiler."""

    profile_step_start: int = 10
    """First step recorded, counted as in the log."""

    profile_step_end: int = 12
    """First step after the recording."""

    profile_ranks: list[int] = dataclasses.field(default_factory=lambda: [0])
    """Ranks that record."""

    profile_dir: str | None = None
    """Directory for the traces, one rank_N.json a rank for chrome://tracing or Perfetto; --save/profile when absent."""

    tensorboard_dir: str | None = None
    """Directory for TensorBoard events; none when absent."""

    tensorboard_log_interval: int = 1
    """Steps between TensorBoard points."""

    tensorboard_queue_size: int = 1000
    """Points kept in memory before they are written."""

    log_memory_to_tensorboard: bool = False
    """Write peak memory, bytes, to TensorBoard."""

    wandb_project: str | None = None
    """Weights & Biases project; not used when absent."""

    wandb_exp_name: str | None = None
    """Weights & Biases run name. Must be given with --wandb-project."""

    wandb_save_dir: str | None = None
    """Local directory of Weights & Biases; --save/wandb when absent."""

    def __post_init__(self) -> None:
        for name in ("log_interval", "tensorboard_log_interval", "tensorboard_queue_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.profile and not 1 <= self.profile_step_start < self.profile_step_end:
            raise UserError(
                f"profile_step_start={self.profile_step_start} and profile_step_end={self.profile_step_end} hold no "
                "step; give 1 <= start < end"
            )
        if self.wandb_project is not None and self.wandb_exp_name is None:
            raise UserError(f"wandb_project={self.wandb_project!r} needs --wandb-exp-name")
