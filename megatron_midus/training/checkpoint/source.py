"""Where a run begins: the newest checkpoint that is as it was written, and never before what ``--save`` holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from megatron_midus.checkpoint.checksums import CHECKSUMS_FILE, DamagedError, check_files, read_checksums
from megatron_midus.checkpoint.layout import (
    BACKGROUND_FILE,
    LATEST_FILE,
    find_checkpoint,
    is_iteration_directory,
    iteration_directory,
    latest_is_as_written,
    list_iterations,
    read_latest_iteration,
)
from megatron_midus.config.checkpoint import CheckpointConfig
from megatron_midus.config.model import ModelConfig
from megatron_midus.errors import UserError
from megatron_midus.training.messages import print_rank_0, warn_rank_0
from megatron_midus.upscaling.plan import UpscalePlan

# The configuration of the run that writes into a checkpoint directory, there before its first checkpoint.
RUN_FILE = "run.yaml"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a run begins.

    Attributes:
        directory: the ``iter_*`` directory whose weights are loaded; ``None`` = fresh weights.
        iteration: the iteration that the directory stands for.
        resume: whether its training state (iteration, optimizer, schedule, random numbers) counts, too.
        damaged: newer iterations that are not used, and why.
    """

    directory: Path | None
    iteration: int = 0
    resume: bool = False
    damaged: Mapping[int, str] = dataclasses.field(default_factory=dict)


def find_start(checkpoint: CheckpointConfig) -> tuple[CheckpointConfig, Source]:
    """``find_source`` for a run that saves: it never begins before the latest iteration that ``--save`` holds.

    What would begin at iteration 0 in a used ``--save`` of the same model is the command that began that run, given a
    second time: it goes on from ``--save``, and says so. What else lies before that iteration is refused.

    Returns:
        The configuration, with ``--save`` as its ``--load`` where the run goes on from there; and its source.

    Raises:
        ValueError: see ``find_source``; a run that would take ``--save`` back, or is of another model.
    """
    source = find_source(checkpoint)
    held = held_iteration(checkpoint.save)
    first = source.iteration if source.resume else 0
    if held is None or (not is_chosen(checkpoint) and source.resume and _lies_in(source, checkpoint.save)):
        return checkpoint, source
    if first >= held and source.directory is not None:
        if held and not _lies_in(source, checkpoint.save):
            warn_rank_0(f"--save {checkpoint.save} holds iteration {held} of another run, which this one does not load")
        return checkpoint, source
    if checkpoint.finetune or checkpoint.ckpt_step is not None or first or _lies_in(source, checkpoint.save):
        raise UserError(_would_take_back(checkpoint, first, held))
    continued = dataclasses.replace(checkpoint, load=checkpoint.save)
    found = find_source(continued)
    _check_same_model(source, found)
    print_rank_0(
        f"--save {checkpoint.save} holds iteration {held} already: going on from there, not from "
        f"{source.directory or 'fresh weights'}"
    )
    return continued, found


def held_iteration(root: str | Path | None) -> int | None:
    """The latest iteration that a directory for checkpoints holds; ``None`` for one without any."""
    if root is None or not Path(root).is_dir():
        return None
    try:
        latest = read_latest_iteration(root)
    except UserError:
        latest = None  # damaged
    if latest is not None and iteration_directory(root, latest).is_dir():
        return latest
    return max(_with_checksums(Path(root)), default=None)


def _lies_in(source: Source, root: str | None) -> bool:
    """Whether links lead to the same directory."""
    return (
        root is not None and source.directory is not None and source.directory.parent.resolve() == Path(root).resolve()
    )


def _would_take_back(checkpoint: CheckpointConfig, first: int, held: int) -> str:
    save = checkpoint.save
    said = f"--save {save} holds iteration {held}, and this run would begin "
    if checkpoint.finetune:
        return (
            f"{said}at iteration 0 (--finetune); give --load {save} without --finetune to go on with that run, or another "
            "--save for a new one"
        )
    if is_chosen(checkpoint):
        named = f"--load {checkpoint.load}" + (f" --ckpt-step {first}" if checkpoint.ckpt_step is not None else "")
        return (
            f"{said}at iteration {first} ({named}); give another --save to branch off there, or --load {save} alone to go "
            "on with that run"
        )
    return (
        f"{said}at iteration {first} of --load {checkpoint.load}; give --load {save} to go on with the run in --save, or "
        "another --save"
    )


def _check_same_model(source: Source, found: Source) -> None:
    """Refuses to go on with a run of another model. Flags of a model from scratch are compared when it is built."""
    if source.directory is None or found.directory is None:
        return
    difference = UpscalePlan.load(source.directory).difference(UpscalePlan.load(found.directory))
    mine, theirs = (ModelConfig.load(directory).to_dict() for directory in (source.directory, found.directory))
    for name in mine:
        if difference is None and mine[name] != theirs[name]:
            difference = f"{name}: {mine[name]} against {theirs[name]}"
    if difference is not None:
        raise UserError(
            f"{found.directory} in --save is of another model than {source.directory} ({difference}); choose another --save"
        )


