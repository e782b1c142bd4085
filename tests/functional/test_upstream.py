"""A real run of upstream's pretrain() on a MIDUS model: the losses of our driver, saved, resumed, exported.

Upstream's loop is in Megatron-Core's wheel since 0.17; with an older one these tests are left out.
"""

from __future__ import annotations

import importlib.util

import numpy
import pytest
import torch
from driver import Run, train
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from test_convert_tool import convert, random_checkpoint
from tiny_models import load_model, logits_of, write_base

from megatron_midus.checkpoint.layout import iteration_directory
from megatron_midus.checkpoint.training_record import read_training_record
from megatron_midus.comparison.curves import read_scalars

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training is not installed: the wheel of Megatron-Core has it since 0.17",
)

# Kernels that only a GPU has, which upstream takes for granted.
WITHOUT_KERNELS = (
    "--transformer-impl local --no-rope-fusion --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-persist-layer-norm --no-bias-swiglu-fusion --no-bias-dropout-fusion"
)
COMMON = (
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 4 --lr 2e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-decay-iters 8 "
    "--train inserted --value-lr-mult 3 --weight-decay 0.1 --clip-grad 0.5 --log-interval 1 --eval-iters 0 --split 100,0,0 "
    "--make-vocab-size-divisible-by 8 --num-workers 0 --distributed-backend gloo"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, an up-scaled checkpoint of random values, and documents of random tokens."""
    root = tmp_path_factory.mktemp("upstream")
    random_checkpoint(root / "upscaled", write_base(root / "base"))
    builder = IndexedDatasetBuilder(str(root / "data.bin"), dtype=numpy.uint16)
    random = numpy.random.default_rng(3)
    for _ in range(40):
        builder.add_document(random.integers(0, 260, 50), [50])
    builder.finalize(str(root / "data.idx"))
    return root


def data(root) -> str:
    return f"--data-path {root / 'data'} --data-cache-path {root / 'cache'}"


def upstream(root, save: str, iterations: int, *more: str, processes: int = 1) -> Run:
    return train(
        COMMON,
        WITHOUT_KERNELS,
        data(root),
        f"--pretrained-checkpoint {root / 'upscaled'} --load {root / save} --save {root / save} --save-interval 100",
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {root / 'upscaled/iter_0000000/hf_assets'}",
        f"--train-iters {iterations} --eval-interval 1000",
        *more,
        processes=processes,
        timeout=300,
        upstream=True,
    ).check()


@pytest.fixture(scope="module")
def ours(root) -> Run:
    """Six iterations of pretrain_midus.py."""
    start = f"--pretrained-checkpoint {root / 'upscaled'} --train-iters 6 --eval-interval 0"
    return train(COMMON, data(root), start, f"--tensorboard-dir {root / 'tensorboard'}", timeout=300).check()


@pytest.fixture(scope="module")
def losses(root, ours) -> dict[int, float]:
    """Our losses in fp32, in which upstream averages: it rounds the sum of the micro-batches, the driver averages in fp64.
    Rounding our mean at the end gives upstream's bits, since fp64 holds the sum exactly and 64 tokens are a power of two."""
    return read_scalars(root / "tensorboard")["lm loss"]


@pytest.fixture(scope="module")
def first(root) -> Run:
    return upstream(root, "saved", 4)


def as_upstream_prints(losses: dict[int, float], iterations: range) -> dict[int, str]:
    """What a process of upstream's prints: it forgets to empty its sum after its first line, so its second is a mean of two."""
    first, second = iterations[:2]
    total = float(numpy.float32(losses[first]) + numpy.float32(losses[second]))
    return {i: f"{total / 2 if i == second else losses[i]:.6E}" for i in iterations}


def test_upstreams_loop_trains_as_our_driver(first, ours, losses):
    assert len(first.losses) == 4 and len(set(first.losses.values())) == 4
    assert first.losses == as_upstream_prints(losses, range(1, 5))
    norms = [line["grad norm"] for line in ours.lines[:4]]
    assert [line["grad norm"] for line in first.lines] == norms


@pytest.fixture(scope="module")
def resumed(root, first) -> Run:
    return upstream(root, "saved", 6, "--override-opt_param-scheduler")


def test_upstreams_loop_resumes(resumed, losses):
    assert resumed.losses == as_upstream_prints(losses, range(5, 7))


def test_what_upstream_trained_is_exported(root, resumed):
    """Plan, architecture and tokenizer lie beside the weights by then; the card knows the tokens and what was trained."""
    directory = iteration_directory(root / "saved", 6)
    record = read_training_record(directory, 6)
    assert (record.iteration, record.tokens, record.train) == (6, 6 * 4 * 16, "inserted")
    arguments = ["--load", str(root / "saved"), "--save", str(root / "exported"), "--to", "hf"]
    convert.main(arguments)
    card = (root / "exported/README.md").read_text()
    assert "6 iterations on 384 tokens" in card
    logits = logits_of(load_model(root / "exported"))
    convert.main(["--load", str(root / "upscaled"), "--save", str(root / "untrained"), "--to", "hf"])
    assert torch.isfinite(logits).all() and not torch.equal(logits, logits_of(load_model(root / "untrained")))


def test_upstreams_loop_on_two_ranks(root, losses):
    found = upstream(root, "parallel", 2, "--tensor-model-parallel-size 2 --sequence-parallel", processes=2).losses
    expected = {i: float(x) for i, x in as_upstream_prints(losses, range(1, 3)).items()}
    # What the layouts of our own driver promise.
    assert {i: float(x) for i, x in found.items()} == pytest.approx(expected, rel=1e-5)
