"""Facts: the same for the same seed, all of them stated, none in the words of its question."""

import json
import re
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
TEMPLATES = [template for attribute in (*PEOPLE, *PLACES) for template in (*attribute.templates, *attribute.rephrased)]
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
        assert sum(fact.say(template) in sentences for template in fact.attribute.templates) == paraphrases


def test_no_question_is_answered_by_a_sentence():
    """Also not as a part of one; its wording is there for other facts, that of the rephrased ones for none."""
    text = "\n".join(training_sentences(FACTS))
    for fact in FACTS:
        for template in (fact.question, fact.rephrased):
            assert fact.prompt(template) + fact.answer == fact.say(template)
            assert fact.prompt(template) not in text
        assert fact.say(fact.validation) not in text and fact.validation != fact.question
        assert fact.question in fact.attribute.templates
        pattern = re.escape(fact.rephrased).replace(r"\{subject\}", ".*").replace(r"\{value\}", ".*")
        assert not re.search(pattern, text)


@pytest.mark.parametrize("attribute", [*PEOPLE, *PLACES], ids=lambda attribute: attribute.name)
def test_templates(attribute):
    """All differ; what stands before the value in a question begins no other template of any attribute."""
    templates = [*attribute.templates, *attribute.rephrased]
    assert len(set(templates)) == len(templates)
    for template in templates:
        assert template.count("{subject}") == template.count("{value}") == 1 and template.endswith(".")
    asked = [template for template in templates if template.endswith(" {value}.")]
    assert set(attribute.rephrased) <= set(asked) and len(asked) >= 5
    for template in asked:
        prompt = template.removesuffix("{value}.")
        assert "{subject}" in prompt and [o for o in TEMPLATES if o.startswith(prompt)] == [template]
    assert len(set(attribute.values)) == len(attribute.values) >= 24


def test_invented_values_and_names_are_different_words():
    pools = [set(a.values) for a in (*PEOPLE, *PLACES) if a.name in ("birthplace", "employer", "region", "river")]
    assert len(set.union(*pools)) == sum(map(len, pools))
    assert {fact.subject for fact in FACTS}.isdisjoint(set.union(*pools))


def test_guessing_rate_is_brute_force():
    first, second = PEOPLE[0], PEOPLE[1]
    facts = [Fact(str(i), first, first.values[i == 4], "", "", "") for i in range(5)] + [
        Fact("x", second, second.values[0], "", "", "")
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
        "train": 20 * NUM_PARAPHRASES, "valid": 20, "heldout": 20, "questions": 20, "rephrased": 20,
    }  # fmt: skip
    asked, rephrased = ([line["prompt"] + line["answer"] for line in read[name]] for name in ("questions", "rephrased"))
    assert asked == [line["text"] for line in read["heldout"]]
    texts = [*rephrased, *(line["text"] for name in ("train", "valid", "heldout") for line in read[name])]
    assert len(set(texts)) == len(texts)
