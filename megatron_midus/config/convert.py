"""What a conversion between Megatron checkpoints and Hugging Face directories can be told."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.config.fields import part
from megatron_midus.config.upscale import TargetConfig
from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Conversion

    Converts between Megatron checkpoints and Hugging Face directories, in both directions, tensor by tensor.

    Examples:
      midus convert --load CHECKPOINT --save OUT --to hf
      midus convert --load HF_DIR --save CHECKPOINT --to megatron --target-tensor-parallel-size 2
    """

    load: str = dataclasses.field(metadata={"metavar": "DIR"})
    """What to convert: a Megatron checkpoint (its root or one iter_* directory) or a Hugging Face directory."""

    save: str = dataclasses.field(metadata={"metavar": "DIR"})
    """Output directory; made whole or not at all."""

    to: Literal["hf", "megatron"]
    """Format of the output."""

    ckpt_step: int | None = dataclasses.field(default=None, metadata={"metavar": "N"})
    """Iteration of a Megatron checkpoint; the latest when absent."""

    weights: Literal["last", "ema"] = "last"
    """--to hf: last = those of the iteration; ema = their average, which a run with --ema-decay keeps beside them."""

    dtype: Literal["auto", "keep", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the written weights: auto = that of the Hugging Face model that the checkpoint came from, keep = as stored."""

    max_shard_size: str = "5GB"
    """Largest safetensors file, for instance 500MB."""

    workers: int | None = None
    """Tensors that are read, hashed and written at a time; each worker holds a few copies of one tensor. When absent: the
    cores of this machine, up to 4."""

    evaluation: str | None = dataclasses.field(default=None, metadata={"metavar": "FILE"})
    """--to hf: JSON report of an evaluation, shown in the model card."""

    verify_checkpoint: bool = True
    """--to hf: compare every file of the checkpoint with its checksum first."""

    overwrite: bool = False
    """Replace the output directory when it exists."""

    verify: Literal["logits", "tensors"] | None = dataclasses.field(default=None, metadata={"const": "logits"})
    """Before the output is kept: tensors = read it back and compare every tensor; logits = that, and fp32 logits of both
    ends on the CPU, which takes the memory of the model in fp32 (--verify alone: logits)."""

    target: TargetConfig = part(TargetConfig, title="Layout of the training to come (--to megatron)")

    def __post_init__(self) -> None:
        if self.to == "megatron" and self.ckpt_step is not None:
            raise UserError(
                "--ckpt-step chooses an iteration of a Megatron checkpoint; leave it out with --to megatron"
            )
        if self.weights == "ema" and self.to == "megatron":
            raise UserError("--weights ema chooses weights of a Megatron checkpoint; leave it out with --to megatron")
        if self.weights == "ema" and self.verify == "logits":
            raise UserError(
                "--verify logits computes with the last weights of the checkpoint; give --verify tensors with --weights ema"
            )
        if self.to == "megatron" and self.evaluation is not None:
            raise UserError("--evaluation goes into the model card of an export; leave it out with --to megatron")
