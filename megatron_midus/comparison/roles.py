"""Which arms a reader looks for: the base, the reference, MIDUS; these have strong colours, the rest is grey."""

from __future__ import annotations

import math

from megatron_midus.comparison.results import ArmResult, Results

BASE_STYLE, REFERENCE_STYLE = 6, 1
MIDUS_STYLES = (0, 2, 3, 5, 4)


def base_arm(results: Results) -> ArmResult | None:
    """The base as it is."""
    return next((arm for arm in results.arms if arm.policy == "none" and not arm.trainable and arm.runs), None)


def midus_arms(results: Results) -> list[ArmResult]:
    """Arms with Memory blocks that have figures, the lowest loss on the new domain first."""
    found = [arm for arm in results.arms if arm.memory is not None and arm.runs and arm.name != results.reference]
    return sorted(found, key=_new_loss)


def best_midus(results: Results) -> ArmResult | None:
    """The lowest of those that train what the reference trains; of all of them when there is none."""
    reference, found = results.reference_arm, midus_arms(results)
    alike = [arm for arm in found if reference is not None and arm.train == reference.train]
    return (alike or found or [None])[0]


def strong_styles(results: Results) -> dict[str, int]:
    """``{arm: style of report/charts.py}`` of base, reference and at most five MIDUS arms, in that order."""
    base, reference = base_arm(results), results.reference_arm
    styles = {} if base is None else {base.name: BASE_STYLE}
    if reference is not None:
        styles[reference.name] = REFERENCE_STYLE
    strong = midus_arms(results)[: len(MIDUS_STYLES)]
    order = [arm.name for arm in results.arms]
    for arm, style in zip(sorted(strong, key=lambda arm: order.index(arm.name)), MIDUS_STYLES):
        styles[arm.name] = style
    return styles


def in_order(results: Results) -> list[ArmResult]:
    """Those with strong colours, then the rest in the order of the file."""
    strong = list(strong_styles(results))
    return sorted(results.arms, key=lambda arm: strong.index(arm.name) if arm.name in strong else len(strong))


def _new_loss(arm: ArmResult) -> float:
    loss = arm.loss("new")
    return math.inf if loss is None else loss.mean
