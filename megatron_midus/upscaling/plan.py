"""UpscalePlan: the ordered blocks of an up-scaled model. Everything that must know what a block is reads it here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.errors import UserError
from megatron_midus.json_files import read_json_object

PLAN_FILE = "midus_plan.json"
# 2: exports name the value bank memory.value_bank; in those of 1 it is memory.values. Nothing else changed.
SCHEMA_VERSION = 2
# A plan whose base is a MIDUS model holds the plan of that one, which versions that read 2 do not know.
NESTED_SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, SCHEMA_VERSION, NESTED_SCHEMA_VERSION)
# Settings of Memory blocks about their start alone: those inserted later may have others.
STARTS = ("memory_key_init", "memory_query_scale")

BlockKind = Literal["keep", "copy", "blend", "memory"]
BlockInit = Literal["exact", "zero_output", "mean", "transport", "transport_literal", "memory"]

# What the tensors of a kind of block may be filled with.
INITS: dict[str, tuple[str, ...]] = {
    "keep": ("exact",),
    "copy": ("exact", "zero_output"),
    "blend": ("mean", "transport", "transport_literal"),
    "memory": ("memory", "exact"),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of the up-scaled decoder.

    Attributes:
        kind: ``keep`` = the base layer itself, ``copy`` = a copy of a base layer, ``blend`` = made from two base
            layers, ``memory`` = a Memory block: a new one, whose norm and attention are copied from a base layer, or one that
            the base has already.
        source: 0-based index of the base's block; two indices for ``blend``.
        init: how its tensors are filled: ``exact`` copy, ``zero_output`` (copy with attention and MLP output
            projections zeroed), ``mean`` of two layers, ``transport`` (mean after alignment by optimal transport, outputs
            zeroed; ``transport_literal`` as the paper's program scales it), ``memory`` (a new one).
        inserted: whether ``--train inserted`` trains the block: what was added to the base, the layers of the base
            that ``control`` chose, and its Memory blocks with ``--train-earlier-memory``.
    """

    kind: BlockKind
    source: tuple[int, ...]
    init: BlockInit
    inserted: bool

    @classmethod
    def keep(cls, source: int) -> Block:
        return cls("keep", (source,), "exact", False)

    @classmethod
    def control(cls, source: int) -> Block:
        return cls("keep", (source,), "exact", True)

    @classmethod
    def copy(cls, source: int, *, zero_output: bool = False) -> Block:
        return cls("copy", (source,), "zero_output" if zero_output else "exact", True)

    @classmethod
    def blend(cls, first: int, second: int, init: BlockInit = "mean") -> Block:
        return cls("blend", (first, second), init, True)

    @classmethod
    def memory(cls, source: int) -> Block:
        return cls("memory", (source,), "memory", True)

    @classmethod
    def keep_memory(cls, source: int, *, inserted: bool = False) -> Block:
        return cls("memory", (source,), "exact", inserted)

    @property
    def is_kept(self) -> bool:
        """Whether it is a block of the base itself, a Memory block of a MIDUS model included."""
        return self.kind == "keep" or (self.kind == "memory" and self.init == "exact")

    def learns(self, train: str) -> bool:
        """Whether ``--train all``, ``inserted`` or ``values`` changes any of its weights."""
        return train == "all" or (self.kind == "memory" if train == "values" else self.inserted)

    def describe(self) -> str:
        """``memory(3)``, ``keep(0)``, ``copy(5, zero_output)`` …"""
        source = ", ".join(map(str, self.source))
        how = "" if self.init == INITS[self.kind][0] else f", {self.init}"
        return f"{self.kind}({source}{how}{', trained' if self.is_kept and self.inserted else ''})"


