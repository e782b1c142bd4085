"""What an analysis of a trained memory can be told."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.config.evaluate import Dtype
from megatron_midus.config.text import DEFAULT_SEPARATOR, TEXT_KEY, check_at_least_one

Part = Literal["usage", "heads", "retrieval", "slots", "sensitivity"]
PARTS: tuple[Part, ...] = ("usage", "heads", "retrieval", "slots", "sensitivity")


@dataclasses.dataclass(frozen=True)
class AnalyzeConfig:
    """Analysis

    Shows what the memory of a trained MIDUS model learnt: slot usage, head importance, fixed retrieval, what slots fire on,
    and how small k, n and d_l could be. Writes report.html (opens without a network), analysis.json (every figure) and
    summary.md into the output directory.

    Examples:
      midus analyze --model MIDUS --data heldout.jsonl --output analysis
      midus analyze --model MIDUS --base BASE --data heldout.txt --output analysis --parts usage heads --tokens 20000
    """

    model: str = dataclasses.field(metadata={"metavar": "DIR"})
    """Hugging Face directory of a MIDUS model."""

    data: list[str] = dataclasses.field(metadata={"metavar": "FILE", "append": True})
    """Text to read, .jsonl or .txt (also .gz, .zst) or a directory of these; preferably text that the model has not
    seen."""

    output: str = dataclasses.field(metadata={"metavar": "DIR"})
    """Directory of the report."""

    base: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """Hugging Face directory of its base; its loss is then reported too."""

    overwrite: bool = False
    """Replace what the output directory holds."""

    parts: list[Part] = dataclasses.field(default_factory=lambda: list(PARTS))
    """What to look at: usage of slots; loss without single heads; exchange of projections with retrieval fixed; what slots
    fire on; smaller k, n, d_l."""

    json_key: str = TEXT_KEY
    """Key of the text in a JSON line."""

    text_document_separator: str = DEFAULT_SEPARATOR
    """What divides a .txt file into documents; \\f is a form feed."""

    seq_length: int = 512
    """Tokens of a window."""

    tokens: int = 50_000
    """Use only the first documents, up to so many tokens; every memory and attention head costs a pass over them."""

    slots: int = 8
    """Slots per block and kind that --parts slots shows."""

    contexts: int = 3
    """Places in the text per slot."""

    min_reads: int = 32
    """Reads below which a slot is not called selective: few reads look selective by chance."""

    batch_size: int = 8
    """Windows in one call of the model."""

    dtype: Dtype = "auto"
    """Of the weights; auto = float32 on a CPU, the checkpoint's own on a GPU."""

    device: str | None = None
    """cpu, cuda, cuda:1, … When absent: a GPU if there is one."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "seq_length", "tokens", "slots", "contexts", "min_reads", "batch_size")
