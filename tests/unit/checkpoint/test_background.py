"""The file of background counts: whole and in parts, in the list of hashes at every moment, refused when it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_midus.checkpoint.background import (
    BackgroundHeader,
    SlotBackground,
    read_background,
    read_header,
    write_background,
)
from megatron_midus.checkpoint.checksums import DamagedError, change_file, check_checkpoint, write_checksums
from megatron_midus.checkpoint.layout import find_background
from megatron_midus.errors import UserError

HEADER = BackgroundHeader(num_batches=7, batch_size=4, seq_length=16, iteration=3)


def block(*shape: int, seed: int) -> SlotBackground:
    generator = torch.Generator().manual_seed(seed)
    return SlotBackground(
        torch.randint(0, 8, shape, generator=generator, dtype=torch.int32),
        torch.randint(0, 2**40, shape, generator=generator),
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "iter_0000003"
    directory.mkdir()
    (directory / "weights").write_text("weights")
    write_checksums(directory)
    return directory


def test_round_trip(checkpoint: Path) -> None:
    assert find_background(checkpoint) is None
    shared, own = block(25, seed=1), block(4, 25, seed=2)
    path = write_background(checkpoint, HEADER, {1: shared, 3: own})
    assert path == find_background(checkpoint) and read_header(path) == HEADER
    for name in ("batches", "reads"):
        assert torch.equal(getattr(read_background(path, 1, (25,)), name), getattr(shared, name))
        second_rank = read_background(path, 3, (2, 25), slice(2, 4))
        assert torch.equal(getattr(second_rank, name), getattr(own, name)[2:])
    assert check_checkpoint(checkpoint) and [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedError, match="damaged"):
        check_checkpoint(checkpoint)
    write_background(checkpoint, HEADER, {1: shared})
    assert check_checkpoint(checkpoint)


def test_the_list_of_hashes_is_right_at_every_moment(checkpoint: Path) -> None:
    write_background(checkpoint, HEADER, {1: block(25, seed=1)})

    def ended() -> None:
        (checkpoint / "memory_background.safetensors").write_text("half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change_file(checkpoint, "memory_background.safetensors", ended)
    assert check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2, (25,)), "no counts of Memory block 2"),
        ((1, (36,)), "25 slots there and 36 here"),
        ((1, (4, 25), slice(0, 4)), "counts of shape"),
    ],
)
def test_counts_of_another_model_are_refused(arguments: tuple, words: str, checkpoint: Path) -> None:
    path = write_background(checkpoint, HEADER, {1: block(25, seed=1)})
    with pytest.raises(UserError, match=words):
        read_background(path, *arguments)


def test_what_is_no_such_file_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "memory_background.safetensors"
    path.write_text("nonsense")
    with pytest.raises(UserError, match="midus background"):
        read_header(path)
