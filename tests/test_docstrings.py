"""Examples in docstrings run, and what a user calls says what it returns.

The examples run in a folder with images of two classes in `photos` and a run on them in `runs/one`. They know `keyhole`
and the names of their module.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import shutil
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from source_tree import definitions, modules

import keyhole
from keyhole import nn

PARSER = doctest.DocTestParser()
CLASSES = (
    keyhole.Predictor,
    keyhole.Prediction,
    keyhole.Run,
    keyhole.PatchGrid,
    keyhole.images.Image,
    nn.IPSClassifier,
    nn.CrossAttentionPool,
)
FIRST = {
    "keyhole.train": keyhole.train,
    "keyhole.load": keyhole.load,
    "keyhole.evaluate": keyhole.evaluate,
    "keyhole.compare": keyhole.compare,
    "keyhole.embed": keyhole.embed,
    "keyhole.check": keyhole.check,
    "keyhole.resume": keyhole.resume,
    "keyhole.open_image": keyhole.open_image,
    "keyhole.Config": keyhole.Config,
    "keyhole.PatchGrid": keyhole.PatchGrid,
    "Predictor.predict": keyhole.Predictor.predict,
    "IPSClassifier.select": nn.IPSClassifier.select,
    "CrossAttentionPool": nn.CrossAttentionPool,
    "from_reference": nn.from_reference,
}
"""What a user calls first."""


def example(module: str, name: str, text: str) -> doctest.DocTest:
    return PARSER.get_doctest(text, vars(import_module(module)) | {"keyhole": keyhole}, name, None, None)


EXAMPLES = {
    module: texts
    for module in modules()
    if (
        texts := [
            (name, text) for name, node in definitions(module) if ">>>" in (text := ast.get_docstring(node) or "")
        ]
    )
}


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_print_what_they_say(
    module: str, toy: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toy, tmp_path / "photos")
    shutil.copytree(toy_run, tmp_path / "runs" / "one")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    for name, text in EXAMPLES[module]:
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        failed, attempted = runner.run(example(module, name, text), out=said.append)[:2]
        assert attempted
        assert not failed, "".join(said)


def called() -> dict[str, FunctionType]:
    """Every function of the package and every method of its classes that is public."""
    found = {f"keyhole.{name}": getattr(keyhole, name) for name in keyhole.__all__}
    for owner in CLASSES:
        for name, value in vars(owner).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if not name.startswith("_"):
                found[f"{owner.__name__}.{name}"] = function
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


def returns_nothing(function: Any) -> bool:
    return inspect.signature(function, eval_str=False).return_annotation in (None, "None")


@pytest.mark.parametrize("name", sorted(called()))
def test_what_a_user_calls_says_what_it_returns(name: str) -> None:
    function = called()[name]
    assert function.__doc__
    assert returns_nothing(function) or re.search(r"^ *(Returns|Yields):$", function.__doc__, re.MULTILINE)


@pytest.mark.parametrize("name", FIRST)
def test_what_a_user_calls_first_has_an_example(name: str) -> None:
    assert ">>>" in (FIRST[name].__doc__ or "")
