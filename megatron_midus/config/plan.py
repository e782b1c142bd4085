"""What the search for a layout of a cluster can be told."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megatron_midus.config.fields import part
from megatron_midus.config.memory import MemoryConfig
from megatron_midus.config.optimizer import check_ema_decay
from megatron_midus.config.text import check_at_least_one
from megatron_midus.config.training import check_kl_weight
from megatron_midus.config.upscale import MEMORY_TITLE, PolicyConfig
from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class HardwareConfig:
    """Hardware (when absent: the figures of --hardware)"""

    gpu_memory_gib: float | None = None
    """Memory of a GPU, GiB."""

    matmul_tflops: float | None = None
    """Dense bf16 peak of a GPU, TFLOP/s."""

    memory_gb_s: float | None = None
    """Memory bandwidth of a GPU, GB/s."""

    node_gb_s: float | None = None
    """One direction between GPUs of a node, GB/s a GPU."""

    network_gb_s: float | None = None
    """One direction between nodes, GB/s a GPU."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise UserError(f"--{field.name.replace('_', '-')} {value} must be above 0")


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Planning

    Lists the layouts that fit a cluster: memory and traffic of each GPU, and an estimate of the time of a step.
    Nothing is run. Tests compare memory and traffic with real runs. Times are estimates from hardware peaks and the
    share of them that training reaches (megatron_midus/planning/hardware.py).

    Examples:
      midus plan --hf-model Llama-3.1-8B --num-blocks 16 --memory-num-keys 512 --nodes 4 --gpus-per-node 8
      midus plan --load upscaled --nodes 1 --gpus-per-node 8 --gpu-memory-gib 40 --global-batch-size 256
    """

    hf_model: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """Base model, a directory or org/name[@revision] on the Hugging Face hub (its config.json is enough); the flags
    about inserted blocks describe the result."""

    load: str | None = dataclasses.field(default=None, metadata={"metavar": "DIR"})
    """Up-scaled checkpoint; its plan is read from it."""

    nodes: int = 1
    """Nodes."""

    gpus_per_node: int = 8
    """GPUs of a node."""

    hardware: Literal["a100", "h100", "h200", "b200"] = "h100"
    """Kind of GPU."""

    seq_length: int = 4096
    """Tokens of a sequence."""

    global_batch_size: int = 256
    """Sequences of a step."""

    max_micro_batch_size: int = 8
    """Largest micro-batch that is tried."""

    train: Literal["inserted", "all"] = "inserted"
    """What learns."""

    kl_to_base: float = 0.0
    """As in pretraining: count the base's forward pass and logits, and leave out layouts with several pipeline stages; any
    weight above 0 costs as much."""

    ema_decay: float | None = None
    """As in pretraining: count the moving average of the weights that learn; any decay takes as much."""

    l2_to_start: float = 0.0
    """As in pretraining: count the weights that the run began with; any coefficient above 0 takes as much."""

    fp32: bool = False
    """Weights and activations in fp32 instead of bf16."""

    make_vocab_size_divisible_by: int = 128
    """As in pretraining."""

    show: int = 8
    """Layouts in the table."""

    json: str | None = dataclasses.field(default=None, metadata={"metavar": "OUT"})
    """Write all layouts here as JSON."""

    figures: HardwareConfig = part(HardwareConfig)
    blocks: PolicyConfig = part(PolicyConfig)
    memory: dict[str, Any] = part(MemoryConfig, title=MEMORY_TITLE, given_only=True)

    @property
    def weight_copies(self) -> int:
        """Copies that the run keeps of what learns."""
        return (self.ema_decay is not None) + (self.l2_to_start > 0)

    def __post_init__(self) -> None:
        if (self.hf_model is None) == (self.load is None):
            raise UserError("give --hf-model DIR (a base and what it becomes) or --load DIR (an up-scaled checkpoint)")
        names = ("nodes", "gpus_per_node", "seq_length", "global_batch_size", "max_micro_batch_size", "show")
        check_at_least_one(self, *names, "make_vocab_size_divisible_by")
        check_ema_decay(self.ema_decay)
        if self.l2_to_start < 0:
            raise UserError(f"l2_to_start={self.l2_to_start} must not be negative")
        check_kl_weight(self.kl_to_base)
