"""The steps of an experiment: which commands, in which order, with which files between them."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_midus.checkpoint.layout import LATEST_FILE
from megatron_midus.comparison.arms import ResolvedArm, driver_flags
from megatron_midus.comparison.experiment import REPOSITORY, Arm, Experiment, TrainData
from megatron_midus.comparison.steps import Step, StepFailed
from megatron_midus.config.run_file import words_of_entries
from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chain:
    """One arm with one seed and one learning rate, up to its figures.

    Attributes:
        rate: ``None`` for an arm that does not train.
        train: the training, ``None`` likewise.
        model: the step that leaves the Hugging Face directory ``hf``.
        steps: all of its own, in order.
    """

    arm: ResolvedArm
    seed: int
    rate: float | None
    directory: Path
    train: Step | None
    model: Step
    steps: tuple[Step, ...]

    @property
    def label(self) -> str:
        rate = "" if self.rate is None else f", lr {self.rate:g}"
        return f"{self.arm.arm.name}, seed {self.seed}{rate}"

    @property
    def hf(self) -> Path:
        return self.directory / "hf"

    @property
    def evaluation(self) -> Path:
        return self.directory / "evaluation.json"

    @property
    def tensorboard(self) -> Path:
        return self.directory / "tensorboard"


class Runs:
    """Makes the steps.

    Args:
        experiment: with its paths resolved.
        arms: the same arms, resolved against the base.
        output: root directory.
        driver: parser of ``pretrain_midus.py``, which spells the experiment's flags.
        data_iterations: steps that the data are drawn for; those of the longest of ``arms`` when absent.
    """

    def __init__(
        self,
        experiment: Experiment,
        arms: Sequence[ResolvedArm],
        output: Path,
        driver: argparse.ArgumentParser,
        *,
        data_iterations: int | None = None,
    ) -> None:
        self.experiment = experiment
        self.arms = list(arms)
        self.output = output
        self.driver = driver
        # With a budget in FLOPs arms differ in length: the data are drawn for the longest, and every arm reads a
        # beginning of the same order.
        longest = max((arm.iterations for arm in arms), default=0)
        self.data_iterations = longest and (data_iterations or longest)
        self.prepare = self._prepare_steps()
        self.train_data = self._encode("train", experiment.data.train)
        has_replay = any(arm.arm.replay for arm in arms)
        self.replay_data = self._encode("replay", experiment.data.replay if has_replay else [])
        self.datasets = [*self.train_data.steps, *self.replay_data.steps]
        self.valid_prefix = ""
        if self.data_iterations:
            data = experiment.data
            self._valid_step, self.valid_prefix = self._tokenise("valid", data.valid or data.new, data.json_key)
            self.datasets.append(self._valid_step)

    def seeds_of(self, arm: ResolvedArm) -> list[int]:
        """All seeds; one for an arm that does not train, which none of them changes."""
        return self.experiment.seeds if arm.iterations else self.experiment.seeds[:1]

    def prepared_paths(self) -> list[str]:
        """What the experiment reads from its own output directory, and so expects ``prepare`` to make."""
        data = self.experiment.data
        texts = [
            *(source.text for source in (*data.train, *data.replay)),
            data.new,
            data.old,
            data.third,
            data.valid,
            data.facts,
        ]
        texts += [text for arm in self.arms for text in (arm.arm.calibration_data, arm.arm.background_data)]
        return [text for text in texts if text is not None and Path(text).is_relative_to(self.output)]

    # -- data ----------------------------------------------------------------------------------------------------
    def _prepare_steps(self) -> list[Step]:
        steps: list[Step] = []
        for index, command in enumerate(self.experiment.prepare):
            words = shlex.split(command)
            is_python = words[0] in ("python", "python3")
            steps.append(
                Step(
                    name=f"prepare-{index}",
                    directory=self.output / "data",
                    words=tuple(words[1:] if is_python else words),
                    launcher=(sys.executable,) if is_python else (),
                    output=self.output,
                    after=tuple(steps[-1:]),
                )
            )
        return steps

    def _source(self, path: str) -> tuple[tuple[str, ...], tuple[Step, ...]]:
        """``reads`` and ``after`` of a step that reads a file of the experiment."""
        if Path(path).is_relative_to(self.output):
            return (), tuple(self.prepare[-1:])
        return (path,), ()

    def _tokenise(self, name: str, text: str, key: str) -> tuple[Step, str]:
        """The step that encodes a text, and the prefix of what it makes."""
        directory = self.output / "data" / name
        reads, after = self._source(text)
        step = Step(
            name=f"tokenise-{name}",
            directory=self.output / "data",
            words=(
                "preprocess", "--input", text, "--json-keys", key, "--append-eod",
                "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.experiment.base,
                "--output-prefix", str(directory / "part"),
            ),
            launcher=(sys.executable, *MIDUS),
            output=self.output,
            reads=(*reads, self.experiment.base),
            after=after,
            makes=(directory,),
        )  # fmt: skip
        return step, str(directory / f"part_{key}_document")

    def _encode(self, name: str, sources: Sequence[TrainData]) -> _Encoded:
        steps: list[Step] = []
        prefixes: list[str] = []
        for index, source in enumerate(sources if self.data_iterations else ()):
            prefix = source.dataset
            if source.text is not None:
                step, prefix = self._tokenise(f"{name}-{index}", source.text, source.json_key)
                steps.append(step)
            prefixes.append(str(prefix))
        weights = [source.weight for source in sources]
        ready = tuple(source.dataset for source in sources if source.dataset is not None)
        return _Encoded(steps, prefixes, weights, ready)

    def _data_of(self, arm: ResolvedArm) -> _Encoded:
        """What an arm trains on: the share of replay taken from the old domain, the rest as all others."""
        new, replay = self.train_data, arm.arm.replay
        if not replay:
            return new
        old = self.replay_data
        weights = [(1 - replay) * w for w in new.shares("train")] + [replay * w for w in old.shares("replay")]
        return _Encoded(new.steps + old.steps, new.prefixes + old.prefixes, weights, new.ready + old.ready)

    # -- an arm --------------------------------------------------------------------------------------------------
    def chain(self, arm: ResolvedArm, seed: int, rate: float | None) -> Chain:
        """The steps of one run."""
        root = self.output / "runs" / arm.arm.method / f"seed-{seed}"
        directory = root if rate is None else root / _point(arm.arm, rate)
        train = None
        if rate is None:
            model = self._upscale(arm, seed, directory / "hf", ["--save-format", "hf"])
            steps = [model]
        else:
            upscale = self._upscale(arm, seed, root / _upscaling_of(arm.arm.point) / "upscaled", self._padding(arm))
            train = self._train(arm, seed, rate, directory, upscale)
            model = self._export(directory, train)
            steps = [upscale, train, model]
        steps.append(self._evaluate(directory, model))
        return Chain(arm, seed, rate, directory, train, model, tuple(steps))

    def _padding(self, arm: ResolvedArm) -> list[str]:
        """Flags of the training's layout that up-scaling has to know."""
        given = driver_flags(self.experiment, arm.arm)
        words = []
        for name, target in (
            ("tensor_model_parallel_size", "--target-tensor-parallel-size"),
            ("pipeline_model_parallel_size", "--target-pipeline-parallel-size"),
            ("make_vocab_size_divisible_by", "--make-vocab-size-divisible-by"),
        ):
            if name in given:
                words += [target, str(given[name])]
        return words

    def _upscale(self, arm: ResolvedArm, seed: int, target: Path, more: Sequence[str]) -> Step:
        setting = arm.arm
        words = ["upscale", "--hf-model", self.experiment.base, "--save", str(target)]
        words += ["--policy", setting.policy, "--seed", str(seed), *more]
        words += ["--num-blocks", str(setting.num_blocks)] if setting.num_blocks is not None else []
        words += ["--insert-after", *map(str, setting.insert_after)] if setting.insert_after is not None else []
        memory = {} if arm.plan.memory is None else dataclasses.asdict(arm.plan.memory)
        for name, value in memory.items():
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
            elif value is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        reads: tuple[str, ...] = ()
        after: tuple[Step, ...] = ()
        for name in ("calibration_data", "background_data"):
            text = getattr(setting, name)
            if text is not None:
                found, before = self._source(text)
                reads, after = (*reads, *found), (*after, *before)
                words += [f"--{name.replace('_', '-')}", text]
        if setting.calibration_data is not None:
            words += ["--calibration-tokens", str(setting.calibration_tokens)]
        return Step(
            name="upscale",
            directory=target.parent,
            words=tuple(words),
            launcher=(sys.executable, *MIDUS),
            output=self.output,
            reads=(*reads, self.experiment.base),
            after=after,
            makes=(target,),
        )

    def _train(self, arm: ResolvedArm, seed: int, rate: float, directory: Path, upscale: Step) -> Step:
        experiment, checkpoints, data = self.experiment, directory / "checkpoints", self._data_of(arm)
        flags = words_of_entries(self.driver, {**experiment.driver, **arm.arm.driver}, where="driver")
        words = [
            "pretrain", *flags,
            "--distributed-backend", experiment.layout.backend,
            # Weights of the up-scaling while there is no checkpoint of its own; after that it resumes.
            "--pretrained-checkpoint", str(upscale.makes[0]), "--load", str(checkpoints), "--save", str(checkpoints),
            "--train", arm.arm.train, "--seed", str(seed),
            "--seq-length", str(experiment.seq_length),
            "--micro-batch-size", str(experiment.micro_batch_size),
            "--global-batch-size", str(experiment.global_batch_size),
            "--train-iters", str(self.data_iterations), "--exit-interval", str(arm.iterations),
            "--lr", f"{rate:g}", "--min-lr", f"{rate * experiment.min_lr_ratio:g}",
            "--lr-decay-iters", str(arm.iterations),
            "--train-data-path", *data.words, "--valid-data-path", self.valid_prefix,
            "--data-cache-path", str(directory / "cache"),
            "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", experiment.base,
            "--eval-at-start", "--eval-interval", str(arm.eval_interval),
            "--eval-iters", str(experiment.evaluation.valid_batches),
            "--log-interval", str(max(1, arm.iterations // 200)),
            "--tensorboard-dir", str(directory / "tensorboard"), "--log-memory-to-tensorboard",
        ]  # fmt: skip

        def check() -> None:
            """A driver that was asked to stop saves and ends well."""
            latest = checkpoints / LATEST_FILE
            reached = latest.read_text().strip() if latest.is_file() else "0"
            if reached != str(arm.iterations):
                raise StepFailed(f"stopped after iteration {reached} of {arm.iterations}; run again to continue")

        return Step(
            name="train",
            directory=directory,
            words=tuple(words),
            launcher=self._launcher(),
            output=self.output,
            reads=(experiment.base, *data.ready),
            after=(upscale, *data.steps, self._valid_step),
            makes=(checkpoints, directory / "tensorboard", directory / "cache"),
            goes_on=True,
            check=check,
        )

    def _launcher(self) -> tuple[str, ...]:
        if self.experiment.layout.nproc == 1:
            return (sys.executable, *MIDUS)
        count = str(self.experiment.layout.nproc)
        return (
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            count,
            "--master-port",
            FREE_PORT,
            *MIDUS,
        )

    def _export(self, directory: Path, train: Step) -> Step:
        words = ("convert", "--load", str(directory / "checkpoints"), "--to", "hf")
        return Step(
            name="export",
            directory=directory,
            words=(*words, "--save", str(directory / "hf")),
            launcher=(sys.executable, *MIDUS),
            output=self.output,
            after=(train,),
            makes=(directory / "hf",),
        )

    def _evaluate(self, directory: Path, model: Step) -> Step:
        data, settings = self.experiment.data, self.experiment.evaluation
        texts = [text for text in (data.new, data.old, data.third) if text is not None]
        words = ["evaluate", "--model", str(directory / "hf"), "--data", *texts, "--json-key", data.json_key]
        words += ["--seq-length", str(settings.seq_length or self.experiment.seq_length)]
        words += ["--batch-size", str(settings.batch_size), "--dtype", settings.dtype]
        words += ["--max-tokens", str(settings.max_tokens)] if settings.max_tokens is not None else []
        words += ["--facts", data.facts] if data.facts is not None else []
        words += self._device()
        sources = [self._source(text) for text in (*texts, *([data.facts] if data.facts is not None else []))]
        return Step(
            name="evaluate",
            directory=directory,
            words=(*words, "--json", str(directory / "evaluation.json")),
            launcher=(sys.executable, *MIDUS),
            output=self.output,
            reads=tuple(path for reads, _ in sources for path in reads),
            after=(model, *dict.fromkeys(step for _, after in sources for step in after)),
            makes=(directory / "evaluation.json",),
        )

    def _device(self) -> list[str]:
        return ["--device", "cpu" if self.experiment.layout.backend == "gloo" else "cuda"]

    # -- all of them ---------------------------------------------------------------------------------------------
    def latency(self, chains: Sequence[Chain]) -> Step | None:
        """One measurement of a model of every architecture; ``None`` when it is not asked for."""
        settings = self.experiment.latency
        if not settings.rounds or not chains:
            return None
        target = self.output / "latency.json"
        words = ["evaluate", "--model", *(str(chain.hf) for chain in chains), "--latency"]
        words += ["--latency-rounds", str(settings.rounds), "--latency-batch-size", str(settings.batch_size)]
        words += ["--latency-prompt-tokens", str(settings.prompt_tokens)]
        words += ["--latency-decode-tokens", str(settings.decode_tokens), "--dtype", self.experiment.evaluation.dtype]
        return Step(
            name="latency",
            directory=self.output,
            words=(*words, *self._device(), "--json", str(target)),
            launcher=(sys.executable, *MIDUS),
            output=self.output,
            after=tuple(chain.model for chain in chains),
            makes=(target,),
        )


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """Datasets that are read together.

    Attributes:
        steps: that make those of texts.
        prefixes: of all.
        weights: shares in the blend, or none.
        ready: prefixes of those that are no step's product.
    """

    steps: list[Step]
    prefixes: list[str]
    weights: Sequence[float | None]
    ready: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """``W1 P1 W2 P2``, or prefixes alone."""
        pairs = zip(self.weights, self.prefixes)
        return [word for weight, prefix in pairs for word in ([] if weight is None else [f"{weight:g}"]) + [prefix]]

    def shares(self, name: str) -> list[float]:
        """Weights that add up to 1; raises ``ValueError`` when there are several sources without any."""
        weights = [1.0 if weight is None and len(self.prefixes) == 1 else weight for weight in self.weights]
        if any(weight is None for weight in weights):
            raise UserError(f"data: {name} has {len(weights)} sources; give each a weight, because an arm has replay")
        given = [weight for weight in weights if weight is not None]
        return [weight / sum(given) for weight in given]


def _point(arm: Arm, rate: float) -> str:
    """Directory of a strength: its name, with the learning rate where that is none of it."""
    if not arm.point:
        return f"lr-{rate:g}"
    has_rate = any(entry.startswith("lr=") for entry in arm.point.split(","))
    return arm.point if has_rate else f"{arm.point},lr={rate:g}"


def _upscaling_of(point: str) -> str:
    """The part of a strength that up-scaling sees: strengths that differ in the rest share one up-scaled model."""
    keys = ("policy", "num_blocks", "calibration_data", "background_data", "calibration_tokens")
    entries = [entry for entry in point.split(",") if entry.startswith("memory.") or entry.partition("=")[0] in keys]
    return ",".join(entries)


FREE_PORT = "{free port}"
# What the interpreter, or torchrun, runs before a verb.
MIDUS = ("-m", "megatron_midus")


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def one_of_each_architecture(chains: Sequence[Chain]) -> list[Chain]:
    """The first chain of every kind of model: latency depends on the blocks, not on what they learnt."""
    found: dict[tuple, Chain] = {}
    for chain in chains:
        found.setdefault(chain.arm.architecture, chain)
    return list(found.values())


def is_one_process(step: Step) -> bool:
    """Whether a step is a ``midus`` command without a launcher."""
    return step.launcher == (sys.executable, *MIDUS)


def command_line(step: Step) -> list[str]:
    """Interpreter, launcher, program (by its full path) and arguments."""
    port = free_port() if FREE_PORT in step.launcher else ""
    launcher = [port if word == FREE_PORT else word for word in step.launcher]
    program = REPOSITORY / step.words[0]
    return [*launcher, str(program) if program.is_file() else step.words[0], *step.words[1:]]
