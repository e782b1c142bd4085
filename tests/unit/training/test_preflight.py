"""What the model's sizes say about the flags, before it is built."""

import dataclasses

import pytest

from megatron_midus.config import ModelConfig
from megatron_midus.training.architecture import Architecture
from megatron_midus.training.arguments import parse_arguments
from megatron_midus.training.preflight import check_model_fits
from megatron_midus.upscaling import make_plan

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    vocab_size=101, max_position_embeddings=64,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def warnings(seq_length, rope_scaling=None):
    arguments = parse_arguments(f"--mock-data --lr 1 --train-iters 1 --seq-length {seq_length}".split())
    model = dataclasses.replace(MODEL, rope_scaling=rope_scaling)
    said: list[str] = []
    check_model_fits(arguments, Architecture(model, make_plan("none", num_layers=2), "all", None), said.append)
    return said


@pytest.mark.parametrize(
    ("rope_scaling", "words"),
    [
        (None, "with the same frequencies, at angles that the model has not seen"),
        (YARN, "with the same frequencies that rope scaling 'yarn' gives"),
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' lowers all frequencies to 65 positions"),
    ],
)
def test_what_rope_does_beyond_the_positions_is_said(rope_scaling, words):
    assert warnings(64, rope_scaling) == []
    (warning,) = warnings(65, rope_scaling)
    assert "longer than the 64 positions" in warning and words in warning
    assert "keep max_position_embeddings=64" in warning


@pytest.mark.parametrize("flags", ["--transformer-impl transformer_engine", "--context-parallel-size 2"])
def test_capped_scores_need_the_local_layers(flags):
    arguments = parse_arguments(f"--mock-data --lr 1 --train-iters 1 --seq-length 64 {flags}".split())
    model = dataclasses.replace(MODEL, attention_softcap=50.0)
    with pytest.raises(ValueError, match=r"attention_softcap=50.0 of this model needs the local layers.*leave out"):
        check_model_fits(arguments, Architecture(model, make_plan("none", num_layers=2), "all", None), print)
