"""Progressive growth of a tiny model: two Memory blocks, training, two more, training, and each export against Megatron."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from driver import train
from safetensors.torch import load_file, save_file
from test_short_journey import MEMORY, RUN, tool, write_data
from tiny_models import load_model, logits_of, write_base

from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.tensors import layer_name, split_name

pytestmark = pytest.mark.usefixtures("warm_executable")

TEXT = "a tiny text about tiny models, tokens and texts\n" * 9


def draw_memories(directory, seed=3):
    """Random values and all else of the memories: zeros would hide what they do."""
    path = directory / "model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(seed)
    for name in tensors:
        if ".memory." in name:
            tensors[name] = torch.randn(tensors[name].shape, generator=generator) * 0.3
    save_file(tensors, path, metadata={"format": "pt"})


def test_two_blocks_and_two_more(tmp_path, capfd):
    base = write_base(tmp_path / "base")
    write_data(tmp_path)

    def trained(start, layout, *verify, processes=1):
        run, export = start.with_name(f"{start.name}_run"), start.with_name(f"{start.name}_export")
        where = f"--data-path {tmp_path / 'data'} --pretrained-checkpoint {start} --save {run} --train-iters 3"
        done = train(RUN, where, layout, processes=processes, timeout=300).check()
        tool("convert", "--load", run, "--save", export, "--to", "hf", *verify)
        return export, done.out

    tool(
        "upscale",
        "--hf-model",
        base,
        "--save",
        tmp_path / "one",
        "--num-blocks",
        2,
        *MEMORY,
        "--memory-query-norm",
        "rms",
    )
    first, _ = trained(tmp_path / "one", "--memory-balance-loss-coeff 0.1 --memory-log-interval 1")
    draw_memories(first)
    capfd.readouterr()
    tool("upscale", "--hf-model", first, "--save", tmp_path / "two", "--num-blocks", 2, "--verify")
    assert "bit-equal yes" in capfd.readouterr().out
    second, said = trained(
        tmp_path / "two",
        "--tensor-model-parallel-size 2 --sequence-parallel --memory-log-interval 1 --memory-log-steps 1 "
        "--memory-revive-interval 1 --memory-dead-threshold 0.9 --memory-balance-loss-coeff 0.1",
        *("--verify", "logits"),
        processes=2,
    )
    assert "7 base (2 of them memory), 2 memory at 2, 6" in said
    revived = re.findall(r"revived dead sub-keys after iteration \d+: (.*)", said)
    assert revived and {int(block) for line in revived for block in re.findall(r"in block (\d+)", line)} <= {2, 6}

    plan, before, after = (
        UpscalePlan.load(second),
        load_file(first / "model.safetensors"),
        load_file(second / "model.safetensors"),
    )
    assert plan.base.policy == "interleave" and plan.base.num_base_layers == 5 and plan.kept_memory_indices == (4, 8)
    moved = set()
    for name, tensor in after.items():
        index, suffix = split_name(name)
        if index is None or plan.blocks[index].is_kept:
            source = name if index is None else layer_name(plan.blocks[index].source[0], suffix)
            assert torch.equal(tensor, before[source]), name
        elif "value_bank" in name:
            moved |= {index} if tensor.any() else set()
    assert moved == set(plan.new_memory_indices) == {2, 6}
    assert (logits_of(load_model(second)) - logits_of(load_model(first))).abs().max() > 0.01
    card = (second / "README.md").read_text()
    assert "up-scaled from 7 to 9 layers" in card and "has 7 blocks, made of the 5 of base with the policy" in card


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A MIDUS export with random memories that have a gate and a query norm."""
    directory = tmp_path_factory.mktemp("grown")
    base = write_base(directory / "base")
    (directory / "new.txt").write_text(TEXT)
    (directory / "old.txt").write_text("0 1 2 3 4 5 6 7 8 9; " * 30)
    texts = ["--calibration-data", directory / "new.txt", "--background-data", directory / "old.txt"]
    tool("upscale", "--hf-model", base, "--save", directory / "midus", "--save-format", "hf", "--num-blocks", 2, *MEMORY,
         "--memory-domain-gate", "--memory-key-init", "calibrated", *texts)  # fmt: skip
    draw_memories(directory / "midus")
    return directory / "midus", texts


