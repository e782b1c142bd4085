"""The pages whose blocks say so: their commands run one after the other, and leave what the pages say.

Those of docs/ run as they stand; README's, which are for a model of a billion parameters on eight GPUs, with smaller numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from documentation import ALL_BLOCKS, ROOT

THIS_FILE = "run by tests/functional/test_pages.py"
# What a page says that another one has made.
NEEDS = {"docs/converting.md": "docs/upscaling.md", "docs/recovery.md": "docs/training.md"}
BLOCKS = {
    page: [block.text for block in ALL_BLOCKS if block.page == page and block.note == THIS_FILE]
    for page in {block.page: None for block in ALL_BLOCKS if block.note == THIS_FILE}
}

# What two CPU cores can do in a minute, in place of what README says for a model of a billion parameters on eight GPUs.
SMALLER = {
    "--memory-num-keys 512": "--memory-num-keys 16",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--bf16": "--distributed-backend gloo",
    "--seq-length 4096": "--seq-length 64",
    "--micro-batch-size 4": "--micro-batch-size 2",
    "--global-batch-size 256": "--global-batch-size 4",
    "--save-interval 500": "--save-interval 3",
    "--train-iters 2000": "--train-iters 6",
    "--lr-wsd-decay-iters 200": "--lr-wsd-decay-iters 2",
    "--lr-warmup-iters 100": "--lr-warmup-iters 2",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """What a reader's commands find where they run; they write below ``runs``."""
    directory = tmp_path_factory.mktemp("repository")
    for name in ("README.md", "docs", "examples", "tools", "pretrain_midus.py"):
        (directory / name).symlink_to(ROOT / name)
    return directory


@pytest.fixture(scope="module")
def shell(root: Path, warm_path: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a text in bash, in ``root`` unless another directory is given."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": warm_path, "COLUMNS": "200"}

    def run(text: str, directory: Path = root) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-euo", "pipefail"]
        return subprocess.run(command, input=text, cwd=directory, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def run_page(shell) -> Callable[[str], str]:
    """Runs the blocks of a page in one shell, those of the page that it builds on before it; each page once."""
    printed: dict[str, str] = {}

    def run(page: str) -> str:
        if page not in printed:
            if page in NEEDS:
                run(NEEDS[page])
            done = shell("\n".join(BLOCKS[page]))
            assert done.returncode == 0, f"{page}: {done.stdout}\n{done.stderr}"
            printed[page] = done.stdout
        return printed[page]

    return run


@pytest.mark.parametrize(
    ("text", "code", "output"),
    [
        ("python -c 'raise SystemExit(3)'", 3, ""),
        ("python -c 'import sys; sys.exit(\"no\")'", 1, "no"),
        ("python - a <<< 'import sys; print(sys.argv); 1 / 0'; echo on", 1, "['-', 'a']"),
        ("python -c 'import os; os.kill(os.getpid(), 9)'", 137, ""),
        ("python -c 'print(1)' | python -c 'print(input())' > runs.txt; cat runs.txt; rm runs.txt", 0, "1"),
        ("python tools/upscale.py --hf-model nowhere --dry-run; echo on", 1, "error: "),
    ],
)
def test_commands_end_as_they_do_elsewhere(shell, text, code, output):
    done = shell(text)
    assert done.returncode == code
    assert output in done.stdout + done.stderr and "on\n" not in done.stdout


def test_upscaling(run_page, root):
    printed = run_page("docs/upscaling.md")
    assert printed.count("bit-equal yes") == 3
    assert "8 -> 12 layers, policy solar" in printed
    plan = json.loads((root / "runs/upscaled/iter_0000000/midus_plan.json").read_text())
    assert [block["kind"] for block in plan["blocks"]].count("memory") == 2
    assert (root / "runs/llama_pro/config.json").is_file() and not (root / "runs/llama_pro/modeling_midus.py").exists()


def test_converting(run_page, root):
    printed = run_page("docs/converting.md")
    assert printed.count("tensors are equal when read back") == 2 and "argmax agreement 100.00 %" in printed
    assert (root / "runs/exported/modeling_midus.py").is_file()


def test_training(run_page, root):
    printed = run_page("docs/training.md")
    assert printed.count("lm loss: ") == 4
    assert (root / "runs/training/checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == "4"


def test_recovery(run_page):
    printed = run_page("docs/recovery.md")
    assert "midus_plan.json: OK" in printed


def test_evaluation(run_page, root):
    printed = run_page("docs/evaluation.md")
    assert "decoding step" in printed
    report = json.loads((root / "runs/evaluation/tasks.json").read_text())
    base, midus = (model["tasks"] for model in report["models"])
    assert len(base) >= 9 and base.keys() == midus.keys()


def test_analysis(run_page, root):
    run_page("docs/analysis.md")
    assert {p.name for p in (root / "runs/analysis/report").iterdir()} >= {"report.html", "summary.md", "analysis.json"}


def test_clusters(run_page):
    printed = run_page("docs/clusters.md")
    assert "8 -> 10 blocks, policy interleave" in printed and "megatron-core 0.16.1" in printed


def test_readme(shell, tmp_path):
    for name in ("tools", "pretrain_midus.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "Llama-3.2-1B").symlink_to(ROOT / "examples/tiny_base")
    sections = [part for page in sorted((ROOT / "docs").glob("*.md")) for part in page.read_text().split("\n## ")]
    lines = [json.dumps({"text": section}) + "\n" for section in sections]
    (tmp_path / "corpus.jsonl").write_text("".join(lines[5:]))
    (tmp_path / "heldout.jsonl").write_text("".join(lines[:5]))
    commands = "\n".join(BLOCKS["README.md"])
    for large, small in SMALLER.items():
        assert large in commands
        commands = commands.replace(large, small)
    done = shell(commands, tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "bit-equal yes" in done.stdout
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == "6"
    config = json.loads((tmp_path / "midus_hf/config.json").read_text())
    assert config["block_types"].count("memory") == 8
    base, midus = json.loads((tmp_path / "evaluation.json").read_text())["models"]
    assert base["results"].keys() == midus["results"].keys() and base["results"] != midus["results"]


def test_no_page_is_left_out():
    assert BLOCKS.keys() - {"README.md"} == {
        f"docs/{name}.md"
        for name in ("upscaling", "converting", "training", "recovery", "evaluation", "analysis", "clusters")
    }


def test_the_files_of_the_repository_stay(run_page, root):
    """Commands write below ``runs`` alone."""
    for page in BLOCKS.keys() - {"README.md"}:
        run_page(page)
    assert {path.name for path in root.iterdir() if not path.is_symlink()} == {"runs"}
