"""Writes checkpoints whole or not at all, with plan, architecture and Hugging Face files in every one.

A checkpoint is written into a hidden staging directory, which rank 0 renames once all ranks are done; the file that
names the latest iteration is written last. So a process killed at any moment leaves the previous checkpoint in charge.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_midus.conversion.checkpoint_layout import (
    ASSETS_DIRECTORY,
    copy_assets,
    iteration_directory,
    write_latest_iteration,
)
from megatron_midus.training.architecture import Architecture
from megatron_midus.training.optimizer_state import optimizer_metadata


class CheckpointWriter:
    """Saves a run into one directory.

    Args:
        root: ``--save``.
        architecture: plan, model and Hugging Face files that travel into every checkpoint.
        is_async: write in the background; ``finalize`` must then be called now and then.
        keep_last: newest checkpoints to keep, 0 = all.
    """

    def __init__(self, root: str | Path, architecture: Architecture, *, is_async: bool, keep_last: int) -> None:
        self.root = Path(root)
        self.architecture = architecture
        self.keep_last = keep_last
        # Follows the newest checkpoint: the one that the run began with may be deleted by then.
        self._assets = architecture.assets
        self._queue = AsyncCallsQueue() if is_async else None
        if torch.distributed.get_rank() == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.root)
        torch.distributed.barrier()

    def save(self, iteration: int, state: dict[str, Any]) -> None:
        """Writes ``state`` (of tensors that know how they are sharded) as ``iter_*``. Collective over all ranks."""
        self.finalize(blocking=True)
        staging = _staging_directory(self.root, iteration)
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        torch.distributed.barrier()
        request = dist_checkpointing.save(
            state, str(staging), async_sharded_save=self._queue is not None, content_metadata=optimizer_metadata()
        )
        if self._queue is None:
            self._publish(iteration)
            return
        request.add_finalize_fn(lambda: self._publish(iteration))
        self._queue.schedule_async_request(request)

    def finalize(self, *, blocking: bool = False) -> None:
        """Publishes background saves that are done; waits for all of them if ``blocking``. Collective."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=blocking)

    def _publish(self, iteration: int) -> None:
        """Turns the staging directory, complete on all ranks, into the checkpoint."""
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            staging, target = _staging_directory(self.root, iteration), iteration_directory(self.root, iteration)
            self.architecture.plan.save(staging)
            self.architecture.model.save(staging)
            self._copy_assets(staging / ASSETS_DIRECTORY)
            replace_directory(staging, target)
            if self._assets is not None:
                self._assets = target / ASSETS_DIRECTORY
            write_latest_iteration(self.root, iteration)
            apply_retention(self.root, self.keep_last, iteration)
        torch.distributed.barrier()

    def _copy_assets(self, target: Path) -> None:
        if self._assets is None:
            return
        if self._assets.is_dir():
            copy_assets(self._assets, target, skip=self.architecture.assets_left_out)
        else:
            target.mkdir()
            shutil.copyfile(self._assets, target / "tokenizer.model")


def _staging_directory(root: Path, iteration: int) -> Path:
    # The same name on every rank without asking, and hidden, so that nobody takes it for a checkpoint.
    return root / f".{iteration_directory(root, iteration).name}.partial"


def replace_directory(staging: Path, target: Path) -> None:
    """Renames ``staging`` to ``target``; an older ``target`` gives way at the last moment."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(staging, target)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Deletes what a killed save left, and puts back a checkpoint that was about to be replaced."""
    for path in root.glob(".iter_*.old"):
        target = root / path.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, target)
    for path in root.glob(".iter_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def apply_retention(root: Path, keep_last: int, newest: int) -> None:
    """Deletes all but the ``keep_last`` newest checkpoints. Iteration 0, the up-scaled model, stays."""
    if not keep_last:
        return
    found = [int(m.group(1)) for p in root.iterdir() if (m := re.fullmatch(r"iter_(\d{7,})", p.name))]
    # Iterations above the newest belong to a run that was rewound; they are not this run's to delete.
    mine = sorted(i for i in found if 0 < i <= newest)
    for iteration in mine[:-keep_last]:
        directory = iteration_directory(root, iteration)
        # Out of the way in one step: a reader must not find half a checkpoint.
        doomed = directory.with_name(f".{directory.name}.partial")
        os.rename(directory, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
