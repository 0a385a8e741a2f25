"""Draw the pictures of docs/gallery.md from generated data: about five minutes on two cores.

    python docs/draw_gallery.py /tmp/gallery

This folder gets data and runs; those that are there already are used again. The pictures go into docs/gallery.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image as Picture

import keyhole
from keyhole.datasets.slides import make_slide
from keyhole.images.geometry import Box
from keyhole.report.kept_sheet import kept_sheet
from keyhole.report.overlay import overlay
from keyhole.report.table import AnswerFolder, write_table
from keyhole.tools.demo import demo

GALLERY = Path(__file__).absolute().parent / "gallery"
WIDTH, QUALITY = 1400, 82
REGION, PER_SLIDE = 256, 8
"""Side of the regions that the model of slides learns from, and their number on a slide."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    GALLERY.mkdir(exist_ok=True)
    os.chdir(work)  # pictures name files as they are given
    digits(Path("digits"))
    slide(Path("slides"))
    if shutil.which("chromium") is None:
        sys.exit("there is no chromium, so the pictures of the report and the viewer stay as they are")
    pages()


def digits(out: Path) -> None:
    """Draw what `keyhole demo` learns: one image, its kept patches, and the samples of the training."""
    if not out.exists():
        demo(out)
    prediction = keyhole.load(out / "run", device="cpu").predict(out / "images" / "images" / "test-0000.jpg")
    save(prediction, "digits")
    write(Picture.open(out / "run" / "samples.png"), "digits_samples")


def slide(work: Path) -> None:
    """Draw the prediction for a slide that is larger than what its model learned from."""
    run, large = work / "run", work / "large.tif"
    if not large.exists():
        regions = write_regions(work / "regions")
        settings = {
            "patch": {"size": 64, "stride": 32, "foreground": "all"},
            "select": {"m": 8},
            "train": {"epochs": 24, "explore": 8.0, "batch": 8},
        }
        keyhole.train({"path": regions, "cache": 1.0}, run, recipe="slides", run={"device": "cpu"}, **settings)
        make_slide(large, 6144, 1000, positive=True)
    predictor = keyhole.load(run, device="cpu")
    predictor.config = predictor.config.replace(patch={"foreground": "tissue"})
    prediction = predictor.predict(large)
    save(prediction, "slide")
    answers = AnswerFolder(work / "answers", [prediction.image])
    write_table([answers.write(prediction)], answers.out / "predictions.csv")


def pages() -> None:
    """Photograph the report of the digits, and the slide in the viewer."""
    from playwright.sync_api import sync_playwright

    words = [sys.executable, "-m", "keyhole", "view", "slides/answers", "--port", "0", "--no-browser"]
    with sync_playwright() as playwright, subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        link = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(link)
        page.wait_for_selector("body[data-ready]")
        page.keyboard.press("n")
        page.wait_for_timeout(3000)
        write(Picture.open(io.BytesIO(page.screenshot())), "viewer")
        page.set_viewport_size({"width": 1100, "height": 1150})
        page.goto(Path("digits/run/evaluation/test/report.html").absolute().as_uri())
        page.evaluate("[...document.querySelectorAll('h3')].find(each => each.textContent == 'Cases').scrollIntoView()")
        write(Picture.open(io.BytesIO(page.screenshot())), "report")
        browser.close()
        server.terminate()


def write_regions(out: Path) -> Path:
    """Write square regions of generated slides, positive where they hold a nest, and return the CSV of their labels."""
    out.mkdir(parents=True)
    rows = []
    for number in range(32):
        rng, positive = np.random.default_rng(number), number % 2 == 0
        made = make_slide(out / "slide.tif", 2048, number, tissue=0.6, positive=positive)
        with keyhole.open_image(made.path) as image:
            size = np.array(image.size)
            nests = made.nests[:, :2] - rng.integers(0, REGION - 32, (len(made.nests), 2))
            places = nests if positive else rng.integers(0, size - REGION, (200, 2))
            taken = 0
            for x, y in places.clip(0, size - REGION).tolist():
                pixels = image.read(Box(x, y, REGION, REGION))
                if taken < PER_SLIDE and (pixels.min(axis=2) < 215).mean() > 0.6:  # mostly tissue
                    name, taken = f"{number}-{taken}.png", taken + 1
                    Picture.fromarray(pixels).save(out / name)
                    rows.append((name, "positive" if positive else "negative", str(number), 0.5))
    made.path.unlink()
    with (out / "regions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "group", "mpp"), *rows])
    return out / "regions.csv"


def save(prediction: keyhole.Prediction, name: str) -> None:
    """Write the overlay and the contact sheet of a prediction."""
    shown = replace(prediction, name=prediction.image.name)
    (task,) = shown.tasks
    write(overlay(shown, task), f"{name}_overlay")
    write(kept_sheet(shown, task), f"{name}_kept")


def write(picture: Picture.Image, name: str) -> None:
    """Write a picture as JPEG, at most `WIDTH` pixels wide."""
    wide = min(WIDTH, picture.width)
    size = wide, round(picture.height * wide / picture.width)
    path = GALLERY / f"{name}.jpg"
    picture.convert("RGB").resize(size, Picture.Resampling.LANCZOS).save(path, quality=QUALITY, optimize=True)
    print(f"{path.name}: {size[0]} x {size[1]}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
