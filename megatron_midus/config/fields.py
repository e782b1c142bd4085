"""One dataclass field = one command-line flag: the string under a field is its ``--help``, its type the parser."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from typing import Any, Literal, TypeVar, Union

Config = TypeVar("Config")


def field_docs(cls: type) -> dict[str, str]:
    """Returns ``{field name: docstring below it}`` of a dataclass, base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:]):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs


def flag_name(field_name: str) -> str:
    """``num_layers`` -> ``--num-layers``."""
    return "--" + field_name.replace("_", "-")


def _argparse_kwargs(annotation: Any) -> dict[str, Any]:
    """Translates a type annotation into keyword arguments of ``add_argument``."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        assert len(inner) == 1, f"only Optional unions can be a flag, not {annotation}"
        return _argparse_kwargs(inner[0])
    if origin is Literal:
        choices = typing.get_args(annotation)
        return {"type": type(choices[0]), "choices": list(choices)}
    if origin in (list, tuple):
        element = [a for a in typing.get_args(annotation) if a is not Ellipsis][0]
        return {"nargs": "+", **_argparse_kwargs(element)}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    assert annotation in (int, float, str), f"no flag can be made of {annotation}"
    return {"type": annotation}


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, with its factory called; ``None`` for a field that must be given."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def add_arguments(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    title: str | None = None,
    exclude: tuple[str, ...] = (),
    suppress_defaults: bool = False,
) -> None:
    """Adds one argument group with a flag per field of dataclass ``cls``.

    Args:
        parser: receives the group.
        cls: a dataclass whose fields carry docstrings.
        title: heading in ``--help``; the first line of the class docstring when absent.
        exclude: field names that get no flag (``metadata={"flag": False}`` on the field does the same).
        suppress_defaults: leave flags that were not given out of the namespace, so that a caller can tell.
    """
    group = parser.add_argument_group(title or inspect.cleandoc(cls.__doc__ or cls.__name__).splitlines()[0])
    docs = field_docs(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in exclude or not field.metadata.get("flag", True):
            continue
        default = default_of(field)
        kwargs = _argparse_kwargs(hints[field.name])
        text = " ".join(docs.get(field.name, "").split()).replace("%", "%%")
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        kwargs["help"] = text + ("" if default is None or default == [] else f" (default: {shown})")
        kwargs["default"] = argparse.SUPPRESS if suppress_defaults else default
        # An alias that begins with "--" is taken literally: Megatron spells some flags with both dashes and underscores.
        aliases = [a if a.startswith("--") else flag_name(a) for a in field.metadata.get("aliases", ())]
        group.add_argument(flag_name(field.name), *aliases, dest=field.name, **kwargs)


def from_namespace(cls: type[Config], namespace: argparse.Namespace) -> Config:
    """Builds ``cls`` from the attributes of ``namespace`` that bear its field names; its own defaults for the rest."""
    known = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls) if hasattr(namespace, f.name)}  # type: ignore[arg-type]
    return cls(**known)
