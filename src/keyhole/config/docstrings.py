"""The texts under the fields of dataclasses. They are what `--help` and commented configurations show."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from functools import cache


def field_texts(kind: type) -> dict[str, str]:
    """By field, the string that stands under it in the source of `kind` or of the nearest base, as one line."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        body = _classes(base.__module__).get(base.__name__, [])
        for field, text in itertools.pairwise(body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[key] = " ".join(words.split())
    return found


@cache
def _classes(module: str) -> dict[str, list[ast.stmt]]:
    """What stands in each class of a module of keyhole."""
    if not module.startswith("keyhole."):
        return {}
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
