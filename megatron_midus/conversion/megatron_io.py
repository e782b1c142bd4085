"""Canonical tensors <-> Megatron-Core's torch_dist checkpoints: names, fused layouts, and streaming on one process.

torch_dist is torch.distributed.checkpoint (DCP) plus ``metadata.json`` and ``common.pt``, which Megatron-Core 0.19 reads but
no longer writes. Both directions use DCP itself, one tensor at a time: no process group, no device, no model, and memory for
one tensor whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_midus.checkpoint.common_state import COMMON_FILE
from megatron_midus.checkpoint.damage import corruption_named
from megatron_midus.checkpoint.layout import AVERAGE_PREFIX
from megatron_midus.checkpoint.training_record import UNTRAINED, TrainingRecord
from megatron_midus.config import ModelConfig
from megatron_midus.config.memory import STORED_NAMES
from megatron_midus.conversion.streaming import in_parallel, read_finite
from megatron_midus.errors import UserError
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.parallel_sizes import check_tensor_parallel_size
from megatron_midus.upscaling.tensors import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT_LAYER,
    ROUTER,
    Shape,
    TensorSource,
    expert_name,
    layer_name,
    model_shapes,
    norm_names,
    split_name,
)

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_OUTER = {
    EMBEDDING: "embedding.word_embeddings.weight",
    FINAL_NORM: "decoder.final_layernorm.weight",
    OUTPUT_LAYER: "output_layer.weight",
}
_VOCABULARY_KEYS = (_OUTER[EMBEDDING], _OUTER[OUTPUT_LAYER])
# One row per tensor of a block: Megatron's name, and the canonical ones that it is made of.
_TRANSFORMER = {
    **{f"self_attention.linear_proj.{kind}": (f"self_attn.o_proj.{kind}",) for kind in ("weight", "bias")},
    **{f"mlp.linear_fc1.{kind}": (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}") for kind in ("weight", "bias")},
    **{f"mlp.linear_fc2.{kind}": (f"mlp.down_proj.{kind}",) for kind in ("weight", "bias")},
}
_NORMS = {
    "before_attention": "self_attention.linear_qkv.layer_norm_weight",
    "behind_attention": "post_self_attn_layernorm.weight",
    "before_mlp": "mlp.linear_fc1.layer_norm_weight",
    "behind_mlp": "post_mlp_layernorm.weight",
}
# In the place of the rows about the MLP; the experts of a block are stacked in one tensor, [E, rows, columns].
_ROUTER = {"mlp.router.weight": (ROUTER,)}
_EXPERTS = {
    "mlp.experts.experts.linear_fc1.weight": ("gate_proj", "up_proj"),
    "mlp.experts.experts.linear_fc2.weight": ("down_proj",),
}


def _is_stacked(key: str) -> bool:
    return ".mlp.experts.experts." in key


def _transformer_names(model: ModelConfig, norms: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    if model.num_moe_experts is None:
        return {**_TRANSFORMER, **norms}
    stacked = {
        key: tuple(expert_name(expert, part) for expert in range(model.num_moe_experts or 0) for part in parts)
        for key, parts in _EXPERTS.items()
    }
    # No backend fuses the norm before experts.
    before_mlp = _NORMS["before_mlp"]
    norms = {"pre_mlp_layernorm.weight" if key == before_mlp else key: names for key, names in norms.items()}
    return {**{k: v for k, v in _TRANSFORMER.items() if not k.startswith("mlp.")}, **norms, **_ROUTER, **stacked}


def _attention_names(prefix: str) -> dict[str, tuple[str, ...]]:
    return {
        **{
            f"self_attention.linear_qkv.{kind}": tuple(f"{prefix}.{letter}_proj.{kind}" for letter in "qkv")
            for kind in ("weight", "bias")
        },
        **{f"self_attention.{letter}_layernorm.weight": (f"{prefix}.{letter}_norm.weight",) for letter in "qk"},
    }


def megatron_layout(model: ModelConfig, plan: UpscalePlan) -> dict[str, tuple[str, ...]]:
    """``{Megatron checkpoint key: canonical names that it holds}`` for every tensor of the up-scaled model."""
    shapes = model_shapes(model, plan)
    layout = {key: (name,) for name, key in _OUTER.items() if name in shapes}
    norms = {_NORMS[place]: (name,) for place, name in norm_names(model).items() if name is not None}
    for index, block in enumerate(plan.blocks):
        prefix = f"decoder.layers.{index}."
        if block.kind == "memory":
            assert plan.memory is not None
            rows = {
                **{key: names for key, names in norms.items() if "mlp" not in key},
                **_attention_names("mem_attn"),
                **_memory_names(shapes, index),
            }
        else:
            rows = {**_transformer_names(model, norms), **_attention_names("self_attn")}
        for key, suffixes in rows.items():
            names = tuple(layer_name(index, suffix) for suffix in suffixes)
            if names[0] in shapes:  # biases and head norms: only where the family has them
                layout[prefix + key] = names
    assert sorted(name for names in layout.values() for name in names) == sorted(shapes), "a tensor has no Megatron key"
    return layout


def _memory_names(shapes: dict[str, Shape], index: int) -> dict[str, tuple[str, ...]]:
    suffixes = [suffix for layer, suffix in map(split_name, shapes) if layer == index and suffix.startswith("memory.")]
    names = {suffix: suffix.removeprefix("memory.") for suffix in suffixes}
    return {f"self_attention.linear_proj.{STORED_NAMES.get(name, name)}": (suffix,) for suffix, name in names.items()}


# -- layouts ---------------------------------------------------------------------------------------------------------
def pieces(key: str, names: tuple[str, ...], model: ModelConfig) -> list[tuple[str, ...]]:
    """The canonical names of one Megatron tensor, by what is read and written at a time: of stacked experts each alone."""
    if not _is_stacked(key):
        return [names]
    size = len(names) // (model.num_moe_experts or 1)
    return [names[first : first + size] for first in range(0, len(names), size)]


def fused_shape(key: str, names: tuple[str, ...], shape: Callable[[str], Shape], model: ModelConfig) -> Shape:
    """The shape of one Megatron tensor, from those of the canonical ones that it holds."""
    held = pieces(key, names, model)
    piece = (sum(shape(name)[0] for name in held[0]), *shape(names[0])[1:])
    return (len(held), *piece) if _is_stacked(key) else piece


def fuse(parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Joins canonical tensors into Megatron's one: ``[gate; up]``, or query, key and value rows per KV group.

    Args:
        parts: one tensor (handed back), two ``[ffn, h]``, or three ``[H*D, h]``, ``[G*D, h]``, ``[G*D, h]`` (biases
            without the last axis).

    Returns:
        ``[2*ffn, h]``; ``[(H+2G)*D, h]`` with the rows ``[q .. q, k, v]`` of group 0, then those of group 1 …
    """
    if len(parts) != 3:
        return torch.cat(list(parts)) if len(parts) == 2 else parts[0]
    groups = model.num_query_groups
    grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]  # [G, rows, h]
    return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])


