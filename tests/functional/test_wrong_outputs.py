"""Outputs that cannot be written: one line, exit code 1, nothing half-written, whichever tool and format it is."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import write_base

pytestmark = pytest.mark.usefixtures("warm_executable")

TOOLS = Path(__file__).parents[2] / "tools"
COLD = sys.executable
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
MEMORY = ["--num-blocks", "2", "--memory-num-keys", "16"]
JOURNEYS = {
    "upscale to hf": ["upscale.py", "--hf-model", "{base}", "--save-format", "hf", *MEMORY],
    "upscale to megatron": ["upscale.py", "--hf-model", "{base}", *MEMORY],
    "convert to hf": ["convert_checkpoint.py", "--load", "{megatron}", "--to", "hf"],
    "convert to megatron": ["convert_checkpoint.py", "--load", "{base}", "--to", "megatron"],
}


# A full disk for one program: no file of its may pass 50 KB. What is written first fits, a large tensor later on does not.
FULL_DISK = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(journey, save, where, *arguments, python=None, is_full=False, before=lambda: None):
    words = [word.format(**where) for word in JOURNEYS[journey]]
    line = [python or sys.executable, *(["-c", FULL_DISK] if is_full else []), TOOLS / words[0], *words[1:]]
    line += ["--save", save, *arguments]
    return subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=120, preexec_fn=before)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """``{base, megatron}``: what is there to convert."""
    directory = tmp_path_factory.mktemp("sources")
    write_base(directory / "base")
    where = {"base": directory / "base", "megatron": directory / "megatron"}
    assert command("upscale to megatron", where["megatron"], where, python=COLD).returncode == 0
    return where


def assert_one_line(done, message):
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line, line
    assert "Traceback" not in done.stderr


def without_override():
    """The next program obeys permissions even where the user is root; no difference to anybody else."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


@pytest.mark.parametrize("journey", ["upscale to hf", "convert to megatron"])
def test_read_only_directory(tmp_path, where, journey):
    parent = tmp_path / "read only"
    parent.mkdir(mode=0o555)
    done = command(journey, parent / "out", where, python=COLD, before=without_override)
    assert_one_line(done, f"{parent} is not writable")
    assert not list(parent.iterdir())


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("journey", JOURNEYS)
def test_full_disk(tmp_path, where, journey, workers):
    done = command(journey, tmp_path / "results/out", where, "--workers", workers, is_full=True)
    assert_one_line(done, "File too large")
    assert not list((tmp_path / "results").iterdir())


def test_parent_that_is_a_file(tmp_path, where):
    (tmp_path / "file").write_text("x")
    done = command("convert to hf", tmp_path / "file/out", where)
    assert_one_line(done, f"{tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.slow
def test_an_output_that_is_there_survives_a_failure(tmp_path, where):
    """With --overwrite the old output goes only when the new one is whole."""
    assert command("upscale to hf", tmp_path / "out", where).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    done = command("convert to hf", tmp_path / "out", where, "--overwrite", is_full=True)
    assert_one_line(done, "File too large")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    done = command("convert to hf", tmp_path / "out", where)
    assert_one_line(done, "give --overwrite to replace it")
