"""One table of all figures of several models: a row per figure, a column per model, differences to the first one."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_midus.evaluation.result import EvaluationResult, ModelFigures
from megatron_midus.evaluation.scores import Score, subtract
from megatron_midus.report.table import Cell, text_cells

_RULE_ON_ERRORS = (
    "± is one standard error over the items of a task; that of a difference (Δ) is paired, over the same items. A Δ within "
    "two of its standard errors is no evidence for either model, and among many tasks some exceed two by chance; an error "
    "of 0 says only that both models are right and wrong on the same items"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of every model."""

    subject: str
    """Task or text."""
    metric: str
    items: str
    values: list[str]
    """Per model."""
    changes: list[str]
    """Per model but the first."""


def comparison_rows(result: EvaluationResult) -> list[Row]:
    """Parameters, texts, tasks, latency, as far as they were measured."""
    models = result.models
    rows = [
        Row("parameters", "count", "", *_plain([m.parameters.total for m in models], "{:,}", ratio=True)),
        Row("parameters", "added", "", [f"{m.parameters.added:,}" for m in models], [""] * (len(models) - 1)),
    ]
    for data in models[0].results:
        results = [model.results[data] for model in models]
        tokens = f"{results[0].tokens:,} tokens"
        rows.append(Row(data, "perplexity ↓", tokens, *_plain([r.perplexity for r in results], "{:.3f}")))
        rows.append(Row(data, "bits/byte ↓", tokens, *_plain([r.bits_per_byte for r in results], "{:.4f}")))
    if models[0].tasks is not None:
        rows += [_task_row(key, models) for key in models[0].tasks.top_level]
    return rows + _latency_rows(models)


def _task_row(key: tuple[str, str], models: list[ModelFigures]) -> Row:
    scores = [model.tasks.scores[key] for model in models if model.tasks is not None]
    arrow = "↑" if scores[0].higher_is_better else "↓"
    digits = 3 if "perplexity" in key[1] else 4
    changes = []
    for score in scores[1:]:
        change = subtract(score, scores[0])
        changes.append(_with_error(change.value, change.stderr, digits, sign="+"))
    values = [_with_error(score.value, score.stderr, digits) for score in scores]
    return Row(key[0], f"{key[1]} {arrow}", f"{scores[0].items:,}", values, changes)


def _latency_rows(models: list[ModelFigures]) -> list[Row]:
    figures = [model.latency for model in models if model.latency is not None]
    if not figures:
        return []
    first = figures[0]
    batch = f"batch {first.batch_size}"
    rows = [
        Row(
            f"prefill, {first.prompt_tokens} tokens",
            "ms ↓",
            batch,
            [f"{f.prefill_seconds * 1e3:.2f}" for f in figures],
            [f"× {f.prefill_ratio:.3f}" for f in figures[1:]],
        ),
        Row(
            "decoding step",
            "ms ↓",
            batch,
            [f"{f.decode_seconds * 1e3:.2f}" for f in figures],
            [f"× {f.decode_ratio:.3f}" for f in figures[1:]],
        ),
        Row("weights", "MB ↓", "", *_plain([f.weight_bytes / 1e6 for f in figures], "{:,.2f}", ratio=True)),
        Row(
            "KV cache", "bytes/token ↓", "", *_plain([f.cache_bytes_per_token for f in figures], "{:,.0f}", ratio=True)
        ),
    ]
    peaks = [f.peak_bytes for f in figures if f.peak_bytes is not None]
    if len(peaks) == len(figures):
        rows.append(Row("peak memory", "MB ↓", batch, *_plain([p / 1e6 for p in peaks], "{:,.2f}", ratio=True)))
    return rows


def _plain(values: list[Any], form: str, *, ratio: bool = False) -> tuple[list[str], list[str]]:
    """Texts of figures without a standard error, and of their differences or ratios to the first."""
    first = values[0]
    if ratio:
        changes = [f"× {value / first:.3f}" if first else "" for value in values[1:]]
    else:
        changes = [form.replace("{:", "{:+").format(value - first) for value in values[1:]]
    return [form.format(value) for value in values], changes


def _with_error(value: float, stderr: float | None, digits: int, *, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def comparison_header(result: EvaluationResult) -> list[str]:
    first, *others = (model.name for model in result.models)
    return ["figure of", "metric", "items", first, *(title for name in others for title in (name, f"Δ {name}"))]


def comparison_cells(result: EvaluationResult) -> list[list[Cell]]:
    """Rows that fit ``comparison_header``."""
    return [
        text_cells(
            [row.subject, row.metric, row.items, row.values[0]]
            + [text for pair in zip(row.values[1:], row.changes) for text in pair]
        )
        for row in comparison_rows(result)
    ]


def comparison_notes(result: EvaluationResult) -> list[str]:
    """How to read the table."""
    notes = []
    if result.models[0].tasks is not None:
        notes.append(_RULE_ON_ERRORS)
        cut = {model.name: model.tasks.num_truncated for model in result.models if model.tasks is not None}
        if any(cut.values()):
            counts = ", ".join(f"{name} {count}" for name, count in cut.items())
            notes.append(
                f"prompts longer than {result.settings.get('max_length')} tokens lost their beginning; requests: {counts}"
            )
    return notes


def change_of_loss(result: EvaluationResult, model: ModelFigures, data: str) -> tuple[float, str]:
    """How far a model's loss on a text is above that of the first model, and the unit.

    Nats per token; bits per byte when the tokenizers differ, whose tokens are not the same.
    """
    mine, first = model.results[data], result.models[0].results[data]
    if result.same_tokenizer:
        return mine.loss - first.loss, "nats/token"
    return mine.bits_per_byte - first.bits_per_byte, "bits/byte"


def difference_sentences(result: EvaluationResult) -> list[str]:
    """For every model but the first: ``midus against base: new.txt −0.39 nats/token, old.txt +0.11``."""
    first, *others = result.models
    sentences = []
    for model in others if first.results else ():
        changes = [(data, *change_of_loss(result, model, data)) for data in first.results]
        parts = [f"{data} {signed(change, 2)}" + (f" {unit}" if not i else "") for i, (data, change, unit) in enumerate(changes)]  # fmt: skip
        sentences.append(f"{model.name} against {first.name}: {', '.join(parts)} (lower is better)")
    return sentences


def signed(value: float, digits: int) -> str:
    """With a sign, a minus as wide as the plus; no sign for what rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def differences_to_dict(result: EvaluationResult) -> dict[str, Any]:
    """``{model: {"task/metric": {"value": …, "stderr": …}}}`` of every model but the first, for JSON."""
    first = result.models[0].tasks
    if first is None:
        return {}

    def all_of(scores: dict[tuple[str, str], Score]) -> dict[str, Any]:
        return {"/".join(key): dataclasses.asdict(subtract(score, first.scores[key])) for key, score in scores.items()}

    return {model.name: all_of(model.tasks.scores) for model in result.models[1:] if model.tasks is not None}
