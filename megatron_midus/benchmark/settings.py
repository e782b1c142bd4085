"""What the sub-commands of tools/benchmark.py can be told: one dataclass field = one flag."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Measurement"""

    shape: list[str] = dataclasses.field(default_factory=lambda: ["cpu-small"])
    """Rows of the table of shapes (megatron_midus/benchmark/shapes.py)."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Compute in this type instead of the one in the table."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure; auto = the GPU when there is one."""

    threads: int | None = None
    """CPU threads; torch's own choice when absent."""

    rounds: int = 9
    """Times that every contender is timed, one after the other in turn, each round on fresh data."""

    warmup: int = 1
    """Rounds before these that do not count."""

    seed: int = 0
    """Seed of all data."""

    measure_memory: bool = True
    """Measure peak memory, every contender in a process of its own."""

    json: str | None = None
    """Write all figures to this file."""

    markdown: str | None = None
    """Write the tables to this file."""

    plot: str | None = None
    """Draw the figures into this PNG file (needs matplotlib)."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("warmup", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        if self.device == "cuda" and not _has_cuda():
            raise UserError("device=cuda, but there is no CUDA device; choose cpu")

    def resolved_device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if _has_cuda() else "cpu"


def _has_cuda() -> bool:
    import torch  # here, so that --help does not wait for it

    return torch.cuda.is_available()


@dataclasses.dataclass(frozen=True)
class HmlSettings(RunSettings):
    """Head-wise memory look-up"""

    tokens: int | None = None
    """Tokens of one look-up instead of those in the table."""

    backends: list[str] | None = None
    """Backends of megatron_midus.ops to time; when absent, all that can run."""

    baselines: list[Literal["ffn", "copied", "naive", "product-key-memory", "memory-layer"]] = dataclasses.field(
        default_factory=lambda: ["ffn", "copied", "naive", "product-key-memory", "memory-layer"]
    )
    """What they are compared with: ffn = the SwiGLU FFN that a Memory block replaces; copied = the whole block; naive =
    torch with materialised scores and gathered rows; product-key-memory = the package of that name; memory-layer = Meta's,
    written here from its paper with an embedding bag. The last two compute variant block."""

    decode_tokens: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4, 8])
    """Batch sizes of single decoding steps, tokens; forward only, without gradients. 0 = none."""

    decode_rounds: int = 200
    """Times that every contender is timed per decoding size."""


@dataclasses.dataclass(frozen=True)
class LayerSettings(RunSettings):
    """A Memory block against a copied Transformer block"""

    batch: int = 1
    """Sequences."""

    backend: str = "auto"
    """Backend of the memory look-up."""


@dataclasses.dataclass(frozen=True)
class TrainSettings(LayerSettings):
    """Whole training iterations"""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation, as of pretrain_midus.py."""

    variants: list[Literal["base", "copied", "memory", "token", "watched", "floor"]] = dataclasses.field(
        default_factory=lambda: ["base", "copied", "memory", "token", "floor"]
    )
    """base = the base alone, all of it trained; copied = with copied Transformer blocks; memory = with Memory blocks;
    token = with Memory blocks that ask with the token and have no attention;
    watched = with Memory blocks, counted and reported in every iteration (a run does so every --memory-log-interval);
    floor = forward pass of the base and the backward pass that blocks at these places cannot do without, nothing trained.
    But for the first, the inserted blocks are trained and the base is frozen."""


# Sizes of each axis; up to a million slots and 64k tokens.
GROWTH_SIZES = {
    "tokens": (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    "num_keys": (64, 128, 256, 512, 1024),
    "topk": (4, 8, 16, 32, 64),
    "num_heads": (2, 4, 8, 16, 32),
    "latent_size": (16, 32, 64, 128, 256),
    "num_blocks": (1, 2, 4, 8),
}


@dataclasses.dataclass(frozen=True)
class GrowthSettings(HmlSettings):
    """How time and memory grow with each size"""

    shape: list[str] = dataclasses.field(default_factory=lambda: ["cpu-h8"])
    """Rows of the table of shapes (megatron_midus/benchmark/shapes.py); the sizes that are not varied are theirs."""

    axes: list[Literal["tokens", "num_keys", "topk", "num_heads", "latent_size", "num_blocks"]] = dataclasses.field(
        default_factory=lambda: list(GROWTH_SIZES)[:-1]
    )
    """Sizes to vary, one at a time. num_blocks = whole iterations of the shape's model (give a shape for training, as
    train-cpu)."""

    points: int | None = None
    """Sizes of each axis, from the smallest on; all when absent."""

    baselines: list[Literal["ffn", "copied", "naive", "product-key-memory", "memory-layer"]] = dataclasses.field(
        default_factory=lambda: ["ffn", "naive", "product-key-memory", "memory-layer"]
    )
    """As of hml."""

    rounds: int = 3
    """Times that every contender is timed at each size."""

    limit_seconds: float = 60.0
    """Leave a contender out from the size on at which a pass would take longer, by its necessary work."""

    limit_gigabytes: float = 8.0
    """Leave a contender out from the size on at which it would take more memory, likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points is not None and self.points < 1:
            raise UserError(f"points={self.points} must be at least 1")

    def sizes(self, axis: str, shape: Any) -> list[int]:
        """Of an axis, rising: those that the shape allows."""
        found = list(GROWTH_SIZES[axis])
        if axis == "topk":
            found = [size for size in found if size <= shape.num_keys]
        if axis == "num_keys":
            found = [size for size in found if size >= shape.topk]
        if axis == "num_heads":
            found = [size for size in found if shape.hidden_size % size == 0]
        return found[: self.points]


@dataclasses.dataclass(frozen=True)
class ServeSettings(RunSettings):
    """Serving in vLLM"""

    rounds: int = 5
    """Times that every contender is timed, one after the other in turn, each round on fresh prompts."""

    batch: list[int] = dataclasses.field(default_factory=lambda: [1, 16])
    """Prompts at a time, one table each."""

    prompt_tokens: int = 256
    """Tokens of a prompt."""

    new_tokens: int = 32
    """Tokens decoded after the first one."""

    eager: bool = False
    """Without a compiler (vLLM's --enforce-eager)."""

    implementation: Literal["auto", "transformers"] = "auto"
    """How vLLM runs the base and copied blocks: auto = its own Llama; transformers = the backend that Memory blocks need."""
