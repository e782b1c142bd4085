"""Every file of a checkpoint is compared with its hash, and the list of hashes with its own."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess

import pytest

from megatron_midus.checkpoint.checksums import (
    CHECKSUMS_FILE,
    DamagedError,
    check_checkpoint,
    file_sha256,
    read_checksums,
    write_checksums,
)

# Longer than a chunk of the reader, an empty file, and names with a space and of a hidden file.
FILES = {"__0_0.distcp": 5_000_003, ".metadata": 99, "hf_assets/a b.json": 7, "empty": 0}


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "iter_0000007"
    for name, size in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(random.Random(name).randbytes(size))
    write_checksums(directory)
    return directory


def test_hashes_are_those_of_the_standard_tool(checkpoint):
    for name in FILES:
        assert file_sha256(checkpoint / name) == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    assert read_checksums(checkpoint).keys() == FILES.keys()
    subprocess.run(["sha256sum", "--strict", "-c", CHECKSUMS_FILE], cwd=checkpoint, check=True, capture_output=True)


def test_a_whole_checkpoint_passes_and_one_without_a_list_is_told_apart(checkpoint):
    (checkpoint / "notes of the user").touch()
    assert check_checkpoint(checkpoint) is True
    (checkpoint / CHECKSUMS_FILE).unlink()
    assert check_checkpoint(checkpoint) is False


def test_hashes_that_are_known_are_not_computed_again(checkpoint):
    write_checksums(checkpoint, {"empty": "0" * 64})
    with pytest.raises(DamagedError, match="empty is damaged"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("name", [*FILES, CHECKSUMS_FILE])
def test_every_flipped_bit_and_every_lost_byte_is_named(name, checkpoint):
    path = checkpoint / name
    content = path.read_bytes()
    generator = random.Random(name)
    for _ in range(3 if content else 0):
        position = generator.randrange(len(content))
        flipped = bytes([content[position] ^ 1 << generator.randrange(8)])
        for damage in (content[:position], content[:position] + flipped + content[position + 1 :]):
            path.write_bytes(damage)
            with pytest.raises(DamagedError, match=f"{name} is damaged"):
                check_checkpoint(checkpoint)
    path.unlink()
    if name == CHECKSUMS_FILE:
        assert check_checkpoint(checkpoint) is False
    else:
        with pytest.raises(DamagedError, match=f"{name} is missing"):
            check_checkpoint(checkpoint)


def test_a_list_of_another_checkpoint_does_not_fit(checkpoint, tmp_path):
    other = tmp_path / "iter_0000008"
    shutil.copytree(checkpoint, other)
    (other / "empty").write_text("x")
    write_checksums(other)
    shutil.copyfile(other / CHECKSUMS_FILE, checkpoint / CHECKSUMS_FILE)
    with pytest.raises(DamagedError, match="empty is damaged"):
        check_checkpoint(checkpoint)
