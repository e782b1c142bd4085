"""What test_transformers_versions.py runs inside each version of transformers.

python transformers_versions_program.py write ROOT    makes models, checks them, saves them to ROOT/<this version>
python transformers_versions_program.py read ROOT     loads what every version wrote and checks it against the writer
"""

import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from megatron_midus.hf import MidusConfig, MidusForCausalLM

VOCAB, THETA = 97, 123456.0
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 200,  # wavelengths 6, 118, ...: all three cases occur
}
ROPES = [
    {"rope_type": "yarn", "factor": 3.3, "original_max_position_embeddings": 8, "beta_fast": 8.5},
    {"rope_type": "dynamic", "factor": 3.3},
    {"rope_type": "linear", "factor": 2.0},
    LLAMA3,
]
COMMON = {"vocab_size": VOCAB, "intermediate_size": 72, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
BASES = {
    "Llama": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
    "Qwen2": {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "Qwen3": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14},
}
BLOCKS = ["transformer", "memory", "transformer", "memory"]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
# fp32; versions hand masks to the attention kernel in different forms. A lost rotary theta moves logits by 0.1 and more.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def make(family):
    """A base of random numbers and its MIDUS twin with a zero value bank."""
    torch.manual_seed(0)
    rope = {"rope_theta": THETA, "rope_scaling": dict(LLAMA3)} if family == "Llama" else {"rope_theta": THETA}
    settings = {**COMMON, **BASES[family]}
    if transformers.__version__.startswith("4."):
        base_rope = rope
    else:
        base_rope = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA, **rope.get("rope_scaling", {})}}
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=2, **settings, **base_rope)
    base = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model = MidusForCausalLM(
        MidusConfig(
            num_hidden_layers=4,
            block_types=BLOCKS,
            memory_num_keys=11,
            memory_topk=5,
            memory_latent_size=7,
            attention_bias=family == "Qwen2",
            qk_norm=family == "Qwen3",
            **settings,
            **rope,
        )  # fmt: skip
    ).eval()
    state = model.state_dict()
    for name, tensor in base.state_dict().items():
        for source, physical in ((1, 2), (0, 0)):
            name = name.replace(f"layers.{source}.", f"layers.{physical}.")
            twin = name.replace(f"layers.{physical}.self_attn", f"layers.{physical + 1}.mem_attn")
            if twin != name and twin in state:
                state[twin].copy_(tensor)
        state[name].copy_(tensor)
    return base, model


def tokens():
    return torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))


def write(root):
    for family in BASES:
        base, model = make(family)
        directory = root / transformers.__version__ / family
        for attention in ("sdpa", "eager"):
            base.config._attn_implementation = model.config._attn_implementation = attention
            with torch.no_grad():
                assert torch.equal(model(tokens()).logits, base(tokens()).logits), (family, attention)
        base.config._attn_implementation = model.config._attn_implementation = "sdpa"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".memory." in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.5)
            logits = model(tokens()).logits
            assert (logits - base(tokens()).logits).abs().max() > 0.1
        generated = model.generate(tokens(), **GREEDY)
        model.save_pretrained(directory)
        expected = {
            "logits": logits,
            "generated": generated,
            "state": model.state_dict(),
            "rope": rope_logits(directory),
        }
        torch.save(expected, directory / "expected.pt")
        print(f"wrote {family} with transformers {transformers.__version__}: identity holds")


def rope_logits(directory):
    """Far out, with every scaling, given when the model is loaded; theta stays the model's."""
    found = []
    positions = torch.arange(150, 161)[None]
    for rope in ROPES:
        options = {DTYPE: torch.float32, "rope_parameters": dict(rope), "trust_remote_code": True}
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
        assert model.config.rope_parameters == {**rope, "rope_theta": THETA}
        with torch.no_grad():
            found.append(model(tokens(), position_ids=positions).logits)
    return found


def read(root):
    for directory in sorted(root.glob("*/*")):
        expected = torch.load(directory / "expected.pt")
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **{DTYPE: torch.float32})
        assert model.config.rope_theta == THETA and type(model).__module__.startswith("transformers_modules")
        assert model.config.block_types == BLOCKS
        state = model.state_dict()
        assert state.keys() == expected["state"].keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected["state"].items())
        with torch.no_grad():
            torch.testing.assert_close(model(tokens()).logits, expected["logits"], **TOLERANCE)
        for found, wanted in zip(rope_logits(directory), expected["rope"]):
            torch.testing.assert_close(found, wanted, **TOLERANCE)
        check_generation(model, expected)
        check_training(model)
        check_files(model, directory, expected)
        print(f"transformers {transformers.__version__} reads {directory.parent.name}/{directory.name}")


def check_generation(model, expected):
    ids = tokens()
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **GREEDY, **settings), expected["generated"]), settings
    beams = {**GREEDY, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0] = torch.cat([torch.zeros(4, dtype=ids.dtype), ids[0, :7]])
    mask[0, :4] = 0
    together = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(together[0, 11:], model.generate(ids[:1, :7], **GREEDY)[0, 7:])
    assert torch.equal(together[1:], expected["generated"][1:])
    for cache in (DynamicCache(), static_cache(model)):
        parts = []
        with torch.no_grad():
            for start, stop in ((0, 4), (4, 5), (5, 9), (9, 11)):
                parts.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected["logits"], **TOLERANCE)


def static_cache(model):
    try:
        return StaticCache(config=model.config, max_cache_len=16)
    except TypeError:  # 4.53 wants the batch size as well
        return StaticCache(config=model.config, max_batch_size=3, max_cache_len=16)


def check_training(model):
    ids = tokens()
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()  # a cache hands other strides to the attention kernel
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in plain.values())
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    different = [name for name, p in model.named_parameters() if not torch.equal(p.grad, plain[name])]
    assert not different, different
    model.gradient_checkpointing_disable()
    model.eval()
    model.config._attn_implementation = "eager"
    out = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 4 and len(out.hidden_states) == 5
    model.config._attn_implementation = "sdpa"


def check_files(model, directory, expected):
    again = directory.parent.parent.parent / f"again-{transformers.__version__}" / directory.name
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.resize_token_embeddings(VOCAB + 5)
    model.save_pretrained(again)
    written = json.loads((again / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == THETA
    assert {"configuration_midus.py", "lookup_midus.py", "modeling_midus.py"} <= {path.name for path in again.iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, **{DTYPE: torch.float32})
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits[..., :VOCAB], expected["logits"], **TOLERANCE)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
