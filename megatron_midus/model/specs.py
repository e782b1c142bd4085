"""Layer specs made from an UpscalePlan, for the local backend and, through the spec provider, Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.errors import UserError
from megatron_midus.megatron_compat import let_routers_run_without_transformer_engine, mlp_submodules
from megatron_midus.memory import HeadWiseMemory, MemoryRuntime
from megatron_midus.model.attention import SdpaAttention
from megatron_midus.model.branch import BranchAddition, LayerAttention, Rope, with_bias, with_own_norms, with_window
from megatron_midus.model.layer import AttentionFree, AttentionFreeSubmodules, MemoryAttention, MIDUSMemoryLayer
from megatron_midus.model.norm import HeadsNorm, RMSNorm
from megatron_midus.platform import require_transformer_engine, transformer_engine_available
from megatron_midus.upscaling import Block, UpscalePlan

TransformerImpl = Literal["auto", "local", "transformer_engine"]


class SdpaSpecProvider(LocalSpecProvider):
    """Megatron's own linear layers with this project's RMSNorm and attention: runs on a CPU and on any GPU."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return SdpaAttention


def get_backend(transformer_impl: TransformerImpl = "auto", model: ModelConfig | None = None) -> BackendSpecProvider:
    """The provider of a backend by name; ``auto`` = Transformer Engine where it can run this model, else local.

    Raises:
        ValueError: an unknown name, or Transformer Engine where it cannot run.
    """
    if transformer_impl not in ("auto", "local", "transformer_engine"):
        raise UserError(f"transformer_impl={transformer_impl!r} is not known; choose auto, local or transformer_engine")
    has_softcap = model is not None and model.attention_softcap is not None
    if has_softcap and transformer_impl == "transformer_engine":
        raise UserError(
            f"attention_softcap={model.attention_softcap} of this model is not in Transformer Engine's attention; "
            "choose transformer_impl auto or local"
        )
    if transformer_impl == "local" or has_softcap or not transformer_engine_available() and transformer_impl == "auto":
        return SdpaSpecProvider()
    require_transformer_engine()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def get_midus_layer_spec(
    block: Block,
    *,
    config: TransformerConfig,
    model: ModelConfig | None = None,
    memory: MemoryConfig | None = None,
    index: int = 0,
    runtime: MemoryRuntime | None = None,
    backend: BackendSpecProvider | None = None,
) -> ModuleSpec:
    """The spec of one decoder layer.

    Args:
        block: of the plan. Kind ``memory`` makes a ``MIDUSMemoryLayer``, every other kind a ``TransformerLayer``.
        config: of the model; ``qk_layernorm`` is read here.
        model: the up-scaled architecture, for what ``config`` does not say of its blocks; ``None`` = those of a Llama.
        memory: what the memory looks like; needed for kind ``memory``.
        index: 0-based position in the decoder, part of the seed of the memory's initial values.
        runtime: of ``megatron_midus.memory.HeadWiseMemory``.
        backend: which linear layers, norms and attention to use; ``get_backend()`` when absent.
    """
    backend = backend or get_backend(model=model)
    fused = backend.fuse_layernorm_and_linear()
    if block.kind != "memory":
        output, mlp = backend.row_parallel_linear(), _mlp_spec(backend, config)
        if model is not None and model.add_output_bias:
            output = with_bias(output, True)
        if model is not None and model.add_mlp_bias:
            linears = mlp_submodules(mlp)
            linears.linear_fc1 = with_bias(linears.linear_fc1, True)
            linears.linear_fc2 = with_bias(linears.linear_fc2, True)
        if model is not None and not model.norm_before and fused:
            mlp_submodules(mlp).linear_fc1 = backend.column_parallel_linear()
        attention = _attention_spec(SelfAttention, backend, config, model, index, output, fused=fused)
        return _layer_spec(TransformerLayer, backend, config, model, attention, mlp, fused=fused)
    if memory is None:
        raise UserError(f"block {index} is a Memory block; give its memory settings")
    module = ModuleSpec(HeadWiseMemory, params={"memory": memory, "layer_index": index, "runtime": runtime})
    if not memory.has_attention:
        attention = ModuleSpec(AttentionFree, submodules=AttentionFreeSubmodules(linear_proj=module))
        return _layer_spec(MIDUSMemoryLayer, backend, config, model, attention, None, fused=False)
    # Behind a fused layer nobody but the matrix sees the normed input.
    fused = fused and not memory.reads_normed
    attention = _attention_spec(MemoryAttention, backend, config, model, index, module, fused=fused)
    return _layer_spec(MIDUSMemoryLayer, backend, config, model, attention, None, fused=fused)


class RotatingMemoryAttention(MemoryAttention, LayerAttention):
    """The attention of a Memory block, with the rotary embedding of its source layer."""


_ROTATING: dict[type, type] = {SelfAttention: LayerAttention, MemoryAttention: RotatingMemoryAttention}


def has_experts(config: TransformerConfig) -> bool:
    """Whether Transformer blocks have a mixture of experts in place of their MLP."""
    return config.num_moe_experts is not None


