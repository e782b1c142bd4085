"""midus average over checkpoints whose tensors are known."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import DictSource

import megatron_midus as midus
from megatron_midus.checkpoint.layout import ASSETS_DIRECTORY, find_checkpoint, write_latest_iteration
from megatron_midus.checkpoint.training_record import TrainingRecord, read_training_record
from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.conversion.directories import write_megatron_checkpoint
from megatron_midus.conversion.megatron_io import MegatronReader
from megatron_midus.errors import UserError
from megatron_midus.progress import SILENT
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.tensors import model_shapes

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=6,
    vocab_size=37,
    max_position_embeddings=64,
)
PLAN = make_plan("interleave", num_layers=3, num_blocks=1, memory=MemoryConfig(memory_num_keys=7, memory_topk=3))
ITERATIONS = (0, 20, 40, 60)


def tensors(iteration: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Those of a Memory block change, all others stay."""
    result = {}
    for number, (name, shape) in enumerate(model_shapes(MODEL, PLAN).items()):
        generator = torch.Generator().manual_seed(number)
        fixed, moving = torch.randn(2, *shape, generator=generator)
        result[name] = (fixed + iteration * moving if "mem" in name else fixed).to(dtype)
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    root.mkdir()
    assets = root.parent / "assets"
    assets.mkdir()
    (assets / "tokenizer.model").write_bytes(b"tokens")
    for iteration in ITERATIONS:
        made = root.parent / f"made_{iteration}"
        record = TrainingRecord(iteration, tokens=iteration * 10, train="inserted")
        write_megatron_checkpoint(
            DictSource(tensors(iteration)), made, assets=assets, model=MODEL, plan=PLAN, training=record
        )
        shutil.move(find_checkpoint(made)[0], root)
    write_latest_iteration(root, ITERATIONS[-1])
    return root


def test_the_mean_of_the_newest_and_what_did_not_change_bit_by_bit(run, tmp_path):
    result = midus.average(load=str(run), save=str(tmp_path / "mean"), last=3, progress=SILENT)
    assert result.iterations == (20, 40, 60)
    directory, iteration = find_checkpoint(tmp_path / "mean")
    assert iteration == 60
    assert read_training_record(directory, 60) == TrainingRecord(60, tokens=600, train="inserted")
    assert (directory / ASSETS_DIRECTORY / "tokenizer.model").read_bytes() == b"tokens"
    reader = MegatronReader(directory, MODEL, PLAN)
    parts = [tensors(iteration) for iteration in result.iterations]
    for name in reader.names():
        found = reader.read(name)
        if "mem" in name:
            expected = torch.stack([part[name].double() for part in parts]).mean(0)
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
            assert not torch.equal(found, parts[-1][name])
        else:
            assert torch.equal(found, parts[-1][name]), name


def test_named_iterations(run, tmp_path):
    midus.average(load=str(run), save=str(tmp_path / "mean"), iterations=[60, 0], progress=SILENT)
    reader = MegatronReader(find_checkpoint(tmp_path / "mean")[0], MODEL, PLAN)
    name = next(name for name in reader.names() if "memory.value_bank" in name)
    expected = (tensors(0)[name].double() + tensors(60)[name].double()) / 2
    torch.testing.assert_close(reader.read(name).double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either --last K or --iterations"),
        ({"last": 2, "iterations": [20]}, "give either --last K or --iterations"),
        ({"last": 4}, "holds 3 trained checkpoints (20, 40, 60); choose a smaller K"),
        ({"iterations": [20, 30]}, "holds no iteration 30; it holds 0, 20, 40, 60"),
        ({"iterations": [20, 20]}, "names one checkpoint twice"),
    ],
)
def test_mistakes(run, tmp_path, settings, message):
    with pytest.raises(UserError) as error:
        midus.average(load=str(run), save=str(tmp_path / "mean"), progress=SILENT, **settings)
    assert message in str(error.value) and not (tmp_path / "mean").exists()


def test_other_models_and_damage_are_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    directory = find_checkpoint(copy, 40)[0]
    dataclasses.replace(MODEL, norm_epsilon=1e-3).save(directory)
    with pytest.raises(UserError, match="checksum"):
        midus.average(load=str(copy), save=str(tmp_path / "mean"), last=2, progress=SILENT)
    with pytest.raises(UserError, match="hold different models; average checkpoints of one run"):
        midus.average(load=str(copy), save=str(tmp_path / "mean"), last=2, verify_checkpoint=False, progress=SILENT)
    with pytest.raises(UserError, match="choose another directory"):
        midus.average(load=str(copy), save=str(copy / "mean"), last=2, progress=SILENT)
    assert not (tmp_path / "mean").exists() and not (copy / "mean").exists()
