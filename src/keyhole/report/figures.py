"""The figures of one task in a report: curves, calibration, confusion, errors; and the learning curves of a run.

scikit-learn computes the curves. The figures in the legends are those of `TaskMetrics`.

Letters: n images, k classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keyhole.report.page import METRIC_NAMES
from keyhole.report.svg import COLORS, GREY, draw_svg, shortened
from keyhole.tasks.evaluation import TaskMetrics
from keyhole.tasks.intervals import NORMAL, wilson
from keyhole.tasks.measures import ClassMeasures, RegressionMeasures
from keyhole.tasks.operating_point import BALANCED, SENSITIVE, OperatingPoint

MAX_CURVES = 8
"""Classes with a curve of their own; of more, those with the lowest AUROC."""
MAX_CURVE_POINTS = 500
MAX_DOTS = 2000
"""Images that are drawn as one dot each; of more, their density is shown."""
MAX_COUNTED_CLASSES = 12
"""Classes of a confusion matrix whose counts are written into it."""
MAX_NAMED_CLASSES = 40
BINS = 10
"""Bins of probability in a calibration plot."""
SIZE = (4.9, 4.1)
KEPT = {"kept.changed": "new", "kept.attended": "attended", "kept.blank": "of one colour"}
"""Columns of metrics.csv that are shares of the kept patches."""
MARKERS = {BALANCED: ("o", "balanced"), SENSITIVE: ("^", "sensitive")}


class Drawn(NamedTuple):
    """A figure for a page: its heading, what it shows, and the <svg> element."""

    title: str
    caption: str
    svg: str


def task_figures(
    result: TaskMetrics, measures: ClassMeasures | RegressionMeasures, points: Sequence[OperatingPoint], name: str
) -> list[Drawn]:
    """Return the figures that suit the kind of a task; none without a labelled image.

    Args:
        result: Metrics of the task.
        measures: What they were computed from.
        points: Operating points, marked on the ROC curve.
        name: Starts the ids of the figures; letters, digits and dashes.
    """
    if not result.n:
        return []
    if isinstance(measures, RegressionMeasures):
        return [_predicted_against_true(result, measures, name), _errors(measures, name)]
    found = []
    if curves := _curves_of(result, measures):
        found += [_roc(result, measures, curves, points, name), _precision_recall(result, measures, curves, name)]
    return [*found, _calibration(measures, name), *_confusion(result, name)]


# ROC and precision-recall


def _curves_of(result: TaskMetrics, measures: ClassMeasures) -> list[int]:
    """Return the classes whose curves are drawn: the positive one, or those that only some of the images have."""
    if result.task.positive is not None:
        return [1] if measures.mixed[1] else []
    mixed = np.flatnonzero(measures.mixed).tolist()
    value = {c: result.per_class[measures.classes[c]]["auroc"].value or 0.0 for c in mixed}
    return sorted(sorted(mixed, key=lambda c: value[c])[:MAX_CURVES])


def _which(curves: Sequence[int], measures: ClassMeasures) -> str:
    if len(curves) == 1:
        return f"{measures.classes[curves[0]]} against the rest."
    shown = (
        f"The {len(curves)} with the lowest AUROC of {measures.mixed.sum()} classes"
        if len(curves) < measures.mixed.sum()
        else "Each class"
    )
    return f"{shown} against the rest."


def _roc(
    result: TaskMetrics, of: ClassMeasures, curves: Sequence[int], points: Sequence[OperatingPoint], name: str
) -> Drawn:
    from sklearn.metrics import roc_curve

    def draw(figure: Any) -> None:
        axis = _square(figure, "1 - specificity", "sensitivity")
        axis.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        for color, c in zip(COLORS, curves, strict=False):
            false, true, _ = roc_curve(of.truth[:, c], of.probability[:, c])
            label = of.classes[c]
            value = result.per_class[label]["auroc"].value
            axis.plot(
                *_thinned(false, true), color=color, label=_legend(label, value, len(curves), "AUROC"), clip_on=False
            )
            for point in points:
                if point.label == label and len(curves) == 1 and point.threshold.rule in MARKERS:
                    marker, rule = MARKERS[point.threshold.rule]
                    x, y = 1 - (point.specificity.value or 0.0), point.sensitivity.value or 0.0
                    said = f"{rule}, above {point.threshold.value:.3f}"
                    axis.plot([x], [y], marker, color="black", markersize=6, label=said, zorder=5, clip_on=False)
        axis.legend(loc="lower right")

    return Drawn("ROC curve", f"{_which(curves, of)} Dashed: guessing.", draw_svg(f"{name}-roc", SIZE, draw))


def _precision_recall(result: TaskMetrics, of: ClassMeasures, curves: Sequence[int], name: str) -> Drawn:
    from sklearn.metrics import precision_recall_curve

    def draw(figure: Any) -> None:
        axis = _square(figure, "recall (sensitivity)", "precision")
        for color, c in zip(COLORS, curves, strict=False):
            precision, recall, _ = precision_recall_curve(of.truth[:, c], of.probability[:, c], drop_intermediate=True)
            label = of.classes[c]
            value = result.per_class[label]["average_precision"].value
            said = _legend(label, value, len(curves), "average precision")
            axis.plot(*_thinned(recall, precision), color=color, label=said, drawstyle="steps-post", clip_on=False)
            if len(curves) == 1:
                axis.axhline(of.truth[:, c].mean(), linestyle="--", color=GREY, linewidth=1)
        axis.legend(loc="lower left")

    dashed = " Dashed: guessing, the share of the class." if len(curves) == 1 else ""
    return Drawn("Precision-recall curve", f"{_which(curves, of)}{dashed}", draw_svg(f"{name}-pr", SIZE, draw))


def _legend(label: str, value: float | None, count: int, what: str) -> str:
    figure = "undefined" if value is None else f"{value:.3f}"
    return f"{what} {figure}" if count == 1 else f"{shortened(label)} {figure}"


def _square(figure: Any, x: str, y: str) -> Any:
    axis = figure.subplots()
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=x, ylabel=y)
    return axis


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a curve with at most `MAX_CURVE_POINTS` points, its ends among them."""
    if len(x) <= MAX_CURVE_POINTS:
        return x, y
    places = np.linspace(0, len(x) - 1, MAX_CURVE_POINTS).round().astype(np.int64)
    return x[places], y[places]


