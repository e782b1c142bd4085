"""Who may import whom: the table of docs/architecture.md, checked over the imports written in every file."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_midus"

FREE = {"files", "cli", "errors", "hub", "json_files", "mounts", "partials", "progress", "weight_files"}
TOPMOST = {"tools", "examples", "pretrain_midus", "tests"}


@dataclasses.dataclass(frozen=True)
class Row:
    """What a package, or a file with a row of its own, may import: others of ours, Megatron, torch."""

    ours: frozenset[str]
    megatron: bool
    torch: bool


def read_table(page: Path) -> dict[str, Row]:
    """``{part: row}`` of the table of the architecture page."""
    lines = page.read_text().partition("## Who may import whom")[2].partition("\n## ")[0].splitlines()
    rows = {}
    for line in lines:
        if line.startswith("| `"):
            part, ours, megatron, torch = (cell.strip() for cell in line.strip("|").split("|"))
            rows[part.strip("`")] = Row(frozenset(re.findall(r"`([^`]+)`", ours)), megatron == "yes", torch == "yes")
    return rows


TABLE = read_table(ROOT / "docs/architecture.md")


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


def imports_of(root: Path) -> Iterator[tuple[str, str, str]]:
    """``(file below the package, its module, what it imports)`` of every file."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        relative = path.relative_to(root / PACKAGE).as_posix()
        module = ".".join([PACKAGE, *Path(relative).with_suffix("").parts])
        is_package = path.name == "__init__.py"
        module = module.removesuffix(".__init__")
        for name in sorted(set(imported_modules(path.read_text(), module, is_package=is_package))):
            yield relative, module, name


def violations(root: Path) -> list[str]:
    """Sentences about every import that the table does not allow."""
    return [
        f"{relative} imports {name}: {reason}"
        for relative, _, name in imports_of(root)
        if (reason := _forbidden(relative, name))
    ]


def _part_of(relative: str) -> str | None:
    """The row that is about a file: its own, else that of its package."""
    top = relative.split("/")[0]
    return relative if relative in TABLE else top if top in TABLE else None


def _target(relative: str, name: str) -> str | None:
    """The part of ours that an import reaches into, if it is another one and has a row."""
    top, _, rest = name.partition(".")
    target, package = rest.split(".")[0], relative.split("/")[0]
    if top != PACKAGE or not rest or target == package or f"{target}.py" == package:
        return None
    known = {entry.removesuffix(".py").split("/")[0] for entry in TABLE}
    # Others are names that megatron_midus/__init__.py defines.
    return target if target in known or (ROOT / PACKAGE / target).is_dir() else None


def _forbidden(relative: str, name: str) -> str | None:
    top, part = name.partition(".")[0], _part_of(relative)
    if part is None:
        return "its package is not in the table of docs/architecture.md"
    row = TABLE[part]
    if top in TOPMOST:
        return "nobody imports tools, examples, tests or the entry point"
    if top == "megatron" and not row.megatron:
        return "Megatron belongs to other packages"
    if top == "torch" and not row.torch:
        return "this part imports no torch"
    target = _target(relative, name)
    if target is None or (target in FREE and part != "hf"):
        return None
    return None if target in row.ours else f"{part} may import {sorted(row.ours)}"


def unused_entries(root: Path) -> list[str]:
    """Entries of the table that no import needs."""
    found = [(_part_of(relative), relative, name) for relative, _, name in imports_of(root)]
    used = {(part, _target(relative, name)) for part, relative, name in found}
    megatron = {part for part, _, name in found if name.partition(".")[0] == "megatron"}
    unused = [f"{part} imports no {target}" for part, row in TABLE.items() for target in sorted(row.ours) if (part, target) not in used]  # fmt: skip
    return unused + [f"{part} imports no megatron" for part, row in TABLE.items() if row.megatron and part not in megatron]  # fmt: skip


def circles(root: Path) -> list[set[str]]:
    """Groups of modules each of which imports all others of the group, directly or by way of them."""
    targets: dict[str, set[str]] = {}
    for _, module, name in imports_of(root):
        targets.setdefault(module, set()).add(name)

    def reached_from(module: str) -> set[str]:
        found: set[str] = set()
        todo = [module]
        while todo:
            new = {name for name in targets.get(todo.pop(), ()) if name in targets} - found
            found |= new
            todo += new
        return found

    reach = {module: reached_from(module) for module in targets}
    groups = [{other for other in reach[module] if module in reach[other]} for module in targets]
    return [group for index, group in enumerate(groups) if len(group) > 1 and group not in groups[:index]]


def test_imports_follow_the_table() -> None:
    assert violations(ROOT) == []


def test_the_table_is_no_wider_than_the_imports() -> None:
    assert unused_entries(ROOT) == []


def test_an_unused_entry_is_found(tmp_path: Path) -> None:
    path = tmp_path / PACKAGE / "model" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from megatron_midus.memory import x\nfrom megatron_midus.upscaling.plan import y\nimport megatron\n"
    )
    found = [entry for entry in unused_entries(tmp_path) if entry.startswith("model ")]
    assert found == ["model imports no config", "model imports no megatron_compat", "model imports no platform"]


def test_no_modules_import_each_other() -> None:
    assert circles(ROOT) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    for name, line in (("a", "from . import b"), ("b", "from .c import x"), ("c", "def f(): from .a import x"), ("d", "from .a import x")):  # fmt: skip
        path = tmp_path / PACKAGE / "ops" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")
    assert circles(tmp_path) == [{f"{PACKAGE}.ops.{name}" for name in "abc"}]


def test_every_package_is_in_the_table() -> None:
    packages = {p.name for p in (ROOT / PACKAGE).iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert packages <= set(TABLE)


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
        ("platform/a.py", "from megatron_midus import config"),
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
        ("conversion/megatron_logits.py", "from megatron_midus.model.builder import x\nimport megatron.core"),
        ("training/a.py", "from megatron_midus.checkpoint.layout import x"),
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
