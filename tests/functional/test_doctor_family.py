"""``midus doctor --family`` names the module in which a family that is described wrongly differs first."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import transformers
from tiny_models import write_base

from megatron_midus import command
from megatron_midus.config import ModelConfig
from megatron_midus.conversion.families import FAMILIES
from megatron_midus.conversion.stored import Rule
from megatron_midus.verbs import family as verbs_family
from megatron_midus.verbs.family import check_family

pytestmark = pytest.mark.usefixtures("warm_executable")

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {name: write_base(directory / name, name) for name in ARCHITECTURES}


def settings(**changes):
    """A fault: a family whose file says something else."""
    return lambda family: dataclasses.replace(family, settings=lambda config: {**family.settings(config), **changes})


def swapped(family):
    qkv, _ = family.stored
    gate_up = Rule("mlp.gate_up_proj.weight", ("mlp.up_proj.weight", "mlp.gate_proj.weight"))
    return dataclasses.replace(family, stored=(qkv, gate_up))


def plant(monkeypatch, name, fault):
    """Puts the family that a directory's config names in the place of the right one."""
    name = next(known for known, family in FAMILIES.items() if family.architecture == ARCHITECTURES[name])
    monkeypatch.setitem(FAMILIES, name, fault(FAMILIES[name]))


def doctor(directory, capsys):
    capsys.readouterr()
    code = command.do("doctor", ["--family", str(directory)])
    return code, capsys.readouterr().out


FAULTS = [
    ("llama", settings(rotary_base=10000.0), "model.rotary_emb", "rotary_base"),
    ("llama", settings(attention_scale=0.3), "model.layers.0.self_attn.o_proj:input", "attention_scale"),
    ("llama", settings(hidden_act="gelu_tanh"), "model.layers.0.mlp.act_fn", "hidden_act"),
    ("llama", settings(norm_epsilon=0.05), "model.layers.0.input_layernorm", "norm_epsilon"),
    ("llama", settings(logits_divisor=1.01), "logits", "logits_divisor"),
    ("phi3", swapped, "model.layers.0.mlp.down_proj:input", "gate and up"),
    ("granite", settings(embedding_multiplier=1.0), "model.layers.0:input", "embedding_multiplier"),
    (
        "granite",
        settings(residual_multiplier=1.0),
        "model.layers.0.post_attention_layernorm:input",
        "residual_multiplier",
    ),
    ("gemma2", settings(attention_softcap=None), "model.layers.0.self_attn.o_proj:input", "attention_softcap"),
    ("gemma2", settings(logits_softcap=None), "logits", "logits_softcap"),
    ("gemma3", settings(zero_centered_norm=False), "model.layers.0.input_layernorm", "zero_centered_norm"),
    ("gemma3", settings(local_rotary_base=None), "model.layers.0.self_attn.o_proj:input", "rotary_base"),
    (
        "gemma3",
        settings(sliding_layers=[True, True, True, True, True]),
        "model.layers.2.self_attn.o_proj:input",
        "sliding_layers",
    ),
]


@pytest.mark.parametrize(("name", "fault", "module", "cause"), FAULTS)
def test_a_planted_fault_is_named(models, monkeypatch, name, fault, module, cause):
    plant(monkeypatch, name, fault)
    difference = check_family(models[name], with_megatron=False).differences["Hugging Face model"]
    assert difference.name == module and cause in difference.cause, difference.describe()
    assert difference.largest > verbs_family.TOLERANCE * difference.sigma and difference.equal > 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "granite", "gemma2", "gemma3", "olmo2", "qwen3_moe"])
def test_families_as_they_are(models, name):
    report = check_family(models[name], with_megatron=False)
    assert report.differences == {"Hugging Face model": None} and report.modules["Hugging Face model"] > 30


