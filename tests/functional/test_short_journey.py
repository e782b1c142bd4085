"""The whole way on a tiny model: base, up-scaled model, two starts of training on two ranks, export, and its logits."""

from __future__ import annotations

import numpy
import torch
from driver import train
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tiny_models import load_model, logits_of, write_base

from megatron_midus import command

RUN = (
    "--distributed-backend gloo --seq-length 16 --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant "
    "--num-workers 0 --split 100,0,0 --eval-interval 0 --eval-iters 0 --log-interval 1 --tensor-model-parallel-size 2 "
    "--sequence-parallel --override-opt_param-scheduler"
)


def tool(name: str, *arguments: object) -> None:
    _, main = command.tool(name)
    assert not main([str(argument) for argument in arguments])


def test_the_whole_way(tmp_path):
    base = write_base(tmp_path / "base")
    memory = ["--memory-num-keys", "8", "--memory-topk", "3", "--memory-latent-size", "6"]
    tool("upscale", "--hf-model", base, "--save", tmp_path / "up", "--policy", "interleave", "--num-blocks", 2, *memory)
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=numpy.uint16)
    random = numpy.random.default_rng(3)
    for _ in range(20):
        builder.add_document(random.integers(0, 260, 50), [50])
    builder.finalize(str(tmp_path / "data.idx"))

    saved = tmp_path / "run"
    where = f"--data-path {tmp_path / 'data'} --pretrained-checkpoint {tmp_path / 'up'} --load {saved} --save {saved}"
    first = train(RUN, where, "--train-iters 3", processes=2, timeout=300).check()
    second = train(RUN, where, "--train-iters 5 --use-distributed-optimizer", processes=2, timeout=300).check()
    assert list(first.losses) == [1, 2, 3] and list(second.losses) == [4, 5]

    tool("convert", "--load", tmp_path / "up", "--save", tmp_path / "untrained", "--to", "hf")
    tool("convert", "--load", saved, "--save", tmp_path / "trained", "--to", "hf", "--verify", "logits")
    before, untrained, trained = (logits_of(load_model(tmp_path / name)) for name in ("base", "untrained", "trained"))
    # A value bank of zeros adds zeros.
    torch.testing.assert_close(untrained, before, rtol=0, atol=1e-5)
    assert (trained - before).abs().max() > 0.01
    assert "5 iterations on 320 tokens" in (tmp_path / "trained/README.md").read_text()
