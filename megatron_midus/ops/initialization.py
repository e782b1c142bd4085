"""Start values of memory parameters: the one place where they are made.

Values are those of the whole (global) tensor and depend on (seed, layer, name) alone, so every tensor-parallel rank
makes the same tensor and takes its slice.
"""

from __future__ import annotations

import hashlib
import math

import torch

from megatron_midus.errors import UserError

KEY_INITS = ("uniform", "normal", "calibrated")
KEYS = ("row_keys", "col_keys")
CONSTANT = ("query_norm", "block_norm")
ZERO = ("value_bank", "mixer", "log_temperature", "domain_gate", "domain_gate_bias")
MAX_SCALE_TOKENS = 8192  # tokens that the scale of calibrated keys is measured on: a mean over more does not move
FAN_IN_AXIS = {"head_proj": 1, "gate": 1, "attn_proj": 1}


def initialize_parameter(
    name: str,
    shape: tuple[int, ...],
    *,
    key_init: str = "uniform",
    query_scale: float = 1.0,
    seed: int,
    layer_index: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Start value of the memory parameter ``name`` of the layer at the 0-based physical index ``layer_index``.

    ``value_bank``, ``mixer``, ``log_temperature`` and the domain gate (until it is fitted) are zero and ``query_norm`` is ``query_scale``, so that an up-scaled model equals
    its base; ``head_proj`` and ``gate`` are normal of variance 1 / fan_in. ``attn_proj`` is like these and ``block_norm``
    one until the base's own are copied over them. Sub-keys of width w = D/2 are uniform in +-1/sqrt(w) (Lample et al. 2019) or normal of the same
    variance 1 / (3 w). ``calibrated`` keys need the model's queries: they start uniform and ``calibrated_keys``
    replaces them.

    Args:
        shape: global shape, as in ``MemoryConfig.parameter_shapes``.

    Raises:
        ValueError: an unknown name or ``key_init``.
    """
    if key_init not in KEY_INITS:
        raise UserError(f"key_init={key_init!r} is not known; choose one of {list(KEY_INITS)}")
    if name in ZERO:
        return torch.zeros(shape, dtype=dtype)
    if name in CONSTANT:
        return torch.full(shape, query_scale if name == "query_norm" else 1.0, dtype=dtype)
    generator = _generator(seed, layer_index, name)
    if name in KEYS:
        if key_init == "normal":
            return (torch.randn(shape, generator=generator) / math.sqrt(3 * shape[-1])).to(dtype)
        return ((2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[-1])).to(dtype)
    if name in FAN_IN_AXIS:
        return (torch.randn(shape, generator=generator) / math.sqrt(shape[FAN_IN_AXIS[name]])).to(dtype)
    known = [*KEYS, *ZERO, *CONSTANT, *FAN_IN_AXIS]
    raise UserError(f"memory parameter {name!r} is not known; choose one of {known}")


def calibrated_keys(
    query_THD: torch.Tensor, *, num_keys: int, topk: int, seed: int, target_entropy: float = 0.6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sub-keys taken from real queries, so that look-ups spread over the slots from the first step.

    Per head and half, ``num_keys`` queries are drawn, freed of the direction of the queries' mean and brought to one
    length (long keys would win always). One scale per head then makes the softmax over the K selected scores as sharp
    as asked. The direction matters: to subtract the mean from every key alone shifts all scores of a token alike and
    changes no selection, while the mean that all queries share makes them all select the same sub-keys.

    Args:
        query_THD: ``[T, H, D]`` queries as the look-up sees them, after ``transform_query``; T >= 1. Tokens that are
            not finite are left out.
        num_keys: sub-keys per half, N; may exceed T, then queries are drawn repeatedly and noise is added.
        target_entropy: mean entropy of the weights wanted, as a share of its maximum ``log(topk)``; 0 to 1. The
            default leaves about ``topk ** 0.6`` slots in effective use: neither one slot nor a plain average.

    Returns:
        ``(row_keys, col_keys)``, each ``[H, num_keys, D/2]`` in fp32 on the CPU.

    Raises:
        ValueError: no finite token, or a setting out of range.
    """
    _check_calibration(query_THD, num_keys, topk, target_entropy)
    query = query_THD.detach().to("cpu", torch.float32)
    query = query[query.isfinite().all(-1).all(-1)]
    if not len(query):
        raise UserError(f"none of the {query_THD.shape[0]} calibration queries is finite; check the base model")
    halves = query.permute(1, 0, 2).chunk(2, dim=-1)  # 2 x [H, T, D/2]
    directions = [
        torch.stack([_key_directions(part, num_keys, _generator(seed, head, name)) for head, part in enumerate(half)])
        for name, half in zip(KEYS, halves)
    ]  # 2 x [H, N, D/2]
    every = -(-len(query) // MAX_SCALE_TOKENS)
    scale = torch.stack(
        [
            _scale_for_entropy(_best_scores(row_q[::every], col_q[::every], rows, cols, topk), target_entropy)
            for row_q, col_q, rows, cols in zip(*halves, *directions)
        ]
    )
    return directions[0] * scale[:, None, None], directions[1] * scale[:, None, None]


def _check_calibration(query_THD: torch.Tensor, num_keys: int, topk: int, target_entropy: float) -> None:
    if query_THD.dim() != 3 or query_THD.shape[-1] % 2 or not query_THD.numel():
        raise UserError(f"query has shape {list(query_THD.shape)}; give [tokens, heads, channels], channels even")
    if not 1 <= topk <= num_keys:
        raise UserError(f"topk={topk} is out of range; choose 1 to num_keys={num_keys}")
    if not 0 < target_entropy < 1:
        raise UserError(f"target_entropy={target_entropy} is out of range; choose a share of log(topk) in (0, 1)")


def _key_directions(query_TD: torch.Tensor, num_keys: int, generator: torch.Generator) -> torch.Tensor:
    """``[N, D/2]`` rows of length one that do not see the mean of the queries."""
    tokens, channels = query_TD.shape
    mean, spread = query_TD.mean(0), query_TD.std(0, correction=0)
    rounds = -(-num_keys // tokens)
    drawn = torch.cat([torch.randperm(tokens, generator=generator) for _ in range(rounds)])[:num_keys]
    keys = query_TD[drawn] - mean
    noise = torch.randn(keys.shape, generator=generator)
    if not spread.max() > 1e-6 * mean.abs().max():  # one query, or all alike: nothing to learn a direction from
        keys = noise
    elif rounds > 1:
        keys[tokens:] += 0.5 * spread * noise[tokens:]  # a repeated query becomes a neighbour, not a duplicate
    if channels > 1:
        shared = mean / mean.norm().clamp_min(1e-30)
        keys = keys - (keys @ shared)[:, None] * shared
    return keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def _best_scores(
    row_query: torch.Tensor, col_query: torch.Tensor, row_keys: torch.Tensor, col_keys: torch.Tensor, topk: int
) -> torch.Tensor:
    """The K best slot scores of each token of one head, ``[T, K]``; fp64 so that the scale is stable."""
    rows = (row_query @ row_keys.T).topk(topk, dim=-1).values.double()
    cols = (col_query @ col_keys.T).topk(topk, dim=-1).values.double()
    return (rows[:, :, None] + cols[:, None, :]).flatten(1).topk(topk, dim=-1).values


def _scale_for_entropy(scores_TK: torch.Tensor, target: float) -> torch.Tensor:
    """The factor at which softmax(factor * scores) has the mean entropy ``target * log K``; 1 when none has."""
    topk = scores_TK.shape[1]
    spread = (scores_TK[:, 0] - scores_TK[:, -1]).mean()
    if topk == 1 or not spread > 1e-12:
        return torch.ones(())
    # The mean entropy falls as the factor grows: bisect its logarithm between flat and one-hot.
    low, high = math.log(1e-4 / float(spread)), math.log(1e4 / float(spread))
    for _ in range(60):
        middle = (low + high) / 2
        log_p = (math.exp(middle) * scores_TK).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        low, high = (middle, high) if entropy > target * math.log(topk) else (low, middle)
    return torch.tensor(math.exp((low + high) / 2), dtype=torch.float32)


def _generator(seed: int, index: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each tensor, so that the order of calls does not matter."""
    digest = hashlib.sha256(f"{seed}/{index}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
