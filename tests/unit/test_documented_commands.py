"""Every command that a page shows: valid shell, existing files, flags and values that its tool accepts, and run or not run for a reason."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import ALL_BLOCKS, PAGES, ROOT, Block

sys.path.insert(0, str(ROOT / "tools"))
OURS = re.compile(r"^(\.?/?)(tools|examples|tests|docs)/|^pretrain_midus\.py$")
CHECKED_BLOCKS = pytest.mark.parametrize("block", ALL_BLOCKS, ids=str)


class Refused(Exception):
    """What a parser would have written to stderr."""


def parser_of(script: str) -> argparse.ArgumentParser | None:
    """The parser of a tool; ``None`` for scripts that have none that can be had without running them."""
    from generate_flags import PARSERS, SCRIPTS
    from generate_flags import parser_of as tool_parser

    if script in PARSERS or script in SCRIPTS:
        return tool_parser(script)
    if Path(script).parent.name == "tools" and script.endswith(".py"):
        module = importlib.import_module(Path(script).stem)
        return module.make_parser() if hasattr(module, "make_parser") else None
    return None


def check_flags(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Raises ``Refused`` when the parser does; an excerpt (with an ellipsis in it) only has to name flags that exist."""
    if any(word in ("…", "...") for word in words):
        known = set(parser._option_string_actions)
        unknown = [w for w in words if w.startswith("--") and w.split("=")[0] not in known]
        if unknown:
            raise Refused(f"unknown flags {unknown}")
        return

    def refuse(message: str) -> None:
        raise Refused(message)

    parser.error = refuse  # type: ignore[assignment,method-assign]
    parser.parse_args(words)


def check_driver(words: list[str]) -> None:
    """The driver's own checks of flags that do not fit each other, too, where the command is whole."""
    from megatron_midus.training.arguments import parse_arguments

    if "--config" not in words and not {"…", "..."} & set(words):
        parse_arguments(words)


def check_launcher(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    check_flags(get_args_parser(), words)


def verb_of(words: list[str]) -> tuple[int, str] | None:
    """Where the verb of ``midus VERB`` or of ``python`` or ``torchrun -m megatron_midus VERB`` stands, and which it is."""
    if words[0] == "midus":
        at = 1
    elif "megatron_midus" in words and words[words.index("megatron_midus") - 1] == "-m":
        at = words.index("megatron_midus") + 1
    else:
        return None
    assert at < len(words), "no verb"
    return at, words[at]


def check_verb(words: list[str], at: int, verb: str) -> None:
    from megatron_midus.command import PRETRAIN, SUMMARIES

    if verb == "completion" or "--help" in words:
        return
    assert verb in SUMMARIES, f"{verb} is not a verb of midus"
    if words[0] == "torchrun":
        check_launcher([*words[1 : at - 2], "program.py"])
    if verb == PRETRAIN:
        check_driver(words[at + 1 :])
    parser = parser_of(f"midus {verb}")
    assert parser is not None
    check_flags(parser, words[at + 1 :])


def check_command(words: list[str]) -> None:
    if found := verb_of(words):
        check_verb(words, *found)
        return
    script = next((i for i, word in enumerate(words) if OURS.search(word) and word.endswith((".py", ".sh"))), None)
    if script is None:
        return
    assert (ROOT / words[script]).is_file(), f"{words[script]} does not exist"
    arguments = words[script + 1 :]
    if words[0] == "torchrun":
        check_launcher(words[1 : script + 1])
    if words[script] == "pretrain_midus.py":
        check_driver(arguments)
    parser = parser_of(words[script])
    if parser is not None:
        check_flags(parser, arguments)


def test_there_are_blocks():
    assert len(ALL_BLOCKS) >= 30 and len({block.page for block in ALL_BLOCKS}) >= 10


@CHECKED_BLOCKS
def test_commands_are_accepted(block: Block):
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert block.commands()
    for words in block.commands():
        check_command(words)


@CHECKED_BLOCKS
def test_a_block_is_run_or_says_why_not(block: Block):
    assert block.note, f"{block}: say above it which test runs it, or why none does (tests/documentation.py)"
    kind, _, what = block.note.partition(": " if block.note.startswith("not") else " by ")
    assert kind in ("not run", "run")
    if kind == "run":
        assert (ROOT / what).is_file(), f"{block}: {what} does not exist"
    else:
        assert len(what.split()) >= 3, f"{block}: no reason why it is not run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["python", "tools/upscale.py", "--hf-model", "x", "--num-blokcs", "2"], "num-blokcs"),
        (["python", "tools/upscale.py", "--num-blocks", "2", "--dry-run"], "--hf-model"),
        (["python", "tools/evaluate.py", "--model", "x", "--dtype", "fp8"], "fp8"),
        (["python", "pretrain_midus.py", "--lr", "1e-3", "--mock-data"], "--train-iters"),
        (["python", "pretrain_midus.py", "--moc-data", "…"], "--moc-data"),
        (["torchrun", "--nprocs", "2", "pretrain_midus.py", "…"], "--nprocs"),
        (["bash", "examples/quickstrat.sh"], "quickstrat"),
        (["midus", "upscal", "--dry-run"], "upscal is not a verb"),
        (["midus", "upscale", "--hf-model", "x", "--num-blokcs", "2"], "num-blokcs"),
        (["torchrun", "--nprocs", "2", "-m", "megatron_midus", "pretrain", "…"], "--nprocs"),
        (["torchrun", "--nproc-per-node", "2", "-m", "megatron_midus", "pretrain", "--lr", "1e-3"], "--train-iters"),
    ],
)
def test_a_wrong_command_is_found(words, message):
    with pytest.raises((Refused, ValueError, AssertionError), match=message):
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file = target.partition("#")[0]
        if file and "://" not in target:
            assert (page.parent / file).exists(), f"{page.name} links to {target}, which does not exist"
