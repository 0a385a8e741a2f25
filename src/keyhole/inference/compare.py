"""Compare runs on the same images: metrics with paired differences, changed decisions, settings that differ."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from keyhole.config.inference import CompareSettings
from keyhole.errors import ConfigError, RunError
from keyhole.inference.compared import ComparedRun, read_compared
from keyhole.report.comparison_page import ChangedCase, ComparisonReport, signed
from keyhole.report.page import estimate_text
from keyhole.report.read_table import PredictionTable
from keyhole.tasks.kinds import Task
from keyhole.tasks.paired import PairedMetric, compare_task
from keyhole.util.files import csv_text, encoded, file_names, writable_folder, write_atomic
from keyhole.util.wording import counted, distinct, listed

UNKNOWN = "unknown"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Result of `compare`.

    Attributes:
        path: Folder with compare.html, compare.csv (a row per metric and run) and cases.csv (a row per image).
        names: Names of the runs.
        tables: Their predictions for the images that all of them have, in the same order.
        metrics: Every metric of the tasks that all of them have.
        cases: By task, the images with another prediction.
        settings: Name and value in each run of the settings that differ.
        notes: What readers should know, such as images that only some of the runs have.
    """

    path: Path
    names: tuple[str, ...]
    tables: tuple[PredictionTable, ...]
    metrics: tuple[PairedMetric, ...]
    cases: Mapping[str, tuple[ChangedCase, ...]]
    settings: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Comparison({str(self.path)!r}, of {' and '.join(self.names)})"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return the comparison as text."""
        first, *others = self.names
        groups = self.tables[0].groups
        over = "images" if groups is None else f"{len({g or i for i, g in enumerate(groups)})} groups"
        lines = [
            *self.notes,
            f"{counted(len(self.tables[0]))}; differences: paired bootstrap over {over}, 95 % intervals",
        ]
        for task in self.tables[0].tasks:
            rows = [["", *self.names, *(f"{name} - {first}" for name in others)]]
            for each in (each for each in self.metrics if each.task == task.name):
                found = [f"{signed(each, i)} {each.verdict(i)}".rstrip() for i in range(len(others))]
                rows.append([each.metric, *map(estimate_text, each.values), *found])
            rows[0][0] = task.name
            lines += _aligned(rows)
            changed = self.cases[task.name]
            lines.append(
                f"{task.name}: {counted(len(changed))} with another prediction{_better_in(changed, self.names)}"
            )
        for name, values in self.settings.items():
            lines.append(f"{name}: {' | '.join(values)}")
        return [*lines, f"report: {self.path / 'compare.html'}", f"tables: compare.csv, cases.csv in {self.path}"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _better_in(cases: Sequence[ChangedCase], names: Sequence[str]) -> str:
    """Say how many of the changed decisions are right in one run alone."""
    counts = [
        sum(case.right[i] is True and sum(map(bool, case.right)) == 1 for case in cases) for i in range(len(names))
    ]
    parts = [f"{count} right in {name} alone" for name, count in zip(names, counts, strict=True) if count]
    return f": {', '.join(parts)}" if parts else ""


def compare(runs: Sequence[str | os.PathLike[str]], split: str = "test", out: str | Path | None = None) -> Comparison:
    """Compare runs on the same images.

    Args:
        runs: At least two run folders, or folders of evaluations; the others are compared with the first.
        split: Split of the run folders: `train`, `val` or `test`.
        out: Folder to write to; default is `comparison-A-B`, after the runs, in the current folder.

    Returns:
        Metrics, differences with intervals, changed decisions and settings that differ.

    Raises:
        ConfigError: There are fewer than two runs.
        RunError: A run has no predictions, or the runs have no image or no task in common.
        OutputError: The folder cannot be written.

    Example:
        >>> found = keyhole.compare(["runs/one", "runs/one"], split="val")
        >>> found.metrics[0].differences[0].value
        0.0
    """
    if isinstance(runs, str | os.PathLike):
        raise ConfigError(f"compare {os.fspath(runs)}: expected a list of two runs or more")
    asked = CompareSettings.model_validate(
        {"runs": [Path(run) for run in runs], "split": split, "out": None if out is None else Path(out)}
    )
    if len(asked.runs) < 2:
        raise ConfigError("a comparison needs two runs or more: keyhole compare RUN RUN...")
    found = [read_compared(path, asked.split) for path in asked.runs]
    names = tuple(distinct(each.name for each in found))
    notes = [note for each in found for note in each.notes]
    tasks, told = _common_tasks(names, found)
    tables, more = _common_images(names, found, tasks)
    folder = asked.out or Path("comparison-" + "-".join(file_names(names, "run")))
    first = tables[0]
    metrics = [
        metric
        for task in tasks
        for metric in compare_task(
            task, first.targets[task.name], [table.probability[task.name] for table in tables], first.groups
        )
    ]
    cases = {task.name: tuple(_changed(task, tables)) for task in tasks}
    every = dict.fromkeys(name for each in found for name in each.settings)
    settings = {name: tuple(each.settings.get(name, UNKNOWN) for each in found) for name in every}
    settings = {name: values for name, values in settings.items() if len(set(values)) > 1}
    comparison = Comparison(folder, names, tables, tuple(metrics), cases, settings, (*notes, *told, *more))
    _write(comparison)
    return comparison


def _common_tasks(names: Sequence[str], found: Sequence[ComparedRun]) -> tuple[list[Task], list[str]]:
    """Return the tasks that all runs have with the same kind and classes, and a note on the others."""
    described = [{task.name: (task.kind, task.classes) for task in each.table.tasks} for each in found]
    common = [
        task
        for task in found[0].table.tasks
        if all(each.get(task.name) == described[0][task.name] for each in described)
    ]
    others = sorted({task for each in described for task in each} - {task.name for task in common})
    if not common:
        raise RunError(f"{', '.join(names)}: no task of the same name, kind and classes in all of them.")
    return common, [
        f"not compared, since not all runs have them with the same classes: {listed(others)}"
    ] if others else []


def _common_images(
    names: Sequence[str], found: Sequence[ComparedRun], tasks: Sequence[Task]
) -> tuple[tuple[PredictionTable, ...], list[str]]:
    """Return the predictions of each run for the images that all have, by name, with the same labels; and notes."""
    places = [{name: place for place, name in enumerate(each.table.images)} for each in found]
    common = [name for name in places[0] if all(name in each for each in places)]
    if not common:
        raise RunError(
            f"{', '.join(names)}: no image is in all of them. Train them on the same splits (a column `split`), or "
            "evaluate all on the same data: keyhole evaluate RUN --data DATA"
        )
    notes = [
        f"{name}: {counted(len(each) - len(common))} that not all runs have"
        for name, each in zip(names, places, strict=True)
        if len(each) > len(common)
    ]
    elsewhere = 0
    for name in common:
        files = {each.table.files[place[name]] for each, place in zip(found, places, strict=True)}
        hashes = {each.hashes.get(name, "") for each in found}
        if len(files) > 1 and len(hashes) > 1 and "" not in hashes:
            raise RunError(f"{name}: is another file in {found[0].name} than in the others: {listed(sorted(files))}.")
        elsewhere += len(files) > 1 and "" in hashes
    if elsewhere:
        notes.append(f"{counted(elsewhere)} of the same name lie in different folders, and are taken to be the same")
    tables = [
        replace(each.table.at([place[name] for name in common]), tasks=tuple(tasks))
        for each, place in zip(found, places, strict=True)
    ]
    alike = np.ones(len(common), bool)
    for table in tables[1:]:
        for task in tasks:
            pair = tables[0].targets[task.name], table.targets[task.name]
            alike &= np.isclose(*pair, rtol=0, atol=0, equal_nan=True).all(axis=1)
    if not alike.any():
        raise RunError(f"{', '.join(names)}: the labels of all images differ between the runs.")
    if not alike.all():
        notes.append(f"{counted(int((~alike).sum()))} with other labels in one of the runs are not compared")
    return tuple(table.at(np.flatnonzero(alike).tolist()) for table in tables), notes


def _changed(task: Task, tables: Sequence[PredictionTable]) -> Iterator[ChangedCase]:
    """Yield the images that are decided differently, those whose fit to the label changed most first."""
    said = [table.said(task) for table in tables]
    found = []
    for i, image in enumerate(tables[0].images):
        labels = [each[i] for each in said]
        if len(set(labels)) == 1:
            continue
        truth = tables[0].truth[task.name][i]
        credit = [task.credit(table.targets[task.name][i], table.probability[task.name][i]) for table in tables]
        right = tuple(task.is_right(truth, label) for label in labels)
        known = [each for each in credit if each is not None]
        found.append(
            (max(known) - min(known) if known else 0.0, ChangedCase(image, truth, tuple(labels), right, tuple(credit)))
        )
    yield from (case for _, case in sorted(found, key=lambda pair: -pair[0]))


# Files


def _write(comparison: Comparison) -> None:
    folder = writable_folder(comparison.path)
    names, tables = comparison.names, comparison.tables
    report = ComparisonReport(
        names, tables, comparison.metrics, comparison.cases, comparison.settings, comparison.notes
    )
    write_atomic(folder / "compare.csv", encoded(csv_text(_metric_rows(comparison))))
    write_atomic(folder / "cases.csv", encoded(csv_text(_case_rows(names, tables))))
    write_atomic(folder / "compare.html", encoded(report.html()))


def _metric_rows(comparison: Comparison) -> Iterator[list[object]]:
    yield ["task", "metric", "run", "value", "low", "high", "minus_first", "difference_low", "difference_high"]
    for each in comparison.metrics:
        differences = (None, *each.differences)
        for name, value, difference in zip(comparison.names, each.values, differences, strict=True):
            more = ("", "", "") if difference is None else (difference.value, difference.low, difference.high)
            yield [each.task, each.metric, name, value.value, value.low, value.high, *more]


def _case_rows(names: Sequence[str], tables: Sequence[PredictionTable]) -> Iterator[list[object]]:
    """Yield a row per image: its labels, and label and fit in each run."""
    tasks, first = tables[0].tasks, tables[0]
    columns = [f"{task.name}.{name}.{what}" for task in tasks for name in names for what in ("predicted", "fit")]
    yield ["image", *(f"{task.name}.true" for task in tasks), *columns]
    said = {task: [table.said(task) for table in tables] for task in tasks}
    for i, image in enumerate(first.images):
        cells: list[object] = [image, *(first.truth[task.name][i] for task in tasks)]
        for task in tasks:
            for table, labels in zip(tables, said[task], strict=True):
                cells += [labels[i], task.credit(table.targets[task.name][i], table.probability[task.name][i])]
        yield cells
