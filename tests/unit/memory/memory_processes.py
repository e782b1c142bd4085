"""What the processes of the memory tests do. They compare with formulas written out here, head by head."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import mappings
from scenarios import Layout, generator, initialize_parallel, model_config

from megatron_midus.config import MemoryConfig
from megatron_midus.config.memory import MEASURED
from megatron_midus.memory import HeadWiseMemory, MemoryRuntime
from megatron_midus.model.config import make_transformer_config
from megatron_midus.ops import initialize_parameter
from megatron_midus.upscaling import make_plan

LAYER = 3


def make_memory(
    settings: dict[str, Any], layout: Layout, *, seed: int = 0, placement: str = "replicated"
) -> HeadWiseMemory:
    initialize_parallel(layout)
    memory = MemoryConfig(**{"memory_num_keys": 9, "memory_topk": 3, "memory_latent_size": 7, **settings})
    plan = make_plan("interleave", num_layers=2, num_blocks=2, memory=memory)
    model = model_config(plan.num_layers)
    config = make_transformer_config(model, plan, tensor_model_parallel_size=layout.tp, sequence_parallel=layout.sp)
    return HeadWiseMemory(
        model.num_attention_heads * model.kv_channels,
        model.hidden_size,
        config=config,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        memory=memory,
        layer_index=LAYER,
        runtime=MemoryRuntime(seed=seed, value_placement=placement),
    )


def start_values(settings: dict[str, Any], layout: Layout, seed: int) -> dict[str, Any]:
    """Per parameter: this rank's start value, the slice of the global one that it must be, and its marks."""
    module = make_memory(settings, layout, seed=seed)
    rank = parallel_state.get_tensor_model_parallel_rank()
    shapes = module.memory.parameter_shapes(hidden_size=24, num_attention_heads=4, kv_channels=10)
    assert list(shapes) == [name for name, _ in module.named_parameters()]
    found = {}
    for name, parameter in module.named_parameters():
        whole = initialize_parameter(
            name, shapes[name], key_init=module.memory.memory_key_init, seed=seed, layer_index=LAYER
        )
        replicated = name in MEASURED or (name == "value_bank" and module.memory.memory_variant != "full")
        axis = 1 if name == "attn_proj" else 0
        part = whole if replicated else whole.chunk(layout.tp, axis)[rank]
        found[name] = {
            "equal": torch.equal(parameter.data, part),
            "tensor_parallel": bool(getattr(parameter, "tensor_model_parallel", False)),
            "axis": getattr(parameter, "partition_dim", None),
            "is_value": parameter.is_memory_value,
            "kind": parameter.memory_parameter_kind,
        }
    return found


def forward_against_formula(settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """``(module's output, formula's output)`` in float64, every parameter random."""
    module = make_memory(settings, Layout()).double()
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator(name), dtype=torch.float64)
    hidden, normed, residual = _block_inputs(5, 3, torch.float64)
    output, bias = _call(module, hidden, normed, residual)
    assert bias is None
    p = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tokens = [(hidden[s, b], normed[s, b], residual[s, b]) for s in range(5) for b in range(3)]
    expected = torch.stack([_formula(*token, p, module.memory) for token in tokens])
    return output.detach(), expected.view(5, 3, -1)


