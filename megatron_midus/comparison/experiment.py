"""Experiment: what an experiment file says, checked; every field is a key of the file."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_midus.config.run_file import read_yaml
from megatron_midus.config.values import build, check_keys, not_one_of
from megatron_midus.errors import UserError
from megatron_midus.hub import cached_model
from megatron_midus.upscaling import POLICIES
from megatron_midus.upscaling.policies import POLICY_ALIASES, canonical_policy

REPOSITORY = Path(__file__).parents[2]
PLACEHOLDERS = ("{output}", "{repository}")
# NAME, or NAME@KEY=VALUE,KEY=VALUE for one strength of an arm.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(@[A-Za-z0-9._+=,-]+)?")


@dataclasses.dataclass(frozen=True)
class TrainData:
    """One source of training tokens: a text to be tokenised, or a dataset that is."""

    text: str | None = None
    """.jsonl, .txt or .parquet file, encoded with the base's tokenizer."""
    dataset: str | None = None
    """Prefix P of an indexed dataset (P.bin and P.idx)."""
    weight: float | None = None
    """Share in the blend; by size when no source has one."""
    json_key: str = "text"
    """Key of the text in a JSON line."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.dataset is None):
            raise UserError("give exactly one of 'text' (to be tokenised) and 'dataset' (prefix of .bin and .idx)")
        if self.weight is not None and self.weight <= 0:
            raise UserError(f"weight={self.weight} must be above 0")


@dataclasses.dataclass(frozen=True)
class Data:
    """Training data, and held-out texts of the new domain and of the base's own."""

    train: list[TrainData]
    """What all arms train on."""
    new: str
    """Held-out text of the new domain."""
    old: str | None = None
    """Held-out text of the base's own domain, to see what is forgotten."""
    third: str | None = None
    """Held-out text of a third domain, which no arm trains on, replays or fits its domain gate on."""
    valid: str | None = None
    """Text of the loss curves and of the choice among learning rates; the held-out text of the new domain when absent."""
    facts: str | None = None
    """Questions about the training text, .jsonl with prompt and answer, to see how many facts were learned."""
    json_key: str = "text"
    """Key of the text in the JSON lines of the held-out files."""
    replay: list[TrainData] = dataclasses.field(default_factory=list)
    """Text of the base's own domain that arms with a share of replay train on as well."""

    def __post_init__(self) -> None:
        if not self.train:
            raise UserError("train is empty; name at least one text or dataset")
        for name in ("train", "replay"):
            if len({source.weight is None for source in getattr(self, name)}) > 1:
                raise UserError(f"{name}: some sources have a weight and some have none; give all or none")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every arm may spend: tokens, or FLOPs by the formula of the cost table."""

    tokens: int | None = None
    """Training tokens of every arm."""
    flops: float | None = None
    """Training FLOPs of every arm; an arm that costs less a token sees more tokens."""

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.flops is None):
            raise UserError("give exactly one of 'tokens' and 'flops'")
        if (self.tokens or self.flops or 0) <= 0:
            raise UserError("must be above 0")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Processes of one training run."""

    nproc: int = 1
    """Processes that torchrun starts on this machine."""
    backend: Literal["gloo", "nccl"] = "gloo"
    """gloo = CPU, nccl = GPUs."""

    def __post_init__(self) -> None:
        if self.nproc < 1:
            raise UserError(f"nproc={self.nproc} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out figures."""

    points: int = 10
    """Points of the validation curve of a run, its end included; there is one more before the first step."""
    valid_batches: int = 4
    """Global batches of each point, the same ones every time."""
    max_tokens: int | None = None
    """Tokens of each held-out text that the final figures read; all of it when absent."""
    seq_length: int | None = None
    """Tokens of a window of the final figures; that of the training when absent."""
    batch_size: int = 8
    """Windows in one call of the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights in the final figures; auto = float32 on a CPU, the checkpoint's own on a GPU."""

    def __post_init__(self) -> None:
        for name in ("points", "valid_batches", "max_tokens", "seq_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


@dataclasses.dataclass(frozen=True)
class LatencySettings:
    """Inference latency, all architectures in turns."""

    rounds: int = 7
    """Timed rounds; 0 = do not measure."""
    prompt_tokens: int = 256
    """Length of the prompt."""
    decode_tokens: int = 32
    """Decoding steps of a round."""
    batch_size: int = 1
    """Sequences at once."""

    def __post_init__(self) -> None:
        if self.rounds < 0 or min(self.prompt_tokens, self.decode_tokens, self.batch_size) < 1:
            raise UserError("rounds must be 0 or more, prompt_tokens, decode_tokens and batch_size at least 1")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to up-scale and to train."""

    name: str
    """Unique; also the name of its directory."""
    policy: str
    """Of midus upscale."""
    num_blocks: int | None = None
    """Blocks to insert, spread by the policy."""
    insert_after: list[int] | None = None
    """0-based layers after which a block is inserted, instead of num_blocks."""
    train: Literal["inserted", "all", "lora", "none"] = "inserted"
    """What learns; none = the model is evaluated as up-scaling leaves it; lora = adapters of driver: {lora-rank: R}."""
    replay: float = 0.0
    """Share of data: replay in the training tokens."""
    tokens: int | None = None
    """Training tokens, where they are not those of the budget."""
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of Memory blocks: the flags of midus upscale without --memory-."""
    calibration_data: str | None = None
    """Text of the new domain for key_init: calibrated and domain_gate: true."""
    background_data: str | None = None
    """Text of the old domain for domain_gate: true."""
    calibration_tokens: int = 8192
    """Tokens of either text."""
    lr: list[float] | None = None
    """Largest learning rate; several = the best on the first seed is used for all; that of the experiment when absent."""
    driver: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Flags of midus pretrain for this arm only."""
    strengths: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Grids {key: [value, …]}: every combination is a run of this arm. A key is one of these keys, memory.KEY, or a flag of midus pretrain."""

    @property
    def method(self) -> str:
        """The arm in the file that this is a strength of; its own name without strengths."""
        return self.name.partition("@")[0]

    @property
    def point(self) -> str:
        """``KEY=VALUE,KEY=VALUE`` of its strength; empty without strengths."""
        return self.name.partition("@")[2]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"name {self.name!r} may only have letters, digits and . _ + -, and must begin with a letter or digit"
            )
        object.__setattr__(self, "policy", canonical_policy(self.policy))
        if self.policy not in POLICIES:
            raise UserError(f"policy {not_one_of(self.policy, (*POLICIES, *POLICY_ALIASES))}")
        if self.memory and self.policy != "interleave":
            raise UserError(
                f"memory settings do not apply to policy {self.policy}; choose interleave or leave them out"
            )
        if self.policy == "none" and self.train == "inserted":
            raise UserError(
                "policy none inserts nothing to train; choose train: all, or train: none to evaluate the base"
            )
        self._check_texts()
        if self.lr is not None:
            _check_rates(self.lr)
        if not 0 <= self.replay < 1:
            raise UserError(f"replay={self.replay} must be at least 0 and below 1")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"tokens={self.tokens} must be at least 1")

    def _check_texts(self) -> None:
        calibrated, gated = self.memory.get("key_init") == "calibrated", bool(self.memory.get("domain_gate"))
        if (self.calibration_data is not None) != (calibrated or gated):
            raise UserError(
                "calibration_data and memory: {key_init: calibrated} or {domain_gate: true} need each other; give both or "
                "neither"
            )
        if (self.background_data is not None) != gated:
            raise UserError("background_data and memory: {domain_gate: true} need each other; give both or neither")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A base, data, a budget, and the arms that are compared."""

    base: str
    """Hugging Face directory."""
    data: Data
    budget: Budget
    arms: list[Arm]
    lr: list[float] = dataclasses.field(default_factory=list)
    """Largest learning rate of arms that have none of their own."""
    description: str = ""
    """One line for the report."""
    prepare: list[str] = dataclasses.field(default_factory=list)
    """Commands that make the texts, run once in the repository's directory, without a shell."""
    reference: str | None = None
    """Arm that differences are taken to; the first that trains when absent."""
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])
    """Each gives new tensors and an order of the data; all arms run with all of them."""
    seq_length: int = 512
    """Tokens of a training sample."""
    micro_batch_size: int = 1
    """Sequences of a forward pass."""
    global_batch_size: int = 8
    """Sequences of an optimizer step."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the decay, as a share of the largest."""
    driver: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Flags of midus pretrain for all arms."""
    layout: Processes = dataclasses.field(default_factory=Processes)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    latency: LatencySettings = dataclasses.field(default_factory=LatencySettings)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names:
            raise UserError("arms is empty; name at least one")
        for kind, entries in (("arms", names), ("seeds", self.seeds)):
            twice = next((entry for entry in entries if entries.count(entry) > 1), None)
            if twice is not None:
                raise UserError(f"{kind}: {twice!r} is given twice")
        if not self.seeds or min(self.seeds) < 1:
            raise UserError(f"seeds={self.seeds} must be whole numbers of at least 1")
        for name in ("seq_length", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"min_lr_ratio={self.min_lr_ratio} must lie between 0 and 1")
        _check_rates(self.lr)
        for arm in self.arms:
            if arm.train != "none" and not (arm.lr or self.lr):
                raise UserError(f"arm {arm.name!r} has no learning rate; give 'lr' to it or to the experiment")
            if arm.replay and not self.data.replay:
                raise UserError(f"arm {arm.name!r} has replay={arm.replay:g}; name the text under data: replay")
        if self.reference is not None:
            check_keys([self.reference], [*names, *(arm.method for arm in self.arms)], "reference")

    def rates(self, arm: Arm) -> list[float]:
        """Learning rates that ``arm`` tries; none when it does not train."""
        return [] if arm.train == "none" else arm.lr or self.lr

    @property
    def reference_name(self) -> str:
        """The arm that differences are taken to."""
        trained = [arm.name for arm in self.arms if arm.train != "none"]
        named = [arm.name for arm in self.arms if self.reference in (arm.name, arm.method)]
        return (named or trained or [self.arms[0].name])[0]

    @property
    def has_strengths(self) -> bool:
        """Whether any arm is one point of a line."""
        return any(arm.point for arm in self.arms)

    def select(self, arms: list[str] | None, seeds: list[int] | None) -> Experiment:
        """Only some arms and seeds of it; raises ``ValueError`` for one that it has not.

        The name of an arm stands for all of its strengths. The base as it is stays where there are strengths: what they
        gain and lose is counted from it.
        """
        if arms is not None:
            check_keys(arms, [name for arm in self.arms for name in (arm.name, arm.method)], "--arms")
        unknown = set(seeds or ()) - set(self.seeds)
        if unknown:
            raise UserError(f"--seeds: {min(unknown)} is not one of {', '.join(map(str, self.seeds))}")
        kept = [
            arm
            for arm in self.arms
            if arms is None or {arm.name, arm.method} & set(arms) or (self.has_strengths and is_base(arm))
        ]
        reference = self.reference if any(self.reference in (arm.name, arm.method) for arm in kept) else None
        chosen = [seed for seed in self.seeds if seeds is None or seed in seeds]
        return dataclasses.replace(self, arms=kept, seeds=chosen, reference=reference)


def is_base(arm: Arm) -> bool:
    """Whether an arm is the base as it is."""
    return arm.policy == "none" and arm.train == "none"


def _check_rates(rates: list[float]) -> None:
    if any(rate <= 0 for rate in rates):
        raise UserError(f"lr={rates}: every learning rate must be above 0")
    if len(set(rates)) < len(rates):
        raise UserError(f"lr={rates}: a learning rate is given twice")


def read_experiment(path: str | Path, output: str | Path) -> Experiment:
    """Reads and checks an experiment file.

    Paths in it are relative to the file; ``{output}`` and ``{repository}`` stand for the output directory and for the
    directory of this project. ``defaults`` holds entries for all arms that do not say otherwise.

    Raises:
        ValueError: anything wrong, in one line with the nearest known key.
    """
    path = Path(path)
    values = read_yaml(path, what="experiment")
    known = [*(field.name for field in dataclasses.fields(Experiment)), "defaults"]
    check_keys(values, known, path.name)
    defaults = values.pop("defaults", None) or {}
    arm_keys = [field.name for field in dataclasses.fields(Arm)]
    if not isinstance(defaults, dict):
        raise UserError(f"{path.name}: defaults is not a mapping of 'key: value' lines")
    check_keys(defaults, [key for key in arm_keys if key not in ("name", "policy")], f"{path.name}: defaults")
    if isinstance(values.get("arms"), list):
        arms = [with_defaults(arm, defaults) for arm in values["arms"]]
        values["arms"] = with_strengths(arms, path.name)
    experiment = build(Experiment, values, path.name)
    return _resolve_paths(experiment, path.resolve().parent, Path(output).resolve())


def with_defaults(arm: Any, defaults: Mapping[str, Any]) -> Any:
    """An arm of the file with the common entries that it can use; what it says itself wins."""
    if not isinstance(arm, dict):
        return arm
    usable = dict(defaults)
    if arm.get("policy") != "interleave":
        usable.pop("memory", None)
    if arm.get("policy") == "none" or "insert_after" in arm:
        usable.pop("num_blocks", None)
    if arm.get("policy") == "none" or "num_blocks" in arm:
        usable.pop("insert_after", None)
    if arm.get("train") == "none":
        usable.pop("strengths", None)
    merged = {**usable, **arm}
    for name in ("memory", "driver"):
        if isinstance(usable.get(name), dict) and isinstance(arm.get(name), dict):
            merged[name] = {**usable[name], **arm[name]}
    return merged


def with_strengths(arms: list[Any], where: str) -> list[Any]:
    """The arms of a file with an arm for every strength, ``NAME@KEY=VALUE,…``, and with the base if it is missing."""
    found = []
    for arm in arms:
        if not isinstance(arm, dict) or not arm.get("strengths"):
            found.append(arm)
            continue
        arm = dict(arm)
        grids = arm.pop("strengths")
        for grid in grids if isinstance(grids, list) else [grids]:
            _check_grid(grid, f"{where}: arm {arm.get('name')!r}: strengths")
            for values in itertools.product(*grid.values()):
                found.append(_with_strength(arm, dict(zip(grid, values))))
    has_base = any(isinstance(a, dict) and (a.get("policy"), a.get("train")) == ("none", "none") for a in found)
    if found != arms and not has_base:
        found.insert(0, {"name": "base", "policy": "none", "train": "none"})
    return found


def _check_grid(grid: Any, where: str) -> None:
    if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise UserError(f"{where}: {grid!r} must be lines of 'key: [value, …]', or a list of such grids")
    if any(key in ("name", "strengths", "memory", "driver", "insert_after") for key in grid):
        raise UserError(
            f"{where}: give single settings, such as lr, num_blocks, memory.num_keys or a flag of midus pretrain"
        )


def _with_strength(arm: dict[str, Any], strength: dict[str, Any]) -> dict[str, Any]:
    point = ",".join(f"{key}={value}" for key, value in strength.items())
    arm = {**arm, "name": f"{arm.get('name')}@{point}"}
    keys = [field.name for field in dataclasses.fields(Arm)]
    for key, value in strength.items():
        group, _, name = key.rpartition(".")
        if key in keys:
            arm[key] = value
        elif group == "memory":
            arm["memory"] = {**arm.get("memory", {}), name: value}
        else:
            arm["driver"] = {**arm.get("driver", {}), key: value}
    return arm


def _resolve_paths(experiment: Experiment, home: Path, output: Path) -> Experiment:
    def fill(text: str) -> str:
        return text.replace("{output}", str(output)).replace("{repository}", str(REPOSITORY))

    def model(text: str) -> str:
        here = str(resolve(text))
        return here if Path(here).exists() else cached_model(text) or here

    def resolve(text: str | None) -> str | None:
        return None if text is None else str((home / fill(text)).resolve())

    def sources(entries: list[TrainData]) -> list[TrainData]:
        return [dataclasses.replace(e, text=resolve(e.text), dataset=resolve(e.dataset)) for e in entries]

    train, replay = sources(experiment.data.train), sources(experiment.data.replay)
    texts = {name: resolve(getattr(experiment.data, name)) for name in ("new", "old", "third", "valid", "facts")}
    return dataclasses.replace(
        experiment,
        base=model(experiment.base),
        data=dataclasses.replace(experiment.data, train=train, replay=replay, **texts),  # type: ignore[arg-type]
        prepare=[fill(command) for command in experiment.prepare],
        arms=[
            dataclasses.replace(
                arm,
                calibration_data=resolve(arm.calibration_data),
                background_data=resolve(arm.background_data),
            )
            for arm in experiment.arms
        ],
    )
