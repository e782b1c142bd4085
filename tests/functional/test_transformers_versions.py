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
# The last is the newest that the package index has; what runs the tests is the one of constraints.txt.
VERSIONS = ["4.53.3", "4.57.*", "5.0.0", "5.*"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get(WANTED) != "1", reason=f"makes environments from the network; set {WANTED}=1"),
]


def make_environment(directory, version):
    """A virtual environment with its own transformers that shares everything else with the one that runs this."""
    venv.create(directory)
    python = directory / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(purelib.strip(), "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # After the line above, so that pip installs only what this version of transformers wants otherwise.
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    # --upgrade: what is shared would do for 5.*.
    subprocess.run([*pip, "--upgrade", f"transformers=={version}"], check=True)
    return python


def version_of(python):
    program = "import transformers; print(transformers.__version__)"
    return subprocess.check_output([python, "-c", program], text=True).strip()


def run(python, mode, root, home):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [str(python), str(PROGRAM), mode, str(root)], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_version_writes_what_every_version_reads(tmp_path):
    made = [make_environment(tmp_path / f"transformers-{v.rstrip('.*')}", v) for v in VERSIONS]
    # By version: the newest may be the one that runs this.
    pythons = {version_of(python): python for python in [Path(sys.executable), *made]}
    assert len(pythons) >= len(VERSIONS)
    root = tmp_path / "written"
    for version, python in pythons.items():
        print(run(python, "write", root, tmp_path / f"home-{version}"))
    assert {path.name for path in root.iterdir()} == set(pythons)
    for version, python in pythons.items():
        out = run(python, "read", root, tmp_path / f"home-{version}")
        print(out)
        assert out.count(f"transformers {version} reads") == 3 * len(pythons)
