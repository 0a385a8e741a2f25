"""Text and figures that Jupyter shows under a cell."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image as Picture


@dataclass(frozen=True)
class Shown:
    """What `Prediction.show` and `Run.show` return: Jupyter renders it, and elsewhere it prints as its text.

    Attributes:
        text: Lines of text.
        figures: HTML elements without references to anything outside of them.
    """

    text: str
    figures: Sequence[str] = ()

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        figures = "".join(f'<div style="margin: 1em 0">{figure}</div>' for figure in self.figures)
        return f'<pre style="white-space: pre-wrap">{escape(self.text)}</pre>{figures}'


def image_element(picture: Picture.Image | Path, alt: str) -> str:
    """Return a picture, or a PNG file, as an HTML element that holds it."""
    if isinstance(picture, Path):
        png = picture.read_bytes()
    else:
        data = io.BytesIO()
        picture.save(data, "PNG")
        png = data.getvalue()
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}" style="max-width: 100%; background: white">'
