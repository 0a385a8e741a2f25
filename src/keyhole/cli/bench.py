"""`keyhole bench`: what this machine makes of a model and data; finds the kind of measurement, imports only that."""

from __future__ import annotations

from importlib import import_module

from keyhole.errors import ConfigError
from keyhole.wording import nearest

KINDS = {
    "speed": "training steps beside the encoder alone, where the time goes, and what to do about it",
    "memory": "peak memory over the number of patches, which must be flat",
}


def run(argv: list[str]) -> int:
    first = argv[0] if argv else ""
    if first in KINDS:
        code: int = import_module(f"keyhole.cli.bench_{first}").run(argv[1:])
        return code
    if {"-h", "--help"}.intersection(argv):
        print(_help())
        return 0
    known = ["--help"] if first.startswith("-") else list(KINDS)
    what = f"there is nothing to measure called `{first}`" if first else "nothing to measure given"
    raise ConfigError(
        f"{what}{nearest(first, known, quote='`')}; `keyhole bench --help` lists what there is: {', '.join(KINDS)}"
    )


def _help() -> str:
    width = max(map(len, KINDS))
    return "\n".join(
        [
            "usage: keyhole bench KIND [...]      keyhole bench KIND --help shows the options of a kind",
            "",
            "Measures on this machine, with your model and your data.",
            "",
            *(f"  {kind:{width}}  {what}" for kind, what in KINDS.items()),
            "",
            "  --json          after a kind: one JSON object on standard output",
            "  --print-config  after a kind: print the configuration that results, and end",
        ]
    )
