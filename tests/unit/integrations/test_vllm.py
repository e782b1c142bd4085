"""The plugin of vLLM where vLLM is not installed. With the real one: tests/serving."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_midus.integrations import vllm as plugin

ROOT = Path(__file__).parents[3]


def test_the_module_needs_no_vllm():
    program = (
        "import sys; from megatron_midus.integrations.vllm import register; assert 'torch' not in sys.modules\n"
        "try: register()\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "No module named 'vllm'"


def test_setup_names_the_entry_point(monkeypatch):
    from setuptools import distutils

    monkeypatch.chdir(ROOT)
    points = distutils.core.run_setup("setup.py", stop_after="init").entry_points
    (point,) = points["vllm.general_plugins"]
    name, _, target = point.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "midus" and getattr(sys.modules[module], function) is plugin.register
