"""MIDUS model for transformers 4.53 and later, in plain torch. Travels inside every exported model.

Transformer blocks compute what ``LlamaForCausalLM`` (``Qwen2``, ``Qwen3``, with experts ``Qwen3Moe``, ``Mixtral``)
computes, operation by operation. A Memory
block is ``x + memory(attention(norm(x)))``: one norm, one attention without output projection (or none, as
``memory_query`` and ``memory_attention`` say), one head-wise product-key memory (Kim et al., MIDUS, arXiv 2512.13751; product keys: Lample et al., arXiv 1907.05242).

Shapes: B batch, S sequence, T = B * S tokens, H attention heads, M memory heads, D channels of one memory head's query,
N sub-keys per half (N * N slots), K top-k, L latent, O = hidden size / H.
"""

import functools
import importlib
import inspect
import json
import math
import os

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import cached_file, logging

try:
    from transformers.integrations import use_experts_implementation
except ImportError:  # transformers 4 has one way to run experts: one after the other

    def use_experts_implementation(experts_class):
        return experts_class


from .configuration_midus import MidusConfig
from .lookup_midus import look_up

logger = logging.get_logger(__name__)

RMS_EPSILON = 1e-6
# What the parameters of a memory were called in exports of plan schema 1, and what they are called now.
OLD_NAMES = {"values": "value_bank"}
RENAMED = {rf"\.memory\.{old}$": f".memory.{new}" for old, new in OLD_NAMES.items()}
# How the model was up-scaled. The tools that convert an export need it, transformers does not.
PLAN_FILE = "midus_plan.json"
PLAN_SCHEMA = 2
# Arguments of from_pretrained that say where files of a model come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# transformers 4 wants a list of tied tensors, 5 a mapping to their source.
TIED_WEIGHTS = {"lm_head.weight": "model.embed_tokens.weight"}
HEAD_PLAN = "colwise_gather_output"  # how tensor parallelism splits the output layer
if int(transformers.__version__.split(".")[0]) < 5:
    TIED_WEIGHTS = list(TIED_WEIGHTS)
    HEAD_PLAN = "colwise_rep"


# Names of arguments that changed between versions; looked up here so that no forward pass inspects signatures.
MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
# transformers 5.24 calls past_key_values cache, in arguments and results.
CACHE_NAME = "cache" if "cache" in inspect.signature(BaseModelOutputWithPast).parameters else "past_key_values"
CACHE_TAKES_CONFIG = "config" in inspect.signature(DynamicCache).parameters


# -- the blocks of a Llama -------------------------------------------------------------------------------------------
class MidusRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weigh(hidden_states, dtype)

    def weigh(self, hidden_states, dtype):
        return self.weight * hidden_states.to(dtype)


class MidusWideRMSNorm(MidusRMSNorm):
    """Rounded after the weight is applied (OLMo)."""

    def weigh(self, hidden_states, dtype):
        return (self.weight * hidden_states).to(dtype)


class MidusCenteredRMSNorm(MidusRMSNorm):
    """Multiplies by ``1 + weight``, in fp32 (Gemma)."""

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__(hidden_size, eps)
        nn.init.zeros_(self.weight)

    def weigh(self, hidden_states, dtype):
        return (hidden_states * (1.0 + self.weight.float())).to(dtype)


def make_norm(config, size):
    kind = MidusWideRMSNorm if config.wide_norm else MidusRMSNorm
    return (MidusCenteredRMSNorm if config.zero_centered_norm else kind)(size, config.rms_norm_eps)


# Names of a block's norms by placement: before and behind its attention, before and behind its MLP.
NORMS = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


