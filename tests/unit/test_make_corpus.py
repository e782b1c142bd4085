"""The bar of examples/make_corpus.py ends at its total, with a budget and without."""

from __future__ import annotations

import contextlib
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "make_corpus.py"
TOPICS = {f"topic {i}": f"chapter {i} " * 40 for i in range(5)}
PACKAGES = {f"package {i}": f"module {i} " * 60 for i in range(50)}


@pytest.mark.parametrize("budget", [10_000, float("inf")])
def test_one_bar_over_all_sources_ends_at_its_total(monkeypatch, budget):
    script = runpy.run_path(str(SCRIPT))
    totals, done = [], []

    @contextlib.contextmanager
    def bars(title, *, total, unit):
        totals.append(total)
        yield done.append

    names = script["collect_corpus"].__globals__
    names["Bars"] = lambda: bars
    for name, texts in (("language_topics", TOPICS), ("package_documents", PACKAGES)):
        names[name] = lambda texts=texts: iter([(key, lambda text=text: text) for key, text in texts.items()])
    collected = script["collect_corpus"]("docs", budget)
    assert len(totals) == 1 and sum(done) == totals[0]
    size = sum(len(text.encode()) for _, text in collected)
    assert size <= budget and (len(collected) == 55 if budget == float("inf") else size > 0.9 * budget)
