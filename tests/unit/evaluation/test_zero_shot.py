"""Zero-shot tasks: lm-eval's figures equal a count by hand, and every mistake is one line."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import brute_force
import pytest
import torch

from megatron_midus.data.tokenizer import load_hf_tokenizer
from megatron_midus.evaluation.loading import load_model
from megatron_midus.evaluation.task_data import LOCAL_TASKS, TASKS, find_task_files, save_task_data, write_task_yamls
from megatron_midus.evaluation.zero_shot import (
    collect,
    default_max_length,
    load_tasks,
    open_tasks,
    run_tasks,
    transformers_engine,
)

ROOT = Path(__file__).parents[3]
DATA = ROOT / "examples" / "task_data"
# Shorter than the longest prompts and pages, so that cutting them counts.
MAX_LENGTH = 96


@pytest.fixture(scope="module")
def model():
    """The tiny base with noise: its likelihoods differ from the base's, and no choice wins everywhere."""
    model = load_model(ROOT / "examples" / "tiny_base")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return load_hf_tokenizer(ROOT / "examples" / "tiny_base")


def run(model, tokenizer, tasks, manager, *, limit=None, **settings):
    return run_tasks(transformers_engine(model, tokenizer, **settings), tasks, manager, limit=limit)


@pytest.fixture(scope="module")
def results(model, tokenizer):
    with open_tasks(LOCAL_TASKS, DATA) as manager:
        return run(model, tokenizer, LOCAL_TASKS, manager, max_length=MAX_LENGTH, batch_size=3)


