"""Ceilings, necessary work and the roofline made of them."""

import pytest
import torch

from megatron_midus.benchmark import ceilings as measured
from megatron_midus.benchmark.ceilings import Ceilings, measure_ceilings
from megatron_midus.benchmark.result import make_rows
from megatron_midus.benchmark.shapes import SHAPES
from megatron_midus.benchmark.work import Work, work_of


def test_roofline_takes_the_nearer_ceiling():
    ceilings = Ceilings(gigabytes_per_second=10, teraflops=2)
    assert ceilings.milliseconds(2e12, 1) == pytest.approx(1000)
    assert ceilings.milliseconds(1, 10e9) == pytest.approx(1000)
    assert ceilings.best(Ceilings(20, 1)) == Ceilings(20, 2)


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(measured, "COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(measured, "GEMM_SIZE", {"cpu": 32})
    for dtype in (torch.float32, torch.bfloat16):
        ceilings = measure_ceilings("cpu", dtype)
        assert ceilings.gigabytes_per_second > 0 and ceilings.teraflops > 0


def test_work_of_an_ffn():
    shape = SHAPES["tiny"]  # d=24, FFN 40
    forward, backward = work_of("ffn", shape, 10)
    assert forward.flops == 2 * 10 * 3 * 24 * 40
    assert backward.flops == 2 * forward.flops
    assert forward.num_bytes == 4 * (3 * 24 * 40 + 2 * 10 * 24 + 2 * 10 * 40)


def test_work_of_a_memory_counts_the_einsums():
    """Against torch's own counter over a forward pass written as matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    shape, tokens = SHAPES["tiny"], 7
    heads, half, topk, latent = shape.num_heads, shape.kv_channels // 2, shape.topk, shape.latent_size
    counter = FlopCounterMode(display=False)
    with counter:
        for _ in range(2):
            torch.bmm(torch.ones(heads, tokens, half), torch.ones(heads, half, shape.num_keys))
        torch.bmm(torch.ones(heads * tokens, 1, topk), torch.ones(heads * tokens, topk, latent))
        torch.bmm(torch.ones(heads, tokens, latent), torch.ones(heads, latent, shape.out_channels))
    assert work_of("hive", shape, tokens)[0].flops == counter.get_total_flops()


def test_rates_and_share():
    times = {"a": [[1000.0, 1000.0], [1000.0, 1000.0]]}
    (row,) = make_rows(
        times, ["forward", "backward"], {}, work={"a": [Work(1e12, 1), Work(1e12, 1)]}, ceilings=Ceilings(1, 2)
    )
    assert (row.teraflops, row.roofline_share) == pytest.approx((1.0, 0.5))
