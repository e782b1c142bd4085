"""The whole way on a tiny model: base, up-scaled model, two starts of training on two ranks, export, and its logits."""

from __future__ import annotations

import re

import numpy
import pytest
import torch
from driver import train
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from safetensors.torch import load_file
from tiny_models import load_model, logits_of, write_base
from upscaled import read_tensors

from megatron_midus import command
from megatron_midus.errors import UserError

pytestmark = pytest.mark.usefixtures("warm_executable")

RUN = (
    "--distributed-backend gloo --seq-length 16 --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant "
    "--num-workers 0 --split 100,0,0 --eval-interval 0 --eval-iters 0 --log-interval 1 --override-opt_param-scheduler"
)


def tool(name: str, *arguments: object) -> None:
    _, main = command.tool(name)
    assert not main([str(argument) for argument in arguments])


MEMORY = ["--memory-num-keys", "8", "--memory-topk", "3", "--memory-latent-size", "6"]


def write_data(tmp_path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=numpy.uint16)
    random = numpy.random.default_rng(3)
    for _ in range(20):
        builder.add_document(random.integers(0, 260, 50), [50])
    builder.finalize(str(tmp_path / "data.idx"))


def test_the_whole_way(tmp_path):
    base = write_base(tmp_path / "base")
    tool("upscale", "--hf-model", base, "--save", tmp_path / "up", "--policy", "interleave", "--num-blocks", 2, *MEMORY)
    write_data(tmp_path)
    saved = tmp_path / "run"
    where = f"--data-path {tmp_path / 'data'} --pretrained-checkpoint {tmp_path / 'up'} --load {saved} --save {saved}"
    tensor = "--tensor-model-parallel-size 2 --sequence-parallel"
    first = train(RUN, where, tensor, "--train-iters 3", processes=2, timeout=300).check()
    averaged = "--train-iters 5 --use-distributed-optimizer --ema-decay 0.9"
    second = train(RUN, where, tensor, averaged, processes=2, timeout=300).check()
    assert "begins with the current weights" in second.out and "has none" in second.out
    assert list(first.losses) == [1, 2, 3] and list(second.losses) == [4, 5]

    tool("convert", "--load", tmp_path / "up", "--save", tmp_path / "untrained", "--to", "hf")
    tool("convert", "--load", saved, "--save", tmp_path / "trained", "--to", "hf", "--verify", "logits")
    ema = ("convert", "--load", saved, "--to", "hf", "--weights", "ema", "--save", tmp_path / "averaged")
    tool(*ema, "--verify", "tensors")
    check_averages(saved, tmp_path / "trained", tmp_path / "averaged")
    with pytest.raises(UserError, match="iter_0000003 holds no average of weights; train with --ema-decay"):
        tool(*ema, "--ckpt-step", 3, "--overwrite")
    before, untrained, trained = (logits_of(load_model(tmp_path / name)) for name in ("base", "untrained", "trained"))
    # A value bank of zeros adds zeros.
    torch.testing.assert_close(untrained, before, rtol=0, atol=1e-5)
    assert (trained - before).abs().max() > 0.01
    assert "5 iterations on 320 tokens" in (tmp_path / "trained/README.md").read_text()


def check_averages(saved, trained, averaged) -> None:
    """Tensors of an export of averages: those of the checkpoint; where nothing learns, the weights."""
    stored, last, ema = read_tensors(saved, 5), *(load_file(each / "model.safetensors") for each in (trained, averaged))
    assert last.keys() == ema.keys()
    different = {name for name in last if not torch.equal(last[name], ema[name])}
    memories = {name.split(".")[2] for name in last if ".memory." in name}
    assert different == {name for name in last if name.startswith(tuple(f"model.layers.{i}." for i in memories))}
    for index in memories:
        for ours, theirs in (("row_keys", "row_keys"), ("value_bank", "values")):
            key = f"ema.decoder.layers.{index}.self_attention.linear_proj.{theirs}"
            assert torch.equal(ema[f"model.layers.{index}.memory.{ours}"], stored[key])


