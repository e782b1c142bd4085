"""The search tries what divides, tells what fits, and follows the hardware that it is given."""

import dataclasses

import pytest

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.planning import Message, ParallelLayout, Workload, rank_memory
from megatron_midus.planning.hardware import HARDWARE
from megatron_midus.planning.search import find_layouts
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.cost import flops_per_token

BASE = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=8192,
)
MEMORY = MemoryConfig(memory_num_keys=512, memory_topk=16, memory_latent_size=128)
PLAN = make_plan("interleave", num_layers=32, num_blocks=16, memory=MEMORY)


def search(hardware="h100", *, nodes=2, gpus=8, train="all", batch=256, micro=4, kl_to_base=False, **changes):
    workload = Workload(4096, micro, batch, train=train, kl_to_base=kl_to_base)
    return find_layouts(
        BASE,
        PLAN,
        dataclasses.replace(HARDWARE[hardware], **changes),
        workload,
        nodes=nodes,
        gpus_per_node=gpus,
        training_flops_per_token=flops_per_token(BASE, PLAN, 4096, train=train),
    )


def test_every_layout_uses_every_gpu_and_places_every_block():
    found = search()
    assert len({(c.layout, c.workload.micro_batch_size) for c in found}) == len(found) > 30
    for c in found:
        assert c.layout.world_size == 16 and c.layout.tensor <= 8
        assert sorted(i for blocks in c.layout.stages for i in blocks) == list(range(PLAN.num_layers))
        assert 256 % (c.layout.data * c.workload.micro_batch_size) == 0
        assert c.seconds == pytest.approx(c.compute_seconds + c.bubble_seconds + sum(c.exposed_seconds.values()))


def test_what_fits_comes_first_and_by_time():
    found = search("a100", nodes=1)
    fits = [c.fits for c in found]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits
    times = [c.seconds for c in found if c.fits]
    assert times == sorted(times)
    assert all(c.memory.total <= 80 * 2**30 for c in found if c.fits)


def test_more_memory_fits_more():
    count = [sum(c.fits for c in search(memory_gib=gib)) for gib in (20, 40, 80, 400)]
    assert count == sorted(count) and count[0] < count[-1] == len(search())


def test_a_pass_of_the_base_costs_time_and_logits():
    plain = {(c.layout, c.workload.micro_batch_size): c for c in search(train="inserted")}
    found = search(train="inserted", kl_to_base=True)
    assert found and len(found) == sum(c.layout.pipeline == 1 for c in plain.values())
    for c in found:
        without = plain[c.layout, c.workload.micro_batch_size]
        logits = 2 * BASE.vocab_size * c.workload.tokens / c.layout.tensor
        assert c.memory.activations - without.memory.activations == pytest.approx(logits, abs=1)
        # Beside a forward pass of base and memories and a backward pass without weights, with recompute two forward passes.
        assert 1 / 3.5 < c.compute_seconds / without.compute_seconds - 1 < 1 / 2
        assert (c.sent_bytes["tensor"] > without.sent_bytes["tensor"]) == (c.layout.tensor > 1)


def test_slower_links_cost_those_who_use_them():
    fast, slow = search(node_gb_s=450), search(node_gb_s=45)
    for c in fast:
        same = next(s for s in slow if (s.layout, s.workload) == (c.layout, c.workload))
        assert (same.seconds > c.seconds) == (c.layout.tensor > 1 or same.exposed_seconds != c.exposed_seconds)
    assert fast[0].layout.tensor >= slow[0].layout.tensor


@pytest.mark.parametrize("train", ["inserted", "all"])
def test_recomputing_trades_time_for_memory(train):
    plain = ParallelLayout((tuple(range(PLAN.num_layers)),), tensor=8, sequence_parallel=True)
    again = dataclasses.replace(plain, recompute=True)
    workload = Workload(4096, 1, 1, train=train)
    sizes = [rank_memory(BASE, PLAN, layout, workload, stage=0) for layout in (plain, again)]
    assert sizes[1].activations < sizes[0].activations / 4 and sizes[0].weights == sizes[1].weights


def test_a_latent_bank_is_held_once_by_the_tensor_parallel_ranks():
    blocks = (tuple(range(PLAN.num_layers)),)
    held = [
        rank_memory(
            BASE, PLAN, ParallelLayout(blocks, tensor=4, latent_values=latent), Workload(4096), stage=0
        ).parameters
        for latent in (False, True)
    ]
    assert held[0] - held[1] == 16 * 512**2 * 128 * 3 // 4


def test_copies_of_weights_count():
    layout = ParallelLayout((tuple(range(PLAN.num_layers)),))
    without, held = (
        rank_memory(BASE, PLAN, layout, Workload(4096, weight_copies=copies), stage=0) for copies in (0, 2)
    )
    assert (without.copies, held.copies) == (0, 2 * 4 * held.trained)
    assert held.total - without.total == held.copies


@pytest.mark.parametrize("kind, factor", [("all_reduce", 1.5), ("all_gather", 0.75), ("all_to_all", 0.75), ("send", 1)])
def test_bytes_on_the_wire(kind, factor):
    assert Message("tensor", kind, 100.0, 4).wire_bytes == 100 * factor
