"""``tools/benchmark.py serve`` at a tiny shape: every contender says what transformers says before it is timed."""

import json
import os
import subprocess
import sys

from serving_models import ROOT


def test_serve(tmp_path):
    words = ["serve", "--shape", "cpu-small", "--rounds", "1", "--warmup", "0", "--batch", "2", "--prompt-tokens", "16"]
    words += ["--new-tokens", "4", "--eager", "--json", str(tmp_path / "serve.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/benchmark.py"), *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (section,) = json.loads((tmp_path / "serve.json").read_text())["sections"]
    rows = {row["name"]: row for row in section["rows"]}
    assert set(rows) == {"base", "copied", "memory", "token"}
    assert {"copied (prefill)", "base (decode)"} <= set(rows["memory"]["ratios"])
    assert all(rate > 0 for row in rows.values() for rate in row["tokens_per_second"].values())
