"""Rotary embeddings against transformers' own: every type, every spelling, bit for bit in fp32."""

import json
import random

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_midus.hf import MidusConfig
from megatron_midus.hf.modeling_midus import MidusRotaryEmbedding, compute_attention_factor, compute_inverse_frequencies

TYPES = ("linear", "dynamic", "llama3", "yarn", "longrope")


def random_rope(kind, seed, channels=4):
    """A description with odd numbers, whole and broken ones, optional entries there or not."""
    dice = random.Random(f"{kind} {seed}")
    rope = {"rope_type": kind, "rope_theta": dice.choice([10000.0, 1e6, 777, 5e5 + 0.3])}
    if kind == "default":
        return rope
    rope["factor"] = dice.choice([1.0, 2, 3.7, 8.0, 40])
    if kind == "llama3":
        rope |= {"low_freq_factor": dice.choice([1, 1.5]), "high_freq_factor": dice.choice([4.0, 7])}
    if kind == "yarn":
        choices = {
            "attention_factor": [None, 0.7, 1.25], "beta_fast": [32, 21.5], "beta_slow": [1, 2.5], "mscale": [0.707, 1.0, 0],
            "mscale_all_dim": [0.9, 1.1], "truncate": [True, False],
        }  # fmt: skip
        rope |= {name: dice.choice(values) for name, values in choices.items() if dice.random() < 0.5}
    if kind == "longrope":
        rope |= {"attention_factor": dice.choice([None, 0.7])}
        rope["factor"] = dice.choice([None, rope["factor"]])
        for name in ("short_factor", "long_factor"):
            rope[name] = [1.0 + dice.random() for _ in range(channels // 2)]
    if kind in ("llama3", "yarn", "longrope") and dice.random() < 0.7:
        rope["original_max_position_embeddings"] = dice.choice([64, 100, 4096])
    return rope


def sizes(seed):
    head_dim = random.Random(seed).choice([4, 6, 64, 80, 128])
    return {"head_dim": head_dim, "num_attention_heads": 2, "hidden_size": 2 * head_dim, "max_position_embeddings": 128}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("seed", range(20))
def test_frequencies_are_those_of_transformers(kind, seed):
    rope = random_rope(kind, seed, sizes(seed)["head_dim"])
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](transformers.LlamaConfig(**sizes(seed), rope_parameters=dict(rope)))
    config = MidusConfig(**sizes(seed), rope_parameters=dict(rope))
    assert torch.equal(compute_inverse_frequencies(config), theirs)
    assert compute_attention_factor(config) == factor


@pytest.mark.parametrize("kind", ["default", *TYPES])
def test_cosines_follow_the_length_as_in_transformers(kind):
    """Growing beyond the original length, shrinking again, exactly at it; the state is kept from call to call."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = random_rope(kind, 3, sizes(2)["head_dim"]) | ({} if kind == "default" else {"factor": 3.3})
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**sizes(2), rope_parameters=dict(rope)))
    ours = MidusRotaryEmbedding(MidusConfig(**sizes(2), rope_parameters=dict(rope)))
    seen = set()
    for length in (5, 128, 129, 300, 200, 128, 127, 1000, 3, 129):
        for dtype in (torch.float32, torch.bfloat16):
            states, positions = torch.zeros(1, length, 4, dtype=dtype), torch.arange(length)[None]
            found, wanted = ours(states, positions), theirs(states, positions)
            assert all(map(torch.equal, found, wanted)), length
        seen.add(float(ours.frequencies[-1]))
    assert (len(seen) > 3) == (kind == "dynamic")


def written(seed):
    """Entries of a config.json about rotary embeddings, in any mixture of generations and spellings."""
    dice = random.Random(seed)
    entries = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = random_rope(dice.choice(["default", *TYPES]), dice.random(), sizes(seed)["head_dim"])
        if dice.random() < 0.5:
            rope["type"] = rope.pop("rope_type")
        if dice.random() < 0.5:
            del rope["rope_theta"]
        if dice.random() < 0.3:
            rope["finetuned"] = True  # of no effect
        if dice.random() < 0.6:
            entries[name] = dice.choice([rope, rope, rope, {}, None])
    if dice.random() < 0.6:
        entries["rope_theta"] = dice.choice([2e4, 333333])
    if dice.random() < 0.2:
        entries["original_max_position_embeddings"] = 96
    return entries


@pytest.mark.parametrize("seed", range(60))
def test_every_mixture_of_spellings_is_read_as_transformers_reads_it(seed, tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    entries = {**sizes(seed), **written(seed)}
    (tmp_path / "config.json").write_text(json.dumps({**entries, "model_type": "llama"}))
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig.from_pretrained(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**entries, "model_type": "midus"}))
    config = MidusConfig.from_pretrained(tmp_path)
    assert torch.equal(compute_inverse_frequencies(config), theirs.inv_freq)
    assert compute_attention_factor(config) == theirs.attention_scaling
    config.save_pretrained(tmp_path / "again")
    assert MidusConfig.from_pretrained(tmp_path / "again").rope_parameters == config.rope_parameters


@pytest.mark.parametrize("kind", TYPES)
def test_rope_given_at_loading_is_computed(make_base, upscale, tokens, tmp_path, kind):
    """As Qwen's cards say: the trained model with a longer context, by an argument of from_pretrained."""
    base = make_base()
    theta = base.config.rope_parameters["rope_theta"]
    rope = {"rope_type": kind, "factor": 3.0, "original_max_position_embeddings": 16}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    rope |= {f"{name}_factor": [1.0, 1.5, 2.0, 7.0] for name in ("short", "long")} if kind == "longrope" else {}
    upscale(base).save_pretrained(tmp_path / "midus")
    base.save_pretrained(tmp_path / "base")
    plain = type(base).from_pretrained(tmp_path / "base")
    theirs = type(base).from_pretrained(tmp_path / "base", rope_parameters={**rope, "rope_theta": theta})
    load = transformers.AutoModelForCausalLM.from_pretrained
    positions = torch.arange(400, 400 + tokens.shape[1])[None]  # beyond every length that these models know
    with torch.no_grad():
        wanted, other = (model(tokens, position_ids=positions).logits for model in (theirs, plain))
        assert not torch.equal(wanted, other)
        for changed in ({"rope_parameters": dict(rope)}, {"rope_scaling": {**rope, "rope_type": kind}}):
            ours = load(tmp_path / "midus", trust_remote_code=True, **changed)  # theta stays as it was
            assert torch.equal(ours(tokens, position_ids=positions).logits, wanted)
    with pytest.raises(ValueError, match="longrope"):
        load(tmp_path / "midus", trust_remote_code=True, rope_parameters={"rope_type": "longrope"})


def test_entry_that_takes_the_place_of_another_is_said(caplog):
    logger = transformers.utils.logging.get_logger("megatron_midus.hf.configuration_midus")
    logger.addHandler(caplog.handler)
    try:
        MidusConfig(**sizes(1), rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
        assert not caplog.text
        MidusConfig(
            **sizes(1),
            rope_parameters={"rope_type": "default"},
            rope_scaling={"type": "linear", "factor": 2.0, "new": 1},
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert "takes the place of" in caplog.text and "does not know ['new']" in caplog.text
