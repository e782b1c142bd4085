"""``midus VERB``: finds the verb, parses its flags, does it, exits. ``--help`` imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megatron_midus import __version__, cli
from megatron_midus.config.fields import add_arguments, from_namespace
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.run_file import parse_arguments_with_file
from megatron_midus.config.values import did_you_mean
from megatron_midus.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Entry:
    """One verb.

    Attributes:
        summary: for the list of verbs.
        config: ``module:dataclass`` of its flags.
        module: its ``command(config) -> exit code``.
        first_line: function of ``verbs.first_lines``, of a verb whose libraries take seconds to load.
    """

    summary: str
    config: str
    module: str
    first_line: str | None = None

    def config_class(self) -> type:
        module, _, name = self.config.partition(":")
        return getattr(importlib.import_module(f"megatron_midus.{module}"), name)

    def say_first(self, config: Any) -> None:
        """Prints what the verb is about to do; of several processes each would, so none does."""
        if self.first_line is None or os.environ.get("WORLD_SIZE", "1") != "1":
            return
        line = getattr(importlib.import_module("megatron_midus.verbs.first_lines"), self.first_line)(config)
        if line is not None:
            print(line, flush=True)

    def command(self) -> Callable[[Any], int]:
        return importlib.import_module(f"megatron_midus.{self.module}").command


VERBS = {
    "upscale": Entry("make a pretrained model deeper", "config.upscale:UpscaleConfig", "verbs.upscale"),
    "preprocess": Entry("encode text for training", "config.preprocess:PreprocessConfig", "verbs.preprocess"),
    "merge": Entry("join the shards of preprocessed text", "config.preprocess:MergeConfig", "verbs.merge"),
    "background": Entry(
        "count the slots that old text reads, for sparse updates",
        "config.background:BackgroundConfig",
        "verbs.background",
    ),
    "convert": Entry(
        "between Megatron and Hugging Face", "config.convert:ConvertConfig", "verbs.convert", "of_convert"
    ),
    "average": Entry("average checkpoints of a run", "config.average:AverageConfig", "verbs.average"),
    "evaluate": Entry(
        "compare models on held-out text and tasks", "config.evaluate:EvaluateConfig", "verbs.evaluate", "of_evaluate"
    ),
    "generate": Entry("continue prompts", "config.evaluate:GenerateConfig", "verbs.generate"),
    "chat": Entry("talk to a fine-tuned model", "config.chat:ChatConfig", "verbs.chat"),
    "serve": Entry("serve a model over OpenAI's interface", "config.chat:ServeConfig", "verbs.serve"),
    "compare": Entry("train and compare up-scaling methods", "config.compare:CompareConfig", "verbs.compare"),
    "analyze": Entry("show what a trained memory does", "config.analyze:AnalyzeConfig", "verbs.analyze"),
    "plan": Entry("list the cluster layouts that fit a model", "config.plan:PlanConfig", "verbs.plan"),
    "recipe": Entry("run a model's recipe, from text to evaluation", "config.recipe:RecipeConfig", "verbs.recipe"),
    "push": Entry("upload an export to the Hugging Face hub", "config.push:PushConfig", "verbs.push"),
    "doctor": Entry("check this machine and installation", "config.doctor:DoctorConfig", "verbs.doctor"),
}
# Training parses its own flags, which are Megatron's; torchrun starts it once a process.
PRETRAIN = "pretrain"
_PRETRAIN_SUMMARY = (
    "continue the pre-training of an up-scaled model (several processes: torchrun -m megatron_midus pretrain)"
)


def make_parser(verb: str, *, prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a verb, with ``--config``."""
    if verb == PRETRAIN:
        from megatron_midus.training.arguments import build_parser

        parser = build_parser()
    else:
        config = VERBS[verb].config_class()
        parser = ArgumentParser(
            prog=prog or f"midus {verb}",
            description=inspect.cleandoc(config.__doc__ or "").partition("\n")[2].strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(parser, config)
    return parser


def parse(verb: str, argv: Sequence[str] | None = None, *, prog: str | None = None) -> Any:
    """The configuration that a command line asks for."""
    namespace = parse_arguments_with_file(make_parser(verb, prog=prog), argv)
    return from_namespace(VERBS[verb].config_class(), namespace)


def do(verb: str, argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Parses and does it; returns the exit code."""
    config = parse(verb, argv, prog=prog)
    VERBS[verb].say_first(config)
    return VERBS[verb].command()(config)


def tool(verb: str) -> tuple[Callable[[], argparse.ArgumentParser], Callable[[Sequence[str] | None], int]]:
    """``make_parser`` and ``main`` of the script in tools/ that does the same as ``midus VERB``."""
    prog = None if sys.argv[0].endswith("midus") else os.path.basename(sys.argv[0])
    return functools.partial(make_parser, verb, prog=prog), functools.partial(do, verb, prog=prog)


def summary() -> str:
    """What ``midus --help`` prints."""
    width = max(map(len, SUMMARIES))
    lines = "\n".join(f"  {name:<{width}}  {SUMMARIES[name]}" for name in SUMMARIES)
    return (
        "usage: midus VERB [flags]\n\n"
        "Makes a pretrained language model deeper with Memory blocks (MIDUS), continues its pre-training, exports it.\n\n"
        f"{lines}\n\nmidus VERB --help lists the flags of a verb; midus --version; midus completion bash|zsh|fish\n"
    )


def main() -> NoReturn:
    """The console script."""
    words = sys.argv[1:]
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help", "help"):
        print(summary(), end="")
        sys.exit(0 if words else 2)
    if verb == "--version":
        print(f"megatron_midus {__version__}")
        sys.exit(0)
    if verb == PRETRAIN:
        _pretrain(words[1:])
    cli.run(lambda: _dispatch(verb, words[1:]))


def _pretrain(words: list[str]) -> NoReturn:
    # Before torch starts them: threads of OpenMP that have nothing to do sleep instead of keeping the cores from the
    # threads of the look-up (docs/performance.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from megatron_midus.training.main import run

    sys.argv = [sys.argv[0], *words]
    run()


def _dispatch(verb: str, words: list[str]) -> int:
    if verb == "completion":
        print(completion_script(words), end="")
        return 0
    if verb not in VERBS:
        raise UsageError(f"{verb!r} is not a verb of midus{did_you_mean(verb, SUMMARIES)}; midus --help lists them")
    return do(verb, words)


# -- completion ------------------------------------------------------------------------------------------------------
_COMPLETION = {
    "bash": """\
_midus() {
    local verb="${COMP_WORDS[1]}" word="${COMP_WORDS[COMP_CWORD]}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "%(verbs)s" -- "$word"))
    elif [[ "$word" == -* ]]; then
        case "$verb" in
%(cases)s
        esac
    fi
}
complete -o default -F _midus midus
""",
    "zsh": """\
autoload -U +X bashcompinit && bashcompinit
""",
    "fish": """\
complete -c midus -n __fish_use_subcommand -f -a "%(verbs)s"
""",
}


def completion_script(words: Sequence[str]) -> str:
    """Shell code that completes verbs and flags; ``eval "$(midus completion bash)"`` in ~/.bashrc."""
    if len(words) != 1 or words[0] not in _COMPLETION:
        raise UsageError("name your shell: midus completion bash, zsh or fish")
    flags = {verb: _flags(verb) for verb in SUMMARIES}
    verbs = " ".join(SUMMARIES)
    if words[0] == "fish":
        lines = (
            f'complete -c midus -n "__fish_seen_subcommand_from {verb}" -l {flag.lstrip("-")}'
            for verb, names in flags.items()
            for flag in names
        )
        return _COMPLETION["fish"] % {"verbs": verbs} + "\n".join(lines) + "\n"
    cases = "\n".join(
        f'            {verb}) COMPREPLY=($(compgen -W "{" ".join(names)}" -- "$word")) ;;'
        for verb, names in flags.items()
    )
    bash = _COMPLETION["bash"] % {"verbs": verbs, "cases": cases}
    return bash if words[0] == "bash" else _COMPLETION["zsh"] + bash


def _flags(verb: str) -> list[str]:
    return sorted({o for action in make_parser(verb)._actions for o in action.option_strings if o.startswith("--")})


SUMMARIES = {
    **{name: VERBS[name].summary for name in ("upscale", "preprocess")},
    PRETRAIN: _PRETRAIN_SUMMARY,
    **{name: entry.summary for name, entry in VERBS.items() if name not in ("upscale", "preprocess")},
}
