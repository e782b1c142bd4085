"""docs/fine_tuning.md: from a tiny base to a model that answers held-out questions in a terminal, which its base does not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

import megatron_midus as midus
from megatron_midus.progress import SILENT

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/fine_tuning.md"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(tmp_path_factory, warm_path) -> tuple[Path, str]:
    """Where the commands of the page ran, and what they printed."""
    place = tmp_path_factory.mktemp("fine_tuning")
    for name in ("examples", "tools"):
        (place / name).symlink_to(ROOT / name)
    blocks = re.findall(r"(?<! -->\n)^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": warm_path}
    run = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input="\n".join(blocks),
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return place / "runs/sft", run.stdout


def questions(runs: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (runs / "data/heldout.jsonl").open()]


def right(model: Path, runs: Path) -> int:
    """Held-out questions whose answer is the expected one, letter by letter."""
    conversation = midus.chat(model=str(model), generate_tokens=12, progress=SILENT)
    count = 0
    for record in questions(runs):
        conversation.reset()
        count += conversation.ask(record["prompt"], lambda piece: None) == record["completion"]
    return count


def test_the_model_answers_and_its_base_does_not(done, tmp_path):
    runs, printed = done
    assert "conversations: 100, packed into 26 samples" in printed and printed.endswith("Take.\n")
    base = shutil.copytree(runs.parents[1] / "examples/tiny_base", tmp_path / "base")
    shutil.copy(ROOT / "examples/sft/chat_template.jinja", base)
    # 36 where the page was written; processors add up in other orders.
    assert right(runs / "midus_hf", runs) >= 28 and right(base, runs) == 0


def test_no_wording_of_a_held_out_question_was_trained(done):
    runs, _ = done
    trained = (runs / "data/train.jsonl").read_text()
    assert len(trained.splitlines()) == 100 and len(questions(runs)) == 40
    assert not any(record["prompt"] in trained for record in questions(runs))


def test_what_the_export_carries_and_says(done):
    runs, _ = done
    template = (ROOT / "examples/sft/chat_template.jinja").read_text()
    assert (runs / "midus_hf/chat_template.jinja").read_text() == template
    assert "fine-tuned on conversations for 120 iterations" in (runs / "midus_hf/README.md").read_text()
    base, tuned = json.loads((runs / "old.json").read_text())["models"]
    old, new = ([model["results"][name]["loss"] for model in (base, tuned)] for name in ("heldout.jsonl", "text.jsonl"))
    # The page has +1.09 and -1.67 nats per token.
    assert 0.5 < old[1] - old[0] < 1.6 and new[1] < new[0] - 1


def test_in_a_terminal(done):
    runs, _ = done
    terminal = pexpect.spawn(
        sys.executable,
        ["-m", "megatron_midus", "chat", str(runs / "midus_hf"), "--generate-tokens", "12"],
        timeout=120,
        encoding="utf8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    terminal.expect(">>> ")
    for question, answer in (("Name the river of Brodri.", "Take."), ("Name the river of Zafin.", "Togan.")):
        terminal.sendline("/reset")  # it learnt from conversations of one question
        terminal.expect(">>> ")
        terminal.sendline(question)
        terminal.expect(">>> ")
        assert terminal.before.splitlines()[-1].strip() == answer
    terminal.sendline("/exit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
