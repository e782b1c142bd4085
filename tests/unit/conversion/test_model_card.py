"""The model card states what the plan says."""

import dataclasses
import json

import pytest

from megatron_midus.checkpoint.training_record import TrainingRecord
from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.conversion.model_card import model_card, read_evaluation
from megatron_midus.evaluation import ParameterCounts, Perplexity
from megatron_midus.evaluation.output import result_to_dict
from megatron_midus.evaluation.result import EvaluationResult, ModelFigures
from megatron_midus.evaluation.scores import Score
from megatron_midus.evaluation.zero_shot import TaskResults
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.cost import total_parameters, trainable_parameters

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=10,
    vocab_size=37,
    max_position_embeddings=64,
)


def test_midus_card():
    plan = make_plan("interleave", num_layers=4, num_blocks=3, memory=MemoryConfig(memory_num_keys=16))
    plan = dataclasses.replace(plan, source_name="Tiny-1", source_hash="ab" * 32)
    card = model_card(MODEL, plan, dtype="bfloat16", training=TrainingRecord(250, 2_048_000, "inserted"))
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n- midus\n" in card
    assert (
        "# Tiny-1, up-scaled from 4 to 7 layers" in card
        and "trained for 250 iterations on 2,048,000 tokens since" in card
    )
    inserted = trainable_parameters(MODEL, plan, "inserted")
    assert f"- trained: {inserted:,} (the inserted blocks, the base frozen)" in card
    assert "ab" * 32 in card and "computes the same function as its base" in card
    assert f"parameters: {total_parameters(MODEL, plan):,}" in card and "memory_num_keys: `16`" in card
    assert "do not divide into 3 equal groups" in card
    assert card.count('from_pretrained("DIR", trust_remote_code=True)') == 2 and "2512.13751" in card


def test_plain_card():
    plan = make_plan("stack", num_layers=4, num_blocks=4)
    card = model_card(MODEL.with_layers([0] * 8), plan, dtype="float32")
    assert "midus\n---" not in card and "no custom code" in card and "trust_remote_code" not in card
    assert "not trained since" in card and "same function" not in card and "the base model" in card
    base = total_parameters(MODEL, make_plan("none", num_layers=4))
    assert f"of the base: {base:,}" in card
    assert "- trained:" not in card and "## Evaluation" not in card


def test_trained_as_a_whole():
    plan = make_plan("stack", num_layers=4, num_blocks=4)
    card = model_card(MODEL, plan, dtype="float32", training=TrainingRecord(7, None, "all"))
    assert "trained for 7 iterations since" in card
    assert f"- trained: {total_parameters(MODEL, plan):,} (the whole model)" in card


def report():
    """As tools/evaluate.py writes it: a text, a task, and a group of tasks."""
    scores = [
        Score("arc_easy", "acc", 0.51, 0.0102, True, items=90),
        Score("arc_easy", "acc_norm", 0.625, None, True, items=90),
        Score("mmlu", "acc", 0.25, 0.0044, True, items=200),
        Score("mmlu_anatomy", "acc", 0.125, 0.03, True, items=100),
    ]
    tasks = TaskResults({(s.task, s.metric): s for s in scores}, {"mmlu": ("mmlu_anatomy",)}, {}, num_truncated=0)
    text = Perplexity(documents=2, bytes=400, tokens=100, nats=350.0, seconds=0.5, tokens_read=200)
    counts = ParameterCounts(total=9, added=0, trainable=9)
    model = ModelFigures("midus", "/m", counts, {}, "float32", results={"prose": text}, tasks=tasks)
    return EvaluationResult([model], {}, ["zero-shot"])


def test_evaluation(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(result_to_dict(report())))
    card = model_card(MODEL, make_plan("none", num_layers=4), dtype="float32", evaluation=read_evaluation(path))
    section = card.split("## Evaluation")[1].split("## Loading")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| midus | prose | loss | 3.5 |",
        "| midus | prose | perplexity | 33.12 |",
        "| midus | prose | bits_per_byte | 1.262 |",
        "| midus | arc_easy | acc | 0.51 ± 0.01 |",
        "| midus | arc_easy | acc_norm | 0.625 |",
        "| midus | mmlu | acc | 0.25 ± 0.0044 |",
    ]
    assert "zero-shot" in section and "one standard error" in section


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"models": [{"name": "a"}]}', '{"models": [{"results": {"a": 3}}]}', '{"models": [{"name": "a", "results": {}, "tasks": {"t": {"acc": 1}}}]}', "\x00"])  # fmt: skip
def test_what_is_no_evaluation(tmp_path, text):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(ValueError, match="is not a JSON report of midus evaluate") as caught:
        read_evaluation(tmp_path / "e.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="does not exist; make it with"):
        read_evaluation(tmp_path / "absent.json")
