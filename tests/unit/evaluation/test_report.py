"""The report: names, the note on tokenizers, tables."""

import json
import math

from megatron_midus.evaluation import ParameterCounts, Perplexity
from megatron_midus.evaluation.report import ModelReport, Report, short_names


def make_report(tokenizers=({"a": 1}, {"a": 1})):
    models = []
    for index, tokenizer in enumerate(tokenizers):
        result = Perplexity(documents=2, bytes=400, tokens=100 + index, nats=250.0, seconds=0.5, tokens_read=200)
        counts = ParameterCounts(total=123456, added=789 * index, trainable=789)
        models.append(
            ModelReport(f"m{index}", f"/m/m{index}", counts, tokenizer, "float32", {"d": result, "e": result})
        )
        models[-1].generations["Say | `it`"] = "one\ntwo | `three`"
    return Report(models, {"seq_length": 5}, ["a note"])


def test_rows_put_the_models_of_one_text_under_each_other():
    rows = make_report().rows()
    assert [(row[0], row[4]) for row in rows] == [("m0", "d"), ("m1", "d"), ("m0", "e"), ("m1", "e")]
    assert rows[1] == ["m1", "123,456", "789", "789", "d", "2.4752", "11.885", "0.9017", "101", "400"]


def test_other_tokenizers_get_a_note():
    same, other = make_report(), make_report(({"a": 1}, {"a": 2}))
    assert same.same_tokenizer and same.all_notes() == ["a note"]
    assert not other.same_tokenizer and "compare bits per byte" in other.all_notes()[1]


def test_markdown_table_is_well_formed():
    lines = make_report().to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 6 and {line.count("|") for line in table} == {11}
    assert any("one\\ntwo" in line for line in lines)


def test_json_is_plain():
    values = json.loads(json.dumps(make_report().to_dict(), allow_nan=False))
    assert values["models"][1]["results"]["d"]["bits_per_byte"] == 250.0 / math.log(2) / 400
    assert values["models"][1]["parameters"] == {"total": 123456, "added": 789, "trainable": 789}
    endless = Perplexity(documents=1, bytes=1, tokens=1, nats=1e4, seconds=1.0, tokens_read=1)
    assert endless.to_dict()["perplexity"] is None


def test_print(capsys):
    make_report().print()
    printed = capsys.readouterr().out
    assert "bits/byte" in printed and "note: a note" in printed and "'one\\ntwo | `three`'" in printed


def test_short_names():
    assert short_names(["/a/x", "/b/y/", "/c/x"]) == ["/a/x", "y", "/c/x"]
