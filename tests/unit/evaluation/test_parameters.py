"""Counts from headers equal those of the model; damaged files are told from whole ones."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from llama_of_bytes import make_llama

from megatron_midus.evaluation import count_parameters
from megatron_midus.evaluation.parameters import read_safetensors_shapes
from megatron_midus.upscaling import Block, UpscalePlan


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_total_equals_the_models(model_directory, shard, tied):
    directory = model_directory(shard=shard, tie_word_embeddings=tied)
    assert (directory / "model.safetensors.index.json").exists() == (shard == "20KB")
    expected = sum(p.numel() for p in make_llama(tie_word_embeddings=tied).parameters())
    counts = count_parameters(directory)
    assert (counts.total, counts.added, counts.trainable) == (expected, 0, expected)


def test_tied_output_layer_that_is_stored_counts_once(model_directory):
    path = model_directory(tie_word_embeddings=True) / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    expected = sum(p.numel() for p in make_llama(tie_word_embeddings=True).parameters())
    assert count_parameters(path.parent).total == expected


def test_inserted_blocks_come_from_the_plan(model_directory):
    directory = model_directory(num_hidden_layers=3)
    blocks = (Block.keep(0), Block.copy(0, zero_output=True), Block.keep(1))
    UpscalePlan(num_base_layers=2, blocks=blocks).save(directory)
    model = make_llama(num_hidden_layers=3)
    inserted = sum(p.numel() for p in model.model.layers[1].parameters())
    counts = count_parameters(directory)
    assert (counts.added, counts.trainable) == (inserted, inserted)
    assert counts.total == sum(p.numel() for p in model.parameters())


def test_weights_of_another_format_are_counted_in_the_model(model_directory):
    directory = model_directory()
    (directory / "model.safetensors").unlink()
    model = make_llama()
    assert count_parameters(directory, model).total == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="holds no safetensors"):
        count_parameters(directory)


def flip_length(data):
    return (10**12).to_bytes(8, "little") + data[8:]


def shift_offsets(data):
    return data.replace(b'"data_offsets"', b'"data_0ffsets"', 1)


DAMAGE = {
    "cut in the data": (lambda data: data[:-100], "is damaged or cut off"),
    "too long": (lambda data: data + b"x", "is damaged or cut off"),
    "cut in the header": (lambda data: data[:60], "is damaged or cut off"),
    "empty": (lambda data: b"", "is damaged or cut off"),
    "header length": (flip_length, "is damaged or cut off"),
    "header is no JSON": (lambda data: data[:8] + b"\xff" + data[9:], "is damaged or cut off"),
    "entry without offsets": (shift_offsets, "is damaged or cut off"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_safetensors(model_directory, damage, message):
    path = model_directory() / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        read_safetensors_shapes(path.parent)
    assert str(path) in str(error.value)


def test_damaged_index(model_directory):
    directory = model_directory(shard="20KB")
    whole = directory.with_name("whole")
    shutil.copytree(directory, whole)
    (directory / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    for path in sorted(directory.glob("model-*.safetensors"))[:1]:
        path.unlink()
    with pytest.raises(ValueError, match=r"is named by model\.safetensors\.index\.json and does not exist"):
        read_safetensors_shapes(directory)
    for content in ("{", "{}", json.dumps({"weight_map": 3})):
        (whole / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match="is not a safetensors index"):
            read_safetensors_shapes(whole)


def test_shapes(model_directory):
    shapes = read_safetensors_shapes(model_directory(shard="20KB"))
    assert shapes == {name: tuple(p.shape) for name, p in make_llama().named_parameters()}
    assert all(isinstance(size, int) for shape in shapes.values() for size in shape)
    assert torch.Size(shapes["model.norm.weight"]) == (24,)
