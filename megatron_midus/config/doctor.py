"""What the check of an installation can be told."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Check of this machine

    Says what is installed, which GPU and memory backend a run would take, how much disk is free, what is missing and how to
    get it. Exit code 1 when something that every verb needs is missing. With --family it compares a family of models with
    transformers instead, module by module. Exit code 1 when they differ.

    Examples:
      midus doctor
      midus doctor --family Llama-3.2-1B
      midus doctor --directory /scratch/run --json doctor.json
    """

    directory: str = dataclasses.field(default=".", metadata={"metavar": "DIR"})
    """Directory whose free disk space is checked: where checkpoints will be written."""

    family: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """A Hugging Face model, a directory or org/name[@revision], its config.json is enough: the Hugging Face and the Megatron
    model that are made of it here compute what that of transformers does, or the first module that differs is named. Weights
    that are absent or above 4 GiB are random ones of a smaller shape. Nothing else is checked."""

    json: str | None = dataclasses.field(default=None, metadata={"metavar": "OUT"})
    """Write everything here as JSON."""
