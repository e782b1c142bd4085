"""Up-scaling policies: pure functions from layer counts to an UpscalePlan. Indices are 0-based."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_midus.config import MemoryConfig
from megatron_midus.errors import UserError
from megatron_midus.upscaling.plan import Block, UpscalePlan


def insertion_points(*, num_layers: int, num_blocks: int) -> tuple[tuple[int, ...], str | None]:
    """Spreads ``num_blocks`` insertions over ``num_layers`` layers as evenly as whole numbers allow.

    Returns:
        The layers after which a block is inserted, and a sentence about the rounding (``None`` when it is exact).
        Group ``g`` of the ``num_blocks`` groups ends after layer ``round((g + 1) * num_layers / num_blocks) - 1``, so
        the last insertion always follows the last layer.
    """
    if not 1 <= num_blocks <= num_layers:
        raise UserError(
            f"num_blocks={num_blocks} cannot be inserted between {num_layers} layers one at a time; "
            f"choose 1 to {num_layers}"
        )
    # Integer arithmetic: round() would send halves to the even neighbour and two groups could differ by two.
    ends = [((g + 1) * num_layers * 2 + num_blocks) // (2 * num_blocks) - 1 for g in range(num_blocks)]
    sizes = [end - start for start, end in zip([-1, *ends], ends)]
    if len(set(sizes)) == 1:
        return tuple(ends), None
    note = (
        f"{num_layers} layers do not divide into {num_blocks} equal groups: "
        f"blocks follow layers {', '.join(map(str, ends))} (groups of {min(sizes)} to {max(sizes)} layers)"
    )
    return tuple(ends), note


def _insert(num_layers: int, after: Sequence[int], new_block: Callable[[int], Block], **plan: object) -> UpscalePlan:
    """A plan that keeps every base layer and puts ``new_block(i)`` behind each layer ``i`` of ``after``."""
    check_points(num_layers, after)
    chosen = set(after)
    blocks: list[Block] = []
    for index in range(num_layers):
        blocks.append(Block.keep(index))
        if index in chosen:
            blocks.append(new_block(index))
    return UpscalePlan(num_base_layers=num_layers, blocks=tuple(blocks), **plan)  # type: ignore[arg-type]


def check_points(num_layers: int, after: Sequence[int]) -> None:
    """Raises ``ValueError`` for places that do not exist, or that are named twice."""
    for index in after:
        if not 0 <= index < num_layers:
            raise UserError(f"cannot insert after layer {index}; the base has layers 0 to {num_layers - 1}")
    duplicates = sorted({i for i in after if list(after).count(i) > 1})
    if duplicates:
        raise UserError(f"layers {duplicates} are named more than once; a block is inserted once after a layer")


def _points(num_layers: int, num_blocks: int | None, insert_after: Sequence[int] | None, policy: str):
    if num_blocks is None and insert_after is None:
        raise UserError(
            f"policy {policy} needs the number of blocks to insert; give --num-blocks (1 to {num_layers}), or name the "
            f"layers of the base that a block follows with --insert-after (0 to {num_layers - 1})"
        )
    if num_blocks is not None and insert_after is not None:
        raise UserError(
            f"num_blocks={num_blocks} and insert_after={list(insert_after)} both say how many blocks are inserted; give one"
        )
    if insert_after is not None:
        return tuple(insert_after), ()
    assert num_blocks is not None
    points, note = insertion_points(num_layers=num_layers, num_blocks=num_blocks)
    return points, (note,) if note else ()


def none(*, num_layers: int) -> UpscalePlan:
    """The base as it is: plain continual pre-training."""
    blocks = tuple(Block.keep(i) for i in range(num_layers))
    return UpscalePlan(num_base_layers=num_layers, blocks=blocks, policy="none")


def interleave(
    *,
    num_layers: int,
    memory: MemoryConfig,
    num_blocks: int | None = None,
    insert_after: Sequence[int] | None = None,
) -> UpscalePlan:
    """MIDUS: Memory blocks spread evenly, or behind the layers named (arXiv 2512.13751)."""
    points, notes = _points(num_layers, num_blocks, insert_after, "interleave")
    return _insert(num_layers, points, Block.memory, memory=memory, policy="interleave", notes=notes)


def llama_pro(
    *, num_layers: int, num_blocks: int | None = None, insert_after: Sequence[int] | None = None
) -> UpscalePlan:
    """Copies with zeroed output projections, spread evenly (Wu et al. 2024, arXiv 2401.02415)."""
    points, notes = _points(num_layers, num_blocks, insert_after, "llama_pro")
    return _insert(num_layers, points, lambda i: Block.copy(i, zero_output=True), policy="llama_pro", notes=notes)


def control(
    *, num_layers: int, num_blocks: int | None = None, insert_after: Sequence[int] | None = None
) -> UpscalePlan:
    """No block is added; the layers behind which others would insert one are trained instead, the rest is frozen."""
    points, notes = _points(num_layers, num_blocks, insert_after, "control")
    check_points(num_layers, points)
    blocks = tuple(Block.control(i) if i in points else Block.keep(i) for i in range(num_layers))
    return UpscalePlan(num_base_layers=num_layers, blocks=blocks, policy="control", notes=notes)


def solar(*, num_layers: int, num_blocks: int) -> UpscalePlan:
    """Two overlapping copies of the base, ``[0, L - m)`` and ``[m, L)`` (Kim et al. 2023, arXiv 2312.15166).

    ``num_blocks = L - 2m`` is the number of layers added. The first occurrence of a layer is the base's own.
    """
    if not 1 <= num_blocks <= num_layers:
        raise UserError(f"solar adds L - 2m layers; num_blocks={num_blocks} is not within 1 to {num_layers}")
    notes: tuple[str, ...] = ()
    overlap = num_layers - num_blocks
    first_end = num_layers - overlap // 2
    second_start = first_end - num_blocks
    if overlap % 2:
        notes = (
            f"{num_layers} layers + {num_blocks} leave an odd number ({overlap}) to drop: the first copy drops "
            f"{num_layers - first_end}, the second {second_start}",
        )
    blocks = [Block.keep(i) for i in range(first_end)]
    blocks += [Block.copy(i) if i < first_end else Block.keep(i) for i in range(second_start, num_layers)]
    return UpscalePlan(num_base_layers=num_layers, blocks=tuple(blocks), policy="solar", notes=notes)


def stack(*, num_layers: int, num_blocks: int) -> UpscalePlan:
    """The base repeated, ``[0, L) x g`` (G_stack, Du et al. 2024, arXiv 2405.15319), cut to ``L + num_blocks``."""
    if num_blocks < 1:
        raise UserError(f"stack needs num_blocks of at least 1, not {num_blocks}")
    notes: tuple[str, ...] = ()
    if num_blocks % num_layers:
        whole, rest = divmod(num_blocks, num_layers)
        notes = (
            f"{num_blocks} added blocks are not a multiple of {num_layers} layers: {whole} whole copies and the "
            f"first {rest} layers of another",
        )
    blocks = [Block.keep(i) for i in range(num_layers)]
    blocks += [Block.copy(i % num_layers) for i in range(num_blocks)]
    return UpscalePlan(num_base_layers=num_layers, blocks=tuple(blocks), policy="stack", notes=notes)


def average(*, num_layers: int, **where: Any) -> UpscalePlan:
    """Between layers ``i`` and ``i + 1`` a block that is the mean of every tensor of both. Not an identity."""
    return _between(num_layers, Block.blend, policy="average", **where)


def opt_deus(*, num_layers: int, **where: Any) -> UpscalePlan:
    """As ``average``, after aligning ``i`` to ``i + 1`` by optimal transport; outputs zeroed (arXiv 2508.08011)."""
    return _between(num_layers, lambda i, j: Block.blend(i, j, "transport"), policy="opt_deus", **where)


def opt_deus_literal(*, num_layers: int, **where: Any) -> UpscalePlan:
    """``opt_deus`` with the transport plan unscaled, as in the paper's program (see ``upscaling/transport.py``)."""
    return _between(num_layers, lambda i, j: Block.blend(i, j, "transport_literal"), policy="opt_deus_literal", **where)


