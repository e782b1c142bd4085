"""Conversations through a chat template, against the ids that transformers' own functions give."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pexpect
import pytest
import torch

import megatron_midus as midus
from megatron_midus.errors import UserError
from megatron_midus.progress import SILENT
from megatron_midus.verbs.chat import talk

BASE = Path(__file__).parents[3] / "examples" / "tiny_base"
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role == 'assistant' %}{{ raise_exception('begin with a question') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(BASE, target, ignore=shutil.ignore_patterns("recipe"))
    config = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return target


def open_at(directory: Path, *, system: str | None = None, generate_tokens: int = 8):
    return midus.chat(model=str(directory), system=system, generate_tokens=generate_tokens, progress=SILENT)


def expected_answer(conversation, rendered: str, tokens: int) -> str:
    tokenizer, model = conversation._tokenizer, conversation._model
    ids = torch.tensor([tokenizer(rendered, add_special_tokens=False)["input_ids"]])
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_the_history_goes_through_the_template_and_answers_are_streamed(directory):
    conversation = open_at(directory, system="Be brief.", generate_tokens=12)
    pieces: list[str] = []
    first = conversation.ask("What is a list?", pieces.append)
    assert first == expected_answer(conversation, "<system>Be brief.\n<user>What is a list?\n<assistant>", 12)
    assert "".join(pieces).strip() == first and len(pieces) > 1
    second = conversation.ask("What is a number?", pieces.append)
    history = f"<system>Be brief.\n<user>What is a list?\n<assistant>{first}\n<user>What is a number?\n<assistant>"
    assert second == expected_answer(conversation, history, 12)
    conversation.reset()
    assert conversation.ask("What is a list?", pieces.append) == first


def test_the_oldest_exchanges_make_room(directory):
    conversation = open_at(directory, generate_tokens=8)
    conversation._model.config.max_position_embeddings = 64
    for number in range(5):
        conversation.ask(f"Question {number}: what is a list?", lambda piece: None)
    contents = [message["content"] for message in conversation.messages]
    assert "Question 4: what is a list?" in contents and "Question 0: what is a list?" not in contents
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * (len(contents) // 2)
    with pytest.raises(UserError, match="exceed the 64 positions of model; ask less at once"):
        conversation.ask("word " * 80, lambda piece: None)
    assert [message["content"] for message in conversation.messages] == contents


def test_commands(directory, capsys):
    conversation = open_at(directory, generate_tokens=4)
    talk(conversation, ["Hello\n", "/what\n", "/reset\n", "\n", "Hello\n", "/exit\n", "Hello\n"])
    answer, again = capsys.readouterr().out.split("(a new conversation)\n")
    help_text = answer.splitlines()[-1]
    assert "begins anew" in help_text and answer == again + help_text + "\n" and again.strip()


def test_an_answer_that_is_stopped_stands_as_far_as_it_came(directory, capsys):
    conversation = open_at(directory, generate_tokens=40)

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("What is a list?", stop)
    assert conversation.messages[-1]["role"] == "assistant"
    conversation.ask("Go on", lambda piece: None)


def test_mistakes_are_one_line(directory):
    with pytest.raises(UserError, match="has no chat template, so the model was not made for conversations"):
        open_at(BASE)
    conversation = open_at(directory)
    conversation.messages = [{"role": "assistant", "content": "I begin."}]
    with pytest.raises(UserError, match="the chat template of model refuses this conversation: begin with a question"):
        conversation.ask("Hello", lambda piece: None)


def test_in_a_terminal(directory):
    terminal = pexpect.spawn(
        sys.executable,
        ["-m", "megatron_midus", "chat", str(directory), "--generate-tokens", "6"],
        timeout=120,
        encoding="utf8",
        # A shell's background jobs ignore it, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    terminal.expect("Ctrl-C stops an answer")
    terminal.expect(">>> ")
    terminal.sendline("What is a list?")
    terminal.expect(">>> ")
    assert terminal.before.strip()
    terminal.sendintr()
    terminal.expect("/exit ends")
    terminal.sendline("/exit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
