"""Models side by side: what was measured, as a table for the terminal, Markdown and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_midus.evaluation.comparison import (
    comparison_cells,
    comparison_header,
    comparison_notes,
    differences_to_dict,
)
from megatron_midus.evaluation.latency import Latency
from megatron_midus.evaluation.parameters import ParameterCounts
from megatron_midus.evaluation.perplexity import Perplexity
from megatron_midus.evaluation.zero_shot import TaskResults


@dataclasses.dataclass
class ModelReport:
    """One model."""

    name: str
    directory: str
    parameters: ParameterCounts
    tokenizer: dict[str, Any]
    """What identifies its tokenizer."""
    dtype: str
    results: dict[str, Perplexity] = dataclasses.field(default_factory=dict)
    """By name of the data."""
    generations: dict[str, str] = dataclasses.field(default_factory=dict)
    """Continuation by prompt."""
    tasks: TaskResults | None = None
    """Of zero-shot tasks."""
    latency: Latency | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: fields by name, scores as ``tasks[task][metric]``."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("parameters", "results", "tasks", "latency")
        }
        tasks: dict[str, dict[str, Any]] = {}
        for (task, metric), score in self.tasks.scores.items() if self.tasks else ():
            tasks.setdefault(task, {})[metric] = score.to_dict()
        return {
            **plain,
            "parameters": dataclasses.asdict(self.parameters),
            "results": {name: result.to_dict() for name, result in self.results.items()},
            **({"tasks": tasks, "task_versions": self.tasks.versions} if self.tasks else {}),
            **({"latency": self.latency.to_dict()} if self.latency else {}),
        }


@dataclasses.dataclass
class Report:
    """All models on all data."""

    models: list[ModelReport]
    settings: dict[str, Any]
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def same_tokenizer(self) -> bool:
        """Whether the perplexities of the models may be compared."""
        return all(model.tokenizer == self.models[0].tokenizer for model in self.models)

    @property
    def is_comparison(self) -> bool:
        """Whether there is more than text to report, so that one row per figure reads better."""
        return any(model.tasks is not None or model.latency is not None for model in self.models)

    def all_notes(self) -> list[str]:
        """Notes for the reader, the one on tokenizers included."""
        notes = [*self.notes, *comparison_notes(self)]
        if not self.same_tokenizer:
            notes.append("the models have different tokenizers: compare bits per byte, not perplexity or loss")
            if self.is_comparison:
                notes.append(
                    "accuracies, word perplexity and byte perplexity compare across tokenizers, but a limit in tokens "
                    "lets the models read different amounts of text"
                )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``models[i]["results"][data]`` has the entries of :meth:`Perplexity.to_dict`."""
        differences = differences_to_dict(self)
        return {
            "models": [model.to_dict() for model in self.models],
            **({"differences": differences} if differences else {}),
            "settings": self.settings,
            "same_tokenizer": self.same_tokenizer,
            "notes": self.all_notes(),
        }

    def header(self) -> list[str]:
        return [
            "model", "parameters", "added", "trainable", "data", "loss (nats/token)", "perplexity", "bits/byte",
            "tokens", "tokens/s",
        ]  # fmt: skip

    def rows(self) -> list[list[str]]:
        """One row per data and model, the models of one text under each other."""
        rows = []
        for data in self.models[0].results:
            for model in self.models:
                counts, result = model.parameters, model.results[data]
                rows.append(
                    [
                        model.name, f"{counts.total:,}", f"{counts.added:,}", f"{counts.trainable:,}", data,
                        f"{result.loss:.4f}", f"{result.perplexity:,.3f}", f"{result.bits_per_byte:.4f}",
                        f"{result.tokens:,}", f"{result.tokens_per_second:,.0f}",
                    ]
                )  # fmt: skip
        return rows

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table that fits what was measured."""
        if not self.is_comparison:
            return self.header(), self.rows()
        return comparison_header(self), comparison_cells(self)

    def to_markdown(self) -> str:
        """A table, notes below it, generated text at the end."""
        header, rows = self._table()
        lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        if self.all_notes():
            lines += ["", *(f"- {note}" for note in self.all_notes())]
        for prompt in self.models[0].generations:
            lines += ["", f"**Prompt:** `{prompt}`", ""]
            lines += [f"- {model.name}: `{_single_line(model.generations[prompt])}`" for model in self.models]
        return "\n".join(lines).rstrip() + "\n"

    def print(self) -> None:
        """To the terminal."""
        from rich.console import Console
        from rich.table import Table

        # No narrower than the table, when the output is a file.
        console = Console()
        if not console.is_terminal:
            console = Console(width=240)
        table = Table()
        header, rows = self._table()
        for title in header:
            left = title in ("model", "data", "figure of", "metric")
            table.add_column(title, justify="left" if left else "right", overflow="fold")
        for row, following in zip(rows, [*rows[1:], None]):
            # Lines between texts, or between subjects.
            group = 0 if self.is_comparison else 4
            table.add_row(*row, end_section=following is None or row[group] != following[group])
        console.print(table)
        for note in self.all_notes():
            console.print(f"note: {note}", markup=False, highlight=False)
        for prompt in self.models[0].generations:
            console.print(f"\nprompt: {prompt!r}", markup=False, highlight=False)
            for model in self.models:
                console.print(f"  {model.name}: {model.generations[prompt]!r}", markup=False, highlight=False)


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole path where that would name two alike."""
    names = [Path(path).resolve().name or path for path in paths]
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names)]


def _single_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("`", "'").replace("|", "\\|")
