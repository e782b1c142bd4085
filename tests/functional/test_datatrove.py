"""datatrove's own executors, readers and MinHash before our writer: the bytes of `midus preprocess`, failed tasks and near-duplicates included."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader

from megatron_midus.config.preprocess import MergeConfig, PreprocessConfig
from megatron_midus.data.preprocess import preprocess
from megatron_midus.data.shards import merge
from megatron_midus.data.tokenizer import HuggingFaceTokenizer
from megatron_midus.errors import UserError
from megatron_midus.integrations.datatrove import MegatronDatasetWriter

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "examples/tiny_base")
EXAMPLE = ROOT / "examples/datatrove/deduplicate.py"
WORDS = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "su", "te") for b in ("ra", "ne", "vo", "ty") for c in "abcdefghij"]


def words(seed: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=120)


def write_corpus(directory: Path, documents: list[list[str]]) -> None:
    """As many files as documents in the list, in the order of their names."""
    directory.mkdir()
    for number, texts in enumerate(documents):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (directory / f"{number}.jsonl").write_text("".join(lines))


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Three files, with texts that come again, an empty one and one that is left out."""
    texts = [[" ".join(words(number * 50 + i)) for i in range(40)] for number in range(3)]
    texts[0] += ["", "größe und maß", texts[0][3]]
    texts[2] += [texts[0][7], texts[2][1], "too short"]
    write_corpus(tmp_path / "corpus", texts)
    return tmp_path / "corpus"


class FailsOnce(PipelineStep):
    """Fails in the middle of a task, the first time."""

    name, type = "fails once", "test"

    def __init__(self, marker: Path, rank: int) -> None:
        super().__init__()
        self.marker, self.rank = str(marker), rank

    def run(self, data, rank=0, world_size=1):
        for number, document in enumerate(data):
            if number == 20 and rank == self.rank and not os.path.exists(self.marker):
                Path(self.marker).touch()
                raise RuntimeError("the first time")
            yield document


def contents(prefix: Path) -> dict[str, bytes]:
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}_*")}


SETTINGS = {"dedup": True, "split_by_hash": ["80,20"], "min_document_bytes": 10}


@pytest.fixture
def expected(corpus, tmp_path) -> dict[str, bytes]:
    """Of one run of midus preprocess."""
    prefix = tmp_path / "single"
    preprocess(PreprocessConfig([str(corpus)], str(prefix), BASE, append_eod=True, **SETTINGS))
    return contents(prefix)


def pipeline(corpus: Path, prefix: Path, *steps: PipelineStep) -> list[PipelineStep]:
    return [JsonlReader(str(corpus)), *steps, MegatronDatasetWriter(str(prefix), BASE, **SETTINGS)]


@pytest.mark.parametrize("tasks, workers", [(1, 1), (3, 1), (3, 2)])
def test_the_bytes_of_one_run(corpus, expected, tmp_path, tasks, workers):
    # datatrove's readers leave empty documents out and count them themselves.
    prefix = tmp_path / "made"
    LocalPipelineExecutor(pipeline(corpus, prefix), tasks, workers, str(tmp_path / "logs"), start_method="fork").run()
    merge(MergeConfig(str(prefix), delete_shards=True))
    made = contents(prefix)
    assert set(made) == set(expected) and len(made) == 6
    for name, content in made.items():
        if name.endswith(".json"):
            counts, others = json.loads(content), json.loads(expected[name])
            assert counts | {"skipped_empty": 1} == others
        else:
            assert content == expected[name]
    stats = json.loads((tmp_path / "logs/stats.json").read_text())
    written = stats[-1]["stats"]["written_documents"]["total"]
    assert written >= sum(json.loads(content)["documents"] for name, content in made.items() if name.endswith("json"))


def test_a_task_that_failed_is_repeated(corpus, expected, tmp_path):
    prefix, logs = tmp_path / "made", str(tmp_path / "logs")
    steps = [FailsOnce(tmp_path / "marker", 1)]

    def run():
        LocalPipelineExecutor(pipeline(corpus, prefix, *steps), 3, 1, logs).run()

    with pytest.raises(RuntimeError, match="the first time"):
        run()
    names = {path.name for path in tmp_path.iterdir()}
    assert "made_shard00000-of-00003_train_text_document.idx" in names
    assert not [name for name in names if "shard00001" in name]
    # What an earlier run of the task left is no reason to refuse, whole or not.
    (tmp_path / "made_shard00001-of-00003_train_text_document.bin").write_bytes(b"half")
    before = (tmp_path / "made_shard00000-of-00003_train_text_document.idx").stat().st_mtime_ns
    run()
    assert (tmp_path / "made_shard00000-of-00003_train_text_document.idx").stat().st_mtime_ns == before
    merge(MergeConfig(str(prefix)))
    for name in ("_train_text_document.bin", "_train_text_document.idx", "_valid_text_document.bin"):
        assert contents(prefix)[name] == expected[name]


