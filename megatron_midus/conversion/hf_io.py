"""safetensors directories: a lazy reader that refuses what is broken before any work, and a streaming, sharded writer."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_midus.config import ModelConfig
from megatron_midus.config.memory import STORED_NAMES
from megatron_midus.conversion.families import FAMILIES
from megatron_midus.conversion.stored import Rule, StoredTensors, places
from megatron_midus.conversion.streaming import in_parallel, num_bytes, read_finite, tensor_bytes
from megatron_midus.errors import UserError
from megatron_midus.json_files import read_json_object
from megatron_midus.upscaling.tensors import EMBEDDING, OUTPUT_LAYER, Shape, TensorSource, split_name
from megatron_midus.weight_files import INDEX_FILE, WEIGHTS_FILE, find_weight_files

CONFIG_FILE = "config.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
# What quantisers store beside weights or instead of them: GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8, HQQ, quanto.
_QUANTISED = re.compile(
    r".*\.(qweight|qzeros|g_idx|scales|(weight|input|output|k|v)_(scale(_inv)?|zero_point|global_scale|shape|packed|g_idx)"
    r"|weight_(scale_2|format)|SCB|absmax|quant_map|weight\.(absmax|quant_map|nested_\w+|quant_state\..*)|(weight\.)?_(data|scale|shift)"
    r"|W_q|tensor_data\..*|\w+_(blocks|scales))"
)
_REMEDY = "take the model that was quantised, or write its weights in full precision (model.dequantize(), model.save_pretrained(DIR))"
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Written by transformers before 4.32; computed since.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face directory; ``ValueError`` when there is none or it is no JSON object."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"model directory {directory} does not exist; give a local Hugging Face directory")
    path = directory / CONFIG_FILE
    if not path.is_file():
        hint = "; it looks like a Megatron checkpoint" if any(directory.glob("iter_*")) else ""
        raise UserError(f"{path} does not exist, so {directory} is no Hugging Face model{hint}")
    return read_json_object(path)


def parse_size(text: str) -> int:
    """``"5GB"`` -> 5000000000 bytes; units KB, MB, GB (powers of ten) and KiB, MiB, GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match.group(2).upper() not in _UNITS or float(match.group(1)) <= 0:
        raise UserError(f"size {text!r} is not understood; write for instance 500MB, 5GB or 2GiB")
    return max(1, int(float(match.group(1)) * _UNITS[match.group(2).upper()]))


