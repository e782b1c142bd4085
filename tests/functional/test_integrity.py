"""Damage to checkpoints: it is always noticed and said, and the run goes on from the newest whole checkpoint."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from driver import TINY_RUN, Run, train
from upscaled import write_upscaled

from megatron_midus.checkpoint.checksums import CHECKSUMS_FILE
from megatron_midus.config.checkpoint import CheckpointConfig
from megatron_midus.training.checkpoint.source import Source, find_source
from megatron_midus.training.checkpoint.verification import agree_on_source

STEPS = "--train-iters 6 --lr-warmup-iters 2"


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory) -> Path:
    return write_upscaled(tmp_path_factory.mktemp("upscaled") / "checkpoint")


@pytest.fixture(scope="module")
def whole(upscaled) -> Run:
    return train(*TINY_RUN, STEPS, "--load", upscaled).check()


@pytest.fixture(scope="module", params=["sync", "async"])
def saved(request, upscaled, tmp_path_factory) -> Path:
    """Iterations 2 and 4, saved by two ranks."""
    root = tmp_path_factory.mktemp(request.param)
    flags = f"--save-interval 2 --exit-interval 4 {'--async-save' if request.param == 'async' else ''}"
    train(*TINY_RUN, STEPS, flags, "--load", upscaled, "--save", root, processes=2).check()
    return root


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def resolve(root: Path, **settings) -> Source:
    checkpoint = CheckpointConfig(load=str(root), **settings)
    return agree_on_source(checkpoint, find_source(checkpoint))


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_every_file_is_hashed_by_whoever_wrote_it(saved, capfd):
    with alone():
        assert resolve(saved) == Source(saved / "iter_0000004", 4, resume=True)
    assert capfd.readouterr() == ("", "")
    files = {
        p.relative_to(saved / "iter_0000004").as_posix() for p in (saved / "iter_0000004").rglob("*") if p.is_file()
    }
    listed = {line.split("  ")[1] for line in (saved / "iter_0000004" / CHECKSUMS_FILE).read_text().splitlines()[:-1]}
    assert files - {CHECKSUMS_FILE} == listed
    assert {".metadata", "common.pt", "metadata.json", "midus_plan.json", "__0_0.distcp", "__1_0.distcp"} <= listed


def test_fifty_random_damages_are_all_noticed(saved, tmp_path, capfd):
    """Truncations and flipped bits anywhere: in the checkpoint, its list of hashes, the files that name the latest."""
    generator = random.Random(4)
    with alone():
        for case in range(50):
            root = tmp_path / f"{case}"
            shutil.copytree(saved, root)
            files = [p for p in (root / "iter_0000004").rglob("*") if p.is_file()] + list(root.glob("latest*"))
            path = generator.choice(sorted(files))
            size = path.stat().st_size
            position = generator.randrange(size)
            if case % 2:
                flip(path, position, generator.randrange(8))
            else:
                path.write_bytes(path.read_bytes()[:position])
            source = resolve(root)
            says = capfd.readouterr().err
            assert "warning: " in says and path.stem in says, (path, position, says)
            if path.parent == root:
                # Nothing is lost but the number, and iteration 2 is what a flipped bit can make of "4".
                assert source.iteration in (2, 4)
            else:
                assert (source.iteration, list(source.damaged)) == (2, [4]), (path, position)
            shutil.rmtree(root)


@pytest.mark.parametrize("name", ["common.pt", "midus_plan.json"])
def test_an_iteration_that_was_chosen_is_refused_not_replaced(name, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    flip(tmp_path / "run" / "iter_0000004" / name, 20)
    with alone():
        for settings in ({"root": tmp_path / "run", "ckpt_step": 4}, {"root": tmp_path / "run" / "iter_0000004"}):
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                resolve(**settings)
        assert resolve(tmp_path / "run", ckpt_step=4, verify_checkpoint=False).iteration == 4
        # A new run that begins from damaged weights has nothing to go back to.
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            agree = CheckpointConfig(pretrained_checkpoint=str(tmp_path / "run"))
            agree_on_source(agree, find_source(agree))


def test_without_a_whole_checkpoint_the_run_ends(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for name in ("iter_0000002", "iter_0000004"):
        flip(tmp_path / "run" / name / "metadata.json", 3)
    with alone(), pytest.raises(ValueError, match="no checkpoint of .* is whole .*0004.*0002"):
        resolve(tmp_path / "run")


def test_a_save_that_was_cut_off_before_the_first_latest_counts(saved, tmp_path, capfd):
    shutil.copytree(saved, tmp_path / "run")
    for path in (tmp_path / "run").glob("latest*"):
        path.unlink()
    with alone():
        assert resolve(tmp_path / "run").iteration == 4
        assert "latest_checkpointed_iteration.txt is missing" in capfd.readouterr().err
        (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("6\n")
        assert resolve(tmp_path / "run").iteration == 4
        assert "says 6, which does not exist" in capfd.readouterr().err


def test_an_edited_latest_is_obeyed_aloud(saved, tmp_path, capfd):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2")
    with alone():
        assert resolve(tmp_path / "run").iteration == 2
    assert "edited by hand" in capfd.readouterr().err


def test_a_checkpoint_of_other_programs_is_loaded_with_a_word(saved, tmp_path, capfd):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "iter_0000004" / CHECKSUMS_FILE).unlink()
    with alone():
        assert resolve(tmp_path / "run").iteration == 4
    assert "without having been verified" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["__1_0.distcp", "midus_plan.json"])
def test_ranks_go_back_together_and_train_exactly(name, saved, whole, upscaled, tmp_path):
    """Each file of tensors is seen by one rank alone."""
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    flip(root / "iter_0000004" / name, -30)
    two = train(*TINY_RUN, STEPS, "--save-interval 2 --load", root, "--save", root, processes=2).check()
    assert f"{name} is damaged" in two.err and "going on from iteration 2" in two.err
    assert two.err.count("NOT USED") == 1
    assert list(two.losses) == [3, 4, 5, 6]
    for iteration, loss in two.losses.items():
        # Two ranks sum in another order than one.
        assert float(loss) == pytest.approx(float(whole.losses[iteration]), rel=1e-5)
    assert sorted(p.name for p in root.glob("iter*")) == [
        "iter_0000002",
        "iter_0000004",
        "iter_0000004.damaged",
        "iter_0000006",
    ]
    again = train(*TINY_RUN, STEPS, "--load", root, processes=2).check()
    assert again.err == "" and "nothing to train" in again.out


@pytest.mark.parametrize("damage", ["common.pt", ".metadata", "__0_0.distcp"])
def test_a_file_that_was_cut_is_one_line_even_without_checksums(damage, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / "iter_0000004" / damage
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run = train(*TINY_RUN, STEPS, "--no-verify-checkpoint --load", tmp_path / "run", processes=1)
    assert str(tmp_path) in run.error
