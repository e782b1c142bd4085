"""What all ranks stored alike: by either kind of Megatron-Core, by upstream's own runs, and nothing of it is run."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pathlib
import signal
import sys
import types

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import RerunMode, RerunState
from megatron.core.transformer.enums import AttnBackend
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from megatron_midus.checkpoint.common_state import Foreign, read_common_state
from megatron_midus.checkpoint.training_record import TrainingRecord, read_training_record


def upstreams_arguments(**more):
    return argparse.Namespace(
        seq_length=32,
        consumed_train_samples=24,
        train="inserted",
        attention_backend=AttnBackend.auto,
        model_type=ModelType.encoder_or_decoder,
        exit_signal=signal.SIGTERM,
        rerun_mode=RerunMode.DISABLED,
        params_dtype=torch.bfloat16,
        **more,
    )


def upstreams_state(**more):
    """Kinds of objects that upstream's save_checkpoint puts into common.pt."""
    return {
        "args": upstreams_arguments(**more),
        "checkpoint_version": 3.0,
        "iteration": 6,
        "rerun_state_machine": {"mode": RerunMode.DISABLED, "state": RerunState.NOT_RUNNING_YET},
        "optimizer": {"param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
    }


def test_the_common_state_of_upstreams_run_is_read(tmp_path):
    torch.save(upstreams_state(), tmp_path / "common.pt")
    assert read_training_record(tmp_path, 6) == TrainingRecord(6, 24 * 32, "inserted")
    common = read_common_state(tmp_path)
    assert common["iteration"] == 6 and common["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)


def test_types_that_are_not_installed_are_stood_in_for(tmp_path, monkeypatch):
    """Enums of a later release than the one at hand."""
    module = types.ModuleType("megatron_of_tomorrow")
    kind = enum.Enum("Kind", {"new": 7}, module=module.__name__)
    module.Kind = kind
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(upstreams_state(kind=kind.new), tmp_path / "common.pt")
    monkeypatch.delitem(sys.modules, module.__name__)
    assert read_training_record(tmp_path, 6).tokens == 24 * 32
    stored = read_common_state(tmp_path)["args"].kind
    assert isinstance(stored, Foreign) and stored.arguments == (7,)


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [pathlib.Path.touch, os.mkdir])
def test_nothing_that_lies_in_it_is_run(tmp_path, function):
    torch.save(upstreams_state(evil=Calls(function, str(tmp_path / "run"))), tmp_path / "common.pt")
    record = read_training_record(tmp_path, 6)
    # Of the module os torch refuses to read as much as a name, so the iteration is all that is known then.
    assert record in (TrainingRecord(6, 24 * 32, "inserted"), TrainingRecord(6))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_stood_in_for_leaves_the_iteration(tmp_path):
    class_of_dict = type("Table", (dict,), {"__module__": __name__})
    globals()["Table"] = class_of_dict
    torch.save(upstreams_state(table=class_of_dict(a=1)), tmp_path / "common.pt")
    assert read_training_record(tmp_path, 6) == TrainingRecord(6)


class ObjectPlanner(DefaultSavePlanner):
    """Stores objects as they are, as Megatron-Core does."""

    def transform_object(self, write_item, object):
        return object


def test_a_state_among_the_tensors_is_read(tmp_path):
    """Megatron-Core 0.19 has no common.pt."""
    stored = io.BytesIO()
    torch.save(
        [{"training_state": {"consumed_train_tokens": 40, "train": "all"}, "args": upstreams_arguments()}], stored
    )
    dcp.save(
        {"common_state/shard_0_1": stored}, checkpoint_id=tmp_path, planner=ObjectPlanner(flatten_state_dict=False)
    )
    assert not (tmp_path / "common.pt").exists()
    assert read_training_record(tmp_path, 5) == TrainingRecord(5, 40, "all")


def test_a_checkpoint_without_a_common_state(tmp_path):
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path)
    assert read_training_record(tmp_path, 4) == TrainingRecord(4)


@pytest.mark.parametrize("content", [b"PK", b"", b"not a zip file at all"])
def test_a_damaged_state_is_one_line(tmp_path, content):
    (tmp_path / "common.pt").write_bytes(content)
    with pytest.raises(ValueError, match="common.pt is corrupt"):
        read_training_record(tmp_path, 1)
