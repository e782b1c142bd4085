"""tools/plan.py: a table, flags that the driver understands, JSON, and clear refusals."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from megatron_midus.config import MemoryConfig
from megatron_midus.conversion.families import from_hf_config
from megatron_midus.model.config import check_expert_parallel
from megatron_midus.training.architecture import Architecture
from megatron_midus.training.arguments import parse_arguments
from megatron_midus.training.checks import check_experts
from megatron_midus.upscaling import make_plan

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import plan as tool

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MIDUS = ["--num-blocks", "8", "--memory-num-keys", "512", "--memory-topk", "16", "--memory-latent-size", "64"]


# Qwen3-30B-A3B
EXPERTS = {
    **CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


@pytest.fixture
def base(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_a_table_flags_and_json(base, tmp_path, capsys):
    out = tmp_path / "layouts.json"
    small = ["--nodes", "2", "--gpu-memory-gib", "24", "--ema-decay", "0.999", "--l2-to-start", "1"]
    assert tool.main(["--hf-model", base, *MIDUS, *small, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "16 -> 24 blocks" in shown and "copies" in shown and "s/step" in shown
    layouts = json.loads(out.read_text())
    assert layouts[0]["fits"] and layouts[0]["memory"]["total"] < 24 * 2**30
    assert all(flag.split()[0] in shown for flag in layouts[0]["flags"])


def test_the_flags_are_the_drivers(base, tmp_path):
    out = tmp_path / "layouts.json"
    tool.main(["--hf-model", base, *MIDUS, "--nodes", "2", "--json", str(out), "--train", "all"])
    for layout in json.loads(out.read_text()):
        words = shlex.split(" ".join(layout["flags"]))
        parsed = parse_arguments([*words, "--lr", "1", "--train-iters", "1", "--mock-data", "--seq-length", "4096"])
        parallel = parsed.parallel
        assert parallel.tensor_model_parallel_size == layout["layout"]["tensor"]
        assert parallel.pipeline_model_parallel_size == len(layout["layout"]["stages"])


def test_a_mixture_of_experts(tmp_path, capsys):
    """Every layout is one that the driver takes; experts are shared where they would not fit otherwise."""
    (tmp_path / "config.json").write_text(json.dumps(EXPERTS))
    out = tmp_path / "layouts.json"
    assert tool.main(["--hf-model", str(tmp_path), *MIDUS, "--train", "all", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "active for a token (8 of 128 experts)" in shown and " EP " in shown
    config = json.loads((tmp_path / "config.json").read_text())
    plan = make_plan("interleave", num_layers=48, num_blocks=8, memory=MemoryConfig(memory_num_keys=512))
    model = from_hf_config(config)
    architecture = Architecture(plan.applied_to(model), plan, "all", None)
    layouts = json.loads(out.read_text())
    common = ["--lr", "1", "--train-iters", "1", "--mock-data", "--seq-length", "4096"]
    for layout in layouts:
        arguments = parse_arguments([*shlex.split(" ".join(layout["flags"])), *common])
        parallel = arguments.parallel
        check_experts(arguments, architecture, 8)
        check_expert_parallel(
            model,
            parallel.expert_model_parallel_size,
            parallel.expert_tensor_parallel_size,
            tensor_parallel=parallel.tensor_model_parallel_size,
        )
    sizes = {layout["layout"]["expert"] for layout in layouts}
    assert sizes == {1, 2, 4, 8}
    # 30.5 billion parameters of 18 bytes fill eight GPUs of 80 GiB: where all of them hold all layers, experts must be shared.
    whole = [layout for layout in layouts if layout["fits"] and len(layout["layout"]["stages"]) == 1]
    assert whole and all(layout["layout"]["expert"] > 1 or layout["layout"]["tensor"] == 8 for layout in whole)


WRONG = [
    (["--nodes", "0"], "--nodes 0"),
    (["--nodes", "31", "--global-batch-size", "3"], "divides a global batch of 3"),
    (["--gpu-memory-gib", "1"], "nothing fits into 1 GiB"),
    (["--gpu-memory-gib", "-1"], "--gpu-memory-gib -1"),
    (["--kl-to-base", "-1"], "kl_to_base=-1.0 must be 0"),
    (["--kl-to-base", "1", "--train", "all"], "kl_to_base=1 needs the base as it was"),
    (["--ema-decay", "1"], "ema_decay=1.0 must be above 0 and below 1"),
    (["--l2-to-start", "-1"], "l2_to_start=-1.0 must not be negative"),
    (["--policy", "none"], "nothing would be trained"),
    (["--policy", "solar", "--memory-topk", "3"], "--memory-topk"),
    (["--num-blocks", "99"], "num_blocks=99"),
]


@pytest.mark.parametrize("changes, words", WRONG)
def test_refusals(base, changes, words):
    blocks = [] if any(flag in changes for flag in ("--policy", "--num-blocks")) else MIDUS
    if "solar" in changes:
        blocks = ["--num-blocks", "2"]
    with pytest.raises(ValueError) as caught:
        tool.main(["--hf-model", base, *blocks, *changes])
    assert words in str(caught.value) and "\n" not in str(caught.value)
