"""The tree of the package shows the flow, and what a stranger would stumble over does not come back.

`KNOWN_WITH_MANY_PARAMETERS` names what still breaks its rule. Delete a line when its offender is gone: the test also fails
where a listed offender no longer exists.
"""

from __future__ import annotations

import ast
import tomllib
from collections import Counter

from conftest import LONG_TESTS
from source_tree import ROOT, Function, definitions, imports, modules

LAYERS = next(
    contract["layers"]
    for contract in tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    if contract["type"] == "layers"
)
MAX_PARAMETERS = 7

KNOWN_WITH_MANY_PARAMETERS = {
    "keyhole.patches.grid.PatchGrid.__init__",
}


def test_every_module_lies_in_the_folder_of_a_step() -> None:
    entries = {path.stem for path in ROOT.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert entries == {*LAYERS, "__init__", "__main__"}
    assert len(list(ROOT.iterdir())) - (ROOT / "__pycache__").exists() <= 21
    assert len(LAYERS) <= 18
    assert [path.name for path in sorted(ROOT.glob("*.py"))] == ["__init__.py", "__main__.py", "errors.py"]


def test_no_module_imports_itself_through_others() -> None:
    """Imports for the type checker alone and those inside functions count as well."""
    direct = imports()

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        waiting = list(direct[module])
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += direct[name]
        return found

    assert {module for module in direct if module in reached(module)} == set()


def test_no_function_has_more_parameters_than_a_reader_remembers() -> None:
    found = set()
    for module in modules():
        for name, node in definitions(module):
            if isinstance(node, Function):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([each for each in parameters if each.arg not in ("self", "cls")]) > MAX_PARAMETERS:
                    found.add(name)
    assert found == KNOWN_WITH_MANY_PARAMETERS


def test_no_two_classes_share_a_name() -> None:
    names = Counter(
        node.name for module in modules() for _, node in definitions(module) if isinstance(node, ast.ClassDef)
    )
    assert {name for name, count in names.items() if count > 1} == set()


def test_kinds_of_tasks_and_rules_of_selection_are_told_apart_in_their_own_modules_only() -> None:
    """A comparison with the name of a kind elsewhere is a method that the kind's class lacks."""
    kinds = {"multiclass", "binary", "multilabel", "regression", "global", "streaming"}
    own = ("keyhole.tasks", "keyhole.nn.selection")

    def literals(node: ast.AST) -> set[str]:
        return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}

    found = set()
    for module, tree in modules().items():
        for node in ast.walk(tree):
            compared = isinstance(node, ast.Compare | ast.MatchValue)
            if compared and literals(node) & kinds and not module.startswith(own):
                found.add(module)
    assert found == set()


def test_a_constant_says_what_it_is_of() -> None:
    vague = {"LARGE", "MANY", "KNOWN", "LATER", "LAST", "SMALLEST", "LARGEST", "SIZES", "SHARE", "MOST", "FEWEST"}
    found = set()
    for module, tree in modules().items():
        for node in tree.body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            found |= {f"{module}.{each.id}" for each in targets if isinstance(each, ast.Name) and each.id in vague}
    assert found == set()


def test_no_docstring_starts_in_the_middle_of_a_sentence() -> None:
    found = set()
    for module in modules():
        for name, node in definitions(module):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0] == "Of":
                found.add(name)
    assert found == set()


def test_every_test_that_takes_long_exists() -> None:
    found = set()
    for path in LONG_TESTS.parent.glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {f"{path.name}::{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(LONG_TESTS.read_text().split()) <= found
