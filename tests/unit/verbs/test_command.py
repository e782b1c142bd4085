"""``midus``: verbs, mistakes, completion, and that ``--help`` loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_midus import cli, command
from megatron_midus.errors import UsageError


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["midus", *words])
    with pytest.raises(SystemExit) as end:
        command.main()
    return end.value.code


def test_help_lists_every_verb(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in command.SUMMARIES)
    assert set(command.SUMMARIES) == {*command.VERBS, "pretrain"}


def test_without_a_verb_it_says_what_there_is(monkeypatch, capsys):
    assert run(monkeypatch) == 2
    assert "usage: midus VERB" in capsys.readouterr().out


def test_a_mistyped_verb_is_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "upscal") == 2
    assert (
        capsys.readouterr().err
        == "error: 'upscal' is not a verb of midus; did you mean upscale?; midus --help lists them\n"
    )


@pytest.mark.parametrize("verb", sorted(command.VERBS))
def test_a_mistyped_flag_is_one_line(verb):
    with pytest.raises(UsageError, match="--no-such-flag is no flag"):
        command.parse(verb, ["--no-such-flag", "1"])


def test_help_of_a_verb_begins_with_what_it_does(capsys):
    with pytest.raises(SystemExit):
        command.parse("convert", ["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: midus convert") and "midus convert --load CHECKPOINT" in text


def test_importing_and_helping_load_neither_torch_nor_megatron():
    program = (
        "import sys, contextlib, io\n"
        "import megatron_midus\nfrom megatron_midus import command\n"
        "for verb in command.SUMMARIES: command.make_parser(verb).format_help()\n"
        "heavy = {'torch', 'megatron', 'transformers', 'numpy', 'rich', 'tqdm'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_verbs_and_flags(shell):
    script = command.completion_script([shell])
    assert "upscale" in script and "num-blocks" in script and "value-lr-mult" in script


def test_bash_completes(tmp_path):
    script = command.completion_script(["bash"])
    program = script + "\nCOMP_WORDS=(midus upscale --num-b); COMP_CWORD=2; _midus; echo ${COMPREPLY[@]}\n"
    program += "COMP_WORDS=(midus pre); COMP_CWORD=1; _midus; echo ${COMPREPLY[@]}\n"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--num-blocks", "preprocess", "pretrain"]


def test_a_shell_that_is_not_known():
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: command._dispatch("completion", ["csh"]))
    assert end.value.code == 2


def test_configuration_of_a_command_line_and_of_keywords_are_equal():
    from megatron_midus.config.upscale import UpscaleConfig
    from megatron_midus.config.values import build

    words = ["--hf-model", "base", "--save", "out", "--num-blocks", "2", "--memory-num-keys", "64", "--no-overwrite"]
    keywords = {"hf_model": "base", "save": "out", "num_blocks": 2, "memory_num_keys": 64, "overwrite": False}
    made = build(UpscaleConfig, keywords, "upscale()")
    assert made == command.parse("upscale", words)
    assert made.memory == {"memory_num_keys": 64} and made.blocks.num_blocks == 2
