"""Peak memory is measured, in a process of its own, with what is freed again before the end."""

import sys

import pytest
import torch

from megatron_midus.benchmark.peak import in_own_process, peak_above_start

MEBIBYTE = 1 << 20


def _allocate(kept: int, freed: int) -> int | None:
    def function():
        torch.ones(freed * MEBIBYTE // 4)
        return torch.ones(kept * MEBIBYTE // 4)

    return peak_above_start(function, "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak memory")
@pytest.mark.parametrize(("kept", "freed", "peak"), [(100, 0, 100), (50, 100, 100)])
def test_peak(kept, freed, peak):
    torch.ones(200 * MEBIBYTE // 4)  # an earlier peak must not count
    found = _allocate(kept, freed)
    # Pages of code that run for the first time, and the granularity of the counter.
    assert found == pytest.approx(peak * MEBIBYTE, abs=8 * MEBIBYTE)


def test_a_process_of_its_own():
    assert in_own_process(torch.get_num_threads, threads=3) == 3
