"""The report of an evaluation: one file that needs nothing else, whose figures are those of the other files."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
from conftest import csv_rows, settings
from PIL import Image
from test_prediction import predicted

import keyhole
from keyhole.data.item import Item
from keyhole.report.cases import Cases
from keyhole.report.files import write_prediction
from keyhole.report.prediction import Prediction
from keyhole.report.table import AnswerFolder
from keyhole.tasks.kinds import Task

if TYPE_CHECKING:
    from playwright.sync_api import Browser

VOID = {"meta", "img", "br", "link", "hr", "input"}
LINKS = {"src", "href", "xlink:href", "data", "action", "poster", "srcset"}


class Page(HTMLParser):
    """Checks that elements are balanced, and collects links, ids, texts and the rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.links += [value or "" for name, value in attrs if name in LINKS]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.attributes += [value or "" for _, value in attrs]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def checked(text: str) -> Page:
    """The page, if it can be read without a network and runs nothing."""
    page = Page(text)
    assert "script" not in page.elements
    assert not {"iframe", "object", "embed", "link", "base"}.intersection(page.elements)
    assert all(link.startswith(("data:image/", "#")) for link in page.links), set(page.links)
    assert not [
        value for value in page.attributes if re.search(r"(https?:)?//", value) and not value.startswith("data:")
    ]
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    return page


def figures(text: str) -> list[str]:
    return re.findall(r"<svg .*?</svg>", text, re.DOTALL)


