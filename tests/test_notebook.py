"""A prediction and a run show themselves as pictures in Jupyter, and as a line elsewhere."""

from __future__ import annotations

import base64
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from made_predictions import TASK, made_prediction
from nbclient import NotebookClient
from PIL import Image

import keyhole
from keyhole.report.overlay import overlay
from keyhole.report.shown import Shown

CELLS = """
import keyhole
from pathlib import Path
prediction = keyhole.load({run!r}, device="cpu").predict({image!r})
prediction.show()
---
keyhole.Run(Path({run!r})).show()
"""


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]


def html_of(cell: Any) -> str:
    """The HTML of a cell's only result; whatever it said on the way does not count."""
    (result,) = [each for each in cell.outputs if each.output_type == "execute_result"]
    return str(result["data"]["text/html"])


@pytest.mark.filterwarnings("default")  # those of Jupyter's own packages
def test_a_notebook_shows_predictions_and_runs(toy_run: Path, toy: Path, tmp_path: Path) -> None:
    image = toy / "red" / "0.png"
    toy_run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    keyhole.evaluate(toy_run, device="cpu")
    sources = CELLS.format(run=str(toy_run), image=str(image)).split("---")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in sources])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    said, run = map(html_of, notebook.cells)
    prediction = keyhole.load(toy_run, device="cpu").predict(image)
    drawn, sheet = pictures(said)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(overlay(prediction, prediction.tasks[0])))
    assert sheet.size[0] > 500
    assert "Prediction(" in said
    samples, contact_sheet = pictures(run)
    with Image.open(toy_run / "samples.png") as picture:
        assert samples.size == picture.size
    with Image.open(toy_run / "evaluation" / "test" / "contact_sheet.png") as picture:
        assert contact_sheet.size == picture.size
    assert run.count("<svg") == 3
    for html in (said, run):
        assert not re.search(r"https?://(?!www\.w3\.org)|<script", html)


def test_what_is_shown_is_text_elsewhere_and_its_words_are_no_markup() -> None:
    prediction = replace(made_prediction(), name="<b>&.png")
    assert repr(prediction.show()) == repr(prediction)
    html = prediction.show(TASK.name)._repr_html_()
    assert "&lt;b&gt;&amp;.png" in html
    assert "<b>" not in html
    bare = replace(prediction, pictures=None).show()
    assert "no pictures" in repr(bare)
    assert "<img" not in bare._repr_html_()
    with pytest.raises(ValueError, match=r"task \(='grade'\) must be one of 'tumour'"):
        prediction.show("grade")
    assert Shown("a\nb")._repr_html_().count("<div") == 0
