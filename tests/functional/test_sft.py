"""--sft in real processes: the loss is that of every conversation alone, whatever the layout, and runs resume exactly."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from driver import Run, train
from tiny_models import load_model
from upscaled import BASE, write_upscaled

from megatron_midus import command
from megatron_midus.conversion.families import fresh_config
from megatron_midus.data.packing import Packing
from megatron_midus.data.writer import write_index

VOCAB = 101
LENGTHS = numpy.random.RandomState(4).randint(4, 30, 60).tolist()


def write_conversations(path, ids, masks):
    for name, parts in ((f"{path}_sft_document", ids), (f"{path}_sft_loss_document", masks)):
        numpy.concatenate(parts).astype(numpy.uint16).tofile(f"{name}.bin")
        write_index(f"{name}.idx", numpy.array(list(map(len, parts)), numpy.int32), "uint16")
    return f"{path}_sft_document"


@pytest.fixture(scope="module")
def conversations():
    """Ids, the end-of-document id among them, and masks with very different numbers of ones."""
    random = numpy.random.RandomState(1)
    ids = [random.randint(0, VOCAB, n) for n in LENGTHS]
    masks = [(numpy.arange(n) >= n - 1 - i % 3 * (n // 3)).astype(int) for i, n in enumerate(LENGTHS)]
    return ids, masks


@pytest.fixture(scope="module")
def root(tmp_path_factory, conversations):
    """An up-scaled model, all weights random, and the conversations."""
    root = tmp_path_factory.mktemp("sft")
    write_upscaled(root / "upscaled")
    assets = root / "upscaled/iter_0000000/hf_assets"
    assets.mkdir()
    (assets / "config.json").write_text(json.dumps(fresh_config(BASE, {})))
    write_conversations(root / "data", *conversations)
    (root / "template.jinja").write_text("{{ messages }}")
    return root


@pytest.fixture(scope="module")
def run(root):
    """``run(flags, processes=1, data=…)``: a run of the driver on the conversations; ``fails``: it is not to succeed."""

    def call(*flags, processes: int = 1, data: str = "data", fails: bool = False) -> Run:
        words = (
            "--distributed-backend gloo --sft --num-workers 0 --seq-length 32 --global-batch-size 8 --lr 1e-2 --log-interval 1",
            "--lr-decay-style constant --eval-interval 0 --eval-iters 0 --make-vocab-size-divisible-by 1 --tokenizer-type NullTokenizer",
            f"--chat-template {root}/template.jinja --train-data-path {root / data}_sft_document",
        )
        found = train(*words, *flags, processes=processes)
        return found if fails else found.check()

    return call


@pytest.fixture(scope="module")
def whole(run, root) -> Run:
    """Eight steps of one process, one sample at a time."""
    return run(f"--train-iters 8 --micro-batch-size 1 --load {root}/upscaled")


def test_the_packed_loss_is_that_of_every_conversation_alone(run, root, conversations, tmp_path):
    samples = Packing(numpy.array(LENGTHS) - 1, 32, seed=0).per_epoch
    packed = run(f"--train-iters 1 --micro-batch-size 1 --global-batch-size {samples} --load {root}/upscaled")
    assert f"conversations: 60, packed into {samples} samples" in packed.out and "an epoch is 1 steps" in packed.out
    _, convert = command.tool("convert")
    assert not convert(["--load", f"{root}/upscaled", "--save", str(tmp_path / "hf"), "--to", "hf"])
    model = load_model(tmp_path / "hf")
    total, count = 0.0, 0
    for ids, mask in zip(*conversations):
        tokens = torch.from_numpy(ids)[None]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
        chosen = torch.from_numpy(mask[1:]).bool()
        total, count = total + float(losses[chosen].double().sum()), count + int(chosen.sum())
    # Seven printed digits, of sums in another order in another program.
    assert float(packed.losses[1]) == pytest.approx(total / count, rel=2e-6)


def test_no_conversation_sees_another(run, root, conversations):
    """Only the second half has a loss; what the first half says changes nothing."""
    ids, masks = conversations
    silent = [mask if i >= 30 else 0 * mask for i, mask in enumerate(masks)]
    others = [VOCAB - 1 - part if i < 30 else part for i, part in enumerate(ids)]
    write_conversations(root / "one", ids, silent)
    write_conversations(root / "two", others, silent)
    flags = f"--train-iters 3 --micro-batch-size 2 --lr 1e-30 --train inserted --load {root}/upscaled"
    first, second = (run(flags, data=data) for data in ("one", "two"))
    assert first.losses == second.losses and len(set(first.losses.values())) == 3


LAYOUTS = {
    "micro-batches of 4": ("--micro-batch-size 4", 1),
    "data parallel": ("--micro-batch-size 2 --use-distributed-optimizer", 2),
    "tensor parallel": ("--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel", 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout, run, root, whole):
    flags, processes = LAYOUTS[layout]
    other = run(f"--train-iters 8 --load {root}/upscaled {flags}", processes=processes)
    found, expected = ([float(loss) for loss in r.losses.values()] for r in (other, whole))
    # Sums in another order; Adam magnifies them.
    assert found == pytest.approx(expected, rel=2e-5) and len(found) == 8
    norms, theirs = ([float(line["grad norm"]) for line in r.lines] for r in (other, whole))
    assert norms == pytest.approx(theirs, abs=2e-3)


def test_epochs_are_passes_over_the_packed_samples(run, root, conversations, tmp_path):
    """Also where a start ends within one; with data of which an epoch is another number, the run does not go on."""
    samples = Packing(numpy.array(LENGTHS) - 1, 32, seed=0).per_epoch
    epochs = f"--train-epochs 2 --micro-batch-size 1 --global-batch-size 7 --lr-decay-style linear --save {tmp_path}"
    first = run(f"{epochs} --load {root}/upscaled --exit-interval 3")
    assert f"2 epochs of {samples} samples: {2 * samples} samples" in first.out
    ids, masks = conversations
    write_conversations(root / "fewer", ids[:30], masks[:30])
    error = run(f"{epochs} --load {tmp_path}", data="fewer", fails=True).error
    assert f"iter_0000003 was trained on data with {samples}: the data, --split or --seq-length changed" in error
    second = run(f"{epochs} --load {tmp_path}")
    assert int(second.lines[-1]["consumed samples"]) == 2 * samples // 7 * 7
    # A linear decay from 1e-2 that ends with the last sample.
    for line in (*first.lines, *second.lines):
        expected = 1e-2 * (1 - int(line["consumed samples"]) / (2 * samples))
        assert float(line["learning rate"]) == pytest.approx(expected, rel=1e-5)


def test_resume_is_exact(run, root, whole, tmp_path):
    """Past the end of an epoch, which has four to five steps."""
    first = run(f"--train-iters 8 --micro-batch-size 1 --load {root}/upscaled --exit-interval 3 --save {tmp_path}")
    assert list(first.losses) == [1, 2, 3]
    second = run(f"--train-iters 8 --micro-batch-size 1 --load {tmp_path} --save {tmp_path}")
    assert {**first.losses, **second.losses} == whole.losses
    assert (tmp_path / "iter_0000008/hf_assets/chat_template.jinja").read_text() == "{{ messages }}"
