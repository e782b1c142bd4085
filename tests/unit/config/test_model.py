"""ModelConfig: round trip through its file, and errors that name the file and the value."""

from __future__ import annotations

import json

import pytest

from megatron_midus.config import ModelConfig, padded_vocab_size
from megatron_midus.config.model import MODEL_CONFIG_FILE

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=100,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=10,
    vocab_size=63,
    max_position_embeddings=77,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)


def test_round_trip_through_the_file(tmp_path):
    MODEL.save(tmp_path)
    assert ModelConfig.load(tmp_path) == MODEL


def test_a_missing_file_says_who_writes_it(tmp_path):
    with pytest.raises(ValueError, match=r"model_config.json does not exist; it is written by"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"num_layers": 1}'])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / MODEL_CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match="model_config.json"):
        ModelConfig.load(tmp_path)


def test_unknown_entries_are_named(tmp_path):
    (tmp_path / MODEL_CONFIG_FILE).write_text(json.dumps({**MODEL.to_dict(), "num_experts": 8}))
    with pytest.raises(ValueError, match="num_experts"):
        ModelConfig.load(tmp_path)


def test_values_out_of_range_are_named():
    with pytest.raises(ValueError, match="num_layers=0 must be at least 1"):
        MODEL.with_layers([0] * 0)
    with pytest.raises(ValueError, match="num_attention_heads=6 is not divisible by num_query_groups=4"):
        ModelConfig.from_dict({**MODEL.to_dict(), "num_query_groups": 4})


@pytest.mark.parametrize(
    ("rows", "divisible_by", "ranks", "padded"),
    [(37, 1, 1, 37), (37, 1, 2, 38), (37, 8, 2, 48), (37, 128, 1, 128), (128, 64, 2, 128), (129, 64, 2, 256)],
)
def test_padded_vocab_size(rows: int, divisible_by: int, ranks: int, padded: int) -> None:
    assert padded_vocab_size(rows, divisible_by=divisible_by, tensor_model_parallel_size=ranks) == padded


def test_padding_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="make_vocab_size_divisible_by=0"):
        padded_vocab_size(37, divisible_by=0)
