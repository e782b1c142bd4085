"""What a run says about itself before it starts: model, layout, what learns, and at which rate."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer

from megatron_midus.platform import transformer_engine_available
from megatron_midus.training.architecture import Architecture
from megatron_midus.training.arguments import Arguments
from megatron_midus.training.checkpoint.source import Source
from megatron_midus.training.checks import RunSizes
from megatron_midus.upscaling.cost import total_parameters, trainable_parameters


def describe_run(arguments: Arguments, architecture: Architecture, sizes: RunSizes, source: Source) -> str:
    """A few lines: where the weights come from, the blocks, the parameters, the processes and batches."""
    model, plan = architecture.model, architecture.plan
    total = total_parameters(model, plan)
    trained = trainable_parameters(model, plan, architecture.train, lora_rank=arguments.training.lora_rank)
    precision = "bf16" if arguments.training.bf16 else "fp16" if arguments.training.fp16 else "fp32"
    parallel = arguments.parallel
    micro_batch_size = arguments.training.micro_batch_size
    lines = [
        f"weights: {source.directory if source.directory is not None else 'fresh'}",
        f"model: {plan.num_layers} blocks ({describe_blocks(architecture)}), hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads in {model.num_query_groups} groups of {model.kv_channels} channels, "
        f"vocabulary {model.vocab_size}",
        f"parameters: {total:,} in total, {trained:,} trainable ({100 * trained / total:.1f} %, "
        f"--train {architecture.train})",
        f"processes: {sizes.world_size} = tensor {parallel.tensor_model_parallel_size} * pipeline "
        f"{parallel.pipeline_model_parallel_size} * context {parallel.context_parallel_size} * data "
        f"{sizes.data_parallel_size}{', sequence parallel' if parallel.sequence_parallel else ''}"
        f"{', distributed optimizer' if parallel.use_distributed_optimizer else ''}, {precision}, "
        f"{parallel.distributed_backend}",
        f"batch: {sizes.global_batch_size} samples of {arguments.data.seq_length} tokens "
        f"({max(1, sizes.num_microbatches(micro_batch_size))} micro-batches of {micro_batch_size})",
    ]
    if model.num_moe_experts is not None:
        lines += describe_experts(arguments, architecture)
    if parallel.pipeline_model_parallel_layout is not None:
        lines.append(f"pipeline: {parallel.pipeline_model_parallel_layout}")
    lines += [f"note: {note}" for note in plan.notes]
    if missing := missing_engine(arguments.parallel.distributed_backend):
        lines.append(missing)
    return "\n".join(lines)


def describe_experts(arguments: Arguments, architecture: Architecture) -> list[str]:
    """What the experts are and where, and which routers a load-balancing loss moves."""
    model, parallel = architecture.model, arguments.parallel
    mixtures, learning = learning_mixtures(architecture)
    coeff = arguments.training.moe_aux_loss_coeff
    coeff = model.moe_aux_loss_coeff if coeff is None else coeff
    frozen = len(mixtures) - len(learning)
    said = [f"{frozen} routers are frozen: no gradient, no load-balancing loss"] if frozen else []
    if learning:
        said.append(f"{len(learning)} routers learn, load-balancing loss * {coeff:g}")
    shared = parallel.expert_model_parallel_size
    return [
        f"experts: {model.num_moe_experts} of {model.expert_ffn_hidden_size} channels in each of {len(mixtures)} blocks, "
        f"{model.moe_router_topk} per token, shared by {shared} {'process' if shared == 1 else 'processes'}",
        f"routers: {'; '.join(said)}",
    ]


def learning_mixtures(architecture: Architecture) -> tuple[list[int], list[int]]:
    """0-based positions of the mixtures of experts, and of those whose router learns."""
    blocks = architecture.plan.blocks
    mixtures = [index for index, block in enumerate(blocks) if block.kind != "memory"]
    inserted = [index for index in mixtures if blocks[index].inserted]
    return mixtures, {"all": mixtures, "inserted": inserted}.get(architecture.train, [])


def missing_engine(distributed_backend: str) -> str:
    """What training on GPUs without Transformer Engine costs; empty where it is there, and on CPUs."""
    if distributed_backend == "gloo" or transformer_engine_available():
        return ""
    return (
        "WARNING: Transformer Engine is not installed: layers of plain torch are slower and keep more activations, and there is "
        "no context parallelism and no FP8; pip install 'megatron-midus[gpu]' (needs nvcc), or use the image of the Dockerfile"
    )


def describe_blocks(architecture: Architecture) -> str:
    """``6 base, 3 memory after 1, 3, 5`` …: kinds, counts and where the inserted ones are."""
    plan = architecture.plan
    inserted = plan.inserted_indices
    memories = sum(not plan.blocks[i].inserted for i in plan.kept_memory_indices)
    kept = f"{plan.num_layers - len(inserted)} base" + (f" ({memories} of them memory)" if memories else "")
    if not inserted:
        return kept
    kinds = sorted({plan.blocks[i].kind for i in inserted} - {"keep"}) or ["trained"]
    positions = ", ".join(map(str, inserted))
    return f"{kept}, {len(inserted)} {'/'.join(kinds)} at {positions}"


def describe_groups(optimizer: MegatronOptimizer) -> str:
    """One line per parameter group: how many tensors, which learning rate, which weight decay."""
    lines = []
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        name = "memory values" if group.get("is_memory_values") else "matrices" if group["wd_mult"] else "norms, biases"
        elements = sum(p.numel() for p in group["params"])
        lines.append(
            f"group {name}: {len(group['params'])} tensors, {elements:,} elements on this rank, max lr "
            f"{group['max_lr']:g}, min lr {group['min_lr']:g}, weight decay {group['weight_decay']:g}"
        )
    return "\n".join(lines) or "no trainable parameters on this rank"
