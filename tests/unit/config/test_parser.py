"""Mistakes on a command line: one line, what was typed, what was meant, exit code 2; the same in every program."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from megatron_midus import cli
from megatron_midus.config import ModelConfig
from megatron_midus.config.fields import add_arguments, from_namespace
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.config.upscale import PolicyConfig
from megatron_midus.config.values import did_you_mean
from megatron_midus.errors import UsageError
from megatron_midus.training.arguments import build_parser
from megatron_midus.upscaling.arguments import plan_from_config

ROOT = Path(__file__).parents[3]


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--hf-model", required=True, metavar="DIR")
    parser.add_argument("--num-blocks", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--layers", nargs="+", type=int)
    parser.add_argument("--range", nargs=2)
    parser.add_argument("--policy", choices=["interleave", "llama_pro"])
    parser.add_argument("--size", type=_size)
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction)
    return parser


def _size(text: str) -> int:
    raise argparse.ArgumentTypeError(f"{text} has no unit")


MISTAKES = {
    "--hf-modle DIR": "--hf-modle is no flag; did you mean --hf-model?",  # and not: --hf-model is missing
    "--hf_model DIR": "--hf_model is no flag; did you mean --hf-model?",
    "--hf-mod DIR": "--hf-mod is no flag; did you mean --hf-model?",
    "-num-blocks 3": "-num-blocks is no flag; did you mean --num-blocks?",
    "--num-bloks=3": "--num-bloks is no flag; did you mean --num-blocks?",
    "--no-overwritten": "--no-overwritten is no flag; did you mean --no-overwrite?",
    "--zzz": "--zzz is no flag; --help lists them",
    "--hf-model DIR num-blocks 3": "unexpected 'num-blocks': it belongs to no flag; did you mean --num-blocks?",
    "--hf-model DIR --num-blocks three": "--num-blocks: 'three' is not a whole number",
    "--hf-model DIR --rate 1e-4x": "--rate: '1e-4x' is not a number",
    "--hf-model DIR --size 3": "--size: 3 has no unit",
    "--hf-model DIR --policy llama-pro": "--policy: 'llama-pro' is not one of interleave, llama_pro; did you mean llama_pro?",
    "--hf-model DIR --num-blocks": "--num-blocks: needs a value, and none follows",
    "--hf-model --num-blocks 3": "--hf-model: needs a value, and none follows",
    "--hf-model DIR --layers": "--layers: needs one value or more, and none follows",
    "--hf-model DIR --range 1": "--range: needs 2 values, and none follows",
    "--hf-model DIR --policy": "--policy: needs a value, and none follows; give one of interleave, llama_pro",
    "--num-blocks 3": "--hf-model is missing; give it",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_was_meant(parser, line):
    with pytest.raises(UsageError) as error:
        parser.parse_args(line.split())
    assert str(error.value) == MISTAKES[line]


def test_values_that_look_like_flags_are_values(parser):
    words = ["--hf-model=--strange", "--rate", "-1e-3", "--layers", "-1", "2"]
    found = parser.parse_args(words)
    assert (found.hf_model, found.rate, found.layers) == ("--strange", -1e-3, [-1, 2])
    found = parser.parse_args(["--hf-model", "--a b"])
    assert found.hf_model == "--a b"


def test_flags_of_subcommands_are_known_and_missing_subcommands_are_named():
    parser = ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train").add_argument("--threads", type=int)
    commands.add_parser("layer")
    assert parser.parse_args(["train", "--threads", "2"]).threads == 2
    for words, message in {
        "train --thread 2": "--thread is no flag; did you mean --threads?",
        "": "command is missing; give one of train, layer",
        "trian": "'trian' is not one of train, layer; did you mean train?",
    }.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            parser.parse_args(words.split())


def test_one_of_several_is_missing_or_given_twice():
    parser = ArgumentParser()
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--load")
    group.add_argument("--hf-model")
    with pytest.raises(UsageError, match="one of --load, --hf-model is missing"):
        parser.parse_args([])
    with pytest.raises(UsageError, match="--hf-model: not allowed with argument --load"):
        parser.parse_args(["--load", "a", "--hf-model", "b"])


def test_programs_end_with_2_after_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: build_parser().parse_args(["--trian-iters", "5"]))
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.out == "" and printed.err == "error: --trian-iters is no flag; did you mean --train-iters?\n"


def test_midus_is_a_name_of_the_policy():
    parser = ArgumentParser()
    add_arguments(parser, PolicyConfig)
    model = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=32,
        vocab_size=32,
        max_position_embeddings=64,
    )
    blocks = from_namespace(PolicyConfig, parser.parse_args(["--policy", "midus", "--num-blocks", "1"]))
    assert plan_from_config(blocks, {"memory_num_keys": 8, "memory_topk": 2}, model).policy == "interleave"
    with pytest.raises(UsageError, match="'midas' is not one of interleave, .*; did you mean midus?"):
        parser.parse_args(["--policy", "midas"])


def test_nearest_names():
    assert did_you_mean("Train_Iter", ["--train-iters", "train-iters"]) == "; did you mean train-iters?"
    assert did_you_mean("xyz", ["abc"]) == ""


def test_every_program_has_this_parser():
    plain = re.compile(r"argparse\.ArgumentParser\(|ArgumentParser\(.*allow_abbrev=True")
    files = [
        *ROOT.glob("*.py"),
        *(path for name in ("tools", "examples", "megatron_midus") for path in (ROOT / name).rglob("*.py")),
    ]
    found = {path.relative_to(ROOT).as_posix() for path in files if plain.search(path.read_text())}
    # It reads an experiment's own flags out of a command line that Megatron-LM parses.
    assert found == {"megatron_midus/integrations/megatron_lm.py"}
