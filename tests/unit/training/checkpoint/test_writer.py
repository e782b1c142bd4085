"""Files of a checkpoint directory: what a killed save leaves is cleaned up, old checkpoints go, the rest stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from leftovers import leave_partial

from megatron_midus.files import replace_directory
from megatron_midus.partials import destroy, make_partial
from megatron_midus.training.checkpoint.writer import apply_retention, remove_leftovers


def directories(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text(name)


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    make(tmp_path, "iter_0000001", "notes")
    names = ["latest_checkpointed_iteration.sha256", "latest_checkpointed_iteration.txt", "notes.txt", "run.yaml"]
    for name in names:
        (tmp_path / name).touch()
        leave_partial(tmp_path, name)
    leave_partial(tmp_path, "iter_0000002", content={"__0_0.distcp": ""})
    leave_partial(tmp_path, "iter_0000001", old={"file": ""})
    # Another process is writing this one.
    living, lock = make_partial(tmp_path, "iter_0000003")
    remove_leftovers(tmp_path)
    lock.close()
    # What belongs to somebody else stays.
    assert directories(tmp_path) == [
        living.name,
        ".notes.txt.00000000dead.partial",
        "iter_0000001",
        *names[:2],
        "notes",
        *names[2:],
    ]
    assert (tmp_path / "iter_0000001/file").read_text() == "iter_0000001"


def test_a_checkpoint_that_was_about_to_be_replaced_comes_back(tmp_path):
    leave_partial(tmp_path, "iter_0000003", content={"file": "new"}, old={"file": "old"})
    remove_leftovers(tmp_path)
    assert directories(tmp_path) == ["iter_0000003"]
    assert (tmp_path / "iter_0000003" / "file").read_text() == "old"


def test_replacing_a_checkpoint_leaves_nothing_of_the_old_one(tmp_path):
    make(tmp_path, "iter_0000003")
    (tmp_path / "iter_0000003" / "old").touch()
    partial = leave_partial(tmp_path, "iter_0000003", content={"file": "new"})
    replace_directory(partial / "content", tmp_path / "iter_0000003")
    assert sorted(path.name for path in (tmp_path / "iter_0000003").iterdir()) == ["file"]
    destroy(partial, tmp_path / "iter_0000003")
    assert directories(tmp_path) == ["iter_0000003"]


@pytest.mark.parametrize(
    ("keep_last", "left"),
    [(0, [0, 2, 4, 6, 8]), (1, [0, 6, 8]), (2, [0, 4, 6, 8]), (9, [0, 2, 4, 6, 8])],
)
def test_retention_spares_the_upscaled_model_and_what_is_ahead(tmp_path, keep_last, left):
    make(tmp_path, *(f"iter_{i:07d}" for i in (0, 2, 4, 6, 8)))
    apply_retention(tmp_path, keep_last, newest=6)
    assert directories(tmp_path) == [f"iter_{i:07d}" for i in left]
