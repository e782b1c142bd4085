"""ParallelConfig: how the model and its gradients are spread over processes, and how layers are computed."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Parallelism and kernels"""

    distributed_backend: Literal["nccl", "gloo"] = "nccl"
    """nccl = GPUs; gloo = processes on the CPU (refused where CUDA is available)."""

    distributed_timeout_minutes: float = 10.0
    """Minutes after which a collective that hangs ends the run."""

    tensor_model_parallel_size: int = 1
    """Processes that share the heads and channels of every layer."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages, each with a part of the layers."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per model chunk of the interleaved pipeline schedule; absent = not interleaved."""

    num_virtual_stages_per_pipeline_rank: int | None = None
    """Model chunks per pipeline stage; another way to give --num-layers-per-virtual-pipeline-stage."""

    pipeline_model_parallel_layout: str | None = dataclasses.field(
        default=None, metadata={"aliases": ("pipeline_layout",)}
    )
    """Which blocks go to which stage: E = embedding, t = a block, L = output layer and loss, | between stages (then
    between chunks), as in 'Ettt|(tt|)*2tL'; auto = the split whose slowest stage is fastest, by the cost of each
    block; absent = as many blocks on each stage."""

    decoder_first_pipeline_num_layers: int | None = None
    """Blocks of the first pipeline stage; the others share the rest evenly."""

    decoder_last_pipeline_num_layers: int | None = None
    """Blocks of the last pipeline stage; the others share the rest evenly."""

    context_parallel_size: int = 1
    """Processes that share a sequence (needs the Transformer Engine backend)."""

    expert_model_parallel_size: int = 1
    """Processes that share the experts of every block of a mixture; taken from those of data and tensor parallelism."""

    expert_tensor_parallel_size: int | None = None
    """Processes that share the channels of one expert; absent = --tensor-model-parallel-size."""

    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "allgather"
    """How tokens get to the processes of their experts: allgather = all of them to all; alltoall = only where they are sent,
    cheaper with many processes."""

    moe_grouped_gemm: bool = False
    """Compute all experts of a process in one kernel (needs Transformer Engine or the package grouped_gemm, on a GPU)."""

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
    installed, no --reset-attention-mask was given and the model caps no attention scores (Gemma 2), local otherwise."""

    memory_backend: Literal["auto", "reference", "torch", "numba", "triton"] = "auto"
    """Implementation of the head-wise memory look-up: reference = plain torch, the definition; torch = the fast path for
    CPUs; numba = the same with loops compiled for this CPU (pip install numba); triton = GPU kernels; auto = the fastest
    that can run, and the log says why the others cannot."""

    memory_value_placement: Literal["replicated", "latent", "auto"] = "replicated"
    """Under tensor parallelism: replicated = every process holds the value bank that the heads share; latent = split on
    its columns, for banks that do not fit or are cheaper to read than to sum; auto = whichever moves fewer bytes a
    step. Checkpoints are the same."""

    memory_deterministic: bool = True
    """Memory gradients that are equal bit by bit from run to run; otherwise Triton's kernels add with atomics."""

    memory_values_main_grad: bool = False
    """Add the gradient of memory values straight to Megatron's fp32 gradients, without a gradient of their own (needs
    the Triton backend; values that tensor parallelism replicates keep their own gradient)."""

    deterministic_mode: bool = False
    """Use deterministic kernels only: sets CUBLAS_WORKSPACE_CONFIG, NVTE_ALLOW_NONDETERMINISTIC_ALGO and NCCL_ALGO where the
    environment does not, and torch.use_deterministic_algorithms. See docs/recovery.md."""

    def __post_init__(self) -> None:
        if self.distributed_timeout_minutes <= 0:
            raise UserError(f"distributed_timeout_minutes={self.distributed_timeout_minutes} must be more than 0")
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        ):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError(
                "sequence_parallel=True splits over tensor-parallel processes and tensor_model_parallel_size=1; "
                "raise --tensor-model-parallel-size or leave --sequence-parallel out"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise UserError("overlap_param_gather needs --use-distributed-optimizer and --overlap-grad-reduce as well")
        if self.ddp_average_in_collective and self.distributed_backend == "gloo":
            raise UserError("ddp_average_in_collective needs NCCL; gloo has no averaging reduction")
        if self.deterministic_mode and not self.memory_deterministic:
            raise UserError("deterministic_mode needs deterministic memories too; leave --no-memory-deterministic out")
        self._check_pipeline()
        self._check_recompute()

    def _check_pipeline(self) -> None:
        per_chunk, chunks = self.num_layers_per_virtual_pipeline_stage, self.num_virtual_stages_per_pipeline_rank
        ends = (self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers)
        for name in (
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "pipeline_model_parallel_layout",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
        ):
            value = getattr(self, name)
            if value is not None and self.pipeline_model_parallel_size < 2:
                raise UserError(f"{name} needs --pipeline-model-parallel-size of at least 2")
            if isinstance(value, int) and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if per_chunk is not None and chunks is not None:
            raise UserError(
                f"num_layers_per_virtual_pipeline_stage={per_chunk} and num_virtual_stages_per_pipeline_rank={chunks} "
                "say the same in two ways; give one"
            )
        if (per_chunk or chunks) and not self.overlap_p2p_comm:
            # Batched transfers mix up the messages of the chunks of two stages and the loss is wrong without a word.
            raise UserError(
                "num_layers_per_virtual_pipeline_stage trains wrongly without overlapped transfers; "
                "leave --no-overlap-p2p-comm out"
            )
        if any(ends) and (per_chunk or chunks or self.pipeline_model_parallel_layout):
            raise UserError(
                f"decoder_first_pipeline_num_layers={ends[0]} and decoder_last_pipeline_num_layers={ends[1]} do not go "
                "with chunks or a layout; say it all with --pipeline-model-parallel-layout"
            )
        if per_chunk is not None and self.pipeline_model_parallel_layout is not None:
            raise UserError(
                f"num_layers_per_virtual_pipeline_stage={per_chunk} makes even chunks, which "
                f"pipeline_model_parallel_layout={self.pipeline_model_parallel_layout} does not; give "
                "--num-virtual-stages-per-pipeline-rank instead"
            )

    def _check_recompute(self) -> None:
        if self.recompute_granularity != "full":
            if self.recompute_method or self.recompute_num_layers:
                raise UserError(
                    f"recompute_method={self.recompute_method} and recompute_num_layers={self.recompute_num_layers} "
                    "are settings of --recompute-granularity full"
                )
            return
        if self.recompute_method is None or self.recompute_num_layers is None:
            raise UserError(
                "recompute_granularity=full needs --recompute-method and --recompute-num-layers, "
                "for instance uniform and 1"
            )
        if self.recompute_num_layers < 1:
            raise UserError(f"recompute_num_layers={self.recompute_num_layers} must be at least 1")
