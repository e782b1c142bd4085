"""Configurations as people's directories hold them: odd, old, with leftovers. What transformers computes of the base is
what it computes of our export, bit for bit; what cannot be kept is refused in one line before any work."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, load_model, logits_of, randomize, write_tokenizer

TOOLS = Path(__file__).parents[2] / "tools"
MEMORY = ["--num-blocks", "1", "--memory-num-keys", "9", "--memory-topk", "3", "--memory-latent-size", "5"]
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


upscale, convert = load_tool("upscale"), load_tool("convert_checkpoint")


def make_config(family="llama", **changes):
    config = {
        "architectures": [f"{ARCHITECTURES[family]}ForCausalLM"], "model_type": family, "vocab_size": VOCAB,
        "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 24, "rms_norm_eps": 1e-5, **changes,
    }  # fmt: skip
    if family == "qwen3":  # transformers would take 128
        config.setdefault("head_dim", 6)
    return {name: value for name, value in config.items() if value != "absent"}


def write(directory, config, leftovers=None):
    """A base of random weights whose config.json is ``config``, to the letter, and ``leftovers``."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    made = transformers.AutoConfig.from_pretrained(directory)
    model = randomize(transformers.AutoModelForCausalLM.from_config(made), seed=3)
    state = model.state_dict()
    if made.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory)
    logits = logits_of(load_model(directory), length=40)
    (directory / "config.json").write_text(json.dumps({**config, **(leftovers or {})}))
    return logits


def run(base, out, *arguments):
    return upscale.main(["--hf-model", str(base), "--save", str(out), "--save-format", "hf", *arguments])


def random_config(seed):
    """Entries there, absent, null or of no effect, in the names of transformers 4 or 5."""
    dice = random.Random(seed)
    family = dice.choice(list(ARCHITECTURES))

    def maybe(*values):
        return dice.choice([*values, "absent"])

    heads, groups = dice.choice([(6, 2), (6, 6), (3, 1), (2, 2)])
    changes = {
        "num_attention_heads": heads, "num_key_value_heads": groups if groups < heads or family == "mistral" else dice.choice([groups, None]),
        "hidden_size": 12 * heads, "intermediate_size": dice.choice([31, 50]), "hidden_act": maybe("silu"),
        "tie_word_embeddings": maybe(True, False), "initializer_range": maybe(0.05), "attention_dropout": maybe(0.0),
        "rms_norm_eps": maybe(1e-3), "pretraining_tp": maybe(2), "use_cache": maybe(False), "mlp_bias": maybe(False),
        "dtype": maybe("float32"), "torch_dtype": maybe("float32", "bfloat16"), "partial_rotary_factor": maybe(1.0),
        "head_dim": dice.choice([4, 10, 12]) if family == "qwen3" else maybe(4, 10),
    }  # fmt: skip
    if family in ("llama", "mistral") and dice.random() < 0.3:
        changes["head_dim"] = None
    if family == "qwen2":
        changes["attention_bias"] = maybe(True, False)  # transformers has one there whatever it says
    if family == "mistral":
        changes["sliding_window"] = maybe(None, 7)
        changes["layer_types"] = maybe(["full_attention"] * 2, ["sliding_attention"] * 2)
        if changes["layer_types"] != "absent":  # the class that transformers takes then fails without these
            changes |= {"sliding_window": 7, "head_dim": 10}
    if family.startswith("qwen"):
        changes |= {
            "use_sliding_window": maybe(False),
            "sliding_window": maybe(5, None),
            "max_window_layers": maybe(0, 1),
        }
        changes["layer_types"] = maybe(["full_attention"] * 2)
    for name in ("rope_scaling", "rope_parameters"):
        kind = dice.choice(["default", "linear", "dynamic", "yarn", "llama3"])
        rope = {dice.choice(["type", "rope_type"]): kind}
        if kind != "default":
            rope["factor"] = dice.choice([2, 3.3])
        if kind == "llama3":
            rope |= {**LLAMA3, "factor": 8.0}
        if dice.random() < 0.5:
            rope["rope_theta"] = dice.choice([500.0, 7777])
        if dice.random() < 0.3:
            rope["finetuned"] = True
        changes[name] = maybe(rope, rope, None, {})
    changes["rope_theta"] = maybe(1234.5, 5000)
    return make_config(family, **changes)