class SafetensorsReader:
    """The tensors of a Hugging Face directory, one or many files, read when they are asked for, by any thread.

    Args:
        directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and its shards; of several the one
            that transformers takes.

    Raises:
        ValueError: no weights, ``.bin`` weights alone, a missing, truncated or corrupt file, a tensor that the index
            names and no file holds, or that two files hold.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._where: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        self._specs: dict[str, tuple[Shape, torch.dtype]] = {}
        files = find_weight_files(self.directory)
        if not files.names:
            raise self._missing()
        for file_name in files.names:
            self._open(file_name)
        for name, file_name in files.placed.items():
            if self._where.get(name) != file_name:
                raise UserError(f"tensor {name} is missing: {files.index} places it in {file_name}, which lacks it")
        self._rename_old()

    def _missing(self) -> UserError:
        """Why there is nothing to read."""
        shards = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if shards:
            return UserError(
                f"{self.directory} holds {', '.join(shards[:3])} but no {INDEX_FILE} and no {WEIGHTS_FILE}; "
                "fetch the missing file"
            )
        if list(self.directory.glob("*.bin")) or list(self.directory.glob("*.pth")):
            return UserError(
                f"{self.directory} has PyTorch .bin weights alone; convert them with "
                "model.save_pretrained(DIR, safe_serialization=True)"
            )
        return UserError(f"{self.directory} holds no weights ({WEIGHTS_FILE})")

    def _open(self, file_name: str) -> None:
        path = self.directory / file_name
        start, header = _read_header(path)
        for name, entry in header.items():
            if name in self._where:
                raise UserError(f"tensor {name} is in {self._where[name]} and in {file_name}; remove one of them")
            if entry["dtype"] not in _DTYPES:
                raise UserError(
                    f"tensor {name} in {path} has dtype {entry['dtype']}; only {', '.join(_DTYPES)} can be converted. "
                    f"Quantised weights cannot: {_REMEDY}"
                )
            self._where[name] = file_name
            self._offsets[name] = start + entry["data_offsets"][0]
            self._specs[name] = (tuple(entry["shape"]), _DTYPES[entry["dtype"]])

    def _rename_old(self) -> None:
        """Names of exports of plan schema 1 become those of today."""
        for new, old in STORED_NAMES.items():
            for name in [name for name in self._specs if split_name(name)[1] == f"memory.{old}"]:
                for table in (self._where, self._offsets, self._specs):
                    table[name.removesuffix(old) + new] = table.pop(name)

    def rename(self, expected: dict[str, Shape], rules: Sequence[Rule]) -> None:
        """Tensors that hold canonical ones of ``expected``, as ``rules`` say or as experts are fused, become those."""
        for stored, parts in places({name: self.shape(name) for name in self.names()}, expected, rules).items():
            file_name, start, (_, dtype) = self._where.pop(stored), self._offsets.pop(stored), self._specs.pop(stored)
            for name, first in parts:
                if name in self._specs:
                    raise UserError(
                        f"{self.directory}: {stored} holds {name}, which is there as well; remove one of them"
                    )
                self._where[name] = file_name
                self._offsets[name] = start + first * dtype.itemsize
                self._specs[name] = (expected[name], dtype)

    def drop(self, name: str) -> None:
        """Forgets a tensor that is in the files and is not wanted."""
        del self._specs[name], self._where[name], self._offsets[name]

    def names(self) -> Sequence[str]:
        return list(self._specs)

    def shape(self, name: str) -> Shape:
        return self._specs[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._specs[name][1]

    def read(self, name: str) -> torch.Tensor:
        """A fresh tensor. Read, not mapped: pages of a mapped file stay in memory as long as the file is open."""
        shape, dtype = self._specs[name]
        tensor = torch.empty(shape, dtype=dtype)
        path = self.directory / self._where[name]
        with open(path, "rb", buffering=0) as stream:
            stream.seek(self._offsets[name])
            left = tensor_bytes(tensor)
            while left:
                count = stream.readinto(left)
                if not count:
                    raise UserError(f"{path} ends before tensor {name} does; it changed while it was read")
                left = left[count:]
        return tensor


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and ``{name: {dtype, shape, data_offsets}}``."""
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass  # the library's own checks: names, offsets without holes, the size of the file
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is corrupt or truncated ({error}); fetch it again") from None
    header.pop("__metadata__", None)
    return 8 + length, header


def open_hf_weights(directory: str | Path, model: ModelConfig, expected: dict[str, Shape]) -> SafetensorsReader:
    """A reader whose tensors are those that ``expected`` names, no more, no fewer, with those shapes.

    A ``lm_head.weight`` beside a tied embedding is accepted when it equals the embedding.
    """
    reader = SafetensorsReader(directory)
    reader.rename(expected, FAMILIES[model.family].stored)
    for name in filter(_IGNORED.fullmatch, reader.names()):
        reader.drop(name)
    if model.tie_word_embeddings and OUTPUT_LAYER in reader.names():
        _check_tied(reader)
        reader.drop(OUTPUT_LAYER)
    quantised = [name for name in reader.names() if name not in expected and _QUANTISED.fullmatch(name)]
    if quantised:
        raise UserError(f"{directory} holds quantised weights ({quantised[0]}), which cannot be converted: {_REMEDY}")
    check_tensors(str(directory), {name: reader.shape(name) for name in reader.names()}, expected)
    return reader


def _check_tied(reader: SafetensorsReader) -> None:
    if EMBEDDING in reader.names() and not torch.equal(reader.read(OUTPUT_LAYER), reader.read(EMBEDDING)):
        raise UserError(
            f"{OUTPUT_LAYER} differs from {EMBEDDING} although config.json says tie_word_embeddings=true; "
            "set it to false or drop the tensor"
        )


def check_tensors(where: str, found: dict[str, Shape], expected: dict[str, Shape]) -> None:
    """Raises ``ValueError`` naming the first few tensors that are missing, unexpected or of another shape."""
    missing = [name for name in expected if name not in found]
    unexpected = sorted(name for name in found if name not in expected)
    for word, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{where}: {word} tensors {', '.join(names[:3])}{more}; config and weights do not match")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise UserError(f"{where}: tensor {name} has shape {list(found[name])}, its config asks for {list(shape)}")


