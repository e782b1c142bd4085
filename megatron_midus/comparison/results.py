"""Results of an experiment, collected from what its runs left: figures of every run, means and spreads of every arm."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_midus.comparison.arms import ResolvedArm
from megatron_midus.comparison.curves import Curves, Point, make_curves, read_scalars, thin
from megatron_midus.comparison.experiment import Data
from megatron_midus.comparison.runner import choose_rate, finished, rate_losses
from megatron_midus.comparison.runs import Chain, Runs, one_of_each_architecture
from megatron_midus.comparison.steps import FileHashes, read_marker

CURVE_POINTS = 200


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean over seeds and its sample standard deviation (``None`` for one seed)."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """``None`` without any value."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    @property
    def error(self) -> float | None:
        """Standard error of the mean; ``None`` for one seed."""
        return None if self.deviation is None else self.deviation / self.count**0.5


@dataclasses.dataclass
class RunResult:
    """One seed of one arm. Losses are nats per token of the whole held-out texts, by ``midus evaluate``."""

    seed: int
    new_loss: float
    old_loss: float | None
    curves: Curves | None
    """``None`` for an arm that does not train."""
    recall: float | None = None
    """Share of the questions about facts whose answer greedy decoding writes."""
    answer_log_likelihood: float | None = None
    """Mean of these answers', nats."""
    third_loss: float | None = None


@dataclasses.dataclass
class ArmResult:
    """One arm over its seeds."""

    name: str
    policy: str
    train: str
    num_blocks: int
    memory: dict[str, Any] | None
    driver: dict[str, Any]
    parameters: int
    added: int
    trainable: int
    flops_per_token: float
    iterations: int
    tokens: int
    lr: float | None
    rate_losses: dict[str, float]
    """Held-out loss of the learning rates that were tried on the first seed."""
    runs: list[RunResult] = dataclasses.field(default_factory=list)
    latency: dict[str, Any] | None = None
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    def loss(self, domain: str) -> Mean | None:
        """Held-out loss on ``new``, ``old`` or ``third``."""
        values = [getattr(run, f"{domain}_loss") for run in self.runs]
        return Mean.of([value for value in values if value is not None])

    def of_answers(self, figure: str) -> Mean | None:
        """``recall`` or ``answer_log_likelihood``; ``None`` without questions about facts."""
        values = [getattr(run, figure) for run in self.runs]
        return Mean.of([value for value in values if value is not None])

    def perplexity(self, domain: str) -> Mean | None:
        values = [getattr(run, f"{domain}_loss") for run in self.runs]
        return Mean.of([math.exp(value) for value in values if value is not None])

    def difference(self, other: ArmResult, domain: str = "new") -> Mean | None:
        """Of the losses, seed by seed: arms of one seed saw the same data. A run of one seed stands for all of them."""
        mine = {run.seed: getattr(run, f"{domain}_loss") for run in self.runs}
        theirs = {run.seed: getattr(run, f"{domain}_loss") for run in other.runs}
        if self.trainable and other.trainable:
            pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
        elif self.trainable:
            pairs = [(loss, base) for loss in mine.values() for base in theirs.values()]
        else:
            pairs = [(base, loss) for base in mine.values() for loss in theirs.values()]
        return Mean.of([a - b for a, b in pairs if a is not None and b is not None])

    @property
    def curves(self) -> list[Curves]:
        return [run.curves for run in self.runs if run.curves is not None]

    @property
    def seconds_per_iteration(self) -> float | None:
        """Median over seeds."""
        times = [curves.seconds_per_iteration for curves in self.curves]
        return statistics.median(times) if times else None

    @property
    def tokens_per_second(self) -> float | None:
        seconds = self.seconds_per_iteration
        return self.tokens / self.iterations / seconds if seconds else None

    @property
    def training_seconds(self) -> float | None:
        """Of all steps, median over seeds."""
        ends = [curves.validation[-1].seconds for curves in self.curves if curves.validation]
        return statistics.median(ends) if ends else None

    @property
    def peak_memory_bytes(self) -> int | None:
        peaks = [curves.peak_memory_bytes for curves in self.curves if curves.peak_memory_bytes is not None]
        return max(peaks) if peaks else None

    def validation_at(self, seconds: float) -> Mean | None:
        """Loss of the validation curve after so much training, over seeds that trained that long."""
        losses = [curves.validation_at(seconds) for curves in self.curves]
        return Mean.of([loss for loss in losses if loss is not None])


