"""What the processes of the model tests do."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from scenarios import Layout, Setting, build, generator, initialize_parallel, make_setting_plan, model_config

from megatron_midus.model import specs
from megatron_midus.model.attention import SdpaAttention
from megatron_midus.model.builder import build_model, freeze
from megatron_midus.model.checkpoint import load_weights, save_weights, sharded_state_dict
from megatron_midus.model.config import make_transformer_config
from megatron_midus.model.norm import RMSNorm
from megatron_midus.model.specs import get_backend, get_midus_block_spec, get_midus_layer_spec, local_layer_indices
from megatron_midus.upscaling import make_plan


def message_of(function: Callable, *args: Any, **kwargs: Any) -> str:
    """The ``ValueError`` that a call ends with."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


def config_errors(cases: list[tuple]) -> list[str]:
    """Per case ``(architecture, memory or None, settings)`` what ``make_transformer_config`` says."""
    found = []
    for model, memory, settings in cases:
        plan = make_setting_plan(Setting(memory=memory or {}, policy="none" if memory is None else "interleave"))
        architecture = model_config(**{"num_layers": plan.num_layers, **model})
        found.append(message_of(make_transformer_config, architecture, plan, **settings))
    return found


def config_fields() -> dict[str, Any]:
    plan = make_setting_plan(Setting())
    config = make_transformer_config(
        model_config(plan.num_layers, sliding_window=5),
        plan,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=3,
    )
    return {name: getattr(config, name) for name in (
        "overlap_p2p_comm", "batch_p2p_comm", "hetereogenous_dist_checkpoint", "hidden_dropout", "attention_dropout",
        "window_size", "kv_channels",
    )}  # fmt: skip


# -- norm and attention ----------------------------------------------------------------------------------------------
def _config(**overrides: Any) -> Any:
    initialize_parallel(Layout())
    model_overrides = {k: overrides.pop(k) for k in ("sliding_window", "num_query_groups") if k in overrides}
    plan = make_plan("none", num_layers=1)
    return make_transformer_config(model_config(1, **model_overrides), plan, **overrides)