def compute_inverse_frequencies(config, seq_len=None, rope=None):
    """``[rotating channels / 2]`` angles per position, fp32, made on the CPU so that every device gets the same bits.

    As ``transformers.modeling_rope_utils`` computes them. ``seq_len``, a tensor ``[]``, counts for ``dynamic`` and ``longrope``;
    ``rope`` stands for the configuration's own ``rope_parameters``.
    """
    rope, size = rope or config.rope_parameters, config.rotary_channels()
    base, rope_type = rope["rope_theta"], rope["rope_type"]
    if rope_type == "dynamic" and seq_len is not None:
        base = base * ((rope["factor"] * seq_len / config.max_position_embeddings) - (rope["factor"] - 1)) ** (
            size / (size - 2)
        )
    powers = base ** (torch.arange(0, size, 2, dtype=torch.int64, device="cpu").float() / size)
    if rope_type == "yarn":
        return _yarn_frequencies(powers, rope, size)
    if rope_type == "longrope":
        is_long = seq_len is not None and seq_len > rope["original_max_position_embeddings"]
        return 1.0 / (
            torch.tensor(rope["long_factor" if is_long else "short_factor"], dtype=torch.float32, device="cpu") * powers
        )
    frequencies = 1.0 / powers
    if rope_type == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies / rope["factor"] if rope_type == "linear" else frequencies


def compute_attention_factor(config, rope=None):
    """What cosines and sines are multiplied with; 1 for everything but ``yarn`` and ``longrope``."""
    rope = rope or config.rope_parameters

    def scale(mscale):
        return 1.0 if rope["factor"] <= 1 else 0.1 * mscale * math.log(rope["factor"]) + 1.0

    if rope["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    if rope["rope_type"] == "longrope":
        context = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or config.max_position_embeddings / context
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1)


def _yarn_frequencies(powers, rope, size):
    """Channels that turn often are kept, those that turn seldom stretched, with a ramp between (arXiv 2309.00071)."""
    context = rope["original_max_position_embeddings"]

    def channel(rotations):  # the channel that turns so often within the original context
        return (size * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(rope["rope_theta"]))

    low, high = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(size // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


def _llama3_frequencies(frequencies, rope):
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated (Llama 3.1)."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > context / low, frequencies / factor, frequencies)
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    is_between = ~(wavelengths < context / high) * ~(wavelengths > context / low)
    return torch.where(is_between, between, stretched)


class MidusRotaryEmbedding(nn.Module):
    """Cosines and sines of the positions.

    The frequencies are a plain attribute: as a non-persistent buffer they would be garbage after loading on
    transformers 5, and lose their bits to ``model.to(torch.bfloat16)``.
    """

    def __init__(self, config, rope=None):
        super().__init__()
        self.config = config
        self.rope = rope or config.rope_parameters
        self.attention_factor = compute_attention_factor(config, self.rope)
        self.rope_type = self.rope["rope_type"]
        self.longest = config.max_position_embeddings  # that the frequencies are for
        self.follows = self.rope_type in ("dynamic", "longrope")
        seq_len = None
        if self.follows and config._attn_implementation == "vllm":
            # Requests of all lengths share a batch and keep their keys: one set of frequencies, as in vLLM's own models.
            seq_len, self.follows = longest_request(), False
        self.frequencies_on_cpu = compute_inverse_frequencies(config, seq_len, self.rope)
        self.frequencies = self.frequencies_on_cpu

    @torch.no_grad()
    def forward(self, hidden_states, position_ids):
        if self.follows and self.rope_type == "dynamic":
            self._follow(position_ids.max().cpu() + 1)
        elif self.follows:
            self._use(compute_inverse_frequencies(self.config, position_ids.max().cpu() + 1), self.longest)
        if self.frequencies.device != hidden_states.device:
            self.frequencies = self.frequencies_on_cpu.to(hidden_states.device)
        angles = position_ids[..., None].float() * self.frequencies  # [B, S, rotating / 2], never a matmul: no TF32
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        if self.config.wide_rotary:
            return cos, sin
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)

    def _follow(self, seq_len):
        """``dynamic``: frequencies grow with the longest sequence so far, until one comes that needs no scaling."""
        before, original = self.longest, self.config.max_position_embeddings
        if seq_len > before:
            self._use(compute_inverse_frequencies(self.config, seq_len), seq_len)
        if seq_len < original and before > original:
            self._use(compute_inverse_frequencies(self.config), original)

    def _use(self, frequencies, longest):
        self.frequencies_on_cpu = self.frequencies = frequencies
        self.longest = longest


def longest_request():
    """``[]``, tokens of the longest sequence that the engine of vLLM which is being built takes."""
    settings = import_vllm("config").get_current_vllm_config()
    return torch.tensor(settings.model_config.max_model_len, device="cpu")


