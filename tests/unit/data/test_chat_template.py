"""Which tokens have a loss: token by token for a template with marks and for one without, and as transformers says."""

from __future__ import annotations

import pickle

import numpy
import pytest
from sft_data import BASE, ENDLESS, MARKED, UNMARKED, turns, write_records, write_template
from transformers import AutoTokenizer

import megatron_midus as midus
from megatron_midus.data.chat_template import ChatTemplate
from megatron_midus.progress import SILENT

TALK = turns("What is a list?", "A sequence.\nOf things", "Größe?", "größer", system="Be brief.")


def template(tmp_path, text, **settings) -> ChatTemplate:
    return ChatTemplate(BASE, template=write_template(tmp_path / "t.jinja", text), **settings)


def learnt_and_rest(ids, learnt) -> tuple[list[str], list[str]]:
    """The text of each run of tokens with a loss, and of each without."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    bounds = [0, *(numpy.flatnonzero(numpy.diff(learnt)) + 1).tolist(), len(ids)]
    runs = [(learnt[a], tokenizer.decode(ids[a:b])) for a, b in zip(bounds, bounds[1:])]
    return [text for has_loss, text in runs if has_loss], [text for has_loss, text in runs if not has_loss]


@pytest.mark.parametrize(
    ("text", "spoken", "rest"),
    [
        (
            MARKED,
            [" A sequence.\nOf things</s>", " größer</s>"],
            ["<s>system: Be brief.\nuser: What is a list?\nBot:", "\nuser: Größe?\nBot:", "\n"],
        ),
        (
            UNMARKED,
            ["A sequence.\nOf things</s>", "größer</s>"],
            [
                "[system]\nBe brief.</s>\n[user]\nWhat is a list?</s>\n[assistant]\n",
                "\n[user]\nGröße?</s>\n[assistant]\n",
                "\n",
            ],
        ),
        (
            ENDLESS.replace("\n", "{{ eos_token }}\n"),
            [" A sequence.\nOf things</s>", " größer</s>"],
            ["system: Be brief.</s>\nuser: What is a list?</s>\nassistant:", "\nuser: Größe?</s>\nassistant:", "\n"],
        ),
    ],
)
def test_only_what_the_assistant_says_has_a_loss(text, spoken, rest, tmp_path):
    ids, learnt, rendered = template(tmp_path, text).encode(TALK, "f:1")
    assert len(ids) == len(learnt) and set(learnt) == {0, 1}
    assert learnt_and_rest(ids, learnt) == (spoken, rest)
    # The whole is what transformers renders, and what the model sees before it answers is the beginning of it.
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert ids == tokenizer.apply_chat_template(TALK, chat_template=text, return_dict=False)
    prompt = tokenizer.apply_chat_template(TALK[:2], chat_template=text, add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt and learnt[: len(prompt)] == [0] * len(prompt) and learnt[len(prompt)] == 1
    assert rendered == tokenizer.apply_chat_template(TALK, chat_template=text, tokenize=False)


def test_marks_as_transformers_reads_them(tmp_path):
    ids, learnt, _ = template(tmp_path, MARKED).encode(TALK, "f:1")
    theirs = AutoTokenizer.from_pretrained(BASE).apply_chat_template(
        TALK, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert (ids, learnt) == (theirs["input_ids"], theirs["assistant_masks"])


def test_an_end_of_document_where_the_template_has_none(tmp_path):
    ids, learnt, _ = template(tmp_path, ENDLESS, append_eod=True).encode(turns("a", "b"), "f:1")
    assert learnt_and_rest(ids, learnt) == ([" b\n</s>"], ["user: a\nassistant:"])
    behind = MARKED.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")
    ids, learnt, _ = template(tmp_path, behind, append_eod=True).encode(turns("a", "b"), "f:1")
    assert learnt_and_rest(ids, learnt) == ([" b</s>"], ["<s>user: a\nBot:", "\n"])
    # Nothing is added where it is there.
    with_eod, without = (template(tmp_path, MARKED, append_eod=value).encode(TALK, "f:1") for value in (True, False))
    assert with_eod == without


def test_a_token_across_the_beginning_of_an_answer_is_refused(tmp_path):
    # "t" + "hing" are "th" + "ing".
    glued = "{% for m in messages %}{% if m.role == 'assistant' %}t{% generation %}hing{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="a token holds both the text before and the text behind"):
        template(tmp_path, glued).encode(turns("a", "b"), "f:1")


def test_two_workers_write_what_one_does(tmp_path):
    records = [{"messages": turns(f"question {i}", f"answer {i * i}")} for i in range(40)]
    data, jinja = write_records(tmp_path / "c.jsonl", *records), write_template(tmp_path / "t.jinja", UNMARKED)
    chat = pickle.loads(pickle.dumps(template(tmp_path, UNMARKED)))
    for workers in (1, 2):
        midus.preprocess(
            input=[str(data)], sft=True, tokenizer_model=str(BASE), chat_template=str(jinja), workers=workers,
            output_prefix=str(tmp_path / f"out{workers}"), split_by_hash=["80", "20"], progress=SILENT,
        )  # fmt: skip
    made = {path.name.removeprefix("out1") for path in tmp_path.glob("out1*")}
    assert made == {
        f"_{split}_{kind}_document.{end}"
        for split in ("train", "valid")
        for kind in ("sft", "sft_loss")
        for end in ("bin", "idx", "json")
    }
    for name in made:
        assert (tmp_path / f"out1{name}").read_bytes() == (tmp_path / f"out2{name}").read_bytes(), name
    encoded = [chat.encode(record["messages"], "f:1") for record in records]
    for kind, index in (("sft", 0), ("sft_loss", 1)):
        stored = numpy.concatenate(
            [numpy.fromfile(tmp_path / f"out1_{s}_{kind}_document.bin", numpy.uint16) for s in ("train", "valid")]
        )
        assert sorted(stored.tolist()) == sorted(number for parts in encoded for number in parts[index])
