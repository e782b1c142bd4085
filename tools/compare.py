"""Up-scales one base in several ways, trains all of them alike, and lays the results side by side.

Examples:
  python tools/compare.py examples/comparison/smoke.yaml --output comparison_smoke
  python tools/compare.py mine.yaml --output out --arms llama_pro midus --seeds 1 --jobs 2

A run that was interrupted goes on with the same command; after a change in the file only what depends on it runs again.
"""

from __future__ import annotations

import argparse
import datetime
import signal
from collections.abc import Sequence
from pathlib import Path

from megatron_midus import cli
from megatron_midus.comparison.arms import resolve
from megatron_midus.comparison.columns import to_markdown
from megatron_midus.comparison.experiment import read_experiment
from megatron_midus.comparison.results import collect
from megatron_midus.comparison.results_page import loss_svg, to_html
from megatron_midus.comparison.runner import Runner, lock, run_experiment
from megatron_midus.comparison.runs import Runs
from megatron_midus.comparison.steps import FileHashes, StepFailed
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.conversion.families import from_hf_config
from megatron_midus.conversion.hf_io import read_hf_config
from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically
from megatron_midus.training.arguments import build_parser


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", metavar="EXPERIMENT.yaml", help="what is compared; docs/comparing.md lists the keys")
    add("--output", metavar="DIR", help="directory of everything (default: comparison_<name of the file>)")
    add("--arms", nargs="+", metavar="NAME", help="only these arms")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds")
    add("--jobs", type=int, default=1, help="runs at a time; more than 1 spoils the timings (default: 1)")
    add("--report-only", action="store_true", help="run nothing; write the report of what is done")
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    namespace = make_parser().parse_args(arguments)
    if namespace.jobs < 1:
        raise UserError(f"--jobs {namespace.jobs} must be at least 1")
    return namespace


def say(text: str) -> None:
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", flush=True)


def make_runs(arguments: argparse.Namespace, output: Path) -> Runs:
    """The experiment of the command line, checked as far as that goes without running anything."""
    whole = read_experiment(arguments.experiment, output)
    experiment = whole.select(arguments.arms, arguments.seeds)
    driver = build_parser()
    arms = resolve(whole, from_hf_config(read_hf_config(whole.base)), driver)
    chosen = {arm.name for arm in experiment.arms}
    # The order of the data is that of the whole file, whichever arms run now.
    longest = max(arm.iterations for arm in arms)
    return Runs(experiment, [arm for arm in arms if arm.arm.name in chosen], output, driver, data_iterations=longest)


def write_report(runs: Runs, runner: Runner, output: Path) -> None:
    """``results.json``, ``table.md``, ``report.html``, ``loss.svg``."""
    notes = []
    if runner.jobs > 1:
        notes.append(f"{runner.jobs} runs went on at a time: compare times with care")
    results = collect(runs, runner.hashes, failures=runner.failures, notes=notes)
    write_text_atomically(output / "results.json", results.to_json())
    write_text_atomically(output / "table.md", to_markdown(results))
    write_text_atomically(output / "report.html", to_html(results))
    write_text_atomically(output / "loss.svg", loss_svg(results))
    print(to_markdown(results), end="")
    say(f"report: {output / 'report.html'}, {output / 'table.md'}, {output / 'results.json'}")


def main(arguments: Sequence[str] | None = None) -> int:
    namespace = parse_arguments(arguments)
    output = Path(namespace.output or f"comparison_{Path(namespace.experiment).stem}").resolve()
    runs = make_runs(namespace, output)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with lock(output):
        runner = Runner(FileHashes(output / "hashes.json"), say, jobs=namespace.jobs)
        try:
            if not namespace.report_only:
                run_experiment(runs, runner)
        except StepFailed as error:
            raise UserError(str(error)) from None
        write_report(runs, runner, output)
    for label, message in runner.failures.items():
        say(f"FAILED: {label}: {message}")
    return 1 if runner.failures else 0


if __name__ == "__main__":
    cli.run(main)
