"""The table of a comparison: one row per arm, the same columns for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_midus.comparison.headline import headline, is_clear
from megatron_midus.comparison.results import ArmResult, Mean, Results
from megatron_midus.comparison.roles import in_order, strong_styles
from megatron_midus.report.table import MISSING, Cell, markdown_table, number_cell

COLUMNS: dict[str, str] = {
    "arm": "name in the experiment file",
    "trains": "what learns: inserted blocks, all parameters, or nothing",
    "recall % ↑": "questions about facts whose answer greedy decoding writes",
    "answer nats ↑": "log likelihood of an answer, mean over the questions",
    "new ppl ↓": "perplexity on the held-out text of the new domain",
    "Δ loss ↓": "held-out loss (new domain, nats/token) minus that of the reference, seed by seed",
    "old ppl ↓": "the same as new ppl on the base's own domain: what was forgotten",
    "third ppl ↓": "the same on a third domain, which no arm trained on, replayed or fitted its domain gate on",
    "loss at equal time ↓": "loss on the validation batches when the arm had trained as many seconds as the quickest arm in all; "
    "its learning rate was not yet at its end then",
    "added": "parameters that the base does not have",
    "trained": "parameters that learn, and their share of the reference's",
    "lr": "largest learning rate",
    "tokens": "training tokens",
    "GFLOP/token": "of a training step, forward and backward; of a forward pass where nothing trains",
    "s/iteration": "median over log intervals and seeds",
    "tokens/s": "of the training",
    "peak MB": "highest memory of the last rank: of the device, on a CPU of the whole process",
    "decode ms": "one decoding step with the cache, all architectures timed in turns",
}


# The figures a reader decides by; the rest says how they came about.
RESULT_COLUMNS = (
    "arm", "trains", "recall % ↑", "answer nats ↑", "new ppl ↓", "Δ loss ↓", "old ppl ↓", "third ppl ↓", "trained", "tokens/s", "s/iteration",
    "peak MB", "decode ms",
)  # fmt: skip
SETTING_COLUMNS = ("arm", "trains", "added", "lr", "tokens", "GFLOP/token", "loss at equal time ↓")


def rows(results: Results) -> list[dict[str, Cell]]:
    """``{column: cell}`` per arm: base, reference, MIDUS, the rest."""
    return [_row(results, arm) for arm in in_order(results)]


def _row(results: Results, arm: ArmResult) -> dict[str, Cell]:
    reference, seconds = results.reference_arm, results.equal_seconds
    is_reference = reference is not None and reference.name == arm.name
    difference = None if reference is None or is_reference else arm.difference(reference)
    at_time = arm.validation_at(seconds) if seconds is not None else None
    latency = arm.latency["decode_seconds"] * 1e3 if arm.latency else None
    peak, seconds_an_iteration = arm.peak_memory_bytes, arm.seconds_per_iteration
    return {
        "arm": Cell(arm.name, arm.name, style=strong_styles(results).get(arm.name)),
        "trains": Cell(arm.train, arm.train),
        "recall % ↑": mean_cell(arm.of_answers("recall"), 1, scale=100),
        "answer nats ↑": mean_cell(arm.of_answers("answer_log_likelihood"), 2),
        "new ppl ↓": mean_cell(arm.perplexity("new"), 3),
        "Δ loss ↓": Cell("reference", 0.0) if is_reference else difference_cell(difference),
        "old ppl ↓": mean_cell(arm.perplexity("old"), 3),
        "third ppl ↓": mean_cell(arm.perplexity("third"), 3),
        "loss at equal time ↓": mean_cell(at_time, 4),
        "added": number_cell(arm.added, "{:,.0f}"),
        "trained": _trained_cell(arm, reference),
        "lr": number_cell(arm.lr, "{:g}"),
        "tokens": number_cell(arm.tokens or None, "{:,.0f}"),
        "GFLOP/token": number_cell(arm.flops_per_token / 1e9, "{:.4g}"),
        "s/iteration": number_cell(seconds_an_iteration, "{:.3g}" if (seconds_an_iteration or 0) < 1 else "{:.2f}"),
        "tokens/s": number_cell(arm.tokens_per_second, "{:,.0f}"),
        "peak MB": number_cell(None if peak is None else peak / 1e6, "{:,.0f}"),
        "decode ms": number_cell(latency, "{:.2f}"),
    }


def mean_cell(mean: Mean | None, digits: int, *, sign: str = "", scale: float = 1.0) -> Cell:
    """``12.345 ± 0.012``; the mean alone for one seed."""
    if mean is None:
        return Cell(MISSING)
    spread = "" if mean.deviation is None else f" ± {mean.deviation * scale:.{digits}f}"
    return Cell(f"{mean.mean * scale:{sign},.{digits}f}{spread}", mean.mean)


def difference_cell(mean: Mean | None) -> Cell:
    """``+0.0123 ± 0.0045`` with the standard error; faint where the difference is within two of them."""
    if mean is None:
        return Cell(MISSING)
    text = f"{mean.mean:+.4f}" + ("" if mean.error is None else f" ± {mean.error:.4f}")
    return Cell(text.replace("-", "−"), mean.mean, is_faint=mean.error is not None and not is_clear(mean))


def _trained_cell(arm: ArmResult, reference: ArmResult | None) -> Cell:
    text = f"{arm.trainable:,}"
    if reference is not None and reference.trainable and arm.trainable:
        text += f" ({arm.trainable / reference.trainable * 100:.0f} %)"
    return Cell(text, float(arm.trainable))


def used(results: Results, columns: Sequence[str]) -> list[str]:
    """Those of ``columns`` that any arm has a figure for."""
    table = rows(results)
    return [name for name in columns if any(row[name].text != MISSING for row in table)]


def reading_note(results: Results) -> str:
    """What stands behind ±, if anything does."""
    if len(results.seeds) == 1:
        return "One seed: how far another seed would be from these figures is not known. Share of trained parameters: of the reference's."
    return "± is the standard deviation over seeds; that of Δ is the standard error of the differences seed by seed. Share of trained parameters: of the reference's."


def seeds_text(results: Results) -> str:
    return f"{'seed' if len(results.seeds) == 1 else 'seeds'} {', '.join(map(str, results.seeds))}"


def failures(results: Results) -> list[str]:
    """Of all arms."""
    return [f"{label}: {text}" for arm in results.arms for label, text in arm.failures.items()]


def to_markdown(results: Results) -> str:
    """The result in a sentence, the table, what went wrong, settings, notes."""
    lines = [f"# {results.description or 'Comparison'}", "", f"**{headline(results)}**", ""]
    lines += [f"{seeds_text(results)}; reference: {results.reference}. {reading_note(results)}", ""]
    lines += _markdown_of(results, RESULT_COLUMNS)
    for title, texts in (
        ("Failed", failures(results)),
        ("Learning rates tried", rates_tried(results)),
        ("Notes", results.notes),
    ):
        if texts:
            lines += ["", f"**{title}**", "", *(f"- {text}" for text in texts)]
    lines += ["", "**Settings and cost**", "", *_markdown_of(results, SETTING_COLUMNS)]
    return "\n".join(lines) + "\n"


def _markdown_of(results: Results, columns: Sequence[str]) -> list[str]:
    names = used(results, columns)
    return markdown_table(names, [[row[name] for name in names] for row in rows(results)], text_columns=2)


def rates_tried(results: Results) -> list[str]:
    """The choice of every arm that had one, with the held-out loss on the first seed."""
    lines = []
    for arm in results.arms:
        if arm.rate_losses:
            tried = ", ".join(
                f"{rate} → {'failed' if loss is None or loss == float('inf') else format(loss, '.4f')}"
                for rate, loss in arm.rate_losses.items()
            )
            edge = ""
            rates = sorted(map(float, arm.rate_losses))
            if arm.lr in (rates[0], rates[-1]):
                edge = "; the best is at the edge of what was tried"
            lines.append(f"{arm.name}: {tried}{edge}")
    return lines
