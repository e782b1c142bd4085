"""The memory module against formulas, and its parameters under tensor parallelism."""

from __future__ import annotations

import memory_processes
import pytest
import torch
from launcher import launch
from scenarios import Layout

SETTINGS = {
    "hive": {},
    "full": {"memory_variant": "full"},
    "block": {"memory_variant": "block"},
    "block, two heads": {"memory_variant": "block", "memory_num_heads": 2},
    "norm": {"memory_query_norm": "rms"},
    "temperature, relu": {"memory_query_temperature": True, "memory_score_activation": "relu"},
    "silu, norm": {"memory_output_projection": "silu", "memory_query_norm": "rms"},
    "linear, sigmoid": {"memory_output_projection": "linear", "memory_score_activation": "sigmoid"},
    "attention full, silu": {"memory_attention": "full", "memory_output_projection": "silu"},
    "block, attention full": {"memory_attention": "full", "memory_variant": "block"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_forward_is_the_formula(name: str) -> None:
    ((found, expected),) = launch(memory_processes.forward_against_formula, 1, SETTINGS[name])
    assert expected.std() > 0.1
    # float64 on both sides: the rounding of sums of a hundred terms of order one to a hundred.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["hive", "full", "attention full, silu", "linear, sigmoid", "temperature, relu"])
def test_start_values_are_slices_of_the_global_ones(name: str) -> None:
    for rank in launch(memory_processes.start_values, 2, SETTINGS[name], Layout(tp=2), 11):
        for parameter, facts in rank.items():
            assert facts["equal"], parameter
            replicated = parameter == "values" and "memory_variant" not in SETTINGS[name]
            assert facts["tensor_parallel"] == (not replicated)
            assert replicated or facts["axis"] == (1 if parameter == "attn_proj" else 0)
            assert facts["kind"] == parameter and facts["is_value"] == (parameter == "values")


@pytest.mark.parametrize("name", ["hive", "block"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sp=True)], ids=["tp2", "tp2 sp"])
def test_gradient_of_a_replicated_bank_is_the_sum_over_ranks(name: str, layout: Layout) -> None:
    (expected,) = launch(memory_processes.value_gradient, 1, SETTINGS[name], Layout())
    ranks = launch(memory_processes.value_gradient, 2, SETTINGS[name], layout)
    assert torch.equal(ranks[0], ranks[1])
    # fp32 sums of about 50 terms in another order.
    torch.testing.assert_close(ranks[0], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["hive", "full"])
def test_gradient_straight_into_megatrons(name: str) -> None:
    (expected,) = launch(memory_processes.values_main_grad, 1, SETTINGS[name], straight=False)
    (found,) = launch(memory_processes.values_main_grad, 1, SETTINGS[name], straight=True)
    assert expected.any()
    # Sums of a few products, rounded once more on the way where the gradient has a tensor of its own.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_sharded_tensors_have_global_shapes() -> None:
    for rank in launch(memory_processes.sharded_tensors, 2, SETTINGS["attention full, silu"], Layout(tp=2)):
        assert rank == {
            "memory.attn_proj": ((24, 40), (24, 20)),
            "memory.row_keys": ((4, 9, 3), (2, 9, 3)),
            "memory.col_keys": ((4, 9, 3), (2, 9, 3)),
            "memory.values": ((81, 7), (81, 7)),
            "memory.head_proj": ((4, 7, 6), (2, 7, 6)),
            "memory.gate": ((4, 6, 6), (2, 6, 6)),
        }


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    settings = {"memory_variant": "block", "memory_num_heads": 5}
    for message in launch(memory_processes.build_error, 2, settings, Layout(tp=2)):
        assert message == ("memory_num_heads=5 is not divisible by tensor_model_parallel_size=2; choose one of [1, 5]")
