"""The table of all figures, in Markdown, JSON and on the terminal."""

import json

from test_result import make_result

from megatron_midus.evaluation.latency import Latency
from megatron_midus.evaluation.output import (
    all_notes,
    model_to_dict,
    print_result,
    result_to_dict,
    result_to_markdown,
)
from megatron_midus.evaluation.result import ModelFigures
from megatron_midus.evaluation.scores import Score
from megatron_midus.evaluation.zero_shot import TaskResults


def make_tasks(acc, perplexity, influences, truncated=0):
    scores = {
        ("mmlu_a", "acc"): Score("mmlu_a", "acc", acc, 0.1, True, 4, influences),
        ("mmlu", "acc"): Score("mmlu", "acc", acc, 0.1, True, 4, influences),
        ("wiki", "word_perplexity"): Score("wiki", "word_perplexity", perplexity, None, False, 3, None),
    }
    return TaskResults(scores, {"mmlu": ("mmlu_a",)}, {"mmlu": 2}, truncated)


def make_latency(ratio, peak=None):
    return Latency(64, 8, 2, 3, 0.02 * ratio, 0.001 * ratio, ratio, ratio, 1000, 96.0, peak)


def full_result(**changes):
    result = make_result(**changes)
    first, second = result.models
    first.tasks, second.tasks = make_tasks(0.25, 20.0, (0.1, -0.1)), make_tasks(0.5, 18.0, (0.1, 0.2), truncated=3)
    first.latency, second.latency = make_latency(1.0), make_latency(1.5)
    result.settings["max_length"] = 96
    return result


def rows_of(result):
    table = [line for line in result_to_markdown(result).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return rows[0], {(row[0], row[1]): row[2:] for row in rows[2:]}


def test_all_figures_in_one_table():
    header, rows = rows_of(full_result())
    assert header == ["figure of", "metric", "items", "m0", "m1", "Δ m1"]
    assert rows["parameters", "added"] == ["", "0", "789", ""]
    assert rows["d", "perplexity ↓"] == ["100 tokens", "12.182", "11.885", "-0.298"]
    # sqrt(0.0^2 + 0.3^2): paired, not the root of the sum of both errors.
    assert rows["mmlu", "acc ↑"] == ["4", "0.2500 ± 0.1000", "0.5000 ± 0.1000", "+0.2500 ± 0.3000"]
    assert rows["wiki", "word_perplexity ↓"] == ["3", "20.000", "18.000", "-2.000"]
    assert rows["prefill, 64 tokens", "ms ↓"] == ["batch 2", "20.00", "30.00", "× 1.500"]
    assert rows["KV cache", "bytes/token ↓"] == ["", "96", "96", "× 1.000"]
    assert ("mmlu_a", "acc ↑") not in rows and not any("peak" in name for name, _ in rows)


def test_peak_memory_where_it_is_known():
    result = full_result()
    for model in result.models:
        model.latency = make_latency(1.0, peak=2_000_000)
    assert rows_of(result)[1]["peak memory", "MB ↓"] == ["batch 2", "2.00", "2.00", "× 1.000"]


def test_one_model_has_no_differences():
    result = full_result()
    del result.models[1]
    header, rows = rows_of(result)
    assert header[-1] == "m0" and rows["mmlu", "acc ↑"] == ["4", "0.2500 ± 0.1000"]
    assert "differences" not in result_to_dict(result) or result_to_dict(result)["differences"] == {}


def test_notes_say_how_to_read_it():
    notes = all_notes(full_result())
    assert any("paired, over the same items" in note for note in notes)
    assert any("longer than 96 tokens" in note and "m0 0, m1 3" in note for note in notes)
    other = all_notes(full_result(tokenizers=({"a": 1}, {"a": 2})))
    assert any("compare across tokenizers" in note for note in other)
    assert not any("paired" in note for note in all_notes(make_result()))


def test_json_is_plain_and_complete():
    values = json.loads(json.dumps(result_to_dict(full_result()), allow_nan=False))
    assert values["models"][1]["tasks"]["mmlu"]["acc"]["value"] == 0.5
    assert values["models"][1]["task_versions"] == {"mmlu": 2}
    assert values["models"][1]["latency"]["prefill_ratio"] == 1.5
    assert values["differences"]["m1"]["mmlu/acc"]["value"] == 0.25
    assert "tasks" not in result_to_dict(make_result())["models"][0]


def test_print(capsys):
    print_result(full_result())
    assert "+0.2500 ± 0.3000" in capsys.readouterr().out


def test_fields_of_a_model_all_reach_the_json():
    model = full_result().models[0]
    assert isinstance(model, ModelFigures)
    assert set(model_to_dict(model)) == {
        "name", "directory", "tokenizer", "dtype", "generations", "parameters", "results", "tasks", "task_versions",
        "latency",
    }  # fmt: skip
