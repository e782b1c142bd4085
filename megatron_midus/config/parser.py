"""The parser of every command line: a mistake is one line with its remedy, never a page of usage. Imports no torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from megatron_midus.config.values import check_choice, did_you_mean, scalar
from megatron_midus.errors import UsageError, UserError

_REQUIRED = "the following arguments are required: "


class ArgumentParser(argparse.ArgumentParser):
    """``argparse``'s parser with flags written in full and one-line mistakes.

    Args:
        kwargs: those of ``argparse.ArgumentParser``; ``allow_abbrev`` is off, so that a run says what it was given.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})
        # argparse takes -1e-3 for a flag before Python 3.14.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The command line as a namespace.

        Raises:
            UsageError: an unknown flag, a value that its flag does not take, something missing or left over.
        """
        words = list(sys.argv[1:] if args is None else args)
        # First: a mistyped flag is often the one that argparse would then call missing.
        self._check_flags(words)
        found, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"unexpected {rest[0]!r}: it belongs to no flag{did_you_mean('--' + rest[0], self._flags())}")
        return found

    def error(self, message: str) -> NoReturn:
        """Raises ``UsageError``; every complaint of ``argparse`` passes here."""
        message = " ".join(message.split()).removeprefix("argument ")
        if message.startswith(_REQUIRED):
            message = self._missing(message.removeprefix(_REQUIRED).split(", "))
        elif alternatives := re.fullmatch(r"one of the arguments (.*) is required", message):
            message = f"one of {', '.join(alternatives[1].split())} is missing; give one of them"
        raise UsageError(message)

    def _missing(self, names: list[str]) -> str:
        one = names[0]
        choices = next((a.choices for a in self._actions if one in (a.dest, a.metavar) and a.choices), None)
        remedy = (
            f"give one of {', '.join(map(str, choices))}" if choices else f"give {'it' if len(names) == 1 else 'them'}"
        )
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing; {remedy}"

    # -- flags -------------------------------------------------------------------------------------------------------
    def _check_flags(self, words: Sequence[str]) -> None:
        """Refuses the first word that is spelled like a flag and is none."""
        known = set(self._flags())
        # Behind these comes a command line of something else.
        last = {o for action in self._actions if action.nargs == argparse.REMAINDER for o in action.option_strings}
        for word in words:
            if word == "--" or word in last:
                return
            flag = word.split("=", 1)[0]
            # A word with a blank in it is a value, as it is for argparse.
            if re.match(r"--?[A-Za-z]", flag) and " " not in flag and flag not in known:
                self.error(f"{flag} is no flag{did_you_mean(flag, known, otherwise='--help lists them')}")

    def _flags(self) -> Iterator[str]:
        """Of this parser and of its subcommands."""
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._option_string_actions

    # -- values: converted as those of files and of calls are ----------------------------------------------------------
    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if action.type not in (None, int, float, str):
            return super()._get_value(action, arg_string)
        try:
            return scalar(action.type or str, arg_string)  # type: ignore[arg-type]
        except UserError as error:
            raise argparse.ArgumentError(action, str(error)) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            check_choice(value, action.choices or ())
        except UserError as error:
            raise argparse.ArgumentError(action, str(error)) from None

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            counts: dict[Any, str] = {None: "a value", "+": "one value or more"}
            count = counts.get(action.nargs, f"{action.nargs} values")
            raise argparse.ArgumentError(action, f"needs {count}, and none follows{_example(action)}") from None


def _example(action: argparse.Action) -> str:
    if action.choices is not None:
        return f"; give one of {', '.join(map(str, action.choices))}"
    return ""
