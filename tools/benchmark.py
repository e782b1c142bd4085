"""Times the head-wise memory, Memory blocks and training with them against what they replace; wrong results are not timed.

python tools/benchmark.py hml --shape cpu-h8 cpu-h32 --threads 2
python tools/benchmark.py layer --shape paper-1b
python tools/benchmark.py train --shape train-cpu --threads 2 --json train.json --plot train.png
python tools/benchmark.py growth --shape cpu-h8 --threads 2 --markdown growth.md --plot growth.png
python tools/benchmark.py serve --shape cpu-h8 --threads 2 --json serve.json
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in pretrain_midus.py, for everything that is timed

from megatron_midus import cli
from megatron_midus.benchmark.settings import (
    GrowthSettings,
    HmlSettings,
    LayerSettings,
    RunSettings,
    ServeSettings,
    TrainSettings,
)
from megatron_midus.config.fields import add_arguments, from_namespace
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.files import check_output_file, write_text_atomically

if TYPE_CHECKING:
    from megatron_midus.benchmark.result import BenchmarkResult

SETTINGS: dict[str, type[RunSettings]] = {
    "hml": HmlSettings,
    "layer": LayerSettings,
    "train": TrainSettings,
    "growth": GrowthSettings,
    "serve": ServeSettings,
}


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, cls in SETTINGS.items():
        add_arguments(commands.add_parser(name, help=cls.__doc__), cls)
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> tuple[str, RunSettings]:
    namespace = make_parser().parse_args(arguments)
    return namespace.command, from_namespace(SETTINGS[namespace.command], namespace)


def find_runner(command: str) -> Callable[[RunSettings], BenchmarkResult]:
    """Imported where used: ``layer`` and ``train`` need Megatron, ``serve`` vLLM, the others neither."""
    if command == "hml":
        from megatron_midus.benchmark.hml import run_hml as run
    elif command == "layer":
        from megatron_midus.benchmark.layer import run_layer as run
    elif command == "growth":
        from megatron_midus.benchmark.growth import run_growth as run
    elif command == "serve":
        from megatron_midus.benchmark.serve import run_serve as run
    else:
        from megatron_midus.benchmark.train import run_train as run
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    # What Megatron-Core says of packages that are not there is longer than the table, here and in the processes that
    # measure memory.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")
    command, settings = parse_arguments(arguments)
    for path in filter(None, (settings.json, settings.markdown, settings.plot)):
        check_output_file(path)
    if settings.plot:
        from megatron_midus.benchmark.plot import require_matplotlib

        require_matplotlib()
    result = find_runner(command)(settings)
    if command == "growth":
        from megatron_midus.benchmark.growth_output import plot_result, print_result, result_to_markdown
    else:
        from megatron_midus.benchmark.output import print_result, result_to_markdown
        from megatron_midus.benchmark.plot import plot_result
    print_result(result)
    if settings.json:
        write_text_atomically(settings.json, json.dumps(result.to_dict(), indent=1) + "\n")
    if settings.markdown:
        write_text_atomically(settings.markdown, result_to_markdown(result))
    if settings.plot:
        plot_result(result, settings.plot)


if __name__ == "__main__":
    cli.run(main)