@pytest.mark.parametrize(
    ("name", "fault", "tensor"),
    [
        ("qwen3", settings(qk_layernorm=False), "model.layers.0.self_attn.k_norm.weight"),
        ("olmo2", settings(norm_placement="both"), "model.layers.0.input_layernorm.weight"),
        ("llama", settings(add_qkv_bias=True), "model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_tensor_of_one_side_is_named(models, monkeypatch, name, fault, tensor):
    plant(monkeypatch, name, fault)
    with pytest.raises(ValueError, match=f"describes other tensors than transformers: .*{tensor}") as caught:
        check_family(models[name])
    assert "\n" not in str(caught.value)


def test_weights_that_are_absent(models, tmp_path, capsys):
    """Of a shape as large as Llama-3.1-8B's; Megatron computes the same, and a fault of its own is named."""
    config = json.loads((models["gemma3"] / "config.json").read_text())
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config |= {**sizes, "num_hidden_layers": 12, "layer_types": kinds * 2, "head_dim": 16, "vocab_size": 262144}
    (tmp_path / "large").mkdir()
    (tmp_path / "large/config.json").write_text(json.dumps(config))
    code, printed = doctor(tmp_path / "large", capsys)
    assert code == 0 and "weights: random, 6 layers of 64 channels" in printed, printed
    assert "Megatron model      70 modules agree with transformers" in printed

    def broken(directory, ids):
        model = ModelConfig.load(directory)
        dataclasses.replace(model, local_rotary_base=9000.0).save(directory)
        return original(directory, ids)

    original = verbs_family.megatron_states
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbs_family, "megatron_states", broken)
        code, printed = doctor(models["gemma3"], capsys)
    assert (
        code == 1 and "PROBLEM  Megatron model      differs first at model.layers.0.self_attn.o_proj:input" in printed
    )
    assert "ok       Hugging Face model" in printed


def test_a_family_that_nobody_knows(models, tmp_path):
    shutil.copytree(models["llama"], tmp_path / "new")
    config = json.loads((tmp_path / "new/config.json").read_text())
    (tmp_path / "new/config.json").write_text(json.dumps({**config, "architectures": ["NewForCausalLM"]}))
    with pytest.raises(ValueError, match="architecture NewForCausalLM is not supported"):
        command.do("doctor", ["--family", str(tmp_path / "new")])


# -- the walk-through of docs/extending.md ---------------------------------------------------------------------------
@pytest.fixture
def seed_oss(tmp_path, monkeypatch):
    """A directory of that class with random weights, and the family that the page writes, not yet registered."""
    page = (Path(__file__).parents[2] / "docs/extending.md").read_text()
    block = re.search(r"   ```python\n(.*?)   ```", page[page.index("### A family in an hour") :], re.DOTALL)[1]
    written: dict = {}
    exec(textwrap.dedent(block), written)
    (tmp_path / "seed").mkdir()
    config = {
        "architectures": ["SeedOssForCausalLM"],
        "model_type": "seed_oss",
        "hidden_act": "silu",
        "vocab_size": 263,
    }
    config |= {"hidden_size": 512, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 6}
    config |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "attention_out_bias": True,
    }
    config |= {"pad_token_id": 1, "rope_theta": 5000.0}
    (tmp_path / "seed/config.json").write_text(json.dumps(config))
    return tmp_path / "seed", written["FAMILY"], page


@pytest.mark.skipif(not hasattr(transformers, "SeedOssForCausalLM"), reason="transformers has it since 4.56")
def test_the_walk_through(seed_oss, monkeypatch):
    directory, family, page = seed_oss

    def said(family):
        monkeypatch.setitem(FAMILIES, "seed_oss", family)
        return check_family(directory, with_megatron=False).differences["Hugging Face model"]

    with pytest.raises(ValueError, match="architecture SeedOssForCausalLM is not supported"):
        check_family(directory)
    without_bias = dataclasses.replace(
        family, settings=lambda config: {**family.settings(config), "add_qkv_bias": False}
    )
    with pytest.raises(
        ValueError, match=r"other tensors than .*: model.layers.0.self_attn.k_proj.bias is \(.*\) there and None"
    ):
        said(without_bias)
    no_size = {name: value for name, value in family.defaults.items() if name != "head_dim"}
    with pytest.raises(ValueError, match=r"k_proj.bias is \(.*,\) there and \(.*,\) here"):
        said(dataclasses.replace(family, defaults=no_size))
    theta = dataclasses.replace(family, settings=lambda config: {**family.settings(config), "rotary_base": 9000.0})
    assert said(theta).name == "model.rotary_emb"
    assert said(family) is None
    for words in (
        "k_proj.bias is (…) there and None here",
        "k_proj.bias is (…) there and (…) here",
        "model.rotary_emb",
    ):
        assert words in page[page.index("| forgotten | said |") :]
