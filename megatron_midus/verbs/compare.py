"""``midus compare``: runs an experiment and writes its report."""

from __future__ import annotations

import dataclasses
import datetime
import signal
import threading
from pathlib import Path

from megatron_midus.comparison.arms import resolve
from megatron_midus.comparison.columns import to_markdown
from megatron_midus.comparison.experiment import read_experiment
from megatron_midus.comparison.line_page import write_line
from megatron_midus.comparison.results import Results, collect
from megatron_midus.comparison.results_page import loss_svg, to_html
from megatron_midus.comparison.runner import Runner, lock, run_experiment
from megatron_midus.comparison.runs import Runs
from megatron_midus.comparison.steps import FileHashes, StepFailed
from megatron_midus.config import ModelConfig
from megatron_midus.config.compare import CompareConfig
from megatron_midus.conversion.families import from_hf_config
from megatron_midus.conversion.hf_io import read_hf_config
from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically
from megatron_midus.progress import Progress
from megatron_midus.training.arguments import build_parser
from megatron_midus.training.preflight import check_run_to_come
from megatron_midus.verbs.verb import verb

# What the verbs import, in this order: Megatron after the mapping to the CPU, and not where a model is only read.
_READING = (
    "verbs.upscale",
    "verbs.convert",
    "verbs.evaluate",
    "evaluation.perplexity",
    "verbs.preprocess",
    "data.preprocess",
)
_TRAINING = ("platform:activate_cpu_mapping", "training.main", "training.pretrain")
_TOKENIZER = ("transformers.models.auto.tokenization_auto", "transformers.models.llama.configuration_llama")
WARM = {
    "pretrain": (*(f"megatron_midus.{name}" for name in _TRAINING), *_TOKENIZER),
    **{
        verb: (
            "transformers.models.llama.modeling_llama",
            *_TOKENIZER,
            *(f"megatron_midus.{name}" for name in _READING),
        )
        for verb in ("preprocess", "upscale", "convert", "evaluate")
    },
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was run.

    Attributes:
        results: of every arm and seed that is done.
        directory: ``results.json``, ``table.md``, ``report.html`` and the runs lie there.
        failures: message by the label of what failed.
    """

    results: Results
    directory: Path
    failures: dict[str, str]


@verb(CompareConfig)
def compare(config: CompareConfig, progress: Progress) -> Comparison:
    """Runs an experiment, as far as it is not done, and writes its report. See ``CompareConfig`` for the settings.

    Raises:
        UserError: an experiment that cannot be run, or whose base fails.
    """
    output = Path(config.output or f"comparison_{Path(config.experiment).stem}").resolve()
    runs = _make_runs(config, output)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with lock(output):
        warm = WARM if runs.experiment.layout.backend == "gloo" else None
        runner = Runner(FileHashes(output / "hashes.json"), say, jobs=config.jobs, warm=warm)
        try:
            if not config.report_only:
                run_experiment(runs, runner)
        except StepFailed as error:
            raise UserError(str(error)) from None
        return Comparison(_write_report(runs, runner, output), output, runner.failures)


def say(text: str) -> None:
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", flush=True)


def _make_runs(config: CompareConfig, output: Path) -> Runs:
    """The experiment, checked as far as that goes without running anything."""
    whole = read_experiment(config.experiment, output)
    experiment = whole.select(config.arms, config.seeds)
    driver = build_parser()
    base = from_hf_config(read_hf_config(whole.base))
    if base.family == "midus":
        raise UserError(
            f"{whole.base} is a MIDUS model; arms are compared as ways to up-scale one ordinary base. Up-scale it again with "
            "midus upscale"
        )
    arms = resolve(whole, base, driver)
    chosen = {arm.name for arm in experiment.arms}
    # The order of the data is that of the whole file, whichever arms run now.
    longest = max(arm.iterations for arm in arms)
    runs = Runs(experiment, [arm for arm in arms if arm.arm.name in chosen], output, driver, data_iterations=longest)
    _check_training(runs, base)
    return runs


def _check_training(runs: Runs, base: ModelConfig) -> None:
    """What the driver would refuse of an arm, hours before it gets there."""
    for arm in runs.arms:
        for rate in runs.experiment.rates(arm.arm):
            train = runs.chain(arm, runs.experiment.seeds[0], rate).train
            if train is None:
                continue
            name, processes = arm.arm.name, runs.experiment.layout.nproc

            def warn(text: str, name: str = name) -> None:
                say(f"{name}: {text}")

            try:
                check_run_to_come(train.words[1:], base, arm.plan, processes=processes, warn=warn)
            except ValueError as error:
                raise UserError(f"arm {name!r}: {error}") from None


def _write_report(runs: Runs, runner: Runner, output: Path) -> Results:
    """``results.json``, ``table.md``, ``report.html``, ``loss.svg``, and ``line.*`` where arms have strengths."""
    notes = []
    if runner.jobs > 1:
        notes.append(f"{runner.jobs} runs went on at a time: compare times with care")
    results = collect(runs, runner.hashes, failures=runner.failures, notes=notes)
    write_text_atomically(output / "results.json", results.to_json())
    write_text_atomically(output / "table.md", to_markdown(results))
    write_text_atomically(output / "report.html", to_html(results))
    write_text_atomically(output / "loss.svg", loss_svg(results))
    if runs.experiment.has_strengths:
        for name, content in write_line(results).items():
            write_text_atomically(output / name, content)
    return results


def command(config: CompareConfig) -> int:
    """``midus compare``: exit code 1 when a run failed."""
    done = compare(config)
    print(to_markdown(done.results), end="")
    names = ("report.html", "table.md", "results.json")
    say(f"report: {', '.join(str(done.directory / name) for name in names)}")
    for label, message in done.failures.items():
        say(f"FAILED: {label}: {message}")
    return 1 if done.failures else 0
