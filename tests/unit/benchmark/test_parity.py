"""Nothing is timed, and no speed-up reported, when one contender of a run is wrong."""

import dataclasses
import sys

import pytest
import torch

from megatron_midus.benchmark import contenders, hml, parity
from megatron_midus.benchmark.contenders import find_contenders
from megatron_midus.benchmark.parity import ParityError, require_parity, separated_operands
from megatron_midus.benchmark.settings import HmlSettings
from megatron_midus.benchmark.shapes import SHAPES
from megatron_midus.ops import cpu, reference

BASELINES = ["ffn", "naive", "product-key-memory"]
TINY = SHAPES["tiny"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_num_keys", [5, 64])
def test_every_contender_passes(monkeypatch, dtype, block_num_keys):
    monkeypatch.setattr(parity, "BLOCK_NUM_KEYS", block_num_keys)
    shape = dataclasses.replace(TINY, dtype=dtype)
    found, notes = find_contenders(shape, backends=None, baselines=BASELINES, device="cpu")
    names = [c.name for c in found]
    assert {"torch", "reference", "naive", "ffn", "product-key-memory"} <= set(names), notes
    assert any(name.endswith(" (block)") for name in names)  # what computes the function of product-key-memory
    checks = require_parity(found, shape, device="cpu", seed=0)
    assert {check.contender for check in checks} == set(names) - {"ffn"}
    assert {check.tensor for check in checks} == {"out", *parity.NAMES}
    assert {check.tokens for check in checks} == set(parity.CHECK_TOKENS)


def test_operands_are_clear_in_every_head():
    operands = separated_operands(TINY, "hive", tokens=20, device="cpu", seed=0)
    query, rows, cols = (t.detach().double() for t in operands.inputs[:3])
    scores = reference.select_slots(query, rows, cols, topk=TINY.topk + 1)[1]
    assert (scores[..., -2] - scores[..., -1]).min() > parity.GAPS[torch.float32]


def _wrong_output(out):
    return out * 1.0001


def _wrong_gradient(out):
    return out.detach() + 1.0001 * (out - out.detach())


def _nan(out):
    return torch.where(torch.arange(out.numel()).view(out.shape) == 0, torch.nan, out)


@pytest.mark.parametrize("harm", [_wrong_output, _wrong_gradient, _nan])
def test_a_wrong_backend_ends_the_run_before_anything_is_timed(monkeypatch, harm):
    right = cpu.head_wise_memory
    monkeypatch.setattr(cpu, "head_wise_memory", lambda *args, **kwargs: harm(right(*args, **kwargs)))
    monkeypatch.setattr(hml, "interleave", lambda *args, **kwargs: pytest.fail("it was timed"))
    monkeypatch.setattr(hml, "in_own_process", lambda *args, **kwargs: pytest.fail("it was run"))
    with pytest.raises(
        ParityError, match=r"no speed-up is reported at shape tiny.*torch, .* error .* allowed"
    ) as error:
        hml.run_hml(HmlSettings(shape=["tiny"], device="cpu"))
    assert "naive" not in str(error.value)


def test_a_wrong_baseline_ends_it_too(monkeypatch):
    right = contenders.naive_memory
    monkeypatch.setattr(contenders, "naive_memory", lambda topk, inputs: right(topk - 1, inputs))
    with pytest.raises(ParityError, match="naive"):
        hml.run_hml(HmlSettings(shape=["tiny"], device="cpu"))


def test_a_backend_that_is_wrong_for_one_token_alone_is_found(monkeypatch):
    right = cpu.head_wise_memory
    monkeypatch.setattr(
        cpu, "head_wise_memory", lambda query, *a, **k: right(query, *a, **k) * (1 if len(query) > 1 else 1.001)
    )
    with pytest.raises(ParityError, match="at T=1"):
        hml.run_hml(HmlSettings(shape=["tiny"], device="cpu"))


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "product_key_memory", None)
    found, notes = find_contenders(TINY, backends=["torch"], baselines=BASELINES, device="cpu")
    assert [c.name for c in found] == ["torch", "naive", "ffn"]
    assert any("pip install 'megatron-midus[bench]'" in note for note in notes)


def test_a_backend_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="backend 'fast' cannot run: it is not known; here run .*torch"):
        find_contenders(TINY, backends=["fast"], baselines=[], device="cpu")
