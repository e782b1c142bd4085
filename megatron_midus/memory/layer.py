"""HeadWiseMemory: the memory of one block as a Megatron module. It takes the place of an attention's output projection.

Shapes: s sequence, b batch, p tensor-parallel ranks, h hidden size, T = s * b tokens, M memory heads, D channels of one
memory head's query, O output channels of one head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    all_to_all_hp2sp,
    all_to_all_sp2hp,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_last_dim_to_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from megatron_midus.config import MemoryConfig
from megatron_midus.config.memory import MEASURED, STORED_NAMES
from megatron_midus.errors import UserError
from megatron_midus.memory.balance import BalanceLoss
from megatron_midus.memory.latent import read_latent_bank
from megatron_midus.memory.runtime import MemoryRuntime, ValuePlacement
from megatron_midus.ops import (
    Observer,
    balance_loss,
    head_wise_memory,
    initialize_parameter,
    transform_query,
    unit_rms,
    weigh_slots,
)


def partition_axis(name: str, memory: MemoryConfig, value_placement: ValuePlacement = "replicated") -> int | None:
    """The axis on which tensor parallelism splits a parameter; ``None`` = every rank holds the whole of it."""
    if name == "attn_proj":
        return 1
    if name in MEASURED:
        return None
    if name == "value_bank" and memory.memory_variant != "full":
        return 1 if value_placement == "latent" else None
    return 0


class HeadWiseMemory(MegatronModule):
    """Looks something up for every head of an attention (Kim et al., MIDUS, arXiv 2512.13751).

    Built and called as the ``linear_proj`` of ``megatron.core.transformer.attention.SelfAttention``, whose arguments
    come first; those that only a matrix needs are accepted and unused. What a query needs beside the attention's output
    is put into ``normed`` and ``residual`` by the attention and the layer around it (``model/layer.py``).

    Args:
        input_size: channels of the concatenated heads, all ranks together.
        output_size: hidden size, h.
        config: of the model; ``sequence_parallel`` decides in which layout the output leaves.
        tp_group: ranks over which the heads are split.
        memory: shape and variant.
        layer_index: 0-based position of the block, part of the seed of its initial values.
        runtime: operators, placement of the values, seed.

    Parameters and their global shapes are ``MemoryConfig.parameter_shapes``; each carries its name there as
    ``memory_parameter_kind``; ``is_memory_value`` says whether it is the value bank, ``is_measured`` whether training leaves
    it alone.

    Attributes:
        observer: is shown ``(indices, weights)`` of this rank's heads, ``[T, M/p, K]``, in every forward pass that
            records gradients: once per micro-batch of training, with activation recompute as well, and never in
            evaluation. It changes nothing.
        normed, residual: the block's input after and before its norm, ``[s, b, h]``, with sequence parallelism ``[s/p, b,
            h]``, for the length of one forward pass; where ``memory`` reads neither, ``None``.
        balance_loss: adds the auxiliary loss to the backward pass; ``None`` = there is none.

    Raises:
        ValueError: heads, or columns of a latent bank, that the ranks cannot share evenly.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        memory: MemoryConfig,
        layer_index: int,
        runtime: MemoryRuntime | None = None,
        init_method: Any = None,
        bias: bool = False,
        input_is_parallel: bool = True,
        skip_bias_add: bool = True,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert input_size == config.num_attention_heads * config.kv_channels, "not behind an attention"
        assert output_size == config.hidden_size and input_is_parallel and not is_expert
        self.memory = memory
        self.layer_index = layer_index
        self.runtime = runtime or MemoryRuntime()
        self.tp_group = tp_group
        self.normed: torch.Tensor | None = None
        self.residual: torch.Tensor | None = None
        self.observer: Observer | None = None
        self.balance_loss: BalanceLoss | None = None
        is_split = self.runtime.value_placement == "latent" and memory.memory_variant != "full" and tp_group.size() > 1
        self.value_placement: ValuePlacement = "latent" if is_split else "replicated"
        self._check_heads()
        self.num_memory_heads = memory.num_memory_heads(config.num_attention_heads) // tp_group.size()  # M/p
        shapes = memory.parameter_shapes(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            kv_channels=config.kv_channels,
        )
        for name, shape in shapes.items():
            self.register_parameter(name, self._make_parameter(name, shape))

    def _check_heads(self) -> None:
        ranks = self.tp_group.size()
        for what, heads in (
            ("num_attention_heads", self.config.num_attention_heads),
            ("memory_num_heads", self.memory.num_memory_heads(self.config.num_attention_heads)),
        ):
            if heads % ranks:
                divisors = [n for n in range(1, heads + 1) if heads % n == 0]
                raise UserError(
                    f"{what}={heads} is not divisible by tensor_model_parallel_size={ranks}; choose one of {divisors}"
                )

    def _make_parameter(self, name: str, shape: tuple[int, ...]) -> torch.nn.Parameter:
        """This rank's part of parameter ``name`` of global shape ``shape``."""
        config, ranks = self.config, self.tp_group.size()
        axis = partition_axis(name, self.memory, self.value_placement)
        if name == "value_bank" and axis is not None and shape[axis] % ranks:
            raise UserError(
                f"a value bank of {shape[axis]} columns cannot be split over tensor_model_parallel_size={ranks}; "
                "choose --memory-value-placement replicated"
            )
        local_shape = [size // ranks if i == axis else size for i, size in enumerate(shape)]
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        data = torch.empty(local_shape, dtype=config.params_dtype, device=device)
        if config.perform_initialization:
            whole = initialize_parameter(
                name,
                shape,
                key_init=self.memory.memory_key_init,
                query_scale=self.memory.memory_query_scale,
                seed=self.runtime.seed,
                layer_index=self.layer_index,
                dtype=config.params_dtype,
            )
            data.copy_(whole if axis is None else whole.chunk(ranks, dim=axis)[self.tp_group.rank()])
        parameter = torch.nn.Parameter(data)
        if axis is not None:
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=axis, stride=1)
        elif ranks > 1 and name not in MEASURED:
            # Each rank's gradient covers its own heads. Megatron reduces this mark as a mean, once a step;
            # forward() scales by p, which makes it the sum, with sequence parallelism or without.
            parameter.average_gradients_across_tp_domain = True
        parameter.memory_parameter_kind = name
        parameter.is_memory_value = name == "value_bank"
        parameter.is_measured = name in MEASURED
        return parameter

    def queries(self, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries of this rank's heads.

        Args:
            hidden: ``[s, b, H*d_h/p]``, output of the attention's heads; ``None`` without an attention.

        Returns:
            ``(raw, query)``, both ``[T, M/p, D]``: before and after norm and temperature.
        """
        raw = self._raw_query(self._context(hidden))
        return raw, self._transform(raw)

    def _transform(self, raw: torch.Tensor) -> torch.Tensor:
        return transform_query(raw, self._parameters.get("query_norm"), self._parameters.get("log_temperature"))

    def _context(self, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """What the attention says, this rank's channels ``[T, C/p]``: the heads' output or its projection."""
        if hidden is None:
            return None
        flat = hidden.reshape(-1, hidden.shape[-1])  # [T, H*d_h/p]
        attn_proj = self._parameters.get("attn_proj")
        if attn_proj is None:
            return flat
        partial = F.linear(flat, attn_proj)  # [T, h], this rank's share of the sum
        return reduce_scatter_last_dim_to_tensor_parallel_region(partial, group=self.tp_group)  # [T, h/p]

    def _raw_query(self, context: torch.Tensor | None) -> torch.Tensor:
        """``[T, M/p, D]`` from what ``memory_query`` names."""
        kind = self.memory.memory_query
        if kind == "token":
            return self._heads(self._own_channels(self.normed))
        assert context is not None
        if kind == "attention":
            return self._heads(context)
        if kind == "block":
            return self._heads(self._block_norm(self._own_channels(self.residual) + context))
        parts = unit_rms(self._heads(context)), unit_rms(self._heads(self._own_channels(self.normed)))
        return parts[0] + parts[1] if kind == "sum" else torch.cat(parts, dim=-1)

    def _heads(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.view(flat.shape[0], self.num_memory_heads, -1)

    def _own_channels(self, stream: torch.Tensor | None) -> torch.Tensor:
        """This rank's channels of all tokens, ``[T, h/p]``, from the layout of the residual stream."""
        assert stream is not None, "the layer around the memory did not hand it the block's input"
        if self.config.sequence_parallel:
            return all_to_all_sp2hp(stream, group=self.tp_group)
        return scatter_to_tensor_model_parallel_region(stream, group=self.tp_group).reshape(
            -1, stream.shape[-1] // self.tp_group.size()
        )

    def _block_norm(self, own: torch.Tensor) -> torch.Tensor:
        """The RMS norm before a copied MLP, ``[T, h/p]``, over the channels of all ranks."""
        wide = own.to(torch.promote_types(own.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True)
        # Every rank's channels depend on the sum, so its gradient is summed over the ranks as well.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        scale = torch.rsqrt(squares / self.config.hidden_size + self.config.layernorm_epsilon)
        return self.block_norm * (wide * scale).to(own.dtype)

    def forward(self, hidden: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        """Reads the memory.

        Args:
            hidden: ``[s, b, H*d_h/p]``; the whole sequence, with sequence parallelism too. ``None`` without an attention.

        Returns:
            ``(output, None)``: ``[s, b, h]``, with sequence parallelism ``[s/p, b, h]``. There is no bias.
        """
        context = self._context(hidden)
        raw = self._raw_query(context)
        query = self._transform(raw)
        # [T, M/p, O]; block: [T, 1, h] summed over this rank's heads, or, of a latent bank, [T, 1, h/p] over all heads
        read = self._read_split if self.value_placement == "latent" else self._read_whole
        selected: list[torch.Tensor] = []
        found = read(query, self._observer(selected))
        gate = self._parameters.get("gate")
        if gate is not None:
            found = found * F.silu(torch.einsum("thd,hdo->tho", raw, gate))
        found = found.reshape(*self._positions(hidden), -1)
        output = self._leave(found)
        mixer = self._parameters.get("mixer")
        if mixer is not None:
            mixed = found
            if self.memory.memory_output_projection == "attention":
                assert context is not None
                mixed = context.view(*found.shape[:2], -1)
            output = output + self._sum_over_ranks(mixed @ mixer)
        if self.memory.memory_domain_gate:
            output = output * self.domain_probability().to(output.dtype)
        if selected:
            output = self._with_balance_loss(output, query, selected[0])
        return output, None

    def domain_probability(self) -> torch.Tensor:
        """That a token belongs to the new domain: ``[s, b, 1]`` in fp32, with sequence parallelism ``[s/p, b, 1]``."""
        assert self.normed is not None
        # A classifier of what the base says, not a part of what learns.
        score = F.linear(self.normed.detach().float(), self.domain_gate.float()[None], self.domain_gate_bias.float())
        return score.sigmoid()

    def _positions(self, hidden: torch.Tensor | None) -> tuple[int, int]:
        """``(s, b)`` of the whole sequence."""
        if hidden is not None:
            return hidden.shape[0], hidden.shape[1]
        assert self.normed is not None
        seq_length, batch, _ = self.normed.shape
        return seq_length * (self.tp_group.size() if self.config.sequence_parallel else 1), batch

    def _observer(self, selected: list[torch.Tensor]) -> Observer | None:
        """Who is to be shown this pass; ``selected`` receives the slots where the balance loss needs them."""
        # Recompute runs a layer twice, the first time without gradients. Asked here: inside of operators they are off.
        if not torch.is_grad_enabled():
            return None
        observer = self.observer
        if self.balance_loss is None:
            return observer

        def show(indices: torch.Tensor, weights: torch.Tensor) -> None:
            selected.append(indices)
            if observer is not None:
                observer(indices, weights)

        return show

    def _with_balance_loss(self, output: torch.Tensor, query: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        assert self.balance_loss is not None
        return self.balance_loss.attach(
            output,
            balance_loss(query, self.row_keys, self.col_keys, indices),
            num_heads=self.num_memory_heads * self.tp_group.size(),
            num_tokens=query.shape[0],
            config=self.config,
        )

    def _read_whole(self, query: torch.Tensor, observer: Observer | None = None) -> torch.Tensor:
        """The look-up in banks that this rank holds whole."""
        values = self.value_bank
        if partition_axis("value_bank", self.memory) is None:
            values = _ScaleGradient.apply(values, self.tp_group.size())
        return head_wise_memory(
            query,
            self.row_keys,
            self.col_keys,
            values,
            self._parameters.get("head_proj"),
            topk=self.memory.memory_topk,
            variant=self.memory.memory_variant,
            score_activation=self.memory.memory_score_activation,
            backend=self.runtime.backend,
            deterministic=self.runtime.deterministic,
            values_main_grad=self._values_main_grad(),
            observer=observer,
        )

    def _read_split(self, query: torch.Tensor, observer: Observer | None = None) -> torch.Tensor:
        """The look-up in a bank of which every rank holds some columns."""
        indices, weights = weigh_slots(
            query,
            self.row_keys,
            self.col_keys,
            topk=self.memory.memory_topk,
            score_activation=self.memory.memory_score_activation,
            backend=self.runtime.backend,
        )
        if observer is not None:
            observer(indices, weights.detach())
        found = read_latent_bank(
            self.value_bank,
            indices,
            weights,
            sum_heads=self.memory.memory_variant == "block",
            dtype=query.dtype,
            group=self.tp_group,
            backend=self.runtime.backend,
        )
        head_proj = self._parameters.get("head_proj")
        return found if head_proj is None else torch.einsum("thl,hlo->tho", found, head_proj)

    def _values_main_grad(self) -> torch.Tensor | None:
        """Megatron's fp32 gradient of the values, when this pass is to add to it."""
        replicated = partition_axis("value_bank", self.memory) is None and self.tp_group.size() > 1
        if (
            not self.runtime.values_main_grad
            or replicated
            or not (torch.is_grad_enabled() and self.value_bank.requires_grad)
        ):
            return None
        main_grad = getattr(self.value_bank, "main_grad", None)
        if main_grad is None or main_grad.dtype != torch.float32:
            return None
        self.value_bank.grad_added_to_main_grad = (
            True  # Megatron's hook adds no gradient then; it resets this every step
        )
        return main_grad

    def _leave(self, found: torch.Tensor) -> torch.Tensor:
        """From channels split over the ranks, ``[s, b, h/p]``, to the layout of the residual stream."""
        if self.memory.memory_variant == "block" and self.value_placement == "replicated":
            return self._sum_over_ranks(found)
        if self.config.sequence_parallel:
            seq_length, batch, _ = found.shape
            output = all_to_all_hp2sp(found, group=self.tp_group)  # [T/p, h]
            output = output.view(seq_length // self.tp_group.size(), batch, -1)
        else:
            output = gather_from_tensor_model_parallel_region(found, group=self.tp_group)
        return output

    def _sum_over_ranks(self, partial: torch.Tensor) -> torch.Tensor:
        """``[s, b, h]`` partial sums -> ``[s, b, h]``, with sequence parallelism ``[s/p, b, h]``."""
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)

    def backward_dw(self) -> None:
        """Nothing is left to do: weight gradients are computed with the others."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The parameters as sharded tensors of their global shapes, under ``prefix`` + their names.

        Keys of tensors follow ``STORED_NAMES``, and optimizer state follows the keys.
        """
        names = [name for name, _ in self.named_parameters(recurse=False)]
        axes = {name: partition_axis(name, self.memory, self.value_placement) for name in names}
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {name: axis for name, axis in axes.items() if axis is not None},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        apply_prefix_mapping(state, {prefix + name: prefix + stored for name, stored in STORED_NAMES.items()})
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As ``Module``; takes state dicts of earlier versions."""
        for name, stored in STORED_NAMES.items():
            if prefix + stored in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + stored)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(p.shape)}" for name, p in self.named_parameters(recurse=False))
        return f"{self.memory.memory_variant}, values {self.value_placement}, {shapes}"


class _ScaleGradient(torch.autograd.Function):
    """The identity; its gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: int) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return (gradient if ctx.factor == 1 else gradient * ctx.factor), None
