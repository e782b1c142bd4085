"""What the processes of the distributed tests do: build the tiny model at some layout, train it, look at it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.data import get_batch
from megatron_midus.memory import MemoryRuntime
from megatron_midus.model.builder import build_model, freeze, make_transformer_config
from megatron_midus.model.checkpoint import load_weights, save_weights, sharded_state_dict
from megatron_midus.training.replicas import check_replicas
from megatron_midus.upscaling import UpscalePlan, make_plan

SEQUENCE, MICRO_BATCH, GLOBAL_BATCH = 12, 2, 4
VOCABULARY = 37  # odd: padded under TP


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the processes share the model."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sp: bool = False
    dp: int = 1
    ep: int = 1
    etp: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


@dataclasses.dataclass(frozen=True)
class Setting:
    """Which model is built, and how it is trained."""

    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy: str = "interleave"
    train: str = "all"
    distributed_optimizer: bool = False
    steps: int = 4
    zero_values: bool = False
    transformer_impl: str = "local"
    value_placement: str = "replicated"
    insert_after: tuple[int, ...] = (1, 3)
    kl_to_base: bool = False


def model_config(num_layers: int, **changes: Any) -> ModelConfig:
    values = {
        "num_layers": num_layers,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 10,  # not hidden_size / heads
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**values, **changes})


def make_setting_plan(setting: Setting) -> UpscalePlan:
    if setting.policy == "none":
        return make_plan("none", num_layers=4)
    memory = MemoryConfig(**{"memory_num_keys": 9, "memory_topk": 3, "memory_latent_size": 7, **setting.memory})
    memory = memory if setting.policy == "interleave" else None
    return make_plan(setting.policy, num_layers=4, insert_after=setting.insert_after, memory=memory)


_layout: Layout | None = None  # of this process; every process group of Gloo costs a thread for good


def initialize_parallel(layout: Layout) -> None:
    global _layout
    if _layout is None:
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,
        )
        _layout = layout
    assert layout == _layout, "one layout a launch"
    tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)


def build(setting: Setting, layout: Layout) -> tuple[list[torch.nn.Module], UpscalePlan]:
    """This rank's chunks of the model, with weights that do not depend on the layout."""
    initialize_parallel(layout)
    plan = make_setting_plan(setting)
    model = model_config(plan.num_layers, **setting.model)
    config = make_transformer_config(
        model,
        plan,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        sequence_parallel=layout.sp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        **setting.config,
    )
    chunks = [
        build_model(
            config,
            model=model,
            plan=plan,
            sequence_length=SEQUENCE,
            transformer_impl=setting.transformer_impl,
            memory_runtime=MemoryRuntime(value_placement=setting.value_placement),
            vp_stage=stage if layout.vpp else None,
        )
        for stage in range(layout.vpp or 1)
    ]
    fill_with_random_numbers(chunks, plan, zero_values=setting.zero_values)
    return chunks, plan


def local_tensors(chunks: list[torch.nn.Module]) -> list[ShardedTensor]:
    state = sharded_state_dict(chunks)
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def fill_with_random_numbers(chunks: list[torch.nn.Module], plan: UpscalePlan, *, zero_values: bool = False) -> None:
    """Every weight becomes its part of a random tensor that depends on its name alone.

    Layers that the plan keeps are named by their place in the base, so up-scaled models and their base agree.
    """
    for tensor in local_tensors(chunks):
        # Padding rows of the vocabulary are not part of the model; one height for all layouts makes rows agree.
        shape = (64, *tensor.global_shape[1:]) if _is_vocabulary(tensor.key) else tensor.global_shape
        whole = torch.randn(shape, generator=generator(_base_name(tensor.key, plan))) * 0.2
        if "norm" in tensor.key:
            whole = 1 + whole
        elif zero_values and tensor.key.endswith("linear_proj.values"):
            whole = torch.zeros_like(whole)
        with torch.no_grad():
            tensor.data.copy_(whole[_part(tensor)])


def _base_name(key: str, plan: UpscalePlan) -> str:
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", key)
    if match is None:
        return key
    block = plan.blocks[int(match.group(1))]
    return f"base.{block.source[0]}.{match.group(2)}" if block.kind == "keep" else key


def weights(chunks: list[torch.nn.Module]) -> list[tuple[str, tuple, torch.Tensor]]:
    """``(checkpoint key, global shape, part, values)`` of every tensor that this rank holds."""
    return [(t.key, tuple(t.global_shape), _part(t), t.data.detach().float().clone()) for t in local_tensors(chunks)]


def assemble(parts_of_ranks: list[list]) -> dict[str, torch.Tensor]:
    """Whole tensors from what ``weights`` returned on every rank; copies of one part must be equal bit by bit."""
    whole: dict[str, torch.Tensor] = {}
    for parts in parts_of_ranks:
        for key, shape, part, values in parts:
            target = whole.setdefault(key, torch.full(shape, torch.nan))
            old = target[part]
            assert bool((old.isnan() | (old == values)).all()), f"{key} differs between ranks"
            target[part] = values
    for key, tensor in whole.items():
        assert not tensor.isnan().any(), f"{key} is incomplete"
        if _is_vocabulary(key):
            whole[key] = tensor[:VOCABULARY]
    return whole


