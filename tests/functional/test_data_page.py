"""docs/data.md: its commands run one after the other, as they stand, and leave what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import documentation
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, warm_path):
    for name in ("examples", "tools", "pretrain_midus.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    blocks = [block.text for block in documentation.blocks(ROOT / "docs/data.md") if block.note.startswith("run by")]
    assert len(blocks) >= 6
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": warm_path,
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input="\n".join(blocks),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = tmp_path / "data_demo"
    counts = json.loads((made / "mixed/out_text_document.json").read_text())
    held_out = sum(1 for _ in (made / "new/heldout.jsonl").open())
    assert counts["documents"] == 3 + held_out
    assert (made / "broken_malformed.txt").read_text().startswith("data_demo/broken.jsonl:2: not JSON")
    deduplicated = json.loads((made / "deduplicated_text_document.json").read_text())
    documents = sum(1 for name in ("old", "new") for _ in (made / name / "train.jsonl").open())
    assert 0 < deduplicated["documents"] <= documents
    broken = json.loads((made / "broken_text_document.json").read_text())
    assert (broken["documents"], broken["skipped_malformed"], broken["skipped_too_short"]) == (1, 1, 1)
    assert "nothing was trained and nothing written" in done.stdout
    # Two training runs of two steps, apart from the dry run.
    losses = re.findall(r"iteration +\d+/ +2 .*lm loss: (\S+) ", done.stdout)
    assert len(losses) == 4
    assert "reset_attention_mask: true" in (made / "packed/run.yaml").read_text()
