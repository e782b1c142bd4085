"""Up-scaling a MIDUS model again: the plans that keep its Memory blocks. Indices are 0-based and count all its blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from megatron_midus.config import MemoryConfig
from megatron_midus.errors import UserError
from megatron_midus.upscaling.plan import STARTS, Block, UpscalePlan
from megatron_midus.upscaling.policies import check_points, insertion_points

_NEW_BLOCK: dict[str, Callable[[int], Block]] = {
    "interleave": Block.memory,
    "llama_pro": lambda source: Block.copy(source, zero_output=True),
}


def grow(
    policy: str,
    base: UpscalePlan,
    *,
    memory: MemoryConfig,
    num_blocks: int | None = None,
    insert_after: Sequence[int] | None = None,
    train_earlier_memory: bool = False,
) -> UpscalePlan:
    """The plan of a policy for a base that has Memory blocks.

    Args:
        policy: ``interleave``, ``llama_pro`` or ``control``.
        base: the plan of the base.
        memory: of all Memory blocks, made by ``grown_memory``.
        num_blocks: spread by ``spread_between``.
        insert_after: blocks of the base, Memory blocks among them, instead of ``num_blocks``.
        train_earlier_memory: whether ``--train inserted`` trains the base's Memory blocks as well.

    Raises:
        UserError: a policy that cannot, or places that do not exist.
    """
    _check_policy(policy)
    kinds = base.block_types
    points = _points(kinds, num_blocks, insert_after)
    blocks: list[Block] = []
    for index, kind in enumerate(kinds):
        is_trained = policy == "control" and index in points
        if kind == "memory":
            blocks.append(Block.keep_memory(index, inserted=is_trained or train_earlier_memory))
        else:
            blocks.append(Block.control(index) if is_trained else Block.keep(index))
        if index in points and policy != "control":
            blocks.append(_NEW_BLOCK[policy](_layer_before(kinds, index)))
    return UpscalePlan(
        num_base_layers=len(kinds), blocks=tuple(blocks), memory=memory, policy=policy, base=base
    )  # fmt: skip


def _check_policy(policy: str) -> None:
    if policy == "none":
        raise UserError(
            "policy none inserts nothing, and the model is up-scaled already; midus convert --to megatron makes a "
            "checkpoint of it to train"
        )
    if policy != "control" and policy not in _NEW_BLOCK:
        raise UserError(
            f"policy {policy} repeats or mixes blocks of its base, and this one has Memory blocks: a second copy of a memory "
            "would say what the first says once more; choose interleave, llama_pro or control, or up-scale its base"
        )


def grown_memory(stored: MemoryConfig, given: Mapping[str, Any], preset: str | None) -> MemoryConfig:
    """The settings of all Memory blocks: those of the base, with what was given about the start of the new ones.

    Raises:
        UserError: a setting that differs. All blocks of a model share one set.
    """
    if preset is not None:
        raise UserError(
            f"--preset {preset}: new Memory blocks have the settings of those that the model has; leave it out"
        )
    for name, value in given.items():
        if name not in STARTS and value != getattr(stored, name):
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} {value} differs from the Memory blocks that the model has ({getattr(stored, name)}), and all blocks "
                "of a model share their settings; leave it out"
            )
    return dataclasses.replace(stored, **{name: value for name, value in given.items() if name in STARTS})


def _points(kinds: Sequence[str], num_blocks: int | None, insert_after: Sequence[int] | None) -> tuple[int, ...]:
    if (num_blocks is None) == (insert_after is None):
        raise UserError(
            "give --num-blocks, or the blocks of the model that a new one follows with --insert-after "
            f"(0 to {len(kinds) - 1}, its Memory blocks counted), one of the two"
        )
    if insert_after is not None:
        check_points(len(kinds), insert_after)
        return tuple(insert_after)
    assert num_blocks is not None
    return spread_between(kinds, num_blocks)


def spread_between(kinds: Sequence[str], num_blocks: int) -> tuple[int, ...]:
    """Places for new blocks between the Memory blocks of a model: behind Transformer blocks that none of those follows.

    Each block goes where the most Transformer blocks stand in a row; a row with several is cut evenly. Memory blocks every
    fourth layer, and then as many again, stand every second layer.

    Args:
        kinds: ``"memory"`` or ``"transformer"`` per block.
    """
    rows = _rows(kinds)
    room = sum(len(row) - ends for row, ends in rows)
    if not 1 <= num_blocks <= room:
        remedy = (
            f"choose 1 to {room}, or name places with --insert-after" if room else "name places with --insert-after"
        )
        raise UserError(
            f"num_blocks={num_blocks} does not fit: {room} Transformer blocks of the model have no Memory block behind them; {remedy}"
        )
    shares = [0] * len(rows)
    for _ in range(num_blocks):
        open_rows = [i for i, (row, ends) in enumerate(rows) if shares[i] < len(row) - ends]
        # Of equal rows the one that no Memory block ends yet, then the first.
        shares[min(open_rows, key=lambda i: _need(*rows[i], shares[i]))] += 1
    points: list[int] = []
    for (row, ends), share in zip(rows, shares):
        if share:
            cuts, _ = insertion_points(num_layers=len(row), num_blocks=share + ends)
            points += [row[cut] for cut in cuts[:share]]
    return tuple(points)


def _rows(kinds: Sequence[str]) -> list[tuple[list[int], bool]]:
    """Transformer blocks without a Memory block between them, and whether one ends the row."""
    rows: list[tuple[list[int], bool]] = []
    row: list[int] = []
    for index, kind in enumerate(kinds):
        if kind == "transformer":
            row.append(index)
        elif row:
            rows.append((row, True))
            row = []
    return [*rows, (row, False)] if row else rows


def _need(row: Sequence[int], ends: bool, share: int) -> tuple[Fraction, bool]:
    """The smaller, the sooner a row gets a block: minus the blocks that stand together in it."""
    parts = share + ends
    return -Fraction(len(row), max(1, parts)), parts > 0


def _layer_before(kinds: Sequence[str], index: int) -> int:
    """The Transformer block from which a block behind block ``index`` is made: the nearest that is not after it."""
    layers = [layer for layer, kind in enumerate(kinds) if kind == "transformer"]
    return max([layer for layer in layers if layer <= index], default=layers[0])
