"""compare.html: metrics of runs side by side, the differences, the images that changed, the settings that differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from keyhole.report.figures import Drawn
from keyhole.report.page import METRIC_NAMES, HtmlTable, estimate_text, render, value_and_limits
from keyhole.report.read_table import PredictionTable
from keyhole.report.svg import COLORS, GREY, draw_svg, shortened
from keyhole.tasks.intervals import short
from keyhole.tasks.kinds import Task
from keyhole.tasks.metrics import higher_is_better
from keyhole.tasks.paired import PairedMetric
from keyhole.util.files import file_names
from keyhole.util.version import VERSION
from keyhole.util.wording import counted


class ChangedCase(NamedTuple):
    """An image with another prediction: per run its label, whether it is right, and how well it fits."""

    image: str
    truth: str
    labels: tuple[str, ...]
    right: tuple[bool | None, ...]
    credit: tuple[float | None, ...]


@dataclass(frozen=True, eq=False)
class ComparisonReport:
    """What the page says; see `keyhole.inference.compare.Comparison`."""

    names: Sequence[str]
    tables: Sequence[PredictionTable]
    metrics: Sequence[PairedMetric]
    cases: Mapping[str, Sequence[ChangedCase]]
    settings: Mapping[str, Sequence[str]]
    notes: Sequence[str]

    def html(self) -> str:
        """Return the page."""
        tasks = self.tables[0].tasks
        ids = [name.lower() for name in file_names([task.name for task in tasks], "task")]
        return render(
            "comparison.html",
            version=VERSION,
            title=f"Comparison of {', '.join(self.names)}",
            summary=self._summary(),
            notes=self.notes,
            tasks=[self._section(task, f"task-{name}") for task, name in zip(tasks, ids, strict=True)],
            settings=HtmlTable(
                ["setting", *self.names],
                [[name, *values] for name, values in self.settings.items()],
                range(len(self.names) + 1),
            ),
        )

    def _summary(self) -> str:
        """Say on what the runs were compared, and which metrics differ by more than chance."""
        groups = self.tables[0].groups
        said = f"{len(self.names)} runs were compared on the same {counted(len(self.tables[0]))}"
        said += "." if groups is None else f" of {len({group or i for i, group in enumerate(groups)})} groups."
        parts = []
        for i, name in enumerate(self.names[1:]):
            for verdict in ("better", "worse"):
                found = [self._named(each, i) for each in self.metrics if each.verdict(i) == verdict]
                if found:
                    parts.append(f"{name} is {verdict} than {self.names[0]} in {', '.join(found)}.")
        other = "other " if parts else ""
        return " ".join([said, *parts, f"No {other}difference is larger than chance explains."])

    def _named(self, each: PairedMetric, i: int) -> str:
        task = f"{each.task}: " if len(self.tables[0].tasks) > 1 else ""
        return f"{task}{METRIC_NAMES.get(each.metric, each.metric)} ({signed(each, i)})"

    def _section(self, task: Task, name: str) -> dict[str, Any]:
        metrics = [each for each in self.metrics if each.task == task.name]
        drawn = [each for each in metrics if any(value.value is not None for value in each.differences)]
        cases = self.cases[task.name]
        head = ["metric", *self.names]
        head += [text for other in self.names[1:] for text in (f"{other} minus {self.names[0]}", "")]
        rows = [
            [
                METRIC_NAMES.get(each.metric, each.metric),
                *map(estimate_text, each.values),
                *(text for i in range(len(each.differences)) for text in (signed(each, i), each.verdict(i))),
            ]
            for each in metrics
        ]
        words = [0, *range(len(self.names) + 2, len(head), 2)]
        return {
            "id": name,
            "name": task.name,
            "metrics": HtmlTable(head, rows, words),
            "figures": [self._differences(drawn, name)] if drawn else [],
            "changes": f"{len(cases):,} of {counted(len(self.tables[0]))} with another prediction.",
            "counts": self._counts(task, cases),
            "cases": self._cases(task, cases),
        }

    def _differences(self, metrics: Sequence[PairedMetric], name: str) -> Drawn:
        """Draw the difference of each metric with its interval."""

        def draw(figure: Any) -> None:
            axis = figure.subplots()
            axis.axvline(0, linestyle="--", color=GREY, linewidth=1)
            others = self.names[1:]
            for i, other in enumerate(others):
                shift = 0.6 * ((i + 0.5) / len(others) - 0.5)
                for row, each in enumerate(metrics):
                    value = each.differences[i]
                    if value.value is None:
                        continue
                    color, label = COLORS[i % len(COLORS)], shortened(other) if row == 0 else None
                    axis.plot([value.value], [row + shift], "o", color=color, markersize=5, label=label)
                    if value.low is not None and value.high is not None:
                        axis.plot([value.low, value.high], [row + shift] * 2, color=color)
            axis.set_yticks(range(len(metrics)), [_metric_and_side(each.metric) for each in metrics])
            axis.invert_yaxis()
            axis.set_xlabel(f"difference from {shortened(self.names[0])}")
            if len(others) > 1:
                axis.legend()

        caption = (
            "Each metric minus that of the first run, with its 95 % interval: the paired bootstrap. Better is to the "
            "right, but to the left where the arrow points there."
        )
        size = (4.9, 1.0 + 0.3 * len(metrics) * max(1, 0.6 * (len(self.names) - 1)))
        return Drawn("Differences", caption, draw_svg(f"{name}-differences", size, draw))

    def _counts(self, task: Task, cases: Sequence[ChangedCase]) -> HtmlTable:
        """Count which runs are right where they differ."""
        words = {True: "right", False: "wrong", None: "unknown"}
        counts = Counter(case.right for case in cases) if task.classes else Counter[tuple[bool | None, ...]]()
        rows = [[*(words[each] for each in right), f"{count:,}"] for right, count in counts.most_common()]
        return HtmlTable([*self.names, "images"], rows, range(len(self.names)))

    def _cases(self, task: Task, cases: Sequence[ChangedCase]) -> HtmlTable:
        head = ["image", "true", *self.names, *(f"{_fit(task)}, {name}" for name in self.names)]
        rows = (
            [
                case.image,
                case.truth,
                *(label or "none" for label in case.labels),
                *("unknown" if each is None else short(abs(each)) for each in case.credit),
            ]
            for case in cases
        )
        return HtmlTable.cut(head, rows, range(len(self.names) + 2), "cases.csv")


def _metric_and_side(metric: str) -> str:
    """Return the name of a metric; an arrow marks those of which less is better."""
    name = METRIC_NAMES.get(metric, metric)
    return name if higher_is_better(metric) else f"\N{LEFTWARDS ARROW} {name}"


def _fit(task: Task) -> str:
    return "probability of the truth" if task.classes else "error"


def signed(each: PairedMetric, i: int) -> str:
    """Return a difference with its sign and limits."""
    value, limits = value_and_limits(each.differences[i])
    sign = "+" if (each.differences[i].value or 0.0) > 0 else ""
    return f"{sign}{value} [{limits}]" if limits else value
