"""safetensors directories: a lazy reader that refuses what is broken before any work, and a sharded writer."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_midus.config import ModelConfig
from megatron_midus.upscaling.tensors import EMBEDDING, OUTPUT_LAYER, Shape, TensorSource

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
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
        raise ValueError(f"model directory {directory} does not exist; give a local Hugging Face directory")
    path = directory / CONFIG_FILE
    if not path.is_file():
        hint = "; it looks like a Megatron checkpoint" if any(directory.glob("iter_*")) else ""
        raise ValueError(f"{path} does not exist, so {directory} is no Hugging Face model{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    return config


def parse_size(text: str) -> int:
    """``"5GB"`` -> 5000000000 bytes; units KB, MB, GB (powers of ten) and KiB, MiB, GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match.group(2).upper() not in _UNITS or float(match.group(1)) <= 0:
        raise ValueError(f"size {text!r} is not understood; write for instance 500MB, 5GB or 2GiB")
    return max(1, int(float(match.group(1)) * _UNITS[match.group(2).upper()]))


class SafetensorsReader:
    """The tensors of a Hugging Face directory, one or many files, read from the mapped file when asked for.

    Args:
        directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.

    Raises:
        ValueError: no weights, ``.bin`` weights alone, a missing, truncated or corrupt file, a tensor that the index
            names and no file holds, or that two files hold.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        self._specs: dict[str, tuple[Shape, torch.dtype]] = {}
        for file_name in self._weight_files():
            self._open(file_name)
        self._check_index()

    def _weight_files(self) -> list[str]:
        index = self.directory / INDEX_FILE
        if index.is_file():
            return sorted(set(_weight_map(index).values()))
        if (self.directory / WEIGHTS_FILE).is_file():
            return [WEIGHTS_FILE]
        shards = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if shards:
            raise ValueError(
                f"{self.directory} holds {', '.join(shards[:3])} but no {INDEX_FILE} and no {WEIGHTS_FILE}; "
                "fetch the missing file"
            )
        if list(self.directory.glob("*.bin")) or list(self.directory.glob("*.pth")):
            raise ValueError(
                f"{self.directory} has PyTorch .bin weights alone; convert them with "
                "model.save_pretrained(DIR, safe_serialization=True)"
            )
        raise ValueError(f"{self.directory} holds no weights ({WEIGHTS_FILE})")

    def _open(self, file_name: str) -> None:
        path = self.directory / file_name
        if not path.is_file():
            raise ValueError(f"{path} is named by {INDEX_FILE} and does not exist; fetch the missing shard")
        try:
            handle = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is corrupt or truncated ({error}); fetch it again") from None
        self._files[file_name] = handle
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            if name in self._where:
                raise ValueError(f"tensor {name} is in {self._where[name]} and in {file_name}; one must go")
            view = handle.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"tensor {name} in {path} has dtype {view.get_dtype()}; only {', '.join(_DTYPES)} can be converted"
                )
            self._where[name] = file_name
            self._specs[name] = (tuple(view.get_shape()), _DTYPES[view.get_dtype()])

    def _check_index(self) -> None:
        index = self.directory / INDEX_FILE
        if not index.is_file():
            return
        for name, file_name in _weight_map(index).items():
            if self._where.get(name) != file_name:
                raise ValueError(f"tensor {name} is missing: {INDEX_FILE} places it in {file_name}, which lacks it")

    def drop(self, name: str) -> None:
        """Forgets a tensor that is in the files and is not wanted."""
        del self._specs[name], self._where[name]

    def names(self) -> Sequence[str]:
        return list(self._specs)

    def shape(self, name: str) -> Shape:
        return self._specs[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._specs[name][1]

    def read(self, name: str) -> torch.Tensor:
        """The tensor, mapped from its file and not copied: never write to it."""
        return self._files[self._where[name]].get_tensor(name)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file_name) for name, file_name in weight_map.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no safetensors index ({type(error).__name__}: {error}); fetch it again") from None


def open_hf_weights(directory: str | Path, model: ModelConfig, expected: dict[str, Shape]) -> SafetensorsReader:
    """A reader whose tensors are those that ``expected`` names, no more, no fewer, with those shapes.

    A ``lm_head.weight`` beside a tied embedding is accepted when it equals the embedding.
    """
    reader = SafetensorsReader(directory)
    for name in filter(_IGNORED.fullmatch, reader.names()):
        reader.drop(name)
    if model.tie_word_embeddings and OUTPUT_LAYER in reader.names():
        _check_tied(reader)
        reader.drop(OUTPUT_LAYER)
    check_tensors(str(directory), {name: reader.shape(name) for name in reader.names()}, expected)
    return reader


def _check_tied(reader: SafetensorsReader) -> None:
    if EMBEDDING in reader.names() and not torch.equal(reader.read(OUTPUT_LAYER), reader.read(EMBEDDING)):
        raise ValueError(
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
            raise ValueError(f"{where}: {word} tensors {', '.join(names[:3])}{more}; config and weights do not match")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(f"{where}: tensor {name} has shape {list(found[name])}, its config asks for {list(shape)}")


def source_hash(source: TensorSource, names: Sequence[str], progress: Callable[[str], None] = lambda name: None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of ``names`` in sorted order: the same however they are sharded."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = source.read(name).contiguous()
        digest.update(f"{name}\0{dtype_name(tensor.dtype)}\0{list(tensor.shape)}\0".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        progress(name)
    return digest.hexdigest()


def plan_shards(source: TensorSource, max_shard_size: int) -> list[list[str]]:
    """Names per file: in order, a new file where the next tensor would pass ``max_shard_size`` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in source.names():
        size = _num_bytes(source, name)
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _num_bytes(source: TensorSource, name: str) -> int:
    return torch.Size(source.shape(name)).numel() * source.dtype(name).itemsize


def check_free_space(source: TensorSource, directory: str | Path) -> None:
    """Raises ``ValueError`` when the tensors of ``source`` do not fit on the disk of ``directory``."""
    needed = sum(_num_bytes(source, name) for name in source.names())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ValueError(
            f"{directory} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left; free some space"
        )


def write_safetensors(
    source: TensorSource,
    directory: str | Path,
    *,
    max_shard_size: int = 5 * 10**9,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes every tensor of ``source`` as transformers does: one file, or shards of at most ``max_shard_size`` bytes
    and their index. One shard is held in memory at a time.
    """
    directory = Path(directory)
    shards = plan_shards(source, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file_name = WEIGHTS_FILE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = source.read(name).contiguous()
            progress(name)
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        total = sum(_num_bytes(source, name) for name in source.names())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


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
