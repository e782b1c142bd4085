"""What a benchmark found, as data: for the table, JSON and the plot."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from megatron_midus.benchmark.ceilings import Ceilings
from megatron_midus.benchmark.parity import Check
from megatron_midus.benchmark.timing import Summary, ratio
from megatron_midus.benchmark.work import Work
from megatron_midus.report.machine import device_name

SCHEMA_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        phases: time of each phase by name, ms.
        total: of all phases together, ms.
        ratios: by baseline, this contender's time over the baseline's in the same round.
        peak_bytes: peak memory above what was held before, ``None`` when it was not measured.
        gigabytes_per_second, teraflops: necessary work over the median time.
        tokens_per_second: by phase, where tokens are served.
        roofline_share: least possible time of that work on this machine over the median time.
    """

    name: str
    phases: dict[str, Summary]
    total: Summary
    ratios: dict[str, Summary]
    peak_bytes: int | None = None
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    roofline_share: float | None = None
    tokens_per_second: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Section:
    """All contenders at one shape.

    Attributes:
        title: of the section: sub-command and shape.
        shape: the row of the table of shapes.
        baselines: names that ``Row.ratios`` may have, in the order of the columns.
        checks: of parity, all passed.
        extra: what only one sub-command has: of growth axis, value, base_shape, and bytes_held by contender.
    """

    title: str
    description: str
    shape: dict[str, Any]
    rows: list[Row]
    baselines: list[str]
    ceilings: Ceilings | None = None
    checks: list[Check] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """One run of the tool."""

    kind: str
    settings: dict[str, Any]
    device: str
    machine: dict[str, Any]
    """Of ``machine_facts``."""
    sections: list[Section]

    @property
    def device_text(self) -> str:
        """What the figures were measured on."""
        if self.device == "cpu":
            threads, cores = self.machine["threads"], self.machine["cores"]
            return f"{self.machine['processor']}, {threads} of {cores} CPU threads"
        return device_name(self.machine)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``sections[i]["rows"][j]["total"]["median"]`` is a time in milliseconds."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "settings": self.settings,
            "device": self.device,
            "machine": self.machine,
            "sections": [dataclasses.asdict(section) for section in self.sections],
        }


def make_rows(
    times: dict[str, list[list[float]]],
    phase_names: Sequence[str],
    baselines: dict[str, Sequence[str]],
    *,
    work: dict[str, list[Work]] | None = None,
    ceilings: Ceilings | None = None,
    peaks: dict[str, int | None] | None = None,
) -> list[Row]:
    """A row per contender from the milliseconds that ``timing.interleave`` measured.

    Args:
        baselines: by contender, what its time is put in relation to.
    """
    rows = []
    for name, phases in times.items():
        total = Summary.of([sum(round_) for round_ in zip(*phases)])
        rates = _rates(total, (work or {}).get(name), ceilings)
        rows.append(
            Row(
                name=name,
                phases={phase: Summary.of(measured) for phase, measured in zip(phase_names, phases)},
                total=total,
                ratios={other: ratio(phases, times[other]) for other in baselines.get(name, ())},
                peak_bytes=(peaks or {}).get(name),
                **rates,
            )
        )
    return rows


def _rates(total: Summary, work: list[Work] | None, ceilings: Ceilings | None) -> dict[str, float]:
    if work is None or ceilings is None:
        return {}
    flops, num_bytes = (sum(part) for part in zip(*work))
    least = sum(ceilings.milliseconds(*phase) for phase in work)
    return {
        "gigabytes_per_second": num_bytes / total.median / 1e6,
        "teraflops": flops / total.median / 1e9,
        "roofline_share": least / total.median,
    }
