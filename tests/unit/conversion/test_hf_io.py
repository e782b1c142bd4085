"""safetensors directories: exact round trips at any shard size, and one line for everything that is broken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DictSource, make_model

from megatron_midus.conversion.families import FAMILIES, from_hf_config
from megatron_midus.conversion.hf_io import (
    CastTensors,
    SafetensorsReader,
    open_hf_weights,
    parse_size,
    plan_shards,
    read_hf_config,
    source_hash,
    write_safetensors,
)
from megatron_midus.conversion.stored import FUSED_EXPERTS
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.tensors import model_shapes
from megatron_midus.weight_files import INDEX_FILE

NONE = make_plan("none", num_layers=5)


def random_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(i + 1, 7, generator=generator) for i in range(9)}
    tensors["half"] = torch.randn(5, generator=generator).to(torch.bfloat16)
    tensors["scalar"] = torch.tensor(3.0)
    return tensors


@pytest.mark.parametrize("max_shard_size, files", [(10**9, 1), (400, 5), (1, 11)])
def test_round_trip_at_any_shard_size(tmp_path, max_shard_size, files):
    tensors = random_tensors()
    write_safetensors(DictSource(tensors), tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    reader = SafetensorsReader(tmp_path)
    assert set(reader.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor) and reader.read(name).dtype == tensor.dtype
        assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype


def test_shards_keep_to_their_size():
    tensors = random_tensors()
    shards = plan_shards(DictSource(tensors), 500)
    assert [name for shard in shards for name in shard] == list(tensors)
    sizes = [sum(tensors[name].nbytes for name in shard) for shard in shards]
    assert all(size <= 500 for size in sizes) and len(sizes) > 2


def test_transformers_reads_the_index(tmp_path):
    model = make_model()
    model.save_pretrained(str(tmp_path / "one"))
    reader = SafetensorsReader(tmp_path / "one")
    many = tmp_path / "many"
    many.mkdir()
    write_safetensors(reader, many, max_shard_size=30_000)
    shutil.copy(tmp_path / "one/config.json", many)
    again = type(model).from_pretrained(str(many))
    assert len(list(many.glob("*.safetensors"))) > 5
    index = json.loads((many / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_reads_what_transformers_shards(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(str(tmp_path), max_shard_size="40KB")
    config = from_hf_config(read_hf_config(tmp_path))
    reader = open_hf_weights(tmp_path, config, model_shapes(config, NONE))
    assert all(torch.equal(reader.read(name), model.state_dict()[name]) for name in reader.names())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_in_every_spelling(tmp_path, family):
    """One by one as transformers writes them, fused as it holds them, and fused in files of ours: the same tensors."""
    model = make_model(family)
    model.save_pretrained(str(tmp_path))
    config = from_hf_config(read_hf_config(tmp_path))
    shapes = model_shapes(config, NONE)
    one_by_one = open_hf_weights(tmp_path, config, shapes)
    for name, rules in (("held", None), ("ours", FUSED_EXPERTS), ("theirs", FAMILIES[family].stored)):
        directory = tmp_path / name
        directory.mkdir()
        if rules is None:
            save_file({k: t.contiguous() for k, t in model.state_dict().items()}, directory / "model.safetensors")
        else:
            write_safetensors(one_by_one, directory, rules=rules, max_shard_size=30_000, workers=2)
        reader = open_hf_weights(directory, config, shapes)
        assert set(reader.names()) == set(shapes)
        for tensor in shapes:
            assert torch.equal(reader.read(tensor), one_by_one.read(tensor)), (name, tensor)
    fused = model.state_dict()["model.layers.3.mlp.experts.gate_up_proj"]
    width = config.moe_ffn_hidden_size
    assert torch.equal(one_by_one.read("model.layers.3.mlp.experts.2.gate_proj.weight"), fused[2, :width])
    assert torch.equal(one_by_one.read("model.layers.3.mlp.experts.2.up_proj.weight"), fused[2, width:])
    shutil.copy(tmp_path / "config.json", tmp_path / "theirs")
    again = type(model).from_pretrained(str(tmp_path / "theirs"))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def test_hash_does_not_see_sharding_and_sees_all_else(tmp_path):
    tensors = random_tensors()
    one = source_hash(DictSource(tensors), list(tensors))
    write_safetensors(DictSource(tensors), tmp_path, max_shard_size=100)
    assert source_hash(SafetensorsReader(tmp_path), list(reversed(tensors))) == one
    changed = {**tensors, "t3": tensors["t3"].clone()}
    changed["t3"][2, 2] = torch.nextafter(changed["t3"][2, 2], torch.tensor(9.0))  # one bit
    assert source_hash(DictSource(changed), list(changed)) != one
    reshaped = {**tensors, "t3": tensors["t3"].reshape(7, 4)}
    assert source_hash(DictSource(reshaped), list(reshaped)) != one
    renamed = {**{k: v for k, v in tensors.items() if k != "t3"}, "u3": tensors["t3"]}
    assert source_hash(DictSource(renamed), list(renamed)) != one


def test_cast():
    source = CastTensors(DictSource(random_tensors()), torch.bfloat16)
    assert source.dtype("t1") == source.read("t1").dtype == torch.bfloat16 and source.shape("t1") == (2, 7)


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), (" 7 ", 7)])  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 potatoes", "0MB", "1e9"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="not understood"):
        parse_size(text)


# -- broken directories ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    make_model().save_pretrained(str(directory), max_shard_size="60KB")
    return directory


def edit_tensors(directory, change):
    """Applies ``change`` to the tensors of the first shard."""
    path = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop_from_index(directory):
    index = json.loads((directory / INDEX_FILE).read_text())
    del index["weight_map"]["model.norm.weight"]
    (directory / INDEX_FILE).write_text(json.dumps(index))


def truncate(directory):
    path = sorted(directory.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def garbage_header(directory):
    path = sorted(directory.glob("*.safetensors"))[1]
    path.write_bytes(b"\xff" * 200)


def only_bin(directory):
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, directory / "pytorch_model.bin")


def duplicate(directory):
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    tensors, others = load_file(first), load_file(second)
    name = next(iter(tensors))
    save_file({**others, name: tensors[name]}, second, metadata={"format": "pt"})


BROKEN = [
    (truncate, "corrupt or truncated"),
    (garbage_header, "corrupt or truncated"),
    (lambda d: sorted(d.glob("*.safetensors"))[1].unlink(), "does not exist; fetch the missing shard"),
    (lambda d: sorted(d.glob("*.safetensors"))[1].write_bytes(b""), "corrupt or truncated"),
    (lambda d: (d / INDEX_FILE).unlink(), "no model.safetensors.index.json"),
    (lambda d: (d / INDEX_FILE).write_text("{"), "not a safetensors index"),
    (lambda d: (d / INDEX_FILE).write_text("[]"), "not a safetensors index"),
    (lambda d: (d / INDEX_FILE).write_text('{"weight_map": 3}'), "not a safetensors index"),
    (only_bin, "bin weights alone"),
    (lambda d: [p.unlink() for p in d.glob("*.safetensors*")], "holds no weights"),
    (duplicate, "remove one of them"),
    (lambda d: edit_tensors(d, lambda t: t.pop(next(iter(t)))), "is missing"),
    (lambda d: edit_tensors(d, lambda t: t.update(surprise=torch.ones(2))), "unexpected tensors surprise"),
    (lambda d: edit_tensors(d, lambda t: t.update({next(iter(t)): torch.ones(2, 2)})), r"has shape \[2, 2\]"),
    (lambda d: edit_tensors(d, lambda t: t.update({next(iter(t)): torch.ones(2, 2).int()})), "dtype I32"),
    (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    (lambda d: (d / "config.json").write_text("[]"), "no JSON object"),
    (lambda d: (d / "config.json").unlink(), "no Hugging Face model"),
    (shutil.rmtree, "does not exist; give a local"),
]


@pytest.mark.parametrize("damage, message", BROKEN)
def test_broken_directories(good, tmp_path, damage, message):
    directory = tmp_path / "broken"
    shutil.copytree(good, directory)
    damage(directory)
    with pytest.raises(ValueError, match=message) as caught:
        config = from_hf_config(read_hf_config(directory))
        open_hf_weights(directory, config, model_shapes(config, NONE))
    assert "\n" not in str(caught.value)


def test_missing_tensor_without_an_index(tmp_path):
    make_model().save_pretrained(str(tmp_path))
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    config = from_hf_config(read_hf_config(tmp_path))
    with pytest.raises(ValueError, match="missing tensors model.layers.2.mlp.up_proj.weight"):
        open_hf_weights(tmp_path, config, model_shapes(config, NONE))


def test_leftovers_that_are_harmless(tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(str(tmp_path))
    config = from_hf_config(read_hf_config(tmp_path))

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(tmp_path, add)
    reader = open_hf_weights(tmp_path, config, model_shapes(config, NONE))
    assert set(reader.names()) == set(model_shapes(config, NONE))
    edit_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match="differs from model.embed_tokens.weight"):
        open_hf_weights(tmp_path, config, model_shapes(config, NONE))


def test_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    from megatron_midus.conversion import hf_io

    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(hf_io.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="its disk has 0.00 GB left"):
        hf_io.check_free_space(DictSource(random_tensors()), tmp_path)
    hf_io.check_free_space(DictSource({"a": torch.zeros(25)}), tmp_path)
