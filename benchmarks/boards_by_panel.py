"""Do the arms of `real_images.py` know defects, or the panels that they have seen? AUROC on both kinds of test boards.

    python benchmarks/real_images.py FOLDER circuit_boards boards.csv ...
    python benchmarks/boards_by_panel.py FOLDER

The folder of a board's picture is its panel. Of each arm with predictions, the test boards are judged apart: those of
panels that some training board is of, and those of panels of their own.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from machine import write_result
from numpy.typing import NDArray
from real_data import rows_of
from real_images import ARMS
from result import NAME, read

from keyhole.tasks.evaluation import evaluate_task
from keyhole.tasks.kinds import SEPARATOR, Task

EXAMPLE, LABEL = "circuit_boards", "defects"
HEAD = ("arm", "seed", "epochs", "panels that were learned from", "panels of their own")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="that was given to real_images.py")
    options = parser.parse_args()
    print(write_result("boards_by_panel", "Circuit boards, panel by panel", report(options.folder / EXAMPLE)))


def report(folder: Path) -> list[str]:
    """Return the lines of the dated file, with a row for each run below the folder that has predictions."""
    rows = rows_of(folder / "images.csv")
    panel = {row["name"]: Path(row["image"]).parent.name for row in rows}
    learned = {panel[row["name"]] for row in rows if row["split"] == "train"}
    counts = {
        name: [panel[row["name"]] in learned for row in rows if row["split"] == name] for name in ("train", "test")
    }
    train, test = len(counts["train"]), counts["test"]
    return [
        f"Real pictures ([circuit boards](../examples/circuit_boards/README.md)): {train} to learn from, of "
        f"{len(learned)} panels. Of the {len(test)} test boards {sum(test)} are of these panels. "
        "AUROC, mean over the defects, with its 95 % interval over the boards.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(cells) + " |" for cells in table(folder, panel, learned)),
    ]


def table(folder: Path, panel: dict[str, str], learned: set[str]) -> Iterator[list[str]]:
    """Yield the cells of each run, in the order of the arms."""
    found = {path.parent: read(path.parent) for path in folder.glob(f"*/{NAME}")}
    for arm in ARMS.values():
        for run, result in sorted(found.items()):
            predictions = run / "run" / "predictions" / "test.csv"
            if result.recipe == arm and predictions.exists():
                with predictions.open(newline="", encoding="utf-8") as file:
                    answers = list(csv.DictReader(file))
                known = np.array([panel[answer["image"]] in learned for answer in answers])
                shown = [
                    auroc([each for each, one in zip(answers, part, strict=True) if one]) for part in (known, ~known)
                ]
                yield [arm, str(result.seed), str(result.epochs), *shown]


def auroc(answers: list[dict[str, str]]) -> str:
    """Return the mean AUROC of boards and its interval."""
    start = f"{LABEL}.probability."
    classes = tuple(name.removeprefix(start) for name in answers[0] if name.startswith(start))
    truth: NDArray[np.float64] = np.array(
        [[name in answer[f"{LABEL}.true"].split(SEPARATOR) for name in classes] for answer in answers], float
    )
    said = np.array([[float(answer[start + name]) for name in classes] for answer in answers])
    figure = evaluate_task(Task(LABEL, "multilabel", classes), truth, said, None).overall["auroc"]
    return f"{figure.value:.2f} [{figure.low:.2f} {figure.high:.2f}]"


if __name__ == "__main__":
    main()
