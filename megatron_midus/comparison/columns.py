"""The table of a comparison: one row per arm, the same columns for Markdown and for the page."""

from __future__ import annotations

from megatron_midus.comparison.results import ArmResult, Mean, Results
from megatron_midus.report.table import MISSING, Cell, markdown_table, number_cell

COLUMNS: dict[str, str] = {
    "arm": "name in the experiment file",
    "trains": "what learns: inserted blocks, all parameters, or nothing",
    "new ppl ↓": "perplexity on the held-out text of the new domain, mean ± standard deviation over seeds",
    "Δ loss ↓": "difference of the held-out loss (new domain, nats/token) to the reference, seed by seed: mean ± standard "
    "deviation of the differences",
    "old ppl ↓": "the same as new ppl on the base's own domain: what was forgotten",
    "loss at equal time ↓": "loss on the validation batches when the arm had trained as many seconds as the quickest arm in all; "
    "its learning rate was not yet at its end then",
    "added": "parameters that the base does not have",
    "trained": "parameters that learn",
    "lr": "largest learning rate",
    "tokens": "training tokens",
    "GFLOP/token": "of a training step, forward and backward; of a forward pass where nothing trains",
    "s/iteration": "median over log intervals, then over seeds",
    "tokens/s": "of the training",
    "peak MB": "highest memory of the last rank: of the device, on a CPU of the whole process",
    "decode ms": "one decoding step with the cache, all architectures timed in turns",
}


def rows(results: Results) -> list[dict[str, Cell]]:
    """``{column: cell}`` per arm, in the order of the file."""
    return [_row(results, arm) for arm in results.arms]


def _row(results: Results, arm: ArmResult) -> dict[str, Cell]:
    reference, seconds = results.reference_arm, results.equal_seconds
    is_reference = reference is not None and reference.name == arm.name
    difference = None if reference is None or is_reference else arm.difference(reference)
    at_time = arm.validation_at(seconds) if seconds is not None else None
    latency = arm.latency["decode_seconds"] * 1e3 if arm.latency else None
    peak = arm.peak_memory_bytes
    return {
        "arm": Cell(arm.name, arm.name),
        "trains": Cell(arm.train, arm.train),
        "new ppl ↓": mean_cell(arm.perplexity("new"), 3),
        "Δ loss ↓": Cell("reference", 0.0) if is_reference else mean_cell(difference, 4, sign="+"),
        "old ppl ↓": mean_cell(arm.perplexity("old"), 3),
        "loss at equal time ↓": mean_cell(at_time, 4),
        "added": number_cell(arm.added, "{:,.0f}"),
        "trained": number_cell(arm.trainable, "{:,.0f}"),
        "lr": number_cell(arm.lr, "{:g}"),
        "tokens": number_cell(arm.tokens or None, "{:,.0f}"),
        "GFLOP/token": number_cell(arm.flops_per_token / 1e9, "{:.4g}"),
        "s/iteration": number_cell(arm.seconds_per_iteration, "{:.3g}"),
        "tokens/s": number_cell(arm.tokens_per_second, "{:,.0f}"),
        "peak MB": number_cell(None if peak is None else peak / 1e6, "{:,.0f}"),
        "decode ms": number_cell(latency, "{:.2f}"),
    }


def mean_cell(mean: Mean | None, digits: int, *, sign: str = "") -> Cell:
    """``12.345 ± 0.012``; the mean alone for one seed."""
    if mean is None:
        return Cell(MISSING)
    spread = "" if mean.deviation is None else f" ± {mean.deviation:.{digits}f}"
    return Cell(f"{mean.mean:{sign},.{digits}f}{spread}", mean.mean)


def used_columns(results: Results) -> list[str]:
    """Those that any arm has a figure for."""
    table = rows(results)
    return [name for name in COLUMNS if any(row[name].text != MISSING for row in table)]


def findings(results: Results) -> list[str]:
    """What the table says about the reference, in sentences: who is lower and who is not, by more than the spread."""
    reference = results.reference_arm
    if reference is None:
        return []
    lines = []
    for arm in results.arms:
        difference = arm.difference(reference)
        if arm.name == reference.name or difference is None:
            continue
        share = (
            f" with {arm.trainable / reference.trainable:.0%} of its trained parameters" if reference.trainable else ""
        )
        lines.append(f"{arm.name}: {_verdict(difference)} than {reference.name}{share}")
    return lines


def _verdict(difference: Mean) -> str:
    amount = f"{abs(difference.mean):.4f} nats/token {'lower' if difference.mean < 0 else 'higher'}"
    if difference.deviation is None:
        return f"{amount} (one seed)"
    error = difference.deviation / difference.count**0.5
    doubt = "" if abs(difference.mean) > 2 * error else ", within two standard errors"
    return f"{amount} (standard error {error:.4f} over {difference.count} pairs{doubt})"


def seeds_text(results: Results) -> str:
    return f"{'seed' if len(results.seeds) == 1 else 'seeds'} {', '.join(map(str, results.seeds))}"


def failures(results: Results) -> list[str]:
    """Of all arms."""
    return [f"{label}: {text}" for arm in results.arms for label, text in arm.failures.items()]


def to_markdown(results: Results) -> str:
    """The table, what went wrong, notes."""
    columns = used_columns(results)
    lines = [
        f"# {results.description or 'Comparison'}",
        "",
        f"{seeds_text(results)}; reference: {results.reference}",
        "",
    ]
    lines += markdown_table(columns, [[row[name] for name in columns] for row in rows(results)], text_columns=2)
    for title, texts in (
        ("Against the reference", findings(results)),
        ("Learning rates tried", rates_tried(results)),
        ("Failed", failures(results)),
        ("Notes", results.notes),
    ):
        if texts:
            lines += ["", f"**{title}**", "", *(f"- {text}" for text in texts)]
    return "\n".join(lines) + "\n"


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
