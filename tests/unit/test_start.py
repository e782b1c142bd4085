"""What a start loads: time is no test, modules are."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_midus.platform.deferred_compile import deferred_compile


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_a_training_on_a_cpu_starts_without_torchs_compiler():
    program = (
        "import sys\n"
        "from megatron_midus.platform import activate_cpu_mapping\n"
        "activate_cpu_mapping()\n"
        "from megatron_midus.platform.deferred_compile import deferred_compile\n"
        "with deferred_compile():\n"
        "    import megatron_midus.training.pretrain\n"
        "print('torch._inductor.compile_fx' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    assert run(program) == "False True"


def test_importing_the_driver_loads_neither_torch_nor_megatron():
    program = "import sys, megatron_midus.training.main\nprint(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    assert run(program) == "[]"


def test_a_deferred_function_is_compiled_once_with_its_options_at_the_first_call(monkeypatch):
    compiled = []

    def record(function, **options):
        compiled.append((function.__name__, options))
        return function

    monkeypatch.setattr(torch, "compile", record)
    with deferred_compile():

        @torch.compile
        def plain(x):
            """Says so."""
            return x + 1

        @torch.compile(dynamic=True)
        def dynamic(x, *, by):
            return x * by

    assert torch.compile is record and not compiled
    assert [plain(1), plain(2), dynamic(3, by=2)] == [2, 3, 6]
    assert compiled == [("plain", {}), ("dynamic", {"dynamic": True})]
    assert plain.__doc__ == "Says so."


def test_torch_compile_is_itself_again_after_a_failed_import():
    before = torch.compile
    with pytest.raises(ImportError), deferred_compile():
        raise ImportError
    assert torch.compile is before
