"""Where a checkpoint says that a run was; the rest is in tests/functional/test_resume.py."""

from __future__ import annotations

from megatron_midus.training.checkpoint.state import Progress, read_progress


def test_progress_of_a_checkpoint_without_training_state_is_the_beginning():
    assert read_progress({}) == Progress()
    stored = {"iteration": 3, "consumed_train_samples": 12, "floating_point_operations": 1.0, "train": "all"}
    assert read_progress({"training_state": stored}) == Progress(3, 12, 1.0, 0)
    assert read_progress({"training_state": {**stored, "consumed_train_tokens": 96}}).consumed_train_tokens == 96