# Calibration


def _calibration(of: ClassMeasures, name: str) -> Drawn:
    """Draw how often the model is right against what it says, with Wilson's intervals, and how often it says so."""
    from sklearn.calibration import calibration_curve

    if of.exclusive and len(of.classes) == 2:
        right, said, what = of.truth[:, 1], of.probability[:, 1], f"probability of {shortened(of.classes[1])}"
        share, caption = f"share that is {shortened(of.classes[1])}", "Predicted probability against observed share"
    elif of.exclusive:
        right, said, what = of.all_right, of.probability.max(axis=1), "probability of the predicted class"
        share, caption = "share decided right", "Probability of the predicted class against the share decided right"
    else:
        right, said, what = of.truth.ravel(), of.probability.ravel(), "probability of a label"
        share, caption = "share that has it", "Predicted probability against observed share, all labels together"
    said = np.clip(said, 0, 1)
    place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], said)  # as in calibration_curve
    counts = np.bincount(place, minlength=BINS)
    observed, mean = calibration_curve(right, said, n_bins=BINS)
    limits = np.array([wilson(p, n, NORMAL) for p, n in zip(observed, counts[counts > 0], strict=True)])

    def draw(figure: Any) -> None:
        axis, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axis.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        bars = np.abs(limits.T - observed)
        axis.errorbar(mean, observed, bars, color=COLORS[0], ecolor="#9ec5e8", marker="o", markersize=4, clip_on=False)
        axis.set(xlim=(0, 1), ylim=(0, 1), ylabel=share)
        below.bar((np.arange(BINS) + 0.5) / BINS, counts, 0.9 / BINS, color=GREY)
        below.set(xlabel=what, ylabel="images" if of.exclusive else "count")
        below.locator_params(axis="y", nbins=2, integer=True)

    caption += " in ten bins, with 95 % intervals. On the dashed line the model means what it says."
    return Drawn("Calibration", caption, draw_svg(f"{name}-calibration", SIZE, draw))


