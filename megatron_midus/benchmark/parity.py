"""Before anything is timed: is it right? Outputs and gradients of every contender against the definition in float64.

Shapes: T tokens, H heads, D channels of one head's query, N sub-keys per half, K top-k.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_midus.benchmark.contenders import Contender, Inputs, Operands, make_operands, run_backend
from megatron_midus.benchmark.shapes import Shape
from megatron_midus.errors import UserError

CHECK_TOKENS = (1, 5, 64)  # decode and others may take other paths
BLOCK_NUM_KEYS = 64  # at most, for banks of the width of the model: in float64 they would take gigabytes
NAMES = ("query", "row_keys", "col_keys", "values", "head_proj")

# Score K and score K + 1 of all that is looked at differ by this much, so that all precisions select alike. Scores have
# a standard deviation of 1.4 and are at most about 8: fp32 rounding is 1e-6, and a baseline that adds in 16 bits errs by
# two or three units in the last place of 4.
GAPS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

# Allowed beside twice the error of the definition at the same precision, in units in the last place of the largest
# element: what another order of summation may do when the definition happens to be exact. A baseline in 16 bits rounds
# its scores as well, and a score of 4 that is off by one unit changes its weight by 1.6 % (bf16), which is two units.
FLOOR_ULPS = 4
BASELINE_FLOOR_ULPS = 8


@dataclasses.dataclass(frozen=True)
class Check:
    """The largest error of one tensor, relative to its largest element, and what was allowed."""

    contender: str
    tensor: str
    tokens: int
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # false for NaN

    def __str__(self) -> str:
        what = "output" if self.tensor == "out" else f"gradient of {self.tensor}"
        return f"{self.contender}, {what} at T={self.tokens}: error {self.error:.1e}, allowed {self.allowed:.1e}"


class ParityError(UserError):
    """A contender is wrong, so no time of this run may be compared with another."""


def require_parity(contenders: list[Contender], shape: Shape, *, device: str, seed: int) -> list[Check]:
    """The checks of all contenders that compute a memory; nothing is returned unless every one of them passed.

    Raises:
        ParityError: naming every contender that failed, and the worst of its errors.
    """
    checks = [check for function in ("hive", "block") for check in _check(contenders, shape, function, device, seed)]
    failed = [check for check in checks if not check.ok]
    if failed:
        worst = {c.contender: c for c in sorted(failed, key=lambda c: c.error / c.allowed)}
        raise ParityError(
            f"no speed-up is reported at shape {shape.name}, because parity failed: {'; '.join(map(str, worst.values()))}"
        )
    return checks


def _check(contenders: list[Contender], shape: Shape, function: str, device: str, seed: int) -> list[Check]:
    """Checks of the contenders that compute one function, at every number of tokens."""
    chosen = [c for c in contenders if c.function == function]
    if not chosen:
        return []
    if function == "block":
        num_keys = max(shape.topk, min(shape.num_keys, BLOCK_NUM_KEYS))
        shape = dataclasses.replace(shape, num_keys=num_keys)
    found = []
    for tokens in CHECK_TOKENS:
        operands = separated_operands(shape, function, tokens=tokens, device=device, seed=seed)

        def definition(inputs: Inputs) -> torch.Tensor:
            return run_backend("reference", function, shape.topk, inputs)

        truth = _with_gradients(definition, operands, torch.float64)
        plain = _with_gradients(definition, operands, shape.torch_dtype)
        for contender in chosen:
            measured = _with_gradients(contender.run, operands, shape.torch_dtype)
            floor = FLOOR_ULPS if contender.is_backend else BASELINE_FLOOR_ULPS
            found += _compare(contender.name, tokens, truth, plain, measured, floor)
    return found


def _compare(name: str, tokens: int, truth: dict, plain: dict, measured: dict, floor: int) -> list[Check]:
    checks = []
    for tensor, exact in truth.items():
        size = float(exact.abs().max())
        assert size > 0, f"{tensor} is zero, so the comparison says nothing"
        own, reference = (float((found[tensor].double() - exact).abs().max()) / size for found in (measured, plain))
        allowed = 2 * reference + floor * torch.finfo(plain[tensor].dtype).eps
        checks.append(Check(name, tensor, tokens, own, allowed))
    return checks


def _with_gradients(function, operands: Operands, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in operands.inputs]
    out = function(leaves)
    gradients = torch.autograd.grad(out, leaves, operands.grad_out.to(dtype).view_as(out))
    return {"out": out.detach(), **dict(zip(NAMES, gradients))}


def separated_operands(shape: Shape, function: str, *, tokens: int, device: str, seed: int) -> Operands:
    """Operands whose best K slots do not hang on rounding: for each head queries are drawn until enough are clear."""
    operands = make_operands(shape, function, tokens=tokens, device=device, seed=seed)
    query, row_keys, col_keys = operands.inputs[:3]
    generator = torch.Generator(device).manual_seed(seed + 1)
    for head in range(shape.num_heads):
        keys = [half[head].detach().double() for half in (row_keys, col_keys)]  # [N, D/2]
        clear = query.new_empty(0, query.shape[2])
        while len(clear) < tokens:
            drawn = torch.randn(512, query.shape[2], generator=generator, device=device).to(query.dtype)
            clear = torch.cat([clear, drawn[_is_clear(drawn.double(), *keys, shape.topk, GAPS[query.dtype])]])
        query.data[:, head] = clear[:tokens]
    return operands


def _is_clear(
    query: torch.Tensor, row_keys: torch.Tensor, col_keys: torch.Tensor, topk: int, gap: float
) -> torch.Tensor:
    """Which queries ``[T, D]`` of one head have score K that far above score K + 1."""
    row_query, col_query = query.chunk(2, dim=-1)
    among = min(topk + 1, len(row_keys))
    rows = (row_query @ row_keys.T).topk(among, dim=-1).values
    cols = (col_query @ col_keys.T).topk(among, dim=-1).values
    best = (rows[:, :, None] + cols[:, None, :]).flatten(1)
    best = best.topk(min(topk + 1, best.shape[1]), dim=-1).values
    return (best[:, topk - 1] - best[:, -1] > gap) | torch.tensor(best.shape[1] == topk, device=best.device)