def split(fused: torch.Tensor, num_parts: int, model: ModelConfig) -> list[torch.Tensor]:
    """Inverse of ``fuse``: ``num_parts`` contiguous tensors."""
    if num_parts != 3:
        return [part.contiguous() for part in fused.chunk(num_parts)]
    groups = model.num_query_groups
    heads_per_group = model.num_attention_heads // groups
    sizes = [size * model.kv_channels for size in (heads_per_group, 1, 1)]
    grouped = fused.reshape(groups, sum(sizes), *fused.shape[1:])  # [G, (H/G + 2)*D, h]
    return [part.reshape(-1, *fused.shape[1:]).contiguous() for part in grouped.split(sizes, dim=1)]


def check_parallel_sizes(
    model: ModelConfig, plan: UpscalePlan, *, tensor_parallel_size: int, pipeline_parallel_size: int
) -> None:
    """Raises ``ValueError`` when the up-scaled model cannot be split over so many ranks."""
    if tensor_parallel_size < 1 or pipeline_parallel_size < 1:
        raise UserError(f"parallel sizes must be at least 1, not {tensor_parallel_size} and {pipeline_parallel_size}")
    check_tensor_parallel_size(model, plan, tensor_parallel_size, name="target_tensor_parallel_size")
    if plan.num_layers % pipeline_parallel_size:
        choices = [n for n in range(1, plan.num_layers + 1) if plan.num_layers % n == 0]
        raise UserError(
            f"{plan.num_layers} layers are not divisible by target_pipeline_parallel_size={pipeline_parallel_size}; "
            f"choose one of {choices}"
        )


