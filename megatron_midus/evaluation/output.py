"""An evaluation as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_midus.evaluation.differences import (
    change_of_loss,
    comparison_cells,
    comparison_header,
    comparison_notes,
    difference_sentences,
    differences_to_dict,
    signed,
)
from megatron_midus.evaluation.result import EvaluationResult, ModelFigures
from megatron_midus.report.table import Cell, markdown_table, terminal_table, text_cells


def model_to_dict(model: ModelFigures) -> dict[str, Any]:
    """For JSON: fields by name, scores as ``tasks[task][metric]``."""
    plain = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parameters", "results", "tasks", "latency")
    }
    tasks: dict[str, dict[str, Any]] = {}
    for (task, metric), score in model.tasks.scores.items() if model.tasks else ():
        tasks.setdefault(task, {})[metric] = score.to_dict()
    return {
        **plain,
        "parameters": dataclasses.asdict(model.parameters),
        "results": {name: result.to_dict() for name, result in model.results.items()},
        **({"tasks": tasks, "task_versions": model.tasks.versions} if model.tasks else {}),
        **({"latency": model.latency.to_dict()} if model.latency else {}),
    }


def result_to_dict(result: EvaluationResult) -> dict[str, Any]:
    """For JSON; ``models[i]["results"][data]`` has the entries of :meth:`Perplexity.to_dict`."""
    differences = differences_to_dict(result)
    return {
        "models": [model_to_dict(model) for model in result.models],
        **({"differences": differences} if differences else {}),
        "settings": result.settings,
        "same_tokenizer": result.same_tokenizer,
        "notes": all_notes(result),
    }


def all_notes(result: EvaluationResult) -> list[str]:
    """Notes for the reader, the one on tokenizers included."""
    notes = [*result.notes, *comparison_notes(result)]
    if not result.same_tokenizer:
        notes.append("the models have different tokenizers: compare bits per byte, not perplexity or loss")
        if result.is_comparison:
            notes.append(
                "accuracies, word perplexity and byte perplexity compare across tokenizers, but a limit in tokens "
                "lets the models read different amounts of text"
            )
    return notes


def _text_table(result: EvaluationResult) -> tuple[list[str], list[list[Cell]]]:
    """One row per text and model, the models of one text under each other; the last column is the change of the loss."""
    header = ["data", "model", "parameters", "added", "trainable", "perplexity", "bits/byte", "tokens", "tokens/s", "loss (nats/token)"]  # fmt: skip
    first = result.models[0]
    has_change = len(result.models) > 1
    if has_change:
        header.append("Δ loss" if result.same_tokenizer else "Δ bits/byte")
    rows = []
    for data in first.results:
        for model in result.models:
            counts, found = model.parameters, model.results[data]
            texts = [
                data, model.name, f"{counts.total:,}", f"{counts.added:,}", f"{counts.trainable:,}",
                f"{found.perplexity:,.3f}", f"{found.bits_per_byte:.4f}", f"{found.tokens:,}",
                f"{found.tokens_per_second:,.0f}", f"{found.loss:.4f}",
            ]  # fmt: skip
            if has_change:
                texts.append("" if model is first else signed(change_of_loss(result, model, data)[0], 4))
            rows.append(text_cells(texts))
    return header, rows


def _table(result: EvaluationResult) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows of the table that fits what was measured."""
    if not result.is_comparison:
        return _text_table(result)
    return comparison_header(result), comparison_cells(result)


def result_to_markdown(result: EvaluationResult) -> str:
    """A table, the differences in a sentence, notes, generated text at the end."""
    lines = markdown_table(*_table(result), text_columns=2)
    for sentence in difference_sentences(result):
        lines += ["", f"**{sentence}**"]
    if notes := all_notes(result):
        lines += ["", *(f"- {note}" for note in notes)]
    for prompt in result.models[0].generations:
        lines += ["", f"**Prompt:** `{prompt}`", ""]
        lines += [f"- {model.name}: `{_single_line(model.generations[prompt])}`" for model in result.models]
    return "\n".join(lines).rstrip() + "\n"


def print_result(result: EvaluationResult) -> None:
    """To the terminal: the same."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=240, highlight=False)  # no narrower than the table, when the output is a file
    header, rows = _table(result)
    # Lines between texts, or between subjects.
    console.print(terminal_table(header, rows, text_columns=2, group_by=0))
    for sentence in difference_sentences(result):
        console.print(sentence, markup=False)
    for note in all_notes(result):
        console.print(f"note: {note}", markup=False)
    for prompt in result.models[0].generations:
        console.print(f"\nprompt: {prompt!r}", markup=False)
        for model in result.models:
            console.print(f"  {model.name}: {model.generations[prompt]!r}", markup=False)


def _single_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("`", "'").replace("|", "\\|")
