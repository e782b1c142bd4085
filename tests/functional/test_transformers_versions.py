"""The exported files on every supported version of transformers, and from each version to each other.

Makes a virtual environment per version (a download of about 100 MB), so it runs only when asked for:
``MIDUS_TEST_TRANSFORMERS_MATRIX=1 python -m pytest tests/functional/test_transformers_versions.py``.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

WANTED = "MIDUS_TEST_TRANSFORMERS_MATRIX"
PROGRAM = Path(__file__).with_name("transformers_versions_program.py")
REPOSITORY = Path(__file__).parents[2]
VERSIONS = ["4.53.3", "4.57.*", "5.0.0"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get(WANTED) != "1", reason=f"makes environments from the network; set {WANTED}=1"),
]


def make_environment(directory, version):
    """A virtual environment with its own transformers that shares everything else with the one that runs this."""
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(purelib.strip(), "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # After the line above, so that pip installs only what this version of transformers wants otherwise.
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"transformers=={version}"], check=True)
    return python


def run(python, mode, root, home):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [str(python), str(PROGRAM), mode, str(root)], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_version_writes_what_every_version_reads(tmp_path):
    pythons = [make_environment(tmp_path / f"transformers-{v.rstrip('.*')}", v) for v in VERSIONS]
    pythons.append(Path(sys.executable))
    root = tmp_path / "written"
    for index, python in enumerate(pythons):
        print(run(python, "write", root, tmp_path / f"home-{index}"))
    assert len(list(root.iterdir())) == len(pythons)
    for index, python in enumerate(pythons):
        out = run(python, "read", root, tmp_path / f"home-{index}")
        print(out)
        assert out.count("reads") == 3 * len(pythons)
