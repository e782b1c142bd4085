"""Makes the helpers of these tests importable, in the processes that they start as well, and a python that starts at once."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_python import warm_python

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def warm_path(tmp_path_factory) -> Iterator[str]:
    """A ``PATH`` whose python starts at once: see ``warm_python``."""
    programs = tmp_path_factory.mktemp("programs")
    with warm_python(programs):
        yield f"{programs}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def warm_executable(warm_path, monkeypatch) -> str:
    """That python as ``sys.executable``, for tools that start another interpreter and for tests that start tools."""
    executable = warm_path.split(os.pathsep)[0] + "/python"
    monkeypatch.setattr(sys, "executable", executable)
    return executable
