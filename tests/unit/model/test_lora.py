"""Adapters against one product per matrix of the Hugging Face model, in float64."""

from __future__ import annotations

import pytest
import torch

from megatron_midus.config import ModelConfig
from megatron_midus.conversion.megatron_io import split
from megatron_midus.model.lora import Adapter

# Two KV groups of three heads of 10 channels.
MODEL = ModelConfig(
    num_layers=1, hidden_size=24, ffn_hidden_size=40, num_attention_heads=6, num_query_groups=2, kv_channels=10,
    vocab_size=37, max_position_embeddings=64,
)  # fmt: skip
# Groups and rows of query, key, value; of gate, up; of one matrix.
FUSED = {"qkv": (2, [30, 10, 10]), "fc1": (1, [40, 40]), "proj": (1, [24])}


@pytest.mark.parametrize("kind", FUSED)
def test_every_matrix_has_an_adapter_of_its_own(kind):
    groups, rows = FUSED[kind]
    drawn = torch.Generator().manual_seed(1)
    weight = torch.randn(groups * sum(rows), 24, generator=drawn, dtype=torch.float64)
    adapter = Adapter(weight, groups=groups, rows=rows, rank=3, alpha=6.0, seed=5)
    x = torch.randn(7, 2, 24, generator=drawn, dtype=torch.float64)
    assert not adapter(x).any(), "an untrained adapter changes nothing"
    with torch.no_grad():
        adapter.up.copy_(torch.randn(adapter.up.shape, generator=drawn))
    ups = split(adapter.up.detach(), len(rows), MODEL)
    deltas = [2.0 * up @ down for up, down in zip(ups, adapter.down.detach().split(3))]
    merged = split(adapter.merged(weight), len(rows), MODEL)
    for before, delta, after in zip(split(weight, len(rows), MODEL), deltas, merged):
        torch.testing.assert_close(after, before + delta, rtol=1e-5, atol=1e-5)  # merged in fp32
    outputs = split(adapter(x).flatten(0, 1).T.detach(), len(rows), MODEL)
    for output, delta in zip(outputs, deltas):
        torch.testing.assert_close(output.T, x.flatten(0, 1) @ delta.T)


def test_layers_and_seeds_draw_other_adapters():
    weight = torch.zeros(24, 24)
    draws = [Adapter(weight, groups=1, rows=[24], rank=3, alpha=1.0, seed=seed).down for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
