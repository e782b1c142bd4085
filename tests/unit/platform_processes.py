"""What the processes of the platform tests do; the launcher has activated the CPU mapping in them."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from megatron_midus import platform


def devices() -> dict[str, str]:
    """Where tensors land that were asked for on a CUDA device, in every spelling."""
    ones = torch.ones(2)
    made = {
        "string": torch.zeros(3, device="cuda"),
        "string with index": torch.tensor([1.0], device="cuda:0"),
        "device": torch.empty(3, device=torch.device("cuda", 0)),
        "ordinal": torch.ones(3, device=0),
        "current_device": torch.randn(3, device=torch.cuda.current_device()),
        "like": torch.zeros_like(ones, device="cuda"),
        "pinned": torch.zeros(2, pin_memory=True),
        "cuda()": ones.cuda(),
        "to string": ones.to("cuda"),
        "to keyword": ones.to(device="cuda", dtype=torch.float64),
        "to tensor": ones.to(torch.ones(1)),
        "to dtype": ones.to(torch.float16),
        "new_zeros": ones.new_zeros(3, device="cuda"),
        "module cuda()": torch.nn.Linear(2, 2).cuda().weight,
        "module to": torch.nn.Linear(2, 2).to("cuda").weight,
    }
    assert made["to dtype"].dtype == torch.float16 and made["to keyword"].dtype == torch.float64
    return {how: tensor.device.type for how, tensor in made.items()}


def elsewhere() -> list[str]:
    """The same in another thread and inside ``backward()``, where a TorchFunctionMode would be off."""
    found = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            found.append(torch.empty(1, device="cuda").device.type)
            return gradient

    thread = threading.Thread(target=lambda: found.append(torch.zeros(1, device="cuda").device.type))
    thread.start()
    thread.join()
    Probe.apply(torch.ones(1, requires_grad=True)).sum().backward()
    return found


def namespace() -> None:
    """Streams, events, counts, types, random states."""
    to = torch.Tensor.to
    platform.activate_cpu_mapping()
    assert torch.Tensor.to is to, "a second call changes nothing"
    assert platform.is_cpu() and platform.device() == torch.device("cpu")
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2).type(torch.bfloat16).dtype == torch.bfloat16
    assert torch.cuda.device_count() == 1
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.Event().record()
    torch.cuda.synchronize()
    torch.cuda.set_device(0)
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(4))


def random_states() -> list[str]:
    """Megatron's tracker forks and returns; what it logged meanwhile."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logging.getLogger("megatron").addHandler(Keep())
    torch.manual_seed(1)
    plain = torch.rand(3)
    torch.manual_seed(1)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        forked = torch.rand(3)
    assert torch.equal(torch.rand(3), plain), "a fork leaves the default state alone"
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.rand(3), forked), "and goes on where it was"
    return records


def means() -> list[torch.Tensor]:
    """Means over the ranks of tensors whose shapes are no multiples of the number of ranks."""
    rank = torch.distributed.get_rank()
    tensors = [torch.arange(float(size)) + 10 * rank for size in (1, 3, 7)]
    for tensor in tensors:
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.AVG)
    total = torch.tensor([1.0 + rank])
    torch.distributed.all_reduce(total)
    return [*tensors, total]