def _block_inputs(seq_length: int, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[s, b, H*d_h]`` of the heads, ``[s, b, d]`` after the norm and before it."""
    widths = {"hidden": 40, "normed": 24, "residual": 24}
    hidden, normed, residual = (
        torch.randn(seq_length, batch, width, generator=generator(name), dtype=dtype) for name, width in widths.items()
    )
    return hidden, normed, residual


def _call(module: HeadWiseMemory, hidden: torch.Tensor, normed: torch.Tensor, residual: torch.Tensor) -> Any:
    """As the attention and the layer around a memory call it."""
    module.normed = normed if module.memory.reads_normed else None
    module.residual = residual if module.memory.reads_residual else None
    return module(hidden if module.memory.has_attention else None)


def _unit(part: torch.Tensor) -> torch.Tensor:
    return part / math.sqrt(float((part * part).mean()) + 1e-6)


def _raw_queries(
    context: torch.Tensor,
    normed: torch.Tensor,
    residual: torch.Tensor,
    p: dict[str, torch.Tensor],
    memory: MemoryConfig,
) -> list[torch.Tensor]:
    """Of one token, head by head."""
    heads = p["row_keys"].shape[0]
    if memory.memory_query == "attention":
        return list(context.view(heads, -1))
    if memory.memory_query == "token":
        return list(normed.view(heads, -1))
    if memory.memory_query == "block":
        x = residual + context
        x = x / math.sqrt(float((x * x).mean()) + 1e-5) * p["block_norm"]
        return list(x.view(heads, -1))
    pairs = [(_unit(a), _unit(b)) for a, b in zip(context.view(heads, -1), normed.view(heads, -1))]
    return [a + b if memory.memory_query == "sum" else torch.cat([a, b]) for a, b in pairs]


def _formula(
    context: torch.Tensor,
    normed: torch.Tensor,
    residual: torch.Tensor,
    p: dict[str, torch.Tensor],
    memory: MemoryConfig,
) -> torch.Tensor:
    """One token, ``[H*d_h]``, ``[d]``, ``[d]`` -> ``[d]``: scores of all n * n slots of every head, no product-key trick."""
    if "attn_proj" in p:
        context = p["attn_proj"] @ context
    total = torch.zeros(24, dtype=torch.float64)
    parts = []
    for h, raw in enumerate(_raw_queries(context, normed, residual, p, memory)):
        q = raw
        if "query_norm" in p:
            q = q / math.sqrt(float((q * q).mean()) + 1e-6) * p["query_norm"][h]
        if "log_temperature" in p:
            q = q * math.exp(float(p["log_temperature"][h]))
        row, col = q.chunk(2)
        scores = ((p["row_keys"][h] @ row)[:, None] + (p["col_keys"][h] @ col)[None, :]).flatten()
        best, slots = scores.topk(memory.memory_topk)
        weights = {"softmax": best.softmax(0), "sigmoid": best.sigmoid(), "relu": best.relu()}
        values = p["value_bank"][h] if memory.memory_variant == "full" else p["value_bank"]
        found = weights[memory.memory_score_activation] @ values[slots]
        if "head_proj" in p:
            found = found @ p["head_proj"][h]
        if "gate" in p:
            gate = raw @ p["gate"][h]
            found = found * gate / (1 + torch.exp(-gate))
        if memory.memory_variant == "block":
            total = total + found
        parts.append(found)
    m = total if memory.memory_variant == "block" else torch.cat(parts)
    if "mixer" in p:
        m = m + (context if memory.memory_output_projection == "attention" else m) @ p["mixer"]
    if "domain_gate" in p:
        # The module works it out in fp32.
        m = m * float(torch.sigmoid(normed.float() @ p["domain_gate"].float() + p["domain_gate_bias"].float()))
    return m


def value_gradient(settings: dict[str, Any], layout: Layout) -> torch.Tensor:
    """The value bank's gradient after Megatron's reduction of it, from the same tokens at every layout."""
    module = make_memory(settings, layout)
    for name, parameter in module.named_parameters():
        shape = module.memory.parameter_shapes(hidden_size=24, num_attention_heads=4, kv_channels=10)[name]
        whole = torch.randn(shape, generator=generator(name))
        axis = None if tuple(parameter.shape) == shape else 0
        part = whole if axis is None else whole.chunk(layout.tp, axis)[parallel_state.get_tensor_model_parallel_rank()]
        parameter.data.copy_(part)
    rank = parallel_state.get_tensor_model_parallel_rank()
    hidden = torch.randn(6, 2, 40, generator=generator("hidden")).chunk(layout.tp, -1)[rank]
    probe = torch.randn(6, 2, 24, generator=generator("probe"))
    output, _ = module(hidden)
    (output * (probe.chunk(layout.tp, 0)[rank] if layout.sp else probe)).sum().backward()
    gradient = module.value_bank.grad
    if getattr(module.value_bank, "average_gradients_across_tp_domain", False):
        torch.distributed.all_reduce(
            gradient, op=torch.distributed.ReduceOp.AVG, group=parallel_state.get_tensor_model_parallel_group()
        )
    return gradient


def output_and_gradients(settings: dict[str, Any], layout: Layout, placement: str) -> dict[str, Any]:
    """This rank's output, gradient of the input, and for each parameter ``(partition axis, gradient)``.

    The gradient of a replicated bank is reduced as Megatron does; that of any other parameter is taken as it is.
    """
    module = make_memory(settings, layout, placement=placement)
    rank = parallel_state.get_tensor_model_parallel_rank()
    shapes = module.memory.parameter_shapes(hidden_size=24, num_attention_heads=4, kv_channels=10)
    for name, parameter in module.named_parameters():
        whole = torch.randn(shapes[name], generator=generator(name))
        is_split = getattr(parameter, "tensor_model_parallel", False)
        parameter.data.copy_(whole.chunk(layout.tp, parameter.partition_dim)[rank] if is_split else whole)
    hidden, normed, residual = _block_inputs(6, 2, torch.float32)
    hidden = hidden.chunk(layout.tp, -1)[rank].requires_grad_()
    normed, residual = (
        (stream.chunk(layout.tp, 0)[rank] if layout.sp else stream).requires_grad_() for stream in (normed, residual)
    )
    probe = torch.randn(6, 2, 24, generator=generator("probe"))
    output, _ = _call(module, hidden, normed, residual)
    (output * (probe.chunk(layout.tp, 0)[rank] if layout.sp else probe)).sum().backward()
    gradients = {}
    for name, parameter in module.named_parameters():
        if getattr(parameter, "average_gradients_across_tp_domain", False):
            torch.distributed.all_reduce(parameter.grad, group=module.tp_group)
            parameter.grad /= layout.tp
        is_split = getattr(parameter, "tensor_model_parallel", False)
        if name not in MEASURED:
            gradients[name] = (parameter.partition_dim if is_split else None, parameter.grad)
    inputs = {"hidden": hidden.grad, "normed": normed.grad, "residual": residual.grad}
    return {"output": output.detach(), **inputs, "parameters": gradients}


def received_bytes(settings: dict[str, Any], layout: Layout) -> float:
    """Bytes that this rank receives from others for a bank split on its columns, forward and backward."""
    counted = 0.0
    share = (layout.tp - 1) / layout.tp

    def counting(function: Any, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            counted += share * args[position].numel() * args[position].element_size()
            return function(*args, **kwargs)

        return call

    module = make_memory(settings, layout, placement="latent")
    hidden = torch.randn(6, 2, 40).chunk(layout.tp, -1)[0].requires_grad_()
    # The whole of a gather is its output, that of a reduce-scatter and of an exchange its input.
    mappings.dist_all_gather_func = counting(mappings.dist_all_gather_func, 0)
    mappings.dist_reduce_scatter_func = counting(mappings.dist_reduce_scatter_func, 1)
    torch.distributed.all_to_all_single = counting(torch.distributed.all_to_all_single, 1)
    raw, query = module.queries(hidden)
    module._read_split(query).sum().backward()
    return counted


def sharded_tensors(settings: dict[str, Any], layout: Layout, placement: str = "replicated") -> dict[str, tuple]:
    """``{key: (global shape, local shape)}``."""
    state = make_memory(settings, layout, placement=placement).sharded_state_dict("memory.")
    return {value.key: (tuple(value.global_shape), tuple(value.local_shape)) for value in state.values()}


def build_error(settings: dict[str, Any], layout: Layout, placement: str = "replicated") -> str:
    """What the constructor says to what cannot be shared, the builder's own check out of the way."""
    initialize_parallel(layout)
    memory = MemoryConfig(**settings)
    plan = make_plan("none", num_layers=1)
    config = make_transformer_config(model_config(1), plan, tensor_model_parallel_size=layout.tp)
    try:
        HeadWiseMemory(
            40,
            24,
            config=config,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            memory=memory,
            layer_index=0,
            runtime=MemoryRuntime(value_placement=placement),
        )
    except ValueError as error:
        return str(error)
    return "no error"


def values_main_grad(settings: dict[str, Any], *, straight: bool) -> torch.Tensor:
    """Megatron's fp32 gradient of the bank after two micro-batches, by Triton's kernels run as numpy."""
    os.environ["TRITON_INTERPRET"] = "1"  # triton is not imported yet
    module = make_memory(settings, Layout())
    module.runtime = replace(module.runtime, backend="triton", values_main_grad=straight)
    for name, parameter in module.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator(name)))
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    wrapped = DistributedDataParallel(module.config, config, module)
    wrapped.zero_grad_buffer()
    for seed in ("first", "second"):
        with wrapped.no_sync() if seed == "first" else contextlib.nullcontext():
            output, _ = wrapped(torch.randn(3, 2, 40, generator=generator(seed)))
            output.square().sum().backward()
    wrapped.finish_grad_sync()
    assert getattr(module.value_bank, "grad_added_to_main_grad", False) == straight
    return module.value_bank.main_grad.clone()
