"""Builds the up-scaled GPT of a plan on this rank, and freezes what the plan did not insert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_midus.config import ModelConfig, padded_vocab_size
from megatron_midus.errors import UserError
from megatron_midus.memory import MemoryRuntime
from megatron_midus.model.config import make_transformer_config
from megatron_midus.model.layer import layer_index
from megatron_midus.model.rotary import ScaledRotaryEmbedding, attention_settings
from megatron_midus.model.specs import TransformerImpl, get_midus_block_spec
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.cost import Train

__all__ = ["build_model", "freeze", "make_transformer_config", "unwrap"]


def build_model(
    config: TransformerConfig,
    *,
    model: ModelConfig,
    plan: UpscalePlan,
    sequence_length: int,
    transformer_impl: TransformerImpl = "auto",
    make_vocab_size_divisible_by: int = 1,
    memory_runtime: MemoryRuntime | None = None,
    vp_stage: int | None = None,
    model_class: type[GPTModel] = GPTModel,
) -> GPTModel:
    """The part of the model that lives on this rank, freshly initialised.

    ``megatron.core.parallel_state`` must be initialised with the sizes in ``config``, and the model-parallel seed set
    where weights are not loaded afterwards.

    Args:
        config: from ``make_transformer_config``; gets what a scaled rotary embedding asks of the attention.
        model: the architecture.
        plan: the blocks.
        sequence_length: longest training sequence, tokens.
        transformer_impl: ``local``, ``transformer_engine`` or ``auto``.
        make_vocab_size_divisible_by: rows of the embedding are padded to a multiple of this times the TP size.
        memory_runtime: of ``megatron_midus.memory.HeadWiseMemory``.
        vp_stage: which chunk, under the interleaved pipeline schedule.
        model_class: a subclass of ``GPTModel`` to build instead.

    Raises:
        ValueError: a sequence that sequence parallelism cannot split, a backend that cannot run.
    """
    ranks = config.tensor_model_parallel_size
    if config.sequence_parallel and sequence_length % ranks:
        raise UserError(
            f"sequence_length={sequence_length} is not divisible by tensor_model_parallel_size={ranks}, which "
            "sequence_parallel needs; change the length or leave sequence_parallel out"
        )
    vocab_size = padded_vocab_size(
        model.vocab_size, divisible_by=make_vocab_size_divisible_by, tensor_model_parallel_size=ranks
    )
    for name, value in attention_settings(model).items():
        setattr(config, name, value)
    gpt = model_class(
        config=config,
        transformer_layer_spec=get_midus_block_spec(
            plan,
            config,
            model=model,
            transformer_impl=transformer_impl,
            runtime=memory_runtime,
            vp_stage=vp_stage,
        ),
        vocab_size=vocab_size,
        max_sequence_length=sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        vp_stage=vp_stage,
    )
    if model.rope_scaling is not None or model.local_rotary_base is not None:
        gpt.rotary_pos_emb = ScaledRotaryEmbedding(
            model, use_cpu_initialization=config.use_cpu_initialization, cp_group=gpt.pg_collection.cp
        )
    gpt.unpadded_vocab_size = model.vocab_size
    if gpt.pre_process and model.embedding_multiplier != 1.0:
        gpt.embedding.register_forward_hook(_EmbeddingMultiplier(model, config.params_dtype))
    if gpt.post_process and model.logits_softcap is not None:
        gpt.output_layer.register_forward_hook(_LogitsSoftcap(model.logits_softcap))
    if gpt.post_process and model.logits_divisor != 1.0:
        gpt.output_layer.register_forward_hook(_LogitsDivisor(model.logits_divisor))
    if gpt.post_process and vocab_size > model.vocab_size:
        gpt.output_layer.register_forward_hook(_LogitMask(model.vocab_size, vocab_size, gpt.pg_collection.tp.rank()))
    return gpt


class _EmbeddingMultiplier:
    """Forward hook of the embedding."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        self.factor = model.embedding_multiplier
        if model.round_embedding_multiplier:
            self.factor = torch.tensor(self.factor, dtype=dtype).item()

    def __call__(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.factor


class _LogitsSoftcap:
    """Forward hook of the output layer."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def __call__(self, module: torch.nn.Module, inputs: Any, output: tuple) -> tuple:
        return (torch.tanh(output[0] / self.bound) * self.bound, *output[1:])


class _LogitsDivisor:
    """Forward hook of the output layer."""

    def __init__(self, divisor: float) -> None:
        self.divisor = divisor

    def __call__(self, module: torch.nn.Module, inputs: Any, output: tuple) -> tuple:
        return (output[0] / self.divisor, *output[1:])


class _LogitMask:
    """Forward hook of the output layer: padding rows get no probability, so padding never changes a loss."""

    def __init__(self, vocab_size: int, padded_size: int, rank: int) -> None:
        self.vocab_size = vocab_size
        self.padded_size = padded_size
        self.rank = rank

    def __call__(self, module: torch.nn.Module, inputs: Any, output: tuple) -> tuple:
        logits = output[0]  # [s, b, v/p], or [s, b, v] when the layer gathers
        width = logits.shape[-1]
        first = 0 if width == self.padded_size else self.rank * width
        valid = max(0, min(width, self.vocab_size - first))
        if valid == width:
            return output
        padding = torch.arange(width, device=logits.device) >= valid
        return (logits.masked_fill(padding, torch.finfo(logits.dtype).min), *output[1:])


def freeze(model_chunks: Sequence[torch.nn.Module], plan: UpscalePlan, train: Train) -> int:
    """Leaves trainable what ``train`` says; call it before gradients get their buffers.

    ``inserted`` trains the blocks that the plan inserted; embedding, final norm and output layer stay as they are.
    ``values`` trains the value banks of its Memory blocks alone. What was measured when up-scaling stays as it is in any
    case. Routers of experts that do not learn lose their load-balancing loss.

    Returns:
        Number of trainable elements on this rank, tensor-parallel parts counted as they lie here.

    Raises:
        ValueError: ``inserted`` with a plan that inserts nothing, ``values`` with one that has no Memory blocks.
    """
    if train not in ("inserted", "all", "values"):
        raise UserError(f"train={train!r} is not known; choose inserted, all or values")
    if train == "inserted" and not plan.inserted_indices:
        raise UserError(f"policy {plan.policy} inserts no block, so there is nothing to train; choose --train all")
    if train == "values" and not plan.memory_indices:
        raise UserError(f"policy {plan.policy} has no Memory blocks, whose values could be trained; choose --train all")
    trainable = 0
    for chunk in model_chunks:
        chunk.requires_grad_(train == "all")
        if train == "inserted":
            for layer in _layers(chunk):
                layer.requires_grad_(plan.blocks[layer_index(layer)].inserted)
        if train == "values":
            for parameter in chunk.parameters():
                parameter.requires_grad_(getattr(parameter, "is_memory_value", False))
        if train in ("inserted", "values"):
            let_gradients_through(unwrap(chunk))
        for parameter in chunk.parameters():
            if getattr(parameter, "is_measured", False):
                parameter.requires_grad_(False)
        for router in routers(chunk):
            freeze_balance(router)
        trainable += sum(p.numel() for p in chunk.parameters() if p.requires_grad)
    return trainable


def routers(chunk: torch.nn.Module) -> Iterator[TopKRouter]:
    """The routers of the mixtures of experts on this rank."""
    return (module for module in chunk.modules() if isinstance(module, TopKRouter))


def freeze_balance(router: TopKRouter) -> None:
    """Takes the load-balancing loss from a router that does not learn."""
    if not router.weight.requires_grad:
        # Its balance would be a goal for the blocks before it alone, and none of theirs.
        router.routing_type = "none"


def _layers(chunk: torch.nn.Module) -> Iterator[TransformerLayer]:
    return (module for module in chunk.modules() if isinstance(module, TransformerLayer))


def let_gradients_through(model: torch.nn.Module) -> None:
    """Makes a frozen embedding's output require a gradient under full recompute.

    Full recompute hands each layer its input alone: if that needs no gradient, neither does the output, and the
    layer's weights get none, silently.
    """
    if model.pre_process and model.config.recompute_granularity == "full":
        model.embedding.register_forward_hook(_require_gradient)


def _require_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The ``GPTModel`` inside ``DistributedDataParallel`` and ``Float16Module``."""
    while not isinstance(model, GPTModel):
        assert hasattr(model, "module"), f"no GPTModel inside {type(model).__name__}"
        model = model.module
    return model
