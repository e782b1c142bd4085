"""``midus chat``: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable

from megatron_midus.config.chat import ChatConfig
from megatron_midus.data.tokenizer import load_hf_tokenizer
from megatron_midus.errors import UserError
from megatron_midus.evaluation.conversation import Conversation
from megatron_midus.evaluation.loading import choose_device, load_model, read_config
from megatron_midus.hub import fetched_model, short_name
from megatron_midus.progress import Progress
from megatron_midus.verbs.verb import verb

_HELP = "/reset begins anew, /exit ends, Ctrl-C stops an answer"


@verb(ChatConfig)
def chat(config: ChatConfig, progress: Progress) -> Conversation:
    """Loads a model to talk to: ``chat(model="midus_hf").ask("Hello", print)``. See ``ChatConfig`` for the settings.

    Raises:
        UserError: a model that cannot be loaded, a tokenizer without a chat template.
    """
    directory = fetched_model(config.model)
    read_config(directory)
    tokenizer = load_hf_tokenizer(directory)
    runtime, sampling = config.runtime, config.sampling
    model = load_model(
        directory,
        dtype=runtime.dtype,
        device=choose_device(runtime.device),
        trust_remote_code=runtime.trust_remote_code,
    )
    return Conversation(
        model,
        tokenizer,
        where=short_name(directory),
        system=config.system,
        max_new_tokens=sampling.generate_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
    )


def talk(conversation: Conversation, lines: Iterable[str]) -> None:
    """Answers ``lines`` on standard output until they end or one of them says so."""
    for line in lines:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            print("(a new conversation)")
        elif text.startswith("/"):
            print(_HELP)
        elif text:
            _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    try:
        conversation.ask(text, lambda piece: print(piece, end="", flush=True))
        print()
    except KeyboardInterrupt:
        print(" (stopped)")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)


def _typed() -> Iterable[str]:
    """Lines with a prompt, and with the editing keys of a terminal where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input(">>> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f" ({_HELP})")


def command(config: ChatConfig) -> int:
    """``midus chat``."""
    conversation = chat(config)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(_HELP)
    talk(conversation, _typed() if is_terminal else sys.stdin)
    return 0
