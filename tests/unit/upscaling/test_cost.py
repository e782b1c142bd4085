"""Cost figures against models that exist: counted parameters, counted FLOPs, and the sizes that papers state."""

import dataclasses

import pytest
import torch
from tiny_models import make_model
from torch.utils.flop_counter import FlopCounterMode

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.conversion.families import from_hf_config
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.cost import (
    block_flops,
    block_parameters,
    cost_of,
    flops_per_token,
    forward_flops_per_token,
    kv_bytes_per_token,
    memory_flops,
    total_parameters,
    trainable_parameters,
    training_bytes,
)

LLAMA_1B = ModelConfig(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=128256,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
PAPER = MemoryConfig(memory_num_keys=256, memory_topk=16, memory_latent_size=64)


def paper_plan(policy="interleave", **memory):
    settings = dataclasses.replace(PAPER, **memory) if policy == "interleave" else None
    return make_plan(policy, num_layers=16, num_blocks=8, memory=settings)


def test_llama_3_2_1b():
    """The number of parameters that its model card states."""
    assert total_parameters(LLAMA_1B, make_plan("none", num_layers=16)) == 1_235_814_400


@pytest.mark.parametrize(
    "memory, millions", [({}, 11.1), ({"memory_num_keys": 512}, 24.3), ({"memory_variant": "full"}, 6.3 + 0.52 + 134.2)]
)
def test_memory_block_sizes_of_the_paper(memory, millions):
    plan = paper_plan(**memory)
    sizes = block_parameters(LLAMA_1B, plan)
    assert sizes[plan.memory_indices[0]] / 1e6 == pytest.approx(millions, abs=0.06)
    assert sizes[0] / 1e6 == pytest.approx(60.8, abs=0.05)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_real_models(family, tied):
    model = make_model(family, tie_word_embeddings=tied)
    config = from_hf_config({**model.config.to_dict(), "architectures": [type(model).__name__]})
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert total_parameters(config, make_plan("none", num_layers=5)) == counted


def test_trainable_parameters():
    plan = paper_plan()
    counts = block_parameters(LLAMA_1B, plan)
    assert trainable_parameters(LLAMA_1B, plan, "inserted") == 8 * counts[2]
    assert trainable_parameters(LLAMA_1B, plan, "all") == total_parameters(LLAMA_1B, plan)
    assert trainable_parameters(LLAMA_1B, plan, "values") == 8 * 256**2 * 64
    assert trainable_parameters(LLAMA_1B, paper_plan(memory_variant="full"), "values") == 8 * 32 * 256**2 * 64
    base = make_plan("none", num_layers=16)
    assert total_parameters(LLAMA_1B, plan) - total_parameters(LLAMA_1B, base) == 8 * counts[2]


def test_forward_flops_against_a_counter():
    """The matrix products that a model of transformers really runs.

    It multiplies the whole square of scores where we count the causal half, which is put right here. Some versions form
    position times frequency as a matrix product: one multiply-add per pair of channels.
    """
    length = 21
    model = make_model("llama", attn_implementation="eager")
    config = from_hf_config({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    plan = make_plan("none", num_layers=5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    query_width = config.num_attention_heads * config.kv_channels
    upper_half = plan.num_layers * 4 * query_width * (length - (length + 1) / 2)
    ours = forward_flops_per_token(config, plan, length) + upper_half
    assert counter.get_total_flops() / length - ours in (0, config.kv_channels)


def test_window_limits_attention():
    narrow = dataclasses.replace(LLAMA_1B, sliding_window=3)
    plan = make_plan("none", num_layers=16)
    # Of 5 tokens the first sees 1, the second 2, the others 3.
    assert block_flops(narrow, plan, 0, 5).activations == 4 * 2048 * (1 + 2 + 3 + 3 + 3) / 5
    assert block_flops(LLAMA_1B, plan, 0, 5).activations == 4 * 2048 * 3


@pytest.mark.parametrize(
    "memory, expected",
    [
        # 32 heads: scores of 2 x 256 sub-keys of 32 channels, 16 slots of the latent width, one projection 64 x 64
        ({}, 32 * (2 * 2 * 256 * 32 + 2 * 16 * 64 + 2 * 64 * 64)),
        ({"memory_variant": "full"}, 32 * (2 * 2 * 256 * 32 + 2 * 16 * 64)),
        ({"memory_variant": "block", "memory_num_heads": 4}, 4 * (2 * 2 * 256 * 256 + 2 * 16 * 2048)),
        ({"memory_output_projection": "linear"}, 32 * (4 * 256 * 32 + 32 * 64 + 2 * 64 * 64) + 2 * 2048 * 2048),
        ({"memory_output_projection": "attention"}, 32 * (4 * 256 * 32 + 32 * 64 + 2 * 64 * 64) + 2 * 2048 * 2048),
        ({"memory_output_projection": "silu"}, 32 * (4 * 256 * 32 + 32 * 64 + 2 * 64 * 64 + 2 * 64 * 64)),
        ({"memory_attention": "full"}, 32 * (4 * 256 * 32 + 32 * 64 + 2 * 64 * 64) + 2 * 2048 * 2048),
    ],
)
def test_memory_flops_by_hand(memory, expected):
    assert memory_flops(LLAMA_1B, paper_plan(**memory)) == expected


def test_training_flops():
    plan = paper_plan()
    forward = forward_flops_per_token(LLAMA_1B, plan, 4096)
    assert flops_per_token(LLAMA_1B, plan, 4096) == 3 * forward
    frozen = flops_per_token(LLAMA_1B, plan, 4096, train="inserted")
    assert forward < frozen < 2.5 * forward
    base = make_plan("none", num_layers=16)
    held = flops_per_token(LLAMA_1B, plan, 4096, train="inserted", kl_to_base=True)
    assert held == frozen + forward_flops_per_token(LLAMA_1B, base, 4096)
    # Gradients stop at the first inserted block: a later one costs less.
    late, early = (
        make_plan("interleave", num_layers=16, insert_after=[after], memory=PAPER) for after in (14, 0)
    )  # fmt: skip
    values = flops_per_token(LLAMA_1B, plan, 4096, train="values")
    assert forward_flops_per_token(LLAMA_1B, plan, 4096) < values < frozen
    assert flops_per_token(LLAMA_1B, late, 4096, train="inserted") < flops_per_token(LLAMA_1B, early, 4096, train="inserted")  # fmt: skip


def test_key_value_cache_and_memory():
    plan = paper_plan()
    assert kv_bytes_per_token(LLAMA_1B, plan, "bfloat16") == 24 * 2 * 8 * 64 * 2
    total, added = total_parameters(LLAMA_1B, plan), trainable_parameters(LLAMA_1B, plan, "inserted")
    assert training_bytes(LLAMA_1B, plan, "bfloat16", train="inserted") == 2 * (total - added) + 18 * added
    assert training_bytes(LLAMA_1B, plan, "float32", train="all") == 16 * total


def test_cost_of_is_the_sum_of_its_parts():
    cost = cost_of(LLAMA_1B, paper_plan("llama_pro"), seq_length=2048, dtype="bfloat16")
    assert cost.added_parameters == cost.trainable_inserted == 8 * 60_821_504
    assert cost.base_parameters == 1_235_814_400
    assert cost.kv_bytes == 1.5 * cost.base_kv_bytes
    assert 1.3 < cost.forward_flops / cost.base_forward_flops < 1.5


def test_adapters_of_experts():
    """All experts have adapters, and a token meets those of its own."""
    model = dataclasses.replace(LLAMA_1B, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=1024)
    plan, hidden, rank = make_plan("none", num_layers=16), 2048, 4
    attention = rank * ((hidden + hidden) + 2 * (hidden + 512) + (hidden + hidden))
    expert = rank * 3 * (hidden + 1024)
    assert trainable_parameters(model, plan, "lora", lora_rank=rank) == 16 * (attention + 8 * expert)
    none, some = (flops_per_token(model, plan, 512, train="lora", lora_rank=r) for r in (0, rank))
    assert some - none == 6 * 16 * (attention + 2 * expert)
