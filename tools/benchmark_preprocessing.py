"""Measures tools/preprocess_data.py against a plain loop over `tokenizers` on the same .jsonl files, in the same run.

The loop reads a line, parses it, encodes its text and forgets the ids: no file is written, nothing is checked. It runs in
one process alone, and in as many at once as preprocessing has workers, since cores that share caches and power are slower
together. Times leave out the start of Python and the loading of the tokenizer, on both sides.

--shards 1 2 4 also encodes the same text by so many `midus preprocess --shard I/N` at once, and merges them. Cores that others
use as well make times of different moments no measure of each other; seconds of a core for a megabyte are one.
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
from megatron_midus.config.preprocess import MergeConfig
from megatron_midus.data.corpus import find_inputs
from megatron_midus.data.preprocess import PreprocessConfig, preprocess
from megatron_midus.data.shards import merge
from megatron_midus.errors import UserError


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl files, directories or patterns")
    parser.add_argument("--tokenizer-model", required=True, help="directory with a tokenizer.json")
    parser.add_argument("--json-key", default="text", help="key of the text (default: text)")
    parser.add_argument("--workers", type=int, default=1, help="of preprocessing (default: 1)")
    parser.add_argument("--megabytes", type=float, default=50.0, help="text to encode, 1e6 bytes (default: 50)")
    parser.add_argument("--shards", type=int, nargs="+", default=[], help="numbers of shards at once, such as 1 2 4")
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


def configured(source: Path, arguments: argparse.Namespace, prefix: Path, **more: Any) -> PreprocessConfig:
    return PreprocessConfig(
        input=[str(source)],
        output_prefix=str(prefix),
        tokenizer_model=arguments.tokenizer_model,
        json_keys=[arguments.json_key],
        append_eod=True,
        **more,
    )


def encode_shard(config: PreprocessConfig, barrier: Any, seconds: Any) -> None:
    """One process; puts the seconds that passed and those of a core."""
    barrier.wait()
    before = time.process_time()
    result = preprocess(config)
    seconds.put((result.seconds, time.process_time() - before))


def time_shards(path: Path, arguments: argparse.Namespace, count: int) -> tuple[float, float, float]:
    """Seconds of the slowest of ``count`` shards at once, seconds of a core of all, seconds of their merge."""
    source, prefix = path.parent / f"parts{count}", path.parent / f"shards{count}"
    source.mkdir()
    lines = path.read_bytes().splitlines(keepends=True)
    for index in range(count):
        part = lines[len(lines) * index // count : len(lines) * (index + 1) // count]
        (source / f"{index:05d}.jsonl").write_bytes(b"".join(part))
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(count), context.SimpleQueue()
    configs = [configured(source, arguments, prefix, shard=f"{index}/{count}") for index in range(count)]
    shards = [context.Process(target=encode_shard, args=(config, barrier, seconds)) for config in configs]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
        if shard.exitcode:
            raise UserError(f"a shard of {count} failed; see above")
    elapsed, used = zip(*(seconds.get() for _ in shards))
    started = time.perf_counter()
    merge(MergeConfig(str(prefix), delete_shards=True))
    return max(elapsed), sum(used), time.perf_counter() - started


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
        ours = megabytes / preprocess(configured(path, arguments, path.parent / "out", workers=workers)).seconds
        shards = {count: time_shards(path, arguments, count) for count in arguments.shards}
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
    for count, (elapsed, used, merging) in shards.items():
        print(
            f"{count} shard{'s' if count > 1 else ''} at once: {megabytes / elapsed:.2f} MB/s, "
            f"{used / megabytes:.3f} s of a core for each MB, merged in {merging / elapsed:.1%} of that time"
        )


if __name__ == "__main__":
    cli.run(main)