@pytest.fixture(scope="module")
def encode(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("task", brute_force.FORMATS)
def test_accuracies_equal_a_count_by_hand(results, model, encode, task):
    items = brute_force.read(DATA, task)
    acc, acc_norm = brute_force.accuracies(
        model, encode, items, brute_force.FORMATS[task], max_length=MAX_LENGTH
    )  # fmt: skip
    assert results.scores[task, "acc"].value == pytest.approx(acc, abs=1e-12)
    assert results.scores[task, "acc"].items == len(items)
    if (task, "acc_norm") in results.scores:
        assert results.scores[task, "acc_norm"].value == pytest.approx(acc_norm, abs=1e-12)


def test_mmlu_is_the_mean_over_the_items_of_all_subjects(results, model, encode):
    right = total = 0
    for path in sorted((DATA / "mmlu").glob("*.jsonl")):
        items = brute_force.read(DATA / "mmlu", path.stem)
        acc, _ = brute_force.accuracies(model, encode, items, brute_force.mmlu, max_length=MAX_LENGTH)
        assert results.scores[f"mmlu_{path.stem}", "acc"].value == pytest.approx(acc, abs=1e-12)
        right, total = right + acc * len(items), total + len(items)
    assert results.scores["mmlu", "acc"].value == pytest.approx(right / total, abs=1e-12)
    assert results.scores["mmlu", "acc"].items == total
    assert [key for key in results.top_level if key[0].startswith("mmlu")] == [("mmlu", "acc")]


def test_word_perplexity_equals_a_count_by_hand(results, model, encode, tokenizer):
    pages = [item["page"] for item in brute_force.read(DATA, "wikitext")]
    with open_tasks(["wikitext"], DATA) as manager:
        detokenize = load_tasks(manager, ["wikitext"])["wikitext"].doc_to_target
        texts = [detokenize({"page": page}) for page in pages]
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    nats = [brute_force.rolling(model, encode, prefix, text, max_length=MAX_LENGTH) for text in texts]
    # float32 logits, summed in another order: 1e-5 nats on a few hundred.
    assert results.scores["wikitext", "word_perplexity"].value == pytest.approx(
        brute_force.word_perplexity(nats, pages), rel=1e-5
    )


def test_the_count_can_fail(results):
    """The tasks' figures differ from each other and from all or nothing, so an equality above says something."""
    accuracies = {score.value for (_, metric), score in results.scores.items() if metric == "acc"}
    assert len(accuracies) > 4 and len(accuracies - {0.0, 1.0}) > 3
    changed = [t for t in brute_force.FORMATS if (t, "acc_norm") in results.scores]
    assert any(results.scores[t, "acc"].value != results.scores[t, "acc_norm"].value for t in changed)
    assert results.num_truncated > 0


def test_every_task_of_the_paper_has_its_metrics(results):
    assert list(dict.fromkeys(task for task, _ in results.top_level)) == list(LOCAL_TASKS)
    assert ("wikitext", "word_perplexity") in results.scores
    assert not results.scores["wikitext", "word_perplexity"].higher_is_better
    assert all(score.stderr is not None for score in results.scores.values())


def test_prompts_are_the_stock_ones(tmp_path):
    """Nothing but the data differs from lm-eval's own task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    write_task_yamls(tmp_path, find_task_files(DATA, LOCAL_TASKS))
    stock = Path(sys.modules["lm_eval"].__file__).parent / "tasks"
    ours_only = {"dataset_path", "dataset_name", "dataset_kwargs", "fewshot_split"}
    ours_only |= {"training_split", "validation_split", "test_split"}
    for task, form in TASKS.items():
        ours = load_yaml(tmp_path / f"{task}.yaml", resolve_func=False)
        theirs = load_yaml(stock / form.stock, resolve_func=False)
        assert theirs["task"] == task
        expected_split = theirs.get("test_split") or theirs["validation_split"]
        assert expected_split == form.split
        assert {k: v for k, v in ours.items() if k not in ours_only} == {
            k: v for k, v in theirs.items() if k not in ours_only
        }


def test_saved_data_are_the_items(tmp_path):
    tasks = ["winogrande", "arc_easy", "mmlu"]
    with open_tasks(tasks, DATA) as manager:
        written = save_task_data(load_tasks(manager, tasks), tmp_path / "copy")
    assert tmp_path / "copy" / "mmlu" / "anatomy.jsonl" in written
    for path in written:
        name = path.relative_to(tmp_path / "copy").with_suffix("")
        assert brute_force.read(tmp_path / "copy", name) == brute_force.read(DATA, name)
    find_task_files(tmp_path / "copy", tasks)


def test_default_max_length():
    assert default_max_length([{"max_position_embeddings": 512}, {"max_position_embeddings": 1024}, {}]) == 512
    assert default_max_length([{"max_position_embeddings": 131072}]) == 2048


def test_a_metric_that_cannot_be_understood_has_no_error():
    output = {
        "results": {"t": {"alias": "t", "f1,none": 0.5, "f1_stderr,none": "N/A", "acc,none": 1.0}},
        "samples": {"t": [{"doc_id": 1, "f1": (1, 2), "acc": 1.0}, {"doc_id": 0, "f1": (0, 1), "acc": 1.0}]},
    }
    scores = collect(output).scores
    assert scores["t", "f1"].stderr is None and scores["t", "f1"].influences is None
    assert scores["t", "acc"].stderr == 0.0


# -- mistakes --------------------------------------------------------------------------------------------------------
@pytest.fixture
def data(tmp_path):
    shutil.copytree(DATA, tmp_path / "data")
    return tmp_path / "data"


def edit(path, change):
    lines = path.read_text().splitlines()
    item = json.loads(lines[1])
    change(item)
    path.write_text("\n".join([lines[0], json.dumps(item), *lines[2:]]))


MISTAKES = {
    "unknown task": (["arc_esay"], lambda d: None, "task 'arc_esay' is not known; did you mean arc_easy?"),
    "unknown subject": (["mmlu_anatmy"], lambda d: None, "did you mean mmlu_anatomy?"),
    "nothing near": (["zzzz"], lambda d: None, "choose from wikitext, arc_easy"),
    "twice": (["piqa", "piqa"], lambda d: None, "task 'piqa' is named twice"),
    "no task": ([], lambda d: None, "there is no task to run"),
    "no directory": (["piqa"], lambda d: shutil.rmtree(d), "task data directory .* does not exist"),
    "no file": (["piqa"], lambda d: (d / "piqa.jsonl").unlink(), "no data for task piqa: .*piqa.jsonl does not exist"),
    "no subject": (["mmlu"], lambda d: shutil.rmtree(d / "mmlu"), "holds no file of a subject"),
    "empty": (["boolq"], lambda d: (d / "boolq.jsonl").write_text("\n"), "boolq.jsonl holds no item"),
    "no JSON": (["boolq"], lambda d: (d / "boolq.jsonl").write_text("{"), r"boolq.jsonl:1: not JSON"),
    "no object": (["boolq"], lambda d: (d / "boolq.jsonl").write_text("[1]"), "needs the entry 'passage'"),
    "no entry": (["piqa"], lambda d: edit(d / "piqa.jsonl", lambda i: i.pop("sol2")), "piqa.jsonl:2: .* 'sol2'"),
    "not text": (["piqa"], lambda d: (d / "piqa.jsonl").write_bytes(b"\xff\xfe"), "is not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("tasks, damage, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(data, tasks, damage, message):
    damage(data)
    with pytest.raises(ValueError, match=message) as error, open_tasks(tasks, data):
        pass
    assert "\n" not in str(error.value)


def test_items_of_another_shape(data):
    (data / "arc_easy.jsonl").write_text(json.dumps({"question": "q", "choices": ["a"], "answerKey": "A"}) + "\n")
    with (
        open_tasks(["arc_easy"], data) as manager,
        pytest.raises(ValueError, match="the data of task arc_easy cannot be loaded"),
    ):
        load_tasks(manager, ["arc_easy"])


@pytest.mark.parametrize("setting", ["batch_size", "max_length", "limit"])
def test_settings_out_of_range(model, tokenizer, setting):
    settings = {"max_length": 32, setting: 0}
    with pytest.raises(ValueError, match=f"{setting}=0 must be at least 1"):
        run(model, tokenizer, ["piqa"], None, **settings)


def test_an_answer_that_does_not_fit(model, tokenizer):
    with open_tasks(["piqa"], DATA) as manager, pytest.raises(ValueError, match="longer than max_length=4 tokens"):
        run(model, tokenizer, ["piqa"], manager, max_length=4)


def test_likelihoods_that_are_not_numbers_are_no_accuracy(model, tokenizer, monkeypatch):
    """As weights that overflow in half precision: choices, and the whole text of a page."""
    monkeypatch.setattr(
        model.model.norm, "weight", torch.nn.Parameter(torch.full_like(model.model.norm.weight, math.nan))
    )
    with open_tasks(["piqa", "wikitext"], DATA) as manager:
        for task in ("piqa", "wikitext"):
            with pytest.raises(ValueError, match=f"item 0 of task {task} has the likelihood NaN"):
                run(model, tokenizer, [task], manager, max_length=MAX_LENGTH, limit=1)


def test_without_lm_eval_the_extra_is_named():
    program = """
import sys
sys.modules["lm_eval"] = None
from megatron_midus.evaluation import zero_shot
try:
    with zero_shot.open_tasks(["piqa"]):
        pass
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'megatron-midus[eval]'" in done.stdout and done.stdout.count("\n") == 1
