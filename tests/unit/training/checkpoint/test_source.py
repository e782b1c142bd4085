"""Where a run begins, given what --save holds: no start takes a run back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_midus.checkpoint.checksums import write_checksums
from megatron_midus.checkpoint.layout import iteration_directory, write_latest_iteration
from megatron_midus.config import ModelConfig
from megatron_midus.config.checkpoint import CheckpointConfig
from megatron_midus.training.checkpoint.source import find_start, held_iteration
from megatron_midus.upscaling import make_plan

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    vocab_size=101,
    max_position_embeddings=64,
)


def write_root(root: Path, *iterations: int, model: ModelConfig = MODEL, source_hash: str = "") -> Path:
    for iteration in iterations:
        directory = iteration_directory(root, iteration)
        directory.mkdir(parents=True)
        plan = make_plan("none", num_layers=model.num_layers)
        dataclasses.replace(plan, source_hash=source_hash).save(directory)
        model.save(directory)
        write_checksums(directory)
        write_latest_iteration(root, iteration)
    return root


@pytest.fixture
def roots(tmp_path, monkeypatch) -> Path:
    """``base`` is an up-scaled model, ``run`` was made from it, ``early`` and ``late`` are other runs of it."""
    monkeypatch.chdir(tmp_path)
    for name, iterations in {"base": (0,), "run": (2, 5), "early": (3,), "late": (9,)}.items():
        write_root(tmp_path / name, *iterations)
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "empty").mkdir()
    return tmp_path


def settings(words: str) -> CheckpointConfig:
    """``load=run ckpt_step=2`` …"""
    values = dict(word.split("=") for word in words.split())
    kinds = {"ckpt_step": int, "finetune": bool}
    return CheckpointConfig(**{name: kinds.get(name, str)(value) for name, value in values.items()})


@pytest.mark.parametrize(
    ("words", "directory", "iteration", "resume"),
    [
        # The command that began the run, again: all forms of it.
        ("load=base save=run", "run", 5, True),
        ("load=base save=link", "link", 5, True),
        ("load=base/iter_0000000 save=run", "run", 5, True),
        ("pretrained_checkpoint=base save=run", "run", 5, True),
        ("pretrained_checkpoint=base load=run save=run", "run", 5, True),
        ("pretrained_checkpoint=base load=empty save=run", "run", 5, True),
        ("save=run", "run", 5, True),
        ("save=base", "base", 0, True),
        # Goes on by itself, links or not.
        ("load=run save=run", "run", 5, True),
        ("load=link save=run", "link", 5, True),
        ("load=run/iter_0000005 save=link", "run", 5, True),
        ("load=run ckpt_step=5 save=run", "run", 5, True),
        # The first start, a branch, and no --save.
        ("load=base save=empty", "base", 0, True),
        ("load=base save=absent", "base", 0, True),
        ("load=base save=base", "base", 0, True),
        ("load=run ckpt_step=2 save=empty", "run", 2, True),
        ("load=run finetune=1 save=empty", "run", 5, False),
        ("load=run ckpt_step=2", "run", 2, True),
        ("load=run finetune=1", "run", 5, False),
        # Only what is later is added.
        ("load=late save=run", "late", 9, True),
    ],
)
def test_a_start_goes_on_from_what_save_holds(words, directory, iteration, resume, roots):
    checkpoint, source = find_start(settings(words))
    assert source.directory == iteration_directory(directory, iteration)
    assert (source.iteration, source.resume) == (iteration, resume)
    if "save=" in words and resume and held_iteration(checkpoint.save) == iteration > 0:
        # From here on it is as if the user had given --load, so that damage found later falls back in --save.
        assert Path(checkpoint.load or "").resolve() in (roots / "run", roots / "run" / "iter_0000005")


@pytest.mark.parametrize(
    ("words", "begins", "remedy"),
    [
        ("load=run ckpt_step=2 save=run", "at iteration 2 (--load run --ckpt-step 2)", "another --save to branch off"),
        ("load=run ckpt_step=2 save=link", "at iteration 2 (--load run --ckpt-step 2)", "--load link alone"),
        ("load=run/iter_0000002 save=run", "at iteration 2 (--load run/iter_0000002)", "another --save to branch off"),
        ("load=base ckpt_step=0 save=run", "at iteration 0 (--load base --ckpt-step 0)", "--load run alone"),
        ("load=early save=run", "at iteration 3 of --load early", "--load run to go on with the run in --save"),
        ("load=run finetune=1 save=run", "at iteration 0 (--finetune)", "--load run without --finetune"),
        ("load=base finetune=1 save=run", "at iteration 0 (--finetune)", "another --save for a new one"),
    ],
)
def test_a_start_that_would_take_a_run_back_is_refused(words, begins, remedy, roots):
    with pytest.raises(ValueError) as caught:
        find_start(settings(words))
    assert f"holds iteration 5, and this run would begin {begins}" in str(caught.value)
    assert remedy in str(caught.value)
    assert (roots / "run" / "latest_checkpointed_iteration.txt").read_text() == "5\n"


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"model": dataclasses.replace(MODEL, hidden_size=96)}, "hidden_size: 96 against 48"),
        ({"source_hash": "b" * 64}, "source checkpoint"),
    ],
)
def test_a_save_of_another_model_is_not_gone_on_with(other, difference, tmp_path):
    write_root(tmp_path / "run", 5, source_hash="a" * 64)
    write_root(tmp_path / "other", 0, **other)
    with pytest.raises(ValueError, match=f"another model .*{difference}.*choose another --save"):
        find_start(settings(f"load={tmp_path / 'other'} save={tmp_path / 'run'}"))


def test_a_damaged_newest_checkpoint_of_save_falls_back_in_save(roots, capsys):
    (roots / "run" / "iter_0000005" / "model_config.json").write_text("{}")
    _, source = find_start(settings("load=base save=run"))
    assert source.directory == Path("run/iter_0000002") and list(source.damaged) == [5]
    assert "NOT USED" in capsys.readouterr().err


def test_what_save_holds_is_known_without_the_file_that_names_it(roots):
    (roots / "run" / "latest_checkpointed_iteration.txt").write_text("garbage")
    assert held_iteration("run") == 5
    (roots / "run" / "latest_checkpointed_iteration.txt").unlink()
    assert held_iteration("run") == 5
    assert held_iteration("empty") is None and held_iteration("absent") is None and held_iteration(None) is None
