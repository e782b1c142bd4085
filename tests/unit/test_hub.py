"""``org/name`` of the Hugging Face hub: the local cache, or the command that fetches it, in every verb alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import megatron_midus
from megatron_midus.data.tokenizer import load_hf_tokenizer
from megatron_midus.errors import UserError
from megatron_midus.hub import local_model, short_name
from megatron_midus.progress import SILENT

BASE = Path(__file__).parents[2] / "examples" / "tiny_base"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of huggingface_hub, as ``hf download someone/tiny-base`` leaves it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny-base"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    shutil.copytree(BASE, snapshot, ignore=shutil.ignore_patterns("recipe"))
    return snapshot


def test_a_cached_model_is_found_by_its_name_and_called_by_it(cache):
    assert local_model("someone/tiny-base") == str(cache)
    assert short_name(cache) == "tiny-base"
    assert local_model(BASE) == str(BASE) and short_name(BASE) == "tiny_base"


VERBS = {
    "upscale": lambda name: megatron_midus.upscale(hf_model=name, num_blocks=2, dry_run=True, progress=SILENT),
    "plan": lambda name: megatron_midus.plan(hf_model=name, num_blocks=2, global_batch_size=8, progress=SILENT),
    "evaluate": lambda name: megatron_midus.evaluate(model=[name], generate=["A"], generate_tokens=1, progress=SILENT),
    "generate": lambda name: megatron_midus.generate(model=name, prompt=["A"], generate_tokens=1, progress=SILENT),
    "tokenizer": load_hf_tokenizer,
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_a_name_of_the_cache(cache, verb):
    assert VERBS[verb]("someone/tiny-base")


def test_a_plan_and_a_report_bear_the_name_not_the_revision(cache):
    assert VERBS["upscale"]("someone/tiny-base").plan.source_name == "tiny-base"
    assert VERBS["evaluate"]("someone/tiny-base").models[0].name == "tiny-base"


@pytest.mark.parametrize("verb", [*VERBS, "analyze", "convert"])
def test_what_is_not_there_is_told_with_the_command_that_fetches_it(cache, verb, tmp_path):
    more = {
        "analyze": lambda name: megatron_midus.analyze(model=name, data=["x"], output=str(tmp_path / "o")),
        "convert": lambda name: megatron_midus.convert(load=name, save=str(tmp_path / "o"), to="megatron"),
    }
    with pytest.raises(UserError, match=r"cache; if it is a model of the hub, get it with: hf download some-one/else$"):
        (VERBS | more)[verb]("some-one/else")


def test_no_page_names_the_command_that_is_gone():
    root = BASE.parents[1]
    pages = [
        *root.glob("*.md"),
        *root.glob("docs/*.md"),
        *root.glob("examples/**/*.md"),
        *root.glob("examples/**/*.sh"),
    ]
    assert len(pages) > 20
    assert not [page for page in pages if "huggingface-cli" in page.read_text() and page.name != "CHANGELOG.md"]
