"""Pages of docs/: their commands run one after the other, as they stand, and leave what the page says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import ALL_BLOCKS, ROOT

NOTE = f"run by {Path(__file__).relative_to(ROOT)}"


def check_upscaling(made: Path, printed: str) -> None:
    assert printed.count("8 -> 12 layers, policy interleave") == 2 and "8 -> 10 layers, policy llama_pro" in printed
    plan = json.loads((made / "llama_pro/iter_0000000/midus_plan.json").read_text())
    assert [i for i, block in enumerate(plan["blocks"]) if block["inserted"]] == [4, 9]
    assert (made / "midus/latest_checkpointed_iteration.txt").exists()


def check_converting(made: Path, printed: str) -> None:
    assert (made / "base/latest_checkpointed_iteration.txt").exists()
    assert json.loads((made / "exported/config.json").read_text())["num_hidden_layers"] == 10
    assert (made / "exported/modeling_midus.py").exists()


def check_evaluation(made: Path, printed: str) -> None:
    evaluation = json.loads((made / "evaluation.json").read_text())
    assert len(evaluation["models"]) == 2 and len(evaluation["models"][0]["tasks"]) >= 9
    assert "decoding step" in printed and (made / "evaluation.md").read_text().count("|") > 50


def check_analysis(made: Path, printed: str) -> None:
    assert {f.name for f in (made / "analysis").iterdir()} >= {"report.html", "summary.md", "analysis.json"}
    assert "<svg" in (made / "analysis/report.html").read_text()


def check_clusters(made: Path, printed: str) -> None:
    assert "layouts fit. The fastest:" in printed and "--global-batch-size 64" in printed and "megatron-core" in printed


def check_training(made: Path, printed: str) -> None:
    assert (made / "training/checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == "4"
    assert "iteration        4/       4" in printed


CHECKS = {
    "docs/upscaling.md": check_upscaling,
    "docs/converting.md": check_converting,
    "docs/evaluation.md": check_evaluation,
    "docs/analysis.md": check_analysis,
    "docs/clusters.md": check_clusters,
    "docs/training.md": check_training,
}


def test_every_page_that_says_so_is_run():
    assert {block.page for block in ALL_BLOCKS if block.note == NOTE} == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("page", CHECKS)
def test_the_commands_of_a_page(page, tmp_path):
    for name in ("examples", "tools", "pretrain_midus.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input="\n".join(block.text for block in ALL_BLOCKS if block.page == page and block.note == NOTE),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    CHECKS[page](tmp_path / "runs", done.stdout)
