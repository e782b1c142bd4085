"""Encodes a corpus (.jsonl or .txt) into Megatron-Core indexed datasets, ready for pretrain_midus.py --data-path."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

from megatron_midus import cli
from megatron_midus.config.fields import add_arguments, from_namespace
from megatron_midus.data.preprocess import PreprocessConfig, preprocess
from megatron_midus.data.statistics import PreprocessResult


def parse_arguments(arguments: Sequence[str] | None) -> PreprocessConfig:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, PreprocessConfig)
    return from_namespace(PreprocessConfig, parser.parse_args(arguments))


def print_result(result: PreprocessResult) -> None:
    """The small table at the end."""
    width = max(len(prefix) for prefix in result.datasets)
    print(f"{'dataset':<{width}}  {'documents':>12}  {'tokens':>15}  {'text bytes':>15}  bytes/token")
    for prefix, statistics in result.datasets.items():
        print(
            f"{prefix:<{width}}  {statistics.documents:>12,}  {statistics.tokens:>15,}  {statistics.bytes:>15,}  "
            f"{statistics.bytes_per_token:11.3f}"
        )
    skipped = f"{result.empty:,} empty, {result.duplicates:,} duplicates, {result.malformed:,} malformed"
    rate = result.bytes_read / 1e6 / max(result.seconds, 1e-9)
    print(f"left out: {skipped} | {result.bytes_read / 1e6:.1f} MB in {result.seconds:.1f} s, {rate:.2f} MB/s")
    for example in result.malformed_examples:
        print(f"  malformed: {example}")


def main(arguments: Sequence[str] | None = None) -> None:
    # Of no consequence for data, and four times the length of the output.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    print_result(preprocess(parse_arguments(arguments)))


if __name__ == "__main__":
    cli.run(main)
