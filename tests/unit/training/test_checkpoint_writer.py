"""Files of a checkpoint directory: what a killed save leaves is cleaned up, old checkpoints go, the rest stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_midus.training.checkpoint_writer import apply_retention, remove_leftovers, replace_directory


def directories(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text(name)


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    make(tmp_path, "iter_0000001", ".iter_0000002.partial", ".iter_0000001.old", "notes")
    names = ["latest_checkpointed_iteration.sha256", "latest_checkpointed_iteration.txt", "notes.txt", "run.yaml"]
    for name in names:
        (tmp_path / name).touch()
        (tmp_path / f".{name}.1234.partial").touch()
    remove_leftovers(tmp_path)
    # What belongs to somebody else stays.
    assert directories(tmp_path) == [".notes.txt.1234.partial", "iter_0000001", *names[:2], "notes", *names[2:]]


def test_a_checkpoint_that_was_about_to_be_replaced_comes_back(tmp_path):
    make(tmp_path, ".iter_0000003.old")
    remove_leftovers(tmp_path)
    assert directories(tmp_path) == ["iter_0000003"]
    assert (tmp_path / "iter_0000003" / "file").read_text() == ".iter_0000003.old"


def test_replacing_a_checkpoint_leaves_nothing_of_the_old_one(tmp_path):
    make(tmp_path, "iter_0000003", ".iter_0000003.partial")
    (tmp_path / "iter_0000003" / "old").touch()
    replace_directory(tmp_path / ".iter_0000003.partial", tmp_path / "iter_0000003")
    assert directories(tmp_path) == ["iter_0000003"]
    assert [path.name for path in (tmp_path / "iter_0000003").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("keep_last", "left"),
    [(0, [0, 2, 4, 6, 8]), (1, [0, 6, 8]), (2, [0, 4, 6, 8]), (9, [0, 2, 4, 6, 8])],
)
def test_retention_spares_the_upscaled_model_and_what_is_ahead(tmp_path, keep_last, left):
    make(tmp_path, *(f"iter_{i:07d}" for i in (0, 2, 4, 6, 8)))
    apply_retention(tmp_path, keep_last, newest=6)
    assert directories(tmp_path) == [f"iter_{i:07d}" for i in left]
