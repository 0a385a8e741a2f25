"""What the arms of `real_images.py` know on parts of the test images: panels of boards, stretches of a road.

    python benchmarks/real_images.py FOLDER circuit_boards boards.csv ...
    python benchmarks/by_part.py FOLDER circuit_boards

Boards are judged apart by whether a training board is of their panel, which is the folder of their picture. A road is
cut into fifths in the order of its kilometres. Each run below FOLDER that has predictions is judged on every part.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from machine import write_result
from potholes_by_road import FOLDS, place
from real_data import Row, rows_of
from real_images import ARMS
from result import NAME, read

from keyhole.config.settings import DataConfig
from keyhole.data.manifest import read_manifest
from keyhole.report.read_table import PredictionTable, read_table
from keyhole.tasks.evaluation import evaluate_task
from keyhole.tasks.kinds import Task

KNOWN, NEW = "panels that were learned from", "panels of their own"
FEWEST = 10
"""Images with and without the label that a part needs to count in the mean of the parts."""
STRETCHES = [f"fifth {number + 1}" for number in range(FOLDS)]
AUROC = {
    "circuit_boards": "AUROC, mean over the defects, with its 95 % interval over the boards.",
    "potholes": "AUROC with its 95 % interval over the photographs. Where nearly all photographs show a pothole, as in "
    "fifth 1 of RS290, telling that part from the others is part of the whole figure.",
}


def panels(rows: Sequence[Row]) -> dict[str, str]:
    """Return the part of each test board."""
    panel = {row["name"]: Path(row["image"]).parent.name for row in rows}
    learned = {panel[row["name"]] for row in rows if row["split"] == "train"}
    return {row["name"]: KNOWN if panel[row["name"]] in learned else NEW for row in rows if row["split"] == "test"}


def stretches(rows: Sequence[Row]) -> dict[str, str]:
    """Return the part of each test photograph of a road."""
    names = sorted((row["name"] for row in rows if row["split"] == "test"), key=place)
    return {name: STRETCHES[number * FOLDS // len(names)] for number, name in enumerate(names)}


@dataclass(frozen=True)
class Example:
    """How the test images of an example are cut.

    Attributes:
        theme: Of the dated file, and its title.
        label: What is told.
        parts: Their names in the order of the columns.
        part_of: Returns the part of each test image.
    """

    theme: str
    title: str
    label: str
    parts: Sequence[str]
    part_of: Callable[[Sequence[Row]], dict[str, str]]


EXAMPLES = {
    "circuit_boards": Example("boards_by_panel", "Circuit boards, panel by panel", "defects", (KNOWN, NEW), panels),
    "potholes": Example("potholes_by_stretch", "Potholes, stretch by stretch", "pothole", STRETCHES, stretches),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="that was given to real_images.py")
    parser.add_argument("example", choices=EXAMPLES)
    parser.add_argument("--about", help="as it was given to real_images.py")
    options = parser.parse_args()
    example = EXAMPLES[options.example]
    folder = options.folder / "-".join([options.example, *re.findall(r"\w+", options.about or "")])
    print(write_result(example.theme, example.title, report(folder, options.example, options.about or "")))


def report(folder: Path, name: str, about: str = "") -> list[str]:
    """Return the lines of the dated file, with a row for each run below the folder that has predictions."""
    example, rows = EXAMPLES[name], rows_of(folder / "images.csv")
    part_of = example.part_of(rows)
    positive = {row["name"] for row in rows if row[example.label] == "yes"}
    inside = {part: [each for each in part_of if part_of[each] == part] for part in example.parts}
    sizes = [
        f"{len(each)} in {part}" + (f" ({len(positive.intersection(each))} with one)" if positive else "")
        for part, each in inside.items()
    ]
    counted = [
        part
        for part, each in inside.items()
        if not positive or FEWEST <= len(positive.intersection(each)) <= len(each) - FEWEST
    ]
    head = ["arm", "seed", "epochs", "all", *example.parts, "mean of the parts"]
    tasks = read_manifest(DataConfig(path=folder / "images.csv")).tasks
    return [
        f"Real photographs ([{name.replace('_', ' ')}](../examples/{name}/README.md))"
        f"{f', {about}' * bool(about)}: {sum(row['split'] == 'train' for row in rows)} to learn from. Test images: "
        f"{', '.join(sizes)}. {AUROC[name]} The mean of the parts is that of {', '.join(counted)}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(cells) + " |" for cells in table(folder, tasks, part_of, example.parts, counted)),
    ]


def table(
    folder: Path, tasks: Sequence[Task], part_of: Mapping[str, str], parts: Sequence[str], counted: Sequence[str]
) -> Iterator[list[str]]:
    """Yield the cells of each run in the order of the arms, and after the seeds of an arm their mean."""
    found = sorted((path.parent, read(path.parent)) for path in folder.glob(f"*/{NAME}"))
    for arm in ARMS.values():
        runs = [(run, result) for run, result in found if result.recipe == arm and predictions(run).exists()]
        rows = [(result, values(run, tasks, part_of, parts, counted)) for run, result in runs]
        for result, figures in rows:
            yield [arm, str(result.seed), str(result.epochs), *(shown for _, shown in figures)]
        if len(rows) > 1:
            columns = zip(*(figures for _, figures in rows), strict=True)
            yield [arm, "mean", "", *(f"{statistics.mean(value for value, _ in column):.2f}" for column in columns)]


def predictions(run: Path) -> Path:
    return run / "run" / "predictions" / "test.csv"


def values(
    run: Path, tasks: Sequence[Task], part_of: Mapping[str, str], parts: Sequence[str], counted: Sequence[str]
) -> list[tuple[float, str]]:
    """Return the AUROC on all test images, on each part, and its mean over the counted ones, and how it is shown."""
    answers = read_table(predictions(run), tasks, "Run real_images.py again.")
    of = [part_of.get(name) or part_of[name.rpartition("-")[0]] for name in answers.images]  # "a-0" of drawn ones
    inside = [[at for at, part in enumerate(of) if part == wanted] for wanted in parts]
    found = [auroc(answers.at(places)) for places in inside]
    mean = statistics.mean(value for part, (value, _) in zip(parts, found, strict=True) if part in counted)
    return [auroc(answers), *found, (mean, f"{mean:.2f}")]


def auroc(answers: PredictionTable) -> tuple[float, str]:
    (task,) = answers.tasks
    figure = evaluate_task(task, answers.targets[task.name], answers.probability[task.name], None).overall["auroc"]
    assert figure.value is not None
    return figure.value, f"{figure.value:.2f} [{figure.low:.2f} {figure.high:.2f}]"


if __name__ == "__main__":
    main()
