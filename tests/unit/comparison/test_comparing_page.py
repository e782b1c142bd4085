"""docs/comparing.md: its keys are those of the dataclasses, its file can be read, its commands are understood."""

import dataclasses
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from megatron_midus.comparison.arms import resolve
from megatron_midus.comparison.experiment import (
    Arm,
    Budget,
    Data,
    Evaluation,
    Experiment,
    LatencySettings,
    Processes,
    TrainData,
    read_experiment,
)
from megatron_midus.config.fields import field_docs
from megatron_midus.conversion.families import from_hf_config
from megatron_midus.conversion.hf_io import read_hf_config
from megatron_midus.training.arguments import build_parser
from megatron_midus.upscaling import POLICIES

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/comparing.md").read_text()
SECTIONS = {
    "Top level": Experiment, "`data`": Data, "`data: train`, each": TrainData, "`budget`": Budget, "`arms`, each": Arm,
    "`layout`": Processes, "`evaluation`": Evaluation, "`latency`": LatencySettings,
}  # fmt: skip


def key_table(cls: type) -> str:
    """The keys of a dataclass as the page has them."""
    docs = field_docs(cls)
    lines = ["| key | default | |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            default = "–" if field.default in (None, "") else f"`{field.default}`"
        elif field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            default = f"`{made}`" if isinstance(made, (list, dict)) and made else "–"
        else:
            default = "must be given"
        text = docs.get(field.name) or f"see `{field.name}` below"
        lines.append(f"| `{field.name}` | {default} | {text} |")
    return "\n".join(lines)


@pytest.mark.parametrize("title", SECTIONS)
def test_keys(title):
    found = re.search(rf"^### {re.escape(title)}\n\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    expected = key_table(SECTIONS[title])
    assert found and found[1].rstrip() == expected, f"put this under '### {title}':\n{expected}"


def test_the_files_of_the_page(tmp_path):
    block, line = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    # What the section on strengths leaves out is that of the whole file.
    heads = "base: examples/tiny_base\nbudget: {tokens: 2M}\n"
    (tmp_path / "line.yaml").write_text(heads.replace("examples/tiny_base", str(ROOT / "examples/tiny_base")) + line)
    methods = Counter(arm.method for arm in read_experiment(tmp_path / "line.yaml", tmp_path / "out").arms)
    assert methods == {"base": 1, "llama_pro": 7, "lora": 2, "full": 6}
    (tmp_path / "mine.yaml").write_text(block.replace("examples/tiny_base", str(ROOT / "examples/tiny_base")))
    experiment = read_experiment(tmp_path / "mine.yaml", tmp_path / "out")
    arms = resolve(experiment, from_hf_config(read_hf_config(experiment.base)), build_parser())
    assert {arm.arm.policy for arm in arms} == set(POLICIES)
    assert {arm.plan.memory.memory_variant for arm in arms if arm.plan.memory} == {"hive", "block", "full"}
    assert {arm.arm.train for arm in arms} == {"inserted", "all", "none"}


@pytest.mark.parametrize("path", sorted((ROOT / "examples/comparison").glob("*.yaml")), ids=lambda path: path.stem)
def test_files_of_the_repository(path, tmp_path):
    experiment = read_experiment(path, tmp_path)
    if Path(experiment.base).is_relative_to(tmp_path):
        return  # the experiment makes its base
    arms = resolve(experiment, from_hf_config(read_hf_config(experiment.base)), build_parser())
    if path.stem == "facts":
        trained = [arm.trainable for arm in arms if arm.arm.train in ("inserted", "lora")]
        assert len(trained) > 2 and max(trained) < 1.05 * min(trained)


def test_the_commands_of_the_page():
    from megatron_midus.command import parse

    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    commands = [words for words in commands if words]
    assert len(commands) >= 4
    for midus, verb, *words in commands:
        assert (midus, verb) == ("midus", "compare")
        assert (ROOT / parse(verb, words).experiment).is_file()
