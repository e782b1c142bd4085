"""ModelConfig: the architecture of the decoder that is up-scaled, in Megatron's vocabulary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_midus.config.rope import check_factors, normalise_rope
from megatron_midus.errors import UserError
from megatron_midus.json_files import read_json_object

MODEL_CONFIG_FILE = "model_config.json"


def padded_vocab_size(vocab_size: int, *, divisible_by: int = 1, tensor_model_parallel_size: int = 1) -> int:
    """Rows of the embedding after padding to a multiple of ``divisible_by * tensor_model_parallel_size``."""
    if vocab_size < 1 or divisible_by < 1 or tensor_model_parallel_size < 1:
        raise UserError(
            f"vocab_size={vocab_size}, make_vocab_size_divisible_by={divisible_by} and "
            f"tensor_model_parallel_size={tensor_model_parallel_size} must be at least 1"
        )
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture (read from the checkpoint when it is absent here)"""

    num_layers: int
    """Blocks of the decoder as it stands in this model: base and inserted ones."""
    hidden_size: int
    """Width of the residual stream, channels."""
    ffn_hidden_size: int
    """Width of the gated MLP, channels."""
    num_attention_heads: int
    """Attention (query) heads."""
    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int
    """Channels of one attention head."""
    vocab_size: int
    """Rows of the embedding of the Hugging Face model, its own padding included, ours not."""
    max_position_embeddings: int
    """Longest sequence that the model was made for, tokens."""
    norm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: dict[str, Any] | None = dataclasses.field(default=None, metadata={"flag": False})
    """Hugging Face's rope_scaling entry: rope_type and what this type knows (config/rope.py); None = no scaling."""
    rotary_percent: float = dataclasses.field(default=1.0, metadata={"flag": False})
    """Share of a head's channels that the rotary embedding turns, its first ones."""
    tie_word_embeddings: bool = False
    """Whether the output layer is the embedding."""
    add_qkv_bias: bool = False
    """Whether the query, key and value projections have a bias."""
    qk_layernorm: bool = False
    """Whether queries and keys are normalised per head."""
    sliding_window: int | None = None
    """Tokens that attention looks back, its own included; None = all."""
    num_moe_experts: int | None = dataclasses.field(default=None, metadata={"aliases": ("num_experts",)})
    """Experts of every Transformer block, which then has a mixture of them in place of its MLP; absent = one MLP."""
    moe_router_topk: int = 2
    """Experts that one token is sent to."""
    moe_ffn_hidden_size: int | None = None
    """Width of the gated MLP of one expert, channels; absent = ffn_hidden_size."""
    moe_router_pre_softmax: bool = False
    """Whether the experts' weights are a softmax over all experts as it is; otherwise those chosen sum to 1."""
    moe_aux_loss_coeff: float = dataclasses.field(default=0.0, metadata={"flag": False})
    """Weight of the load-balancing loss that the base was made with; a run may choose another."""
    add_output_bias: bool = dataclasses.field(default=False, metadata={"flag": False})
    """Whether the attention's output projection has a bias; a Memory block has none."""
    add_mlp_bias: bool = dataclasses.field(default=False, metadata={"flag": False})
    """Whether the matrices of the MLP have biases."""
    hidden_act: Literal["silu", "gelu_tanh"] = dataclasses.field(default="silu", metadata={"flag": False})
    """Activation of the gated MLP."""
    qk_norm_width: bool = dataclasses.field(default=False, metadata={"flag": False})
    """Whether one norm goes over all heads of a query or key together, where qk_layernorm is on."""
    norm_placement: Literal["pre", "post", "both"] = dataclasses.field(default="pre", metadata={"flag": False})
    """Where the norms of a block stand: before its branches, behind them (before the residual addition), or both."""
    zero_centered_norm: bool = dataclasses.field(default=False, metadata={"flag": False})
    """Whether norms multiply by 1 + weight."""
    wide_norm: bool = dataclasses.field(default=False, metadata={"flag": False})
    """Whether norms round to 16 bits after the weight is applied instead of before."""
    wide_rotary: bool = dataclasses.field(default=False, metadata={"flag": False})
    """Whether queries and keys turn in fp32 and are rounded to 16 bits afterwards."""
    embedding_multiplier: float = dataclasses.field(default=1.0, metadata={"flag": False})
    """Factor on the embedding's output."""
    round_embedding_multiplier: bool = dataclasses.field(default=False, metadata={"flag": False})
    """Whether that factor is rounded to the dtype of the weights first."""
    attention_scale: float | None = dataclasses.field(default=None, metadata={"flag": False})
    """Factor on attention scores; None = 1 / sqrt(kv_channels)."""
    attention_softcap: float | None = dataclasses.field(default=None, metadata={"flag": False})
    """Bound c of attention scores x, which become c * tanh(x / c); None = none."""
    residual_multiplier: float = dataclasses.field(default=1.0, metadata={"flag": False})
    """Factor on what a branch of a block adds to the residual stream."""
    logits_divisor: float = dataclasses.field(default=1.0, metadata={"flag": False})
    """What the output layer's result is divided by."""
    logits_softcap: float | None = dataclasses.field(default=None, metadata={"flag": False})
    """Bound c of the output layer's result x, which becomes c * tanh(x / c) before it is divided; None = none."""
    rope_layers: tuple[bool, ...] | None = dataclasses.field(default=None, metadata={"flag": False})
    """Per layer whether queries and keys rotate; None = in all."""
    sliding_layers: tuple[bool, ...] | None = dataclasses.field(default=None, metadata={"flag": False})
    """Per layer whether sliding_window holds; None = in all."""
    local_rotary_base: float | None = dataclasses.field(default=None, metadata={"flag": False})
    """Base of the plain rotary embedding of the sliding layers; None = they have the same as the others."""
    init_method_std: float = 0.02
    """Standard deviation of freshly initialised weights."""
    family: str = dataclasses.field(default="llama", metadata={"flag": False})
    """Name of the entry in megatron_midus.conversion.families."""
    hf_dtype: str = dataclasses.field(default="float32", metadata={"flag": False})
    """dtype of the Hugging Face weights that the model came from."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_query_groups={self.num_query_groups}"
            )
        self._check_experts()
        # Files of earlier versions hold the entry as config.json spelt it.
        rope = normalise_rope(self.rope_scaling or {})
        rope.pop("rope_theta", None)
        if rope["rope_type"] == "dynamic" and self.kv_channels <= 2:
            raise UserError(f"rope scaling 'dynamic' with kv_channels={self.kv_channels} is not defined; it needs 4")
        if self.rotary_channels < 2 or self.rotary_channels > self.kv_channels:
            raise UserError(f"rotary_percent={self.rotary_percent} turns {self.rotary_channels} of kv_channels={self.kv_channels}; it must be above 0 and at most 1")  # fmt: skip
        check_factors(rope, self.rotary_channels)
        for name in ("rope_layers", "sliding_layers"):
            layers = getattr(self, name)
            if layers is None:
                continue
            if len(layers) != self.num_layers:
                raise UserError(f"{name} names {len(layers)} layers and num_layers={self.num_layers}; they must agree")
            # Where all layers are alike nothing has to be said.
            alike = all(layers) and (name == "rope_layers" or self.local_rotary_base is None)
            object.__setattr__(self, name, None if alike else tuple(map(bool, layers)))
        object.__setattr__(self, "rope_scaling", None if rope["rope_type"] == "default" else rope)

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that the rotary embedding turns."""
        return int(self.kv_channels * self.rotary_percent)

    def _check_experts(self) -> None:
        if self.num_moe_experts is None:
            if self.moe_ffn_hidden_size is not None:
                raise UserError(
                    f"moe_ffn_hidden_size={self.moe_ffn_hidden_size} needs num_moe_experts; give it, or leave the width out"
                )
            return
        if self.moe_ffn_hidden_size is None:
            object.__setattr__(self, "moe_ffn_hidden_size", self.ffn_hidden_size)
        if self.num_moe_experts < 1 or self.expert_ffn_hidden_size < 1:
            raise UserError(
                f"num_moe_experts={self.num_moe_experts} and moe_ffn_hidden_size={self.moe_ffn_hidden_size} must be at least 1"
            )
        if not 1 <= self.moe_router_topk <= self.num_moe_experts:
            raise UserError(
                f"moe_router_topk={self.moe_router_topk} is out of range; choose 1 to num_moe_experts={self.num_moe_experts}"
            )

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Width of one expert's MLP, or of the one MLP that a block without experts has."""
        return self.ffn_hidden_size if self.moe_ffn_hidden_size is None else self.moe_ffn_hidden_size

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"unknown entries {unknown} in the model configuration; it was written by another version")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, directory: str | Path) -> ModelConfig:
        """Reads ``model_config.json`` of a Megatron checkpoint directory."""
        path = Path(directory) / MODEL_CONFIG_FILE
        try:
            return cls.from_dict(read_json_object(path))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; it is written by midus upscale and midus pretrain") from None
        except TypeError as error:
            raise UserError(f"{path} is not a valid model configuration: {error}") from None

    def save(self, directory: str | Path) -> None:
        (Path(directory) / MODEL_CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def with_layers(self, sources: Sequence[int]) -> ModelConfig:
        """The model whose layers are those of this one that ``sources`` names, in this order."""

        def chosen(layers: tuple[bool, ...] | None) -> tuple[bool, ...] | None:
            return None if layers is None else tuple(layers[source] for source in sources)

        return dataclasses.replace(
            self,
            num_layers=len(sources),
            rope_layers=chosen(self.rope_layers),
            sliding_layers=chosen(self.sliding_layers),
        )

    def unlike_llama(self) -> list[str]:
        """Names of what the blocks of this model have and a Llama's have not, rotary embeddings apart."""
        plain = ("rope_scaling", "rotary_percent", "family", "hf_dtype", "moe_aux_loss_coeff")
        fields = [f for f in dataclasses.fields(self) if not f.metadata.get("flag", True) and f.name not in plain]
        return [field.name for field in fields if getattr(self, field.name) != field.default]

    def rotates(self, layer: int) -> bool:
        """Whether queries and keys of a layer rotate."""
        return self.rope_layers is None or self.rope_layers[layer]

    def window(self, layer: int) -> int | None:
        """Tokens that the attention of a layer looks back, its own included; ``None`` = all."""
        return self.sliding_window if self.sliding_layers is None or self.sliding_layers[layer] else None

    def rotates_locally(self, layer: int) -> bool:
        """Whether a layer has the rotary embedding of the sliding ones."""
        return self.local_rotary_base is not None and (self.sliding_layers is None or self.sliding_layers[layer])

    @property
    def norm_before(self) -> bool:
        """Whether a branch of a block has a norm in front of it."""
        return self.norm_placement != "post"

    @property
    def norm_behind(self) -> bool:
        """Whether a branch of a block has a norm behind it."""
        return self.norm_placement != "pre"
