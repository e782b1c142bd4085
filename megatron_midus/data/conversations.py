"""Conversations from records of four shapes, as messages with the roles that chat templates know. Imports neither torch nor Megatron.

===============  =====================================================================================================
messages         ``{"messages": [{"role": …, "content": …}, …]}``
prompt           ``{"prompt": …, "completion": …}``, texts or lists of messages
ShareGPT         ``{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …], "system": …}``
Alpaca           ``{"instruction": …, "input": …, "output": …, "system": …}``; ``input`` follows behind a blank line
===============  =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_midus.data.corpus import MalformedDocument, check_encodable
from megatron_midus.errors import UserError

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
# The keys by which a shape is known, and all that are read of it. Others (ids, sources, scores) are passed over.
_SHAPES = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "conversations": ("conversations", "system"),
    "instruction": ("instruction", "input", "output", "system"),
}
KEYS = tuple(dict.fromkeys(key for keys in _SHAPES.values() for key in keys))
_NAMES = {
    "messages": "messages",
    "prompt": "prompt and completion",
    "conversations": "conversations (ShareGPT)",
    "instruction": "instruction and output (Alpaca)",
}
_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "observation": "tool",
}


def read_conversation(record: dict[str, Any], where: str) -> list[Message]:
    """The messages of one record.

    Args:
        record: an object of a .jsonl file.
        where: ``file:line``, for messages.

    Returns:
        A system prompt if there is one, then questions and answers in turn, an answer last; no content is blank.

    Raises:
        MalformedDocument: no known shape or several, an unknown role, a turn without text, roles out of order.
    """
    # None is what a column of parquet holds where a row has nothing.
    record = {key: value for key, value in record.items() if value is not None}
    shapes = [shape for shape in _SHAPES if shape in record]
    if len(shapes) != 1:
        there = f"has {' and '.join(map(repr, shapes))}" if shapes else f"has the keys {_shown(record)}"
        raise MalformedDocument(f"{where}: {there}; a conversation has exactly one of {', '.join(_NAMES.values())}")
    messages = _READERS[shapes[0]](record, where)
    _check_order(messages, where)
    return messages


def check_columns(columns: Sequence[str], name: str) -> None:
    """Raises ``UserError`` where no column of the table ``name`` is one of a conversation."""
    if not set(columns) & set(KEYS):
        shown = ", ".join(map(repr, columns[:8])) or "none"
        raise UserError(f"{name}: no column of a conversation ({', '.join(KEYS)}); columns there: {shown}")


def _from_messages(record: dict[str, Any], where: str) -> list[Message]:
    return _turns(record["messages"], "messages", where)


def _from_prompt(record: dict[str, Any], where: str) -> list[Message]:
    messages: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = _get(record, key, where)
        messages += _turns(value, key, where) if isinstance(value, list) else [_message(role, value, key, where)]
    return messages


def _from_sharegpt(record: dict[str, Any], where: str) -> list[Message]:
    turns = _turns(record["conversations"], "conversations", where, role_key="from", text_key="value")
    return [*_system(record, where), *turns]


def _from_alpaca(record: dict[str, Any], where: str) -> list[Message]:
    question = _text(_get(record, "instruction", where), "instruction", where)
    context = record.get("input", "")
    if not isinstance(context, str):
        raise MalformedDocument(f"{where}: 'input' is {type(context).__name__}, not a string")
    question = f"{question}\n\n{context}" if context.strip() else question
    answer = _text(_get(record, "output", where), "output", where)
    return [
        *_system(record, where),
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


_READERS = {
    "messages": _from_messages,
    "prompt": _from_prompt,
    "conversations": _from_sharegpt,
    "instruction": _from_alpaca,
}


def _system(record: dict[str, Any], where: str) -> list[Message]:
    """A system prompt beside the turns, which many files have and leave empty."""
    text = record.get("system", "")
    return [] if text == "" else [_message("system", text, "system", where)]


def _turns(value: object, key: str, where: str, *, role_key: str = "role", text_key: str = "content") -> list[Message]:
    if not isinstance(value, list) or not value:
        raise MalformedDocument(f"{where}: {key!r} is {_kind(value)}, not a list of turns")
    messages = []
    for number, turn in enumerate(value, start=1):
        name = f"turn {number} of {key!r}"
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            there = _shown(turn) if isinstance(turn, dict) else _kind(turn)
            raise MalformedDocument(f"{where}: {name} has {there}, not {role_key!r} and {text_key!r}")
        if turn.get("tool_calls"):
            raise MalformedDocument(
                f"{where}: {name} calls tools, which is not supported; leave such conversations out"
            )
        role = turn[role_key]
        known = _SHAREGPT_ROLES if role_key == "from" else {role: role for role in ROLES}
        if not isinstance(role, str) or role not in known:
            raise MalformedDocument(f"{where}: {name} has the role {role!r}; known are {', '.join(known)}")
        messages.append(_message(known[role], turn[text_key], name, where))
    return messages


def _message(role: str, text: object, name: str, where: str) -> Message:
    return {"role": role, "content": _text(text, name, where)}


def _text(value: object, name: str, where: str) -> str:
    name = name if name.startswith("turn") else repr(name)
    if not isinstance(value, str):
        raise MalformedDocument(f"{where}: the content of {name} is {_kind(value)}, not a string")
    if not value.strip():
        raise MalformedDocument(f"{where}: {name} is empty; a turn needs text")
    check_encodable(value, name, where)
    return value


def _get(record: dict[str, Any], key: str, where: str) -> object:
    if key not in record:
        raise MalformedDocument(f"{where}: no key {key!r}; keys there: {_shown(record)}")
    return record[key]


def _check_order(messages: Sequence[Message], where: str) -> None:
    """A system prompt at most at the beginning; then answers follow questions, and tools' results answers that asked."""
    before = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and number > 1:
            raise MalformedDocument(f"{where}: turn {number} is a system prompt; it can only come first")
        if role == before and role != "tool":
            raise MalformedDocument(
                f"{where}: turns {number - 1} and {number} are both of {role!r}; join them into one"
            )
        if (role == "assistant" and before in (None, "system")) or (
            role == "tool" and before not in ("assistant", "tool")
        ):
            raise MalformedDocument(
                f"{where}: turn {number} is of {role!r} and answers nothing; a user has to ask first"
            )
        before = role
    if before != "assistant":
        raise MalformedDocument(
            f"{where}: the last turn is of {before!r}; a conversation ends with the assistant's answer"
        )


def _kind(value: object) -> str:
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {type(value).__name__}"
    return type(value).__name__


def _shown(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(record)[:8])) or "none"
