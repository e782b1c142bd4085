"""A conversation with a model, through the chat template of its tokenizer: history, streamed answers, a limit of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_midus.errors import UserError


class Conversation:
    """Messages so far, and the model that answers them.

    Args:
        model: a transformers model with ``generate``.
        tokenizer: the transformers tokenizer of this model.
        where: name of the model, for messages.
        system: system prompt; ``None`` leaves the template's own.
        max_new_tokens: of one answer.
        temperature: 0 = the most likely token every time.
        seed: of the sampling; a conversation with the same questions has the same answers.

    Raises:
        UserError: a tokenizer without a chat template, or one that takes no system prompt.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        where: str,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {where} has no chat template, so the model was not made for conversations; "
                "continue text with midus generate, or fine-tune it on conversations first"
            )
        self._model, self._tokenizer, self._where = model, tokenizer, where
        self._system = system
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system prompt."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        torch.manual_seed(self._seed)

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """Answers ``text``; ``write`` gets the answer piece by piece.

        The oldest questions and answers are dropped where all of them do not fit the model's positions. An answer that is
        interrupted (``KeyboardInterrupt``) stands in the history as far as it came.

        Raises:
            UserError: one question alone does not fit.
        """
        self.messages, ids = self._fitting([*self.messages, {"role": "user", "content": text}])
        streamer = _streamer(self._tokenizer, write)
        sampling = {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
        inputs = torch.tensor([ids], device=next(self._model.parameters()).device)  # [1, s]
        try:
            with torch.inference_mode():
                self._model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=self._max_new_tokens,
                    eos_token_id=self._ends(),
                    pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
                    streamer=streamer,
                    **sampling,
                )
        finally:
            answer = streamer.said.strip()
            self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _ends(self) -> list[int] | None:
        """Tokens that end an answer: those of the generation configuration and of the tokenizer, which often differ."""
        configured = getattr(self._model.generation_config, "eos_token_id", None)
        found = {*(configured if isinstance(configured, list) else [configured]), self._tokenizer.eos_token_id}
        return sorted(found - {None}) or None

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The newest of ``messages`` that leave room for an answer, and their ids."""
        longest = getattr(self._model.config, "max_position_embeddings", None)
        first = int(self._system is not None)
        while True:
            ids = self._render(messages)
            if longest is None or len(ids) + self._max_new_tokens <= longest:
                return messages, ids
            if len(messages) - first < 3:
                raise UserError(
                    f"{len(ids)} tokens and an answer of {self._max_new_tokens} exceed the {longest} positions of {self._where}; "
                    "ask less at once, or choose a smaller --generate-tokens"
                )
            messages = messages[:first] + messages[first + 2 :]

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise UserError(f"the chat template of {self._where} refuses this conversation: {error}") from None
        # The template has written the special tokens.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """transformers' streamer, which waits for whole words, with what was said so far in ``said``."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        said = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.said += text
            if text:
                write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
