"""Scores of tasks with standard errors, and differences of two models on the same items.

A score is a mean or a function of means, so every item has an *influence* on it: how far it moves the score from its
expectation. The root of the sum of squared influences is the standard error (the infinitesimal jackknife, Efron 1982); the
same over differences of influences is the standard error of a difference between two models on the same items, in which
what makes an item hard for both cancels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    """Standard error as lm-eval reports it; from the influences where it reports none."""
    higher_is_better: bool
    items: int
    influences: tuple[float, ...] | None = dataclasses.field(default=None, repr=False)
    """Per item, in the order of the data; ``None`` for metrics that are no function of means."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the influences left out."""
        return {
            "value": self.value if math.isfinite(self.value) else None,
            "stderr": self.stderr,
            "higher_is_better": self.higher_is_better,
            "items": self.items,
        }


@dataclasses.dataclass(frozen=True)
class Difference:
    """A model's score minus that of the first model."""

    value: float
    stderr: float | None
    """Paired; ``None`` where the metric has no influences."""


def subtract(score: Score, first: Score) -> Difference:
    """``score - first`` with its paired standard error."""
    value = score.value - first.value
    mine, theirs = score.influences, first.influences
    if mine is None or theirs is None or len(mine) != len(theirs):
        return Difference(value, None)
    return Difference(value, root_sum_of_squares([a - b for a, b in zip(mine, theirs)]))


def root_sum_of_squares(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values))


def mean_influences(strata: Sequence[Sequence[float]]) -> list[float] | None:
    """Influences on the mean over all items of ``strata``, each with an expectation of its own.

    With one stratum the standard error is ``std(ddof=1) / sqrt(n)``. ``None`` where a stratum has one item and
    therefore no spread to estimate.
    """
    total = sum(len(items) for items in strata)
    influences: list[float] = []
    for items in strata:
        count = len(items)
        if count < 2:
            return None
        mean, bessel = math.fsum(items) / count, math.sqrt(count / (count - 1))
        influences += [bessel * (item - mean) / total for item in items]
    return influences


def perplexity_influences(log_likelihoods: Sequence[float], weights: Sequence[float]) -> list[float] | None:
    """Influences of documents on ``exp(-sum(log_likelihoods) / sum(weights))``, a ratio estimator.

    Args:
        log_likelihoods: nats per document.
        weights: words or bytes per document.
    """
    count, weight = len(weights), math.fsum(weights)
    if count < 2:
        return None
    ratio = -math.fsum(log_likelihoods) / weight
    if ratio > 700:
        return None  # exp overflows
    scale = math.exp(ratio) * math.sqrt(count / (count - 1)) / weight
    return [scale * (-nats - ratio * size) for nats, size in zip(log_likelihoods, weights)]


def bits_influences(log_likelihoods: Sequence[float], weights: Sequence[float]) -> list[float] | None:
    """Influences of documents on ``-sum(log_likelihoods) / sum(weights) / ln 2``."""
    count, weight = len(weights), math.fsum(weights)
    if count < 2:
        return None
    ratio = -math.fsum(log_likelihoods) / weight
    scale = math.sqrt(count / (count - 1)) / weight / math.log(2)
    return [scale * (-nats - ratio * size) for nats, size in zip(log_likelihoods, weights)]


def influences_of(metric: str, strata: Sequence[Sequence[Any]]) -> list[float] | None:
    """Influences of the per-item results of lm-eval, by what they look like; ``None`` for a metric that is neither.

    Args:
        metric: lm-eval's name.
        strata: results of each task of a group: numbers, or ``(log likelihood, weight)`` pairs.
    """
    items = [item for stratum in strata for item in stratum]
    if all(isinstance(item, (int, float)) for item in items):
        return mean_influences(strata) if metric.startswith(("acc", "exact_match")) else None
    if len(strata) != 1 or not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        return None
    log_likelihoods, weights = [float(item[0]) for item in items], [float(item[1]) for item in items]
    if metric in ("word_perplexity", "byte_perplexity"):
        return perplexity_influences(log_likelihoods, weights)
    return bits_influences(log_likelihoods, weights) if metric == "bits_per_byte" else None
