"""--config: flags win, every kind of value arrives, and every mistake names the file."""

import argparse
import dataclasses
from typing import Literal

import pytest

from megatron_midus.config.fields import add_arguments, from_namespace
from megatron_midus.config.run_file import parse_arguments_with_file, write_run_file


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings"""

    rate: float | None = None
    """x"""
    steps: int = 3
    """x"""
    paths: list[str] = dataclasses.field(default_factory=list)
    """x"""
    sizes: list[int] | None = None
    """x"""
    resume: bool = True
    """x"""
    verbose: bool = False
    """x"""
    style: Literal["fast", "slow"] = "fast"
    """x"""
    level: Literal[0, 1] = 0
    """x"""
    name: str | None = dataclasses.field(default=None, metadata={"aliases": ["--run_title"]})
    """x"""


@pytest.fixture
def parse(tmp_path):
    """``parse(yaml, *flags)``: the settings, and those of flags that a tool adds by hand."""

    def call(text, *flags):
        (tmp_path / "run.yaml").write_text(text)
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--overwrite", action="store_true")
        parser.add_argument("--model", required=True)
        add_arguments(parser, Settings)
        arguments = ["--config", str(tmp_path / "run.yaml"), *flags]
        namespace = parse_arguments_with_file(parser, arguments)
        return from_namespace(Settings, namespace), namespace

    return call


def test_every_kind_of_value(parse):
    text = """
    model: "a b"
    rate: 1e-4       # a string to YAML 1.1
    steps: -1_000
    paths: [0.95, new, 0.05, "old one"]
    sizes: [1, -2]
    no-resume: true
    verbose: yes
    style: slow
    level: 1
    run-title: 7
    overwrite: true
    """
    settings, namespace = parse(text)
    assert settings == Settings(
        rate=1e-4,
        steps=-1000,
        paths=["0.95", "new", "0.05", "old one"],
        sizes=[1, -2],
        resume=False,
        verbose=True,
        style="slow",
        level=1,
        name="7",
    )
    assert namespace.model == "a b" and namespace.overwrite


def test_flags_win(parse):
    text = "model: m\nsteps: 5\npaths: [a, b]\nresume: false\nverbose: true\nrate: 2\n"
    settings, namespace = parse(text, "--steps", "6", "--paths", "c", "--resume", "--no-verbose", "--model", "n")
    assert settings == Settings(rate=2.0, steps=6, paths=["c"]) and namespace.model == "n"


def test_absent_is_the_default(parse):
    assert parse("model: m\nsteps:\noverwrite: false\nno_resume: false\n")[0] == Settings()
    assert parse("", "--model", "m")[0] == Settings()


@pytest.mark.parametrize("only_changed", [False, True])
def test_what_is_written_is_read_again(parse, only_changed):
    settings = Settings(rate=1e-20, paths=["0.5", "a: b", "#", "-1"], resume=False, name="null")
    text = write_run_file(
        {"Settings": settings, "Tool": {"model": "true", "overwrite": True}}, only_changed=only_changed
    )
    assert text.startswith("# Settings\n") and ("steps: 3" in text) != only_changed
    again, namespace = parse(text)
    assert again == settings and namespace.model == "true" and namespace.overwrite


WRONG = {
    "setps: 3": "'setps' is no flag; did you mean steps?",
    "qqq: 3": "'qqq' is no flag",
    "config: other.yaml": "'config' is no flag",
    "help: true": "'help' is no flag",
    "steps: 3\nsteps: 4": "is not YAML: 'steps' is given twice",
    "name: a\nrun_title: b": "'name' and 'run_title' are the same flag",
    "resume: true\nno-resume: true": "'resume' and 'no-resume' are the same flag",
    "steps: 1.5": "steps: 1.5 is not a whole number",
    "rate: fast": "rate: 'fast' is not a number",
    "steps: [1, 2]": "steps: a list, where one value is expected",
    "sizes: [1, x]": r"sizes\[1\]: 'x' is not a whole number",
    "sizes: [[1]]": r"sizes\[0\]: a list, where one value is expected",
    "style: medium": "style: 'medium' is not one of fast, slow",
    "style: fasst": "style: 'fasst' is not one of fast, slow; did you mean fast\\?",
    "level: 2": "level: 2 is not one of 0, 1",
    "resume: 1": "resume: 1 is not true or false",
    "overwrite: x": "overwrite: 'x' is not true or false",
    "name: true": "name: True is not a text; put it in quotes",
    "training: {steps: 3}": "'training' is no flag",
    "steps: {a: 3}": "steps: {'a': 3} is not a whole number",
    "- steps": "is not a list of 'flag: value' lines",
    "3: 4": "is not a list of 'flag: value' lines",
    "steps: [": "is not YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_mistakes(parse, text):
    with pytest.raises(ValueError, match=WRONG[text]) as error:
        parse(text, "--model", "m")
    assert "run.yaml" in str(error.value) and "\n" not in str(error.value)


def test_an_abbreviated_flag_is_not_passed_over(tmp_path):
    with pytest.raises(ValueError, match="write --config in full to read run.yaml"):
        parse_arguments_with_file(argparse.ArgumentParser(), ["--conf", "run.yaml"])


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml is not a file"):
        parse = argparse.ArgumentParser()
        parse_arguments_with_file(parse, ["--config", "nowhere.yaml"])