def import_vllm(module):
    try:
        return importlib.import_module(f"vllm.{module}")
    except ImportError as error:
        raise ImportError("attn_implementation='vllm' is for vLLM alone, which is not installed") from error


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary(query, key, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [B, 1, S, rotating channels]
    return rotate(query, cos, sin), rotate(key, cos, sin)


def rotate(states, cos, sin):
    """Turns the first channels of every head; where ``cos`` has fewer than the head, the others stay."""
    size = cos.shape[-1]
    turned = states[..., :size]
    turned = (turned * cos + rotate_half(turned) * sin).to(states.dtype)
    return turned if size == states.shape[-1] else torch.cat((turned, states[..., size:]), dim=-1)


def repeat_kv(states, groups):
    """``[B, G, S, D] -> [B, G * groups, S, D]``."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def soft_cap(x, bound):
    """``bound * tanh(x / bound)``; ``x`` itself without a bound."""
    return x if bound is None else torch.tanh(x / bound) * bound


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs):
    """Attention in the open; the only implementation that returns its weights."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    weights = soft_cap(torch.matmul(query, key.transpose(2, 3)) * scaling, softcap)  # [B, H, S, S_kv]
    if attention_mask is not None:
        weights = weights + attention_mask[:, :, :, : key.shape[-2]]
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class MidusAttention(nn.Module):
    """Grouped-query attention; without ``o_proj`` it is the attention of a Memory block."""

    def __init__(self, config, layer_idx, has_output_projection, block=0):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx  # slot of the KV cache
        self.rotates = config.rotates(block)
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        # Named where there is one alone: not every attention function knows it.
        self.softcap = {} if config.attn_logit_softcapping is None else {"softcap": config.attn_logit_softcapping}
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window if config.slides(block) else None
        self.is_causal = True
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = make_norm(config, query_size if config.qk_norm_width else config.head_dim)
            self.k_norm = make_norm(config, key_value_size if config.qk_norm_width else config.head_dim)
        if has_output_projection:
            self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        cache_position=None,
        **kwargs,
    ):
        """``[B, S, d] -> ([B, S, d or H * head_dim], attention weights or None)``."""
        # vLLM reads the source of this function: it fuses three calls of projections that it finds written out, and takes
        # for attention what is called by a name that was assigned ALL_ATTENTION_FUNCTIONS[...] itself.
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.head_dim)
        key = self.k_proj(hidden_states).view(*shape, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(*shape, -1, self.head_dim)
        if self.config.qk_norm_width:
            query, key = (norm(x.flatten(-2)).view_as(x) for norm, x in ((self.q_norm, query), (self.k_norm, key)))
        elif self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [B, heads, S, head_dim]
        cos, sin = position_embeddings
        if self.rotates:
            query, key = apply_rotary(query, key, cos, sin)
        if past_key_values is not None:
            # Static caches of transformers up to 5.0 write where cache_position says; later versions keep count.
            place = {"sin": sin, "cos": cos, "cache_position": cache_position}
            key, value = past_key_values.update(key, value, self.layer_idx, place)
        attend = eager_attention
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **self.softcap,
            **kwargs,
        )
        output = output.reshape(*shape, -1).contiguous()  # serving engines return [T, H * head_dim]
        return (self.o_proj(output) if hasattr(self, "o_proj") else output), weights


class MidusMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MidusRouter(nn.Module):
    """Which experts a token is sent to, and what their outputs weigh."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states):
        """``[T, d] -> ([T, K], [T, K])``: experts and their weights."""
        logits = F.linear(hidden_states, self.weight)
        scores, experts = F.softmax(logits, dtype=torch.float, dim=-1).topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            scores = scores / scores.sum(dim=-1, keepdim=True)
        return experts, scores if self.config.router_scores_in_fp32 else scores.to(logits.dtype)


@use_experts_implementation
class MidusExperts(nn.Module):
    """The experts of one block, in the layout that transformers 5 has for every mixture, so that its kernels run here."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.moe_intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """``[T, d], [T, K], [T, K] -> [T, d]``, one expert after the other."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            place, token = torch.where(top_k_index.T.eq(expert))
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            computed = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * top_k_weights[token, place, None]
            output.index_add_(0, token, computed.to(output.dtype))
        return output