# Confusion


def _confusion(result: TaskMetrics, name: str) -> list[Drawn]:
    assert result.confusion is not None
    classes, counts = result.task.classes, result.confusion
    if result.task.exclusive:
        columns, title = classes, "Confusion matrix"
        caption = "Images by true and predicted class; the shade is the share of the true class."
    elif len(classes) > MAX_NAMED_CLASSES:
        return []
    else:
        # of each label: (no, yes) true by (no, yes) predicted
        counts = np.stack([counts[:, 1, 1], counts[:, 1, 0], counts[:, 0, 1], counts[:, 0, 0]], axis=1)
        columns, title = ("found", "missed", "false alarm", "rightly none"), "Decisions by label"
        caption = "Images by label; the shade is the share of those that have it, or that do not."
    return [
        Drawn(
            title,
            caption,
            draw_svg(
                f"{name}-confusion",
                _matrix_size(counts),
                partial(_matrix, classes, columns, counts, result.task.exclusive),
            ),
        )
    ]


def _matrix_size(counts: NDArray[np.int64]) -> tuple[float, float]:
    rows, columns = counts.shape
    return (SIZE[0], SIZE[1]) if rows == columns else (SIZE[0], max(1.6, min(0.34 * rows + 0.9, 9.0)))


def _matrix(
    classes: Sequence[str], columns: Sequence[str], counts: NDArray[np.int64], exclusive: bool, figure: Any
) -> None:
    of = counts.sum(axis=1, keepdims=True)
    if not exclusive:
        having, others = counts[:, :2].sum(axis=1), counts[:, 2:].sum(axis=1)
        of = np.stack([having, having, others, others], axis=1)
    share = counts / np.maximum(of, 1)
    axis = figure.subplots()
    axis.grid(visible=False)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1.25, aspect="auto", interpolation="nearest")
    if len(classes) <= MAX_NAMED_CLASSES:
        rows, across = counts.shape
        axis.hlines(np.arange(1, rows) - 0.5, -0.5, across - 0.5, color="white", linewidth=1)
        axis.vlines(np.arange(1, across) - 0.5, -0.5, rows - 0.5, color="white", linewidth=1)
        turn = sum(len(shortened(each, 18)) + 2 for each in columns) > 50
        axis.set_xticks(range(len(columns)), [shortened(each, 18) for each in columns], rotation=90 if turn else 0)
        axis.set_yticks(range(len(classes)), [shortened(each, 18) for each in classes])
    axis.tick_params(length=0, labelsize=9 if len(classes) <= MAX_COUNTED_CLASSES else 5.5)
    if exclusive:
        axis.set(xlabel="predicted", ylabel="true")
    if max(counts.shape) <= MAX_COUNTED_CLASSES or not exclusive:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if share[row, column] > 0.7 else "black"
            text = f"{count:,}\n{share[row, column]:.0%}" if len(classes) <= 4 and exclusive else f"{count:,}"
            axis.text(column, row, text, ha="center", va="center", color=color)


# Numbers


def _predicted_against_true(result: TaskMetrics, of: RegressionMeasures, name: str) -> Drawn:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        low, high = (float(pick(np.concatenate([of.truth, of.said]))) for pick in (np.min, np.max))
        margin = 0.04 * (high - low) or 1.0
        ends = (low - margin, high + margin)
        axis.plot(ends, ends, "--", color=GREY, linewidth=1)
        _cloud(axis, of.truth, of.said, ends)
        name = shortened(result.task.name)
        axis.set(xlim=ends, ylim=ends, aspect="equal", xlabel=f"true {name}", ylabel=f"predicted {name}")

    svg = draw_svg(f"{name}-scatter", SIZE, draw)
    return Drawn("Predicted against true", "Dashed: a prediction without error.", svg)


def _cloud(axis: Any, x: NDArray[np.float64], y: NDArray[np.float64], ends: tuple[float, float]) -> None:
    if len(x) <= MAX_DOTS:
        axis.plot(x, y, "o", color=COLORS[0], alpha=0.55, markersize=4, markeredgewidth=0)
    else:
        axis.hexbin(x, y, gridsize=45, extent=(*ends, *ends), mincnt=1, bins="log", cmap="Blues")


