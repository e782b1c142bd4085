"""``midus evaluate --task-engine vllm``: lm-eval's tasks in a real vLLM have the figures of transformers."""

import json
import subprocess
import sys

import pytest
from serving_models import ROOT, load

TASKS, DATA = ["wikitext", "arc_easy", "piqa", "boolq"], ROOT / "examples/task_data"


@pytest.fixture
def evaluate(environment, exports, tmp_path):
    """``evaluate(*flags)``: the process, and what it wrote."""

    def run(*flags):
        words = [
            "evaluate",
            "--model",
            exports("hive"),
            "--tasks",
            ",".join(TASKS),
            "--task-data",
            DATA,
            "--json",
            "out.json",
        ]
        program = [sys.executable, "-m", "megatron_midus", *map(str, words), "--task-engine", "vllm", *flags]
        done = subprocess.run(program, cwd=tmp_path, env=environment(True), capture_output=True, text=True)
        return done, json.loads((tmp_path / "out.json").read_text()) if (tmp_path / "out.json").exists() else None

    return run


def test_figures_are_those_of_transformers(evaluate, exports):
    """fp32, on the same tokens: WikiText's pages are several windows of 64 tokens, and questions lose their beginning."""
    from megatron_midus.data.tokenizer import load_hf_tokenizer
    from megatron_midus.evaluation.zero_shot import open_tasks, run_tasks, transformers_engine

    done, found = evaluate("--max-length", "64", "--task-engine-args", "enforce_eager=True")
    assert done.returncode == 0, done.stderr[-6000:]
    assert found["settings"]["task_engine"] == "vllm"
    tokenizer = load_hf_tokenizer(exports("hive"))
    with open_tasks(TASKS, DATA) as manager:
        expected = run_tasks(transformers_engine(load(exports("hive")), tokenizer, max_length=64), TASKS, manager)
    tasks = found["models"][0]["tasks"]
    assert {(task, metric) for task in tasks for metric in tasks[task]} == expected.scores.keys()
    assert expected.num_truncated > 0 and any(
        note.endswith(f"requests: hive {expected.num_truncated}") for note in found["notes"]
    )
    for (task, metric), score in expected.scores.items():
        # Items are right and wrong alike; a likelihood is the same sum in another order.
        assert tasks[task][metric]["value"] == pytest.approx(score.value, rel=1e-4), (task, metric)
    assert {0, 1} - {score.value for score in expected.scores.values()} == {0, 1}  # nothing is all right or all wrong


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--max-length", "4", "--task-engine-args", "enforce_eager=True"],
            "an answer is longer than max_length=4 tokens",
        ),
        (["--task-engine-args", "colour=red"], "cannot be loaded by vLLM"),
    ],
)
def test_what_cannot_be_is_one_line(evaluate, flags, said):
    done, found = evaluate(*flags)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and found is None and said in line