@pytest.mark.parametrize("seed", range(24))
def test_odd_configurations(tmp_path, seed):
    leftovers = {"quantization_config": QUANTISED} if seed % 3 == 0 else {}
    config = random_config(seed)
    wanted = write(tmp_path / "base", config, leftovers)
    policies = {
        "none": ["--policy", "none"],
        "midus": MEMORY,
        "llama_pro": ["--policy", "llama_pro", "--num-blocks", "1"],
    }
    for name, arguments in list(policies.items())[: 3 if seed % 4 == 0 else 2]:
        run(tmp_path / "base", tmp_path / name, *arguments)
        assert torch.equal(logits_of(load_model(tmp_path / name), length=40), wanted), name


# -- rope scaling ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments", [MEMORY, ["--policy", "llama_pro", "--num-blocks", "1"]], ids=["midus", "llama_pro"]
)
def test_old_spelling_and_unknown_entries_come_back_out_of_a_checkpoint(tmp_path, capsys, arguments):
    """Up-scaled into a checkpoint and exported: the export loads, and computes what the base computes."""
    rope = {"type": "llama3", **LLAMA3, "finetuned": True}
    wanted = write(tmp_path / "base", make_config(rope_scaling=rope, rope_theta=500.0))
    upscale.main(["--hf-model", str(tmp_path / "base"), "--save", str(tmp_path / "megatron"), *arguments])
    assert "note: finetuned of the rope scaling has no effect" in capsys.readouterr().err
    convert.main(["--load", str(tmp_path / "megatron"), "--save", str(tmp_path / "out"), "--to", "hf"])
    assert torch.equal(logits_of(load_model(tmp_path / "out"), length=40), wanted)
    assert "finetuned" not in json.loads((tmp_path / "out/config.json").read_text()).get("rope_parameters", {})


def test_checkpoint_of_an_earlier_version_with_the_old_spelling_can_be_exported(tmp_path):
    """What was up-scaled and trained before is not lost: its model_config.json holds the entry as it was spelt."""
    rope = {"type": "llama3", **LLAMA3, "finetuned": True}
    wanted = write(tmp_path / "base", make_config(rope_scaling=rope, rope_theta=500.0))
    upscale.main(["--hf-model", str(tmp_path / "base"), "--save", str(tmp_path / "megatron"), *MEMORY])
    path = tmp_path / "megatron/iter_0000000/model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": rope}))
    arguments = ["--load", str(tmp_path / "megatron"), "--save", str(tmp_path / "out"), "--to", "hf"]
    convert.main([*arguments, "--no-verify-checkpoint"])
    assert torch.equal(logits_of(load_model(tmp_path / "out"), length=40), wanted)


def test_the_entry_that_transformers_takes_is_said(tmp_path, capsys):
    config = make_config(rope_scaling={"type": "linear", "factor": 3.0}, rope_parameters={"rope_type": "default"})
    wanted = write(tmp_path / "base", config)
    run(tmp_path / "base", tmp_path / "out", *MEMORY)
    assert torch.equal(logits_of(load_model(tmp_path / "out"), length=40), wanted)
    assert "takes the place of rope_parameters" in capsys.readouterr().err


