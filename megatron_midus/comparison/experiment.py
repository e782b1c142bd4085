"""Experiment: what an experiment file says, checked; every field is a key of the file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_midus.config.parser import not_one_of
from megatron_midus.config.run_file import read_yaml
from megatron_midus.config.schema import build, check_keys
from megatron_midus.errors import UserError
from megatron_midus.hub import cached_model
from megatron_midus.upscaling import POLICIES
from megatron_midus.upscaling.policies import POLICY_ALIASES, canonical_policy

REPOSITORY = Path(__file__).parents[2]
PLACEHOLDERS = ("{output}", "{repository}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


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
    valid: str | None = None
    """Text of the loss curves and of the choice among learning rates; the held-out text of the new domain when absent."""
    json_key: str = "text"
    """Key of the text in the JSON lines of the held-out files."""

    def __post_init__(self) -> None:
        if not self.train:
            raise UserError("train is empty; name at least one text or dataset")
        if len({source.weight is None for source in self.train}) > 1:
            raise UserError("train: some sources have a weight and some have none; give all or none")


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
    train: Literal["inserted", "all", "none"] = "inserted"
    """What learns; none = the model is evaluated as up-scaling leaves it."""
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of Memory blocks: the flags of midus upscale without --memory-."""
    calibration_data: str | None = None
    """Text for key_init: calibrated."""
    calibration_tokens: int = 8192
    """Tokens of it."""
    lr: list[float] | None = None
    """Largest learning rate; several = the best on the first seed is used for all; that of the experiment when absent."""
    driver: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Flags of midus pretrain for this arm only."""

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
        if (self.calibration_data is not None) != (self.memory.get("key_init") == "calibrated"):
            raise UserError("calibration_data and memory: {key_init: calibrated} need each other; give both or neither")
        if self.lr is not None:
            _check_rates(self.lr)


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
        if self.reference is not None and self.reference not in names:
            check_keys([self.reference], names, "reference")

    def rates(self, arm: Arm) -> list[float]:
        """Learning rates that ``arm`` tries; none when it does not train."""
        return [] if arm.train == "none" else arm.lr or self.lr

    @property
    def reference_name(self) -> str:
        """The arm that differences are taken to."""
        trained = [arm.name for arm in self.arms if arm.train != "none"]
        return self.reference or (trained or [self.arms[0].name])[0]

    def select(self, arms: list[str] | None, seeds: list[int] | None) -> Experiment:
        """Only some arms and seeds of it; raises ``ValueError`` for one that it has not."""
        names = [arm.name for arm in self.arms]
        if arms is not None:
            check_keys(arms, names, "--arms")
        unknown = set(seeds or ()) - set(self.seeds)
        if unknown:
            raise UserError(f"--seeds: {min(unknown)} is not one of {', '.join(map(str, self.seeds))}")
        kept = [arm for arm in self.arms if arms is None or arm.name in arms]
        reference = self.reference if self.reference in {arm.name for arm in kept} else None
        chosen = [seed for seed in self.seeds if seeds is None or seed in seeds]
        return dataclasses.replace(self, arms=kept, seeds=chosen, reference=reference)


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
        values["arms"] = [with_defaults(arm, defaults) for arm in values["arms"]]
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
    merged = {**usable, **arm}
    for name in ("memory", "driver"):
        if isinstance(usable.get(name), dict) and isinstance(arm.get(name), dict):
            merged[name] = {**usable[name], **arm[name]}
    return merged


def _resolve_paths(experiment: Experiment, home: Path, output: Path) -> Experiment:
    def fill(text: str) -> str:
        return text.replace("{output}", str(output)).replace("{repository}", str(REPOSITORY))

    def model(text: str) -> str:
        here = str(resolve(text))
        return here if Path(here).exists() else cached_model(text) or here

    def resolve(text: str | None) -> str | None:
        return None if text is None else str((home / fill(text)).resolve())

    train = [
        dataclasses.replace(source, text=resolve(source.text), dataset=resolve(source.dataset))
        for source in experiment.data.train
    ]
    texts = {name: resolve(getattr(experiment.data, name)) for name in ("new", "old", "valid")}
    return dataclasses.replace(
        experiment,
        base=model(experiment.base),
        data=dataclasses.replace(experiment.data, train=train, **texts),  # type: ignore[arg-type]
        prepare=[fill(command) for command in experiment.prepare],
        arms=[dataclasses.replace(arm, calibration_data=resolve(arm.calibration_data)) for arm in experiment.arms],
    )