class MidusExpertsMLP(nn.Module):
    """A router and its experts in the place of an MLP."""

    def __init__(self, config):
        super().__init__()
        self.gate = MidusRouter(config)
        self.experts = MidusExperts(config)

    def forward(self, hidden_states):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.experts(tokens, *self.gate(tokens)).reshape(hidden_states.shape)


class MidusBlock(GradientCheckpointingLayer):
    """What Transformer and Memory blocks share: norms before and behind their branches, and how a branch is added."""

    def make_norms(self, config, places):
        """Behind the branches, so that parameters stand in the order of a Llama's."""
        self.norms = NORMS[config.norm_placement][:places]
        self.multiplier = config.residual_multiplier
        for name in filter(None, self.norms):
            setattr(self, name, make_norm(config, config.hidden_size))

    def normed(self, place, hidden_states):
        """Through the norm at ``place``: 0 before, 1 behind the attention, 2 before, 3 behind the MLP; not all exist."""
        name = self.norms[place]
        return hidden_states if name is None else getattr(self, name)(hidden_states)

    def add(self, residual, branch):
        return residual + (branch if self.multiplier == 1.0 else branch * self.multiplier)


class MidusDecoderLayer(MidusBlock):
    """A Transformer block."""

    def __init__(self, config, layer_idx, block=0):
        super().__init__()
        self.self_attn = MidusAttention(config, layer_idx, True, block)
        self.mlp = MidusMLP(config) if config.num_experts is None else MidusExpertsMLP(config)
        self.make_norms(config, 4)

    def forward(self, hidden_states, output_attentions=False, **kwargs):
        attended, weights = self.self_attn(self.normed(0, hidden_states), **kwargs)
        hidden_states = self.add(hidden_states, self.normed(1, attended))
        hidden_states = self.add(hidden_states, self.normed(3, self.mlp(self.normed(2, hidden_states))))
        return (hidden_states, weights) if output_attentions else hidden_states


