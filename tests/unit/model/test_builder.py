"""Building, freezing, padding of the vocabulary, generation with a cache."""

from __future__ import annotations

import model_processes
import pytest
import torch
from launcher import launch
from scenarios import Layout, Setting


def test_inserted_blocks_alone_are_trainable() -> None:
    ((counted, total, names),) = launch(model_processes.trainable_parameters, 1, Setting(train="inserted"))
    # Blocks k0 k1 m k2 k3 m: norm, qkv and the memory's four tensors, nothing else.
    assert {name.split(".")[2] for name in names} == {"2", "5"} and len(names) == 12
    # Per block: norm 24, qkv (4 + 2 * 2) * 10 * 24, keys 2 * 4 * 9 * 5, values 81 * 7, head_proj 4 * 7 * 6.
    assert counted == total == 2 * (24 + 80 * 24 + 360 + 567 + 168)


def test_all_is_all() -> None:
    ((counted, total, names),) = launch(model_processes.trainable_parameters, 1, Setting(train="all"))
    assert counted == total and "embedding.word_embeddings.weight" in names and "output_layer.weight" in names


def test_nothing_inserted_is_an_error() -> None:
    assert launch(model_processes.freeze_error, 1) == [
        "policy none inserts no block, so there is nothing to train; choose --train all"
    ]


@pytest.mark.parametrize(
    ("model", "kwargs", "expected"),
    [
        ({}, {"transformer_impl": "transformer_engine"}, "Transformer Engine needs a CUDA device"),
        ({}, {"transformer_impl": "jax"}, "transformer_impl='jax' is not known"),
        ({"rope_scaling": {"type": "default"}}, {}, "no error"),
    ],
)
def test_what_cannot_be_built(model: dict, kwargs: dict, expected: str) -> None:
    assert expected in launch(model_processes.build_error, 1, model, **kwargs)[0]


def test_sequence_parallelism_divides_the_sequence() -> None:
    for message in launch(model_processes.build_error, 2, {}, 9, Layout(tp=2, sp=True)):
        assert message.startswith("sequence_length=9 is not divisible by tensor_model_parallel_size=2")


def test_padding_of_the_vocabulary_changes_no_loss() -> None:
    ((plain, rows, _),) = launch(model_processes.loss_with_padding, 1, 1)
    ((padded, more_rows, probability),) = launch(model_processes.loss_with_padding, 1, 20)
    assert (rows, more_rows) == (37, 40) and probability == 0.0
    # A matrix product of another width may round differently.
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_generation_with_the_static_cache(window: int | None) -> None:
    setting = Setting(model={"sliding_window": window, "qk_layernorm": True}, memory={"memory_query_norm": "rms"})
    ((cached, whole),) = launch(model_processes.cached_generation, 1, setting)
    # fp32; the attention sums in another order. Logits have a standard deviation of order one.
    torch.testing.assert_close(cached, whole, rtol=0, atol=2e-5 * float(whole.std()))
    assert torch.equal(cached.argmax(-1), whole.argmax(-1))
