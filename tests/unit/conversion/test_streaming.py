"""Parallel work that loses no failure, and values that no trained model has."""

import hashlib
import threading

import pytest
import torch
from safetensors import safe_open
from tiny_models import DictSource

from megatron_midus.conversion.hf_io import CastTensors, SafetensorsReader, source_hash, write_safetensors
from megatron_midus.conversion.streaming import default_workers, in_parallel, num_bytes, read_finite, resolve_workers


@pytest.mark.parametrize("workers", [1, 3])
def test_everything_is_done_once(workers):
    threads = set()

    def square(number):
        threads.add(threading.get_ident())
        return number * number

    assert sorted(in_parallel(square, range(50), workers)) == [n * n for n in range(50)]
    assert (threading.get_ident() in threads) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failure_ends_it(workers):
    done = []

    def work(number):
        if number == 5:
            raise OSError("disk full")
        done.append(number)

    with pytest.raises(OSError, match="disk full"):
        list(in_parallel(work, range(10_000), workers))
    assert len(done) < 10_000  # what had not begun was dropped


def test_workers():
    assert 1 <= default_workers() <= 4
    assert resolve_workers(None) == default_workers() and resolve_workers(3) == 3
    for workers in (0, -1, 65):
        with pytest.raises(ValueError, match=f"--workers {workers} is out of range"):
            resolve_workers(workers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite_is_named(value, dtype):
    tensor = torch.ones(5, 7, dtype=dtype)
    source = DictSource({"good": tensor.clone(), "bad": tensor, "empty": torch.empty(0, 3), "scalar": torch.ones(())})
    tensor[2, 3] = tensor[4, 6] = value
    for name in ("good", "empty", "scalar"):
        assert read_finite(source, name) is source.tensors[name]
    with pytest.raises(ValueError, match=rf"tensor bad \({str(dtype)[6:]}\) holds 2 values that are NaN"):
        read_finite(source, "bad")


def test_a_cast_that_overflows_is_named():
    source = CastTensors(DictSource({"large": torch.tensor([1.0, 70_000.0])}), torch.float16)
    with pytest.raises(ValueError, match=r"large \(float16\) holds 1 values"):
        read_finite(source, "large")


def layered_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(31, 6, generator=generator)}
    for layer in range(5):
        for name, shape in (("a.weight", (7, 6)), ("b.weight", (6, 9)), ("c.bias", (5,))):
            tensors[f"model.layers.{layer}.{name}"] = torch.randn(shape, generator=generator)
    # odd counts of narrow values before wide ones: the file must still align every tensor
    tensors["model.layers.1.half"] = torch.randn(3, generator=generator).bfloat16()
    tensors["model.layers.2.wide"] = torch.randn(3, generator=generator).double()
    return tensors | {"nothing": torch.empty(0, 4), "scalar": torch.tensor(2.5)}


@pytest.mark.parametrize("max_shard_size", [10**9, 500])
def test_workers_write_the_same_bytes(tmp_path, max_shard_size):
    tensors, hashes = layered_tensors(), {}
    for workers in (1, 2, 5):
        directory = tmp_path / str(workers)
        directory.mkdir()
        seen = []
        write_safetensors(
            DictSource(tensors), directory, max_shard_size=max_shard_size, workers=workers, progress=seen.append
        )
        assert sorted(seen) == sorted(tensors)
        hashes[workers] = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in directory.iterdir()}
        reader = SafetensorsReader(directory)
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
        assert source_hash(reader, list(tensors), workers=workers) == source_hash(DictSource(tensors), list(tensors))
    assert hashes[1] == hashes[2] == hashes[5]


def test_the_library_reads_what_we_write(tmp_path):
    tensors = layered_tensors()
    write_safetensors(DictSource(tensors), tmp_path, workers=2)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype
    assert num_bytes(DictSource(tensors), "model.layers.1.half") == 6
