"""Damaged and mistaken inputs of every verb: one line for the user, never what a library says about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import write_base

from megatron_midus import command
from megatron_midus.errors import is_users_mistake

TEXTS = {
    "empty": b"",
    "cut": b'{"a": ',
    "a list": b"[1]",
    "a number": b"3",
    "null": b"null",
    "deep": b"[" * 100_000,
    "a huge integer": b'{"vocab_size": ' + b"7" * 5000 + b"}",
    "not UTF-8": b"\xff\xfe{",
}
VALUES = {"a word": "many", "negative": -1, "zero": 0, "a list": [1], "null": None, "an object": {}}
FIELDS = [
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "rope_theta",
    "model_type",
    "torch_dtype",
]


def commands(directory: Path, out: Path) -> dict[str, list[str]]:
    """Every verb that reads a Hugging Face directory, as it works with a whole one."""
    base, text = str(directory), str(directory.parent / "text.jsonl")
    return {
        "upscale": ["--hf-model", base, "--save", str(out), "--num-blocks", "2", "--memory-num-keys", "16", "--memory-topk", "4"],
        "convert": ["--load", base, "--save", str(out), "--to", "megatron"],
        "plan": ["--hf-model", base, "--gpus-per-node", "1", "--num-blocks", "2", "--memory-num-keys", "16"],
        "evaluate": ["--model", base, "--data", text, "--seq-length", "16"],
        "generate": ["--model", base, "--prompt", "a", "--generate-tokens", "2"],
        "preprocess": ["--input", text, "--tokenizer-model", base, "--output-prefix", str(out / "data")],
    }  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("base")
    write_base(root / "base")
    (root / "text.jsonl").write_text('{"text": "some words of a text"}\n' * 4)
    return root / "base"


@pytest.fixture
def damaged(base, tmp_path) -> Path:
    shutil.copytree(base, tmp_path / "model")
    shutil.copy(base.parent / "text.jsonl", tmp_path)
    return tmp_path / "model"


def ends_in_one_line(verb: str, directory: Path, out: Path) -> str | None:
    """Nothing when the verb takes it; else what it said, which must be for the user. No output may be half-written."""
    try:
        command.do(verb, commands(directory, out)[verb])
    except Exception as error:
        assert is_users_mistake(error), f"{verb}: {type(error).__name__}: {error}"
        assert not out.exists() or verb == "preprocess"
        return str(error)
    shutil.rmtree(out, ignore_errors=True)
    return None


@pytest.mark.parametrize("verb", list(commands(Path(), Path())))
def test_a_whole_directory_is_taken(verb, damaged, tmp_path):
    assert ends_in_one_line(verb, damaged, tmp_path / "out") is None


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_damaged_file(file, kind, damaged, tmp_path):
    (damaged / file).write_bytes(TEXTS[kind])
    said = {verb: ends_in_one_line(verb, damaged, tmp_path / "out") for verb in commands(damaged, tmp_path)}
    readers = {"config.json": "upscale", "tokenizer.json": "preprocess", "model.safetensors": "convert"}
    if file in readers:
        assert said[readers[file]], f"{readers[file]} took {file}: {kind}"


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", VALUES)
def test_a_field_that_cannot_be(field, kind, damaged, tmp_path):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, field: VALUES[kind]}))
    for verb in commands(damaged, tmp_path):
        ends_in_one_line(verb, damaged, tmp_path / "out")
