"""Writes checkpoints whole or not at all, with plan, architecture and Hugging Face files in every one.

A checkpoint is written into a hidden staging directory, which rank 0 renames once all ranks are done; the file that
names the latest iteration is written last. So a process killed at any moment leaves the previous checkpoint in charge.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from megatron_midus.checkpoint.checksums import file_sha256, write_checksums
from megatron_midus.checkpoint.layout import (
    ASSETS_DIRECTORY,
    BACKGROUND_FILE,
    LATEST_CHECKSUM_FILE,
    LATEST_FILE,
    copy_assets,
    iteration_directory,
    list_iterations,
    read_latest_iteration,
    write_latest_iteration,
)
from megatron_midus.errors import UserError
from megatron_midus.files import discard_directory, remove_partials, replace_directory
from megatron_midus.megatron_compat import save_checkpoint
from megatron_midus.partials import CONTENT, destroy, make_partial, new_token, partial_path, target_name
from megatron_midus.training.architecture import Architecture
from megatron_midus.training.checkpoint.optimizer_state import optimizer_metadata
from megatron_midus.training.checkpoint.source import RUN_FILE, held_iteration
from megatron_midus.training.helper_process import end_forks_with_this_process, start_result_queue


class CheckpointWriter:
    """Saves a run into one directory.

    Args:
        root: ``--save``.
        architecture: plan, model, Hugging Face files and background counts that travel into every checkpoint.
        is_async: write in the background; ``finalize`` must then be called now and then.
        keep_last: newest checkpoints to keep, 0 = all.
        fully_parallel: data-parallel ranks share the writing of what they hold alike, about the same bytes each.
    """

    def __init__(
        self,
        root: str | Path,
        architecture: Architecture,
        *,
        is_async: bool,
        keep_last: int,
        fully_parallel: bool = True,
    ) -> None:
        self.root = Path(root)
        self.architecture = architecture
        self.keep_last = keep_last
        # Both follow the newest checkpoint: the one that the run began with may be deleted by then.
        self._assets = architecture.assets
        self._background = architecture.background
        self._queue = AsyncCallsQueue() if is_async else None
        self._strategy = _sharing_strategy() if fully_parallel else get_default_save_sharded_strategy()
        self._run = _agree_on_name()
        self._lock: BinaryIO | None = None
        self._saving = 0  # the iteration that is being written, or was last
        # Its processes report what they could not write; the one line of the run has it too.
        logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)
        start_result_queue()
        end_forks_with_this_process()
        if torch.distributed.get_rank() == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.root)
        torch.distributed.barrier()

    def save(self, iteration: int, state: dict[str, Any]) -> None:
        """Writes ``state`` (of tensors that know how they are sharded) as ``iter_*``. Collective over all ranks."""
        self.finalize(blocking=True)
        staging = self._staging_directory(iteration)
        if torch.distributed.get_rank() == 0:
            _, self._lock = make_partial(self.root, iteration_directory(self.root, iteration).name, self._run)
            staging.mkdir()
        torch.distributed.barrier()
        self._saving = iteration
        with self._failures_named():
            request = save_checkpoint(
                state,
                staging,
                self._strategy,
                async_sharded_save=self._queue is not None,
                content_metadata=optimizer_metadata(),
            )
        rank = torch.distributed.get_rank()
        if self._queue is None:
            self._publish(iteration, hash_own_files(staging, rank))
            return
        self._queue.schedule_async_request(self._hashing_request(request, iteration, rank))

    def _hashing_request(self, request: AsyncRequest, iteration: int, rank: int) -> AsyncRequest:
        """``request`` with hashing behind the writing, in the same background process."""
        staging = self._staging_directory(iteration)
        if request.async_fn is not None:  # None: this rank has nothing to write
            request = request._replace(async_fn=functools.partial(_write_and_hash, request.async_fn, staging, rank))
        request.add_finalize_fn(lambda: self._publish(iteration, _take_hashes(staging, rank)))
        return request

    def finalize(self, *, blocking: bool = False) -> None:
        """Publishes background saves that are done; waits for all of them if ``blocking``. Collective."""
        if self._queue is not None:
            with self._failures_named():
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    @contextlib.contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Turns what all ranks raise when one could not write into one line, and gives back the room that it took."""
        try:
            yield
        except CheckpointException as error:
            # The first rank knows what happened on which rank.
            reasons = [" ".join(str(reason).split())[:200] for reason, _ in error.failures.values()]
            free = shutil.disk_usage(self.root).free
            if torch.distributed.get_rank() == 0:
                self._end_partial(self._saving)
            raise UserError(
                f"a checkpoint of iteration {self._saving} could not be saved to {self.root} "
                f"({reasons[0] if reasons else 'another rank failed'}; {free / 2**30:.1f} GiB are free there); the latest "
                f"one there is of iteration {read_latest_iteration(self.root)}. Make room or choose another --save, and "
                "start again"
            ) from None

    def _publish(self, iteration: int, checksums: dict[str, str]) -> None:
        """Turns the staging directory into the checkpoint, once it is complete on all ranks.

        Args:
            checksums: of the files that this rank wrote.
        """
        self._check_not_overtaken(iteration)
        everyones: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everyones, checksums)
        if torch.distributed.get_rank() == 0:
            staging, target = self._staging_directory(iteration), iteration_directory(self.root, iteration)
            self.architecture.plan.save(staging)
            self.architecture.model.save(staging)
            self._write_assets(staging / ASSETS_DIRECTORY)
            if self._background is not None:
                shutil.copyfile(self._background, staging / BACKGROUND_FILE)
            write_checksums(staging, {name: value for each in everyones for name, value in each.items()})
            replace_directory(staging, target)
            self._end_partial(iteration)
            if self._assets is not None:
                self._assets = target / ASSETS_DIRECTORY
            if self._background is not None:
                self._background = target / BACKGROUND_FILE
            write_latest_iteration(self.root, iteration)
            apply_retention(self.root, self.keep_last, iteration)
        torch.distributed.barrier()

    def _check_not_overtaken(self, iteration: int) -> None:
        """Another run may have begun to save into the same directory. Collective."""
        held = [held_iteration(self.root) if torch.distributed.get_rank() == 0 else None]
        torch.distributed.broadcast_object_list(held)
        if held[0] is None or held[0] <= iteration:
            return
        if torch.distributed.get_rank() == 0:
            self._end_partial(iteration)
        raise UserError(
            f"{self.root} holds iteration {held[0]} of another run that was started meanwhile, so iteration {iteration} of "
            "this one is not saved there; give every run a --save of its own"
        )

    def _staging_directory(self, iteration: int) -> Path:
        return partial_path(self.root, iteration_directory(self.root, iteration).name, self._run) / CONTENT

    def _end_partial(self, iteration: int) -> None:
        """On rank 0, which holds the lock for all."""
        destroy(self._staging_directory(iteration).parent, iteration_directory(self.root, iteration))
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _write_assets(self, target: Path) -> None:
        self._copy_assets(target)
        template = self.architecture.chat_template
        if template is not None:
            # It goes before one in tokenizer_config.json.
            target.mkdir(exist_ok=True)
            (target / "chat_template.jinja").write_text(template, encoding="utf-8")

    def _copy_assets(self, target: Path) -> None:
        if self._assets is None:
            return
        if self._assets.is_dir():
            copy_assets(self._assets, target, skip=self.architecture.assets_left_out)
        else:
            target.mkdir()
            shutil.copyfile(self._assets, target / "tokenizer.model")


