"""Records of four shapes become the same messages; what is no conversation ends in one line and leaves nothing."""

from __future__ import annotations

import pytest
from sft_data import BASE, ENDLESS, FORGETFUL, MARKED, turns, write_records, write_template

import megatron_midus as midus
from megatron_midus.data.conversations import read_conversation
from megatron_midus.errors import UserError
from megatron_midus.progress import SILENT


@pytest.mark.parametrize(
    "record",
    [
        {"messages": turns("a", "b", system="s"), "id": 7},
        {"prompt": turns("a", system="s"), "completion": [{"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        {"conversations": [{"from": r, "value": v} for r, v in (("system", "s"), ("user", "a"), ("assistant", "b"))]},
        {"instruction": "a", "input": "", "output": "b", "system": "s"},
        {"instruction": "a", "output": "b", "system": "s", "messages": None},
    ],
)
def test_every_shape_is_read(record):
    assert read_conversation(record, "f:1") == turns("a", "b", system="s")


def test_the_rest_of_the_shapes():
    assert read_conversation({"prompt": "a", "completion": "b"}, "f:1") == turns("a", "b")
    alpaca = {"instruction": "add", "input": "1 2", "output": "3", "system": ""}
    assert read_conversation(alpaca, "f:1") == turns("add\n\n1 2", "3")
    with_tool = [*turns("a", "call"), {"role": "tool", "content": "x"}, {"role": "tool", "content": "y"}]
    assert read_conversation({"messages": [*with_tool, turns("", "b")[1]]}, "f:1")[2:4] == with_tool[2:]


def test_parquet_and_shards(tmp_path):
    """Columns of one shape or of several; two shards merged are what one run writes."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table(
            {"messages": [turns("a", "b"), None], "prompt": [None, "c"], "completion": [None, "d"], "id": [1, 2]}
        ),
        tmp_path / "a.parquet",
    )
    write_records(tmp_path / "b.jsonl", {"messages": turns("a", "b")}, {"instruction": "e", "output": "f"})
    settings = {
        "input": [str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")],
        "sft": True,
        "tokenizer_model": str(BASE),
        "chat_template": str(write_template(tmp_path / "t.jinja", MARKED)),
        "dedup": True,
        "progress": SILENT,
    }
    whole = midus.preprocess(**settings, output_prefix=str(tmp_path / "whole"))
    assert whole.datasets[str(tmp_path / "whole_sft_document")].documents == 3 and whole.skipped.duplicates == 1
    for shard in ("0/2", "1/2"):
        midus.preprocess(**settings, output_prefix=str(tmp_path / "parts"), shard=shard)
    midus.merge(output_prefix=str(tmp_path / "parts"), progress=SILENT)
    for path in tmp_path.glob("whole_sft*"):
        assert path.read_bytes() == (tmp_path / path.name.replace("whole", "parts")).read_bytes(), path
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a.parquet: no column of a conversation \(messages, prompt, .*; columns there: 'text'"
    ):
        midus.preprocess(**settings, output_prefix=str(tmp_path / "other"))


MESSAGE = {"role": "user", "content": "a"}
BAD = {
    "an empty turn": ({"messages": turns("a", "  ")}, "turn 2 of 'messages' is empty; a turn needs text"),
    "two assistants in a row": (
        {"messages": [*turns("a", "b"), turns("", "c")[1]]},
        "turns 2 and 3 are both of 'assistant'; join them into one",
    ),
    "an unknown role": ({"messages": [MESSAGE, {"role": "bot", "content": "b"}]}, "turn 2 of 'messages' has the role 'bot'; known are"),
    "a role of the other shape": (
        {"messages": [MESSAGE, {"role": "gpt", "content": "b"}]},
        "has the role 'gpt'; known are system, user, assistant, tool",
    ),
    "two shapes": ({"messages": turns("a", "b"), "prompt": "a", "completion": "b"}, "has 'messages' and 'prompt'; a conversation has exactly one of"),
    "turns of another shape": ({"messages": [MESSAGE, {"from": "gpt", "value": "b"}]}, "turn 2 of 'messages' has 'from', 'value', not 'role' and 'content'"),
    "no shape": ({"text": "a"}, "has the keys 'text'; a conversation has exactly one of messages, prompt and completion,"),
    "no answer": ({"messages": turns("a", "b", "c")}, "the last turn is of 'user'; a conversation ends with the assistant's answer"),
    "no question": ({"messages": turns("a", "b")[1:]}, "turn 1 is of 'assistant' and answers nothing"),
    "a late system prompt": ({"messages": [*turns("a", "b"), *turns("c", "d", system="s")]}, "turn 3 is a system prompt; it can only come first"),
    "no completion": ({"prompt": "a", "text": "b"}, "no key 'completion'; keys there: 'prompt', 'text'"),
    "parts of content": ({"messages": [{"role": "user", "content": [{"type": "text"}]}, turns("", "b")[1]]}, "the content of turn 1 of 'messages' is list, not a string"),
    "calls of tools": ({"messages": [MESSAGE, {"role": "assistant", "content": "", "tool_calls": [1]}]}, "calls tools, which is not supported"),
    "no turns": ({"messages": []}, "'messages' is an empty list, not a list of turns"),
    "half a character": ({"prompt": "a", "completion": "\ud800"}, "'completion' contains half of a surrogate pair"),
    "no object": ("[1]", "a list, not a JSON object"),
    "no JSON": ('{"messages": ', "not JSON"),
    "alpaca's output": ({"instruction": "a", "output": ""}, "'output' is empty; a turn needs text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_conversation(name, tmp_path):
    record, message = BAD[name]
    write_records(tmp_path / "c.jsonl", {"messages": turns("fine", "yes")}, record)
    with pytest.raises(UserError) as error:
        preprocess(tmp_path, MARKED)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/c.jsonl:2: ")
    assert {p.name for p in tmp_path.iterdir()} == {"c.jsonl", "t.jinja"}
    # Left out and counted where that is asked for.
    result = preprocess(tmp_path, MARKED, skip_bad_lines=True)
    assert result.skipped.malformed == 1 and result.datasets[str(tmp_path / "out_sft_document")].documents == 1


def preprocess(tmp_path, template, **settings):
    return midus.preprocess(
        input=[str(tmp_path / "c.jsonl")],
        sft=True,
        tokenizer_model=str(BASE),
        chat_template=str(write_template(tmp_path / "t.jinja", template)),
        output_prefix=str(tmp_path / "out"),
        progress=SILENT,
        **settings,
    )


TEMPLATES = {
    "that forgets": (FORGETFUL, "the chat template has no generation marks and renders turn 2 in another way when other turns follow"),
    "without an end": (ENDLESS, "ends an answer with no special token, so the model would not learn to stop; add --append-eod"),
    "that refuses": ("{{ raise_exception('only poems') }}", "the chat template refuses this conversation: only poems"),
    "that is broken": ("{% for %}", "the chat template refuses this conversation: "),
    "with empty marks": ("{% generation %}{% endgeneration %}x", "the generation marks of the chat template hold no text"),
    "that is empty": (" \n", "t.jinja is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template(name, tmp_path):
    template, message = TEMPLATES[name]
    write_records(tmp_path / "c.jsonl", {"messages": turns("a", "b", "c", "d")})
    with pytest.raises(UserError) as error:
        preprocess(tmp_path, template)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"c.jsonl", "t.jinja"}


def test_settings_that_contradict(tmp_path):
    write_records(tmp_path / "c.jsonl", {"messages": turns("a", "b")})
    settings = {
        "input": [str(tmp_path / "c.jsonl")],
        "output_prefix": str(tmp_path / "out"),
        "tokenizer_model": str(BASE),
    }
    for more, message in (
        ({"sft": True}, "has no chat template; give one with --chat-template FILE"),
        ({"sft": True, "json_keys": ["a"]}, "--json-keys does not go with --sft"),
        ({"sft": True, "prepend_bos": True}, "--prepend-bos does not go with --sft"),
        ({"sft": True, "split_special_tokens": True}, "--split-special-tokens does not go with --sft"),
        ({"sft": True, "tokenizer_type": "SentencePieceTokenizer"}, "--sft needs a chat template, which SentencePieceTokenizer has not"),
        ({"chat_template": "t"}, "--chat-template t is of --sft; add it"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            midus.preprocess(**settings, **more, progress=SILENT)
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(UserError, match="c.txt is plain text and holds no conversations"):
        template = str(write_template(tmp_path / "t.jinja", MARKED))
        midus.preprocess(
            **{**settings, "input": [str(tmp_path / "c.txt")]}, sft=True, chat_template=template, progress=SILENT
        )
    assert not list(tmp_path.glob("out*"))