# -- writing ---------------------------------------------------------------------------------------------------------
class _LazySavePlanner(DefaultSavePlanner):
    """Plans with empty tensors and makes each one, of stacked experts each one's part, when it is written."""

    def __init__(self, make: Callable[[str, int], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._make = make

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [part for item in plan.items for part in (_by_expert(item) if _is_stacked(item.index.fqn) else [item])]
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._make(index.fqn, index.offset[0] if index.offset else 0)


def _by_expert(item: WriteItem) -> list[WriteItem]:
    """The request to write stacked experts as one request for each of them."""
    assert item.tensor_data is not None
    experts, *rest = item.tensor_data.size
    items = []
    for expert in range(experts):
        offsets, sizes = torch.Size((expert, *(0 for _ in rest))), torch.Size((1, *rest))
        data = dataclasses.replace(item.tensor_data, chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes))
        items.append(WriteItem(MetadataIndex(item.index.fqn, offsets), WriteItemType.SHARD, tensor_data=data))
    return items


class _ParallelWriter(dcp.FileSystemWriter):
    """Several threads write, one file per tensor.

    DCP's own ``thread_count`` loses what its threads raise and leaves their tensors out of the checkpoint.
    """

    def __init__(self, directory: Path, workers: int) -> None:
        super().__init__(directory, single_file_per_rank=True)
        self._workers = workers

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        parts = []
        for number, (_, items) in enumerate(itertools.groupby(plan.items, lambda item: item.index.fqn)):
            names = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            parts.append(dataclasses.replace(plan, items=list(items), storage_data=names))
        written: Future[list[WriteResult]] = Future()
        write = super().write_data
        results = in_parallel(lambda part: write(part, planner).wait(), parts, self._workers)
        written.set_result([result for part in results for result in part])
        return written


def write_model_tensors(
    source: TensorSource,
    directory: str | Path,
    model: ModelConfig,
    plan: UpscalePlan,
    *,
    padded_vocab: int | None = None,
    training: TrainingRecord = UNTRAINED,
    workers: int = 1,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes a torch_dist checkpoint that holds the model alone into the existing, empty ``directory``.

    Args:
        source: every canonical tensor of the up-scaled model.
        model: its architecture.
        plan: its blocks.
        padded_vocab: rows of the embedding and output layer in the checkpoint; the rows beyond ``vocab_size`` are zero.
        training: recorded in ``common.pt``.
        workers: tensors that are written at a time.
        progress: called with each canonical name when it is read.

    Raises:
        ValueError: a tensor with NaN or infinities, or dtypes that differ in one fused tensor.
    """
    directory = Path(directory)
    layout = megatron_layout(model, plan)
    lock = threading.Lock()

    def make(key: str, number: int) -> torch.Tensor:
        names = pieces(key, layout[key], model)[number]
        parts = [read_finite(source, name) for name in names]
        with lock:
            for name in names:
                progress(name)
        tensor = fuse(parts, model).contiguous()
        if _is_stacked(key):
            return tensor[None]
        return _pad_rows(tensor, padded_vocab) if key in _VOCABULARY_KEYS else tensor

    outline = {key: _outline(source, key, names, model, padded_vocab) for key, names in layout.items()}
    try:
        with _quiet_dcp():
            dcp.save(outline, storage_writer=_ParallelWriter(directory, workers), planner=_LazySavePlanner(make))
    except CheckpointException as error:
        # It is no Exception and hides what happened: a full disk, a source that cannot be read.
        raise _cause(next(iter(error.failures.values()))[0]) from None
    torch.save(training.common_state(), directory / COMMON_FILE)
    # Last: a directory without metadata.json is no checkpoint to Megatron-Core.
    (directory / "metadata.json").write_text(json.dumps(FORMAT))


def _cause(error: BaseException) -> BaseException:
    """What began it: on a full disk torch.save ends with a RuntimeError about positions, raised over the OSError."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return link or error


def _outline(
    source: TensorSource, key: str, names: tuple[str, ...], model: ModelConfig, padded_vocab: int | None
) -> torch.Tensor:
    """A tensor without data that has the shape and dtype of Megatron's tensor ``key``."""
    dtypes = {source.dtype(name) for name in names}
    if len(dtypes) > 1:
        shown = f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        raise UserError(f"{shown} have different dtypes and become one tensor; choose one with --dtype")
    shape = fused_shape(key, names, source.shape, model)
    if key in _VOCABULARY_KEYS and padded_vocab:
        shape = (padded_vocab, *shape[1:])
    return torch.empty(shape, dtype=dtypes.pop(), device="meta")


def _pad_rows(tensor: torch.Tensor, rows: int | None) -> torch.Tensor:
    if rows is None or rows == tensor.shape[0]:
        return tensor
    assert rows > tensor.shape[0], (rows, tensor.shape)
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


# -- reading ---------------------------------------------------------------------------------------------------------
class MegatronReader:
    """The canonical tensors of one ``iter_*`` directory, whatever parallel sizes it was saved with.

    Only tensors of the model are read; optimizer, scheduler and random states are left alone. Padding rows of the
    vocabulary are cut off. Several threads may read.

    Args:
        averaged: read the averages of weights (``--ema-decay``); what did not learn has none and is read as it is.

    Raises:
        ValueError: not a torch_dist checkpoint, a missing or truncated file, tensors that do not match the plan, or no average
            where one is wanted.
    """

    def __init__(self, directory: str | Path, model: ModelConfig, plan: UpscalePlan, *, averaged: bool = False) -> None:
        self.directory = Path(directory)
        self._model = model
        self._shapes = model_shapes(model, plan)
        self._layout = megatron_layout(model, plan)
        self._pieces = {key: pieces(key, names, model) for key, names in self._layout.items()}
        self._place_of = {
            name: (key, number)
            for key, held in self._pieces.items()
            for number, names in enumerate(held)
            for name in names
        }
        self._reader, self._metadata, self._stored = _read_metadata(self.directory)
        self._averages = {key for key in self._layout if averaged and AVERAGE_PREFIX + key in self._stored}
        if averaged and not self._averages:
            raise UserError(
                f"{self.directory} holds no average of weights; train with --ema-decay, or convert the weights themselves"
            )
        self._check()
        self._last = threading.local()

    def _check(self) -> None:
        for key, names in self._layout.items():
            if key not in self._stored:
                raise UserError(
                    f"{self.directory} has no tensor {key}; its midus_plan.json does not describe this checkpoint"
                )
            wanted = fused_shape(key, names, self.shape, self._model)
            found = tuple(self._stored[key].size)
            rows_fit = found[0] >= wanted[0] if key in _VOCABULARY_KEYS else found[0] == wanted[0]
            if not rows_fit or found[1:] != wanted[1:]:
                raise UserError(
                    f"{self.directory}: tensor {key} has shape {list(found)}, model_config.json and midus_plan.json "
                    f"ask for {list(wanted)}"
                )
        extra = sorted(
            key
            for key in self._stored
            if re.match(r"(decoder|embedding|output_layer)\.", key) and key not in self._layout
        )
        if extra:
            raise UserError(
                f"{self.directory} has tensors that its midus_plan.json does not know: {', '.join(extra[:3])}"
            )

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[self._stored_key(self._place_of[name][0])].properties.dtype

    def _stored_key(self, key: str) -> str:
        return AVERAGE_PREFIX + key if key in self._averages else key

    def read(self, name: str) -> torch.Tensor:
        place = self._place_of[name]
        if getattr(self._last, "place", None) != place:
            # Query, key and value are asked for one after the other and lie in one tensor.
            self._last.place = self._last.parts = None  # gone before the next one comes
            self._last.parts, self._last.place = self._read_piece(*place), place
        key, number = place
        return self._last.parts[self._pieces[key][number].index(name)]

    def _read_piece(self, key: str, number: int) -> list[torch.Tensor]:
        stored_key = self._stored_key(key)
        stored = self._stored[stored_key]
        first, size = torch.Size([0] * len(stored.size)), stored.size
        if _is_stacked(key):
            first, size = torch.Size((number, *first[1:])), torch.Size((1, *size[1:]))
        tensor = torch.empty(size, dtype=stored.properties.dtype)
        # What dcp.load does after it has read the metadata again and warned that there is no process group.
        planner = _PartPlanner(stored_key, stored, first, tensor)
        with corruption_named(self.directory):
            planner.set_up_planner({stored_key: tensor}, self._metadata, is_coordinator=True)
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        if _is_stacked(key):
            tensor = tensor[0]
        if key in _VOCABULARY_KEYS:
            tensor = tensor[: self._model.vocab_size]
        return split(tensor, len(self._pieces[key][number]), self._model)


class _PartPlanner(DefaultLoadPlanner):
    """Reads the part of a stored tensor that begins at ``first`` and is as large as ``target``, however it was cut."""

    def __init__(self, key: str, stored: TensorStorageMetadata, first: torch.Size, target: torch.Tensor) -> None:
        super().__init__()
        self._part = (key, stored, first)
        self._target = target

    def create_local_plan(self) -> LoadPlan:
        key, stored, first = self._part
        chunk = ChunkStorageMetadata(offsets=first, sizes=self._target.shape)
        return LoadPlan(create_read_items_for_chunk_list(key, stored, [chunk]))

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._target


def _read_metadata(directory: Path) -> tuple[dcp.FileSystemReader, Metadata, dict[str, TensorStorageMetadata]]:
    """The DCP reader of a checkpoint, its metadata and that of its tensors, after the cheap checks for wholeness."""
    if not (directory / "metadata.json").is_file() or not (directory / ".metadata").is_file():
        raise UserError(f"{directory} is not a whole torch_dist checkpoint: metadata.json or .metadata is missing")
    reader = dcp.FileSystemReader(directory)
    with corruption_named(directory):
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, True)
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    for file_name, end in ends.items():
        path = directory / file_name
        if not path.is_file():
            raise UserError(f"{path} is missing; the checkpoint is not whole")
        if path.stat().st_size < end:
            raise UserError(f"{path} is truncated: {path.stat().st_size} bytes of at least {end}")
    return reader, metadata, tensors


@contextlib.contextmanager
def _quiet_dcp() -> Iterator[None]:
    """DCP warns that there is no process group; there is none on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable|unin).*")
        warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
        yield