# -- an export is loaded before it is called done --------------------------------------------------------------------
@pytest.mark.parametrize("arguments", [MEMORY, ["--policy", "solar", "--num-blocks", "2"]], ids=["midus", "solar"])
@pytest.mark.parametrize("entry", [{"pad_token_id": 999_999}, {"rope_theta": "many"}], ids=str)
def test_configuration_that_transformers_cannot_load_is_refused_before_any_work(tmp_path, arguments, entry):
    write(tmp_path / "base", make_config(), entry)
    for extra in ([], ["--save-format", "megatron"]):
        with pytest.raises(ValueError) as error:
            run(tmp_path / "base", tmp_path / "out", *arguments, *extra)
        assert "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_the_class_that_transformers_takes_lacks_is_refused(tmp_path):
    """A Mistral with layer_types is a Ministral there, and that has no head size of its own."""
    wanted = write(
        tmp_path / "base", make_config("mistral", sliding_window=7), {"layer_types": ["sliding_attention"] * 2}
    )
    with pytest.raises(ValueError, match="transformers cannot load the config.json of the result"):
        run(tmp_path / "base", tmp_path / "out", "--policy", "llama_pro", "--num-blocks", "1")
    run(tmp_path / "base", tmp_path / "out", *MEMORY)  # whose configuration has all of it
    assert torch.equal(logits_of(load_model(tmp_path / "out"), length=40), wanted)


@pytest.mark.parametrize(
    "arguments", [MEMORY, ["--policy", "llama_pro", "--num-blocks", "1"]], ids=["midus", "llama_pro"]
)
def test_export_that_does_not_load_leaves_nothing(tmp_path, arguments):
    """Whatever got into the checkpoint's assets on the way: the export is refused while it is still staged."""
    write(tmp_path / "base", make_config())
    upscale.main(["--hf-model", str(tmp_path / "base"), "--save", str(tmp_path / "megatron"), *arguments])
    path = tmp_path / "megatron/iter_0000000/hf_assets/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 999_999}))
    convert_arguments = ["--load", str(tmp_path / "megatron"), "--save", str(tmp_path / "out"), "--to", "hf"]
    with pytest.raises(ValueError, match="transformers cannot load the config.json of the result"):
        convert.main([*convert_arguments, "--no-verify-checkpoint"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "megatron"]


# -- quantisation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("save_format", ["hf", "megatron"])
def test_quantization_config_left_beside_full_weights_is_dropped_aloud(tmp_path, capsys, save_format):
    wanted = write(tmp_path / "base", make_config(), {"quantization_config": QUANTISED, "transformers_weights": "model.safetensors"})  # fmt: skip
    upscale.main(["--hf-model", str(tmp_path / "base"), "--save", str(tmp_path / "up"), "--save-format", save_format, "--verify", *MEMORY])  # fmt: skip
    said = capsys.readouterr()
    assert "note: quantization_config of config.json is left out of what is written" in said.err
    assert "bit-equal yes" in said.out
    out = tmp_path / "up"
    if save_format == "megatron":
        out = tmp_path / "out"
        convert.main(["--load", str(tmp_path / "up"), "--save", str(out), "--to", "hf"])
        assert "quantization_config of config.json is left out" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & set(config)
    assert torch.equal(logits_of(load_model(out), length=40), wanted)


def fp8(state):
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    state[f"{name}_scale_inv"] = torch.ones(1, 1)


def bitsandbytes(state):
    name = "model.layers.1.self_attn.q_proj.weight"
    state[name] = torch.zeros(state[name].numel() // 2, 1, dtype=torch.uint8)
    state[f"{name}.absmax"], state[f"{name}.quant_map"] = torch.ones(20), torch.ones(16)


def gptq(state):
    weight = state.pop("model.layers.0.mlp.down_proj.weight")
    for name, kind in (("qweight", torch.int32), ("qzeros", torch.int32), ("scales", torch.float16)):
        state[f"model.layers.0.mlp.down_proj.{name}"] = torch.ones(weight.shape[0] // 2, 3, dtype=kind)


def scales_alone(state):
    state["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(50, 1)


@pytest.mark.parametrize("quantise", [fp8, bitsandbytes, gptq, scales_alone])
def test_quantised_weights_are_refused_with_a_remedy(tmp_path, quantise):
    write(tmp_path / "base", make_config(), {"quantization_config": QUANTISED})
    state = load_file(tmp_path / "base/model.safetensors")
    quantise(state)
    save_file(state, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"[Qq]uantised weights .*take the model that was quantised") as error:
        run(tmp_path / "base", tmp_path / "out", *MEMORY, "--verify")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
