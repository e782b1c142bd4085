"""The files that are read are those that transformers reads: every mixture of leftovers, against the real program."""

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import load_model, make_model

from megatron_midus.conversion.hf_io import SafetensorsReader
from megatron_midus.evaluation.parameters import count_parameters, read_safetensors_shapes
from megatron_midus.weight_files import find_weight_files

KINDS = ("named", "single", "index", "bin", "variant")


@pytest.fixture(scope="module")
def states():
    """Weights of five models that differ in every number, and the configuration that they share."""
    models = {kind: make_model(num_hidden_layers=1, seed=seed) for seed, kind in enumerate(KINDS)}
    return {kind: model.state_dict() for kind, model in models.items()}, models["single"].config.to_dict()


def write(directory, kinds, states, config):
    """A directory with the weights of each kind, whichever of them transformers takes."""
    directory.mkdir()
    config = {**config, **({"transformers_weights": "other.safetensors"} if "named" in kinds else {})}
    (directory / "config.json").write_text(json.dumps(config, default=str))
    metadata = {"format": "pt"}
    for kind in kinds:
        state = states[kind]
        if kind == "index":
            names = list(state)
            shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
            for file_name, part in shards.items():
                save_file({name: state[name] for name in part}, directory / file_name, metadata=metadata)
            placed = {name: file_name for file_name, part in shards.items() for name in part}
            index = {"metadata": {}, "weight_map": placed}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        elif kind == "bin":
            torch.save(state, directory / "pytorch_model.bin")
        else:
            names = {"named": "other", "single": "model", "variant": "model.fp16"}
            save_file(state, directory / f"{names[kind]}.safetensors", metadata=metadata)
    return directory


@pytest.mark.parametrize("kinds", [c for n in range(6) for c in itertools.combinations(KINDS, n)], ids="+".join)
def test_same_file_as_transformers(tmp_path, states, kinds):
    weights, config = states
    directory = write(tmp_path / "model", kinds, weights, config)
    try:
        theirs = load_model(directory, trust_remote_code=False).state_dict()
    except OSError:
        theirs = None
    taken = next((kind for kind in KINDS[:4] if theirs and all(map(torch.equal, theirs.values(), weights[kind].values()))), None)  # fmt: skip
    assert (taken is None) == (theirs is None)
    if taken in (None, "bin"):
        assert find_weight_files(directory).names == [] == list(read_safetensors_shapes(directory))
        with pytest.raises(ValueError, match="bin weights alone" if kinds == ("bin",) else "no"):
            SafetensorsReader(directory)
        return
    reader = SafetensorsReader(directory)
    assert set(reader.names()) == set(theirs)
    assert all(torch.equal(reader.read(name), theirs[name]) for name in theirs)
    assert count_parameters(directory).total == sum(tensor.numel() for tensor in theirs.values())


def test_index_left_by_an_earlier_sharded_save_says_nothing(tmp_path, states):
    """Its shards may be gone, it may name tensors of another model, it may be no index at all."""
    directory = write(tmp_path / "model", ("single", "index"), *states)
    (directory / "a.safetensors").unlink()
    for content in (None, '{"weight_map": {"surprise": "b.safetensors"}}', "{"):
        if content is not None:
            (directory / "model.safetensors.index.json").write_text(content)
        assert find_weight_files(directory).names == ["model.safetensors"]
        assert set(SafetensorsReader(directory).names()) == set(states[0]["single"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("../other.safetensors", "lies outside"),
        ("pytorch_model.bin", "neither a safetensors file nor an index"),
        ("absent.safetensors", "does not exist"),
        (["model.safetensors"], "neither a safetensors file nor an index"),
    ],
)
def test_weights_that_the_config_names_and_cannot(tmp_path, states, name, message):
    weights, config = states
    directory = write(tmp_path / "model", ("single",), weights, {**config, "transformers_weights": name})
    with pytest.raises(ValueError, match=message):
        find_weight_files(directory)