def _is_vocabulary(key: str) -> bool:
    return "embedding" in key or "output_layer" in key


def _part(tensor: ShardedTensor) -> tuple[int | slice, ...]:
    """Where a tensor lies in the whole one; an expert is one row of an axis that it does not have itself."""
    stacked = tensor.prepend_axis_num
    sizes = zip(tensor.global_offset[stacked:], tensor.local_shape)
    return (*tensor.global_offset[:stacked], *(slice(start, start + size) for start, size in sizes))


def generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little"))


# -- data and forward passes -----------------------------------------------------------------------------------------
def global_batch(step: int) -> torch.Tensor:
    """``[GLOBAL_BATCH, SEQUENCE + 1]`` tokens, the same on every rank."""
    return torch.randint(VOCABULARY, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator(f"batch {step}"))


def micro_batches(step: int) -> list[torch.Tensor]:
    """Those micro-batches of a step's batch that this data-parallel rank takes."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return list(global_batch(step).split(MICRO_BATCH))[rank::size]


def _forward_step(iterator: Any, model: torch.nn.Module, *, logits: bool) -> tuple:
    batch = next(iterator)
    tokens, labels = batch[:, :-1], batch[:, 1:]
    positions = torch.arange(SEQUENCE)[None].expand_as(tokens)
    output = model(tokens, positions, None, labels=None if logits else labels)
    return output, _gather_logits if logits else _mean_loss


def _mean_loss(losses: torch.Tensor) -> tuple:
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}


def _gather_logits(output: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
    assert non_loss_data
    whole = tensor_parallel.gather_from_tensor_model_parallel_region(output)
    return whole[..., :VOCABULARY].detach().float()


def run_schedule(chunks: list[torch.nn.Module], step: int, *, logits: bool) -> list:
    batches = micro_batches(step)
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, logits=logits),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=logits,
        collect_non_loss_data=logits,
    )


def logits_of(setting: Setting, layout: Layout) -> torch.Tensor | None:
    """``[micro-batches, s, b, v]`` on ranks of the last stage."""
    chunks, _ = build(setting, layout)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        found = run_schedule(chunks, 0, logits=True)
    return torch.stack(found) if found else None


# -- packed documents ------------------------------------------------------------------------------------------------
EOD = VOCABULARY - 1
# A document of 5 tokens and one of 7, their ends included: first, another one first, and the second alone in front.
SECOND = [9, 3, 17, 5, 30, 2, EOD]
PACKED = [[11, 4, 8, 25, EOD, *SECOND], [7, 7, 1, 33, EOD, *SECOND], [*SECOND, 11, 4, 8, 25, EOD]]


def _packed_step(iterator: Any, model: torch.nn.Module, *, separate: bool) -> tuple:
    stage = {"ignore_virtual": False, "vp_stage": model.vp_stage}
    batch = get_batch(
        iterator,
        micro_batch_size=len(PACKED),
        seq_length=SEQUENCE,
        is_first_stage=parallel_state.is_pipeline_first_stage(**stage),
        is_last_stage=parallel_state.is_pipeline_last_stage(**stage),
        device="cpu",
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        reset_attention_mask=separate,
        eod=EOD,
    )
    return model(batch["tokens"], batch["position_ids"], batch["attention_mask"]), _gather_logits


def packed_logits(setting: Setting, layout: Layout, separate: bool) -> torch.Tensor | None:
    """``[b, s, v]`` of ``PACKED`` on ranks of the last stage, with documents kept ``separate`` or not."""
    chunks, _ = build(setting, layout)
    tokens = torch.tensor(PACKED)
    names = ("tokens", "position_ids", "labels", "loss_mask")
    (chunk,) = chunks
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=partial(_packed_step, separate=separate),
            data_iterator=iter([dict.fromkeys(names, tokens)]),
            model=chunk.eval(),
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=len(PACKED),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found[0] if found else None


def packed_and_plain(layout: Layout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return packed_logits(Setting(), layout, True), packed_logits(Setting(), layout, False)


# -- training --------------------------------------------------------------------------------------------------------
def wrap(chunks: list[torch.nn.Module], plan: UpscalePlan, setting: Setting) -> tuple[list, Any]:
    freeze(chunks, plan, setting.train)
    config = chunks[0].config
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=setting.distributed_optimizer, grad_reduce_in_fp32=True, overlap_grad_reduce=False
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    config.finalize_model_grads_func = finalize_model_grads
    # eps 1e-3: with 1e-8 Adam turns rounding of near-zero gradients into whole steps.
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=3e-3,
            min_lr=3e-3,
            weight_decay=0.01,
            adam_eps=1e-3,
            clip_grad=1.0,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=setting.distributed_optimizer,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def train_step(chunks: list, optimizer: Any, step: int) -> tuple[float, float]:
    """``(loss, gradient norm)``, the loss averaged over the batch and known to every rank."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = run_schedule(chunks, step, logits=False)
    succeeded, grad_norm, _ = optimizer.step()
    assert succeeded
    total = torch.stack([entry["loss"] for entry in losses]).sum() if losses else torch.zeros(())
    torch.distributed.all_reduce(total)
    copies = parallel_state.get_tensor_model_parallel_world_size()
    return float(total) / copies / (GLOBAL_BATCH // MICRO_BATCH), float(grad_norm)


def train(setting: Setting, layout: Layout) -> dict[str, Any]:
    """Trains for ``setting.steps``: ``curve`` of (loss, gradient norm), ``weights`` afterwards."""
    chunks, plan = build(setting, layout)
    start = weights(chunks)
    wrapped, optimizer = wrap(chunks, plan, setting)
    for chunk in wrapped:
        chunk.train()
    curve = [train_step(wrapped, optimizer, step) for step in range(setting.steps)]
    return {
        "curve": curve,
        "start": start,
        "weights": weights(chunks),
        "trainable": trainable_keys(chunks, plan, setting),
    }


def trainable_keys(chunks: list[torch.nn.Module], plan: UpscalePlan, setting: Setting) -> list[str]:
    """Checkpoint keys that training may move, from the plan alone: what was measured when up-scaling it may not."""
    keys = {tensor.key for tensor in local_tensors(chunks) if "domain_gate" not in tensor.key}
    if setting.train == "all":
        return sorted(keys)
    inserted = tuple(f"decoder.layers.{index}." for index in plan.inserted_indices)
    return sorted(key for key in keys if key.startswith(inserted))


def compare_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        # Weights are of order 0.2 to 1 and move by 0.03 in 10 steps; measured 1e-7 to 1e-6.
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def train_all(settings: dict[str, Setting], layout: Layout) -> dict[str, Any]:
    return {
        name: {**train(setting, layout), "logits": logits_of(setting, layout)} for name, setting in settings.items()
    }


def many_logits(settings: list[Setting], layout: Layout) -> list[torch.Tensor | None]:
    return [logits_of(setting, layout) for setting in settings]


# -- checkpoints -----------------------------------------------------------------------------------------------------
def save(setting: Setting, layout: Layout, directory: Path) -> list[tuple]:
    chunks, _ = build(setting, layout)
    save_weights(chunks, directory)
    return weights(chunks)


def load(setting: Setting, layout: Layout, directory: Path) -> list[tuple]:
    chunks, _ = build(setting, layout)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)
    load_weights(chunks, directory)
    return weights(chunks)