@dataclasses.dataclass
class Results:
    """A whole comparison."""

    description: str
    reference: str
    seeds: list[int]
    arms: list[ArmResult]
    settings: dict[str, Any]
    """The experiment as it was read."""
    machines: list[dict[str, Any]]
    """What the runs recorded of the machine they ran on, each once; empty entries are runs that recorded nothing."""
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def reference_arm(self) -> ArmResult | None:
        return next((arm for arm in self.arms if arm.name == self.reference and arm.runs), None)

    @property
    def equal_seconds(self) -> float | None:
        """The time at which arms are compared: that of the training of the quickest arm."""
        times = [arm.training_seconds for arm in self.arms if arm.training_seconds is not None]
        return min(times) if times else None

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        for arm, entry in zip(self.arms, values["arms"]):
            summary: dict[str, Any] = {name: getattr(arm, name) for name in (
                "seconds_per_iteration", "tokens_per_second", "training_seconds", "peak_memory_bytes")}  # fmt: skip
            for domain in ("new", "old", "third"):
                for figure in ("loss", "perplexity"):
                    found = getattr(arm, figure)(domain)
                    summary[f"{domain}_{figure}"] = found and dataclasses.asdict(found)
            for figure in ("recall", "answer_log_likelihood"):
                found = arm.of_answers(figure)
                summary[figure] = found and dataclasses.asdict(found)
            entry["summary"] = summary
        return json.dumps(_finite(values), indent=1) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(text: str) -> Results:
    """Inverse of ``Results.to_json``; infinite losses come back as ``None``."""
    values = json.loads(text)
    arms = []
    for entry in values.pop("arms"):
        entry.pop("summary")
        runs = [RunResult(**{**run, "curves": _read_curves(run["curves"])}) for run in entry.pop("runs")]
        arms.append(ArmResult(**entry, runs=runs))
    return Results(**values, arms=arms)


def _read_curves(values: dict[str, Any] | None) -> Curves | None:
    if values is None:
        return None
    lists = {name: [Point(**point) for point in values[name]] for name in ("training", "validation")}
    return Curves(**{**values, **lists})


def collect(runs: Runs, hashes: FileHashes, *, failures: dict[str, str], notes: Sequence[str] = ()) -> Results:
    """Reads the figures of all finished runs.

    Args:
        runs: of the experiment.
        hashes: tell whether a run is of these settings.
        failures: by label of the chain.
        notes: for the reader.
    """
    experiment = runs.experiment
    arms, done_chains = [], []
    for arm in runs.arms:
        rate = choose_rate(runs, arm, hashes)
        chains = [runs.chain(arm, seed, rate) for seed in runs.seeds_of(arm)]
        done = finished(chains, hashes)
        done_chains += done
        arms.append(_arm_result(runs, arm, rate, done, hashes))
        arms[-1].failures = {label: text for label, text in failures.items() if label.startswith(f"{arm.arm.name}, ")}
    _add_latency(runs, hashes, arms, done_chains)
    return Results(
        description=experiment.description,
        reference=experiment.reference_name,
        seeds=experiment.seeds,
        arms=arms,
        settings=dataclasses.asdict(experiment),
        machines=machines_of(done_chains),
        notes=[*notes, *_notes(runs, arms), *_latency_failed(failures)],
    )


def machines_of(chains: Sequence[Chain]) -> list[dict[str, Any]]:
    """What the steps that make the figures recorded of their machine, each once. Not of the machine that writes the page."""
    found: list[dict[str, Any]] = []
    for step in (step for chain in chains for step in chain.steps):
        machine = read_marker(step.marker).get("machine", {})
        if machine not in found:
            found.append(machine)
    return found