@dataclasses.dataclass(frozen=True)
class UpscalePlan:
    """The blocks of an up-scaled model in order, and what its Memory blocks look like.

    Attributes:
        num_base_layers: layers of the base model.
        blocks: the blocks of the new model, first to last.
        memory: shape and variant of the Memory blocks; ``None`` when there is none.
        policy: name of the policy that made the plan.
        source_hash: SHA-256 over the weights of the source checkpoint, ``""`` when there was none.
        source_name: name of the source model, for the model card.
        seed: seed of the tensors that were newly initialised.
        notes: what the policy had to round, in words.
        base: the plan of the base, where that is a MIDUS model: its Memory blocks are kept, as ``memory`` filled ``exact``.
    """

    num_base_layers: int
    blocks: tuple[Block, ...]
    memory: MemoryConfig | None = None
    policy: str = "none"
    source_hash: str = ""
    source_name: str = ""
    seed: int = 0
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION
    base: UpscalePlan | None = None

    def __post_init__(self) -> None:
        for index, block in enumerate(self.blocks):
            wanted = 2 if block.kind == "blend" else 1
            if len(block.source) != wanted:
                raise UserError(f"block {index}: {block.kind} has {len(block.source)} sources, needs {wanted}")
            for source in block.source:
                if not 0 <= source < self.num_base_layers:
                    raise UserError(
                        f"block {index}: source layer {source} does not exist; the base has layers "
                        f"0 to {self.num_base_layers - 1}"
                    )
            if block.kind not in INITS:
                raise UserError(f"block {index}: unknown kind {block.kind!r}; choose one of {sorted(INITS)}")
            if block.init not in INITS[block.kind]:
                raise UserError(
                    f"block {index}: init {block.init!r} does not fit {block.kind}; choose one of {INITS[block.kind]}"
                )
        if self.memory_indices and self.memory is None:
            raise UserError(f"blocks {list(self.memory_indices)} are Memory blocks but the plan has no memory settings")
        self._check_base()

    def _check_base(self) -> None:
        """The blocks that are kept must be what they are in the base, and new memories of the shape of its own."""
        base = self.base_plan
        if base.num_layers != self.num_base_layers:
            raise UserError(
                f"the base has {base.num_layers} blocks in its own plan, and {self.num_base_layers} in this"
            )
        for index, block in enumerate(self.blocks):
            kind = base.block_types[block.source[0]]
            if block.is_kept and kind != self.block_types[index]:
                raise UserError(f"block {index}: {block.describe()} of a base whose block {block.source[0]} is {kind}")
        if self.memory is not None and base.memory is not None:
            for name, value in self.memory.to_dict().items():
                if name not in STARTS and value != getattr(base.memory, name):
                    raise UserError(f"{name} is {value}, and {getattr(base.memory, name)} in the base; they must agree")

    # -- what a model built from this plan looks like ------------------------------------------------------------
    @property
    def num_layers(self) -> int:
        """Blocks of the up-scaled model."""
        return len(self.blocks)

    @property
    def memory_indices(self) -> tuple[int, ...]:
        """0-based positions of the Memory blocks."""
        return tuple(i for i, block in enumerate(self.blocks) if block.kind == "memory")

    @property
    def inserted_indices(self) -> tuple[int, ...]:
        """0-based positions of the blocks that ``--train inserted`` trains."""
        return tuple(i for i, block in enumerate(self.blocks) if block.inserted)

    @property
    def kept_indices(self) -> tuple[int, ...]:
        """0-based positions of the blocks of the base."""
        return tuple(i for i, block in enumerate(self.blocks) if block.is_kept)

    @property
    def added_indices(self) -> tuple[int, ...]:
        """0-based positions of the blocks that the base does not have."""
        return tuple(i for i, block in enumerate(self.blocks) if not block.is_kept)

    @property
    def new_memory_indices(self) -> tuple[int, ...]:
        """0-based positions of the Memory blocks that the base does not have."""
        return tuple(i for i in self.added_indices if self.blocks[i].kind == "memory")

    @property
    def kept_memory_indices(self) -> tuple[int, ...]:
        """0-based positions of the Memory blocks that the base, a MIDUS model, has already."""
        return tuple(i for i in self.memory_indices if self.blocks[i].is_kept)

    @property
    def base_plan(self) -> UpscalePlan:
        """The base as it is: its own plan, or one that keeps all layers of an ordinary model."""
        if self.base is not None:
            return self.base
        # Of a plan whose blocks are the base's own it would be the plan of the plan of the plan …
        kept = tuple(Block.keep(layer) for layer in range(self.num_base_layers))
        return self if self.blocks == kept else UpscalePlan(num_base_layers=self.num_base_layers, blocks=kept)

    @property
    def contains_base(self) -> bool:
        """Whether the blocks that are kept are the base's, all of them and in their order."""
        return [self.blocks[i].source[0] for i in self.kept_indices] == list(range(self.num_base_layers))

    @property
    def is_identity(self) -> bool:
        """Whether the up-scaled model computes the base's function before any training."""
        added = [block for block in self.blocks if not block.is_kept]
        return self.contains_base and all(b.init not in ("exact", "mean") for b in added)

    def keeps_base(self, train: str) -> bool:
        """Whether ``--train`` leaves every weight of the base as it is, with the base still in the model."""
        if train == "lora":  # adapters stand beside the weights
            return self.contains_base
        return self.contains_base and not any(self.blocks[i].learns(train) for i in self.kept_indices)

    @property
    def block_types(self) -> tuple[str, ...]:
        """``"memory"`` or ``"transformer"`` per position."""
        return tuple("memory" if block.kind == "memory" else "transformer" for block in self.blocks)

    def applied_to(self, model: ModelConfig) -> ModelConfig:
        """The up-scaled model's architecture, from its base's: a block has what differs between layers from its first source."""
        if model.num_layers == self.num_layers:
            return model  # it is the up-scaled one, or has the base's layers
        is_uniform = model.rope_layers is None and model.sliding_layers is None
        if model.num_layers != self.num_base_layers and not is_uniform:
            raise UserError(f"the plan is for a base of {self.num_base_layers} layers, this one has {model.num_layers}")
        sources = [block.source[0] for block in self.blocks]
        return model.with_layers(sources)

    # -- comparison and storage ----------------------------------------------------------------------------------
    def difference(self, other: UpscalePlan) -> str | None:
        """The first thing in which two plans describe different models, in words; ``None`` if they agree."""
        if self.num_base_layers != other.num_base_layers:
            return f"base layers: {self.num_base_layers} against {other.num_base_layers}"
        if self.num_layers != other.num_layers:
            return f"blocks: {self.num_layers} against {other.num_layers}"
        for index, (mine, theirs) in enumerate(zip(self.blocks, other.blocks)):
            if mine != theirs:
                return f"block {index}: {mine.describe()} against {theirs.describe()}"
        mine_memory = self.memory.to_dict() if self.memory else {}
        their_memory = other.memory.to_dict() if other.memory else {}
        for name in sorted(set(mine_memory) | set(their_memory)):
            if mine_memory.get(name) != their_memory.get(name):
                return f"{name}: {mine_memory.get(name)} against {their_memory.get(name)}"
        if self.source_hash and other.source_hash and self.source_hash != other.source_hash:
            return f"source checkpoint: {self.source_hash[:12]} against {other.source_hash[:12]}"
        return None

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["base"]
        if self.base is not None:
            values |= {"schema_version": NESTED_SCHEMA_VERSION, "base": self.base.to_dict()}
        values["blocks"] = [{**block, "source": list(block["source"])} for block in values["blocks"]]
        values["notes"] = list(self.notes)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UpscalePlan:
        """Inverse of ``to_dict``; raises ``ValueError`` on another schema or on entries that do not fit."""
        if not isinstance(values, dict):
            raise UserError("the plan is no JSON object")
        version = values.get("schema_version")
        if version not in READABLE_VERSIONS:
            raise UserError(f"plan schema version {version} is not known; this version reads {READABLE_VERSIONS}")
        try:
            blocks = tuple(Block(**{**block, "source": tuple(block["source"])}) for block in values["blocks"])
            memory = MemoryConfig(**values["memory"]) if values.get("memory") else None
            base = cls.from_dict(values["base"]) if values.get("base") else None
            rest = {k: v for k, v in values.items() if k not in ("blocks", "memory", "notes", "schema_version", "base")}
            return cls(blocks=blocks, memory=memory, notes=tuple(values.get("notes", ())), base=base, **rest)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"the plan does not have the expected entries: {error}") from None

    def save(self, directory: str | Path) -> None:
        """Writes ``midus_plan.json`` into ``directory``."""
        (Path(directory) / PLAN_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_hf_config(cls, config: dict[str, Any], *, source_name: str = "") -> UpscalePlan:
        """The plan of a MIDUS export that has lost it, from what its ``config.json`` says.

        Every Transformer block counts as a layer of the base, whatever policy made it, and a Memory block is taken to be
        copied from the layer in front of it; what the base's weights were is not known.

        Args:
            config: with ``block_types`` and the fields of ``MemoryConfig``.
            source_name: name of the export, for the model card.

        Raises:
            ValueError: a configuration that describes no MIDUS model.
        """
        kinds = config.get("block_types")
        if not isinstance(kinds, list) or not set(kinds) <= {"memory", "transformer"}:
            raise UserError(
                f"config.json has block_types={kinds!r}; a MIDUS model names memory or transformer per block"
            )
        blocks: list[Block] = []
        for index, kind in enumerate(kinds):
            layer = kinds[:index].count("transformer")
            blocks.append(Block.keep(layer) if kind == "transformer" else Block.memory(max(0, layer - 1)))
        fields = {field.name for field in dataclasses.fields(MemoryConfig)}
        return cls(
            num_base_layers=kinds.count("transformer"),
            blocks=tuple(blocks),
            memory=MemoryConfig(**{name: value for name, value in config.items() if name in fields}),
            policy="interleave",
            source_name=source_name,
            notes=("read from block_types of config.json, because midus_plan.json was missing",),
        )

    @classmethod
    def load(cls, directory: str | Path) -> UpscalePlan:
        """Reads ``midus_plan.json`` from ``directory``; raises ``ValueError`` when it is missing or broken."""
        path = Path(directory) / PLAN_FILE
        try:
            content = read_json_object(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; every checkpoint of this project carries one") from None
        try:
            return cls.from_dict(content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
