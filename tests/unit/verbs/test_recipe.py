"""Recipes: every flag exists and fits, they shrink, the planner agrees with their layout, README and docs with their memory."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import megatron_midus
from megatron_midus import command
from megatron_midus.config.recipe import STEPS, name_of, read_recipe, recipe_names
from megatron_midus.errors import UserError
from megatron_midus.progress import SILENT
from megatron_midus.training.arguments import parse_arguments
from megatron_midus.verbs.plan import driver_flags

ROOT = Path(__file__).parents[3]
MODELS = ("llama3.2_1b", "llama3.1_8b", "qwen3_4b")


def rope(factor: float) -> dict:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def config(hidden: int, ffn: int, layers: int, head: int, **more) -> dict:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 5e5, "torch_dtype": "bfloat16", "num_attention_heads": 32,
        "num_key_value_heads": 8, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "head_dim": head,
        "bos_token_id": 0, "eos_token_id": 1, "attention_bias": False, **more,
    }  # fmt: skip


# What the config.json of the three bases say of their shapes.
SHAPES = {
    "llama3.2_1b": config(2048, 8192, 16, 64, tie_word_embeddings=True, rope_scaling=rope(32.0)),
    "llama3.1_8b": config(4096, 14336, 32, 128, tie_word_embeddings=False, rope_scaling=rope(8.0)),
    "qwen3_4b": config(
        2560, 9728, 36, 128, model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=151936,
        max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", recipe_names())
def test_every_flag_of_every_recipe_is_one_of_its_step(name, tiny):
    calls = megatron_midus.recipe(action="show", recipe=name, tiny=tiny, progress=SILENT)
    assert [call.verb for call in calls] == ["preprocess", *STEPS]
    for call in calls:
        if call.verb == "pretrain":
            parse_arguments(call.words)
        else:
            command.parse(call.verb, call.words)
        assert not re.search(r"\{\w+\}", call.typed())


def test_there_is_a_recipe_for_every_directory_of_scripts():
    assert set(recipe_names()) == {*MODELS, "tiny_base"}
    assert {path.parent.name for path in ROOT.glob("examples/*/03_cpt.sh")} == set(MODELS)
    assert name_of("mine/qwen3_4b.yaml") == "qwen3_4b" and name_of("llama3.2_1b") == "llama3.2_1b"


@pytest.mark.parametrize("name", MODELS)
def test_the_planner_ranks_the_layout_of_the_recipe_first(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]))
    recipe = read_recipe(name)
    memory = {key: value for key, value in recipe.upscale.items() if key.startswith(("memory_", "num_", "policy"))}
    found = megatron_midus.plan(
        hf_model=tmp_path, nodes=recipe.cluster.nodes, gpus_per_node=recipe.cluster.gpus_per_node,
        hardware=recipe.cluster.hardware, seq_length=recipe.pretrain["seq_length"],
        global_batch_size=recipe.pretrain["global_batch_size"], train=recipe.pretrain["train"], progress=SILENT, **memory,
    )  # fmt: skip
    first = parse_arguments(MINIMAL + [word for flag in driver_flags(found.fitting[0]) for word in shlex.split(flag)])
    ours = parse_arguments(pretrain_words(name))
    assert first.parallel == ours.parallel
    assert first.training.micro_batch_size == ours.training.micro_batch_size


MINIMAL = [
    "--pretrained-checkpoint",
    "x",
    "--mock-data",
    "--seq-length",
    "4096",
    "--train-iters",
    "1907",
    "--lr",
    "1e-3",
    "--bf16",
]


def pretrain_words(name: str) -> list[str]:
    (call,) = megatron_midus.recipe(action="show", recipe=name, step="pretrain", progress=SILENT)
    return call.words


def test_pages_up_scale_llama_as_its_recipe_does():
    """Whole commands for Llama-3.2-1B in README and docs: the same memory, and no tensor parallelism."""
    wanted = read_recipe("llama3.2_1b").upscale
    pages = [ROOT / "README.md", ROOT / "docs" / "megatron_lm.md"]
    commands = [
        text.replace("\\\n", " ")
        for page in pages
        for text in re.findall(
            r"upscale(?:\.py)? [^`]*?--hf-model \S*Llama-3\.2-1B(?:[^\n]*\\\n)*[^\n]*", page.read_text()
        )
    ]
    assert commands
    for text in commands:
        for flag in ("num_blocks", "memory_num_keys", "memory_topk", "memory_latent_size", "memory_query_norm"):
            assert f"--{flag.replace('_', '-')} {wanted[flag]}" in text, text
    (training,) = re.findall(r"torchrun (?:[^\n]*\\\n)*[^\n]*", pages[0].read_text())
    assert "model-parallel" not in training and "--use-distributed-optimizer" in training


def test_one_layer_of_entries_wins_over_another(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "title: Mine\nbase: a/b\nupscale: {num_blocks: 3, memory_query_norm: null}\ncluster: {}\n"
    )
    mine = read_recipe(str(tmp_path / "mine.yaml"))
    assert mine.upscale["num_blocks"] == 3 and "memory_query_norm" not in mine.upscale
    assert mine.upscale["policy"] == "interleave"
    assert read_recipe("llama3.2_1b", tiny=True).upscale["num_blocks"] == 2


def test_flags_of_the_command_line_win():
    parsed = command.parse(
        "recipe", ["run", "qwen3_4b", "--step", "pretrain", "--flags", "--lr", "5e-4", "--save-interval", "7"]
    )
    assert parsed.flags == ["--lr", "5e-4", "--save-interval", "7"]
    (call,) = megatron_midus.recipe(
        action="show", recipe="qwen3_4b", step="pretrain", flags=parsed.flags, train_iters=5, progress=SILENT
    )
    arguments = parse_arguments(call.words)
    assert arguments.optimizer.lr == 5e-4 and arguments.training.train_iters == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "llama3.2_2b"}, r"there is no recipe 'llama3.2_2b'; did you mean llama3.2_1b\?"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml is not a file"),
        ({"recipe": "qwen3_4b", "flags": ["--lr", "1"]}, "--flags --lr needs --step"),
        ({"recipe": "qwen3_4b", "step": "upscale"}, r"does not exist; get it with: hf download Qwen/Qwen3-4B-Base --local-dir"),
    ],
)  # fmt: skip
def test_mistakes_are_named(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        megatron_midus.recipe(action="run", work=tmp_path, progress=SILENT, **settings)


def test_the_quickstart_reports_on_the_memories():
    pretrain = read_recipe("tiny_base").pretrain
    assert 0 < pretrain["memory_log_interval"] <= pretrain["train_iters"]