def train_in_two_parts(setting: Setting, layout: Layout, first: int, directory: Path) -> dict[str, Any]:
    """``train``, with everything thrown away and read back after ``first`` steps."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    chunks, plan = build(setting, layout)
    wrapped, optimizer = wrap(chunks, plan, setting)
    curve = [train_step(wrapped, optimizer, step) for step in range(first)]
    model_state = sharded_state_dict(chunks)
    state = {**model_state, "optimizer": optimizer.sharded_state_dict(model_state["model"], metadata=metadata)}
    dist_checkpointing.save(state, str(directory))

    chunks, plan = build(setting, layout)
    wrapped, optimizer = wrap(chunks, plan, setting)
    load_weights(chunks, directory)
    model_state = sharded_state_dict(chunks)
    state = {"optimizer": optimizer.sharded_state_dict(model_state["model"], is_loading=True, metadata=metadata)}
    optimizer.load_state_dict(dist_checkpointing.load(state, str(directory))["optimizer"])
    curve += [train_step(wrapped, optimizer, step) for step in range(first, setting.steps)]
    return {"curve": curve, "weights": weights(chunks)}


# -- replicas --------------------------------------------------------------------------------------------------------
def damaged_replicas(layout: Layout, names: list[str]) -> list[str | None]:
    """What ``check_replicas`` says of whole weights (``None``), then with one bit of each of ``names`` flipped on rank 1."""
    chunks, _ = build(Setting(), layout)
    parameters = dict(chunks[0].named_parameters())
    said: list[str | None] = [_replica_error(chunks)]
    for name in names:
        first = parameters[name].data.view(-1)[:1].view(torch.int32)
        flip = 1 if torch.distributed.get_rank() == 1 else 0
        first.bitwise_xor_(torch.tensor(flip, dtype=torch.int32))
        said.append(_replica_error(chunks))
        first.bitwise_xor_(torch.tensor(flip, dtype=torch.int32))
    return said


def _replica_error(chunks: list[torch.nn.Module]) -> str | None:
    try:
        check_replicas(chunks, iteration=7)
    except ValueError as error:
        return str(error)
    return None
