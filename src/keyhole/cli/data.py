"""`keyhole data`: data sets that keyhole writes or reads in; finds the kind of data and imports only what it needs."""

from __future__ import annotations

from importlib import import_module

from keyhole.errors import ConfigError
from keyhole.wording import nearest

KINDS = {
    "slides": "write labelled slides of generated tissue, of any size",
    "camelyon16": "make a manifest of the published CAMELYON16 tree, and say what is missing in it",
}


def run(argv: list[str]) -> int:
    first = argv[0] if argv else ""
    if first in KINDS:
        code: int = import_module(f"keyhole.cli.data_{first}").run(argv[1:])
        return code
    if {"-h", "--help"}.intersection(argv):
        print(_help())
        return 0
    known = ["--help"] if first.startswith("-") else list(KINDS)
    what = f"there is no kind of data `{first}`" if first else "no kind of data given"
    raise ConfigError(
        f"{what}{nearest(first, known, quote='`')}; `keyhole data --help` lists what there is: {', '.join(KINDS)}"
    )


def _help() -> str:
    width = max(map(len, KINDS))
    return "\n".join(
        [
            "usage: keyhole data KIND [...]      keyhole data KIND --help shows the options of a kind",
            "",
            "Data sets to try keyhole on, and published ones as keyhole reads them.",
            "",
            *(f"  {kind:{width}}  {what}" for kind, what in KINDS.items()),
            "",
            "  --print-config  after a kind: print the options as they result, and end",
        ]
    )
