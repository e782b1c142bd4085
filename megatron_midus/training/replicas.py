"""Are weights that should be copies of each other still equal? Bit by bit, over data and tensor parallelism.

A difference never heals: it is a broken device, a missed collective, or a bug, and the gradients that follow average over
different models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from megatron.core import parallel_state

from megatron_midus.errors import UserError


def check_replicas(model_chunks: Sequence[torch.nn.Module], iteration: int) -> None:
    """Compares hashes of all parameters. Collective; copies every weight to the CPU, so not for every step.

    Raises:
        ValueError: on all ranks, when a parameter differs from its copy on another data-parallel rank, or one that
            tensor parallelism does not divide (norms, the values of a memory) from its copy on another such rank.
    """
    parameters = {
        f"chunk {index}, {name}" if len(model_chunks) > 1 else name: parameter
        for index, chunk in enumerate(model_chunks)
        for name, parameter in chunk.named_parameters()
    }
    hashes = {name: _hash(parameter) for name, parameter in parameters.items()}
    different = []
    for group, is_in in (
        (parallel_state.get_data_parallel_group(with_context_parallel=True), lambda p: not is_of_expert(p)),
        (parallel_state.get_tensor_model_parallel_group(), lambda p: not _is_divided(p) and not is_of_expert(p)),
        # Experts have replicas of their own: other ranks of these groups may hold others.
        (parallel_state.get_expert_data_parallel_group(), is_of_expert),
    ):
        different += _different({name: hashes[name] for name, p in parameters.items() if is_in(p)}, group)
    of_all: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(of_all, different)
    found = [f"rank {rank}: {name}" for rank, names in enumerate(of_all) for name in names]
    if found:
        raise UserError(
            f"after iteration {iteration} weights differ between replicas ({len(found)} in all: "
            f"{'; '.join(found[:4])}); resume from the last checkpoint, and check the devices if it happens again"
        )


def is_of_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether it belongs to an expert, which only some ranks hold."""
    return not getattr(parameter, "allreduce", True)


def _is_divided(parameter: torch.nn.Parameter) -> bool:
    """Whether tensor-parallel ranks hold different parts of it."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _hash(parameter: torch.nn.Parameter) -> str:
    content = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy()).hexdigest()


def _different(hashes: dict[str, str], group: torch.distributed.ProcessGroup) -> list[str]:
    """Names whose hash is another one than on the first rank of the group."""
    if group.size() == 1:
        return []
    of_group: list[dict[str, str]] = [{} for _ in range(group.size())]
    torch.distributed.all_gather_object(of_group, hashes, group=group)
    return [name for name, digest in hashes.items() if digest != of_group[0].get(name)]
