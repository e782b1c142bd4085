"""tools/preprocess_data.py from a corpus to the batches of a training run, and every way to ask it for nonsense."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
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
    assert done.stderr == ""  # a log gets a line a minute
    preprocess_data.main(arguments(corpus, tokenizer, tmp_path / "one", "--workers", 1))
    for suffix in ("bin", "idx", "json"):
        one, two = (tmp_path / f"{name}_text_document.{suffix}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    statistics = json.loads((tmp_path / "one_text_document.json").read_text())
    for printed in (done.stdout, capsys.readouterr().out):
        assert f"{statistics['tokens']:,}" in printed and f"{statistics['bytes_per_token']:.3f}" in printed
        assert "0 empty, 0 too short, 0 too long, 0 duplicates, 0 malformed" in printed
        assert " MB/s" in printed


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


def start_until_committed(command, cwd, partial):
    """The process of the tool, just after it has committed something, and the processes that it started."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (partial / "state.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "nothing was committed"
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, list(map(int, children))


KILLED = ["--dedup", "--split-by-hash", "90,10"]


@pytest.fixture(scope="module")
def many_files(tokenizer, tmp_path_factory):
    """A directory of 20 files, 4 MB, and the prefix of what one worker makes of it when nobody kills it."""
    directory, prefix = (tmp_path_factory.mktemp(name) for name in ("corpus", "whole"))
    words = [f"word{i} und größe {i * i} " for i in range(400)]
    for number in range(20):
        rows = [{"text": "".join(words[(i * 7 + number) % 400] for i in range(j, j + 90))} for j in range(100)]
        (directory / f"{number:02}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preprocess_data.main(arguments(directory, tokenizer, prefix / "whole", *KILLED))
    return directory, prefix / "whole"


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_minus_nine_and_start_again(many_files, tokenizer, tmp_path, workers):
    """The finished files are those of a run that nobody killed, and no process is left."""
    directory, expected = many_files
    more = [*KILLED, "--workers", workers, "--commit-seconds", 0]
    command = [sys.executable, str(TOOL), *arguments(directory, tokenizer, tmp_path / "again", *more)]
    kill_and_start_again(command, tmp_path, workers)
    assert_same_files(expected, tmp_path / "again", ["text"])


def kill_and_start_again(command, cwd, workers):
    """With the output prefix ``cwd/again``."""
    process, children = start_until_committed(command, cwd, cwd / ".again.partial")
    process.kill()
    assert process.wait() == -9
    assert not list(cwd.glob("again_*.idx"))
    assert len(children) >= (workers if workers > 1 else 0)
    wait_for_end(children)
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert " MB before) in " in done.stdout
    assert not (cwd / ".again.partial").exists()


def assert_same_files(expected, found, keys):
    for split, key, suffix in itertools.product(("train", "valid"), keys, ("bin", "idx", "json")):
        whole, again = (Path(f"{prefix}_{split}_{key}_document.{suffix}") for prefix in (expected, found))
        assert whole.read_bytes() == again.read_bytes(), whole


def test_kill_minus_nine_of_conversations(tmp_path):
    """Ids and loss masks, two datasets, go on from the same conversation."""
    path, examples = tmp_path / "chats.jsonl", Path(__file__).parents[2] / "examples"
    rows = [
        {"messages": [{"role": role, "content": f"{role} {i * j} says {j}"} for j in range(i % 3 + 1) for role in ("user", "assistant")]}
        for i in range(4200)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--sft", "--input", path, "--tokenizer-model", examples / "tiny_base", *KILLED]
    flags = list(map(str, [*flags, "--chat-template", examples / "sft/chat_template.jinja", "--output-prefix"]))
    preprocess_data.main([*flags, str(tmp_path / "whole")])
    kill_and_start_again(
        [sys.executable, str(TOOL), *flags, str(tmp_path / "again"), "--commit-seconds", "0"], tmp_path, 1
    )
    assert_same_files(tmp_path / "whole", tmp_path / "again", ["sft", "sft_loss"])


def wait_for_end(pids):
    """Workers of a killed parent end by themselves; zombies of a container without an init process count as ended."""
    deadline = time.monotonic() + 20
    for pid in pids:
        while time.monotonic() < deadline:
            state = ""
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in ("", "Z"):
                break
            time.sleep(0.05)
        else:
            os.kill(pid, 9)
            pytest.fail(f"process {pid} outlived its parent")


def test_two_runs_of_one_output_do_not_mix(corpus, tokenizer, tmp_path):
    big = tmp_path / "big.jsonl"
    big.write_bytes(corpus.read_bytes() * 200)
    command = [sys.executable, str(TOOL), *arguments(big, tokenizer, tmp_path / "out", "--commit-seconds", 0)]
    process, _ = start_until_committed(command, tmp_path, tmp_path / ".out.partial")
    try:
        with pytest.raises(ValueError, match="another process is working in .*out.partial"):
            preprocess_data.main(command[2:])
    finally:
        process.kill()
        process.wait()


def file_of(content, name="corpus.jsonl"):
    """Writes an input; returns the flags that name it."""

    def write(directory):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
        return ["--input", str(directory / name)]

    return write


def parquet_of(columns):
    def write(directory):
        pyarrow.parquet.write_table(pyarrow.table(columns), directory / "a.parquet")
        return ["--input", str(directory / "a.parquet")]

    return write


def flags(*given):
    return lambda directory: [str(directory / g.removeprefix("$/")) if g.startswith("$/") else g for g in given]


def broken_tokenizer(directory):
    (directory / "broken").mkdir()
    (directory / "broken/tokenizer.json").write_text("{")
    return ["--tokenizer-model", str(directory / "broken")]


def a_file_in_the_way(directory):
    (directory / "file").write_text("")
    return ["--output-prefix", str(directory / "file/out")]


def existing_output(directory):
    (directory / "out_text_document.bin").write_text("")
    return []


def directory_without_inputs(directory):
    (directory / "notes").mkdir()
    return ["--input", str(directory / "notes")]


def two_columns_one_missing(directory):
    parquet_of({"text": ["good"]})(directory)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["bad"]}), directory / "b.parquet")
    return ["--input", str(directory / "*.parquet")]


