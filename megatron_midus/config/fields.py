"""One dataclass field = one command-line flag: the string under a field is its ``--help``, its type the parser."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from typing import Any, TypeVar

from megatron_midus.config.values import has_default, kind_of

Config = TypeVar("Config")


@functools.cache  # reading a class's source takes longer than all else that makes a parser
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
    """What a type annotation says, as keyword arguments of ``add_argument``."""
    kind = kind_of(annotation)
    if kind.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    assert kind.type in (int, float, str), f"no flag can be made of {annotation}"
    kwargs: dict[str, Any] = {"type": kind.type}
    if kind.choices:
        kwargs["choices"] = list(kind.choices)
    if kind.is_list:
        kwargs["nargs"] = "+"
    return kwargs


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, with its factory called; ``None`` for a field that must be given."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def part(cls: type, *, title: str | None = None, given_only: bool = False) -> Any:
    """A field that holds another dataclass, whose fields become flags of their own under ``title``.

    With ``given_only`` the field is a dict of what was given and no defaults, because something else (a checkpoint)
    says the rest.
    """
    return dataclasses.field(
        default_factory=dict if given_only else cls,
        metadata={"part": cls, "title": title, "given_only": given_only},
    )


def parts_of(cls: type) -> list[dataclasses.Field]:
    """The fields of ``cls`` made by ``part``."""
    return [field for field in dataclasses.fields(cls) if "part" in field.metadata]


def add_arguments(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    title: str | None = None,
    exclude: tuple[str, ...] = (),
    suppress_defaults: bool = False,
) -> None:
    """Adds one argument group with a flag per field of dataclass ``cls``, and a group for each of its parts.

    A field without a default must be given. ``metadata`` of a field: ``flag=False`` (no flag), ``aliases`` (other
    names of the flag), ``metavar``, ``nargs``, ``positional=True`` (no dashes), ``const`` (the flag alone means this value),
    ``append=True`` (a list flag that is given twice adds), ``separator`` (of values inside one word of a list).

    Args:
        parser: receives the group.
        cls: a dataclass whose fields carry docstrings.
        title: heading in ``--help``; the first line of the class docstring when absent.
        exclude: field names that get no flag.
        suppress_defaults: leave flags that were not given out of the namespace, so that a caller can tell.
    """
    own = [f for f in dataclasses.fields(cls) if "part" not in f.metadata]
    own = [f for f in own if f.name not in exclude and f.metadata.get("flag", True)]
    if own:
        group = parser.add_argument_group(title or heading_of(cls))
        docs, hints = field_docs(cls), typing.get_type_hints(cls)
        for field in own:
            _add_flag(group, field, hints[field.name], docs.get(field.name, ""), suppress_defaults)
    for field in parts_of(cls):
        inner, given_only = field.metadata["part"], field.metadata["given_only"]
        add_arguments(parser, inner, title=field.metadata["title"], suppress_defaults=given_only or suppress_defaults)


def heading_of(cls: type) -> str:
    """The first line of a class's docstring, which heads its flags."""
    return inspect.cleandoc(cls.__doc__ or cls.__name__).splitlines()[0]


def _add_flag(group: Any, field: dataclasses.Field, hint: Any, doc: str, suppress_defaults: bool) -> None:
    metadata, default = field.metadata, default_of(field)
    kwargs = _argparse_kwargs(hint)
    text = " ".join(doc.split()).replace("%", "%%")
    shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
    kwargs["help"] = text + ("" if default is None or default in ([], "") else f" (default: {shown})")
    if "nargs" in metadata:
        kwargs["nargs"] = metadata["nargs"]
    if "metavar" in metadata:
        kwargs["metavar"] = metadata["metavar"]
    if metadata.get("positional"):
        group.add_argument(field.name, **kwargs)
        return
    if "const" in metadata:
        kwargs |= {"nargs": "?", "const": metadata["const"]}
    if metadata.get("append"):
        kwargs["action"] = "extend"
    if "separator" in metadata:
        kwargs |= {"action": _Separated, "separator": metadata["separator"]}
    is_required = not has_default(field) and not suppress_defaults
    # A flag that adds must begin with what was given, not with its default.
    kwargs["default"] = argparse.SUPPRESS if suppress_defaults or metadata.get("append") else default
    # An alias that begins with "--" is taken literally: Megatron spells some flags with both dashes and underscores.
    aliases = [a if a.startswith("--") else flag_name(a) for a in metadata.get("aliases", ())]
    group.add_argument(flag_name(field.name), *aliases, dest=field.name, required=is_required, **kwargs)


class _Separated(argparse.Action):
    """A list whose words may hold several values: ``--tasks a,b c``."""

    def __init__(self, *args: Any, separator: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.separator = separator

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parts = (part.strip() for word in values for part in word.split(self.separator))
        setattr(namespace, self.dest, [part for part in parts if part])


def from_namespace(cls: type[Config], namespace: argparse.Namespace) -> Config:
    """Builds ``cls`` from the attributes of ``namespace`` that bear its field names; its own defaults for the rest."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if "part" not in field.metadata:
            if hasattr(namespace, field.name):
                values[field.name] = getattr(namespace, field.name)
        elif field.metadata["given_only"]:
            values[field.name] = given(field.metadata["part"], namespace)
        else:
            values[field.name] = from_namespace(field.metadata["part"], namespace)
    return cls(**values)


def given(cls: type, namespace: argparse.Namespace) -> dict[str, Any]:
    """The flags of ``cls`` that stand in ``namespace``, as a dict."""
    names = [field.name for field in dataclasses.fields(cls) if field.metadata.get("flag", True)]
    return {name: getattr(namespace, name) for name in names if hasattr(namespace, name)}
