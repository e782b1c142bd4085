"""Shares the work of an evaluation among the processes that torchrun started."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from megatron_midus.errors import UserError

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of one evaluation; each holds the whole model.

    Attributes:
        rank: of this one; 0 tells the result.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share: every ``size``-th item."""
        return items[self.rank :: self.size]

    def all_of(self, own: Sequence[Any]) -> list[Any]:
        """What every process has to say of its share, in the order of the items; every process must call it."""
        if self.size == 1:
            return list(own)
        shares: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(shares, list(own))
        rows = max(len(share) for share in shares)
        return [share[row] for row in range(rows) for share in shares if row < len(share)]

    def from_first(self, function: Callable[[], Item]) -> Item:
        """What ``function`` returns on rank 0, or the ``UserError`` that it raises there, on every process."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = str(error)
        torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def device(self, name: str | None) -> str | None:
        """The GPU of this process where none is named."""
        if self.size > 1 and name in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return name


ALONE = Processes()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes of torchrun's environment, connected; one alone without it.

    A process group that is there already is used and left as it is.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    # Figures travel, not tensors of the model: gloo does on every machine.
    torch.distributed.init_process_group("gloo")
    try:
        yield Processes(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
