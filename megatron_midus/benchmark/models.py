"""Models of a shape for the sub-commands layer and train, made by the code that trains: base, copied blocks, Memory blocks."""

from __future__ import annotations

import atexit
import logging

import torch

from megatron_midus import platform
from megatron_midus.benchmark.contenders import find_contenders
from megatron_midus.benchmark.parity import Check, require_parity
from megatron_midus.benchmark.settings import LayerSettings
from megatron_midus.benchmark.shapes import MEMORY_SETTINGS, Shape
from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.config.parallel import ParallelConfig
from megatron_midus.training.build import initialize_model_parallel
from megatron_midus.upscaling import UpscalePlan, make_plan

POLICIES = {
    "base": "none",
    "copied": "llama_pro",
    "memory": "interleave",
    "watched": "interleave",
    "token": "interleave",
}


def start_process(device: str, seed: int) -> None:
    """One process with the process groups that Megatron-Core wants, of itself alone."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    if not torch.distributed.is_initialized():
        atexit.register(_leave_process_groups)
    platform.initialize_distributed("nccl" if device == "cuda" else "gloo")
    initialize_model_parallel(ParallelConfig(distributed_backend="nccl" if device == "cuda" else "gloo"), seed, 1)


def _leave_process_groups() -> None:
    """NCCL warns where a process ends without."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_memory(shape: Shape, settings: LayerSettings, device: str) -> list[Check]:
    """Parity of the look-up that the Memory blocks of this shape will use; raises where it fails or cannot run."""
    backends = None if settings.backend == "auto" else [settings.backend]
    contenders, _ = find_contenders(shape, backends=backends, baselines=[], device=device)
    chosen = [c for c in contenders if c.name == contenders[0].name]  # auto takes the first that can run
    return require_parity(chosen, shape, device=device, seed=settings.seed)


def make_shape_plan(shape: Shape, variant: str, *, num_layers: int, num_blocks: int) -> UpscalePlan:
    """The plan of a variant: ``base``, ``copied``, ``memory`` and ``watched``, which are built alike, or ``token``."""
    memory = MemoryConfig(
        memory_num_keys=shape.num_keys,
        memory_topk=shape.topk,
        memory_latent_size=shape.latent_size,
        **MEMORY_SETTINGS.get(variant, {}),
    )
    return make_plan(
        POLICIES[variant],
        num_layers=num_layers,
        num_blocks=None if variant == "base" else num_blocks,
        memory=memory if POLICIES[variant] == "interleave" else None,
    )


def make_model_config(shape: Shape, num_layers: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_groups,
        kv_channels=shape.kv_channels,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.seq_length,
    )


@torch.no_grad()
def fill_values(model: torch.nn.Module) -> None:
    """Random value banks: at their initial zero the gradients of keys and queries are zero."""
    for parameter in model.parameters():
        if getattr(parameter, "is_memory_value", False):
            parameter.normal_(std=0.02)
