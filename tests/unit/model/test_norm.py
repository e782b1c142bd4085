"""RMSNorm against transformers' own, whose order of operations it follows."""

from __future__ import annotations

import model_processes
import pytest
import torch
from launcher import launch
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_llama_bit_by_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = (3 * torch.randn(5, 2, 63)).to(dtype)
    weight = torch.randn(63).to(dtype)
    theirs = LlamaRMSNorm(63, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(weight)
    (ours,) = launch(model_processes.norm_of, 1, hidden, weight, 1e-5)
    assert ours.dtype == dtype and torch.equal(ours, theirs(hidden))
