"""Layer specs made from an UpscalePlan, for the local backend and, through the spec provider, Transformer Engine."""

from __future__ import annotations

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

from megatron_midus.config import MemoryConfig
from megatron_midus.errors import UserError
from megatron_midus.megatron_compat import let_routers_run_without_transformer_engine
from megatron_midus.memory import HeadWiseMemory, ValuePlacement
from megatron_midus.model.attention import SdpaAttention
from megatron_midus.model.layer import AttentionFree, AttentionFreeSubmodules, MemoryAttention, MIDUSMemoryLayer
from megatron_midus.model.norm import RMSNorm
from megatron_midus.platform import require_transformer_engine, transformer_engine_available
from megatron_midus.upscaling import Block, UpscalePlan

TransformerImpl = Literal["auto", "local", "transformer_engine"]


class SdpaSpecProvider(LocalSpecProvider):
    """Megatron's own linear layers with this project's RMSNorm and attention: runs on a CPU and on any GPU."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return SdpaAttention


def get_backend(transformer_impl: TransformerImpl = "auto") -> BackendSpecProvider:
    """The provider of a backend by name; ``auto`` = Transformer Engine where it can run, else local.

    Raises:
        ValueError: an unknown name, or Transformer Engine where it cannot run.
    """
    if transformer_impl not in ("auto", "local", "transformer_engine"):
        raise UserError(f"transformer_impl={transformer_impl!r} is not known; choose auto, local or transformer_engine")
    if transformer_impl == "local" or (transformer_impl == "auto" and not transformer_engine_available()):
        return SdpaSpecProvider()
    require_transformer_engine()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def get_midus_layer_spec(
    block: Block,
    *,
    config: TransformerConfig,
    memory: MemoryConfig | None = None,
    index: int = 0,
    seed: int = 0,
    memory_backend: str = "auto",
    value_placement: ValuePlacement = "replicated",
    memory_deterministic: bool = True,
    memory_values_main_grad: bool = False,
    backend: BackendSpecProvider | None = None,
) -> ModuleSpec:
    """The spec of one decoder layer.

    Args:
        block: of the plan. Kind ``memory`` makes a ``MIDUSMemoryLayer``, every other kind a ``TransformerLayer``.
        config: of the model; ``qk_layernorm`` is read here.
        memory: what the memory looks like; needed for kind ``memory``.
        index: 0-based position in the decoder, part of the seed of the memory's initial values.
        seed: of the memory's initial values.
        memory_backend: of ``megatron_midus.ops.head_wise_memory``.
        value_placement: of ``megatron_midus.memory.HeadWiseMemory``.
        memory_deterministic, memory_values_main_grad: of ``HeadWiseMemory``.
        backend: which linear layers, norms and attention to use; ``get_backend()`` when absent.
    """
    backend = backend or get_backend()
    fused = backend.fuse_layernorm_and_linear()
    if block.kind != "memory":
        attention = _attention_spec(SelfAttention, backend, config, backend.row_parallel_linear(), fused=fused)
        mlp = _mlp_spec(backend, config)
        return _layer_spec(TransformerLayer, backend, attention, mlp, fused=fused, has_experts=has_experts(config))
    if memory is None:
        raise UserError(f"block {index} is a Memory block; give its memory settings")
    params = {
        "memory": memory,
        "layer_index": index,
        "seed": seed,
        "backend": memory_backend,
        "value_placement": value_placement,
        "deterministic": memory_deterministic,
        "values_main_grad": memory_values_main_grad,
    }
    module = ModuleSpec(HeadWiseMemory, params=params)
    if not memory.has_attention:
        attention = ModuleSpec(AttentionFree, submodules=AttentionFreeSubmodules(linear_proj=module))
        return _layer_spec(MIDUSMemoryLayer, backend, attention, None, fused=False)
    # Behind a fused layer nobody but the matrix sees the normed input.
    fused = fused and not memory.reads_normed
    attention = _attention_spec(MemoryAttention, backend, config, module, fused=fused)
    return _layer_spec(MIDUSMemoryLayer, backend, attention, None, fused=fused)


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
    output: type | ModuleSpec,
    *,
    fused: bool,
) -> ModuleSpec:
    """An attention; with ``fused`` its first matrix has the block's norm in it."""
    qk_norm = backend.layer_norm(rms_norm=True, for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=output,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _layer_spec(
    layer: type,
    backend: BackendSpecProvider,
    attention: ModuleSpec,
    mlp: ModuleSpec | None,
    *,
    fused: bool,
    has_experts: bool = False,
) -> ModuleSpec:
    """A pre-norm layer. Checkpoint keys are those of the backend that fuses norm and linear layer, in both backends.

    Before experts no backend fuses the norm: the router reads it too.
    """
    norm = IdentityOp if fused else backend.layer_norm(rms_norm=True)
    submodules = TransformerLayerSubmodules(
        input_layernorm=norm, self_attention=attention, self_attn_bda=get_bias_dropout_add
    )
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if mlp is not None:
        submodules.pre_mlp_layernorm = backend.layer_norm(rms_norm=True) if has_experts else norm
        submodules.mlp = mlp
        submodules.mlp_bda = get_bias_dropout_add
        if not has_experts:
            keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    submodules.sharded_state_dict_keys_map = {} if fused else keys
    return ModuleSpec(layer, submodules=submodules)


def get_midus_block_spec(
    plan: UpscalePlan,
    config: TransformerConfig,
    *,
    transformer_impl: TransformerImpl = "auto",
    memory_backend: str = "auto",
    value_placement: ValuePlacement = "replicated",
    memory_deterministic: bool = True,
    memory_values_main_grad: bool = False,
    seed: int = 0,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    backend: BackendSpecProvider | None = None,
) -> TransformerBlockSubmodules:
    """The specs of those blocks of ``plan`` that live on one pipeline stage.

    Args:
        plan: the whole model.
        config: of the model, ``config.num_layers`` equal to ``plan.num_layers``.
        transformer_impl: see ``get_backend``; ``backend`` overrides it.
        memory_backend: of ``megatron_midus.ops.head_wise_memory``.
        value_placement: of ``megatron_midus.memory.HeadWiseMemory``.
        memory_deterministic, memory_values_main_grad: of ``HeadWiseMemory``.
        seed: of the memories' initial values.
        vp_stage: virtual pipeline stage, when there are several on this rank.
        pp_rank: pipeline rank; of this process when absent.
    """
    assert config.num_layers == plan.num_layers, f"config of {config.num_layers} layers, plan of {plan.num_layers}"
    backend = backend or get_backend(transformer_impl)
    layer_specs = [
        get_midus_layer_spec(
            plan.blocks[index],
            config=config,
            memory=plan.memory,
            index=index,
            seed=seed,
            memory_backend=memory_backend,
            value_placement=value_placement,
            memory_deterministic=memory_deterministic,
            memory_values_main_grad=memory_values_main_grad,
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
