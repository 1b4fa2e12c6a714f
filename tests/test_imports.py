"""The import rule of ARCHITECTURE.md, read from the source files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
#: Every room, and the rooms that it may import from besides itself and the base.
RULE: dict[str, set[str]] = {
    "base": set(),
    "contract": set(),
    "numerics": {"contract"},
    "graph": {"contract", "numerics"},
    "runtimes": {"contract", "numerics"},
    "trainers": {"contract", "numerics"},
    "sources": {"contract", "numerics", "trainers"},
    "certification": {"contract", "numerics", "graph", "runtimes", "trainers", "sources"},
}
ABOVE = set(RULE) - {"base"}
RULE |= {
    "building": ABOVE,
    "exporting": ABOVE,
    "bench": ABOVE,
    "commands": ABOVE | {"building", "exporting", "bench"},
}
#: Modules directly in `vae_export/` that every room may import. The package itself names every room's public objects.
BASE = {"errors", "progress", "timing", "versions"}


def modules(root: Path) -> dict[str, Path]:
    """Every module by its dotted name without `vae_export.`."""
    found = {}
    for folder, prefix in (("vae_export", ()), ("runtimes", ("runtimes",)), ("trainers", ("trainers",))):
        for path in (root / folder).rglob("*.py"):
            parts = (*prefix, *path.relative_to(root / folder).with_suffix("").parts)
            found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


def room(module: str) -> str:
    first = module.partition(".")[0]
    return "base" if first in BASE else first


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything of ours that a module imports, wherever in it, also for types alone."""
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = ["vae_export", *package][: 1 + len(package) - (node.level - 1)] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{start}.{alias.name}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            named = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(named, ast.Constant):
                yield node.lineno, str(named.value)


def violations(root: Path) -> list[str]:
    found = []
    for module, path in modules(root).items():
        here = room(module)
        if here in ("", "__main__"):
            continue
        for line, name in imports(module, path):
            if name.startswith("vae_export."):
                there = room(name.removeprefix("vae_export."))
                if there in RULE and there not in {here, "base", *RULE[here]}:
                    found.append(f"{path.relative_to(root)}:{line}: {here} must not import {name}")
    return found


def test_every_room_has_a_rule() -> None:
    rooms = {room(module) for module in modules(ROOT)} - {"", "__main__"}
    assert rooms == set(RULE)


def test_the_import_rule_holds() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        (
            "runtimes/vae.py",
            "from vae_export.building import builder",
            "runtimes must not import vae_export.building.b",
        ),
        ("runtimes/vae.py", "    from ..building import builder", "runtimes must not import vae_export.building.b"),
        ("runtimes/gpu/ort.py", "    import vae_export.graph.edit", "runtimes must not import vae_export.graph.edit"),
        ("vae_export/errors.py", "import_module('vae_export.contract')", "base must not import vae_export.contract"),
        ("vae_export/contract/model.py", "from ..numerics import elbo", "contract must not import vae_export.numerics"),
        ("trainers/fit.py", "from vae_export.sources import resolve", "trainers must not import vae_export.sources"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, line: str, message: str) -> None:
    target = tmp_path / path
    target.parent.mkdir(parents=True)
    target.write_text(f"def later():\n    pass\n{line}\n" if not line.startswith(" ") else f"def later():\n{line}\n")
    (found,) = violations(tmp_path)
    assert message in found
    assert found.startswith(path)
