"""Who may import whom: the table of docs/architecture.md, checked over the imports written in every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_midus"

FREE = {"files", "cli", "errors", "weight_files"}
NOT_FOR_TRAINING = {"hf", "evaluation", "analysis", "benchmark", "comparison", "planning", "integrations", "training"}
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "ops": set(),
    "upscaling": {"config", "ops"},
    "hf": set(),
    "memory": {"config", "ops"},
    "model": {"config", "memory", "upscaling", "platform"},
    "conversion": {"config", "upscaling"},
    "conversion/megatron_io.py": {"config", "upscaling", "model", "platform"},
    "conversion/megatron_logits.py": {"config", "upscaling", "model", "platform"},
    "data": {"config"},
    "evaluation": {"config", "hf", "ops", "upscaling"},
    "analysis": {"config", "evaluation", "hf", "ops", "upscaling"},
    "comparison": {"analysis", "config", "evaluation", "planning", "upscaling"},
    "benchmark": {"config", "model", "ops", "platform", "training", "upscaling"},
    "planning": {"config", "upscaling"},
    "integrations": set(),
    "integrations/vllm.py": {"hf"},
    "integrations/megatron_lm.py": {"config", "upscaling", "conversion", "model", "training", "platform"},
    "platform.py": set(),
    "files.py": set(),
    "cli.py": set(),
    "errors.py": set(),
    "weight_files.py": set(),
    "__init__.py": set(),
}
MAY_IMPORT["training"] = {name for name in MAY_IMPORT if "." not in name and "/" not in name} - NOT_FOR_TRAINING
MAY_IMPORT["training"] |= {"platform"}
MEGATRON = {
    "benchmark",
    "memory",
    "model",
    "conversion/megatron_io.py",
    "conversion/megatron_logits.py",
    "data",
    "training",
    "integrations/megatron_lm.py",
    "platform.py",
}
NO_TORCH = {"config", "files.py", "cli.py", "errors.py", "weight_files.py"}
TOPMOST = {"tools", "examples", "pretrain_midus", "tests"}


def imported_modules(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Absolute names of everything a module imports, inside functions as well."""
    parent = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*parent[: len(parent) - node.level + 1]] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            # `from package import part` may name a module.
            yield from (f"{name}.{alias.name}" for alias in node.names)


def violations(root: Path) -> list[str]:
    """Sentences about every import that the table does not allow."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        relative = path.relative_to(root / PACKAGE).as_posix()
        module = ".".join([PACKAGE, *Path(relative).with_suffix("").parts])
        is_package = path.name == "__init__.py"
        module = module.removesuffix(".__init__")
        for name in set(imported_modules(path.read_text(), module, is_package=is_package)):
            if reason := _forbidden(relative, name):
                found.append(f"{relative} imports {name}: {reason}")
    return sorted(found)


def _rule(table: dict | set, relative: str) -> str | None:
    """The entry of a table that is about a file: its own, else that of its package."""
    top = relative.split("/")[0]
    return relative if relative in table else top if top in table else None


def _forbidden(relative: str, name: str) -> str | None:
    top, _, rest = name.partition(".")
    own = _rule(MAY_IMPORT, relative)
    if own is None:
        return "its package is not in the table of docs/architecture.md"
    if top in TOPMOST:
        return "nobody imports tools, examples, tests or the entry point"
    if top == "megatron" and _rule(MEGATRON, relative) is None:
        return "Megatron belongs to other packages"
    if top == "torch" and _rule(NO_TORCH, relative) is not None:
        return "this part imports no torch"
    if top != PACKAGE or not rest:
        return None
    target = rest.split(".")[0]
    package = relative.split("/")[0]
    if target == package or f"{target}.py" == package or (target in FREE and package != "hf"):
        return None
    known = {entry.removesuffix(".py").split("/")[0] for entry in MAY_IMPORT}
    if target not in known and not (ROOT / PACKAGE / target).is_dir():
        return None  # a name defined in megatron_midus/__init__.py
    return None if target in MAY_IMPORT[own] else f"{own} may import {sorted(MAY_IMPORT[own])}"


def test_imports_follow_the_table() -> None:
    assert violations(ROOT) == []


def test_every_package_is_in_the_table() -> None:
    packages = {p.name for p in (ROOT / PACKAGE).iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert packages <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("config/a.py", "import torch"),
        ("config/a.py", "from megatron_midus.ops import x"),
        ("ops/a.py", "def f():\n    from megatron_midus import config"),
        ("ops/a.py", "from megatron.core import parallel_state"),
        ("hf/a.py", "from megatron_midus.files import x"),
        ("hf/a.py", "from ..config import x"),
        ("memory/a.py", "import megatron_midus.upscaling.plan"),
        ("model/a.py", "from megatron_midus.training import loop"),
        ("conversion/hf_io.py", "from megatron_midus.model import builder"),
        ("conversion/families/a.py", "import megatron.core"),
        ("training/a.py", "from megatron_midus.hf import x"),
        ("evaluation/a.py", "import megatron_midus.model"),
        ("platform.py", "from megatron_midus import config"),
        ("data/a.py", "from tools import upscale"),
        ("new/a.py", "import os"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert len(violations(tmp_path)) >= 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("conversion/megatron_io.py", "from megatron_midus.model.builder import x\nimport megatron.core"),
        ("training/a.py", "from megatron_midus.conversion.checkpoint_layout import x"),
        ("upscaling/a.py", "from megatron_midus.ops import x\nfrom megatron_midus.files import y"),
        ("hf/a.py", "from .configuration_midus import x\nimport torch"),
        ("data/a.py", "from megatron_midus import __version__"),
    ],
)
def test_an_allowed_import_is_not(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path) == []