GOOD = b'{"text": "good"}\n' * 30
MISTAKES = {
    "bad UTF-8": (file_of(GOOD + b'{"text": "\xff"}'), r"corpus\.jsonl:31: not UTF-8"),
    "bad JSON": (file_of(GOOD + b'{"text": "a",}'), r"corpus\.jsonl:31: not JSON"),
    "cut JSON": (file_of(GOOD + b'{"text": "a'), r"corpus\.jsonl:31: not JSON"),
    "pretty-printed JSON": (file_of(b'{\n "text": "a"\n}'), r"corpus\.jsonl:1: not JSON"),
    "JSON array": (file_of(b'[{"text": "a"}]'), r"corpus\.jsonl:1: a list, not a JSON object"),
    "missing key": (file_of(b'{"content": "a"}'), r"corpus\.jsonl:1: no key 'text'; keys there: 'content'"),
    "null": (file_of(GOOD + b'{"text": null}'), "'text' is NoneType, not a string"),
    "number": (file_of(GOOD + b'{"text": 1.5}'), "'text' is float, not a string"),
    "half a surrogate pair": (file_of(b'{"text": "\\udc00"}'), "half of a surrogate pair"),
    "UTF-16": (file_of('{"text": "a"}'.encode("utf-16")), r"corpus\.jsonl:1: not UTF-8"),
    "empty file": (file_of(b""), "the inputs hold no document"),
    "empty texts": (file_of(b'{"text": " "}'), r"no document with any text that is kept \(1 empty\)"),
    "latin-1 text": (file_of(b"gr\xf6\xdfe", "a.txt"), r"a\.txt:1: not UTF-8"),
    "truncated gz": (file_of(gzip.compress(GOOD)[:-9], "a.jsonl.gz"), r"a\.jsonl\.gz is damaged or cut off"),
    "no gz": (file_of(GOOD, "a.jsonl.gz"), r"a\.jsonl\.gz is damaged or cut off"),
    "truncated zst": (file_of(zstandard.compress(GOOD)[:-4], "a.jsonl.zst"), r"a\.jsonl\.zst is damaged or cut off"),
    "no zst": (file_of(GOOD, "a.jsonl.zst"), r"a\.jsonl\.zst is damaged or cut off"),
    "corrupt parquet": (file_of(b"PAR1" + bytes(80) + b"PAR1", "a.parquet"), r"a\.parquet is damaged or not a parquet"),
    "JSON named parquet": (file_of(GOOD, "a.parquet"), r"a\.parquet is damaged or not a parquet"),
    "missing column": (parquet_of({"body": ["a"]}), "no column 'text'; columns there: 'body'"),
    "missing column in the second file": (two_columns_one_missing, r"b\.parquet: no column 'text'"),
    "column of numbers": (parquet_of({"text": [1]}), r"a\.parquet:1: 'text' is int, not a string"),
    "unknown kind of file": (file_of(b"a,b", "a.csv"), "neither JSON lines nor text nor parquet"),
    "no input": (flags("--input", "nowhere.jsonl"), "input nowhere.jsonl does not exist"),
    "no file for a pattern": (flags("--input", "$/*.nothing"), "no file matches"),
    "directory without inputs": (directory_without_inputs, "holds no .jsonl"),
    "unwritable output": (a_file_in_the_way, "Not a directory"),
    "existing output": (existing_output, "out_text_document.bin exists; choose another --output-prefix"),
    "no tokenizer": (flags("--tokenizer-model", "nowhere"), "tokenizer directory nowhere does not exist"),
    "directory without tokenizer": (flags("--tokenizer-model", "$/"), "holds no tokenizer"),
    "broken tokenizer": (broken_tokenizer, "broken cannot be read"),
    "no SentencePiece model": (flags("--tokenizer-type", "SentencePieceTokenizer"), "SentencePiece model .* not exist"),
    "ids beyond the vocabulary": (
        flags("--tokenizer-type", "NullTokenizer", "--tokenizer-model", "70"),
        "'document' is not an id from 0 to 69",
    ),
    "vocabulary too big": (
        flags("--tokenizer-type", "NullTokenizer", "--tokenizer-model", str(2**31 + 1)),
        "2147483649 ids do not fit into 32 bits",
    ),
    "another key": (flags("--json-keys", "body"), r"corpus\.jsonl:1: no key 'body'; keys there: 'text'"),
    "workers": (flags("--workers", "0"), "workers=0 must be at least 1"),
    "shares": (flags("--split-by-hash", "0", "1"), "is not shares of train, valid and test"),
    "lengths": (flags("--min-document-tokens", "9", "--max-document-tokens", "3"), "leave no document"),
    "filters that leave nothing": (flags("--min-document-bytes", "99999"), r"that is kept \(200 too_short\)"),
    "separator": (flags("--text-document-separator", r"\q"), "escape"),
}


@pytest.mark.parametrize("make, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(corpus, tokenizer, tmp_path, make, message):
    more = make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, OSError), match=message) as error:
        preprocess_data.main(arguments(corpus, tokenizer, tmp_path / "out", *more))
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_missing_flags():
    for given in ([], ["--input", "a.jsonl"], ["--input", "a.jsonl", "--output-prefix", "p"]):
        with pytest.raises(ValueError, match="(is|are) missing"):
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


def test_settings_in_a_file(corpus, tokenizer, tmp_path):
    (tmp_path / "data.yaml").write_text(
        f"input: [{corpus}]\ntokenizer-model: {tokenizer}\nappend-eod: true\nsplit-by-hash: 90,10\nworkers: 2\n"
    )
    preprocess_data.main(["--config", str(tmp_path / "data.yaml"), "--output-prefix", str(tmp_path / "file")])
    preprocess_data.main(arguments(corpus, tokenizer, tmp_path / "flags", "--split-by-hash", 0.9, 0.1))
    for split in ("train", "valid"):
        one, other = (tmp_path / f"{name}_{split}_text_document.bin" for name in ("file", "flags"))
        assert one.read_bytes() == other.read_bytes()