def test_gates_and_calibrated_keys_of_the_new_blocks_alone(tmp_path, grown, capsys):
    model, texts = grown
    with pytest.raises(ValueError, match="have domain gates, and new ones need theirs"):
        tool("upscale", "--hf-model", model, "--save", tmp_path / "no", "--num-blocks", 2)
    capsys.readouterr()
    out = tmp_path / "out"
    tool("upscale", "--hf-model", model, "--save", out, "--save-format", "hf", "--insert-after", 0, 3,
         "--memory-domain-gate", *texts, "--memory-key-init", "calibrated", "--verify")  # fmt: skip
    printed = capsys.readouterr().out
    said = re.search(r"held-out tokens: (.*) \(50", printed)[1]
    assert "bit-equal yes" in printed and len(said.split(", ")) == 2  # of the new blocks alone
    plan, old, new = UpscalePlan.load(out), load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert plan.new_memory_indices == (1, 5) and plan.kept_memory_indices == (4, 8)
    for index, source in ((4, 3), (8, 6)):
        for name in ("domain_gate", "domain_gate_bias", "row_keys", "value_bank"):
            assert torch.equal(new[layer_name(index, f"memory.{name}")], old[layer_name(source, f"memory.{name}")])
    for index in plan.new_memory_indices:
        assert new[layer_name(index, "memory.domain_gate")].any()


def test_an_export_without_its_plan(tmp_path, grown, capsys):
    shutil.copytree(grown[0], tmp_path / "midus")
    (tmp_path / "midus/midus_plan.json").unlink()
    tool("upscale", "--hf-model", tmp_path / "midus", "--save", tmp_path / "out", "--save-format", "hf", "--num-blocks", 1,
         "--policy", "llama_pro", "--verify")  # fmt: skip
    assert "bit-equal yes" in capsys.readouterr().out
    assert UpscalePlan.load(tmp_path / "out").base.notes[0].startswith("read from block_types")


def test_a_plan_that_does_not_fit_its_model(tmp_path, grown):
    shutil.copytree(grown[0], tmp_path / "midus")
    content = json.loads((tmp_path / "midus/midus_plan.json").read_text())
    content["blocks"][3:5] = content["blocks"][4:2:-1]
    (tmp_path / "midus/midus_plan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="block_types of config.json and the blocks of midus_plan.json differ"):
        tool("upscale", "--hf-model", tmp_path / "midus", "--save", tmp_path / "out", "--num-blocks", 1)
    assert not (tmp_path / "out").exists()


def test_layers_of_several_kinds(tmp_path, capsys):
    """Windows and rotary embeddings follow the blocks; 16 bits are compared as written."""
    base = write_base(tmp_path / "base", "gemma3")
    tool("upscale", "--hf-model", base, "--save", tmp_path / "one", "--save-format", "hf", "--num-blocks", 2, *MEMORY)
    draw_memories(tmp_path / "one")
    capsys.readouterr()
    tool("upscale", "--hf-model", tmp_path / "one", "--save", tmp_path / "two", "--num-blocks", 3, "--verify")
    assert "bit-equal yes" in capsys.readouterr().out
    tool("convert", "--load", tmp_path / "two", "--save", tmp_path / "out", "--to", "hf", "--verify")
    tool("upscale", "--hf-model", tmp_path / "out", "--save", tmp_path / "three", "--insert-after", 0, "--dry-run")
    assert "10 -> 11 layers" in capsys.readouterr().out


def test_other_verbs(tmp_path, grown, capsys):
    """The planner takes a MIDUS model, a comparison does not."""
    # No layout fits a GPU without memory; the model is described before that.
    with pytest.raises(ValueError, match="GiB"):
        tool("plan", "--hf-model", grown[0], "--num-blocks", 1, "--gpus-per-node", 1, "--gpu-memory-gib", 1e-6)
    assert "7 -> 8 blocks, policy interleave: 134," in capsys.readouterr().out
    (tmp_path / "text.jsonl").write_text('{"text": "a tiny text"}\n')
    arms = "[{name: a, policy: interleave, num_blocks: 1}]"
    (tmp_path / "mine.yaml").write_text(
        f"base: {grown[0]}\ndata: {{train: [{{text: text.jsonl}}], new: text.jsonl}}\nbudget: {{tokens: 640}}\nlr: 1e-3\narms: {arms}\n"
    )
    with pytest.raises(ValueError, match="is a MIDUS model; arms are compared as ways to up-scale one ordinary base"):
        tool("compare", tmp_path / "mine.yaml", "--output", tmp_path / "out")
