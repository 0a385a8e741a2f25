"""The package's source as syntax trees: what tests of its structure and its docstrings read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "src" / "keyhole"

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, ast.Module]:
    """Return every module of the package by its dotted name; a package has the name of its folder."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["keyhole", *path.relative_to(ROOT).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def definitions(module: str) -> Iterator[tuple[str, Documented]]:
    """Yield the module, its classes and its functions, nested ones too, each with its dotted name."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, Documented]]:
        if isinstance(node, Documented):
            yield name, node
        for child in ast.iter_child_nodes(node):
            inner = f"{name}.{child.name}" if isinstance(child, ast.ClassDef | Function) else name
            yield from walk(child, inner)

    yield from walk(modules()[module], module)


def imports() -> dict[str, set[str]]:
    """Return what each module imports of the package, type-only imports and those inside functions included."""
    names = modules()
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, tree in names.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in names}
            elif isinstance(node, ast.ImportFrom) and node.module in names:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found[name].add(inner if inner in names else node.module)
    return found
