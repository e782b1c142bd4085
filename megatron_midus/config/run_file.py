"""Command lines kept in YAML: ``--config run.yaml`` beside flags, and the file that says a run again.

A key is the name of a flag without its dashes, with ``-`` or ``_`` inside. Flags on the command line win over the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_midus.config.fields import default_of
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.values import Kind, convert, did_you_mean
from megatron_midus.errors import UserError

CONFIG_FLAG = "--config"


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config FILE`` to the help of a parser; ``parse_arguments_with_file`` reads it."""
    parser.add_argument(
        CONFIG_FLAG,
        metavar="FILE",
        help="YAML file with values of these flags (lr: 1e-4); flags on the command line win over it",
    )


def parse_arguments_with_file(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """``parser.parse_args(argv)`` with ``--config FILE``, whose entries stand before the flags of the command line.

    Raises:
        ValueError: a file that cannot be read, an unknown or repeated key, a value that its flag does not take.
    """
    add_config_flag(parser)
    finder = ArgumentParser(add_help=False)
    finder.add_argument(CONFIG_FLAG)
    argv = sys.argv[1:] if argv is None else argv
    path = finder.parse_known_args(argv)[0].config
    namespace = parser.parse_args([*(words_of_file(parser, path) if path is not None else ()), *argv])
    if namespace.config != path:
        # A parser that takes abbreviations knew the flag, and its file was not read.
        raise UserError(f"write {CONFIG_FLAG} in full to read {namespace.config}")
    return namespace


def words_of_file(parser: argparse.ArgumentParser, path: str | Path) -> list[str]:
    """The entries of a YAML file as words of a command line; raises ``ValueError``."""
    return words_of_entries(parser, read_yaml(path, what=CONFIG_FLAG), where=str(path))


def words_of_entries(parser: argparse.ArgumentParser, entries: Mapping[str, Any], *, where: str) -> list[str]:
    """Entries ``{flag: value}`` as words of a command line; ``ValueError`` begins with ``where``."""
    actions = {
        _key(option): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option not in (CONFIG_FLAG, "--help")
    }
    words: list[str] = []
    seen: dict[int, str] = {}
    for name, value in entries.items():
        action = actions.get(_key(name))
        if action is None:
            raise UserError(f"{where}: {name!r} is no flag{did_you_mean(name, actions)}")
        if id(action) in seen:
            raise UserError(f"{where}: {seen[id(action)]!r} and {name!r} are the same flag; give one")
        seen[id(action)] = name
        if value is not None:
            words += _words(action, name, value, where)
    return words


def write_run_file(groups: Mapping[str, Any], *, only_changed: bool = False) -> str:
    """YAML from which ``--config`` makes the same configuration again.

    Args:
        groups: dataclasses, or dicts of the fields that were given, by the heading of their part.
        only_changed: leave out what has its default.
    """
    lines: list[str] = []
    for heading, group in groups.items():
        entries = group if isinstance(group, Mapping) else _entries(group, only_changed)
        if entries:
            # A JSON value is a YAML value, on one line and quoted where it must be.
            lines += [f"# {heading}", *(f"{name}: {json.dumps(value)}" for name, value in entries.items())]
    return "\n".join(lines) + "\n"


def _entries(group: Any, only_changed: bool) -> dict[str, Any]:
    entries = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if value is None or not field.metadata.get("flag", True) or (only_changed and value == default_of(field)):
            continue
        entries[field.name] = value
    return entries


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def read_yaml(path: str | Path, *, what: str = "") -> dict[str, Any]:
    """A file with one mapping; ``ValueError`` for anything else, and for a key that is given twice."""
    if not Path(path).is_file():
        raise UserError(f"{what} {path} is not a file".strip())
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not UTF-8, 2026-13-45, a 5000-digit integer
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} is not a list of 'flag: value' lines")
    return content


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the usual loader keeps the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} is given twice")
        return super().construct_mapping(node, deep)


def _words(action: argparse.Action, name: str, value: Any, where: str) -> list[str]:
    """One entry as words, checked so that a mistake is told with the file's name and not with the usage of the tool."""
    where = f"{where}: {name}"
    # The positive spelling comes first: --load-optim, --no-load-optim.
    options = [option for option in action.option_strings if option.startswith("--")]
    if action.nargs == 0:
        is_on = convert(Kind(bool), value, where)
        if not isinstance(action, argparse.BooleanOptionalAction):
            return options[:1] if is_on else []
        is_negated = _key(name).startswith("no_") and _key(options[0]) != _key(name)
        return [options[0] if is_on != is_negated else f"--no-{options[0][2:]}"]
    kind = _kind_of(action)
    convert(kind, value, where)
    # As it was given: the command line converts it alike.
    texts = [str(element) for element in (value if isinstance(value, (list, tuple)) else [value])]
    return [options[0], *texts] if kind.is_list else [f"{options[0]}={texts[0]}"]


def _kind_of(action: argparse.Action) -> Kind:
    kind: Any = action.type if action.type in (int, float) else str
    return Kind(kind, choices=tuple(action.choices or ()), is_list=action.nargs in ("+", "*"))
