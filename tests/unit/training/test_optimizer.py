"""Which parameter gets which learning rate and weight decay."""

from __future__ import annotations

import pytest
import torch

from megatron_midus.config.optimizer import OptimizationConfig
from megatron_midus.training.checkpoint.optimizer_state import GROUP_IDENTITY
from megatron_midus.training.optimizer import has_weight_decay, param_group_overrides

NAMES = {
    "decoder.layers.0.mlp.linear_fc1.weight": (4, 3),
    "decoder.layers.0.input_layernorm.weight": (3,),
    "decoder.layers.0.self_attention.linear_qkv.bias": (5,),
    "decoder.layers.1.self_attention.linear_proj.row_keys": (2, 5, 3),
    "decoder.layers.1.self_attention.linear_proj.query_norm": (2, 6),
    "decoder.layers.1.self_attention.linear_proj.log_temperature": (2,),
    "decoder.layers.1.self_attention.linear_proj.value_bank": (25, 4),
}


def parameters() -> dict[str, torch.nn.Parameter]:
    made = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in NAMES.items()}
    made["decoder.layers.1.self_attention.linear_proj.value_bank"].is_memory_value = True
    return made


def override_of(name: str, settings: OptimizationConfig) -> dict:
    """The overrides that Megatron-Core would merge for a parameter."""
    parameter = parameters()[name]
    found: dict = {}
    for key, override in param_group_overrides(settings).items():
        if key.matches(parameter, name):
            assert not set(found) & set(override), "conflicting overrides"
            found.update(override)
    return found


def test_only_matrices_decay():
    decaying = {name for name, parameter in parameters().items() if has_weight_decay(parameter, name)}
    assert decaying == {
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.1.self_attention.linear_proj.row_keys",
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mult", [1.0, 4.0])
def test_overrides(name, mult):
    settings = OptimizationConfig(lr=1e-3, min_lr=1e-4, value_lr_mult=mult)
    override = override_of(name, settings)
    if name.endswith("value_bank"):
        assert override["wd_mult"] == 0.0
        assert override.get("max_lr", 1e-3) == 1e-3 * mult and override.get("min_lr", 1e-4) == 1e-4 * mult
    elif has_weight_decay(parameters()[name], name):
        assert override == {}
    else:
        assert override == {"wd_mult": 0.0}


@pytest.mark.parametrize("settings", [{"value_lr_mult": 1.0}, {"value_lr_mult": 4.0}, {"value_weight_decay": 0.1}])
def test_no_two_groups_look_alike_in_a_checkpoint(settings):
    """A group of a checkpoint is found by these keys, which every release of Megatron-Core has among its own."""
    settings = OptimizationConfig(lr=1e-3, weight_decay=0.1, **settings)
    defaults = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    groups = {tuple(sorted(override_of(name, settings).items())) for name in NAMES}
    identities = {tuple({**defaults, **dict(group)}[key] for key in GROUP_IDENTITY) for group in groups}
    assert len(groups) == len(identities) == 3


def test_value_decay_is_a_share_of_the_common_one():
    settings = OptimizationConfig(lr=1e-3, weight_decay=0.1, value_weight_decay=0.02)
    name = "decoder.layers.1.self_attention.linear_proj.value_bank"
    assert override_of(name, settings)["wd_mult"] == pytest.approx(0.2)
