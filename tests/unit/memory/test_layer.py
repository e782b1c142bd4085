"""The memory module against formulas, and its parameters under tensor parallelism."""

from __future__ import annotations

import functools

import memory_processes
import pytest
import torch
from launcher import launch
from scenarios import Layout

from megatron_midus.config import MemoryConfig
from megatron_midus.upscaling.value_placement import latent_bytes_per_microbatch

SETTINGS = {
    "hive": {},
    "full": {"memory_variant": "full"},
    "block": {"memory_variant": "block"},
    "block, two heads": {"memory_variant": "block", "memory_num_heads": 2},
    "norm": {"memory_query_norm": "rms"},
    "temperature, relu": {"memory_query_temperature": True, "memory_score_activation": "relu"},
    "silu, norm": {"memory_output_projection": "silu", "memory_query_norm": "rms"},
    "linear, sigmoid": {"memory_output_projection": "linear", "memory_score_activation": "sigmoid"},
    "attention, norm": {"memory_output_projection": "attention", "memory_query_norm": "rms"},
    "attention full, silu": {"memory_attention": "full", "memory_output_projection": "silu"},
    "block, attention full": {"memory_attention": "full", "memory_variant": "block"},
    "token": {"memory_query": "token", "memory_attention": "none"},
    "token, block, two heads, norm": {
        "memory_query": "token",
        "memory_attention": "none",
        "memory_variant": "block",
        "memory_num_heads": 2,
        "memory_query_norm": "rms",
    },
    "token, attention beside": {"memory_query": "token", "memory_output_projection": "attention"},
    "sum, silu": {"memory_query": "sum", "memory_attention": "full", "memory_output_projection": "silu"},
    "concat, linear": {"memory_query": "concat", "memory_attention": "full", "memory_output_projection": "linear"},
    "concat, block, two heads": {
        "memory_query": "concat",
        "memory_attention": "full",
        "memory_variant": "block",
        "memory_num_heads": 2,
    },
    "token, domain gate": {"memory_query": "token", "memory_attention": "none", "memory_domain_gate": True},
    "domain gate, mixer": {"memory_domain_gate": True, "memory_output_projection": "linear"},
    "block query, norm": {"memory_query": "block", "memory_attention": "full", "memory_query_norm": "rms"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_forward_is_the_formula(name: str) -> None:
    ((found, expected),) = launch(memory_processes.forward_against_formula, 1, SETTINGS[name])
    assert expected.std() > 0.1
    # float64 on both sides: the rounding of sums of a hundred terms of order one to a hundred.
    tolerance = 1e-6 if "memory_domain_gate" in SETTINGS[name] else 1e-10  # the gate is worked out in fp32
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name",
    [
        "hive",
        "full",
        "attention full, silu",
        "linear, sigmoid",
        "attention, norm",
        "temperature, relu",
        "block query, norm",
        "domain gate, mixer",
    ],
)
def test_start_values_are_slices_of_the_global_ones(name: str) -> None:
    for rank in launch(memory_processes.start_values, 2, SETTINGS[name], Layout(tp=2), 11):
        for parameter, facts in rank.items():
            assert facts["equal"], parameter
            replicated = (
                parameter == "value_bank" and "memory_variant" not in SETTINGS[name] or "domain_gate" in parameter
            )
            assert facts["tensor_parallel"] == (not replicated)
            assert replicated or facts["axis"] == (1 if parameter == "attn_proj" else 0)
            assert facts["kind"] == parameter and facts["is_value"] == (parameter == "value_bank")


@pytest.mark.parametrize("name", ["hive", "block"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sp=True)], ids=["tp2", "tp2 sp"])
def test_gradient_of_a_replicated_bank_is_the_sum_over_ranks(name: str, layout: Layout) -> None:
    (expected,) = launch(memory_processes.value_gradient, 1, SETTINGS[name], Layout())
    ranks = launch(memory_processes.value_gradient, 2, SETTINGS[name], layout)
    assert torch.equal(ranks[0], ranks[1])
    # fp32 sums of about 50 terms in another order.
    torch.testing.assert_close(ranks[0], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


LATENT = {
    "hive": {"memory_latent_size": 8},
    "hive, silu, sigmoid": {
        "memory_latent_size": 8,
        "memory_output_projection": "silu",
        "memory_score_activation": "sigmoid",
    },
    "hive, linear, attention full": {
        "memory_latent_size": 8,
        "memory_output_projection": "linear",
        "memory_attention": "full",
    },
    "block": {"memory_variant": "block"},
    "token": {"memory_latent_size": 8, **SETTINGS["token"]},
}
QUERIES = [name for name in SETTINGS if {"memory_query", "memory_domain_gate"} & SETTINGS[name].keys()]


@functools.cache
def _one_rank(name: str) -> dict:
    (found,) = launch(memory_processes.output_and_gradients, 1, LATENT[name], Layout(), "replicated")
    return found


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sp=True), Layout(tp=4)], ids=["tp2", "tp2 sp", "tp4"])
def test_a_bank_split_on_its_columns_gives_what_one_rank_gives(name: str, layout: Layout) -> None:
    """Output and every gradient; that of the bank is whole where it lies, without any reduction."""
    one = _one_rank(name)
    ranks = launch(memory_processes.output_and_gradients, layout.world_size, LATENT[name], layout, "latent")
    outputs = [rank["output"] for rank in ranks]
    _assert_close(torch.cat(outputs) if layout.sp else outputs[-1], one["output"], "output")
    _assert_inputs(ranks, one, layout, LATENT[name])
    assert set(ranks[0]["parameters"]) == set(one["parameters"])
    for parameter, (_, expected) in one["parameters"].items():
        axes, parts = zip(*(rank["parameters"][parameter] for rank in ranks))
        assert set(axes) == {1 if parameter in ("value_bank", "attn_proj") else 0}
        _assert_close(torch.cat(parts, axes[0]), expected, parameter)


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sp=True)], ids=["tp2", "tp2 sp"])
def test_every_query_of_two_ranks_is_that_of_one(name: str, layout: Layout) -> None:
    (one,) = launch(memory_processes.output_and_gradients, 1, SETTINGS[name], Layout(), "replicated")
    ranks = launch(memory_processes.output_and_gradients, 2, SETTINGS[name], layout, "replicated")
    outputs = [rank["output"] for rank in ranks]
    _assert_close(torch.cat(outputs) if layout.sp else outputs[-1], one["output"], "output")
    _assert_inputs(ranks, one, layout, SETTINGS[name])
    for parameter, (_, expected) in one["parameters"].items():
        axes, parts = zip(*(rank["parameters"][parameter] for rank in ranks))
        _assert_close(parts[0] if axes[0] is None else torch.cat(parts, axes[0]), expected, parameter)


