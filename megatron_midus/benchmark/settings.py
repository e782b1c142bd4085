"""What the sub-commands of tools/benchmark.py can be told: one dataclass field = one flag."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

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
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda, but there is no CUDA device; choose cpu")

    def resolved_device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class HmlSettings(RunSettings):
    """Head-wise memory look-up"""

    tokens: int | None = None
    """Tokens of one look-up instead of those in the table."""

    backends: list[str] | None = None
    """Backends of megatron_midus.ops to time; when absent, all that can run."""

    baselines: list[Literal["ffn", "naive", "product-key-memory"]] = dataclasses.field(
        default_factory=lambda: ["ffn", "naive", "product-key-memory"]
    )
    """What they are compared with: ffn = the SwiGLU FFN that a Memory block replaces; naive = torch with materialised
    scores and gathered rows; product-key-memory = the package of that name, on the function that it computes."""

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

    variants: list[Literal["base", "copied", "memory", "token", "watched"]] = dataclasses.field(
        default_factory=lambda: ["base", "copied", "memory", "token"]
    )
    """base = the base alone, all of it trained; copied = with copied Transformer blocks; memory = with Memory blocks;
    token = with Memory blocks that ask with the token and have no attention;
    watched = with Memory blocks, counted and reported in every iteration (a run does so every --memory-log-interval).
    But for the first, the inserted blocks are trained and the base is frozen."""


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
