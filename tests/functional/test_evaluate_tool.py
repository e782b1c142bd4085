"""tools/evaluate.py on a base and its up-scaled twin side by side, and every way to ask it for nonsense."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_base, write_tokenizer

from megatron_midus.upscaling import UpscalePlan
from megatron_midus.verbs.evaluate import evaluate as evaluate_models

pytestmark = pytest.mark.usefixtures("warm_executable")

TOOLS = Path(__file__).parents[2] / "tools"
TASK_DATA = TOOLS.parent / "examples" / "task_data"
TASKS = "wikitext,arc_easy,arc_challenge,logiqa,piqa,winogrande,commonsense_qa,boolq,mmlu"
MEMORY = ["--memory-num-keys", "16", "--memory-topk", "4", "--memory-latent-size", "8"]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evaluate = load_tool("evaluate")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def midus(tmp_path_factory, base):
    """The base with two Memory blocks, as they are before training."""
    directory = tmp_path_factory.mktemp("midus") / "midus"
    load_tool("upscale").main(
        ["--hf-model", str(base), "--save", str(directory), "--save-format", "hf", "--num-blocks", "2", *MEMORY]
    )
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    (directory / "prose.txt").write_text("A tiny text about tiny models.\n\nIt speaks of tokens.\n" * 9)
    rows = [{"text": f"text {i} about models ü"} for i in range(20)]
    (directory / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def run(models, data, *more):
    evaluate.main(
        [
            "--model",
            *map(str, models),
            *(["--data", *map(str, data)] if data else []),
            "--seq-length",
            "32",
            "--device",
            "cpu",
            *map(str, more),
        ]
    )


def test_base_and_twin_side_by_side(base, midus, data, tmp_path, capsys):
    files = [data / "prose.txt", data / "lines.jsonl"]
    outputs = ["--json", tmp_path / "out.json", "--markdown", tmp_path / "out.md"]
    run([base, midus], files, *outputs, "--generate", "a tiny", "--generate-tokens", 5)
    report = json.loads((tmp_path / "out.json").read_text())
    first, second = report["models"]
    assert report["same_tokenizer"] and [m["name"] for m in report["models"]] == ["tiny", "midus"]
    for name in ("prose.txt", "lines.jsonl"):
        # Before training the twin is the base, bit for bit.
        assert first["results"][name]["nats"] == second["results"][name]["nats"]
        assert first["results"][name]["loss"] > 1
    assert first["results"]["prose.txt"]["bytes"] == (data / "prose.txt").stat().st_size
    assert first["results"]["lines.jsonl"]["documents"] == 20
    assert first["generations"] == second["generations"] and list(first["generations"]) == ["a tiny"]

    inserted = UpscalePlan.load(midus).inserted_indices
    tensors = load_file(midus / "model.safetensors")
    added = sum(t.numel() for n, t in tensors.items() if any(f"layers.{i}." in n for i in inserted))
    assert second["parameters"] == {
        "total": sum(t.numel() for t in tensors.values()),
        "added": added,
        "trainable": added,
    }
    assert first["parameters"]["added"] == 0 < added
    assert first["parameters"]["total"] == second["parameters"]["total"] - added

    printed = capsys.readouterr().out
    assert f"{first['results']['prose.txt']['perplexity']:,.3f}" in printed and "prompt: 'a tiny'" in printed
    assert (tmp_path / "out.md").read_text().count("| midus |") == 2


def test_recall_of_facts(base, midus, data, tmp_path, capsys):
    """The answer of the first question is what the base says, so it is recalled; the other is not."""
    from transformers import AutoModelForCausalLM

    from megatron_midus.data.tokenizer import HuggingFaceTokenizer

    tokenizer, model = HuggingFaceTokenizer(base), AutoModelForCausalLM.from_pretrained(base)

    def said(prompt):
        """The most likely token, as text; ``None`` where the text is no longer that token."""
        ids = tokenizer.encode_batch([prompt])[0]
        best = model(input_ids=torch.tensor([[tokenizer.eod, *ids]])).logits[0, -1].argmax().item()
        text = tokenizer.decode([best])
        return text if tokenizer.encode_batch([prompt + text])[0] == [*ids, best] else None

    prompt = next(word * count for count in range(1, 40) for word in "abcdefgh" if said(word * count))
    questions = tmp_path / "questions.jsonl"
    lines = [{"prompt": prompt, "answer": said(prompt)}, {"prompt": prompt, "answer": " wrong answer."}]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run([base, midus], [], "--facts", questions, "--json", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    for figures in report["models"]:
        scores = figures["tasks"]["questions.jsonl"]
        assert (scores["recall"]["value"], scores["recall"]["items"]) == (0.5, 2)
        assert scores["log_likelihood"]["value"] < -1
    # Before training the twin is the base, bit for bit.
    assert report["differences"]["midus"]["questions.jsonl/log_likelihood"] == {"value": 0, "stderr": 0}
    assert report["settings"]["facts"] == [str(questions)] and "recall ↑" in capsys.readouterr().out

    questions.write_text('{"prompt": "a", "answer": " "}\n')
    with pytest.raises(ValueError, match="empty answer"):
        evaluate_models(model=[str(base)], facts=[str(questions)])


def test_trained_values_count(base, midus, data, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(midus, trained)
    tensors = load_file(trained / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("memory.value_bank"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    run([base, trained], [data / "prose.txt"], "--json", tmp_path / "out.json")
    losses = [m["results"]["prose.txt"]["loss"] for m in json.loads((tmp_path / "out.json").read_text())["models"]]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_code_in_our_own_exports_is_not_run(midus, data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(midus, copy)
    (copy / "modeling_midus.py").write_text("raise SystemExit('ran')\n")
    (copy / "configuration_midus.py").write_text("raise SystemExit('ran')\n")
    run([copy], [data / "lines.jsonl"], "--trust-remote-code")


def test_other_tokenizer_and_long_windows_get_notes(base, data, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    write_tokenizer(other, vocab_size=258)
    run([base, other], [data / "lines.jsonl"], "--max-tokens", 60, "--seq-length", 200, "--json", tmp_path / "out.json")
    printed = capsys.readouterr().out
    assert "compare bits per byte" in printed and "was made for 128 tokens" in printed
    first, second = (m["results"]["lines.jsonl"] for m in json.loads((tmp_path / "out.json").read_text())["models"])
    # The bound is in tokens of the first model; both read the same text.
    assert first["bytes"] == second["bytes"] and first["tokens"] - first["documents"] <= 60
    assert first["tokens"] != second["tokens"]


@pytest.mark.parametrize("more", [["--mode", "document"], ["--stride", "8"], ["--add-bos"], ["--dtype", "bfloat16"]])
def test_settings_change_the_figures(base, data, tmp_path, more):
    run([base], [data / "lines.jsonl"], "--json", tmp_path / "a.json")
    run([base], [data / "lines.jsonl"], "--json", tmp_path / "b.json", *more)
    a, b = (json.loads((tmp_path / f"{n}.json").read_text())["models"][0]["results"]["lines.jsonl"] for n in "ab")
    assert a["tokens"] == b["tokens"] and a["nats"] != b["nats"]


def test_tasks_of_base_and_twin_side_by_side(base, midus, data, tmp_path, capsys):
    """Every task of the paper, texts and latency in one table; before training the twin answers as the base does."""
    outputs = ["--json", tmp_path / "out.json", "--markdown", tmp_path / "out.md"]
    more = ["--tasks", TASKS, "--task-data", TASK_DATA, "--max-length", 100, "--batch-size", 4, "--latency"]
    run([base, midus], [data / "lines.jsonl"], *more, "--latency-rounds", 1, "--latency-prompt-tokens", 9, *outputs)
    report = json.loads((tmp_path / "out.json").read_text())
    first, second = report["models"]
    assert report["settings"]["max_length"] == 100 and report["settings"]["num_fewshot"] == 0
    assert set(TASKS.split(",")) <= set(first["tasks"]) and first["tasks"] == second["tasks"]
    differences = report["differences"]["midus"]
    # Equal item by item, and so without spread.
    assert all(change == {"value": 0.0, "stderr": 0.0} for change in differences.values())
    assert second["latency"]["cache_bytes_per_token"] == 7 / 5 * first["latency"]["cache_bytes_per_token"]
    printed, table = capsys.readouterr().out, (tmp_path / "out.md").read_text()
    for text in (f"{first['tasks']['mmlu']['acc']['value']:.4f}", "lines.jsonl", "decoding step", "word_perplexity"):
        assert text in printed and text in table
    assert "lost their beginning" in table and "| wikitext | word_perplexity ↓ | 5 |" in table


def test_another_tokenizer_in_tasks_gets_a_note(base, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    write_tokenizer(other, vocab_size=258)
    run([base, other], [], "--tasks", "piqa", "--task-data", TASK_DATA, "--task-limit", 3)
    printed = " ".join(capsys.readouterr().out.split())
    assert "accuracies, word perplexity and byte perplexity compare across tokenizers" in printed
    assert " 3 " in printed


def test_task_data_are_saved(tmp_path, capsys):
    evaluate.main(
        ["--tasks", "boolq,mmlu_anatomy", "--task-data", str(TASK_DATA), "--save-task-data", str(tmp_path / "new")]
    )
    assert (tmp_path / "new" / "boolq.jsonl").is_file() and (tmp_path / "new" / "mmlu" / "anatomy.jsonl").is_file()
    assert str(tmp_path / "new" / "boolq.jsonl") in capsys.readouterr().out


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def grow_tokenizer(directory):
    write_tokenizer(directory, vocab_size=280)


def edit_tensors(change):
    """An edit of the tensors of a directory; ``change`` takes them by name."""

    def edit(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_json(name, **changes):
    def edit(directory):
        values = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**values, **changes}))

    return edit


def only_index(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent.safetensors"}}')


BROKEN = {
    "NaN": (edit_tensors(lambda t: t["model.norm.weight"].fill_(float("nan"))), "model.norm.weight .* holds NaN"),
    "missing tensor": (edit_tensors(lambda t: t.pop("model.norm.weight")), "lack 1 tensors"),
    "missing shard": (only_index, "absent.safetensors is named by .* and does not exist"),
    "wrong family": (edit_json("config.json", architectures=["X"], model_type="x"), "cannot be loaded"),
    "corrupt safetensors": (truncate, "model.safetensors is damaged or cut off"),
    "tokenizer too large": (grow_tokenizer, "the embedding of .* has only 263 rows"),
    "no tokenizer": (
        lambda d: [(d / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "holds no tokenizer",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "broken plan": (lambda d: (d / "midus_plan.json").write_text("{"), "midus_plan.json is not valid JSON"),
}


@pytest.mark.parametrize("damage, message", BROKEN.values(), ids=BROKEN.keys())
def test_broken_models(base, data, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        run([base, copy], [data / "lines.jsonl"], "--json", tmp_path / "out.json")
    assert "\n" not in str(error.value) and not (tmp_path / "out.json").exists()


MIDUS_BROKEN = {
    "unknown schema": (edit_json("midus_plan.json", schema_version=9), "plan schema version 9 is not known"),
    "plan by hand": (edit_json("midus_plan.json", num_base_layers=2), "midus_plan.json: block .* does not exist"),
    "memory by hand": (edit_json("config.json", memory_num_keys=17), "config.json|cannot be loaded"),
}


@pytest.mark.parametrize("damage, message", MIDUS_BROKEN.values(), ids=MIDUS_BROKEN.keys())
def test_broken_midus_models(midus, data, tmp_path, damage, message):
    shutil.copytree(midus, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(ValueError, match=message) as error:
        run([tmp_path / "copy"], [data / "lines.jsonl"], "--json", tmp_path / "out.json")
    assert "\n" not in str(error.value) and not (tmp_path / "out.json").exists()


MISTAKES = {
    "json is a directory": (["--json", str(TOOLS)], "tools is a directory; name a file"),
    "json below a file": (["--json", __file__ + "/out.json"], "is not a writable directory, so .*out.json cannot be"),
    "markdown below a file": (["--markdown", __file__ + "/a/b.md"], "is not a writable directory"),
    "no model": (["--model", "nowhere"], "model directory nowhere does not exist"),
    "no data": (["--data", "nowhere.txt"], "input nowhere.txt does not exist"),
    "window": (["--seq-length", "0"], "--seq-length 0 must be at least 1"),
    "stride": (["--stride", "33"], "stride=33 is out of range"),
    "batch": (["--batch-size", "0"], "--batch-size 0"),
    "bound": (["--max-tokens", "0"], "--max-tokens 0"),
    "device": (["--device", "toaster"], "device 'toaster' is not available"),
    "key": (["--json-key", "body"], r"lines\.jsonl:1: no key 'body'"),
    "task": (["--tasks", "arc_esy", "--task-data", str(TASK_DATA)], "'arc_esy' is not known; did you mean arc_easy"),
    "task data": (["--tasks", "piqa", "--task-data", "nowhere"], "task data directory nowhere does not exist"),
    "task limit": (["--tasks", "piqa", "--task-data", str(TASK_DATA), "--task-limit", "0"], "--task-limit 0"),
    "length": (["--tasks", "piqa", "--task-data", str(TASK_DATA), "--max-length", "0"], "--max-length 0"),
    "tasks missing": (["--task-data", str(TASK_DATA)], "belong to --tasks"),
    "saved task": (["--save-task-data", "x", "--tasks", "hellaswag"], "task 'hellaswag' is not known"),
    "rounds": (["--latency", "--latency-rounds", "0"], "--latency-rounds 0"),
    "generation": (["--generate", "x", "--generate-tokens", "0"], "--generate-tokens 0"),
}


@pytest.mark.parametrize("more, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(base, data, more, message):
    with pytest.raises(ValueError, match=message) as error:
        run([base], [data / "lines.jsonl"], *more)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "x.txt"], "no model to evaluate; give --model"),
        (["--model", "x"], "nothing to measure; give --data"),
    ],
)
def test_nothing_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main(arguments)


@pytest.mark.parametrize("content", ["", "  \n\n", "\f \f"])
def test_empty_data(base, tmp_path, content):
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(ValueError, match="no document with any text"):
        run([base], [tmp_path / "empty.txt"])


def test_as_a_program(base, data, tmp_path):
    command = [sys.executable, str(TOOLS / "evaluate.py"), "--model", str(base), "--data"]
    done = subprocess.run([*command, str(data / "prose.txt")], capture_output=True, text=True)
    assert done.returncode == 0 and "bits/byte" in done.stdout, done.stderr
    done = subprocess.run([*command, str(tmp_path / "none.txt")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == f"error: input {tmp_path / 'none.txt'} does not exist"


def test_two_processes_say_what_one_says(base, midus, data, tmp_path, capfd):
    """torchrun: texts and facts to the last bit, tasks to rounding; the result is told once."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"a tiny text {number}", "answer": " about tiny models"[: 6 + number]} for number in range(11)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--model",
        base,
        midus,
        "--data",
        data / "prose.txt",
        data / "lines.jsonl",
        "--seq-length",
        24,
        "--batch-size",
        4,
        "--facts",
        questions,
    ]
    words += ["--tasks", "piqa,wikitext,mmlu_anatomy", "--task-data", TASK_DATA, "--task-limit", 7, "--max-length", 64]
    words = [str(word) for word in words]
    assert not evaluate.main([*words, "--json", str(tmp_path / "one.json")])
    announced, _, told = capfd.readouterr().out.partition("\n")
    assert announced.startswith("evaluating ")  # one of several processes does not say that
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "megatron_midus", "evaluate", *words, "--json", str(tmp_path / "two.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("prose.txt") == told.count("prose.txt") > 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for alone, shared in zip(one["models"], two["models"]):
        for name, figures in alone["results"].items():
            for key in ("loss", "nats", "tokens", "bytes", "tokens_read"):
                assert shared["results"][name][key] == figures[key], (name, key)
        for task, scores in alone["tasks"].items():
            for metric, score in scores.items():
                found = shared["tasks"][task][metric]
                assert found["value"] == pytest.approx(score["value"], rel=1e-5) and found["items"] == score["items"]
                if task == "questions.jsonl":
                    assert found == score
