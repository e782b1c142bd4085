"""Writes docs/flags.md, every flag of every tool, from the parsers and dataclasses that make the flags.

Examples:
  python tools/generate_flags.py
  python tools/generate_flags.py --check       (exit code 1 when the page is not what would be written)
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import benchmark

from megatron_midus import cli
from megatron_midus.command import PRETRAIN, SUMMARIES, make_parser
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.run_file import add_config_flag
from megatron_midus.files import write_text_atomically
from megatron_midus.report.table import Cell, markdown_table, text_cells

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"
INTRODUCTION = """\
# Flags

Written by `python tools/generate_flags.py` from the code that makes the flags; a test compares the two. `--help` of a tool says the same.

- `–` under "default" means none: the text says what holds when the flag is absent, or that it must be given.
- `--[no-]name` is a switch; `--name` turns it on, `--no-name` off.
- With `--config FILE`, flags may stand in a YAML file, `lr: 1e-4` for `--lr 1e-4`; flags on the command line win over it.
"""
Parsers = dict[str, Callable[[], argparse.ArgumentParser]]
# The scripts under the names that Megatron users look for, and the verbs that they are.
SCRIPTS = {
    "pretrain_midus.py": PRETRAIN,
    "tools/upscale.py": "upscale",
    "tools/convert_checkpoint.py": "convert",
    "tools/preprocess_data.py": "preprocess",
    "tools/evaluate.py": "evaluate",
    "tools/compare.py": "compare",
    "tools/analyze.py": "analyze",
    "tools/plan.py": "plan",
}
PARSERS: Parsers = {
    **{f"midus {verb}": functools.partial(make_parser, verb) for verb in SUMMARIES},
    "tools/benchmark.py": benchmark.make_parser,
}
DEFAULT_IN_HELP = re.compile(r"(?: \(default: ([^()]*)\))+$")


def parser_of(tool: str) -> argparse.ArgumentParser:
    """The parser of a tool or a script, with ``--config`` where it reads one."""
    name = f"midus {SCRIPTS[tool]}" if tool in SCRIPTS else tool
    parser = PARSERS[name]()
    if name.startswith("midus "):
        add_config_flag(parser)
    return parser


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    names = list(action.option_strings)
    if isinstance(action, argparse.BooleanOptionalAction):
        names = [f"--[no-]{name[2:]}" for name in names if not name.startswith("--no-")]
    return ", ".join(f"`{name}`" for name in names)


def _value(action: argparse.Action) -> str:
    """What stands behind a flag: its choices, or its kind."""
    if action.nargs == 0 or not action.option_strings:
        return ""
    if action.choices is not None:
        kind = ", ".join(f"`{choice}`" for choice in action.choices)
    elif isinstance(action.metavar, str):
        kind = action.metavar
    else:
        kind = {int: "integer", float: "number"}.get(action.type, "text")  # type: ignore[call-overload]
    return f"{kind} …" if action.nargs in ("+", "*") else kind


def _help_and_default(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str]:
    """Help without its "(default: …)", and that default."""
    text = parser._get_formatter()._expand_help(action)
    found = DEFAULT_IN_HELP.search(text)
    default = found[1] if found else "–"
    if default in ("True", "False"):
        default = "on" if default == "True" else "off"
    elif action.nargs == 0 and default == "–":
        default = "off"
    return text[: found.start()] if found else text, default


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> list[Cell]:
    text, default = _help_and_default(parser, action)
    return text_cells([cell.replace("<", "&lt;") for cell in (_names(action), _value(action), default, text)])


def _tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    """One table a group of flags."""
    for group in parser._action_groups:
        hidden = (argparse._HelpAction, argparse._SubParsersAction)
        actions = [a for a in group._group_actions if not isinstance(a, hidden)]
        if not actions:
            continue
        if group.title not in ("positional arguments", "options"):
            yield f"\n### {group.title}\n"
        rows = [_row(parser, action) for action in actions]
        table = markdown_table(("flag", "value", "default", ""), rows, text_columns=4)
        yield "\n" + "".join(f"{line}\n" for line in table)


def _sections(title: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    summary = " ".join((parser.description or "").partition("\n\n")[0].split())
    scripts = [f"`{script}`" for script, verb in SCRIPTS.items() if title == f"midus {verb}"]
    same = f" {scripts[0]} is the same." if scripts else ""
    yield f"\n## {title}\n\n{summary}{same}\n"
    yield from _tables(parser)
    for action in commands:
        for name, command in action.choices.items():
            yield f"\n## {title} {name}\n"
            yield from _tables(command)


def make_page() -> str:
    """The text of docs/flags.md."""
    return INTRODUCTION + "".join(part for tool in PARSERS for part in _sections(tool, parser_of(tool)))


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the page is up to date")
    page = make_page()
    if not parser.parse_args().check:
        write_text_atomically(PAGE, page)
        return 0
    if PAGE.read_text() != page:
        print(f"{PAGE} is out of date; run python tools/generate_flags.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    cli.run(main)
