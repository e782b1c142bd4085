"""MemoryConfig: the shape and the variant of every Memory block of one model."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megatron_midus.errors import UserError

# {name: settings of Memory blocks}; what is given beside one wins over it.
PRESETS: dict[str, dict[str, Any]] = {
    "midus": {},  # as published: the defaults
    "midus-token": {
        "memory_query": "token",
        "memory_attention": "none",
        "memory_query_norm": "rms",
        "memory_query_scale": 3.0,
        "memory_topk": 16,
    },
}
# Parameters that up-scaling measures on text and training leaves alone.
MEASURED = ("domain_gate", "domain_gate_bias")
# {parameter: its name in Megatron checkpoints of every version, and in exports of plan schema 1}, where they differ.
# `values` is a name that torch.nn.utils.parametrize cannot take; what was stored under it stays readable, both ways.
STORED_NAMES = {"value_bank": "values"}


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Memory blocks (head-wise product-key memory)"""

    memory_variant: Literal["hive", "full", "block"] = "hive"
    """Value bank: hive = one latent bank shared by the heads of a block and one projection per head; full = one bank
    per head; block = one product-key memory per block whose head outputs are summed (MIDUS-PKM)."""

    memory_num_keys: int = 64
    """Sub-keys per half, n. A memory has n * n slots."""

    memory_topk: int = 8
    """Slots that one head reads for one token, k. At most n."""

    memory_latent_size: int = 32
    """Channels d_l of a row of the latent value bank (variant hive only)."""

    memory_num_heads: int | None = None
    """Query slices of variant block; the number of attention heads when absent. hive and full always have one memory
    head per attention head."""

    memory_query: Literal["attention", "token", "sum", "concat", "block"] = "attention"
    """What a head asks its memory with: attention = what the attention's head puts out (paper); token = the head's slice
    of the block's normed input; sum = both added, each of RMS 1; concat = both, each of RMS 1, the attention's half for the
    rows and the token's for the columns of the product keys; block = the head's slice of what a copied MLP would see, the
    norm of input + attention (needs --memory-attention full)."""

    memory_query_norm: Literal["none", "rms"] = "none"
    """Normalisation of each head's query before the look-up: none (as in the paper) or rms with a learnable scale."""

    memory_query_scale: float = 1.0
    """Start of that scale. Above 1 the weights of a look-up are sharper from the first step."""

    memory_query_temperature: bool = False
    """Learn one temperature per head that multiplies the scores."""

    memory_score_activation: Literal["softmax", "sigmoid", "relu"] = "softmax"
    """How the k selected scores become weights: softmax over them (paper), or sigmoid or relu of each on its own."""

    memory_output_projection: Literal["none", "linear", "attention", "silu"] = "none"
    """After the memory: none (paper); linear = m + mixer(m) with a zero-initialised mixer over all heads; attention = m +
    mixer(a), which mixes what the attention's heads put out instead; silu = each head's output times silu(query @ gate).
    """

    memory_domain_gate: bool = False
    """Multiply what the memory says about a token by sigmoid(w . norm(x) + b), the probability that the token belongs to the
    new domain. w and b are fitted when up-scaling, on a text of either domain, and never trained: it keeps what is learnt from
    changing the old domain."""

    memory_key_init: Literal["uniform", "normal", "calibrated"] = "uniform"
    """Sub-keys at the start: uniform or normal of variance 2 / (3 * d_h), or sampled from the base model's own queries
    on a calibration text."""

    memory_attention: Literal["attn_prime", "full", "none"] = "attn_prime"
    """attn_prime = the copied attention without its output projection (paper); full = with it; none = the block has no
    attention and no key/value cache (needs --memory-query token)."""

    def __post_init__(self) -> None:
        if self.memory_num_keys < 1:
            raise UserError(f"memory_num_keys={self.memory_num_keys} must be at least 1")
        if not 1 <= self.memory_topk <= self.memory_num_keys:
            raise UserError(
                f"memory_topk={self.memory_topk} is out of range; choose 1 to memory_num_keys={self.memory_num_keys}"
            )
        if self.memory_num_keys**2 > 2**31 - 1:
            raise UserError(f"memory_num_keys={self.memory_num_keys} is out of range; choose at most 46340")
        if self.memory_latent_size < 1:
            raise UserError(f"memory_latent_size={self.memory_latent_size} must be at least 1")
        if self.memory_num_heads is not None and self.memory_num_heads < 1:
            raise UserError(f"memory_num_heads={self.memory_num_heads} must be at least 1")
        if self.memory_num_heads is not None and self.memory_variant != "block":
            raise UserError(
                f"memory_num_heads={self.memory_num_heads} is a setting of variant block; "
                f"variant {self.memory_variant} has one memory head per attention head"
            )
        if self.memory_variant == "block" and self.memory_output_projection != "none":
            raise UserError(
                f"memory_output_projection={self.memory_output_projection} does not apply to variant block, whose "
                "heads already share one output; choose none"
            )
        if self.memory_query_scale <= 0:
            raise UserError(f"memory_query_scale={self.memory_query_scale} must be above 0")
        if self.memory_query_scale != 1.0 and self.memory_query_norm != "rms":
            raise UserError(
                f"memory_query_scale={self.memory_query_scale} is the start of the query norm's scale; add --memory-query-norm rms"
            )
        self._check_query()

    def _check_query(self) -> None:
        """The parts of a block that its query reads must be there, and the parts that are there must be read."""
        reads_attention = self.memory_query != "token" or self.memory_output_projection == "attention"
        if reads_attention and not self.has_attention:
            what = (
                f"memory_query={self.memory_query}"
                if self.memory_query != "token"
                else f"memory_output_projection={self.memory_output_projection}"
            )
            remedy = "--memory-query token" if self.memory_query != "token" else "another --memory-output-projection"
            raise UserError(f"{what} reads the attention, which memory_attention=none leaves out; choose {remedy}")
        if self.has_attention and not reads_attention:
            raise UserError(
                f"memory_query=token reads no attention, and memory_attention={self.memory_attention} computes one; "
                "choose --memory-attention none, or --memory-output-projection attention"
            )
        if self.reads_residual and self.memory_attention != "full":
            raise UserError(
                f"memory_query=block adds the attention to the block's input, which memory_attention="
                f"{self.memory_attention} cannot; choose --memory-attention full"
            )

    @property
    def num_slots(self) -> int:
        """N = n * n."""
        return self.memory_num_keys**2

    @property
    def has_attention(self) -> bool:
        """Whether a Memory block has an attention, and so a place in the key/value cache."""
        return self.memory_attention != "none"

    @property
    def reads_token(self) -> bool:
        """Whether the query needs the block's normed input."""
        return self.memory_query in ("token", "sum", "concat")

    @property
    def reads_normed(self) -> bool:
        """Whether the memory needs the block's normed input, for its query or its gate."""
        return self.reads_token or self.memory_domain_gate

    @property
    def reads_residual(self) -> bool:
        """Whether the query needs the block's input as it is."""
        return self.memory_query == "block"

    def check_model(self, *, hidden_size: int, num_attention_heads: int, kv_channels: int) -> None:
        """Raises ``ValueError`` where this memory cannot be put into such a model."""
        if hidden_size % num_attention_heads:
            raise UserError(
                f"hidden_size={hidden_size} is not divisible by num_attention_heads={num_attention_heads}; "
                "a Memory block writes hidden_size / num_attention_heads channels per head"
            )
        sizes = {"hidden_size": hidden_size, "num_attention_heads": num_attention_heads, "kv_channels": kv_channels}
        if self.memory_query in ("sum", "concat") and self.context_width(**sizes) != hidden_size:
            raise UserError(
                f"memory_query={self.memory_query} needs heads of hidden_size / num_attention_heads = "
                f"{hidden_size // num_attention_heads} channels, and kv_channels={kv_channels}; choose "
                "--memory-attention full or another --memory-query"
            )
        width, heads = self.query_width(**sizes), self.num_memory_heads(num_attention_heads)
        if width % heads:
            raise UserError(f"memory_num_heads={heads} does not divide the query width {width}")
        if self.query_size(**sizes) % 2:
            raise UserError(
                f"the query of one memory head has {width // heads} channels; product keys need an even number"
            )

    def num_memory_heads(self, num_attention_heads: int) -> int:
        """M: heads that look something up."""
        return self.memory_num_heads or num_attention_heads

    def context_width(self, *, hidden_size: int, num_attention_heads: int, kv_channels: int) -> int:
        """Channels that the attention hands to the memory, all heads together; without an attention none."""
        return {"attn_prime": num_attention_heads * kv_channels, "full": hidden_size, "none": 0}[self.memory_attention]

    def query_width(self, *, hidden_size: int, num_attention_heads: int, kv_channels: int) -> int:
        """Channels that all memory heads cut into their queries; those of ``concat`` see this many of either kind."""
        if self.memory_query in ("token", "block"):
            return hidden_size
        return self.context_width(
            hidden_size=hidden_size, num_attention_heads=num_attention_heads, kv_channels=kv_channels
        )

    def query_size(self, *, hidden_size: int, num_attention_heads: int, kv_channels: int) -> int:
        """D: channels of one memory head's query."""
        width = self.query_width(
            hidden_size=hidden_size, num_attention_heads=num_attention_heads, kv_channels=kv_channels
        )
        return width // self.num_memory_heads(num_attention_heads) * (2 if self.memory_query == "concat" else 1)

    def parameter_shapes(
        self, *, hidden_size: int, num_attention_heads: int, kv_channels: int
    ) -> dict[str, tuple[int, ...]]:
        """Global shapes of every parameter of one memory, in the order in which they are stored.

        Memory and attention heads are always the first axis where there is one, so tensor parallelism splits axis 0,
        except for ``attn_proj`` (axis 1) and the replicated tensors: ``value_bank`` of hive and block, and ``MEASURED``.
        """
        sizes = {"hidden_size": hidden_size, "num_attention_heads": num_attention_heads, "kv_channels": kv_channels}
        heads, query = self.num_memory_heads(num_attention_heads), self.query_size(**sizes)
        out = hidden_size // num_attention_heads
        shapes: dict[str, tuple[int, ...]] = {}
        if self.memory_attention == "full":
            shapes["attn_proj"] = (hidden_size, num_attention_heads * kv_channels)
        if self.reads_residual:
            shapes["block_norm"] = (hidden_size,)
        if self.memory_query_norm == "rms":
            shapes["query_norm"] = (heads, query)
        if self.memory_query_temperature:
            shapes["log_temperature"] = (heads,)
        shapes["row_keys"] = (heads, self.memory_num_keys, query // 2)
        shapes["col_keys"] = (heads, self.memory_num_keys, query // 2)
        if self.memory_variant == "hive":
            shapes["value_bank"] = (self.num_slots, self.memory_latent_size)
            shapes["head_proj"] = (heads, self.memory_latent_size, out)
        elif self.memory_variant == "full":
            shapes["value_bank"] = (heads, self.num_slots, out)
        else:
            shapes["value_bank"] = (self.num_slots, hidden_size)
        if self.memory_output_projection == "linear":
            shapes["mixer"] = (num_attention_heads * out, hidden_size)
        elif self.memory_output_projection == "attention":
            shapes["mixer"] = (self.context_width(**sizes), hidden_size)
        elif self.memory_output_projection == "silu":
            shapes["gate"] = (heads, query, out)
        if self.memory_domain_gate:
            shapes["domain_gate"] = (hidden_size,)
            shapes["domain_gate_bias"] = (1,)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
