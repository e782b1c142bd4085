"""What an average of checkpoints can be told."""

from __future__ import annotations

import dataclasses

from megatron_midus.config.text import check_at_least_one
from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class AverageConfig:
    """Averaging

    Averages the weights of several checkpoints of one run, tensor by tensor. The result has no optimizer state: evaluate it,
    export it, or train from it with --pretrained-checkpoint.

    Examples:
      midus average --load checkpoints --save averaged --last 5
      midus average --load checkpoints --save averaged --iterations 800 900 1000
      midus convert --load averaged --save midus_hf --to hf
    """

    load: str = dataclasses.field(metadata={"metavar": "DIR"})
    """Root of the run's checkpoints."""

    save: str = dataclasses.field(metadata={"metavar": "DIR"})
    """Output directory, a Megatron checkpoint; made whole or not at all."""

    last: int | None = dataclasses.field(default=None, metadata={"metavar": "K"})
    """Average the newest K checkpoints."""

    iterations: list[int] = dataclasses.field(default_factory=list, metadata={"metavar": "N", "separator": ","})
    """Average the checkpoints of these iterations."""

    workers: int | None = None
    """Tensors that are averaged at a time; each worker holds a few copies of one tensor. When absent: the cores of this
    machine, up to 4."""

    verify_checkpoint: bool = True
    """Compare every file of the checkpoints with its checksum first."""

    overwrite: bool = False
    """Replace the output directory when it exists."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "last")
        if (self.last is None) == (not self.iterations):
            raise UserError("give either --last K or --iterations N N …, the checkpoints to average")
        if len(set(self.iterations)) < len(self.iterations):
            raise UserError(
                f"--iterations {' '.join(map(str, self.iterations))} names one checkpoint twice; name each once"
            )
