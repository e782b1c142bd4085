"""Checkpoints of one release of Megatron-Core under another, and a resumed run whose learning rate is another.

``checkpoints/megatron_core_VERSION.tar.xz`` holds a run of two iterations that ``VERSION`` wrote, of random weights, memory
values too, and the losses of the third and fourth iteration of the same run without a stop.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from driver import TINY_RUN, train
from upscaled import read_weights

from megatron_midus.checkpoint.training_record import read_training_record

CHECKPOINTS = Path(__file__).parent / "checkpoints"
RELEASES = ["0.16.1", "0.19.2"]
FLAGS = "--lr-decay-style constant --train inserted --value-lr-mult 3 --clip-grad 0.5 --override-opt_param-scheduler"


def unpack(release: str, directory: Path) -> Path:
    with tarfile.open(CHECKPOINTS / f"megatron_core_{release}.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.mark.parametrize("release", RELEASES)
def test_a_checkpoint_of_any_release_goes_on(tmp_path, release):
    saved = unpack(release, tmp_path)
    expected = {
        int(iteration): float(loss) for iteration, loss in json.loads((saved / "losses.json").read_text()).items()
    }
    assert read_training_record(saved / "iter_0000002", 2).tokens == 2 * 4 * 32
    run = train(*TINY_RUN, FLAGS, f"--train-iters 4 --load {saved} --save {saved}").check()
    # 1e-5: another processor adds up in another order.
    assert {i: float(loss) for i, loss in run.losses.items()} == {
        i: pytest.approx(x, rel=1e-5) for i, x in expected.items()
    }
    assert read_training_record(saved / "iter_0000004", 4).tokens == 4 * 4 * 32


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer"])
def test_a_run_goes_on_at_another_learning_rate(tmp_path, release, optimizer):
    """Later releases count learning rates among what a parameter group of a checkpoint is found by."""
    saved = unpack(release, tmp_path)
    start = f"{FLAGS} {optimizer} --train-iters 3 --load {saved}"
    as_before = train(*TINY_RUN, start, f"--save {tmp_path / 'before'}").check()
    slower = train(*TINY_RUN, start, f"--lr 1e-5 --min-lr 1e-6 --save {tmp_path / 'slower'}").check()
    assert slower.losses == as_before.losses, "moments and weights are those of the checkpoint"
    assert [float(line["learning rate"]) for line in slower.lines] == [1e-5]
    before, after = (read_weights(tmp_path / name, 3) for name in ("before", "slower"))
    start = read_weights(saved, 2)
    moved = {name: (before[name] - start[name]).abs().max() for name in start}
    assert any(moved.values())
    for name, distance in moved.items():
        # The step of an Adam is proportional to its learning rate, a hundredth here; rounding of weights near 1 is 6e-8.
        assert (after[name] - start[name]).abs().max() <= distance * 0.011 + 2e-7, name


def test_a_save_in_the_background_goes_on(tmp_path):
    """Later releases write in the background by another package unless they are told otherwise."""
    saved = unpack(RELEASES[-1], tmp_path)
    run = train(
        *TINY_RUN, FLAGS, f"--train-iters 4 --load {saved} --save {saved} --save-interval 1 --async-save"
    ).check()
    whole = json.loads((saved / "losses.json").read_text())
    assert {str(i): float(loss) for i, loss in run.losses.items()} == {
        i: pytest.approx(float(x), rel=1e-5) for i, x in whole.items()
    }
    again = train(*TINY_RUN, FLAGS, f"--train-iters 5 --load {saved}").check()
    assert list(again.losses) == [5]
