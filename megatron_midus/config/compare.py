"""What a comparison of up-scaling methods can be told beside its experiment file."""

from __future__ import annotations

import dataclasses

from megatron_midus.config.text import check_at_least_one


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Comparison

    Up-scales one base in several ways, trains all of them alike, and compares the results in one table. Run the same
    command again to resume; after a change in the file only what depends on it runs again.

    Examples:
      midus compare examples/comparison/smoke.yaml --output comparison_smoke
      midus compare mine.yaml --output out --arms llama_pro midus --seeds 1 --jobs 2
    """

    experiment: str = dataclasses.field(metadata={"positional": True, "metavar": "EXPERIMENT.yaml"})
    """What is compared; docs/comparing.md lists the keys."""

    output: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """Output directory. When absent: comparison_<name of the file>."""

    arms: list[str] | None = dataclasses.field(default=None, metadata={"metavar": "NAME"})
    """Only these arms."""

    seeds: list[int] | None = dataclasses.field(default=None, metadata={"metavar": "SEED"})
    """Only these seeds."""

    jobs: int = 1
    """Runs at a time; more than 1 spoils the timings."""

    report_only: bool = False
    """Run nothing; write the report of the finished runs."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "jobs")
