"""docs/flags.md is what tools/generate_flags.py writes, for every tool, and every flag says something."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

# For those who work on the project; docs/performance.md shows how they are called.
DEVELOPER_TOOLS = {"benchmark_preprocessing.py", "generate_flags.py", "kernel_model.py", "kernel_resources.py"}


def test_the_page_is_up_to_date():
    from generate_flags import PAGE, make_page

    assert PAGE.read_text() == make_page(), "run python tools/generate_flags.py"


def test_every_tool_is_there():
    from generate_flags import PARSERS, SCRIPTS

    tools = {path.name for path in (ROOT / "tools").glob("*.py")} - DEVELOPER_TOOLS
    scripts = {Path(name).name for name in (*PARSERS, *SCRIPTS) if not name.startswith("midus ")}
    assert scripts == tools | {"pretrain_midus.py"}
    assert {f"midus {verb}" for verb in SCRIPTS.values()} <= set(PARSERS)


def test_every_flag_has_help():
    from generate_flags import PARSERS, parser_of

    def actions(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from actions(command)
            else:
                yield action

    for tool in PARSERS:
        silent = [a.dest for a in actions(parser_of(tool)) if not (a.help or "").partition("(default")[0].strip()]
        assert not silent, f"{tool}: no help for {silent}"
