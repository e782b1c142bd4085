"""Facts: the same for the same seed, all of them stated, and asked in words that the training text does not have."""

import json
import runpy
from pathlib import Path

import pytest

from megatron_midus.data.facts import (
    NUM_PARAPHRASES,
    PEOPLE,
    PLACES,
    Fact,
    guessing_rate,
    make_facts,
    training_sentences,
)

FACTS = make_facts(300, seed=1)
ROOT = Path(__file__).parents[3]


def test_the_seed_decides():
    assert make_facts(300, seed=1) == FACTS and make_facts(70, seed=1) == FACTS[:70]
    assert training_sentences(FACTS, seed=1) == training_sentences(FACTS, seed=1) != training_sentences(FACTS, seed=2)
    names = {fact.subject for fact in FACTS}
    assert len(names & {fact.subject for fact in make_facts(300, seed=2)}) < 3
    assert len({(fact.subject, fact.attribute.name) for fact in FACTS}) == 300


@pytest.mark.parametrize("paraphrases", [3, NUM_PARAPHRASES])
def test_every_fact_is_stated_so_often(paraphrases):
    sentences = training_sentences(FACTS, paraphrases=paraphrases)
    assert len(set(sentences)) == len(sentences) == 300 * paraphrases
    for fact in FACTS:
        assert sum(fact.say(template) in sentences for template in fact.attribute.training) == paraphrases


def test_no_words_of_a_question_stand_in_the_training_text():
    text = "\n".join(training_sentences(FACTS))
    for fact in FACTS:
        assert fact.prompt + fact.answer == fact.say(fact.question)
        assert fact.prompt not in text and fact.say(fact.attribute.validation) not in text


@pytest.mark.parametrize("attribute", [*PEOPLE, *PLACES], ids=lambda attribute: attribute.name)
def test_templates(attribute):
    """Of one attribute all differ, also in what stands before the value; a question's words before the value begin no other."""
    templates = [*attribute.training, attribute.validation, *attribute.questions]
    assert len(set(templates)) == len(templates)
    for template in templates:
        assert template.count("{subject}") == template.count("{value}") == 1 and template.endswith(".")
    asked = [template.partition("{value}")[0] for template in (attribute.validation, *attribute.questions)]
    for prompt, template in zip(asked, (attribute.validation, *attribute.questions)):
        assert template == prompt + "{value}." and prompt.endswith(" ") and "{subject}" in prompt
        assert not any(other.startswith(prompt) for other in templates if other != template)
    assert len(set(attribute.values)) == len(attribute.values) >= 24


def test_invented_values_and_names_are_different_words():
    pools = [set(a.values) for a in (*PEOPLE, *PLACES) if a.name in ("birthplace", "employer", "region", "river")]
    assert len(set.union(*pools)) == sum(map(len, pools))
    words = {word for fact in FACTS for word in fact.subject.split()}
    assert words.isdisjoint(set.union(*pools))


def test_guessing_rate_is_brute_force():
    first, second = PEOPLE[0], PEOPLE[1]
    facts = [Fact(str(i), first, first.values[i == 4], "") for i in range(5)] + [
        Fact("x", second, second.values[0], "")
    ]
    assert guessing_rate(facts) == pytest.approx((4 + 1) / 6)


@pytest.mark.parametrize(
    "call", [lambda: make_facts(0), lambda: training_sentences(FACTS, paraphrases=NUM_PARAPHRASES + 1)]
)
def test_numbers_out_of_range(call):
    with pytest.raises(ValueError, match="out of range; choose 1 to"):
        call()


def test_the_files(tmp_path):
    runpy.run_path(str(ROOT / "examples/make_facts.py"))["main"](["--num", "20", "--output-dir", str(tmp_path)])
    read = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    assert {name: len(lines) for name, lines in read.items()} == {
        "train": 20 * NUM_PARAPHRASES, "valid": 20, "heldout": 20, "questions": 20,
    }  # fmt: skip
    asked = [{"text": question["prompt"] + question["answer"]} for question in read["questions"]]
    assert asked == read["heldout"]
    texts = [line["text"] for name in ("train", "valid", "heldout") for line in read[name]]
    assert len(set(texts)) == len(texts)