# -- the Memory block ------------------------------------------------------------------------------------------------
class HeadShare:
    """The heads of a memory that this process computes: all of them, but for tensor parallelism in vLLM.

    There each rank has its share of the attention's heads; sub-keys and projections are split like these, and a latent
    bank that the heads share is whole on every rank.
    """

    # Axis along which a parameter is split; others are whole on every rank.
    AXES = {
        "attn_proj": 1, "query_norm": 0, "log_temperature": 0, "row_keys": 0, "col_keys": 0, "head_proj": 0,
        "mixer": 0, "gate": 0,
    }  # fmt: skip

    def __init__(self, config):
        self.rank, self.ranks = 0, 1
        self.axes = {**self.AXES, "value_bank": 0} if config.memory_variant == "full" else self.AXES
        if config._attn_implementation == "vllm":
            distributed = import_vllm("distributed")
            self.rank = distributed.get_tensor_model_parallel_rank()
            self.ranks = distributed.get_tensor_model_parallel_world_size()
            self.reduce = distributed.tensor_model_parallel_all_reduce
            self.gather = distributed.tensor_model_parallel_all_gather  # along the last axis
        if config.num_lookup_heads() % self.ranks:
            raise ValueError(
                f"{config.num_lookup_heads()} memory heads are not divisible by tensor_parallel_size={self.ranks}; "
                "choose a divisor of them"
            )

    def shape(self, name, shape):
        axis = self.axes.get(name)
        return tuple(size // self.ranks if index == axis else size for index, size in enumerate(shape))

    def own(self, channels):
        """The channels of this rank's heads, of all channels ``[..., d]``."""
        return channels if self.ranks == 1 else channels.chunk(self.ranks, -1)[self.rank]

    def part(self, name, tensor):
        """This rank's part of a parameter."""
        return tensor.chunk(self.ranks, self.axes[name])[self.rank] if name in self.axes else tensor


def unit_rms(query_TMD):
    """Each head's query divided by its root mean square, computed in fp32 at least."""
    wide = query_TMD.to(torch.promote_types(query_TMD.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPSILON)).to(query_TMD.dtype)


class MidusMemory(nn.Module):
    """Head-wise product-key memory: each head looks up with its own query and its own sub-keys."""

    PARAMETERS = (
        "attn_proj", "block_norm", "query_norm", "log_temperature", "row_keys", "col_keys", "value_bank", "head_proj", "mixer", "gate",
        "domain_gate", "domain_gate_bias",
    )  # fmt: skip

    MEASURED = ("domain_gate", "domain_gate_bias")  # fitted when the model was up-scaled, never trained

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.share = HeadShare(config)
        shapes = {name: self.share.shape(name, shape) for name, shape in config.memory_parameter_shapes().items()}
        for name in self.PARAMETERS:
            made = None
            if name in shapes:
                made = nn.Parameter(torch.empty(shapes[name]), requires_grad=name not in self.MEASURED)
            self.register_parameter(name, made)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for old, new in OLD_NAMES.items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def reset_parameters(self):
        """Start values: zero values, so that the block adds nothing at first."""
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("value_bank", "mixer", "log_temperature", *self.MEASURED):
                nn.init.zeros_(parameter)
            elif name in ("query_norm", "block_norm"):
                nn.init.constant_(parameter, self.config.memory_query_scale if name == "query_norm" else 1.0)
            elif name in ("row_keys", "col_keys"):
                bound = parameter.shape[-1] ** -0.5
                if self.config.memory_key_init == "normal":
                    nn.init.normal_(parameter, std=bound / math.sqrt(3))
                else:
                    nn.init.uniform_(parameter, -bound, bound)
            else:  # head_proj [M, L, O], gate [M, D, O], attn_proj [d, H * head_dim]: fan-in is axis 1
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def load_weights(self, weights):
        """vLLM's way to fill a module: ``(name, whole tensor)`` pairs; returns the names."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            name = OLD_NAMES.get(name, name)
            parameters[name].data.copy_(self.share.part(name, tensor))
            loaded.add(name)
        return loaded

    def forward(self, attended, normed=None, residual=None):
        """Reads the memory.

        Args:
            attended: ``[..., H * head_dim]``, output of the attention's heads, under tensor parallelism of this rank's;
                ``None`` without an attention.
            normed: ``[..., d]``, the block's input after its norm; read where ``memory_query`` has the token in it and
                by the domain gate.
            residual: ``[..., d]``, the block's input; read by ``memory_query="block"``.

        Returns:
            ``[..., d]``.
        """
        share = self.share
        if self.attn_proj is not None:
            attended = F.linear(attended, self.attn_proj)
            attended = share.reduce(attended) if share.ranks > 1 else attended
        raw_TMD = self.raw_query(attended, normed, residual)
        output = self.look_up(self.transform_query(raw_TMD))  # [T, M, O]; block: [T, 1, d]
        if self.gate is not None:
            output = output * F.silu(torch.einsum("tmd,mdo->tmo", raw_TMD, self.gate))
        like = normed if attended is None else attended
        output = output.reshape(*like.shape[:-1], -1).to(like.dtype)
        mixed = None
        if self.mixer is not None:
            of_attention = self.config.memory_output_projection == "attention"
            mixed = (self.own_context(attended) if of_attention else output) @ self.mixer
        if share.ranks > 1:
            output = share.reduce(output) if self.config.memory_variant == "block" else share.gather(output)
            mixed = None if mixed is None else share.reduce(mixed)
        output = output if mixed is None else output + mixed
        if self.domain_gate is not None:
            score = F.linear(normed.detach().float(), self.domain_gate.float()[None], self.domain_gate_bias.float())
            output = output * score.sigmoid().to(output.dtype)
        return output

    def own_context(self, attended):
        """The channels of this rank's heads; the attention's output has no others, its projection has."""
        return attended if self.attn_proj is None else self.share.own(attended)

    def raw_query(self, attended, normed, residual):
        """``[T, M, D]`` from what ``memory_query`` names."""
        kind = self.config.memory_query
        if kind == "attention":
            return self.heads(self.own_context(attended))
        if kind == "token":
            return self.heads(self.share.own(normed))
        if kind == "block":
            hidden = residual + attended
            wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
            return self.heads(self.share.own(self.block_norm * (wide * scale).to(hidden.dtype)))
        context, token = unit_rms(self.heads(self.own_context(attended))), unit_rms(self.heads(self.share.own(normed)))
        return context + token if kind == "sum" else torch.cat((context, token), dim=-1)

    def heads(self, channels):
        return channels.reshape(-1, self.row_keys.shape[0], channels.shape[-1] // self.row_keys.shape[0])

    def transform_query(self, query_TMD):
        if self.query_norm is None and self.log_temperature is None:
            return query_TMD
        out = query_TMD.to(torch.promote_types(query_TMD.dtype, torch.float32))
        if self.query_norm is not None:
            out = unit_rms(out) * self.query_norm
        if self.log_temperature is not None:
            out = out * self.log_temperature.to(out.dtype).exp()[:, None]
        return out.to(query_TMD.dtype)

    def look_up(self, query_TMD):
        """``[T, M, D] -> [T, M, O]``, for ``block`` ``[T, 1, d]``."""
        config = self.config
        settings = (config.memory_topk, config.memory_variant, config.memory_score_activation)
        return look_up(query_TMD, self.row_keys, self.col_keys, self.value_bank, self.head_proj, *settings)


class MidusMemoryLayer(MidusBlock):
    """A Memory block: ``x + memory(attention(norm(x)))``, or, without an attention, ``x + memory(norm(x))``.

    Where norms stand behind the branches, one stands behind the memory.
    """

    def __init__(self, config, layer_idx, block=0):
        super().__init__()
        # Not self_attn: patterns that shard or quantize the attention of a Llama must not match.
        if config.memory_attention != "none":
            self.mem_attn = MidusAttention(config, layer_idx, False, block)
        self.memory = MidusMemory(config)
        self.make_norms(config, 2)

    def forward(self, hidden_states, output_attentions=False, **kwargs):
        normed = self.normed(0, hidden_states)
        attended, weights = self.mem_attn(normed, **kwargs) if hasattr(self, "mem_attn") else (None, None)
        hidden_states = self.add(hidden_states, self.normed(1, self.memory(attended, normed, hidden_states)))
        return (hidden_states, weights) if output_attentions else hidden_states


# -- the plan that travels along --------------------------------------------------------------------------------------
def read_plan(directory, **hub):
    """The plan beside a model, a local directory or a repository of the hub; ``None`` without one."""
    absent = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
    path = cached_file(
        directory, PLAN_FILE, **hub, **{f"_raise_exceptions_for_{name}": no for name, no in absent.items()}
    )
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            plan = json.load(file)
        return plan if isinstance(plan["blocks"], list) else None
    except (ValueError, KeyError, TypeError):
        logger.warning(f"{path} is no plan; it will not be saved with the model")
        return None


def plan_fits(plan, config):
    """Whether the blocks are still those of the plan; layers may have been added or removed since."""
    kinds = ["memory" if block["kind"] == "memory" else "transformer" for block in plan["blocks"]]
    memory = plan.get("memory") or {}
    return kinds == config.block_types and all(getattr(config, name, None) == value for name, value in memory.items())


def check_sdpa(config):
    """Raises ``ValueError`` where sdpa would leave out the bound of the scores; some versions do so without a word."""
    if config.attn_logit_softcapping is not None:
        raise ValueError(
            f"attn_implementation='sdpa' does not bound attention scores (attn_logit_softcapping={config.attn_logit_softcapping}); "
            "choose eager, flex_attention or flash_attention_2"
        )


# -- the models ------------------------------------------------------------------------------------------------------
class MidusPreTrainedModel(PreTrainedModel):
    config_class = MidusConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MidusDecoderLayer", "MidusMemoryLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flash_attn_3 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_cache_class = True
    _supports_static_cache = True
    _supports_quantized_cache = True
    _can_compile_fullgraph = True

    def __init__(self, config, *args, **kwargs):
        config.check()  # fields may have been set after the configuration was made
        super().__init__(config, *args, **kwargs)
        self._plan = None

    def _sdpa_can_dispatch(self, *args, **kwargs):
        """As the base class, which takes eager where this raises and nobody asked for sdpa by name."""
        check_sdpa(self.config)
        return super()._sdpa_can_dispatch(*args, **kwargs)

    @classmethod
    def _check_and_enable_sdpa(cls, config, hard_check_only=False):
        """The same for transformers 4.53."""
        if hard_check_only:
            check_sdpa(config)
        if config.attn_logit_softcapping is None:
            return super()._check_and_enable_sdpa(config, hard_check_only)
        config._attn_implementation = "eager"
        return config

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As the base class; exports of plan schema 1 are read too, and saved as those of today."""
        kwargs["key_mapping"] = {**RENAMED, **(kwargs.get("key_mapping") or {})}
        directory = str(args[0] if args else kwargs.get("pretrained_model_name_or_path", ""))
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._plan = read_plan(directory, **hub)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As the base class; the plan that the model was loaded with goes along while it describes the model."""
        # transformers 5 would undo on saving the renaming that it did on loading.
        conversions = getattr(self, "_weight_conversions", None) or []
        self._weight_conversions = [c for c in conversions if not set(c.target_patterns) & set(RENAMED.values())]
        if self._plan is not None and kwargs.get("is_main_process", True) and plan_fits(self._plan, self.config):
            plan = {**self._plan, "schema_version": max(PLAN_SCHEMA, self._plan.get("schema_version", 0))}
            os.makedirs(save_directory, exist_ok=True)
            with open(os.path.join(save_directory, PLAN_FILE), "w") as file:
                file.write(json.dumps(plan, indent=2) + "\n")
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # transformers would guess it from the wording of this file

    def _init_weights(self, module):
        # Through nn.init alone: transformers 5 guards loaded tensors by replacing these functions.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, MidusRMSNorm):
            nn.init.constant_(module.weight, 0.0 if isinstance(module, MidusCenteredRMSNorm) else 1.0)
        elif isinstance(module, MidusMemory):
            module.reset_parameters()
        elif isinstance(module, (MidusRouter, MidusExperts)):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=self.config.initializer_range)


class MidusScaledEmbedding(nn.Embedding):
    """An embedding whose output is multiplied by a factor in the weights' dtype (Gemma)."""

    embed_scale = 1.0

    def forward(self, input_ids):
        factor = torch.full((), self.embed_scale, dtype=self.weight.dtype, device=self.weight.device)
        return super().forward(input_ids) * factor


class MidusModel(MidusPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config):
        super().__init__(config)
        embedding = MidusScaledEmbedding if config.round_embedding_multiplier else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.round_embedding_multiplier:
            self.embed_tokens.embed_scale = config.embedding_multiplier
        layer_class = {"transformer": MidusDecoderLayer, "memory": MidusMemoryLayer}
        self.layers = nn.ModuleList(
            layer_class[kind](config, slot, block)
            for block, (kind, slot) in enumerate(zip(config.block_types, self.cache_slots(config)))
        )
        self.norm = make_norm(config, config.hidden_size)
        self.rotary_emb = MidusRotaryEmbedding(config)
        if config.local_rope_theta is not None:
            plain = {"rope_type": "default", "rope_theta": config.local_rope_theta}
            self.rotary_emb_local = MidusRotaryEmbedding(config, plain)
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def cache_slots(config):
        """Per block its slot of the KV cache: blocks with an attention have the first ones, as transformers asks slot 0.

        vLLM, which parts the blocks among its pipeline stages, counts all of them; so does a cache that keeps the window of
        sliding blocks alone, which is made by ``layer_types``.
        """
        if config.is_mixed or config._attn_implementation == "vllm":
            return list(range(config.num_hidden_layers))
        return [sum(map(config.has_attention, range(block))) for block in range(config.num_hidden_layers)]

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
        **kwargs,
    ):
        """As ``LlamaModel``. Unknown keyword arguments go down to the attention function."""
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        use_cache = self._use_cache(use_cache)
        if output_attentions and config._attn_implementation != "eager":
            logger.warning_once(
                f"attn_implementation={config._attn_implementation!r} returns no attention weights, so output_attentions "
                "gives none; load the model with attn_implementation='eager', or call set_attn_implementation('eager')"
            )
            output_attentions = False
        if config._attn_implementation == "sdpa":
            check_sdpa(config)  # it may have been set past the methods that check it
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        past_key_values = past_key_values if cache is None else cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config) if CACHE_TAKES_CONFIG else DynamicCache()
        # Made by generate up to 5.0; later versions warn when a signature asks for it.
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        attention_mask = self._attention_mask(
            inputs_embeds, attention_mask, cache_position, past_key_values, position_ids
        )

        hidden_states = inputs_embeds
        if config.embedding_multiplier != 1.0 and not config.round_embedding_multiplier:
            hidden_states = hidden_states * config.embedding_multiplier
        position_embeddings = local = self.rotary_emb(hidden_states, position_ids)
        if config.local_rope_theta is not None:
            local = self.rotary_emb_local(hidden_states, position_ids)
        all_hidden_states, all_attentions = (), ()
        for block, layer in enumerate(self.layers):
            slides = config.slides(block)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            # hidden_states goes by position: re-entrant gradient checkpointing sees only positional arguments.
            output = layer(
                hidden_states,
                attention_mask=attention_mask[slides] if config.is_mixed else attention_mask,
                position_embeddings=local if slides else position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                cache_position=cache_position,
                output_attentions=output_attentions,
                use_cache=use_cache,
                **kwargs,
            )
            hidden_states = output[0] if output_attentions else output
            if output_attentions:
                all_attentions += (output[1],)
        hidden_states = self.norm(hidden_states)
        result = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: past_key_values if use_cache else None},
            hidden_states=all_hidden_states + (hidden_states,) if output_hidden_states else None,
            attentions=all_attentions if output_attentions else None,
        )
        return result if return_dict else result.to_tuple()

    def _attention_mask(self, inputs_embeds, attention_mask, cache_position, past_key_values, position_ids):
        """The mask of all blocks; where only some of them slide ``{slides: mask}``."""
        if isinstance(attention_mask, dict):  # made by generate
            return {kind == "sliding_attention": mask for kind, mask in attention_mask.items()}
        arguments = {
            "config": self.config,
            "input_embeds": inputs_embeds,  # the name up to 5.0
            "inputs_embeds": inputs_embeds,  # the name in later versions
            "attention_mask": attention_mask,
            "cache_position": cache_position,
            "past_key_values": past_key_values,  # the name up to 5.23
            "cache": past_key_values,  # the name in later versions
            "position_ids": position_ids,
        }
        arguments = {name: value for name, value in arguments.items() if name in MASK_ARGUMENTS}
        create_mask = {False: create_causal_mask, True: create_sliding_window_causal_mask}
        if self.config.is_mixed:
            kinds = {self.config.slides(block) for block in range(self.config.num_hidden_layers)}
            return {slides: create_mask[slides](**arguments) for slides in kinds}
        return create_mask[self.config.slides(0)](**arguments)

    def _use_cache(self, use_cache):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("use_cache=True does not go with gradient checkpointing; it is off in this pass")
            return False
        return use_cache


