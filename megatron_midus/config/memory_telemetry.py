"""MemoryTelemetryConfig: what is told about the Memory blocks while they train, and what is done about unused parts."""

from __future__ import annotations

import dataclasses

from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class MemoryTelemetryConfig:
    """Memory blocks in training (statistics, alarm, revival, balance)"""

    memory_log_interval: int = 100
    """Steps between reports on the Memory blocks: slots used and dead, entropies, norms, update/weight ratios; 0 = none.
    Only the last --memory-log-steps steps before a report are counted, so the others cost nothing."""

    memory_log_steps: int = 1
    """Steps whose look-ups one report counts, the last ones of its interval."""

    memory_usage_decay: float = 0.9
    """Decay, from report to report, of the moving average of usage by which a slot or a sub-key counts as dead."""

    memory_dead_threshold: float = 0.01
    """A slot or sub-key is dead while the moving average of its usage is below this fraction of an equal share."""

    memory_alarm_threshold: float = 0.02
    """Warn in the log when the effective share of slots, exp(entropy of usage) over the number of slots (or of reads
    where those are fewer), falls below this; once per block until it recovers. 0 = never."""

    memory_revive_interval: int = 0
    """Steps between revivals: dead sub-keys are put beside used ones of their head and their optimizer moments are
    zeroed. A multiple of --memory-log-interval; 0 = never."""

    memory_balance_loss_coeff: float = 0.0
    """Weight of the auxiliary loss that spreads the look-ups of each head over its sub-keys; 0 = none. Computes the
    scores of all sub-keys a second time."""

    def __post_init__(self) -> None:
        for name in ("memory_log_interval", "memory_revive_interval", "memory_balance_loss_coeff"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be 0 (off) or more")
        if self.memory_log_interval and not 1 <= self.memory_log_steps <= self.memory_log_interval:
            raise UserError(
                f"memory_log_steps={self.memory_log_steps} must lie between 1 and "
                f"memory_log_interval={self.memory_log_interval}"
            )
        for name in ("memory_usage_decay", "memory_dead_threshold", "memory_alarm_threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        self._check_revival()

    def _check_revival(self) -> None:
        if not self.memory_revive_interval:
            return
        if not self.memory_log_interval:
            raise UserError(
                f"memory_revive_interval={self.memory_revive_interval} needs the statistics to know what is dead; give "
                "--memory-log-interval"
            )
        if self.memory_revive_interval % self.memory_log_interval:
            raise UserError(
                f"memory_revive_interval={self.memory_revive_interval} must be a multiple of "
                f"memory_log_interval={self.memory_log_interval}"
            )

    def is_counted(self, iteration: int) -> bool:
        """Whether the look-ups of the step that ends as ``iteration`` are counted."""
        interval = self.memory_log_interval
        return bool(interval) and -iteration % interval < self.memory_log_steps

    def is_reported(self, iteration: int) -> bool:
        """Whether a report is due after ``iteration``."""
        return bool(self.memory_log_interval) and iteration % self.memory_log_interval == 0

    def revives(self, iteration: int) -> bool:
        """Whether dead sub-keys are revived after ``iteration``."""
        return bool(self.memory_revive_interval) and iteration % self.memory_revive_interval == 0