def _between(
    num_layers: int,
    new_block: Callable[[int, int], Block],
    *,
    policy: str,
    num_blocks: int | None = None,
    insert_after: Sequence[int] | None = None,
) -> UpscalePlan:
    """A plan with ``new_block(i, i + 1)`` between chosen neighbours."""
    if num_layers < 2:
        raise UserError(f"{policy} needs two neighbouring layers; the base has {num_layers}")
    notes: tuple[str, ...] = ()
    if insert_after is None and num_blocks is not None:
        # The last layer has no successor, so the points are spread over the L - 1 gaps.
        points, note = insertion_points(num_layers=num_layers - 1, num_blocks=num_blocks)
        notes = (note,) if note else ()
    else:
        points, _ = _points(num_layers - 1, num_blocks, insert_after, policy)
    if num_layers - 1 in points:
        raise UserError(f"{policy} cannot insert after layer {num_layers - 1}, which has no next layer")
    return _insert(num_layers, points, lambda i: new_block(i, i + 1), policy=policy, notes=notes)


_BEHIND_A_LAYER = {
    "control": control,
    "llama_pro": llama_pro,
    "average": average,
    "opt_deus": opt_deus,
    "opt_deus_literal": opt_deus_literal,
}
POLICIES = ("none", "interleave", "solar", "stack", *_BEHIND_A_LAYER)
POLICY_ALIASES = {"midus": "interleave"}


def canonical_policy(name: str) -> str:
    """The name that a plan records for what a user may call otherwise; other names unchanged."""
    return POLICY_ALIASES.get(name, name)


def make_plan(
    policy: str,
    *,
    num_layers: int,
    num_blocks: int | None = None,
    insert_after: Sequence[int] | None = None,
    memory: MemoryConfig | None = None,
) -> UpscalePlan:
    """The plan of a policy by name. Raises ``ValueError`` for arguments that the policy does not take.

    ``insert_after`` lists layers explicitly and is taken by the policies that insert behind a layer.
    """
    policy = canonical_policy(policy)
    if policy == "none":
        if num_blocks or insert_after:
            raise UserError("policy none inserts nothing; leave num_blocks and insert_after out")
        return none(num_layers=num_layers)
    if policy == "interleave":
        if memory is None:
            raise UserError("policy interleave needs memory settings")
        return interleave(num_layers=num_layers, memory=memory, num_blocks=num_blocks, insert_after=insert_after)
    if policy in _BEHIND_A_LAYER:
        return _BEHIND_A_LAYER[policy](num_layers=num_layers, num_blocks=num_blocks, insert_after=insert_after)
    if policy in ("solar", "stack"):
        if insert_after is not None:
            raise UserError(f"policy {policy} places its blocks itself; give --num-blocks and no --insert-after")
        if num_blocks is None:
            raise UserError(f"policy {policy} needs the number of layers to add; give --num-blocks")
        return (solar if policy == "solar" else stack)(num_layers=num_layers, num_blocks=num_blocks)
    raise UserError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
