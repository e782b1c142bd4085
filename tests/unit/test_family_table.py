"""The table of model families on the documentation's first page: a mark means that a test runs that family there."""

from __future__ import annotations

from pathlib import Path

import test_hf_megatron_logits as logits
from serving_models import FAMILIES as SERVED

from megatron_midus.conversion.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs/README.md"
# Layouts as a reader knows them.
NAMES = {"tp1": "one process", "tp2": "TP", "tp2 sp": "TP with SP", "pp2": "PP", "ep2": "EP"}


def rows() -> list[str]:
    return [row(name) for name in FAMILIES if name != "midus"]


def row(name: str) -> str:
    family = {"gemma3_text": "gemma3"}.get(name, name)  # as the tests call it
    compared = [
        name for name, (kind, _, memory) in logits.MODELS.items() if kind == family and isinstance(memory, dict)
    ]
    upscaled = "yes" if family in logits.FAMILIES else "–"
    trained = [layout for layout, names in logits.TRAINED_AT.items() if set(names) & set(compared)]
    exported = [layout for layout in NAMES if set(compared) & set(logits.names_of(layout))]
    served = {None: "–", True: "plugin", False: "its own code"}[SERVED.get(family)]
    cells = [f"`{FAMILIES[name].architecture}`", upscaled, listed(trained), listed(exported), served]
    return f"| {' | '.join(cells)} |"


def listed(layouts: list[str]) -> str:
    return ", ".join(NAMES[layout] for layout in layouts) or "–"


def test_the_table_says_what_the_tests_run():
    found = [line for line in PAGE.read_text().splitlines() if line.startswith("| `") and "ForCausalLM`" in line]
    assert found == rows(), "write these rows:\n" + "\n".join(rows())
