"""What a training run wrote to TensorBoard, as curves: losses over tokens and seconds, time a step, memory."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path

from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class Point:
    """A loss (nats per token) after so many training tokens and seconds of training steps."""

    tokens: int
    seconds: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Curves:
    """One run.

    Attributes:
        training, validation: losses; time counts steps alone, without evaluations and saves.
        seconds_per_iteration: median over log intervals, the first one left out when there are others.
        peak_memory_bytes: of the last rank: device memory, on a CPU the whole process.
    """

    training: list[Point]
    validation: list[Point]
    seconds_per_iteration: float
    peak_memory_bytes: int | None

    @property
    def final_validation(self) -> float:
        """Held-out loss at the end; infinite when there is none."""
        last = self.validation[-1].loss if self.validation else math.inf
        return last if math.isfinite(last) else math.inf

    def validation_at(self, seconds: float) -> float | None:
        """Held-out loss after so many seconds of training, between two points by a straight line."""
        for left, right in zip(self.validation, self.validation[1:]):
            if left.seconds <= seconds <= right.seconds:
                span = right.seconds - left.seconds
                share = (seconds - left.seconds) / span if span else 0.0
                return left.loss + share * (right.loss - left.loss)
        return None


def read_scalars(directory: str | Path) -> dict[str, dict[int, float]]:
    """``{tag: {step: value}}`` of all event files of a directory; what a resumed run wrote again counts."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={SCALARS: 0})
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]
    }


def make_curves(scalars: dict[str, dict[int, float]], *, tokens_per_iteration: int) -> Curves:
    """Curves from the scalars of the driver.

    Args:
        scalars: ``{tag: {iteration: value}}``.
        tokens_per_iteration: of the global batch.

    Raises:
        ValueError: no time per iteration was written.
    """
    times = sorted(scalars.get("iteration-time", {}).items())
    if not times:
        raise UserError("the run wrote no iteration-time")
    # Each time is the mean over the steps since the one before.
    clock, seconds, last = {0: 0.0}, 0.0, 0
    for iteration, mean in times:
        seconds += mean * (iteration - last)
        clock[iteration], last = seconds, iteration

    def at(iteration: int) -> float:
        known = max(i for i in clock if i <= iteration)
        return clock[known] + (iteration - known) * times[-1][1]

    def points(tag: str) -> list[Point]:
        return [Point(i * tokens_per_iteration, at(i), loss) for i, loss in sorted(scalars.get(tag, {}).items())]

    memory = scalars.get("peak-memory-bytes", {})
    return Curves(
        training=points("lm loss"),
        validation=points("lm loss validation"),
        # The first interval allocates memory and chooses kernels.
        seconds_per_iteration=statistics.median([mean for _, mean in times[1:]] or [times[0][1]]),
        peak_memory_bytes=int(max(memory.values())) if memory else None,
    )


def thin(points: list[Point], count: int) -> list[Point]:
    """At most ``count`` points: means over equal parts, each at its last token."""
    if len(points) <= count:
        return points
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    parts = [points[a:b] for a, b in zip(edges, edges[1:]) if b > a]
    return [dataclasses.replace(part[-1], loss=statistics.fmean(p.loss for p in part)) for part in parts]