@pytest.fixture(scope="module")
def evaluated(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keyhole.evaluate(toy_run, out=tmp_path_factory.mktemp("evaluated") / "out").path


def test_the_report_is_one_page_that_needs_nothing_else(evaluated: Path, toy_run: Path) -> None:
    text = (evaluated / "report.html").read_text()
    page = checked(text)
    assert len(figures(text)) == 7  # ROC, precision-recall, calibration, confusion, loss, metric, selection
    for heading in ("Data", "Operating point", "Cases", "Training", "Left out", "Settings and environment"):
        assert heading in page.texts
    assert "was evaluated on" in page.text
    assert "Training did not open these images." in page.text
    assert "Nothing was left out." in page.text
    assert str(evaluated.parent) not in text, "reports are sent to others: no folder of this machine"
    assert str(toy_run.parent) not in text


def test_its_figures_are_those_of_metrics_json(evaluated: Path) -> None:
    page = checked((evaluated / "report.html").read_text())
    found = json.loads((evaluated / "metrics.json").read_text())
    names = {"auroc": "AUROC", "f1": "F1", "ece": "calibration error", "recall": "recall (sensitivity)"}
    for metric, estimate in found["tasks"]["label"]["overall"].items():
        (row,) = [row for row in page.rows if row[0] == names.get(metric, metric.replace("_", " "))]
        assert row[1] == f"{estimate['value']:.3f}"
        limits = "no interval" if estimate["low"] is None else f"{estimate['low']:.3f} to {estimate['high']:.3f}"
        assert row[2] == limits
    for point in found["operating_points"]["label"]["points"]:
        (row,) = [row for row in page.rows if row[0].startswith(f"{point['threshold']['rule']}: ")]
        assert row[1] == f"{point['threshold']['value']:.3f}"
        for place, name in ((2, "sensitivity"), (4, "specificity")):
            estimate = point[name]
            limits = f"{estimate['low']:.3f} to {estimate['high']:.3f}"
            assert row[place : place + 2] == [f"{estimate['value']:.3f}", limits]
    names = {row["image"] for row in csv_rows(evaluated / "predictions.csv")}
    shown = {text for text in page.texts if text in names}
    assert shown == names, "all of so few images are cases"


def test_another_process_draws_the_same_bytes(evaluated: Path, toy_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keyhole", "evaluate", toy_run, "--out", tmp_path / "again"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    drawn = [figures((folder / "report.html").read_text()) for folder in (evaluated, tmp_path / "again")]
    assert drawn[0] == drawn[1]
    pictures = [
        re.findall('data:image/jpeg[^"]*', (folder / "report.html").read_text())
        for folder in (evaluated, tmp_path / "again")
    ]
    assert pictures[0] == pictures[1]


@pytest.fixture(scope="module")
def kinds(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with a task of each kind, with names that are awkward in HTML, SVG and matplotlib."""
    folder = tmp_path_factory.mktemp("kinds")
    images = sorted(toy.rglob("*.png"))
    classes = ("<script>alert(1)</script>", '$x^$ & "y"', "\u4e2d\u6587")
    rows = [
        [
            image,
            "train val test train".split()[i // 6],
            classes[i % 3],
            "&lt;b&gt;" if i % 2 else "a",
            ["|", "p", "p|q"][i % 3],
            i / 7,
            "",
        ]
        for i, image in enumerate(images)
    ]
    rows[2][4] = ""  # no label
    with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "split", "kind <i>", "two", "tags", "age", "annotation"], *rows])
    run = keyhole.train(folder / "data.csv", folder / "run", **settings(train={"epochs": 1}))
    assert {task["kind"] for task in run.best["tasks"]} == {"multiclass", "binary", "multilabel", "regression"}
    return keyhole.evaluate(run.path).path


def test_every_kind_of_task_has_a_page_and_no_name_breaks_it(kinds: Path) -> None:
    text = (kinds / "report.html").read_text("utf-8")
    page = checked(text)
    assert "<script" not in text
    assert "Task kind <i>" in page.texts
    assert any("<script>alert(1)</script>" in row for row in page.rows)
    assert page.text.count("has no threshold") == 2  # multiclass and regression
    for title, times in {"ROC curve": 3, "Calibration": 3, "Confusion matrix": 2, "Decisions by label": 1}.items():
        assert page.texts.count(title) == times
    assert page.texts.count("Predicted against true") == page.texts.count("Errors") == 1
    assert page.texts.count("Worst cases") == page.texts.count("Best cases") == 4
    assert page.texts.count("Most uncertain cases") == 3  # a number is neither sure nor unsure
    said = {unescape(each) for each in re.findall(r"<text[^>]*>([^<]*)</text>", "".join(figures(text)))}
    assert "\u4e2d\u6587" in said
    assert '$x^$ & "y"' in said


def test_a_report_of_a_thousand_images_stays_small(toy_run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [["image", "label"]]
    for i in range(1000):  # noise, which JPEG cannot make small
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png", compress_level=0)
        rows.append([f"{i}.png", "red" if i % 3 else "green"])
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    found = keyhole.evaluate(toy_run, tmp_path / "data.csv", out=tmp_path / "out")
    text = (found.path / "report.html").read_text()
    assert len(text) < 10e6
    page = checked(text)
    assert page.text.count("kept patch 1") == 0
    assert page.elements.count("article") == 12


@pytest.mark.parametrize("media", ["screen", "print"])
def test_a_browser_without_a_network_shows_it_on_a_screen_and_on_paper(
    kinds: Path, browser: Browser, media: Literal["screen", "print"]
) -> None:
    width = {"screen": 1280, "print": 688}[media]  # of A4 within the margins
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on(
        "request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    page.emulate_media(media=media)
    page.goto((kinds / "report.html").as_uri())
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator("article.case img.shown").count() > 0
    assert page.locator("figure svg").first.bounding_box()["width"] > 200
    assert page.evaluate("[...document.querySelectorAll('figure svg text')].every(text => text.getBBox().width > 0)")
    context.close()


def items(predictions: list[Prediction], task: Task, rng: np.random.Generator) -> Iterator[tuple[Item, Prediction]]:
    for prediction in predictions:
        label = str(rng.choice(task.classes)) if rng.random() < 0.9 else ""
        yield Item(prediction.name, prediction.image, {task.name: label}), prediction


@pytest.mark.parametrize("seed", range(3))
def test_the_cases_are_the_extremes_of_all_images_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    task = Task("digit", "multiclass", ("0", "1", "2"))
    offered = list(items([predicted((task,), i, name=f"{i}.png") for i in range(60)], task, rng))
    cases = Cases([task])
    for item, prediction in offered:
        cases.add(item, prediction)
    worst, uncertain, best = (each.cases for each in cases.of(task))

    def fit(item: Item, prediction: Prediction) -> float:
        return prediction.probability["digit"][item.labels["digit"]]

    labelled = sorted((each for each in offered if each[0].labels["digit"]), key=lambda each: fit(*each))
    assert [case.name for case in worst] == [item.name for item, _ in labelled[:4]]
    assert [case.name for case in best] == [item.name for item, _ in labelled[::-1][:4]]
    shown = {case.name for case in (*worst, *best)}
    margins = {}
    for item, prediction in offered:
        *_, second, first = sorted(prediction.probability["digit"].values())
        margins[item.name] = first - second
    rest = sorted((name for name in margins if name not in shown), key=lambda name: margins[name])
    assert [case.name for case in uncertain] == rest[:4]


def test_what_was_left_out_and_where_annotations_lie_is_told(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    images = sorted(toy.rglob("*.png"))[:6]
    outline = {"type": "Polygon", "coordinates": [[[0, 0], [64, 0], [64, 64], [0, 64]]]}
    (tmp_path / "all.geojson").write_text(json.dumps(outline))
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    rows: list[list[Any]] = [
        ["image", "label", "annotation"],
        *([image, image.parent.name, "all.geojson"] for image in images),
    ]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([*rows, ["bad.png", "red", ""]])
    found = keyhole.evaluate(toy_run, tmp_path / "data.csv", out=tmp_path / "out", on_bad_image="skip")
    page = checked((found.path / "report.html").read_text())
    (reason,) = [row for row in page.rows if row[0] == "bad.png"]
    said = found.left_out["bad.png"].replace(str(tmp_path), f".../{tmp_path.name}")
    assert reason[1:] == [said, "this evaluation"]
    (kept,) = [row for row in page.rows if row[0] == "kept patches that touch a region"]
    assert kept[1] == kept[3] == kept[4] == "1.000"
    assert any("Annotated regions" in text for text in page.texts)
    assert len(found.notes) == 1  # these images were used in training
    assert found.notes[0] in page.texts


def test_an_overlay_of_a_prediction_without_pictures_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    bare = replace(predicted(), pictures=None)
    with pytest.raises(ValueError, match="carries no pictures; predict with pictures=True"):
        write_prediction(bare, tmp_path / "out", overlay=True)
    assert not (tmp_path / "out").exists()


def test_the_answers_are_complete_without_the_pictures_of_a_file_that_was_lost(tmp_path: Path) -> None:
    bare = replace(predicted(), pictures=None)
    answers = AnswerFolder(tmp_path / "out", [bare.image], overlay=True)
    answers.write(bare)
    (folder,) = (tmp_path / "out").iterdir()
    assert {path.name for path in folder.iterdir()} >= {"prediction.json", "kept.csv"}
    assert not list(folder.glob("*.png"))
