"""Encodes a corpus (.jsonl, .txt, .parquet) into Megatron-Core indexed datasets, ready for pretrain_midus.py --data-path."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_midus import cli
from megatron_midus.config.fields import add_arguments, from_namespace
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.run_file import parse_arguments_with_file
from megatron_midus.data.preprocess import PreprocessConfig, preprocess
from megatron_midus.data.statistics import PreprocessResult


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add_arguments(parser, PreprocessConfig)
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> PreprocessConfig:
    return from_namespace(PreprocessConfig, parse_arguments_with_file(make_parser(), arguments))


def print_result(result: PreprocessResult) -> None:
    """The table at the end."""
    # Whole numbers and paths, also where the output is a file or a narrow window.
    console = Console(width=max(200, 60 + max(map(len, result.datasets))), soft_wrap=True)
    table = Table("dataset", box=box.SIMPLE_HEAD)
    for heading in ("documents", "tokens", "text bytes", "bytes/token"):
        table.add_column(heading, justify="right")
    for prefix, statistics in result.datasets.items():
        counts = (f"{n:,}" for n in (statistics.documents, statistics.tokens, statistics.bytes))
        table.add_row(prefix, *counts, f"{statistics.bytes_per_token:.3f}")
    console.print(table)
    skipped = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in result.skipped.counts().items())
    print(f"left out: {skipped}")
    done = result.bytes_read - result.bytes_resumed
    resumed = f" (and {result.bytes_resumed / 1e6:.1f} MB before)" if result.bytes_resumed else ""
    print(f"{done / 1e6:.1f} MB{resumed} in {result.seconds:.1f} s, {result.megabytes_per_second:.2f} MB/s")
    for example in result.skipped.malformed_examples:
        print(f"  malformed: {example}")


def main(arguments: Sequence[str] | None = None) -> None:
    print_result(preprocess(parse_arguments(arguments)))


if __name__ == "__main__":
    cli.run(main)
