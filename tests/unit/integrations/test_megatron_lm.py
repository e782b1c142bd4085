"""The hooks for upstream's pretrain(), against arguments that upstream's own parser made (megatron_lm_arguments.json)."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys

import megatron_lm_processes as processes
import pytest
import torch
from launcher import launch
from upscaled import write_upscaled

from megatron_midus.checkpoint.layout import iteration_directory, write_latest_iteration
from megatron_midus.config import ModelConfig
from megatron_midus.integrations import megatron_lm
from megatron_midus.upscaling import UpscalePlan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is not None,
    reason="the record is of core_v0.16.1; where upstream itself is installed tests/functional/test_upstream.py runs it",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_upscaled(tmp_path_factory.mktemp("up") / "model")


@pytest.fixture(scope="module")
def plan(root):
    return UpscalePlan.load(iteration_directory(root, 0))


@pytest.fixture(scope="module")
def built(root):
    return launch(processes.build_both, 1, root)[0]


# -- model -----------------------------------------------------------------------------------------------------------
def test_layers_follow_the_plan(built, plan):
    assert built["kinds"] == list(plan.block_types) == ["transformer", "memory", "transformer"]
    assert built["indices"] == [0, 1, 2]


def test_parameters_are_those_of_the_driver(built, plan):
    assert built["shapes"] == built["own"]["shapes"]
    # --make-vocab-size-divisible-by 8 pads 101 rows to 104.
    assert built["shapes"]["embedding.word_embeddings.weight"][0] == built["rows"] == 104
    inserted = tuple(f"decoder.layers.{index}." for index in plan.inserted_indices)
    assert built["trainable"] == [name for name in built["shapes"] if name.startswith(inserted)]


def test_loss_is_that_of_the_drivers_model(built):
    assert torch.equal(built["loss"], built["own_loss"])
    assert torch.isfinite(built["fresh"]).all() and not torch.equal(built["fresh"], built["loss"])


def test_the_checkpoint_holds_all_that_upstreams_loader_asks_for(built):
    assert built["missing"] == []


def test_gradients_reach_the_inserted_blocks_alone(built):
    assert set(built["gradients"]) == set(built["trainable"])
    assert all(value > 0 for value in built["gradients"].values())


def test_spec_for_upstreams_own_builder(root, built):
    (found,) = launch(processes.build_by_spec, 1, root)
    assert found["kinds"] == built["kinds"] and set(found["shapes"]) == set(built["shapes"])
    # gpt_builder does not mask the rows that pad the vocabulary. fp32, another implementation of the softmax.
    assert torch.allclose(found["loss"], found["own_loss"], atol=1e-5)
    assert found["trainable"] == list(found["shapes"])


def test_optimizer_groups(root):
    (groups,) = launch(processes.param_groups, 1, root)
    values = next(g for g in groups if any(name.endswith(".value_bank") for name in g["names"]))
    assert [name.rsplit(".", 1)[1] for name in values["names"]] == ["value_bank"]
    assert (values["wd_mult"], values["max_lr"], values["min_lr"], values["lr_mult"]) == (0.0, 3.5, 1.75, 7.0)
    others = [g for g in groups if g is not values]
    assert all((g["max_lr"], g["min_lr"], g["lr_mult"], g["default_config"]) == (0.5, 0.25, 1.0, True) for g in others)
    without_decay = {name.rsplit(".", 1)[1] for g in others if g["wd_mult"] == 0.0 for name in g["names"]}
    assert without_decay == {"weight", "query_norm"}  # weight: of the norm
    decayed = {name.rsplit(".", 1)[1] for g in others if g["wd_mult"] == 1.0 for name in g["names"]}
    assert decayed == {"weight", "row_keys", "col_keys", "head_proj"}  # weight: of linear_qkv


MISTAKES = {
    "layers": ("provider", {"num_layers": 2}, r"num_layers=2 contradicts .*num_layers=3; leave the flag out"),
    "norm": ("provider", {"normalization": "LayerNorm"}, "normalization=LayerNorm contradicts .*RMSNorm"),
    "rotary base": ("provider", {"rotary_base": 500}, "rotary_base=500 contradicts"),
    "format": ("provider", {"ckpt_format": "torch"}, "ckpt_format=torch contradicts"),
    "experts": ("provider", {"num_experts": 4}, "num_experts=4 is not supported"),
    "FSDP": ("provider", {"use_megatron_fsdp": True}, "use_megatron_fsdp=True is not supported"),
    "tokenizer": ("provider", {"padded_vocab_size": 112}, "padded_vocab_size=112 rows and the embedding has 104"),
    "no model": ("provider", {"midus_model": None}, "give --midus-model DIR"),
    "nowhere": ("provider", {"midus_model": "nowhere"}, "checkpoint directory nowhere does not exist"),
    "backend": ("provider", {"transformer_impl": "inference_optimized"}, "'inference_optimized' is not known"),
    "checkpoints": ("provider", {"hetereogenous_dist_checkpoint": False}, "hetereogenous_dist_checkpoint must be on"),
    "spec freezes": ("spec", {"train": "inserted"}, "train=inserted freezes parameters, which --spec cannot"),
    "spec by default": ("spec", {}, "which --spec cannot"),
    "spec, chunks": ("spec", {"train": "all", "virtual_pipeline_model_parallel_size": 2}, "virtual pipeline stages"),
}


def test_mistakes(root):
    found = launch(processes.errors, 1, root, [case[:2] for case in MISTAKES.values()])[0]
    for (_, _, message), text in zip(MISTAKES.values(), found):
        assert re.search(message, text), text
        assert "\n" not in text


# -- arguments -------------------------------------------------------------------------------------------------------
def parse(arguments, monkeypatch):
    """Through a parser with some of upstream's flags."""
    monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, arguments)])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--normalization", default="LayerNorm")
    parser.add_argument("--load")
    parser.add_argument("--pretrained-checkpoint")
    return megatron_lm.extra_args_provider(parser).parse_args()


