"""The names of `import keyhole`, and what its functions take."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import keyhole


def test_every_name_of_the_api_is_there_and_no_submodule_can_hide_it() -> None:
    modules = {module.name for module in pkgutil.iter_modules(keyhole.__path__)}
    functions = {name for name in keyhole.__all__ if not name.startswith("_")}
    assert {"train", "resume", "evaluate", "check", "embed", "load"} <= functions
    assert not functions & modules
    for name in functions:
        assert callable(getattr(keyhole, name)), name


def test_import_keyhole_loads_nothing_heavy() -> None:
    code = "import sys, keyhole; dir(keyhole); print({'torch', 'numpy', 'pydantic', 'tyro'} & set(sys.modules) or '')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == ""
