"""SVG of matplotlib to put into an HTML page: the same figure gives the same bytes.

Text stays text, in the fonts of the reader: it can be searched and read aloud, and class names may be in any script.
Ids begin with the name of the figure, so that several figures can be in one page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from keyhole.report.drawing import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b", "#8c564b")
"""Colours of lines, in the order of use; the first six are those of Okabe and Ito, which all people can tell apart."""
GREY = "#8a9099"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "keyhole",
    "text.parse_math": False,  # a class may be called $5$
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "svg.image_inline": True,
}


def draw_svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Return an <svg> element without references to anything outside of it.

    Args:
        name: Starts the ids; letters, digits and dashes.
        size: Width and height in inches.
        draw: Draws on the figure that it gets.
    """
    from matplotlib import rc_context, style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context("default"), rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the reader's fonts have it
        figure = Figure(figsize=size)
        draw(figure)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    return _inlined(out.getvalue(), name)


def _inlined(text: str, name: str) -> str:
    """Return the element <svg> of a document, as it can stand in HTML."""
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"| font-family: [^;"]*;', "", text)
    text = re.sub(r'(?<= )(id="|xlink:href="#|clip-path="url\(#)', rf"\1{name}-", text)
    text = re.sub(r" <defs>\s*<style.*?</style>\s*</defs>\n", "", text, count=1, flags=re.DOTALL)  # of all elements
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")', r"<svg \1", text, count=1).strip()


def shortened(text: str, most: int = 24) -> str:
    """Return a class name for a figure: printable, with an ellipsis where it is longer than `most` characters."""
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
