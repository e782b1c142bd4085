"""What a start loads: time is no test, modules are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_midus.command import do
from megatron_midus.errors import UserError
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


SCHEMA_1 = Path(__file__).parents[1] / "fixtures/schema_1"
FIRST_LINES = {
    "--to hf": (
        f"convert --load {SCHEMA_1}/checkpoint --to hf --save",
        f"converting {SCHEMA_1}/checkpoint/iter_0000002 to a Hugging Face model in",
    ),
    "--to megatron": (
        f"convert --load {SCHEMA_1}/export --to megatron --save",
        f"converting {SCHEMA_1}/export (midus, 2 layers) to a Megatron checkpoint in",
    ),
    "evaluate": (
        f"evaluate --model {SCHEMA_1}/export --data {__file__} --tasks piqa,arc_easy --latency",
        f"evaluating {SCHEMA_1}/export (midus, 2 layers): text {__file__}; tasks piqa, arc_easy by transformers; latency",
    ),
}


@pytest.mark.parametrize("case", FIRST_LINES)
def test_a_verb_says_what_it_is_about_to_do_before_it_loads_torch(case, tmp_path):
    words, line = (f"{text} {tmp_path / 'out'}" if "--to" in case else text for text in FIRST_LINES[case])
    program = (
        "import os, sys\n"
        "from megatron_midus.command import main\n"
        "class FirstWrite:\n"
        "    def write(self, text):\n"
        "        loaded = sorted({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules))\n"
        "        os.write(1, f'{text} {loaded}'.encode())\n"
        "        os._exit(0)\n"
        f"sys.argv, sys.stdout = ['midus', *{words.split()}], FirstWrite()\n"
        "main()"
    )
    assert run(program) == f"{line} []"


@pytest.mark.parametrize("words", ["convert --load nowhere --to megatron --save OUT", "evaluate --model a/b --latency"])
def test_what_is_not_there_is_not_promised(words, capsys):
    with pytest.raises(UserError):
        do(words.split()[0], words.split()[1:])
    assert capsys.readouterr().out == ""


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
