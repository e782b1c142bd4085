"""One conversion of values for all that sets a field: flags, ``--config`` files, experiments, recipes, keywords of a call.

Strict about keys and types; every mistake is one line that says where.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

from megatron_midus.errors import UserError

Config = TypeVar("Config")

_POWERS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field may hold.

    Attributes:
        type: bool, int, float, str, dict, a dataclass, or ``object`` for anything; of the elements of a list.
        choices: the only values; empty = no such limit.
        is_list: whether it is a list of them.
        is_optional: whether ``None`` is one of its values.
    """

    type: type
    choices: tuple[Any, ...] = ()
    is_list: bool = False
    is_optional: bool = False


def kind_of(annotation: Any) -> Kind:
    """What an annotation of a dataclass field says."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        assert len(inner) == 1, f"only Optional unions can be a field, not {annotation}"
        return dataclasses.replace(kind_of(inner[0]), is_optional=True)
    if origin is Literal:
        return Kind(type(arguments[0]), choices=arguments)
    if origin in (list, tuple):
        return dataclasses.replace(kind_of(arguments[0]), is_list=True)
    if annotation is Any:
        return Kind(object, is_optional=True)
    return Kind(origin or annotation)


def convert(kind: Kind, value: Any, where: str) -> Any:
    """A value as its field wants it. One value where a list may stand is a list of one.

    Raises:
        UserError: it is of another type; begins with ``where``.
    """
    if value is None and kind.is_optional:
        return None
    if kind.is_list and isinstance(value, (list, tuple)):
        return [_convert_one(kind, element, f"{where}[{i}]") for i, element in enumerate(value)]
    one = _convert_one(kind, value, where)
    return [one] if kind.is_list else one


def _convert_one(kind: Kind, value: Any, where: str) -> Any:
    if kind.type is object:
        return value
    if dataclasses.is_dataclass(kind.type):
        return build(kind.type, value, where)
    if kind.type is dict:
        return _mapping(value, where)
    try:
        found = scalar(kind.type, value)
        check_choice(found, kind.choices)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return found


def build(cls: type[Config], values: Any, where: str) -> Config:
    """Makes dataclass ``cls`` of a mapping. Fields of its parts (``fields.part``) stand beside its own.

    Args:
        cls: its fields may be bool, int, float, str, ``Literal``, ``Optional``, lists, ``dict`` and dataclasses.
        values: what YAML gave, or keywords.
        where: names the mapping in messages, for instance ``experiment.yaml: arms[2]``.

    Raises:
        UserError: an unknown key (with the nearest known one), a missing key, a value of another type; whatever the
            dataclass itself refuses, with ``where`` before it.
    """
    values = _mapping(values, where)
    check_keys(values, _field_names(cls), where)
    return _build(cls, values, where)


def _field_names(cls: type) -> list[str]:
    """Of a dataclass and its parts."""
    names: list[str] = []
    for field in dataclasses.fields(cls):
        names += _field_names(field.metadata["part"]) if "part" in field.metadata else [field.name]
    return names


def _build(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if "part" not in field.metadata:
            if field.name not in values and not has_default(field):
                raise UserError(f"{where}: {field.name!r} is missing")
        elif field.metadata["given_only"]:
            found[field.name] = _converted(field.metadata["part"], values, where)
        else:
            found[field.name] = _build(field.metadata["part"], values, where)
    found |= _converted(cls, values, where)
    try:
        return cls(**found)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _converted(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those of ``values`` that are fields of ``cls`` itself."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.name in values and "part" not in field.metadata]
    return {name: convert(kind_of(hints[name]), values[name], f"{where}: {name}") for name in names}


def has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def check_keys(found: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ``UserError`` for the first key that is not known, with the nearest one that is."""
    known = list(known)
    for key in found:
        if key not in known:
            remedy = did_you_mean(key, known, otherwise=f"choose one of {', '.join(known)}")
            raise UserError(f"{where}: unknown key {key!r}{remedy}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where}: {_shown(value)} is not a mapping of 'key: value' lines")
    return value


# -- single values -----------------------------------------------------------------------------------------------------
def scalar(kind: type, value: Any) -> Any:
    """One value as a bool, int, float or str, also where a file or a command line gives it as a text.

    Raises:
        UserError: it is none; the message does not say where.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, (list, tuple)):
        raise UserError("a list, where one value is expected")
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{_shown(value)} is not true or false")
        return value
    if kind is str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise UserError(f"{_shown(value)} is not a text; put it in quotes")
        return str(value)
    assert kind in (int, float), f"no rule for {kind}"
    number = None if isinstance(value, bool) else parse_number(value)
    if number is None or (kind is int and number != int(number)):
        raise UserError(f"{_shown(value)} is not {'a whole number' if kind is int else 'a number'}")
    return kind(number)


def parse_number(value: Any) -> float | None:
    """A finite number, also where YAML 1.1 sees a text: ``1e-3``, ``2_000_000``, ``2e6``, ``1.5G`` (k, M, G, T, P, E)."""
    number: float
    if isinstance(value, (int, float)):
        number = value
    elif isinstance(value, str):
        text = value.strip()
        factor = _POWERS.get(text[-1:], 1)
        text = text[:-1] if factor > 1 else text
        try:
            # An integer stays exact beyond 2**53.
            number = int(text) * factor
        except ValueError:
            try:
                number = float(text) * factor
            except ValueError:
                return None
    else:
        return None
    try:
        return number if math.isfinite(number) else None
    except OverflowError:  # an integer beyond all floats
        return None


def check_choice(value: Any, choices: Iterable[Any]) -> None:
    """Raises ``UserError`` with the nearest choice for a value that is none; without choices all values are."""
    choices = tuple(choices)
    if choices and value not in choices:
        raise UserError(not_one_of(value, choices))


def not_one_of(value: Any, choices: Iterable[Any]) -> str:
    """What is wrong with a value that is none of ``choices``."""
    names = [str(choice) for choice in choices]
    return f"{_shown(value)} is not one of {', '.join(names)}{did_you_mean(str(value), names)}"


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """``"; did you mean X?"`` with the nearest of ``known``, else ``otherwise`` behind the same semicolon, else nothing.

    Case, and ``_`` for ``-``, count for nothing.
    """
    spellings = {_plain(name): name for name in known}
    near = difflib.get_close_matches(_plain(word), spellings, n=1)
    if near:
        return f"; did you mean {spellings[near[0]]}?"
    return f"; {otherwise}" if otherwise else ""


def _plain(word: str) -> str:
    return word.lower().replace("_", "-")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