def _arm_result(
    runs: Runs, arm: ResolvedArm, rate: float | None, chains: Sequence[Chain], hashes: FileHashes
) -> ArmResult:
    experiment, tried = runs.experiment, {}
    tokens_per_iteration = experiment.global_batch_size * experiment.seq_length
    if len(experiment.rates(arm.arm)) > 1:
        tried = {f"{lr:g}": loss for lr, loss in rate_losses(runs, arm, hashes).items()}
    return ArmResult(
        name=arm.arm.name,
        policy=arm.arm.policy,
        train=arm.arm.train,
        num_blocks=len(arm.plan.inserted_indices),
        memory=None if arm.plan.memory is None else arm.plan.memory.to_dict(),
        driver=arm.arm.driver,
        parameters=arm.parameters,
        added=arm.added,
        trainable=arm.trainable,
        flops_per_token=arm.flops_per_token,
        iterations=arm.iterations,
        tokens=arm.iterations * tokens_per_iteration,
        lr=rate,
        rate_losses=tried,
        runs=[_run_result(chain, experiment.data, tokens_per_iteration) for chain in chains],
    )


def _run_result(chain: Chain, data: Data, tokens_per_iteration: int) -> RunResult:
    (model,) = json.loads(chain.evaluation.read_text())["models"]
    domains = [name for name in ("new", "old", "third") if getattr(data, name) is not None]
    losses = dict(zip(domains, (entry["loss"] for entry in model["results"].values()), strict=True))
    curves = None
    if chain.train is not None:
        curves = make_curves(read_scalars(chain.tensorboard), tokens_per_iteration=tokens_per_iteration)
        # A run that was resumed evaluated there as well, where runs of other seeds have no point.
        every = chain.arm.eval_interval * tokens_per_iteration
        validation = [point for point in curves.validation if point.tokens % every == 0]
        curves = dataclasses.replace(curves, training=thin(curves.training, CURVE_POINTS), validation=validation)
    answers: dict[str, Any] = next(iter(model.get("tasks", {}).values()), {})
    return RunResult(
        chain.seed,
        losses["new"],
        losses.get("old"),
        curves,
        recall=answers["recall"]["value"] if answers else None,
        answer_log_likelihood=answers["log_likelihood"]["value"] if answers else None,
        third_loss=losses.get("third"),
    )


def _add_latency(runs: Runs, hashes: FileHashes, arms: Sequence[ArmResult], chains: Sequence[Chain]) -> None:
    measured = one_of_each_architecture(_by_seed(runs, chains))
    step = runs.latency(measured)
    if step is None or not step.is_done(step.fingerprint(hashes)):
        return
    models = json.loads(step.makes[0].read_text())["models"]
    by_architecture = {chain.arm.architecture: model["latency"] for chain, model in zip(measured, models)}
    for resolved, arm in zip(runs.arms, arms):
        arm.latency = by_architecture.get(resolved.architecture)


def _by_seed(runs: Runs, chains: Sequence[Chain]) -> list[Chain]:
    """In the order in which they ran: seed by seed, all arms in turn."""
    order = {arm.arm.name: index for index, arm in enumerate(runs.arms)}
    return sorted(chains, key=lambda c: (runs.experiment.seeds.index(c.seed), order[c.arm.arm.name]))


def _latency_failed(failures: dict[str, str]) -> list[str]:
    return [f"the latency was not measured: {failures['latency']}"] if "latency" in failures else []


def _notes(runs: Runs, arms: Sequence[ArmResult]) -> list[str]:
    data = runs.experiment.data
    notes = []
    if any(arm.rate_losses for arm in arms) and data.valid in (None, data.new):
        notes.append(
            "learning rates were chosen on the first seed by the loss on the validation batches, which are part of the "
            "held-out text of the new domain: the figures on that text are slightly optimistic for arms with a choice"
        )
    if runs.experiment.budget.flops is not None:
        notes.append("the budget is in FLOPs: arms see different numbers of tokens, each a beginning of the same order")
    incomplete = [
        arm.name for arm in arms if arm.runs and 1 < len(runs.experiment.seeds) != len(arm.runs) and arm.trainable
    ]
    if incomplete:
        notes.append(f"seeds are missing, so means are over fewer: {', '.join(incomplete)}")
    return notes
