"""--profile: a window of steps recorded by torch's profiler, one trace a rank."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_midus.config.logging import LoggingConfig
from megatron_midus.files import staged_file


class StepProfiler:
    """Records steps ``profile_step_start`` to ``profile_step_end - 1`` on the ranks that were asked for.

    Args:
        config: the window, the ranks and the directory.
        directory: for the traces, where ``config.profile_dir`` is absent.
        rank: of this process.
    """

    def __init__(self, config: LoggingConfig, *, directory: str | Path, rank: int) -> None:
        self.config = config
        self.path = Path(config.profile_dir or directory) / f"rank_{rank}.json"
        self.is_active = config.profile and rank in config.profile_ranks
        self._profiler: torch.profiler.profile | None = None

    def before_step(self, iteration: int) -> None:
        """``iteration``: of the step that is about to run."""
        # Not equality: a run may go on in the middle of the window.
        config = self.config
        if not self.is_active or not config.profile_step_start <= iteration < config.profile_step_end:
            return
        if self._profiler is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.profiler.ProfilerActivity.CUDA in torch.profiler.supported_activities():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def after_step(self, iteration: int) -> Path | None:
        """``iteration``: of the step that has run. Returns the trace when this was the last of the window."""
        if self._profiler is None or iteration + 1 < self.config.profile_step_end:
            return None
        return self.close()

    def close(self) -> Path | None:
        """Writes what was recorded, if anything was; also when a run ends inside the window."""
        if self._profiler is None:
            return None
        self._profiler.stop()
        with staged_file(self.path) as partial:
            self._profiler.export_chrome_trace(str(partial))
        self._profiler = None
        return self.path
