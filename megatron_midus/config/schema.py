"""Mappings (YAML, keywords of a call) into dataclasses: strict about keys and types, every mistake one line that says where."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, Union

from megatron_midus.config.parser import did_you_mean
from megatron_midus.errors import UserError

Config = TypeVar("Config")


def build(cls: type[Config], values: Any, where: str) -> Config:
    """Makes dataclass ``cls`` of a mapping.

    Args:
        cls: its fields may be bool, int, float, str, ``Literal``, ``Optional``, lists, ``dict`` and dataclasses.
        values: what YAML gave.
        where: names the mapping in messages, for instance ``experiment.yaml: arms[2]``.

    Raises:
        ValueError: an unknown key (with the nearest known one), a missing key, a value of another type; whatever the
            dataclass itself refuses, with ``where`` before it.
    """
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{where}: {_shown(values)} is not a mapping of 'key: value' lines")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_keys(values, fields, where)
    hints = typing.get_type_hints(cls)
    for field in fields.values():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in values and not has_default:
            raise UserError(f"{where}: {field.name!r} is missing")
    found = {name: convert(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return cls(**found)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def check_keys(found: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ``ValueError`` for the first key that is not known, with the nearest one that is."""
    known = list(known)
    for key in found:
        if key not in known:
            remedy = did_you_mean(key, known, otherwise=f"choose one of {', '.join(known)}")
            raise UserError(f"{where}: unknown key {key!r}{remedy}")


def convert(annotation: Any, value: Any, where: str) -> Any:
    """One value as its annotation wants it; raises ``ValueError``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        (inner,) = [a for a in arguments if a is not type(None)]
        return None if value is None else convert(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: {_shown(value)} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is list:
        # One value where a list may stand is a list of one.
        elements = value if isinstance(value, list) else [value]
        return [convert(arguments[0], element, f"{where}[{i}]") for i, element in enumerate(elements)]
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise UserError(f"{where}: {_shown(value)} is not a mapping of 'key: value' lines")
        return value
    if dataclasses.is_dataclass(annotation):
        return build(annotation, value, where)  # type: ignore[arg-type]
    return _scalar(annotation, value, where)


def _scalar(annotation: type, value: Any, where: str) -> Any:
    if annotation is bool or annotation is str:
        if not isinstance(value, annotation):
            kind = "true or false" if annotation is bool else "a text; put it in quotes"
            raise UserError(f"{where}: {_shown(value)} is not {kind}")
        return value
    assert annotation in (int, float), f"no rule for {annotation}"
    number = None if isinstance(value, bool) else parse_number(value)
    if number is None or not math.isfinite(number) or (annotation is int and number != int(number)):
        kind = "a whole number" if annotation is int else "a number"
        raise UserError(f"{where}: {_shown(value)} is not {kind}")
    return annotation(number)


def parse_number(value: Any) -> float | None:
    """A number, also where YAML 1.1 sees a text: ``1e-3``, ``2_000_000``, ``2e6``, ``1.5G`` (k, M, G, T, P, E)."""
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, str):
        return None
    text, factor = value.strip(), 1.0
    if text and text[-1] in (powers := {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}):
        text, factor = text[:-1], powers[text[-1]]
    try:
        return float(text) * factor
    except ValueError:
        return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
