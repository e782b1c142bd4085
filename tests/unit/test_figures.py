"""The figures of README are what docs/figures/draw.py draws, and the chart has every arm of the committed table."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest

FIGURES = Path(__file__).parents[2] / "docs/figures"


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", FIGURES / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["midus.svg", "loss.svg"])
def test_the_committed_figure_is_what_is_drawn(draw, name):
    text = (FIGURES / name).read_text()
    assert text == draw.FIGURES[name](), "run python docs/figures/draw.py"
    ElementTree.fromstring(text)


def test_the_chart_has_every_arm_of_the_table(draw):
    arms = draw.read_arms()
    assert sorted(arm.name for arm in arms) == sorted(draw.NAMES)
    dots = ElementTree.fromstring((FIGURES / "loss.svg").read_text()).iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(dots)) == len(arms) == 15
    assert all(draw.NAMES[arm.name] in (FIGURES / "loss.svg").read_text() for arm in arms)


def test_the_chart_has_the_figures_of_the_page(draw):
    arms = {arm.name: arm for arm in draw.read_arms()}
    gained = {name: arms["base"].loss - arm.loss for name, arm in arms.items()}
    assert gained["hive"] / gained["llama_pro"] == pytest.approx(0.38, abs=0.005)
    ratios = {name: arms[name].forgotten / gained[name] for name in ("hive", "llama_pro", "control")}
    # "2.2, 2.1, 1.5", of docs/results/2026-11-26-comparison-cpu.md and README
    assert {name: round(ratio, 1) for name, ratio in ratios.items()} == {"hive": 2.2, "llama_pro": 2.1, "control": 1.5}