def test_kill_minus_nine_in_a_task(corpus, expected, tmp_path):
    """The whole process: datatrove repeats what it has not marked as completed."""
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import test_datatrove as t; from pathlib import Path\n"
        "class Dies(t.PipelineStep):\n"
        "    def run(self, data, rank=0, world_size=1):\n"
        "        for number, document in enumerate(data):\n"
        "            if number == 20 and rank == 1: os.kill(os.getpid(), 9)\n"
        "            yield document\n"
        "where = Path(sys.argv[2])\n"
        "steps = t.pipeline(where / 'corpus', where / 'made', Dies())\n"
        "t.LocalPipelineExecutor(steps, 3, 1, str(where / 'logs')).run()\n"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    assert process.wait() == -signal.SIGKILL
    # datatrove's own helper process outlives it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / ".made_shard00001-of-00003.partial").is_dir()
    LocalPipelineExecutor(pipeline(corpus, tmp_path / "made"), 3, 1, str(tmp_path / "logs")).run()
    merge(MergeConfig(str(tmp_path / "made"), delete_shards=True))
    assert contents(tmp_path / "made")["_train_text_document.bin"] == expected["_train_text_document.bin"]
    assert not list(tmp_path.glob(".made*"))


def test_a_filter_of_datatrove_before_it(corpus, tmp_path):
    """Empty shards merge as well."""
    keep = LambdaFilter(lambda document: document.metadata["file_path"].endswith("1.jsonl"))
    LocalPipelineExecutor(pipeline(corpus, tmp_path / "made", keep), 4, 1, str(tmp_path / "logs")).run()
    merged = merge(MergeConfig(str(tmp_path / "made")))
    assert sum(statistics.documents for statistics in merged.datasets.values()) == 40


def test_mistakes_are_told_before_a_task_starts(tmp_path):
    with pytest.raises(UserError, match="is not shares of train, valid and test"):
        MegatronDatasetWriter(str(tmp_path / "x"), BASE, split_by_hash=["0"])
    with pytest.raises(TypeError, match="shard"):
        MegatronDatasetWriter(str(tmp_path / "x"), BASE, shard="0/3")


def run_example(tmp_path: Path, *more: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(EXAMPLE),
        "--input",
        "near",
        "--tokenizer-model",
        BASE,
        "--output-prefix",
        "out/near",
    ]
    return subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)


def test_near_duplicates_go(tmp_path):
    """Four copies with a word changed lie in other files; one document of each group stays, and all others."""
    documents = [words(i) for i in range(24)]
    groups = [[" ".join(document)] for document in documents]
    for number, place in ((2, 60), (2, 80), (7, 3), (11, 118)):
        changed = list(documents[number])
        changed[place] = "unheard"
        groups[number].append(" ".join(changed))
    files: list[list[str]] = [[], [], []]
    for number, group in enumerate(groups):
        for copy, text in enumerate(group):
            files[(number + copy) % 3].append(text)
    write_corpus(tmp_path / "near", files)
    done = run_example(tmp_path, "--tasks", "3", "--workers", "1", "--work", "work", "--buckets", "20")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "│        24 │" in done.stdout
    tokenizer = HuggingFaceTokenizer(BASE)
    ids = numpy.fromfile(tmp_path / "out/near_text_document.bin", numpy.uint16)
    ends = numpy.flatnonzero(ids == tokenizer.eod)
    found = {tokenizer.decode(part[part != tokenizer.eod].tolist()) for part in numpy.split(ids, ends + 1)[:-1]}
    assert [len(found & set(group)) for group in groups] == [1] * 24
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"near_text_document.{suffix}" for suffix in ("bin", "idx", "json")
    ]


def test_the_batch_files_of_slurm(tmp_path):
    """datatrove's own, for all four stages: bash and shellcheck have nothing to say against them."""
    write_corpus(tmp_path / "near", [["a"], ["b"]])
    done = run_example(tmp_path, "--tasks", "2", "--slurm", "cpu", "--time", "1:00:00", "--dry-run")
    assert done.returncode == 0, done.stderr
    scripts = re.split(r"^(?=#!/bin/bash)", done.stdout, flags=re.MULTILINE)[1:]
    assert len(scripts) == 4
    for script, tasks in zip(scripts, (2, 14, 1, 2)):
        assert "#SBATCH --partition=cpu\n" in script and "#SBATCH --time=1:00:00\n" in script
        assert f"#SBATCH --array=0-{tasks - 1}%1\n" in script and "source tools/setup_environment.sh data\n" in script
        for command in (["bash", "-n"], ["shellcheck", "--severity=warning", "--exclude=SC1091", "-"]):
            checked = subprocess.run(command, input=script, capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout
    refused = run_example(tmp_path, "--dry-run")
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].endswith("--slurm PARTITION; give it")
    nothing = run_example(tmp_path, "--glob", "*.parquet")
    assert nothing.returncode == 1 and "no file of near matches --glob *.parquet" in nothing.stderr
