"""``midus preprocess``: encodes a corpus into indexed datasets and says what was in it."""

from __future__ import annotations

from rich.console import Console

from megatron_midus.config.preprocess import PreprocessConfig
from megatron_midus.data import preprocess as corpus
from megatron_midus.data.statistics import PreprocessResult
from megatron_midus.progress import Progress
from megatron_midus.report.table import terminal_table, text_cells
from megatron_midus.verbs.verb import verb


@verb(PreprocessConfig)
def preprocess(config: PreprocessConfig, progress: Progress) -> PreprocessResult:
    """Encodes a corpus. See ``PreprocessConfig`` for the settings; returns what was written and left out.

    Raises:
        UserError: inputs, tokenizer or outputs that cannot be used, a malformed line, no document at all.
    """
    return corpus.preprocess(config, progress)


def command(config: PreprocessConfig) -> int:
    """``midus preprocess``."""
    print_result(preprocess(config))
    return 0


def print_result(result: PreprocessResult) -> None:
    """The table at the end, and how long it took."""
    print_datasets(result)
    done = result.bytes_read - result.bytes_resumed
    resumed = f" (and {result.bytes_resumed / 1e6:.1f} MB before)" if result.bytes_resumed else ""
    print(f"{done / 1e6:.1f} MB{resumed} in {result.seconds:.1f} s, {result.megabytes_per_second:.2f} MB/s")
    for example in result.skipped.malformed_examples:
        print(f"  malformed: {example}")


def print_datasets(result: PreprocessResult) -> None:
    """A row for each dataset, and what is in none."""
    # Whole numbers and paths, also where the output is a file or a narrow window.
    console = Console(width=max(200, 60 + max(map(len, result.datasets))), soft_wrap=True)
    rows = [
        (prefix, f"{s.documents:,}", f"{s.tokens:,}", f"{s.bytes:,}", f"{s.bytes_per_token:.3f}")
        for prefix, s in result.datasets.items()
    ]
    header = ("dataset", "documents", "tokens", "text bytes", "bytes/token")
    console.print(terminal_table(header, list(map(text_cells, rows))))
    skipped = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in result.skipped.counts().items())
    print(f"left out: {skipped}")