def _mlp_spec(backend: BackendSpecProvider, config: TransformerConfig) -> ModuleSpec:
    if not has_experts(config):
        return get_mlp_module_spec_for_backend(backend)
    let_routers_run_without_transformer_engine()
    return get_moe_module_spec_for_backend(
        backend, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )


def _attention_spec(
    attention: type,
    backend: BackendSpecProvider,
    config: TransformerConfig,
    model: ModelConfig | None,
    index: int,
    output: type | ModuleSpec,
    *,
    fused: bool,
) -> ModuleSpec:
    """An attention; with ``fused`` its first matrix has the block's norm in it, where there is one."""
    q_norm = k_norm = backend.layer_norm(rms_norm=True, for_qk=True) if config.qk_layernorm else IdentityOp
    fused = fused and (model is None or model.norm_before)
    linear_qkv = backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear()
    core, params = backend.core_attention(), {"attn_mask_type": AttnMaskType.causal}
    if model is not None:
        if model.qk_layernorm and model.qk_norm_width:
            q_norm = ModuleSpec(HeadsNorm, params={"num_heads": config.num_attention_heads})
            k_norm = ModuleSpec(HeadsNorm, params={"num_heads": config.num_query_groups})
        if model.sliding_layers is not None:
            core = with_window(core, model.window(index))
        if model.rope_layers is not None or model.local_rotary_base is not None:
            local: Rope = "local" if model.rotates_locally(index) else "main"
            rope: Rope = local if model.rotates(index) else "none"
            attention = _ROTATING[attention]
            params |= {"rope": rope, "has_local": model.local_rotary_base is not None}
        if model.qk_layernorm and model.qk_norm_width:
            attention = with_own_norms(attention)
    return ModuleSpec(
        attention,
        params=params,
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv, core_attention=core, linear_proj=output, q_layernorm=q_norm, k_layernorm=k_norm
        ),
    )


def _layer_spec(
    layer: type,
    backend: BackendSpecProvider,
    config: TransformerConfig,
    model: ModelConfig | None,
    attention: ModuleSpec,
    mlp: ModuleSpec | None,
    *,
    fused: bool,
) -> ModuleSpec:
    """A layer. Checkpoint keys are those of the backend that fuses norm and linear layer, in both backends.

    Before experts no backend fuses the norm: the router reads it too.
    """
    norm_before = model is None or model.norm_before
    norm = backend.layer_norm(rms_norm=True) if norm_before and not fused else IdentityOp
    add = _addition_spec(backend, config, model)
    submodules = TransformerLayerSubmodules(input_layernorm=norm, self_attention=attention, self_attn_bda=add)
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    behind = {"self_attn_bda.norm.": "post_self_attn_layernorm."}
    if mlp is not None:
        submodules.pre_mlp_layernorm = backend.layer_norm(rms_norm=True) if has_experts(config) else norm
        submodules.mlp = mlp
        submodules.mlp_bda = add
        if not has_experts(config):
            keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        behind["mlp_bda.norm."] = "post_mlp_layernorm."
    has_norm_behind = model is not None and model.norm_behind
    submodules.sharded_state_dict_keys_map = ({} if fused else keys) | (behind if has_norm_behind else {})
    return ModuleSpec(layer, submodules=submodules)


def _addition_spec(
    backend: BackendSpecProvider, config: TransformerConfig, model: ModelConfig | None
) -> Callable | ModuleSpec:
    """What adds a branch to the residual stream."""
    if model is None or not (model.norm_behind or model.residual_multiplier != 1.0):
        return get_bias_dropout_add
    norm = backend.layer_norm(rms_norm=True) if model.norm_behind else None
    return ModuleSpec(BranchAddition, params={"config": config, "norm": norm, "multiplier": model.residual_multiplier})


def get_midus_block_spec(
    plan: UpscalePlan,
    config: TransformerConfig,
    *,
    model: ModelConfig | None = None,
    transformer_impl: TransformerImpl = "auto",
    runtime: MemoryRuntime | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    backend: BackendSpecProvider | None = None,
) -> TransformerBlockSubmodules:
    """The specs of those blocks of ``plan`` that live on one pipeline stage.

    Args:
        plan: the whole model.
        config: of the model, ``config.num_layers`` equal to ``plan.num_layers``.
        model: of ``get_midus_layer_spec``.
        transformer_impl: see ``get_backend``; ``backend`` overrides it.
        runtime: of ``megatron_midus.memory.HeadWiseMemory``.
        vp_stage: virtual pipeline stage, when there are several on this rank.
        pp_rank: pipeline rank; of this process when absent.
    """
    assert config.num_layers == plan.num_layers, f"config of {config.num_layers} layers, plan of {plan.num_layers}"
    backend = backend or get_backend(transformer_impl, model)
    layer_specs = [
        get_midus_layer_spec(
            plan.blocks[index],
            config=config,
            model=model,
            memory=plan.memory,
            index=index,
            runtime=runtime,
            backend=backend,
        )
        for index in local_layer_indices(config, vp_stage=vp_stage, pp_rank=pp_rank)
    ]
    return TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=backend.layer_norm(rms_norm=True))


def local_layer_indices(
    config: TransformerConfig, *, vp_stage: int | None = None, pp_rank: int | None = None
) -> list[int]:
    """0-based positions of the layers that one pipeline stage holds."""
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)))
