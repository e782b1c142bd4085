"""For all tests: Triton's kernels as numpy where there is no GPU, short garbage collections, coverage where it is asked for."""

import gc
import os

import pytest
import torch

# Read when triton is first imported, so it is set before any test module is. A process that a test starts to compile
# kernels has to unset it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# MIDUS_COVERAGE=1 writes .coverage.* files. Tracing costs a third of the time again, so it goes on while modules are imported
# and in unit tests, and not under Triton's interpreter nor where other processes do the work.
_coverage = None
if os.environ.get("MIDUS_COVERAGE") == "1":
    import coverage

    _coverage = coverage.Coverage(source=["megatron_midus"], data_suffix=True)
    _coverage.start()


@pytest.fixture(autouse=True, scope="module")
def _no_coverage_of_slow_modules(request):
    is_traced = "/tests/unit/" in str(request.path) and not request.path.name.startswith(("test_triton", "test_traps"))
    if _coverage is None or is_traced:
        yield
        return
    _coverage.stop()
    yield
    _coverage.start()


def pytest_collection_finish(session):
    """What was imported stays: no collection of the tests looks at it again, which took a tenth of their time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    if _coverage is not None:
        _coverage.stop()
        _coverage.save()
