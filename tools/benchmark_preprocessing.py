"""Measures tools/preprocess_data.py against a plain loop over `tokenizers` on the same .jsonl files, in the same run.

The loop reads a line, parses it, encodes its text and forgets the ids: no file is written, nothing is checked. It runs in
one process alone, and in as many at once as preprocessing has workers, since cores that share caches and power are slower
together. Times leave out the start of Python and the loading of the tokenizer, on both sides.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_midus import cli
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.data.corpus import find_inputs
from megatron_midus.data.preprocess import PreprocessConfig, preprocess
from megatron_midus.errors import UserError


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl files, directories or patterns")
    parser.add_argument("--tokenizer-model", required=True, help="directory with a tokenizer.json")
    parser.add_argument("--json-key", default="text", help="key of the text (default: text)")
    parser.add_argument("--workers", type=int, default=1, help="of preprocessing (default: 1)")
    parser.add_argument("--megabytes", type=float, default=50.0, help="text to encode, 1e6 bytes (default: 50)")
    return parser.parse_args(arguments)


def sample(inputs: Sequence[str], num_bytes: float, target: Path) -> int:
    """Copies lines of the inputs, again from the start when they run out, and returns the bytes of them."""
    files = find_inputs(inputs)
    for file in files:
        if file.suffix != ".jsonl":
            raise UserError(f"{file} is not a plain .jsonl file, the only kind that the plain loop reads")
    written = 0
    with open(target, "wb") as stream:
        while written < num_bytes:
            before = written
            for file in files:
                with open(file, "rb") as lines:
                    for line in lines:
                        written += stream.write(line.strip() + b"\n") if line.strip() and written < num_bytes else 0
            if written == before:
                raise UserError(f"{' '.join(inputs)} hold no line")
    return written


def plain_loop(path: Path, tokenizer_file: Path, key: str, barrier: Any, seconds: Any) -> None:
    """One process of the loop; puts its seconds."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    barrier.wait()
    started = time.perf_counter()
    num_tokens = 0
    with open(path, "rb") as lines:
        for line in lines:
            (encoding,) = tokenizer.encode_batch_fast([json.loads(line)[key]], add_special_tokens=False)
            num_tokens += len(encoding.ids)
    seconds.put(time.perf_counter() - started)


def time_plain_loops(path: Path, tokenizer_file: Path, key: str, processes: int) -> float:
    """Mean seconds of ``processes`` loops that run at once, each over the whole file."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(processes), context.SimpleQueue()
    arguments = (path, tokenizer_file, key, barrier, seconds)
    loops = [context.Process(target=plain_loop, args=arguments) for _ in range(processes)]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
        if loop.exitcode:
            raise UserError(f"the plain loop failed; is every line of the input a document with the key {key!r}?")
    return sum(seconds.get() for _ in loops) / processes


def time_preprocessing(path: Path, arguments: argparse.Namespace, prefix: Path) -> float:
    config = PreprocessConfig(
        input=[str(path)],
        output_prefix=str(prefix),
        tokenizer_model=arguments.tokenizer_model,
        json_keys=[arguments.json_key],
        append_eod=True,
        workers=arguments.workers,
    )
    return preprocess(config).seconds


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    tokenizer_file = Path(arguments.tokenizer_model) / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise UserError(f"{tokenizer_file} does not exist; the plain loop needs it")
    workers = arguments.workers
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "sample.jsonl"
        megabytes = sample(arguments.input, arguments.megabytes * 1e6, path) / 1e6
        alone = megabytes / time_plain_loops(path, tokenizer_file, arguments.json_key, 1)
        together = megabytes / time_plain_loops(path, tokenizer_file, arguments.json_key, workers)
        ours = megabytes / time_preprocessing(path, arguments, Path(directory) / "out")
    table = Table("", box=box.SIMPLE_HEAD)
    for heading in ("processes", "MB/s", "MB/s a process"):
        table.add_column(heading, justify="right")
    table.add_row("plain loop, alone", "1", f"{alone:.2f}", f"{alone:.2f}")
    table.add_row("plain loops, at once", str(workers), f"{together * workers:.2f}", f"{together:.2f}")
    table.add_row("preprocess_data.py", str(workers), f"{ours:.2f}", f"{ours / workers:.2f}")
    Console(width=120).print(table)
    print(
        f"preprocess_data.py / plain loop, a worker: {ours / workers / alone:.2f} of a loop alone, "
        f"{ours / workers / together:.2f} of as many loops at once ({megabytes:.0f} MB)"
    )


if __name__ == "__main__":
    cli.run(main)
