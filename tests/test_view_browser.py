"""The viewer in a real browser: Debian's chromium, driven by Playwright. Skipped where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from conftest import csv_rows
from viewing import Served, viewing

import keyhole

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def looked_at(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(shutil.copytree(toy_run, tmp_path_factory.mktemp("browser") / "run"))
    keyhole.evaluate(run, device="cpu")
    return run


@pytest.fixture(scope="module")
def served(looked_at: Path, browser: Browser) -> Iterator[Served]:
    with viewing(looked_at) as server:
        yield server


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The viewer in a small window. At the end: no message in the console, and no request to another host."""
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not _own(request.url, served.port) else None)
    page.set_default_timeout(60_000)
    open_at(page, served, "")
    yield page
    page.close()
    assert wrong == []


def _own(address: str, port: int) -> bool:
    parts = urlsplit(address)
    return parts.scheme in ("data", "blob") or parts.netloc == f"localhost:{port}"


def open_at(page: Page, served: Served, link: str) -> None:
    page.goto(f"http://localhost:{served.port}/{link}")
    page.wait_for_selector("body[data-ready]")


def view(page: Page) -> dict[str, str]:
    """What the link holds."""
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).fragment).items()}


def wait_until(page: Page, name: str, value: float) -> None:
    """Waits until the link has this value: the map has arrived there."""
    script = "([name, value]) => Math.abs(new URLSearchParams(location.hash.slice(1)).get(name) - value) < 0.11"
    page.wait_for_function(script, arg=[name, value])


def names(page: Page) -> list[str]:
    return page.locator("#rows .item .name").all_inner_texts()


def test_it_loads_a_prediction_zooms_and_toggles_the_layer(page: Page, looked_at: Path) -> None:
    row = csv_rows(looked_at / "evaluation" / "test" / "predictions.csv")[0]
    assert page.inner_text("#name") == row["image"]
    assert row["label.predicted"] in page.inner_text("#answers")
    page.wait_for_selector(".leaflet-scores-pane img.leaflet-tile-loaded")
    assert page.locator("#patches button").count() == 4
    before = float(view(page)["zoom"])
    page.click(".leaflet-control-zoom-in")
    wait_until(page, "zoom", before + 1)
    page.keyboard.press("s")
    page.wait_for_selector(".leaflet-scores-pane img", state="detached")
    assert view(page)["scores"] == "0"
    page.check("#show-scores")
    page.wait_for_selector(".leaflet-scores-pane img.leaflet-tile-loaded")
    page.keyboard.press("k")
    assert page.locator("path.leaflet-interactive").count() == 0


def test_sorting_and_filters_show_the_rows_of_the_tables(page: Page, looked_at: Path) -> None:
    rows = [row for split in ("test", "val", "train") for row in csv_rows(looked_at / "predictions" / f"{split}.csv")]
    sure = [max(float(row[f"label.probability.{name}"]) for name in ("green", "red")) for row in rows]
    page.select_option("#sort", "confidence")
    order = [rows[place]["image"] for place in np.argsort(sure, kind="stable")]
    assert names(page) == order[: len(names(page))]
    page.select_option("#truth", "green")
    green = [name for name in order if name.startswith("green")]
    assert page.inner_text("#count") == f"{len(green)} of {len(rows)} images"
    assert names(page) == green[: len(names(page))]
    page.fill("#search", "green/1")
    assert names(page) == [name for name in green if "green/1" in name]
    page.fill("#search", "no such image")
    assert "No image fits" in page.inner_text("#rows")
    page.fill("#search", "")
    page.click("#rows .item >> nth=1")
    page.wait_for_function("name => document.getElementById('name').textContent === name", arg=green[1])


def test_a_click_on_a_kept_patch_flies_there_and_the_link_restores_it(
    page: Page, served: Served, looked_at: Path
) -> None:
    with np.load(looked_at / "evaluation" / "test" / "scores" / "1.npz") as stored:
        kept: list[dict[str, Any]] = json.loads(bytes(stored["prediction"]))["kept"]["patches"]
    order = sorted(range(4), key=lambda place: (-kept[place]["attention"]["label"], place))
    page.keyboard.press("]")
    for number in (2, 0):
        page.click(f"#patches button >> nth={number}")
        x, y, width, height = kept[order[number]]["box"]
        wait_until(page, "x", x + width / 2)
        wait_until(page, "y", y + height / 2)
        assert view(page)["patch"] == str(order[number] + 1)
    page.select_option("#sort", "-confidence")
    link, before = f"#{urlsplit(page.url).fragment}", view(page)
    assert before["opacity"] == "70"
    page.goto("about:blank")
    open_at(page, served, link)
    wait_until(page, "zoom", float(before["zoom"]))
    assert view(page) == before
    assert page.input_value("#opacity") == "70"
    assert page.locator("#patches button[aria-pressed=true]").get_attribute("data-rank") == before["patch"]


def test_the_pointer_reads_the_score_that_is_stored(page: Page, looked_at: Path) -> None:
    with np.load(looked_at / "evaluation" / "test" / "scores" / "1.npz") as stored:
        score = float(stored["map.label"][1, 2])
    page.wait_for_selector(".leaflet-scores-pane img.leaflet-tile-loaded")
    shown, box = view(page), page.locator("#map").bounding_box()
    assert box is not None
    scale = 2 ** float(shown["zoom"])  # of an image of one tile: screen pixels per pixel
    x = box["x"] + box["width"] / 2 + (40 - float(shown["x"])) * scale
    y = box["y"] + box["height"] / 2 + (24 - float(shown["y"])) * scale
    page.mouse.move(x - 5, y)
    page.mouse.move(x, y)
    page.wait_for_function("() => document.getElementById('readout').textContent.includes('score')")
    said = page.inner_text("#readout")
    assert said.startswith("x 40, y 24 px") or said.startswith("x 39, y 2")
    assert float(said.partition("score ")[2].partition(" ")[0]) == pytest.approx(score, rel=6e-3)


def test_keys_choose_images_and_the_theme_is_kept(page: Page) -> None:
    page.focus("#list")
    first = view(page)["image"]
    page.keyboard.press("ArrowDown")
    page.wait_for_function("before => new URLSearchParams(location.hash.slice(1)).get('image') !== before", arg=first)
    page.keyboard.press("d")
    dark = page.evaluate("document.documentElement.classList.contains('dark')")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("document.documentElement.classList.contains('dark')") == dark
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
