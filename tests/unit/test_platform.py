"""The CPU mapping, in processes of their own so that this one stays as it is; and the Adam that stands in."""

from __future__ import annotations

import copy
import importlib.util
import os
import platform as host
import subprocess
import sys
import textwrap
from pathlib import Path

import platform_processes
import pytest
import torch
from launcher import launch

from megatron_midus import platform

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**clean, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_patches_nothing() -> None:
    output = run_python("""
        import importlib, pkgutil, torch, torch.distributed, torch._dynamo
        import megatron.core.optimizer, megatron.core.optimizer.distrib_optimizer
        import megatron.core.tensor_parallel.random, megatron.core.models.gpt
        owners = {
            "torch": torch, "torch.cuda": torch.cuda, "torch.cuda.random": torch.cuda.random,
            "torch.Tensor": torch.Tensor, "torch.nn.Module": torch.nn.Module,
            "optimizer": megatron.core.optimizer, "distrib": megatron.core.optimizer.distrib_optimizer,
            "random": megatron.core.tensor_parallel.random,
        }
        before = {name: dict(vars(owner)) for name, owner in owners.items()}
        import megatron_midus
        imported = 0
        for package in pkgutil.walk_packages(megatron_midus.__path__, "megatron_midus."):
            if package.name.split(".")[1] in ("config", "ops", "upscaling", "memory", "model", "platform"):
                importlib.import_module(package.name)
                imported += 1
        assert imported > 15, imported
        for name, owner in owners.items():
            for attribute, value in before[name].items():
                assert vars(owner)[attribute] is value, (name, attribute)
        print("untouched")
    """)
    assert output == "untouched"


def test_mapping_acts_on_the_cpu() -> None:
    (found,) = launch(platform_processes.devices, 1)
    assert set(found.values()) == {"cpu"}, found


def test_mapping_acts_in_threads_and_in_backward() -> None:
    assert launch(platform_processes.elsewhere, 1) == [["cpu", "cpu"]]


def test_the_rest_of_the_cuda_namespace() -> None:
    launch(platform_processes.namespace, 1)


def test_random_states_of_megatron_fork_and_return_quietly() -> None:
    assert launch(platform_processes.random_states, 1) == [[]]


def test_means_over_ranks() -> None:
    for *means, total in launch(platform_processes.means, 3):
        for mean in means:
            assert torch.equal(mean, torch.arange(float(len(mean))) + 10)
        assert total.item() == 6


def test_mapping_is_refused_where_there_is_a_gpu() -> None:
    output = run_python("""
        import torch
        torch.cuda.is_available = lambda: True
        from megatron_midus import platform
        empty = torch.empty
        try:
            platform.initialize_distributed("gloo")
        except ValueError as error:
            print(error)
        assert torch.empty is empty
    """)
    assert "refused where CUDA is available" in output and "CUDA_VISIBLE_DEVICES" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="nccl needs a CUDA device.*gloo"):
        platform.initialize_distributed("nccl")
    with pytest.raises(ValueError, match="needs a CUDA device.*--transformer-impl local"):
        platform.require_transformer_engine()
    assert not platform.transformer_engine_available()


def test_errors_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'mpi' is not known; choose nccl or gloo"):
        platform.initialize_distributed("mpi")  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="github.com/NVIDIA/apex"):
        platform.require_apex()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"megatron-midus\[gpu\]"):
        platform.require_transformer_engine()


def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", ""), ("MASTER_PORT", "")):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="lacks MASTER_ADDR, MASTER_PORT; start the program with torchrun"):
        platform.initialize_distributed("gloo")


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_fused_adam_is_adam(adam_w_mode: bool) -> None:
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(7, 3)), torch.nn.Parameter(torch.randn(5))]
    theirs = copy.deepcopy(mine)
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours = platform.FusedAdam(mine, **settings, adam_w_mode=adam_w_mode)
    reference = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(theirs, **settings)
    for step in range(6):
        for a, b in zip(mine, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        if step == 3:  # a schedule changes the group
            ours.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.005
        ours.step()
        reference.step()
    for a, b in zip(mine, theirs):
        # The same formula in another order of operations: a few ulp of numbers of order one.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ours.param_groups[0]["step"] == 6
    assert set(ours.state[mine[0]]) == {"exp_avg", "exp_avg_sq"}


def test_fused_adam_continues_from_its_state() -> None:
    def run(optimizer: platform.FusedAdam, parameter: torch.nn.Parameter, steps: range) -> None:
        for step in steps:
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()

    whole = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    first = copy.deepcopy(whole)
    run(platform.FusedAdam([whole], lr=0.1), whole, range(8))
    optimizer = platform.FusedAdam([first], lr=0.1)
    run(optimizer, first, range(5))
    second = torch.nn.Parameter(first.detach().clone())
    resumed = platform.FusedAdam([second], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, second, range(5, 8))
    assert torch.equal(second, whole)


def test_fused_adam_leaves_groups_without_gradient_alone() -> None:
    still = torch.nn.Parameter(torch.ones(2))
    optimizer = platform.FusedAdam([{"params": [still]}, {"params": []}], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(2)) and not optimizer.state
    assert "step" not in optimizer.param_groups[1]


def test_a_start_has_a_name_that_earlier_starts_cannot_have_left():
    """Four processes on one store, started three times over; in the second start one of them dies before it is done."""
    import datetime
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from megatron_midus.platform import name_of_this_start

    store = torch.distributed.HashStore()
    timeout = datetime.timedelta(seconds=30)

    def start(ranks):
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda rank: name_of_this_start(store, rank, 4, timeout), ranks))

    first = start([0, 1, 2, 3])
    store.set("hello/2", "dead before it was welcomed")
    third = start([3, 1, 2, 0])
    assert len(set(first)) == len(set(third)) == 1 and first != third
    with pytest.raises(ValueError, match=r"waited .* for ranks \[1\]"):
        name_of_this_start(torch.distributed.HashStore(), 0, 2, datetime.timedelta(seconds=0.02))


@pytest.mark.parametrize(
    ("machine", "capability", "fast"),
    [("x86_64", "AVX2", False), ("x86_64", "AVX512", True), ("AMD64", "DEFAULT", False), ("aarch64", "DEFAULT", True)],
)
def test_which_processors_multiply_bf16(monkeypatch, machine, capability, fast):
    monkeypatch.setattr(host, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert platform.cpu_multiplies_bf16() is fast