def source_hash(
    source: TensorSource,
    names: Sequence[str],
    progress: Callable[[str], None] = lambda name: None,
    *,
    workers: int = 1,
) -> str:
    """SHA-256 over the names in sorted order and, for each, the SHA-256 of its dtype, shape and bytes.

    The same however the tensors are sharded, and whatever the number of ``workers``.
    """

    def digest(name: str) -> tuple[str, str]:
        tensor = source.read(name)
        inner = hashlib.sha256(f"{dtype_name(tensor.dtype)}\0{list(tensor.shape)}\0".encode())
        inner.update(tensor_bytes(tensor))
        return name, inner.hexdigest()

    digests = {}
    for name, found in in_parallel(digest, names, workers):
        digests[name] = found
        progress(name)
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]}\n".encode())
    return whole.hexdigest()


def plan_shards(source: TensorSource, max_shard_size: int) -> list[list[str]]:
    """Names per file: in order, a new file where the next tensor would pass ``max_shard_size`` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in source.names():
        size = num_bytes(source, name)
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def check_free_space(source: TensorSource, directory: str | Path) -> None:
    """Raises ``ValueError`` when the tensors of ``source`` do not fit on the disk of ``directory``."""
    needed = sum(num_bytes(source, name) for name in source.names())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{directory} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left; free some space"
        )


def write_safetensors(
    source: TensorSource,
    directory: str | Path,
    *,
    rules: Sequence[Rule] = (),
    max_shard_size: int = 5 * 10**9,
    workers: int = 1,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes every tensor of ``source`` as transformers does: one file, or shards of at most ``max_shard_size`` bytes
    and their index. One tensor per worker is held in memory, whatever the size of a shard.

    Args:
        rules: under which names, and which of them as one.

    Raises:
        ValueError: a tensor with NaN or infinities.
    """
    directory = Path(directory)
    stored = StoredTensors(source, rules)
    shards = plan_shards(stored, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file_name = WEIGHTS_FILE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(source, stored, directory / file_name, names, workers, progress)
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        total = sum(num_bytes(source, name) for name in source.names())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(
    source: TensorSource,
    stored: StoredTensors,
    path: Path,
    names: Sequence[str],
    workers: int,
    progress: Callable[[str], None],
) -> None:
    """Header first, then every canonical tensor at the place that the header gave the one that holds it."""
    header, starts, size = _shard_header(stored, names)
    offsets: dict[str, int] = {}
    for name in names:
        end = starts[name]
        for part in stored.layout[name].parts:
            offsets[part], end = end, end + num_bytes(source, part)
    with contextlib.closing(_OpenFile(path)) as file:
        file.write_at(0, header)
        os.truncate(path, size)

        def write(layer: list[str]) -> list[str]:
            for name in layer:
                file.write_at(offsets[name], tensor_bytes(read_finite(source, name)))
            return layer

        # A layer is one task: what lies together in the source is asked for by one thread, one after the other.
        layers = [list(group) for _, group in itertools.groupby(offsets, lambda name: split_name(name)[0])]
        for done in in_parallel(write, layers, workers):
            for name in done:
                progress(name)


def _shard_header(source: TensorSource, names: Sequence[str]) -> tuple[bytes, dict[str, int], int]:
    """Header of a safetensors file, where in the file each tensor begins, and the size of the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide dtypes first, so that every tensor is aligned to its own.
    for name in sorted(names, key=lambda name: -source.dtype(name).itemsize):
        begin, end = end, end + num_bytes(source, name)
        dtype = _DTYPE_NAMES[source.dtype(name)]
        entries[name] = {"dtype": dtype, "shape": list(source.shape(name)), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + entries[name]["data_offsets"][0] for name in names}
    return len(text).to_bytes(8, "little") + text, offsets, start + end


class _OpenFile:
    """A new file that several threads write into, each at its own place."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            # One call writes 2 GiB at most.
            count = os.pwrite(self._descriptor, left, offset)
            left, offset = left[count:], offset + count

    def close(self) -> None:
        os.close(self._descriptor)


class CastTensors:
    """A ``TensorSource`` that hands out the tensors of another in one dtype."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> Shape:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name).to(self._dtype)
