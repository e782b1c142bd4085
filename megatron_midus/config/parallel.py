"""ParallelConfig: how the model and its gradients are spread over processes, and how layers are computed."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Parallelism and kernels"""

    distributed_backend: Literal["nccl", "gloo"] = "nccl"
    """nccl = GPUs; gloo = processes on the CPU (refused where CUDA is available)."""

    distributed_timeout_minutes: float = 10
    """Minutes after which a collective that hangs ends the run."""

    tensor_model_parallel_size: int = 1
    """Processes that share the heads and channels of every layer."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages, each with a part of the layers."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per model chunk of the interleaved pipeline schedule; absent = not interleaved."""

    context_parallel_size: int = 1
    """Processes that share a sequence (needs the Transformer Engine backend)."""

    sequence_parallel: bool = False
    """Split activations between layers along the sequence over the tensor-parallel processes."""

    use_distributed_optimizer: bool = False
    """Split optimizer state and master weights over the data-parallel processes."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs (needs --use-distributed-optimizer and
    --overlap-grad-reduce)."""

    accumulate_allreduce_grads_in_fp32: bool = True
    """Accumulate and reduce gradients in float32 whatever the compute precision is."""

    ddp_bucket_size: int | None = None
    """Parameters per gradient bucket; Megatron-Core's default when absent."""

    ddp_average_in_collective: bool = False
    """Let the collective average gradients instead of scaling them before a sum (NCCL only)."""

    overlap_p2p_comm: bool = True
    """Overlap the transfers between pipeline stages with computation under the interleaved schedule."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: full = whole layers, selective = core attention only."""

    recompute_method: Literal["uniform", "block"] | None = None
    """full recompute: uniform = groups of --recompute-num-layers, block = only the first --recompute-num-layers."""

    recompute_num_layers: int | None = None
    """Layers per group (uniform) or layers recomputed (block) of each stage."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation: local = plain torch; transformer_engine; auto = Transformer Engine on a GPU when it is
    installed, local otherwise."""

    memory_backend: Literal["auto", "reference", "torch", "triton"] = "auto"
    """Implementation of the head-wise memory look-up."""

    deterministic_mode: bool = False
    """Use deterministic kernels only: sets CUBLAS_WORKSPACE_CONFIG, NVTE_ALLOW_NONDETERMINISTIC_ALGO and NCCL_ALGO where the
    environment does not, and torch.use_deterministic_algorithms. See docs/recovery.md."""

    def __post_init__(self) -> None:
        if self.distributed_timeout_minutes <= 0:
            raise ValueError(f"distributed_timeout_minutes={self.distributed_timeout_minutes} must be more than 0")
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "sequence_parallel=True splits over tensor-parallel processes and tensor_model_parallel_size=1; "
                "raise --tensor-model-parallel-size or leave --sequence-parallel out"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs --use-distributed-optimizer and --overlap-grad-reduce as well")
        if self.ddp_average_in_collective and self.distributed_backend == "gloo":
            raise ValueError("ddp_average_in_collective needs NCCL; gloo has no averaging reduction")
        self._check_pipeline()
        self._check_recompute()

    def _check_pipeline(self) -> None:
        if self.num_layers_per_virtual_pipeline_stage is None:
            return
        if self.num_layers_per_virtual_pipeline_stage < 1:
            raise ValueError(
                f"num_layers_per_virtual_pipeline_stage={self.num_layers_per_virtual_pipeline_stage} must be at least 1"
            )
        if self.pipeline_model_parallel_size < 2:
            raise ValueError("num_layers_per_virtual_pipeline_stage needs --pipeline-model-parallel-size of at least 2")
        if not self.overlap_p2p_comm:
            # Batched transfers mix up the messages of the chunks of two stages and the loss is wrong without a word.
            raise ValueError(
                "num_layers_per_virtual_pipeline_stage trains wrongly without overlapped transfers; "
                "leave --no-overlap-p2p-comm out"
            )

    def _check_recompute(self) -> None:
        if self.recompute_granularity != "full":
            if self.recompute_method or self.recompute_num_layers:
                raise ValueError(
                    f"recompute_method={self.recompute_method} and recompute_num_layers={self.recompute_num_layers} "
                    "are settings of --recompute-granularity full"
                )
            return
        if self.recompute_method is None or self.recompute_num_layers is None:
            raise ValueError(
                "recompute_granularity=full needs --recompute-method and --recompute-num-layers, "
                "for instance uniform and 1"
            )
        if self.recompute_num_layers < 1:
            raise ValueError(f"recompute_num_layers={self.recompute_num_layers} must be at least 1")
