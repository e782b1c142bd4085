"""What was measured of several models: one entry a model, and the whole of an evaluation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_midus.evaluation.latency import Latency
from megatron_midus.evaluation.parameters import ParameterCounts
from megatron_midus.evaluation.perplexity import Perplexity
from megatron_midus.evaluation.zero_shot import TaskResults
from megatron_midus.hub import short_name


@dataclasses.dataclass
class ModelFigures:
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


@dataclasses.dataclass
class EvaluationResult:
    """All models on all data."""

    models: list[ModelFigures]
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


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole path where that would name two alike."""
    return _distinct(paths, [short_name(path) or path for path in paths])


def _distinct(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names)]


# Directories of an experiment whose names say nothing about the model in them.
_SAYS_NOTHING = re.compile(r"(hf|model|export|exported|checkpoints?|(seed|lr)-[\d.e+-]+)")


def model_name(directory: str | Path) -> str:
    """The last part of the path that says which model it is: ``hive`` for ``runs/hive/seed-1/lr-0.003/hf``."""
    parts = (*Path(directory).resolve().parts[:-1], short_name(directory))
    return next((part for part in reversed(parts) if not _SAYS_NOTHING.fullmatch(part)), parts[-1])


def model_names(directories: Sequence[str]) -> list[str]:
    """``model_name`` of each, or the whole path where that would name two alike."""
    return _distinct(directories, [model_name(directory) for directory in directories])
