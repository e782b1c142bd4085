"""What up-scaling can be told: the policy, the base, the output."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megatron_midus.config.fields import part
from megatron_midus.config.memory import MemoryConfig
from megatron_midus.errors import UserError

PolicyName = Literal[
    "interleave", "llama_pro", "solar", "stack", "average", "opt_deus", "opt_deus_literal", "control", "none", "midus"
]
MEMORY_TITLE = "Memory blocks (policy interleave)"


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Inserted blocks"""

    policy: PolicyName = "interleave"
    """Where blocks are inserted and what they are. interleave, or midus: Memory blocks. llama_pro: copies with zeroed outputs.
    solar, stack: repeated layers. average: means of neighbours. opt_deus: means of neighbours aligned by optimal transport,
    outputs zeroed (opt_deus_literal: scaled as in the paper's program). control: nothing inserted, those layers of the base
    are trained instead. none: the base as it is."""

    preset: Literal["midus", "midus-token"] | None = None
    """Settings of Memory blocks to begin with; flags given beside it win. midus: as published. midus-token: blocks that ask with
    the token itself and have no attention."""

    num_blocks: int | None = dataclasses.field(default=None, metadata={"metavar": "N"})
    """Blocks to insert, spread evenly by the policy."""

    insert_after: list[int] | None = dataclasses.field(default=None, metadata={"metavar": "LAYER"})
    """0-based layers of the base after which a block is inserted, instead of --num-blocks. Of a MIDUS model they count all
    blocks, Memory blocks as well."""

    train_earlier_memory: bool = False
    """Of a MIDUS model that is up-scaled again: --train inserted will train the Memory blocks that it has already beside the
    new ones, instead of the new ones alone."""


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """Layout of the training to come"""

    target_tensor_parallel_size: int = 1
    """Tensor-parallel size of the later training: checked, recorded, and the embedding padded for it. A checkpoint is
    stored unsplit; any size can load it."""

    target_pipeline_parallel_size: int = 1
    """Pipeline-parallel size of the later training: checked and recorded."""

    make_vocab_size_divisible_by: int = 128
    """Rows of the embedding of each tensor-parallel rank are padded to a multiple of this."""

    def __post_init__(self) -> None:
        if self.make_vocab_size_divisible_by < 1:
            raise UserError(
                f"--make-vocab-size-divisible-by {self.make_vocab_size_divisible_by} must be at least 1; Megatron's is 128"
            )


@dataclasses.dataclass(frozen=True)
class UpscaleConfig:
    """Up-scaling

    Plans the inserted blocks of a Hugging Face model, says what they cost, and writes the result.

    Examples:
      midus upscale --hf-model DIR --num-blocks 4 --dry-run
      midus upscale --hf-model DIR --save OUT --insert-after 1 3 5 --memory-num-keys 64
    """

    hf_model: str = dataclasses.field(metadata={"metavar": "DIR"})
    """Base model: a directory with config.json, safetensors, tokenizer; or org/name[@revision] on the Hugging Face hub, fetched
    once. An export of a MIDUS model keeps its Memory blocks."""

    save: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """Output directory; made whole or not at all. Not needed with --dry-run."""

    save_format: Literal["megatron", "hf"] = "megatron"
    """megatron = a distributed checkpoint for pretraining; hf = a Hugging Face directory."""

    seed: int = 0
    """Seed of newly initialised tensors."""

    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Dtype of the written weights; keep = as in the base."""

    calibration_data: str | None = dataclasses.field(default=None, metadata={"metavar": "FILE"})
    """Text of the new domain, or .jsonl with a 'text' entry, for --memory-key-init calibrated and --memory-domain-gate."""

    background_data: str | None = dataclasses.field(default=None, metadata={"metavar": "FILE"})
    """Text of the old domain, or .jsonl with a 'text' entry, for --memory-domain-gate."""

    calibration_tokens: int = 8192
    """Tokens of either text that are run through the model."""

    max_shard_size: str = "5GB"
    """Largest safetensors file of --save-format hf, for instance 500MB."""

    seq_length: int = 2048
    """Tokens of a sequence for the FLOPs of the cost table."""

    workers: int | None = None
    """Tensors that are read, hashed and written at a time; each worker holds a few copies of one tensor. When absent: the
    cores of this machine, up to 4."""

    overwrite: bool = False
    """Replace the output directory when it exists."""

    dry_run: bool = False
    """Print the plan and its cost and write nothing."""

    verify: bool = False
    """Compare fp32 logits of base and result before the output is kept; fails if the policy promises identity and the
    logits differ."""

    target: TargetConfig = part(TargetConfig)
    blocks: PolicyConfig = part(PolicyConfig)
    memory: dict[str, Any] = part(MemoryConfig, title=MEMORY_TITLE, given_only=True)

    def __post_init__(self) -> None:
        if self.save is None and not self.dry_run:
            raise UserError("--save is missing; give an output directory or --dry-run")
        for name in ("seq_length", "calibration_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        calibrated, gated = self.memory.get("memory_key_init") == "calibrated", self.memory.get("memory_domain_gate")
        if calibrated and self.calibration_data is None and not self.dry_run:
            raise UserError("--memory-key-init calibrated needs a text to calibrate with; give --calibration-data FILE")
        if gated and None in (self.calibration_data, self.background_data) and not self.dry_run:
            raise UserError(
                "--memory-domain-gate tells a new domain from an old one; give --calibration-data FILE, a text of the new, "
                "and --background-data FILE, a text of the old"
            )
        if self.calibration_data is not None and not (calibrated or gated):
            raise UserError(
                "--calibration-data is only used by --memory-key-init calibrated and --memory-domain-gate; give one of them"
            )
        if self.background_data is not None and not gated:
            raise UserError("--background-data is only used by --memory-domain-gate; give both or neither")
