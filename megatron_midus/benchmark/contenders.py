"""What is timed: the backends of this project, and what they are compared with. All are functions of a list of tensors.

Shapes: T tokens, H heads, D channels of one head's query, N sub-keys per half, K top-k, L latent, O channels that one
head writes, d = H * O hidden size, F FFN hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from megatron_midus.benchmark.shapes import Shape
from megatron_midus.errors import UserError
from megatron_midus.ops import dispatch

Inputs = list[torch.Tensor]

# Of an embedding bag with weights: torch (2.11) computes their gradient in bf16 on a CPU alone.
BAG_IN_BFLOAT16 = "{} has no gradients in bfloat16 on a GPU; time it with --dtype float32"


@dataclasses.dataclass(frozen=True)
class Contender:
    """Attributes:
    name: in tables.
    function: which operands it takes and what it computes: ``hive``, ``block``, ``ffn`` or ``transformer``.
    run: operands to output.
    is_backend: whether it is one of ours.
    """

    name: str
    function: str
    run: Callable[[Inputs], torch.Tensor]
    is_backend: bool = False


@dataclasses.dataclass
class Operands:
    """Leaves of one function, the activations first, and a gradient of its output."""

    inputs: Inputs
    grad_out: torch.Tensor

    @torch.no_grad()
    def refresh(self) -> None:
        """New activations and a new gradient, in place."""
        self.inputs[0].normal_()
        self.grad_out.normal_()


def make_operands(shape: Shape, function: str, *, tokens: int, device: str, seed: int) -> Operands:
    """Random operands of the size at which each would be in a network: activations and gradients about 1.

    The value bank is random as well: at its initial zero most gradients would be zero and nothing would be compared.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, fan_in: int = 1) -> torch.Tensor:
        drawn = torch.randn(size, generator=generator, device=device) / fan_in**0.5
        return drawn.to(shape.torch_dtype).requires_grad_()

    heads, width, half = shape.num_heads, shape.hidden_size, shape.kv_channels // 2
    if function == "ffn":
        inner = shape.ffn_hidden_size
        inputs = [draw(tokens, width), draw(2 * inner, width, fan_in=width), draw(width, inner, fan_in=inner)]
        return Operands(inputs, draw(tokens, width).detach())
    if function == "transformer":
        inner, attention = shape.ffn_hidden_size, heads * shape.kv_channels
        qkv = attention + 2 * shape.num_groups * shape.kv_channels
        inputs = [draw(tokens, width), draw(qkv, width, fan_in=width), draw(width, attention, fan_in=attention)]
        inputs += [draw(2 * inner, width, fan_in=width), draw(width, inner, fan_in=inner)]
        return Operands(inputs, draw(tokens, width).detach())
    inputs = [draw(tokens, heads, 2 * half), *(draw(heads, shape.num_keys, half, fan_in=half) for _ in range(2))]
    if function == "block":
        return Operands([*inputs, draw(shape.num_slots, width)], draw(tokens, 1, width).detach())
    inputs += [draw(shape.num_slots, shape.latent_size)]
    inputs += [draw(heads, shape.latent_size, shape.out_channels, fan_in=shape.latent_size)]
    return Operands(inputs, draw(tokens, heads, shape.out_channels).detach())


