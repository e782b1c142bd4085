"""Linear algebra of value banks and projections, in float64: ranks, the best shared projection, truncation.

Shapes: M heads, N slots, L latent size, O channels that a head writes, C = columns of a block's whole table: what every
slot holds for all heads side by side, ``M * O``, or ``d`` with variant ``block``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

_ROWS = 8192  # rows that go to float64 at once: a bank of 10^6 slots is not copied whole


@dataclasses.dataclass(frozen=True)
class Rank:
    """How many directions a matrix really uses.

    Attributes:
        effective: ``exp`` of the entropy of the normalised singular values (Roy and Vetterli 2007); ``None`` for zero.
        stable: ``||A||_F^2 / ||A||_2^2``; ``None`` for zero.
        full: the smaller side of the matrix, which bounds both.
        random: the effective rank of Gaussian noise of the same shape, to compare with; ``None`` where noise is no measure.
        spectrum: singular values over the largest one, descending.
    """

    effective: float | None
    stable: float | None
    full: int
    random: float | None
    spectrum: list[float]


def rank_of(singular_values: torch.Tensor, shape: tuple[int, int], *, random: float | None = None) -> Rank:
    """Figures of the singular values, largest first, of a matrix of that shape."""
    full = min(shape)
    values = singular_values.double().clamp(min=0)
    largest = values[0].item() if len(values) else 0.0
    if largest == 0.0:
        return Rank(None, None, full, random, [])
    stable = ((values / largest) ** 2).sum().item()
    return Rank(_effective_rank(values), stable, full, random, (values / largest).tolist())


def _effective_rank(values: torch.Tensor) -> float:
    shares = values / values.sum()
    shares = shares[shares > 0]
    return (-(shares * shares.log()).sum()).exp().item()


@functools.lru_cache
def random_rank(rows: int, columns: int) -> float:
    """Effective rank of Gaussian noise ``[rows, columns]``; of the first 4096 rows, after which it hardly grows."""
    noise = torch.randn(min(rows, 4096), columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return _effective_rank(torch.linalg.svdvals(noise))


def noise_rank_of(singular_values: torch.Tensor, shape: tuple[int, int]) -> Rank:
    """``rank_of`` with ``random`` filled in."""
    return rank_of(singular_values, shape, random=random_rank(*shape))


def gram(rows: torch.Tensor, row_weights: torch.Tensor | None = None) -> torch.Tensor:
    """``A^T diag(w) A`` of ``[N, C]`` in float64."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS].double().cpu()
        weighted = part if row_weights is None else part * row_weights[start : start + _ROWS, None]
        total += weighted.T @ part
    return total


def singular_values(rows: torch.Tensor) -> torch.Tensor:
    """Of a tall matrix through its Gram matrix: those below about 1e-8 of the largest come out as noise of that size."""
    return torch.linalg.eigvalsh(gram(rows)).flip(0).clamp(min=0).sqrt()


def _root(symmetric: torch.Tensor) -> torch.Tensor:
    """``B`` with ``B^T B`` = the matrix."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


# -- the table of a block ----------------------------------------------------------------------------------------
def table_rows(memory: Any) -> torch.Tensor:
    """``[N, C]`` of variants ``full`` (the banks of all heads side by side) and ``block``."""
    values = memory.value_bank.detach()
    return values.transpose(0, 1).flatten(1) if memory.config.memory_variant == "full" else values


def flat_projection(memory: Any) -> torch.Tensor:
    """The projections of all heads side by side, float64 ``[L, M * O]``."""
    return memory.head_proj.detach().double().cpu().transpose(0, 1).flatten(1)


def table_directions(memory: Any, row_weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The right singular vectors of the block's table, of the rows times the root of their weights.

    Args:
        row_weights: float64 ``[N]``, not negative; ``None`` = all alike.

    Returns:
        ``([C, R], [R])``: directions, and singular values, largest first.
    """
    if memory.head_proj is None:
        factor = _root(gram(table_rows(memory), row_weights))
    else:
        # The table V W is never made: with V^T D V = B^T B its right singular vectors are those of the small B W.
        factor = _root(gram(memory.value_bank.detach(), row_weights)) @ flat_projection(memory)
    _, values, directions = torch.linalg.svd(factor, full_matrices=False)
    return directions.T, values


def truncate_table(memory: Any, directions_CR: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameters whose table is the block's, projected onto the span of the directions."""
    projector = directions_CR @ directions_CR.T
    if memory.head_proj is not None:
        heads, latent, out = memory.head_proj.shape
        return {"head_proj": (flat_projection(memory) @ projector).view(latent, heads, out).transpose(0, 1)}
    rows = table_rows(memory)
    parts = [(part.double().cpu() @ projector).to(rows.dtype) for part in rows.split(_ROWS)]
    table = torch.cat(parts)
    if memory.config.memory_variant == "full":
        heads, slots, out = memory.value_bank.shape
        table = table.view(slots, heads, out).transpose(0, 1)
    return {"value_bank": table}


def table_width(memory: Any) -> int:
    """R: the rank that the block's table can have: the latent size, or the rank of a bank without one."""
    if memory.head_proj is not None:
        return min(memory.head_proj.shape[1], memory.head_proj.shape[0] * memory.head_proj.shape[2])
    rows = table_rows(memory)
    return min(rows.shape)


# -- one projection for all heads --------------------------------------------------------------------------------
def shared_projection(latent_grams: torch.Tensor, projections: torch.Tensor, *, ridge: float = 1e-6) -> torch.Tensor:
    """The one projection that comes closest to what all heads write.

    Minimises ``sum_h sum_t ||z_th X - z_th W_h||^2 + r ||X - mean W||^2`` over X: equal projections are kept exactly, and
    latent directions that no z has fall back to the mean.

    Args:
        latent_grams: float64 ``[M, L, L]``, ``sum_t z_th z_th^T`` of each head.
        projections: ``[M, L, O]``.
        ridge: r over the mean diagonal entry of the summed Gram matrix.

    Returns:
        float64 ``[L, O]``.
    """
    projections = projections.double()
    mean = projections.mean(0)
    total = latent_grams.sum(0)
    penalty = ridge * total.diagonal().mean()
    if penalty == 0:  # nothing was read, or all values are zero
        return mean
    moment = (latent_grams @ (projections - mean)).sum(0)
    return mean + torch.linalg.solve(total + penalty * torch.eye(len(total), dtype=torch.float64), moment)
