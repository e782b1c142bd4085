"""Shards of a corpus, merged: the bytes of a single run, however many shards, whichever of them was killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from megatron_midus.config.preprocess import MergeConfig, PreprocessConfig, Shard
from megatron_midus.data import preprocess as module
from megatron_midus.data.inputs import InputFile
from megatron_midus.data.preprocess import preprocess
from megatron_midus.data.shards import inputs_of_shard, merge
from megatron_midus.errors import UserError
from megatron_midus.progress import Callback

FILES = 9
KEYS = ["text", "title"]


@pytest.fixture
def corpus(tmp_path, texts) -> str:
    """Files of unequal sizes, with texts that come again in other files, empty ones and malformed lines."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(FILES):
        chosen = [*texts[number : number + 3 + number % 4], texts[0], "", f"only in file {number}"]
        lines = [json.dumps({"text": text, "title": text[:9] if i % 3 else ""}) for i, text in enumerate(chosen)]
        lines.insert(2, "{broken")
        (directory / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return str(directory)


@pytest.fixture
def config(corpus, tmp_path, hf_tokenizer_dir, monkeypatch):
    """``config(name, **settings)``"""
    monkeypatch.setattr(module, "_CHUNK_DOCUMENTS", 2)

    def make(name: str, **settings) -> PreprocessConfig:
        settings = {
            "input": [corpus], "tokenizer_model": str(hf_tokenizer_dir), "append_eod": True, "json_keys": KEYS, "commit_seconds": 0,
            "skip_bad_lines": True, "dedup": True, "split_by_hash": ["60,25,15"], **settings,
        }  # fmt: skip
        return PreprocessConfig(output_prefix=str(tmp_path / "made" / name), **settings)

    return make


def contents(name: str, directory: Path) -> dict[str, bytes]:
    """By what follows the name."""
    return {path.name.removeprefix(name): path.read_bytes() for path in directory.glob(f"{name}_*")}


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("settings", [{}, {"dedup": False, "split_by_hash": None}], ids=["dedup, splits", "plain"])
def test_merged_shards_are_the_bytes_of_one_run(config, tmp_path, count, settings):
    single = preprocess(config("single", **settings))
    for index in reversed(range(count)):  # in any order
        preprocess(config("sharded", shard=f"{index}/{count}", **settings))
    merged = merge(MergeConfig(str(tmp_path / "made/sharded"), delete_shards=True))
    expected = contents("single", tmp_path / "made")
    assert contents("sharded", tmp_path / "made") == expected and len(expected) == (19 if not settings else 7)
    assert merged.skipped.counts() == single.skipped.counts()
    assert single.skipped.malformed == FILES and (single.skipped.duplicates > FILES) == (not settings)
    assert not [path for path in (tmp_path / "made").iterdir() if path.name.startswith(".")]


def test_a_shard_that_is_killed_is_repeated(config, tmp_path):
    preprocess(config("single"))

    def killed(index: int) -> None:
        def die(label: str, done: int, total: int | None) -> None:
            if done > 1200:
                os.kill(os.getpid(), signal.SIGKILL)

        preprocess(config("sharded", shard=f"{index}/3"), Callback(die))

    process = multiprocessing.get_context("fork").Process(target=killed, args=(1,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for index in (0, 2):
        preprocess(config("sharded", shard=f"{index}/3"))
    with pytest.raises(UserError, match="of 3 shards of .*, 1 is missing; run midus preprocess --shard 1/3 again"):
        merge(MergeConfig(str(tmp_path / "made/sharded")))
    result = preprocess(config("sharded", shard="1/3"))
    assert result.bytes_resumed > 0
    merge(MergeConfig(str(tmp_path / "made/sharded"), delete_shards=True))
    assert contents("sharded", tmp_path / "made") == contents("single", tmp_path / "made")


def test_every_file_is_in_one_shard_in_order(tmp_path):
    files = []
    for number, size in enumerate([5000, 1, 1, 1, 1, 3000, 1, 1, 9000, 1]):
        files.append(InputFile(tmp_path / f"{number}.jsonl"))
        files[-1].path.write_bytes(b"x" * size)
    for count in range(1, len(files) + 1):
        parts = [inputs_of_shard(files, Shard(index, count)) for index in range(count)]
        assert [file for part in parts for file in part] == files and all(parts)
    assert [len(part) for part in (inputs_of_shard(files, Shard(0, 2)), inputs_of_shard(files, Shard(1, 2)))] == [8, 2]


@pytest.mark.parametrize("text", ["3/3", "1", "-1/3", "0/0", "a/b"])
def test_what_is_no_shard_is_refused(config, text):
    with pytest.raises(UserError, match=f"--shard {text} is not I/N with I from 0 to N - 1"):
        config("x", shard=text)


def test_mistakes(config, tmp_path):
    target = MergeConfig(str(tmp_path / "made/x"))
    with pytest.raises(
        UserError, match="10 shards of 9 input files; a file is never divided, so choose at most 9 shards"
    ):
        preprocess(config("x", shard="0/10"))
    with pytest.raises(UserError, match="there are no shards of .*x; make them with midus preprocess"):
        merge(target)
    preprocess(config("x", shard="0/2"))
    preprocess(config("x", shard="1/2", append_eod=False))
    with pytest.raises(UserError, match="was made with append_eod=False, the first shard with True; make all alike"):
        merge(target)
    preprocess(config("x", shard="1/2", overwrite=True))
    digests = next((tmp_path / "made").glob("x_shard00001*text*.digests"))
    content = digests.read_bytes()
    digests.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"\.digests does not fit .*\.idx; run this shard of midus preprocess again"):
        merge(target)
    digests.write_bytes(content)
    merge(target)
    with pytest.raises(UserError, match="exists; move it away, or replace it with --overwrite"):
        merge(target)
    preprocess(config("x", shard="0/3"))
    with pytest.raises(UserError, match="has shards of 2 and of 3 parts; remove those that are not meant"):
        merge(target)