def find_source(checkpoint: CheckpointConfig, *, damaged: Mapping[int, str] | None = None) -> Source:
    """Resolves ``--load``, ``--ckpt-step``, ``--pretrained-checkpoint``, ``--finetune``.

    Only plan, architecture and Hugging Face files are compared with their checksums here, because they are read before
    the ranks are connected; ``verification.agree_on_source`` does the rest.

    Args:
        damaged: iterations that are known not to be whole, and why.

    Raises:
        ValueError: a directory that does not exist or holds no checkpoint where one is needed, or only damaged ones.
    """
    if checkpoint.load is not None and _holds_checkpoint(checkpoint):
        if not checkpoint.verify_checkpoint or is_chosen(checkpoint):
            directory, iteration = find_checkpoint(checkpoint.load, checkpoint.ckpt_step)
            if checkpoint.verify_checkpoint:
                check_share(directory, is_state=False)
            return Source(directory, iteration, resume=not checkpoint.finetune)
        return _newest_whole(checkpoint, dict(damaged or {}))
    if checkpoint.pretrained_checkpoint is not None:
        directory, iteration = find_checkpoint(checkpoint.pretrained_checkpoint)
        if checkpoint.verify_checkpoint:
            check_share(directory, is_state=False)
        return Source(directory, iteration)
    return Source(None)


def is_chosen(checkpoint: CheckpointConfig) -> bool:
    """Whether the user named one iteration, which is then loaded or refused but never replaced by another."""
    return checkpoint.ckpt_step is not None or is_iteration_directory(checkpoint.load or "")


def _holds_checkpoint(checkpoint: CheckpointConfig) -> bool:
    """Whether ``--load`` is to be loaded; false for a directory that the first run is yet to fill."""
    assert checkpoint.load is not None
    root = Path(checkpoint.load)
    must_exist = checkpoint.exit_on_missing_checkpoint or checkpoint.finetune or checkpoint.ckpt_step is not None
    if not root.exists():
        same = checkpoint.save is not None and Path(checkpoint.save).resolve() == root.resolve()
        if must_exist or not (same or checkpoint.pretrained_checkpoint):
            raise UserError(
                f"checkpoint directory {root} does not exist; give an existing one to --load, or the directory of "
                "--save to begin a run there"
            )
        return False
    if root.is_dir() and not must_exist and not (root / LATEST_FILE).is_file():
        # What a run leaves that was killed before its first checkpoint: staging directories and its configuration.
        return any(not path.name.startswith(".") and path.name != RUN_FILE for path in root.iterdir())
    return True


# -- newest whole checkpoint -----------------------------------------------------------------------------------------
def _newest_whole(checkpoint: CheckpointConfig, damaged: dict[int, str]) -> Source:
    """The latest checkpoint, or the newest before it whose small files are as they were written; says so if it is not
    the latest."""
    root = Path(checkpoint.load or "")
    complaint, candidates = _candidates(root)
    if complaint and not damaged:
        warn_rank_0(complaint)
    for iteration in candidates:
        if iteration in damaged:
            continue
        directory = iteration_directory(root, iteration)
        try:
            check_share(directory, is_state=False)
        except DamagedError as error:
            damaged[iteration] = str(error)
            warn_rank_0(f"{error}. Iteration {iteration} is NOT USED")
            continue
        if complaint or damaged:
            warn_rank_0(f"going on from iteration {iteration} of {root} instead")
        return Source(directory, iteration, resume=not checkpoint.finetune, damaged=damaged)
    raise UserError(
        f"{complaint + '; ' if complaint else ''}no checkpoint of {root} is whole ({'; '.join(damaged.values())}); "
        "give --no-verify-checkpoint to load one anyway, or another directory"
    )


def _candidates(root: Path) -> tuple[str, list[int]]:
    """What is wrong with the file that names the latest iteration, if anything, and iterations to try in order."""
    if not (root / LATEST_FILE).is_file() and not _with_checksums(root):
        find_checkpoint(root)  # raises what there is to say about a directory that is none of ours
    try:
        latest = read_latest_iteration(root)
        complaint = f"{root / LATEST_FILE} is missing" if latest is None else ""
    except ValueError as error:
        latest, complaint = None, str(error)
    if latest is not None and not iteration_directory(root, latest).is_dir():
        complaint = f"{root / LATEST_FILE} says {latest}, which does not exist"
        latest = None
    if latest is None:
        # Only what says itself that it is whole: without the file nobody else does.
        return complaint, _with_checksums(root)[::-1]
    if not latest_is_as_written(root):
        complaint = (
            f"{root / LATEST_FILE} says {latest} and has not the hash that was written with it: it was edited by hand, "
            f"or it is damaged; there are iterations {list_iterations(root)}, --ckpt-step chooses another one"
        )
    return complaint, [latest, *(i for i in reversed(list_iterations(root)) if i < latest)]


def _with_checksums(root: Path) -> list[int]:
    return [i for i in list_iterations(root) if (iteration_directory(root, i) / CHECKSUMS_FILE).is_file()]


def _is_state(name: str) -> bool:
    """Whether a file holds tensors or training state; the others are small and read by every rank."""
    return name.endswith((".distcp", ".pt")) or name in (".metadata", BACKGROUND_FILE)


def check_share(directory: Path, *, is_state: bool, index: int = 0, count: int = 1) -> bool:
    """Compares every ``count``-th file of one kind with its checksum; false where there are no checksums.

    Args:
        is_state: files of tensors and training state, else the small ones that every rank reads.

    Raises:
        DamagedError: a file that is missing or not as it was written.
    """
    checksums = read_checksums(directory)
    if checksums is None:
        return False
    names = sorted(name for name in checksums if _is_state(name) == is_state)
    check_files(directory, checksums, names[index::count])
    return True
