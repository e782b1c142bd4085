"""What the check of an installation can be told."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Check of this machine

    Says what is installed, which GPU and memory backend a run would take, how much disk is free, what is missing and how to
    get it. Exit code 1 when something that every verb needs is missing.

    Examples:
      midus doctor
      midus doctor --directory /scratch/run --json doctor.json
    """

    directory: str = dataclasses.field(default=".", metadata={"metavar": "DIR"})
    """Directory whose free disk space is checked: where checkpoints will be written."""

    json: str | None = dataclasses.field(default=None, metadata={"metavar": "OUT"})
    """Write everything here as JSON."""