class MidusForCausalLM(MidusPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = TIED_WEIGHTS
    _tp_plan = {"lm_head": HEAD_PLAN}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config):
        super().__init__(config)
        self.model = MidusModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate reads its signature
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """As the base class; ``longrope`` computes a cache anew when the sequence outgrows the short factors."""
        rope, cache = self.config.rope_parameters, kwargs.get(CACHE_NAME)
        if rope["rope_type"] == "longrope" and cache is not None:
            original, length = rope["original_max_position_embeddings"], input_ids.shape[1]
            if 0 < cache.get_seq_length() <= original < length:
                kwargs[CACHE_NAME] = None
                if "next_sequence_length" in kwargs:
                    kwargs["next_sequence_length"] = None
                if kwargs.get("cache_position") is not None:
                    kwargs["cache_position"] = torch.arange(length, device=input_ids.device)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def get_decoder(self):
        return self.model

    def set_decoder(self, decoder):
        self.model = decoder

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        """As ``LlamaForCausalLM``: ``labels`` ``[B, S]`` (-100 = ignored) give a loss, ``logits_to_keep`` the last n."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = soft_cap(self.lm_head(outputs.last_hidden_state[:, keep, :]), self.config.final_logit_softcapping)
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if return_dict else result.to_tuple()


MidusModel.register_for_auto_class("AutoModel")
MidusForCausalLM.register_for_auto_class("AutoModelForCausalLM")
