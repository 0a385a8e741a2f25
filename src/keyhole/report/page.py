"""Self-contained HTML pages: one file that opens without a network and runs no script.

The templates are in the folder `templates`; every value that they show is escaped.
"""

from __future__ import annotations

import base64
import functools
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from keyhole.report.drawing import ATTENTION_COLORS, SCORE_COLORS, Color, printable
from keyhole.tasks.intervals import IntervalEstimate, short

if TYPE_CHECKING:
    from jinja2 import Environment

_FOLDERS = re.compile(
    r"""(?<![\w.~/\\:+-])(?:[A-Za-z]:)?(?:[/\\][^\s/\\:,;'"<>|]+)+[/\\]([^\s/\\:,;'"<>|]+[/\\])(?=[^\s/\\])"""
)
"""Folders of an absolute path; the group is the last one."""
MAX_ROWS = 200
"""Rows of a table that are shown."""


class HtmlTable(NamedTuple):
    """A table of texts.

    Attributes:
        words: Columns that hold words; the others hold numbers.
        more: Where the other rows are, if not all are shown.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[int] = (0,)
    more: str = ""

    @staticmethod
    def cut(head: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[int], file: str) -> HtmlTable:
        """Return a table of at most `MAX_ROWS` rows; `file` has all of them."""
        found = list(rows)
        more = f"and {len(found) - MAX_ROWS:,} more: see {file}" if len(found) > MAX_ROWS else ""
        return HtmlTable(head, found[:MAX_ROWS], words, more)


def render(template: str, **context: Any) -> str:
    """Return the page that a file in `templates` describes."""
    return _templates().get_template(template).render(**context)


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def data_uri(jpeg: bytes) -> Markup:
        return Markup(f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}")

    loader = PackageLoader("keyhole.report")
    found = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_plain
    )
    found.filters |= {"data_uri": data_uri, "svg": Markup}
    found.globals |= {"score_colors": _gradient(SCORE_COLORS), "attention_colors": _gradient(ATTENTION_COLORS)}
    return found


def _plain(value: Any) -> Any:
    """Return what a template shows of a value: without characters that cannot be printed, and with short paths."""
    return "\n".join(map(printable, short_paths(value).split("\n"))) if type(value) is str else value


def short_paths(text: str) -> str:
    """Return a text whose absolute paths begin with their last folder: pages are sent to others.

    >>> short_paths("/home/ann/slides/a.svs: cannot be read; see https://example.org/a/b and runs/one")
    '.../slides/a.svs: cannot be read; see https://example.org/a/b and runs/one'
    """
    return _FOLDERS.sub(r".../\1", text.replace(f"{Path.home()}{os.sep}", "~/"))


def _gradient(colors: Sequence[Color]) -> str:
    return f"linear-gradient(to right, {', '.join(f'rgb{color}' for color in colors)})"


def value_and_limits(estimate: IntervalEstimate) -> tuple[str, str]:
    """Return the value and the limits of an estimate as texts."""
    value = "undefined" if estimate.value is None else short(estimate.value)
    if estimate.low is None or estimate.high is None:
        return value, "" if estimate.value is None else "no interval"
    return value, f"{short(estimate.low)} to {short(estimate.high)}"


def estimate_text(estimate: IntervalEstimate) -> str:
    """Return an estimate as `0.935 [0.900 to 0.965]`."""
    value, limits = value_and_limits(estimate)
    return value if estimate.low is None else f"{value} [{limits}]"


METRIC_NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "f1": "F1",
    "ece": "calibration error",
    "mae": "mean absolute error",
    "r2": "R²",
    "recall": "recall (sensitivity)",
}
"""Names of metrics for readers, where they are not those in metrics.json."""
