"""ParallelLayout and Workload: how processes share a model, and what they do in one step."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.errors import UserError
from megatron_midus.upscaling.cost import Train
from megatron_midus.upscaling.plan import UpscalePlan


@dataclasses.dataclass(frozen=True)
class Workload:
    """One optimizer step.

    Attributes:
        seq_length: tokens of a sequence.
        micro_batch_size: sequences of one forward pass.
        global_batch_size: sequences of a step, over all replicas.
        itemsize: bytes of an activation and of a weight: 2 (bf16, with fp32 master weights) or 4.
        train: which blocks learn.
        weight_copies: that the run keeps of what learns: one of ``--ema-decay``, one of ``--l2-to-start``.
        kl_to_base: whether the base has a forward pass of its own before each of the model (``--kl-to-base``).
    """

    seq_length: int
    micro_batch_size: int = 1
    global_batch_size: int = 1
    itemsize: int = 2
    train: Train = "inserted"
    weight_copies: int = 0
    kl_to_base: bool = False

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.seq_length * self.micro_batch_size

    def num_microbatches(self, data_parallel: int) -> int:
        """Micro-batches of one replica in a step.

        Raises:
            ValueError: a batch that the replicas cannot share evenly.
        """
        one = self.micro_batch_size * data_parallel
        if self.global_batch_size % one:
            raise UserError(
                f"global_batch_size={self.global_batch_size} is not divisible by micro_batch_size="
                f"{self.micro_batch_size} times {data_parallel} replicas"
            )
        return self.global_batch_size // one

    def trained(self, plan: UpscalePlan) -> list[bool]:
        """Which blocks learn."""
        return [block.learns(self.train) for block in plan.blocks]

    def base_pass(self, plan: UpscalePlan) -> tuple[int, ...]:
        """Blocks of the base's own forward pass; none without ``kl_to_base``."""
        return plan.kept_indices if self.kl_to_base else ()

    def gradient(self, plan: UpscalePlan, layout: ParallelLayout) -> list[Literal["none", "starts", "passes"]]:
        """What the backward pass does in each block: nothing, begins there, or goes through to the one below.

        Below the first block that learns nothing has to be kept. But what a pipeline stage receives is always asked for
        its gradient, so only the first part of the first stage is spared.
        """
        trained = self.trained(plan)
        first_part = 0
        while first_part < plan.num_layers and layout.is_with_next(first_part):
            first_part += 1
        first = min(trained.index(True) if True in trained else plan.num_layers, first_part + 1)
        if not any(trained):
            return ["none"] * plan.num_layers
        starts = self.train != "all" and first <= first_part
        return [
            "none" if i < first else "starts" if i == first and starts else "passes" for i in range(plan.num_layers)
        ]


@dataclasses.dataclass(frozen=True)
class ParallelLayout:
    """How processes share a model.

    Attributes:
        tensor, pipeline, data: sizes of the three axes; their product is the number of processes.
        expert, expert_tensor: processes that share the experts of a block, and those that share the channels of one
            expert (``None`` = as ``tensor``). They are taken from tensor and data axis, and what is left are replicas.
        all_to_all: whether tokens go only where their experts are instead of everywhere (``--moe-token-dispatcher-type``).
        stages: indices of the blocks on each pipeline stage, those of all its model chunks.
        chunks: model chunks of a stage (interleaved schedule).
        sequence_parallel, distributed_optimizer: as Megatron's flags.
        recompute: whether each layer is computed again in the backward pass (``--recompute-granularity full``).
        latent_values: whether tensor-parallel ranks share the value banks by columns instead of each holding them.
    """

    stages: tuple[tuple[int, ...], ...]
    tensor: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    all_to_all: bool = False
    chunks: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: bool = False
    latent_values: bool = False

    @property
    def pipeline(self) -> int:
        return len(self.stages)

    @property
    def expert_channels(self) -> int:
        """Processes that share the channels of one expert."""
        return self.expert_tensor or self.tensor

    @property
    def expert_group(self) -> int:
        """Processes that exchange tokens with each other."""
        return self.expert * self.expert_channels

    @property
    def expert_data(self) -> int:
        """Replicas of an expert."""
        return self.tensor * self.data // self.expert_group

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def is_with_next(self, index: int) -> bool:
        """Whether block ``index`` and the next are on one stage, one behind the other."""
        stage = next(blocks for blocks in self.stages if index in blocks)
        position = stage.index(index)
        # Chunks of a stage never touch unless there is only one stage.
        return position + 1 < len(stage) and stage[position + 1] == index + 1

    def in_flight(self, stage: int, num_microbatches: int) -> float:
        """Micro-batches whose activations a stage holds at once, one forward one backward.

        In the interleaved schedule the warm-up is counted in chunks: two per stage that follows, and a whole round for
        each further chunk; the result is in micro-batches of the whole stage.
        """
        if self.pipeline == 1:
            return 1.0
        if self.chunks == 1:
            return float(min(num_microbatches, self.pipeline - stage))
        warm_up = 2 * (self.pipeline - stage - 1) + (self.chunks - 1) * self.pipeline + 1
        return min(warm_up, num_microbatches * self.chunks) / self.chunks
