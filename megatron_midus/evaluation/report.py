"""Models side by side: what was measured, as a table for the terminal, Markdown and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_midus.evaluation.parameters import ParameterCounts
from megatron_midus.evaluation.perplexity import Perplexity


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

    def all_notes(self) -> list[str]:
        """Notes for the reader, the one on tokenizers included."""
        if self.same_tokenizer:
            return self.notes
        return [*self.notes, "the models have different tokenizers: compare bits per byte, not perplexity or loss"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``models[i]["results"][data]`` has the entries of :meth:`Perplexity.to_dict`."""
        models = [
            {
                **dataclasses.asdict(model),
                "results": {name: result.to_dict() for name, result in model.results.items()},
            }
            for model in self.models
        ]
        return {
            "models": models,
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

    def to_markdown(self) -> str:
        """A table, notes below it, generated text at the end."""
        header = self.header()
        lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
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
        for title in self.header():
            table.add_column(title, justify="left" if title in ("model", "data") else "right", overflow="fold")
        count = len(self.models)
        for index, row in enumerate(self.rows()):
            table.add_row(*row, end_section=index % count == count - 1)
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
