"""An evaluation: names, the note on tokenizers, the table, what changed in a sentence."""

import dataclasses
import json
import math

from megatron_midus.evaluation import ParameterCounts, Perplexity
from megatron_midus.evaluation.output import all_notes, print_result, result_to_dict, result_to_markdown
from megatron_midus.evaluation.result import EvaluationResult, ModelFigures, model_names, short_names


def make_result(tokenizers=({"a": 1}, {"a": 1})):
    models = []
    for index, tokenizer in enumerate(tokenizers):
        result = Perplexity(documents=2, bytes=400, tokens=100 + index, nats=250.0, seconds=0.5, tokens_read=200)
        counts = ParameterCounts(total=123456, added=789 * index, trainable=789)
        models.append(
            ModelFigures(f"m{index}", f"/m/m{index}", counts, tokenizer, "float32", {"d": result, "e": result})
        )
        models[-1].generations["Say | `it`"] = "one\ntwo | `three`"
    return EvaluationResult(models, {"seq_length": 5}, ["a note"])


def table_of(result):
    lines = [line for line in result_to_markdown(result).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def with_losses(**nats):
    """The two models of ``make_result`` with these sums of losses over 100 tokens and 400 bytes, one a model."""
    result = make_result()
    for data, sums in nats.items():
        for model, total in zip(result.models, sums):
            model.results[data] = dataclasses.replace(model.results["d"], tokens=100, nats=total)
    return result


def test_rows_put_the_models_of_one_text_under_each_other():
    header, _, *rows = table_of(make_result())
    assert [(row[0], row[1]) for row in rows] == [("d", "m0"), ("d", "m1"), ("e", "m0"), ("e", "m1")]
    assert rows[1][:-1] == ["d", "m1", "123,456", "789", "789", "11.885", "0.9017", "101", "400", "2.4752"]


def test_the_table_ends_with_the_change_of_the_loss():
    header, _, *rows = table_of(with_losses(d=(290.0, 250.6), e=(250.0, 261.25)))
    assert header[-2:] == ["loss (nats/token)", "Δ loss"]
    assert [row[-1] for row in rows] == ["", "−0.3940", "", "+0.1125"]
    one = make_result()
    del one.models[1]
    assert table_of(one)[0][-1] == "loss (nats/token)"


def test_a_sentence_says_what_changed(capsys):
    result = with_losses(d=(290.0, 250.6), e=(250.0, 261.25))
    sentence = "m1 against m0: d −0.39 nats/token, e +0.11 (lower is better)"
    assert f"\n**{sentence}**\n" in result_to_markdown(result)
    print_result(result)
    assert sentence in capsys.readouterr().out
    assert "d 0.00 nats/token" in result_to_markdown(with_losses(d=(290.0, 290.1)))


def test_models_of_other_tokenizers_are_compared_by_their_bits(capsys):
    result = make_result(({"a": 1}, {"a": 2}))
    result.models[1].results["d"] = dataclasses.replace(result.models[1].results["d"], nats=300.0, tokens=10)
    # (300 - 250) / ln 2 / 400; a loss for a token would say 27.5.
    assert "m1 against m0: d +0.18 bits/byte, e 0.00 (lower is better)" in result_to_markdown(result)
    assert table_of(result)[0][-1] == "Δ bits/byte"


def test_other_tokenizers_get_a_note():
    same, other = make_result(), make_result(({"a": 1}, {"a": 2}))
    assert same.same_tokenizer and all_notes(same) == ["a note"]
    assert not other.same_tokenizer and "compare bits per byte" in all_notes(other)[1]


def test_markdown_table_is_well_formed():
    lines = result_to_markdown(make_result()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 6 and {line.count("|") for line in table} == {12}
    assert any("one\\ntwo" in line for line in lines)


def test_json_is_plain():
    values = json.loads(json.dumps(result_to_dict(make_result()), allow_nan=False))
    assert values["models"][1]["results"]["d"]["bits_per_byte"] == 250.0 / math.log(2) / 400
    assert values["models"][1]["parameters"] == {"total": 123456, "added": 789, "trainable": 789}
    endless = Perplexity(documents=1, bytes=1, tokens=1, nats=1e4, seconds=1.0, tokens_read=1)
    assert endless.to_dict()["perplexity"] is None


def test_print(capsys):
    print_result(make_result())
    printed = capsys.readouterr().out
    assert "bits/byte" in printed and "note: a note" in printed and "'one\\ntwo | `three`'" in printed


def test_short_names():
    assert short_names(["/a/x", "/b/y/", "/c/x"]) == ["/a/x", "y", "/c/x"]


def test_a_model_is_named_by_what_says_which_it_is():
    assert model_names(["/a/runs/hive/seed-1/lr-0.003/hf", "/b/tiny_base", "/c/pro/hf/"]) == [
        "hive",
        "tiny_base",
        "pro",
    ]
    assert model_names(["/a/hive/seed-1/hf", "/a/hive/seed-2/hf"]) == ["/a/hive/seed-1/hf", "/a/hive/seed-2/hf"]
