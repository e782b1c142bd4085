"""Conversations -> token ids and which of them the model has to learn, by a tokenizer's own chat template. Imports no torch itself.

What the assistant says is known in one of two ways. A template with ``{% generation %}`` marks says it itself. For others a
turn is what the rendering of the conversation up to it adds to the rendering before it, generation prompt included; these
have to be prefixes of the whole. Either way the tokens before a turn must be those of the text before it alone: that is what
the model sees when it answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_midus.config.data import DataConfig
from megatron_midus.data.conversations import Message
from megatron_midus.data.corpus import MalformedDocument
from megatron_midus.data.tokenizer import Tokenizer, chat_template_of, load_hf_tokenizer
from megatron_midus.errors import UserError

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class ChatTemplate:
    """The chat template of a tokenizer, and what it needs to make ids of a conversation. Pickles small.

    Args:
        directory: of the Hugging Face tokenizer.
        template: file of a chat template to use instead of the tokenizer's own.
        append_eod: end a conversation with the end-of-document token, and learn it, where the template does not.

    Raises:
        UserError: no chat template, or a tokenizer without ``tokenizer.json``.
    """

    def __init__(self, directory: str | Path, *, template: str | Path | None = None, append_eod: bool = False) -> None:
        tokenizer = load_hf_tokenizer(directory)
        text = read_template(template) if template is not None else chat_template_of(tokenizer)
        if text is None:
            raise UserError(
                f"the tokenizer in {directory} has no chat template; give one with --chat-template FILE, or the tokenizer of the "
                "instruction-tuned model of the same family"
            )
        self.text = text
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"the tokenizer in {directory} has no tokenizer.json, which --sft needs; convert it first")
        self.has_marks = _MARK.search(self.text) is not None
        self._fast = tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()
        self._variables = dict(tokenizer.special_tokens_map)
        self._eod: int = tokenizer.eos_token_id
        self._append_eod = append_eod
        self._special = {number for number, token in self._fast.get_added_tokens_decoder().items() if token.special} | {
            self._eod
        }

    def encode(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[int], str]:
        """Ids, 1 for those that the assistant says (its end of turn included) and 0 for the rest, and the rendered text.

        Args:
            messages: see :func:`megatron_midus.data.conversations.read_conversation`.
            where: ``file:line``, for messages.

        Raises:
            MalformedDocument: a conversation that the template refuses, or changes so that no turn can be told.
            UserError: a template that does not end an answer with a special token, without ``append_eod``.
        """
        text, spans = self._render_marked(messages, where) if self.has_marks else self._render_spans(messages, where)
        # The last of the encodings is of the whole.
        ends = sorted({end for span in spans for end in span} | {len(text)})
        encoded = dict(zip(ends, self._encode([text[:end] for end in ends])))
        ids = encoded[len(text)]
        for end, prefix in encoded.items():
            if ids[: len(prefix)] != prefix:
                raise MalformedDocument(
                    f"{where}: a token holds both the text before and the text behind {text[max(0, end - 12) : end]!r}, where a "
                    "turn begins or ends; separate turns in the chat template by a special token or a line break"
                )
        learnt = [0] * len(ids)
        for start, end in spans:
            first, behind = len(encoded[start]), len(encoded[end])
            if not self.has_marks:
                behind = self._end_of_turn(ids, first, behind)
            learnt[first:behind] = [1] * (behind - first)
        if 1 not in learnt:
            raise MalformedDocument(f"{where}: no token of an answer is left behind the chat template")
        return *self._ended(ids, learnt, where), text

    def _ended(self, ids: list[int], learnt: list[int], where: str) -> tuple[list[int], list[int]]:
        last = max(index for index, value in enumerate(learnt) if value)
        if self._append_eod and ids[last] != self._eod:
            # Some templates have it behind their marks.
            if ids[last + 1 : last + 2] != [self._eod]:
                ids, learnt = [*ids[: last + 1], self._eod], [*learnt[: last + 1], 0]
            learnt[last + 1] = 1
        elif ids[last] not in self._special:
            raise UserError(
                f"{where}: the chat template ends an answer with no special token, so the model would not learn to stop; "
                "add --append-eod, or the token to the template"
            )
        return ids, learnt

    def _end_of_turn(self, ids: list[int], first: int, behind: int) -> int:
        """Leaves out the white space behind the token that ends a turn: the model stops before it."""
        end = behind
        while end > first and ids[end - 1] not in self._special:
            end -= 1
        if end > first and not self._fast.decode(ids[end:behind], skip_special_tokens=False).strip():
            return end
        return behind

    # -- the text --------------------------------------------------------------------------------------------------
    def _render_marked(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        text, indices = self._render(messages, where, marked=True)
        spans = [(start, end) for start, end in indices if end > start]
        if not spans:
            raise MalformedDocument(
                f"{where}: the generation marks of the chat template hold no text of this conversation"
            )
        return text, spans

    def _render_spans(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        whole, _ = self._render(messages, where)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:number], where, add_generation_prompt=True)
            with_turn, _ = self._render(messages[: number + 1], where)
            if not (whole.startswith(with_turn) and with_turn.startswith(before) and len(with_turn) > len(before)):
                raise MalformedDocument(
                    f"{where}: the chat template has no generation marks and renders turn {number + 1} in another way when "
                    "other turns follow, so its tokens cannot be told; add {% generation %} marks to the template"
                )
            spans.append((len(before), len(with_turn)))
        return whole, spans

    def _render(
        self, messages: Sequence[Message], where: str, *, marked: bool = False, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, indices = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.text,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (TemplateError, TypeError) as error:
            raise MalformedDocument(f"{where}: the chat template refuses this conversation: {error}") from None
        return texts[0], [tuple(span) for span in indices[0]] if marked else []

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    @property
    def digest(self) -> str:
        """SHA-256 of the template."""
        return template_digest(self.text)


def template_digest(text: str) -> str:
    """SHA-256 of a template."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_template(path: str | Path) -> str:
    """The text of the file of a chat template; ``UserError`` when it is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--chat-template {path} is not UTF-8") from None
    if not text.strip():
        raise UserError(f"--chat-template {path} is empty")
    return text


def template_of_run(config: DataConfig, tokenizer: Tokenizer) -> str | None:
    """The chat template of a fine-tuning run: ``--chat-template``, or the tokenizer's own."""
    if config.chat_template is not None:
        return read_template(config.chat_template)
    return getattr(tokenizer, "chat_template", None)
