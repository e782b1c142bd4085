"""Look-ups of several threads under ``torch.inference_mode``, which is what vLLM runs a model in."""

import pytest
import torch

from megatron_midus.ops import head_wise_memory


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_threads_write_inference_tensors(backend):
    def look_up():
        generator = torch.Generator().manual_seed(0)
        shapes = (2000, 4, 16), (4, 64, 8), (4, 64, 8), (4096, 8), (4, 8, 8)
        return head_wise_memory(*(torch.randn(s, generator=generator) for s in shapes), topk=8, backend=backend)

    with torch.inference_mode():
        found = look_up()
    assert torch.equal(found, look_up())