# -- ours ------------------------------------------------------------------------------------------------------------
def run_backend(name: str, variant: str, topk: int, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[T, H, O]``, or ``[T, 1, d]`` for block, through the public operator with a backend by name."""
    values_and_projection = inputs[3:] if variant == "hive" else [inputs[3], None]
    return dispatch.head_wise_memory(*inputs[:3], *values_and_projection, topk=topk, variant=variant, backend=name)


def _backend(name: str, variant: str, topk: int) -> Contender:
    label = name if variant == "hive" else f"{name} ({variant})"
    return Contender(label, variant, functools.partial(run_backend, name, variant, topk), is_backend=True)


# -- what a memory is compared with ----------------------------------------------------------------------------------
def swiglu_ffn(inputs: Inputs) -> torch.Tensor:
    """``[T, d]``: the FFN of a Llama block on operands ``[T, d]``, ``[2F, d]``, ``[d, F]``."""
    hidden, weight_in, weight_out = inputs
    gate, up = F.linear(hidden, weight_in).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weight_out)


def transformer_block(shape: Shape, inputs: Inputs) -> torch.Tensor:
    """``[T, d]``: a whole Llama block, without rotation: what a copied block does. Sequences of ``seq_length`` tokens.

    Operands ``[T, d]``, ``[(H + 2G) * D, d]``, ``[d, H * D]``, ``[2F, d]``, ``[d, F]``.
    """
    hidden, weight_qkv, weight_out, *ffn = inputs
    tokens, channels = len(hidden), shape.kv_channels
    length = shape.seq_length if tokens % shape.seq_length == 0 else tokens
    qkv = F.linear(F.rms_norm(hidden, hidden.shape[-1:]), weight_qkv).view(tokens // length, length, -1, channels)
    query, key, value = qkv.transpose(1, 2).split([shape.num_heads, shape.num_groups, shape.num_groups], dim=1)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    hidden = hidden + F.linear(mixed.transpose(1, 2).reshape(tokens, -1), weight_out)
    return hidden + swiglu_ffn([F.rms_norm(hidden, hidden.shape[-1:]), *ffn])


def naive_memory(topk: int, inputs: Inputs) -> torch.Tensor:
    """``[T, H, O]``: product keys as one would write them down, with all scores and all selected rows in memory."""
    query, row_keys, col_keys, values, head_proj = inputs
    slots, scores = select_naively(topk, query, row_keys, col_keys)
    rows = values[slots]  # [T, H, K, L]
    latent = torch.einsum("thk,thkl->thl", scores.softmax(-1), rows)
    return torch.einsum("thl,hlo->tho", latent, head_proj)


def select_naively(
    topk: int, query: torch.Tensor, row_keys: torch.Tensor, col_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and scores of the K best, ``[T, H, K]`` each, over all sums of the best K of either half."""
    num_keys = row_keys.shape[1]
    row_query, col_query = query.chunk(2, dim=-1)
    row_best, row_index = torch.einsum("thd,hnd->thn", row_query, row_keys).topk(topk, dim=-1)
    col_best, col_index = torch.einsum("thd,hnd->thn", col_query, col_keys).topk(topk, dim=-1)
    scores, pair = (row_best[..., :, None] + col_best[..., None, :]).flatten(-2).topk(topk, dim=-1)
    slots = (row_index[..., :, None] * num_keys + col_index[..., None, :]).flatten(-2).gather(-1, pair)
    return slots, scores


def product_key_memory(shape: Shape) -> Callable[[Inputs], torch.Tensor]:
    """``PKM`` of the package product-key-memory, on operands of function ``block``.

    Its query projection and query norm are left out, so that it computes the same function as variant ``block``.

    Raises:
        ImportError: the package is not installed.
    """
    from product_key_memory import PKM

    with torch.device("meta"):  # its weights are replaced in every call
        module = PKM(
            shape.hidden_size,
            heads=shape.num_heads,
            num_keys=shape.num_keys,
            topk=shape.topk,
            dim_head=shape.kv_channels // 2,
        )
    module.to_queries, module.norm = torch.nn.Identity(), torch.nn.Identity()

    def run(inputs: Inputs) -> torch.Tensor:
        query, row_keys, col_keys, values = inputs
        module.num_keys = row_keys.shape[1]  # parity is checked on a smaller bank
        halves = query.unflatten(-1, (2, -1)).transpose(1, 2).reshape(1, len(query), -1)  # [1, T, 2 * H * D/2]
        weights = {"keys": torch.stack([row_keys, col_keys], dim=2), "values.weight": values}
        return torch.func.functional_call(module, weights, (halves,)).transpose(0, 1)

    return run


def memory_layer(topk: int, inputs: Inputs) -> torch.Tensor:
    """``[T, 1, d]``: the look-up of Meta's memory layer, on operands of function ``block``.

    Written here from its paper (Berges et al. 2024, arXiv 2412.09764, section 3.1): product keys per head, softmax over
    the best slots of each, one embedding bag over those of all heads. Their own kernels need a GPU.
    """
    query, row_keys, col_keys, values = inputs
    slots, scores = select_naively(topk, query, row_keys, col_keys)
    bags = F.embedding_bag(slots.flatten(1), values, per_sample_weights=scores.softmax(-1).flatten(1), mode="sum")
    return bags.unsqueeze(1)


# -- who takes part --------------------------------------------------------------------------------------------------
def available_backends(shape: Shape, variant: str, device: str) -> dict[str, str | None]:
    """Every backend of ``ops.dispatch``, with the reason why it cannot run here."""
    inputs = make_operands(dataclasses.replace(shape, num_keys=shape.topk), variant, tokens=2, device=device, seed=0)
    tensors = [*inputs.inputs, *([None] if variant != "hive" else [])]
    settings = {"topk": shape.topk, "variant": variant, "score_activation": "softmax", "deterministic": True}
    reasons = {name: dispatch.unsupported_reason(name, *tensors, **settings) for name in dispatch.BACKENDS}
    if device == "cpu" and reasons["triton"] is None:
        reasons["triton"] = "on a CPU it runs in Triton's interpreter, whose times say nothing"
    return reasons


def find_contenders(
    shape: Shape, *, backends: Sequence[str] | None, baselines: Sequence[str], device: str
) -> tuple[list[Contender], list[str]]:
    """Who is timed at a shape, and sentences about who is not.

    Raises:
        ValueError: a backend that was named and is not known or cannot run.
    """
    reasons = available_backends(shape, "hive", device)
    notes = []
    for name in backends or []:
        if reasons.get(name, "it is not known") is not None:
            known = ", ".join(n for n, reason in reasons.items() if reason is None)
            raise UserError(f"backend {name!r} cannot run: {reasons.get(name, 'it is not known')}; here run {known}")
    if backends is None:
        notes += [f"backend {name}: {reason}" for name, reason in reasons.items() if reason is not None]
        backends = [name for name, reason in reasons.items() if reason is None]
    found = [_backend(name, "hive", shape.topk) for name in backends]
    if "naive" in baselines:
        found.append(Contender("naive", "hive", functools.partial(naive_memory, shape.topk)))
    if "ffn" in baselines:
        found.append(Contender("ffn", "ffn", swiglu_ffn))
    if "copied" in baselines:
        found.append(Contender("copied", "transformer", functools.partial(transformer_block, shape)))
    block = []
    if "memory-layer" in baselines and device == "cuda" and shape.dtype == "bfloat16":
        notes.append(BAG_IN_BFLOAT16.format("memory-layer"))
    elif "memory-layer" in baselines:
        block.append(Contender("memory-layer", "block", functools.partial(memory_layer, shape.topk)))
    if "product-key-memory" in baselines and device == "cuda" and shape.dtype == "bfloat16":
        notes.append(BAG_IN_BFLOAT16.format("product-key-memory"))
    elif "product-key-memory" in baselines:
        try:
            block.append(Contender("product-key-memory", "block", product_key_memory(shape)))
        except ImportError:
            notes.append("product-key-memory is not installed: pip install 'megatron-midus[bench]'")
    if block:
        # Beside them the first of our backends that has their function, variant block.
        ours = next(n for n in backends if available_backends(shape, "block", device)[n] is None)
        found += [_backend(ours, "block", shape.topk), *block]
    return found, notes