def _assert_inputs(ranks: list[dict], one: dict, layout: Layout, settings: dict) -> None:
    """Gradients of what goes in: whole on every rank, with sequence parallelism its own tokens."""
    memory = MemoryConfig(**settings)
    if memory.has_attention:
        _assert_close(torch.cat([rank["hidden"] for rank in ranks], -1), one["hidden"], "hidden")
    for name, is_read in (("normed", memory.reads_token), ("residual", memory.reads_residual)):
        parts = [rank[name] for rank in ranks]
        if not is_read:
            assert parts == [None] * len(parts)
            continue
        found = [torch.cat(parts)] if layout.sp else parts
        for gradient in found:
            _assert_close(gradient, one[name], name)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    # fp32 sums of up to a few hundred terms in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()), msg=what)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("name", ["hive", "block"])
def test_bytes_of_a_latent_bank_are_those_of_the_formula(name: str) -> None:
    expected = latent_bytes_per_microbatch(
        MemoryConfig(**{"memory_num_keys": 9, "memory_topk": 3, **LATENT[name]}),
        hidden_size=24,
        num_attention_heads=4,
        tokens=12,
        ranks=2,
        itemsize=4,
    )
    assert launch(memory_processes.received_bytes, 2, LATENT[name], Layout(tp=2)) == [expected, expected]


def test_sharded_tensors_of_a_latent_bank_have_the_same_global_shapes() -> None:
    for name, shapes in (("hive", ((81, 8), (81, 4))), ("block", ((81, 24), (81, 12)))):
        for rank in launch(memory_processes.sharded_tensors, 2, LATENT[name], Layout(tp=2), "latent"):
            assert rank["memory.values"] == shapes


def test_columns_that_ranks_cannot_share_are_refused() -> None:
    for message in launch(memory_processes.build_error, 2, {"memory_latent_size": 7}, Layout(tp=2), "latent"):
        assert message == (
            "a value bank of 7 columns cannot be split over tensor_model_parallel_size=2; "
            "choose --memory-value-placement replicated"
        )


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
