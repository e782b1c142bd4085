"""Optimizer state from a checkpoint into any of Megatron-Core's optimizers, whichever of them wrote it.

All of them store the moments and the fp32 master weights as one tensor per parameter, under the parameter's own key and of
its global shape. They differ in where they keep what is not a tensor, and in the name of master weights: ``param`` in a
distributed optimizer, ``fp32_param`` in one of a 16-bit model, and none in one of an fp32 model, whose weights are their own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_midus.megatron_compat import load_checkpoint

# What a master weight may be called, the weight itself last: it is exact where no other name was stored.
_MASTER_WEIGHTS = ("optimizer.state.param.", "optimizer.state.fp32_param.", "")
# What says which parameters a group holds. By Megatron-Core's own ``param_group_identifier_keys`` later releases tell groups
# apart by their learning rates as well, which a run that goes on may change.
GROUP_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def optimizer_metadata() -> dict[str, Any]:
    """How Megatron-Core is to lay optimizer state out: so that any layout of processes can read it.

    The value that Megatron-Core assumes when the key is absent does not load.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def stored_groups(common: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups of a checkpoint's common state, without parameters."""
    return [group for part in _stored_parts(common) for group in part.get("optimizer", part)["param_groups"]]


def _stored_parts(common: dict[str, Any]) -> list[dict[str, Any]]:
    """One optimizer, or, where experts learn as well, theirs beside the others'."""
    stored = common["optimizer"]
    return [stored[number] for number in sorted(stored)] if all(isinstance(key, int) for key in stored) else [stored]


def load_optimizer_state(
    directory: Path, common: dict[str, Any], model_state: dict[str, Any], optimizer: MegatronOptimizer
) -> None:
    """Restores moments, master weights and settings of the groups. Collective over all ranks.

    Args:
        directory: an ``iter_*`` directory.
        common: its common state.
        model_state: the model's sharded state dict.
        optimizer: of the same parameters, in groups of the same ``lr_mult`` and ``wd_mult``.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        _load_part(directory, common, model_state, part)


def _load_part(directory: Path, common: dict[str, Any], model_state: dict[str, Any], part: MegatronOptimizer) -> None:
    wanted = part.sharded_state_dict(model_state, is_loading=True, metadata=optimizer_metadata())
    _find_master_weights(wanted, set(dist_checkpointing.load_tensors_metadata(str(directory))))
    # Under a name of its own, so that nothing of the other kind's common state is merged in.
    loaded = load_checkpoint({"wanted": wanted}, directory).get("wanted", {})
    groups = _groups_of(part, common)
    if isinstance(part, DistributedOptimizer):
        loaded["optimizer"] = {"param_groups": groups}
        loaded["param_state_sharding_type"] = optimizer_metadata()["distrib_optim_sharding_type"]
    else:
        _fill_groups(loaded.get("optimizer", loaded), groups, part)
    scaler = _stored_parts(common)[0].get("grad_scaler")
    if scaler is not None:
        loaded["grad_scaler"] = scaler
    part.load_state_dict(loaded)


def _find_master_weights(wanted: dict[str, Any], stored_keys: set[str]) -> None:
    """In place: asks for each master weight under the name that the checkpoint has for it."""

    def rename(value: Any) -> Any:
        if not isinstance(value, (ShardedTensor, ShardedTensorFactory)) or not value.key.startswith(
            _MASTER_WEIGHTS[:2]
        ):
            return value
        name = next(value.key.removeprefix(prefix) for prefix in _MASTER_WEIGHTS if value.key.startswith(prefix))
        key = next((prefix + name for prefix in _MASTER_WEIGHTS if prefix + name in stored_keys), value.key)
        return dataclasses.replace(value, key=key)

    dict_list_map_inplace(rename, wanted)


def _groups_with_steps(common: dict[str, Any]) -> list[dict[str, Any]]:
    """The stored groups; an optimizer that counts steps per parameter stored one count for all beside them."""
    steps = [part.get("optimizer", part).get("state", {}).get("common_step") for part in _stored_parts(common)]
    step = next((step for step in steps if step is not None), None)
    return [{**group, **({} if step is None else {"step": step})} for group in stored_groups(common)]


def _fill_groups(inner: dict[str, Any], groups: list[dict[str, Any]], part: MegatronOptimizer) -> None:
    """Gives the groups of a torch optimizer's state, which hold parameters alone by now, what the checkpoint has."""
    inner["param_groups"] = [
        {**group, "params": inside["params"]} for group, inside in zip(groups, inner["param_groups"])
    ]
    state = inner.setdefault("state", {})
    if any("step" in of_parameter for of_parameter in part.optimizer.state.values()):
        state["common_step"] = groups[0]["step"]


def _groups_of(part: MegatronOptimizer, common: dict[str, Any]) -> list[dict[str, Any]]:
    """For each group of ``part`` the stored one of the same parameters, marked as Megatron-Core will look for it."""
    # Experts are groups of their own only where ranks share them; with one rank for all they are among the others.
    stored = {}
    for group in _groups_with_steps(common):
        stored[_identity({**group, "is_expert_parallel": not group["is_expert_parallel"]})] = group
    stored |= {_identity(group): group for group in _groups_with_steps(common)}
    groups = []
    for ours in part.param_groups:
        state = {k: v for k, v in stored[_identity(ours)].items() if k not in param_group_identifier_keys}
        groups.append({**state, **{key: ours[key] for key in param_group_identifier_keys if key in ours}})
    return groups


def _identity(group: dict[str, Any]) -> tuple:
    return tuple(group[key] for key in GROUP_IDENTITY)