def norm_of(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    norm = RMSNorm(_config(), hidden.shape[-1], eps=eps).to(hidden.dtype)
    norm.weight.data.copy_(weight)
    return norm(hidden).detach()


def random_heads(positions: int, batch: int, heads: int, name: str) -> torch.Tensor:
    return torch.randn(positions, batch, heads, 10, generator=generator(name)).requires_grad_()


def _core(kind: type, config: Any) -> Any:
    core = kind(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    return core.eval()


def against_megatron(positions: int, groups: int, window: int | None, masked: bool) -> list[tuple]:
    """``(ours, Megatron's)`` of the output and of the three gradients."""
    config = _config(num_query_groups=groups, sliding_window=window)
    mask = None
    if masked:  # documents end at position 4: nothing after it sees what is before it
        mask = torch.ones(positions, positions, dtype=torch.bool).triu(1)
        mask[4:, :4] = True
        mask = mask[None, None].expand(2, 1, -1, -1)
    found = []
    for kind in (SdpaAttention, DotProductAttention):
        inputs = [random_heads(positions, 2, heads, name) for heads, name in ((4, "q"), (groups, "k"), (groups, "v"))]
        output = _core(kind, config)(*inputs, mask)
        output.backward(torch.randn(output.shape, generator=generator("probe")))
        found.append([output.detach(), *(x.grad for x in inputs)])
    return list(zip(*found))


def packed_against_separate(window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``(packed, one by one)`` outputs of sequences of 5, 1 and 7 tokens."""
    core = _core(SdpaAttention, _config(sliding_window=window))
    query, key, value = (
        random_heads(13, 1, heads, name)[:, 0].detach() for heads, name in ((4, "q"), (2, "k"), (2, "v"))
    )
    ends = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    packed = core(
        query,
        key,
        value,
        None,
        packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends),
    )
    alone = [core(query[a:b, None], key[a:b, None], value[a:b, None], None)[:, 0] for a, b in ((0, 5), (5, 6), (6, 13))]
    return packed, torch.cat(alone)


def cached_against_whole(window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The last 1 and the last 4 of 9 positions attended with all keys, and the same rows of the whole."""
    core = _core(SdpaAttention, _config(sliding_window=window))
    query, key, value = (random_heads(9, 2, heads, name).detach() for heads, name in ((4, "q"), (2, "k"), (2, "v")))
    whole = core(query, key, value, None)
    parts = [core(query[start:], key, value, None, attn_mask_type=AttnMaskType.no_mask) for start in (8, 5)]
    return torch.cat(parts), torch.cat([whole[8:], whole[5:]])


def capped_attention(window: int | None, new: int, masked: bool) -> list[tuple]:
    """``(ours, in the open)`` of a soft-capped attention's output and gradients, in float64, of the last ``new`` of 9
    positions."""
    bound, config = 0.7, _config(sliding_window=window)
    config.attention_softcap = bound
    core = _core(SdpaAttention, config)
    mask = torch.zeros(1, 1, new, 9, dtype=torch.bool)
    mask[..., 1] = masked
    found = []
    for ours in (True, False):
        query, key, value = (
            random_heads(positions, 2, heads, name).detach().double().requires_grad_()
            for positions, heads, name in ((new, 4, "q"), (9, 2, "k"), (9, 2, "v"))
        )
        if ours:
            output = core(query, key, value, mask if masked else None)
        else:
            scores = torch.einsum("sbgpd,tbgd->bgpst", query.unflatten(2, (2, 2)), key) / 10**0.5
            place, seen = torch.arange(9 - new, 9)[:, None], torch.arange(9)
            hidden = (seen > place) | (seen <= place - (window or 10)) | mask
            scores = (bound * (scores / bound).tanh()).masked_fill(hidden, -torch.inf)
            output = torch.einsum("bgpst,tbgd->sbgpd", scores.softmax(-1), value).flatten(2)
        output.backward(torch.randn(output.shape, generator=generator("probe")).double())
        found.append([output.detach(), query.grad, key.grad, value.grad])
    return list(zip(*found))


def backends_of_a_capped_model() -> tuple[str, str]:
    """What ``auto`` is where Transformer Engine could run, and what is said of it by name."""
    model = model_config(1, attention_softcap=50.0)
    with mock.patch.object(specs, "transformer_engine_available", return_value=True):
        return type(get_backend("auto", model)).__name__, message_of(get_backend, "transformer_engine", model)


def dropout_is_only_for_training() -> tuple[bool, bool]:
    core = _core(SdpaAttention, _config(attention_dropout=0.5))
    inputs = [random_heads(9, 2, 4, name).detach() for name in "qkv"]
    same_in_eval = torch.equal(core(*inputs, None), core(*inputs, None))
    core.train()
    return same_in_eval, torch.equal(core(*inputs, None), core(*inputs, None))


# -- builder ---------------------------------------------------------------------------------------------------------
def trainable_parameters(setting: Setting) -> tuple[int, int, list[str]]:
    (model,), plan = build(setting, Layout())
    counted = freeze([model], plan, setting.train)
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return counted, sum(trainable.values()), sorted(trainable)


def freeze_error() -> str:
    (model,), plan = build(Setting(policy="none"), Layout())
    return message_of(freeze, [model], plan, "inserted")


def build_error(model: dict[str, Any], sequence_length: int = 8, layout: Layout | None = None, **kwargs: Any) -> str:
    layout = layout or Layout()
    initialize_parallel(layout)
    plan = make_plan("none", num_layers=1)
    architecture = model_config(1, **model)
    config = make_transformer_config(
        architecture, plan, tensor_model_parallel_size=layout.tp, sequence_parallel=layout.sp
    )
    return message_of(build_model, config, model=architecture, plan=plan, sequence_length=sequence_length, **kwargs)


def loss_with_padding(divisible_by: int) -> tuple[torch.Tensor, int, float]:
    """``(losses, rows of the embedding, probability of the padding)``; real rows do not depend on the padding."""
    initialize_parallel(Layout())
    plan = make_plan("none", num_layers=1)
    architecture = model_config(1)
    config = make_transformer_config(architecture, plan)
    torch.manual_seed(0)
    model = build_model(
        config, model=architecture, plan=plan, sequence_length=8, make_vocab_size_divisible_by=divisible_by
    )
    for name, parameter in model.named_parameters():
        rows = 64 if "embed" in name or "output_layer" in name else parameter.shape[0]
        whole = torch.randn(rows, *parameter.shape[1:], generator=generator(name))
        parameter.data.copy_(whole[: parameter.shape[0]])
    tokens = torch.arange(16).view(2, 8)
    positions = torch.arange(8).expand(2, -1)
    losses = model(tokens, positions, None, labels=tokens + 1)
    logits = model(tokens, positions, None)
    padding = logits.softmax(-1)[..., architecture.vocab_size :].sum()
    return losses.detach(), model.vocab_size, float(padding)


def cached_generation(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 9 tokens at once, and of 5 followed by one at a time through the static KV cache."""
    (model,), _ = build(setting, Layout())
    model.eval()
    tokens = torch.randint(37, (2, 9), generator=generator("tokens"))
    positions = torch.arange(9).expand(2, -1)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=16)
    context.materialize_only_last_token_logits = False
    found = []
    with torch.no_grad():
        whole = model(tokens, positions, None)
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
            part = model(
                tokens[:, start:end],
                positions[:, start:end],
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
            context.increment_sequence_len_offset(end - start)
            found.append(part)
    return torch.cat(found, dim=1), whole


def local_indices(num_layers: int, layout: Layout, **overrides: Any) -> list[list[int]]:
    """Layers of every chunk of this rank."""
    initialize_parallel(layout)
    plan = make_plan("none", num_layers=num_layers)
    config = make_transformer_config(
        model_config(num_layers), plan, pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp, **overrides,
    )  # fmt: skip
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return [
        local_layer_indices(config, vp_stage=stage if layout.vpp else None, pp_rank=rank)
        for stage in range(layout.vpp or 1)
    ]


# -- checkpoints -----------------------------------------------------------------------------------------------------
def checkpoint_keys(setting: Setting) -> dict[str, tuple]:
    (model,), _ = build(setting, Layout())
    from scenarios import local_tensors

    assert list(sharded_state_dict([model])) == ["model"]
    return {tensor.key: tuple(tensor.global_shape) for tensor in local_tensors([model])}


def load_errors() -> dict[str, str]:
    """What ``load_weights`` says to checkpoints that do not fit."""
    linear = {"memory_output_projection": "linear"}
    (model,), _ = build(Setting(memory=linear), Layout())
    others = {
        "missing": Setting(memory={**linear, "memory_query_temperature": True}),
        "unexpected": Setting(),
        "shape": Setting(memory={**linear, "memory_latent_size": 9}),
        "vocabulary": Setting(memory=linear, model={"vocab_size": 50}),
    }
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        saved, empty = Path(directory, "saved"), Path(directory, "empty")
        saved.mkdir()
        empty.mkdir()
        save_weights([model], saved)
        for name, setting in others.items():
            (other,), _ = build(setting, Layout())
            found[name] = message_of(load_weights, [other], saved)
        found["no checkpoint"] = message_of(load_weights, [model], empty)
        found["no directory"] = message_of(load_weights, [model], Path(directory, "absent"))
        for file in saved.glob("*.distcp"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        found["truncated"] = message_of(load_weights, [model], saved)
    return {name: message.replace(directory, "DIR") for name, message in found.items()}


# -- specs -----------------------------------------------------------------------------------------------------------
class _Named:
    """A class by name, for a backend that is not installed here."""


def _fused_backend() -> Any:
    names = {
        "column_parallel_linear": "ColumnLinear",
        "row_parallel_linear": "RowLinear",
        "column_parallel_layer_norm_linear": "FusedNormColumnLinear",
        "core_attention": "FusedAttention",
        "activation_func": "Activation",
    }
    methods: dict[str, Any] = {
        method: lambda self, name=name: type(name, (_Named,), {}) for method, name in names.items()
    }
    methods["layer_norm"] = lambda self, rms_norm=False, for_qk=False: type("FusedNorm", (_Named,), {})
    methods["fuse_layernorm_and_linear"] = lambda self: True
    return type("FusedBackend", (), methods)()


def _describe_specs(config: Any, plan: Any, backend: Any) -> dict[str, Any]:
    block = get_midus_block_spec(plan, config, backend=backend, pp_rank=0)
    kinds = {planned.kind: spec for planned, spec in zip(plan.blocks, block.layer_specs)}
    return {"final": block.layer_norm.__name__, **{kind: _describe(spec) for kind, spec in kinds.items()}}


def _describe(spec: Any) -> dict[str, Any]:
    def name(part: Any) -> str:
        return _module_and_parts(part)[0].__name__

    parts, attention = spec.submodules, spec.submodules.self_attention.submodules
    found = {
        "layer": name(spec),
        "input_layernorm": name(parts.input_layernorm),
        "pre_mlp_layernorm": name(parts.pre_mlp_layernorm),
        "mlp": name(parts.mlp),
        "keys_map": parts.sharded_state_dict_keys_map,
        **{part: name(getattr(attention, part)) for part in (
            "linear_qkv", "core_attention", "linear_proj", "q_layernorm", "k_layernorm",
        )},
    }  # fmt: skip
    if (inside := _module_and_parts(parts.mlp)[1]) is not None:
        found["linear_fc1"] = name(inside.linear_fc1)
    return found


def _module_and_parts(part: Any) -> tuple[type, Any]:
    """What a spec builds, and of what; a dense MLP is a partial in later releases of Megatron-Core."""
    if isinstance(part, ModuleSpec):
        return part.module, part.submodules
    if isinstance(part, functools.partial):
        return part.func.__self__, part.keywords["submodules"]  # type: ignore[attr-defined]
    return part, None


def fused_specs(qk_layernorm: bool) -> dict[str, Any]:
    plan = make_setting_plan(Setting())
    config = make_transformer_config(model_config(plan.num_layers, qk_layernorm=qk_layernorm), plan)
    return _describe_specs(config, plan, _fused_backend())


def local_specs() -> dict[str, Any]:
    plan = make_setting_plan(Setting())
    return _describe_specs(make_transformer_config(model_config(plan.num_layers), plan), plan, get_backend("auto"))


def spec_error() -> str:
    plan = make_setting_plan(Setting())
    config = make_transformer_config(model_config(plan.num_layers), plan)
    return message_of(get_midus_layer_spec, plan.blocks[2], config=config, index=3)
