"""A verb of several kinds, such as `keyhole data slides`: finds the kind, and imports only what that needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from keyhole.errors import ConfigError
from keyhole.util.wording import nearest


@dataclass(frozen=True)
class Kinds:
    """The kinds of one verb; each has a module `keyhole.cli.VERB_KIND`.

    Attributes:
        verb: as it is typed.
        kinds: what each does.
        about: one sentence of help on all of them.
        noun: what messages call one of them.
        notes: last lines of the help.
    """

    verb: str
    kinds: Mapping[str, str]
    about: str
    noun: str
    notes: Sequence[str]

    def run(self, argv: list[str]) -> int:
        first = argv[0] if argv else ""
        if first in self.kinds:
            code: int = import_module(f"keyhole.cli.{self.verb}_{first}").run(argv[1:])
            return code
        if {"-h", "--help"}.intersection(argv):
            print(self._help())
            return 0
        known = ["--help"] if first.startswith("-") else list(self.kinds)
        what = f"there is no {self.noun} `{first}`" if first else f"no {self.noun} given"
        raise ConfigError(
            f"{what}{nearest(first, known, quote='`')}; `keyhole {self.verb} --help` lists what there is: "
            f"{', '.join(self.kinds)}"
        )

    def _help(self) -> str:
        width, command = max(map(len, self.kinds)), f"keyhole {self.verb} KIND"
        return "\n".join(
            [
                f"usage: {command} [...]      {command} --help shows the options of a kind",
                "",
                self.about,
                "",
                *(f"  {kind:{width}}  {what}" for kind, what in self.kinds.items()),
                "",
                *self.notes,
            ]
        )
