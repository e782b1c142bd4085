"""The result of a comparison in one sentence: the best MIDUS arm against the reference and the base."""

from __future__ import annotations

from megatron_midus.comparison.results import ArmResult, Mean, Results
from megatron_midus.comparison.roles import base_arm, best_midus, midus_arms


def headline(results: Results) -> str:
    """What a reader takes away; says so when there is nothing to compare yet."""
    reference = results.reference_arm
    trained = [arm for arm in results.arms if arm.trainable and arm.runs and arm.name != results.reference]
    if reference is None or not trained:
        return f"Nothing to compare yet: {_missing(results)}."
    best = best_midus(results) or min(trained, key=lambda arm: arm.runs and arm.loss("new").mean)  # type: ignore[union-attr]
    change = best.difference(reference)
    if change is None:
        return f"Nothing to compare yet: {best.name} and {reference.name} have no seed in common."
    sentence = f"{_title(best, results)} {_against(change, reference)} on the new domain{_share(best, reference)}"
    base = base_arm(results)
    gain = None if base is None or base is reference else best.difference(base)
    if gain is not None:
        sentence += f" and {_distance(gain)} the base"
    old = best.difference(reference, "old")
    if old is not None:
        sentence += f"; on the base's own domain it {_against(old, reference)}"
    return f"{sentence}{'' if change.count > 1 else ' (one seed)'}."


def is_clear(change: Mean) -> bool:
    """Whether a difference is more than two standard errors away from zero; never so for one seed."""
    return change.error is not None and abs(change.mean) > 2 * change.error


def _title(best: ArmResult, results: Results) -> str:
    """``MIDUS (hive, the best of 5)``."""
    if best.memory is None:
        return f"{best.name}, the lowest of the others,"
    alike = [arm for arm in midus_arms(results) if arm.train == best.train]
    return f"MIDUS ({best.name}{f', the best of {len(alike)}' if len(alike) > 1 else ''})"


def _missing(results: Results) -> str:
    if results.reference_arm is None:
        return f"the reference {results.reference} has no figures"
    return f"only the reference {results.reference} has figures"


def _against(change: Mean, reference: ArmResult) -> str:
    if change.error is not None and not is_clear(change):
        amount = f"{change.mean:+.3f}".replace("-", "−")
        return f"is level with {reference.name} ({amount} nats/token, within two standard errors)"
    return f"is {_distance(change)} {reference.name}"


def _distance(change: Mean) -> str:
    return f"{abs(change.mean):.3f} nats/token {'better than' if change.mean < 0 else 'worse than'}"


def _share(best: ArmResult, reference: ArmResult) -> str:
    if not reference.trainable:
        return ""
    return f" with {best.trainable / reference.trainable * 100:.0f} % of its trained parameters"