def whole_way(tmp_path, family: str, layout: str):
    """Base, up-scaled model, three steps on two ranks, export, evaluation, text: ``(what training printed, base, trained)``."""
    base = write_base(tmp_path / "base", family)
    tool("upscale", "--hf-model", base, "--save", tmp_path / "up", "--num-blocks", 2, *MEMORY, "--verify")
    write_data(tmp_path)
    where = f"--data-path {tmp_path / 'data'} --pretrained-checkpoint {tmp_path / 'up'} --save {tmp_path / 'run'}"
    run = train(RUN, where, f"--train-iters 3 {layout}", processes=2, timeout=300).check()
    tool("convert", "--load", tmp_path / "run", "--save", tmp_path / "trained", "--to", "hf", "--verify", "logits")
    before, after = load_model(base), load_model(tmp_path / "trained")
    assert (logits_of(after) - logits_of(before)).abs().max() > 0.01
    (tmp_path / "text.jsonl").write_text('{"text": "a tiny text about tiny models, tokens and texts"}\n' * 9)
    tool("evaluate", "--model", base, tmp_path / "trained", "--data", tmp_path / "text.jsonl", "--seq-length", 32)
    tool("generate", "--model", tmp_path / "trained", "--prompt", "a tiny", "--generate-tokens", 5)
    return run.out, before, after


def test_the_whole_way_of_a_mixture_of_experts(tmp_path, capfd):
    """Two processes share the experts of a Qwen3-MoE."""
    out, before, after = whole_way(tmp_path, "qwen3_moe", "--expert-model-parallel-size 2")
    assert "bit-equal yes" in capfd.readouterr().out
    assert "experts: 6 of 24 channels in each of 5 blocks, 3 per token, shared by 2 processes" in out
    assert "routers: 5 routers are frozen: no gradient, no load-balancing loss" in out
    # The first Memory block follows block 2: those before it are where they were, and as they were.
    for number, source in ((0, 0), (1, 1)):
        for name, tensor in before.model.layers[source].mlp.state_dict().items():
            assert torch.equal(after.model.layers[number].mlp.state_dict()[name], tensor), name


def test_the_log_has_the_load_balancing_loss(tmp_path):
    """Where routers learn: the mean since the last line, whichever pipeline stage has them."""
    base = write_base(tmp_path / "base", "qwen3_moe")
    tool("upscale", "--hf-model", base, "--save", tmp_path / "up", "--num-blocks", 1, *MEMORY)
    write_data(tmp_path)
    words = f"--data-path {tmp_path / 'data'} --pretrained-checkpoint {tmp_path / 'up'} --train-iters 2 --train all "
    words += "--moe-aux-loss-coeff 0.01 --no-calculate-per-token-loss"

    def logged(run):
        return [float(number) for number in re.findall(r"\| load_balancing_loss: (\S+)", run.check().out)]

    alone = logged(train(RUN, words, timeout=300))
    staged = logged(train(RUN, words, "--log-interval 2 --pipeline-model-parallel-size 2", processes=2, timeout=300))
    assert len(alone) == 2 and alone[0] != alone[1] and all(1 < number < 2 for number in alone)
    assert staged == pytest.approx([sum(alone) / 2], rel=1e-5)
    frozen = train(RUN, words.replace("--train all", "--train inserted"), timeout=300)
    assert logged(frozen) == []


def test_the_whole_way_of_gemma_3(tmp_path, capfd):
    """Norms on both sides of a branch, windows in most layers, two rotary embeddings, on two tensor-parallel ranks."""
    layout = "--tensor-model-parallel-size 2 --sequence-parallel"
    _, before, after = whole_way(tmp_path, "gemma3", layout)
    assert "bit-equal yes" in capfd.readouterr().out
    kinds = [after.config.layer_types[index] for index, kind in enumerate(after.config.block_types) if kind != "memory"]
    assert kinds == before.config.layer_types