@pytest.mark.parametrize("flag", ["--midus-model", "--pretrained-checkpoint", "--load"])
def test_the_checkpoint_gives_the_architecture(root, plan, monkeypatch, flag):
    arguments = parse([flag, root], monkeypatch)
    expected = megatron_lm.architecture_arguments(ModelConfig.load(iteration_directory(root, 0)), plan)
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert arguments.num_layers == 3 and arguments.normalization == "RMSNorm" and not arguments.add_bias_linear
    assert arguments.hetereogenous_dist_checkpoint and arguments.train is None and arguments.value_lr_mult == 10.0


def test_without_a_checkpoint_upstreams_defaults_stay(monkeypatch, tmp_path):
    assert parse([], monkeypatch).normalization == "LayerNorm"
    # The first run of a job that always gives --load finds nothing there yet.
    assert parse(["--load", tmp_path / "later"], monkeypatch).num_layers is None


def test_the_record_is_what_the_hooks_ask_for(root, plan):
    """Upstream's parser took every default of ours, and kept its type through its own checks."""
    recorded = processes.recorded("arguments", root)
    expected = megatron_lm.architecture_arguments(ModelConfig.load(iteration_directory(root, 0)), plan)
    assert {name: recorded[name] for name in expected} == expected
    assert json.loads(processes.RECORD.read_text())["megatron_lm"] == "core_v0.16.1" and len(recorded) > 600


def test_rope_scaling_and_window():
    model = ModelConfig(
        num_layers=3, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        vocab_size=101, max_position_embeddings=64, sliding_window=9, tie_word_embeddings=True,
        rope_scaling={"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    plan = argparse.Namespace(num_layers=3)
    found = megatron_lm.architecture_arguments(model, plan)
    assert found["use_rope_scaling"] and found["rope_scaling_factor"] == 32.0 and found["window_size"] == (8, 0)
    assert not found["untie_embeddings_and_output_weights"]


# -- checkpoints -----------------------------------------------------------------------------------------------------
def test_upstreams_checkpoints_are_completed(root, tmp_path):
    for iteration, complete in ((5, True), (10, True), (15, False)):
        iteration_directory(tmp_path, iteration).mkdir()
        if complete:
            (iteration_directory(tmp_path, iteration) / "metadata.json").write_text("{}")
    done = megatron_lm.complete_checkpoints(tmp_path, root)
    assert done == [iteration_directory(tmp_path, 5), iteration_directory(tmp_path, 10)]
    source = iteration_directory(root, 0)
    assert UpscalePlan.load(done[0]) == UpscalePlan.load(source) and ModelConfig.load(done[1]) == ModelConfig.load(
        source
    )
    assert megatron_lm.complete_checkpoints(tmp_path, root) == []


def test_a_checkpoint_of_another_plan_is_not_resumed(root, tmp_path):
    other = write_upscaled(tmp_path / "other", insert_after=(1,))
    megatron_lm.complete_checkpoints(other, other)
    arguments = argparse.Namespace(**processes.recorded("arguments", root))
    arguments.load = str(other)
    with pytest.raises(ValueError, match="the plan of .* differs from that of --load .*: block 1"):
        megatron_lm.check_arguments(arguments, megatron_lm.find_upscaled(arguments))
    write_latest_iteration(tmp_path, 3)  # a root whose checkpoint is gone
    arguments.load = str(tmp_path)
    with pytest.raises(ValueError, match="iter_0000003 does not exist"):
        megatron_lm.check_arguments(arguments, megatron_lm.find_upscaled(arguments))


def test_without_upstream_one_line_says_where_to_get_it():
    program = """
import sys
sys.modules["megatron.training"] = None
from megatron_midus.integrations import megatron_lm
try:
    megatron_lm.model_provider()
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert "github.com/NVIDIA/Megatron-LM, tag core_v0.16.1" in done.stdout and done.stdout.count("\n") == 1