def _errors(of: RegressionMeasures, name: str) -> Drawn:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.hist(of.error, bins=min(30, max(5, round(np.sqrt(len(of.error))))), color=COLORS[0])
        axis.axvline(0, linestyle="--", color=GREY, linewidth=1)
        axis.set(xlabel="predicted minus true", ylabel="images")
        axis.locator_params(axis="y", integer=True)

    bias = f"Mean {of.error.mean():.4g}, standard deviation {of.error.std():.4g}."
    return Drawn(
        "Errors", f"{bias} Left of the dashed line the prediction is too low.", draw_svg(f"{name}-errors", SIZE, draw)
    )


# Learning curves


def learning_curves(
    rows: Sequence[Mapping[str, float]], metrics: Mapping[str, str], best: int, split: str
) -> list[Drawn]:
    """Return the loss, the metrics and the health of the selection of each epoch, as far as they are known.

    Args:
        rows: Rows of metrics.csv.
        metrics: Name of the metric that is drawn, by task.
        best: Epoch of the best model.
        split: The split that was watched.
    """
    epochs = [row["epoch"] for row in rows]
    names = {"val": "validation", "test": "test"}

    def known(key: str) -> bool:
        return any(np.isfinite(row.get(key, np.nan)) for row in rows)

    def line(axis: Any, key: str, label: str, color: str) -> None:
        if known(key):
            values = [row.get(key, np.nan) for row in rows]
            axis.plot(epochs, values, color=color, label=label, marker="." if len(rows) <= 60 else "")

    def finish(axis: Any, y: str) -> None:
        axis.axvline(best, linestyle=":", color="black", linewidth=1.2, label=f"model of epoch {best}")
        axis.set(xlabel="epoch", ylabel=y)
        axis.locator_params(axis="x", integer=True)
        axis.legend()

    def losses(figure: Any) -> None:
        axis = figure.subplots()
        line(axis, "train.loss", "training", COLORS[0])
        line(axis, f"{split}.loss", names[split], COLORS[1])
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        finish(axis, "loss")

    def figures(figure: Any) -> None:
        axis = figure.subplots()
        for color, (task, metric) in zip(COLORS, metrics.items(), strict=False):
            line(axis, f"{split}.{task}.{metric}", f"{shortened(task)}: {METRIC_NAMES.get(metric, metric)}", color)
        finish(axis, f"{names[split]} metric")

    def kept(figure: Any) -> None:
        gain = known("kept.gain")
        axis, *below = figure.subplots(1 + gain, 1, sharex=True, height_ratios=(3, 2) if gain else None, squeeze=False)[
            :, 0
        ]
        for color, (key, label) in zip(COLORS, KEPT.items(), strict=False):
            line(axis, key, label, color)
        margin = 0.05 * (epochs[-1] - epochs[0]) or 1.0
        axis.set(xlim=(epochs[0] - margin, epochs[-1] + margin), ylim=(0, 1.04))
        for each in below:
            each.axhline(0, linestyle="--", color=GREY, linewidth=1)
            line(each, "kept.gain", "gain", COLORS[3])
            each.set(xlabel="epoch", ylabel="gain in loss")
            each.axvline(best, linestyle=":", color="black", linewidth=1.2)
        finish(axis, "share of kept patches")
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
        if below:
            axis.set_xlabel("")

    drawn = [Drawn("Loss", "The mean over the images of an epoch.", draw_svg("training-loss", SIZE, losses))]
    if any(f"{split}.{task}.{metric}" in row for row in rows for task, metric in metrics.items()):
        caption = f"On the {names[split]} split, after each epoch."
        drawn.append(Drawn("Metric", caption, draw_svg("training-metric", SIZE, figures)))
    if any(map(known, KEPT)):
        caption = (
            f"Of the kept patches of {'the watched' if known('kept.gain') else 'some training'} images: new since "
        )
        caption += "the epoch before, those that the attention rests on, and those of one colour."
        if known("kept.gain"):
            caption += " Gain: loss of as many random patches minus that of the kept ones; above 0 the selection helps."
        drawn.append(Drawn("Selection", caption, draw_svg("training-kept", SIZE, kept)))
    return drawn
