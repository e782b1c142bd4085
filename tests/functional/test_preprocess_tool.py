"""tools/preprocess_data.py from a corpus to the batches of a training run, and every way to ask it for nonsense."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import write_tokenizer

from megatron_midus.config.data import DataConfig
from megatron_midus.data import build_data_loader, build_tokenizer, build_train_valid_test_datasets, get_batch

TOOL = Path(__file__).parents[2] / "tools/preprocess_data.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("tool_preprocess_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


preprocess_data = load_tool()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return str(directory)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": f"document {i} speaks of " + "models and tokens, " * (i % 7 + 1)} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(corpus, tokenizer, prefix, *more):
    return [
        "--input", str(corpus), "--json-keys", "text", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
        str(tokenizer), "--output-prefix", str(prefix), "--append-eod", *map(str, more),
    ]  # fmt: skip


def test_as_a_program_with_two_workers(corpus, tokenizer, tmp_path, capsys):
    command = [sys.executable, str(TOOL), *arguments(corpus, tokenizer, tmp_path / "two", "--workers", 2)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr and "B/s" in done.stderr
    preprocess_data.main(arguments(corpus, tokenizer, tmp_path / "one", "--workers", 1))
    for suffix in ("bin", "idx", "json"):
        one, two = (tmp_path / f"{name}_text_document.{suffix}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    statistics = json.loads((tmp_path / "one_text_document.json").read_text())
    for printed in (done.stdout, capsys.readouterr().out):
        assert f"{statistics['tokens']:,}" in printed and f"{statistics['bytes_per_token']:.3f}" in printed
        assert "0 empty, 0 duplicates, 0 malformed" in printed


def test_split_data_feed_a_training_run(corpus, tokenizer, tmp_path):
    preprocess_data.main(arguments(corpus, tokenizer, tmp_path / "p", "--split-by-hash", 0.8, 0.2))
    config = DataConfig(
        train_data_path=[str(tmp_path / "p_train_text_document")],
        valid_data_path=[str(tmp_path / "p_valid_text_document")],
        tokenizer_model=tokenizer,
        seq_length=24,
        num_workers=0,
    )
    tokens = build_tokenizer(config)
    train, valid, test = build_train_valid_test_datasets(config, tokens, num_samples=(40, 8, 8), seed=1)
    assert test is None
    settings = {"micro_batch_size": 4, "data_parallel_rank": 0, "data_parallel_size": 1}
    for dataset in (train, valid):
        iterator = iter(build_data_loader(dataset, consumed_samples=4, **settings))
        batch = get_batch(
            iterator, micro_batch_size=4, seq_length=24, device="cpu", is_first_stage=True, is_last_stage=True
        )
        assert batch["tokens"].shape == batch["labels"].shape == (4, 24)
        assert batch["tokens"].tolist() == [dataset[i]["tokens"].tolist() for i in range(4, 8)]
        assert "models" in tokens.decode(batch["tokens"].flatten().tolist())


def test_compressed_and_several_inputs(corpus, tokenizer, tmp_path):
    half = corpus.read_bytes().index(b"\n", corpus.stat().st_size // 2) + 1
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.jsonl").write_bytes(corpus.read_bytes()[:half])
    (tmp_path / "d/b.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()[half:]))
    preprocess_data.main(arguments(corpus, tokenizer, tmp_path / "whole"))
    preprocess_data.main(arguments(tmp_path / "d", tokenizer, tmp_path / "parts"))
    for suffix in ("bin", "idx"):
        whole, parts = (tmp_path / f"{name}_text_document.{suffix}" for name in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


def test_a_mistake_is_one_line_and_leaves_nothing(corpus, tokenizer, tmp_path):
    corpus.write_text(corpus.read_text() + '{"text": \n')
    before = set(tmp_path.iterdir())
    command = [sys.executable, str(TOOL), *arguments(corpus, tokenizer, tmp_path / "out", "--workers", 2)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and f"{corpus}:201: not JSON" in last and "Traceback" not in done.stderr
    assert set(tmp_path.iterdir()) == before


MISTAKES = {
    "no input": (["--input", "nowhere.jsonl"], "input nowhere.jsonl does not exist"),
    "no tokenizer": (["--tokenizer-model", "nowhere"], "tokenizer directory nowhere does not exist"),
    "not a SentencePiece model": (
        ["--tokenizer-type", "SentencePieceTokenizer"],
        "SentencePiece model .* does not exist",
    ),
    "another key": (["--json-keys", "body"], r"corpus\.jsonl:1: no key 'body'; keys there: 'text'"),
    "workers": (["--workers", "0"], "workers=0 must be at least 1"),
    "shares": (["--split-by-hash", "0", "1"], "is not shares of train, valid and test"),
    "separator": (["--text-document-separator", r"\q"], "escape"),
}


@pytest.mark.parametrize("more, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(corpus, tokenizer, tmp_path, more, message):
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        preprocess_data.main(arguments(corpus, tokenizer, tmp_path / "out", *more))
    assert set(tmp_path.iterdir()) == before


def test_missing_flags():
    for given in ([], ["--input", "a.jsonl"], ["--input", "a.jsonl", "--output-prefix", "p"]):
        with pytest.raises(ValueError, match="is missing"):
            preprocess_data.main(given)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        preprocess_data.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for flag in (
        "--input",
        "--json-keys",
        "--append-eod",
        "--workers",
        "--split-by-hash",
        "--dedup",
        "--skip-bad-lines",
    ):
        assert flag in printed
    assert "(default: HuggingFaceTokenizer)" in printed
