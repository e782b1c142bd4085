"""The model card states what the plan says."""

import dataclasses

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.conversion.model_card import model_card
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.cost import total_parameters

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=10,
    vocab_size=37,
    max_position_embeddings=64,
)


def test_midus_card():
    plan = make_plan("interleave", num_layers=4, num_blocks=3, memory=MemoryConfig(memory_num_keys=16))
    plan = dataclasses.replace(plan, source_name="Tiny-1", source_hash="ab" * 32)
    card = model_card(MODEL, plan, dtype="bfloat16", iteration=250)
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n- midus\n" in card
    assert "# Tiny-1, up-scaled from 4 to 7 layers" in card and "trained for 250 iterations" in card
    assert "ab" * 32 in card and "computes the same function as its base" in card
    assert f"parameters: {total_parameters(MODEL, plan):,}" in card and "memory_num_keys: `16`" in card
    assert "do not divide into 3 equal groups" in card
    assert 'from_pretrained("DIR", trust_remote_code=True)' in card and "2512.13751" in card


def test_plain_card():
    plan = make_plan("stack", num_layers=4, num_blocks=4)
    card = model_card(MODEL.with_num_layers(8), plan, dtype="float32")
    assert "midus\n---" not in card and "no custom code" in card and "trust_remote_code" not in card
    assert "not trained since" in card and "same function" not in card and "the base model" in card
    base = total_parameters(MODEL, make_plan("none", num_layers=4))
    assert f"of the base: {base:,}" in card
