"""hf://datasets/… through the hub's own libraries and a hub on loopback: the bytes of local files, kills and a missing network included."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from loopback_hub import COMMIT, loopback_hub

from megatron_midus.config.preprocess import MergeConfig, PreprocessConfig
from megatron_midus.data.preprocess import preprocess
from megatron_midus.data.shards import merge
from megatron_midus.errors import UserError

BASE = Path(__file__).parents[2] / "examples" / "tiny_base"
TOKENIZER = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(BASE)}
CHAT = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
# Runs of preprocessing, one after the other: what each raised, or the bytes that it did not have to repeat. The environment
# is read when the libraries are imported, so there is a process for each.
PROGRAM = """
import json, os, signal, sys
from megatron_midus.config.preprocess import PreprocessConfig
from megatron_midus.data import preprocess as module
from megatron_midus.errors import UserError
from megatron_midus.progress import Callback
module._CHUNK_DOCUMENTS = 64
def die(label, done, total):
    if done > 200_000:
        os.kill(os.getpid(), signal.SIGKILL)
results = {}
for name, patterns in json.loads(sys.argv[2]).items():
    import huggingface_hub
    huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
for name, settings in json.loads(sys.argv[1]).items():
    if settings.pop("is_killed", False):
        child = os.fork()
        if not child:
            module.preprocess(PreprocessConfig(**settings), Callback(die))
            os._exit(0)
        results[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        continue
    try:
        results[name] = module.preprocess(PreprocessConfig(**settings)).bytes_resumed
    except UserError as error:
        results[name] = str(error)
print(json.dumps(results))
"""
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: "data/train-*"}
  - {split: test, path: data/test-*}
- config_name: small
  data_files: data/test-*
---
"""


def text(number: int) -> dict:
    """Ids for a NullTokenizer, which spares every process the import of transformers."""
    return {"text": " ".join(str(number * i % 900) for i in range(1, 60)), "id": number}


def chat(number: int) -> dict:
    return {"messages": [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": f"a {number}"}]}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """``(address, requests, directory of the datasets of org)``"""
    root = tmp_path_factory.mktemp("hub")
    org = root / "datasets/org"
    (org / "corpus/data").mkdir(parents=True)
    (org / "corpus/README.md").write_text(CARD)
    for name, first, last in (("train-0", 0, 700), ("train-1", 700, 1500), ("train-2", 1500, 1600), ("test-0", 0, 40)):
        table = pyarrow.Table.from_pylist([text(i) for i in range(first, last)])
        pyarrow.parquet.write_table(table, org / f"corpus/data/{name}.parquet", row_group_size=300)
    for name, rows in {
        "lines/a/train.jsonl": [text(i) for i in range(30)],
        "lines/b/train.jsonl": [text(i) for i in range(30, 50)],
        "chats/train.jsonl": [chat(i) for i in range(20)],
        "gated/train.jsonl": [text(0)],
        "broken/train.jsonl": [text(0)],
    }.items():
        write_lines(org / name, rows)
    with open(org / "broken/train.jsonl", "a") as stream:
        stream.write('{"text": \n')
    (org / "several").mkdir()
    card = CARD.replace("default", "large").replace("data/", "hf://datasets/org/corpus/data/")
    (org / "several/README.md").write_text(card)
    with loopback_hub(root) as (address, requests):
        yield address, requests, org


def config(prefix: Path, **settings) -> dict:
    tokenizer = {"tokenizer_type": "NullTokenizer", "tokenizer_model": "1000"}
    settings = {**tokenizer, "append_eod": True, "commit_seconds": 0, **settings}
    return {"output_prefix": str(prefix), **settings}


def run(runs: dict[str, dict], address: str, home: Path, fetched: dict | None = None, **more: str) -> dict:
    """What PROGRAM found, after it put the datasets ``fetched`` into the cache."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), **more}
    command = [sys.executable, "-c", PROGRAM, json.dumps(runs), json.dumps(fetched or {})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def contents(prefix: Path) -> dict[str, bytes]:
    """The files of a prefix, by what follows it."""
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}_*")}


def local(prefix: Path, *inputs: Path, **settings) -> dict[str, bytes]:
    preprocess(PreprocessConfig(**config(prefix, input=[str(path) for path in inputs], **settings)))
    return contents(prefix)


def test_the_bytes_of_local_files(hub, tmp_path):
    address, _, org = hub
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT)
    sft = {"sft": True, "chat_template": str(template), "append_eod": False, **TOKENIZER}
    dedup = {"dedup": True, "split_by_hash": ["80,20"]}
    train = [org / f"corpus/data/train-{i}.parquet" for i in range(3)]
    cases = {
        "split": ("corpus", {}, train),
        "revision": (f"corpus@{COMMIT}", {"split": "test"}, [org / "corpus/data/test-0.parquet"]),
        "config": ("corpus/small", {"workers": 2}, [org / "corpus/data/test-0.parquet"]),
        "pattern": ("corpus/data/t*-0.parquet", {}, [org / "corpus/data/test-0.parquet", train[0]]),
        "lines": ("lines", {}, [org / "lines/a/train.jsonl", org / "lines/b/train.jsonl"]),
        "folder": ("lines/b", {}, [org / "lines/b/train.jsonl"]),
        "file": ("lines/a/train.jsonl", {}, [org / "lines/a/train.jsonl"]),
        "conversations": ("chats", sft, [org / "chats/train.jsonl"]),
        "whole": ("corpus", dedup, train),
    }
    runs = {
        name: config(tmp_path / name, input=[f"hf://datasets/org/{address}"], **settings)
        for name, (address, settings, _) in cases.items()
    }
    for index in range(2):
        runs[f"shard {index}"] = {**runs["whole"], "output_prefix": str(tmp_path / "parts"), "shard": f"{index}/2"}
    found = run(runs, address, tmp_path / "home")
    assert found == dict.fromkeys(runs, 0)
    merge(MergeConfig(str(tmp_path / "parts"), delete_shards=True))
    for name, (_, settings, files) in cases.items():
        assert contents(tmp_path / name) == local(tmp_path / f"local {name}", *files, **{**settings, "split": None})
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_killed_run_goes_on(hub, tmp_path):
    address, _, org = hub
    settings = config(tmp_path / "out", input=["hf://datasets/org/corpus"])
    where = f"hf://datasets/org/corpus@{COMMIT}"
    runs = {"killed": {**settings, "is_killed": True}, "other split": {**settings, "split": "test"}, "out": settings}
    found = run(runs, address, tmp_path / "home")
    assert found["killed"] == -signal.SIGKILL
    source = f"of {where}, config default, split"
    assert (
        f'differs: inputs "{where}/data/train-0.parquet {source} train" there, "{where}/data/test-0'
        in found["other split"]
    )
    # In the middle of the second file.
    assert found["out"] > 150_000
    expected = local(tmp_path / "local", *(org / f"corpus/data/train-{i}.parquet" for i in range(3)))
    assert contents(tmp_path / "out") == expected


def test_offline(hub, tmp_path):
    """What is in the cache in full is read from there; a part of a dataset never passes for the whole."""
    address, requests, org = hub
    run({}, address, tmp_path / "home", {"org/corpus": None, "org/lines": ["README.md", "b*"]})
    requests.clear()
    inputs = {"whole": "corpus", "config": "corpus/small", "part": "lines", "folder": "lines/b", "none": "chats"}
    runs = {name: config(tmp_path / name, input=[f"hf://datasets/org/{rest}"]) for name, rest in inputs.items()}
    runs["revision"] = config(tmp_path / "revision", input=["hf://datasets/org/chats@v2/a b"], shard="0/1")
    runs["shard"] = config(tmp_path / "parts", input=["hf://datasets/org/corpus"], shard="1/3")
    found = run(runs, address, tmp_path / "home", HF_DATASETS_OFFLINE="1")
    assert not [line for line in requests if "org" in line]
    assert {name for name, value in found.items() if value == 0} == {"whole", "config", "folder", "shard"}
    assert found["part"].endswith("where there is a network: hf download org/lines --repo-type dataset")
    assert found["none"].startswith("hf://datasets/org/chats is not in the local Hugging Face cache, and offline mode")
    assert found["revision"].endswith(
        "hf download org/chats --repo-type dataset --revision v2 --include README.md 'a b*'"
    )
    train = [org / f"corpus/data/train-{i}.parquet" for i in range(3)]
    assert contents(tmp_path / "whole") == local(tmp_path / "local", *train)
    assert contents(tmp_path / "folder") == local(tmp_path / "local b", org / "lines/b/train.jsonl")


def test_mistakes_are_one_line_and_leave_nothing(hub, tmp_path):
    address, _, _ = hub
    cases: dict[str, tuple[dict, str]] = {
        "corpus@v9": ({}, "org/corpus has no revision v9 on the hub"),
        "corpus/nope": ({}, "org/corpus has neither a config nor a path 'nope'; its configs: default, small"),
        "several": (
            {},
            "org/several has several configs; give one of them, such as hf://datasets/org/several/large: la",
        ),
        "corpus": ({"split": "nope"}, "org/corpus has no split 'nope'; give --split one of train, test"),
        "corpus/small": ({"json_keys": ["body"]}, "split train: no column 'body'; columns there: 'text', 'id'"),
        "lines": ({"json_keys": ["body"]}, "split train: no column 'body'; columns there: 'text', 'id'"),
        "lines/a": (
            {"sft": True, "chat_template": str(tmp_path / "t"), **TOKENIZER},
            "no column of a conversation (messages, ",
        ),
        "lines/b": ({"shard": "0/2"}, "--shard 0/2: 2 shards of 1 input files"),
        "none": (
            {},
            "org/none is no dataset of the hub that you may read; check the name, and for a private dataset: hf",
        ),
        "gated": ({}, f"terms to be accepted: do so at {address}/datasets/org/gated, then hf auth login"),
        "broken": ({}, "org/broken"),
    }
    (tmp_path / "t").write_text(CHAT)
    (tmp_path / "made").mkdir()
    runs = {
        name: config(tmp_path / "made/out", input=[f"hf://datasets/org/{name}"], **settings)
        for name, (settings, _) in cases.items()
    }
    runs["no name"] = config(tmp_path / "made/out", input=["hf://datasets/org"])
    runs["a model"] = config(tmp_path / "made/out", input=["hf://org/corpus"])
    found = run(runs, address, tmp_path / "home")
    for name in cases:
        assert cases[name][1] in str(found[name]), (name, found[name])
    for name in ("no name", "a model"):
        assert "write hf://datasets/ORG/NAME[@REVISION][/CONFIG or PATH]" in found[name]
    nobody = run({"": runs["corpus@v9"]}, "http://127.0.0.1:9", tmp_path / "home")[""]
    assert "the hub at http://127.0.0.1:9 cannot be reached" in nobody
    assert nobody.endswith("hf download org/corpus --repo-type dataset --revision v9")
    assert all(len(str(text).splitlines()) == 1 for text in (*found.values(), nobody))
    assert not list((tmp_path / "made").iterdir())


def test_split_is_of_datasets_of_the_hub(tmp_path):
    with pytest.raises(UserError, match=r"--split train is of hf://datasets/… inputs.*give --split-by-hash"):
        PreprocessConfig(**config(tmp_path / "x", input=["a.jsonl"], split="train"))