def _sharing_strategy() -> FullyParallelSaveStrategyWrapper:
    """Spreads over the data-parallel ranks what each of them could write."""
    return FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy(), parallel_state.get_data_parallel_group(with_context_parallel=True)
    )


def _agree_on_name() -> str:
    """A name for this start of the run, the same on all ranks.

    Processes that write in the background outlive a killed rank for a while. What they still write must not fall into
    the files of the run that was started again.
    """
    name = [new_token()]
    torch.distributed.broadcast_object_list(name, src=0)
    return name[0]


# -- checksums -------------------------------------------------------------------------------------------------------
def hash_own_files(directory: Path, rank: int) -> dict[str, str]:
    """``{file name: SHA-256}`` of the tensor files that this rank wrote; Megatron-Core names them ``__{rank}_{n}``."""
    return {path.name: file_sha256(path) for path in sorted(directory.glob(f"__{rank}_*.distcp"))}


def _write_and_hash(write: Callable, directory: Path, rank: int, *arguments: Any, **options: Any) -> None:
    write(*arguments, **options)
    _hashes_file(directory, rank).write_text(json.dumps(hash_own_files(directory, rank)))


def _take_hashes(directory: Path, rank: int) -> dict[str, str]:
    path = _hashes_file(directory, rank)
    if not path.is_file():
        return {}
    hashes = json.loads(path.read_text())
    path.unlink()
    return hashes


def _hashes_file(directory: Path, rank: int) -> Path:
    return directory / f".hashes_of_rank_{rank}.json"


# -- directories -----------------------------------------------------------------------------------------------------
def remove_leftovers(root: Path) -> None:
    """Deletes what killed saves left, and puts back a checkpoint that was about to be replaced."""
    checkpoints = {name for path in root.glob(".iter_*.partial") if (name := target_name(path.name))}
    for name in sorted(checkpoints | {LATEST_FILE, LATEST_CHECKSUM_FILE, RUN_FILE}):
        remove_partials(root / name)


def apply_retention(root: Path, keep_last: int, newest: int) -> None:
    """Deletes all but the ``keep_last`` newest checkpoints. Iteration 0, the up-scaled model, stays."""
    if not keep_last:
        return
    # Iterations above the newest belong to a run that was rewound; they are not this run's to delete.
    mine = [i for i in list_iterations(root) if 0 < i <= newest]
    for iteration in mine[:-keep_last]:
        discard_directory(iteration_directory(root, iteration))


def set_aside(root: Path, iterations: Iterable[int], *, go_on_from: int) -> None:
    """Renames damaged checkpoints to ``iter_*.damaged``, so that neither retention nor the next start counts them."""
    for iteration in iterations:
        directory = iteration_directory(root, iteration)
        aside = directory.with_name(f"{directory.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        if directory.is_dir():
            os.rename(directory, aside)
    write_latest_iteration(root, go_on_from)
