"""Steps: their fingerprint changes when their result would, and with nothing else."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from leftovers import leave_partial

from megatron_midus.comparison.steps import FileHashes, Step, read_marker


@pytest.fixture
def hashes(tmp_path):
    return FileHashes(tmp_path / "hashes.json")


def make_step(root: Path, base: Path, **changes) -> Step:
    first = Step("first", root / "data", ("tool.py", "--seed", "1"), root)
    words = ("tool.py", "--load", str(base), "--save", str(root / "made"))
    step = Step("second", root, words, root, reads=(str(base),), after=(first,), makes=(root / "made",))
    return dataclasses.replace(step, **changes)


def base_in(directory: Path, content: str = "weights") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model").write_text(content)
    return directory


def test_moved_directories_do_not_count(tmp_path, hashes):
    here = make_step(tmp_path / "out", base_in(tmp_path / "base")).fingerprint(hashes)
    assert make_step(tmp_path / "moved", base_in(tmp_path / "base")).fingerprint(hashes) == here
    assert make_step(tmp_path / "out", base_in(tmp_path / "elsewhere/base2")).fingerprint(hashes) == here
    other_launcher = make_step(tmp_path / "out", tmp_path / "base", launcher=("python3.99",), name="third")
    assert other_launcher.fingerprint(hashes) == here


def test_what_matters_counts(tmp_path, hashes):
    root, base = tmp_path / "out", base_in(tmp_path / "base")
    step = make_step(root, base)
    here = step.fingerprint(hashes)
    assert dataclasses.replace(step, words=(*step.words, "--lr", "1")).fingerprint(hashes) != here
    earlier = dataclasses.replace(step.after[0], words=("tool.py", "--seed", "2"))
    assert dataclasses.replace(step, after=(earlier,)).fingerprint(hashes) != here
    (base / "more").write_text("")
    assert step.fingerprint(hashes) != here
    (base / "more").unlink()
    assert step.fingerprint(hashes) == here
    (base / "model").write_text("others")
    assert step.fingerprint(hashes) != here


def test_files_datasets_and_what_is_missing(tmp_path, hashes):
    text = tmp_path / "text.jsonl"
    text.write_text("a")
    first = hashes.of(text)
    text.write_text("b")
    os.utime(text, ns=(1, 1))
    assert hashes.of(text) != first
    for end in (".idx", ".bin"):
        Path(f"{tmp_path}/set{end}").write_text("tokens")
    dataset = hashes.of(tmp_path / "set")
    Path(f"{tmp_path}/set.bin").write_text("more tokens")
    assert hashes.of(tmp_path / "set") != dataset
    with pytest.raises(ValueError, match="nothing does not exist; the experiment reads it"):
        hashes.of(tmp_path / "nothing")


def test_a_file_that_kept_size_and_time_is_not_read_again(tmp_path, hashes):
    text = tmp_path / "text"
    text.write_text("a")
    first, status = hashes.of(text), text.stat()
    text.write_text("b")
    os.utime(text, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hashes.of(text) == first == FileHashes(hashes.cache).of(text)
    assert FileHashes(tmp_path / "none.json").of(text) != first


def test_done_means_ended_and_still_there(tmp_path, hashes):
    step = make_step(tmp_path / "out", base_in(tmp_path / "base"))
    mark = step.fingerprint(hashes)
    assert not step.is_done(mark)
    step.begin(mark)
    step.makes[0].mkdir()
    assert not step.is_done(mark)
    step.finish(mark, seconds=1.5, machine={"cores": 2})
    assert step.is_done(mark) and not step.is_done("another") and read_marker(step.marker)["seconds"] == 1.5
    step.makes[0].rmdir()
    assert not step.is_done(mark)
    step.marker.write_text('{"finger')
    assert read_marker(step.marker) == {}
    step.marker.write_text(json.dumps([1]))
    assert read_marker(step.marker) == {}


@pytest.mark.parametrize("goes_on", [False, True])
def test_begin_clears_what_was_left_unless_the_command_goes_on(tmp_path, hashes, goes_on):
    step = make_step(tmp_path / "out", base_in(tmp_path / "base"), goes_on=goes_on)
    step.begin("one")

    def leave():
        step.makes[0].mkdir(exist_ok=True)
        (step.makes[0] / "checkpoint").write_text("")
        if not list(tmp_path.glob("out/.made*")):
            leave_partial(step.makes[0].parent, "made")
        step.log.write_text("some lines")
        step.marker.write_text("{}")

    leave()
    step.begin("one")
    assert not step.marker.exists()
    assert (step.makes[0] / "checkpoint").exists() == goes_on and step.log.exists() == goes_on
    leave()
    step.begin("two")
    assert not step.makes[0].exists() and not step.log.exists() and not list(tmp_path.glob("out/.made*"))
    assert read_marker(step.start_marker) == {"fingerprint": "two"}
