"""All ranks together compare a checkpoint with its checksums, and go back to an earlier one together."""

from __future__ import annotations

from typing import Any

import torch

from megatron_midus.checkpoint.checksums import CHECKSUMS_FILE, DamagedError
from megatron_midus.config.checkpoint import CheckpointConfig
from megatron_midus.errors import UserError
from megatron_midus.training.checkpoint.source import Source, check_share, find_source, is_chosen
from megatron_midus.training.messages import print_rank_0, rank, warn_rank_0


def agree_on_source(checkpoint: CheckpointConfig, source: Source) -> Source:
    """Compares tensors and training state with their checksums, each rank a share of the files, and goes back to an
    earlier checkpoint together with all ranks where that finds damage. Collective.

    Raises:
        ValueError: damage in an iteration that the user chose; no whole checkpoint; ranks that see different files.
    """
    while True:
        damaged, has_checksums = _found_damage(source) if checkpoint.verify_checkpoint else (dict(source.damaged), True)
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (str(source.directory), source.iteration, damaged))
        everyones = {iteration: reason for *_, reasons in found for iteration, reason in reasons.items()}
        # The same on all ranks, so that all leave the loop or none.
        if all(reasons == everyones and iteration not in everyones for _, iteration, reasons in found):
            break
        if is_chosen(checkpoint) or not (source.resume or checkpoint.finetune):
            raise UserError(f"{next(iter(everyones.values()))}; choose another checkpoint, or --no-verify-checkpoint")
        for iteration in sorted(set(everyones) - set(source.damaged)):
            warn_rank_0(f"{everyones[iteration]}. Iteration {iteration} is NOT USED")
        source = find_source(checkpoint, damaged=everyones)
    directories = sorted({directory for directory, *_ in found})
    if len(directories) > 1:
        raise UserError(
            f"ranks see different checkpoints: {', '.join(directories)}; --load must be the same directory on all nodes"
        )
    if not has_checksums:
        print_rank_0(f"{source.directory} has no {CHECKSUMS_FILE}, so it is loaded without having been verified")
    return source


def _found_damage(source: Source) -> tuple[dict[int, str], bool]:
    """Damage known so far and in this rank's share, and whether there is anything to compare with."""
    damaged = dict(source.damaged)
    if source.directory is None:
        return damaged, True
    try:
        count = torch.distributed.get_world_size()
        return damaged, check_share(source.directory, is_state=True, index=rank(), count=count)
    except DamagedError as error:
        damaged[source.iteration] = str(error)
        return damaged, True
