"""Write the results into the README.md of each folder of `examples/`, from the recorded runs of `real_images.py`.

python benchmarks/results.py FOLDER      # records the runs below FOLDER
python benchmarks/example_tables.py
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from real_images import ARMS, METRICS, ROOT
from result import Figure, Result
from results import RECORDS, recorded, shown

from keyhole.util.files import write_atomic

BEGIN, END = "<!-- results, written by benchmarks/example_tables.py -->", "<!-- end of results -->"
KEPT, CHANCE = "kept patches on a defect", "of all patches"
COLUMNS = {"auroc": "AUROC", "average_precision": "mean average precision"}
ABOUT = """Mean ± standard deviation over the seeds, and in brackets the 95 % interval over the test images (mean of the
seeds'). Time is that of an epoch with its validation, memory the peak of the process. The last column is the share
of the kept patches that touch an annotated defect, on held-out images that have one, and the share of all patches that
do, which is what patches kept at random would reach."""


def main(examples: Path = ROOT / "examples", records: Path = RECORDS) -> None:
    found: defaultdict[str, defaultdict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for each in recorded(records):
        name, _, part = each.data.partition(", ")
        if name in METRICS:
            found[name][part].append(each)
    for name, parts in found.items():
        path = examples / name / "README.md"
        text = path.read_text()
        before, (_, after) = text.split(BEGIN)[0], text.split(END)
        lines = [line for part, runs in sorted(parts.items()) for line in table(name, part, runs)]
        write_atomic(path, "\n".join([before + BEGIN, "", ABOUT, "", *lines, END + after]))
        print(path)


def table(example: str, part: str, runs: Sequence[Result]) -> list[str]:
    """Return the lines of a table of the arms, in their order."""
    metric, by_arm = METRICS[example], {arm: [run for run in runs if run.recipe == arm] for arm in ARMS.values()}
    tasks = [name.removesuffix(f".{metric}") for name in runs[0].metrics if name.endswith(metric)]
    heads = [f"{COLUMNS[metric]}{f', {task}' if len(tasks) > 1 else ''}" for task in tasks]
    rows = [["", *heads, "seeds", "s an epoch", "peak GB", "kept on a defect (chance)"]]
    rows.append(["---"] * len(rows[0]))
    for arm, each in by_arm.items():
        if each:
            figures = [estimate([run.metrics[f"{task}.{metric}"] for run in each]) for task in tasks]
            rows.append([arm, *figures, str(len(each)), *_cost(each), _kept(each)])
    commits: defaultdict[str, set[str]] = defaultdict(set)
    for run in runs:
        commits[f"{run.machine} {run.date}, commit"].add(run.commit)
    made = [f"{machine} {', '.join(sorted(each))}" for machine, each in sorted(commits.items())]
    return [f"{part[:1].upper()}{part[1:]}:", "", *(f"| {' | '.join(row)} |" for row in rows), "", *made, ""]


def estimate(figures: Sequence[Figure]) -> str:
    """Return mean and deviation over the seeds, and the mean of their intervals.

    >>> estimate([Figure(0.9, 0.8, 0.95), Figure(0.8, 0.7, 0.85)])
    '0.850 ± 0.071 [0.750 0.900]'
    """
    if len(figures) == 1:
        return shown(figures)
    low, high = ([end for each in figures if (end := each[place]) is not None] for place in (1, 2))
    interval = f" [{statistics.mean(low):.3f} {statistics.mean(high):.3f}]" if low and high else ""
    return shown(figures) + interval


def _cost(runs: Sequence[Result]) -> list[str]:
    return [f"{statistics.median(getattr(run, name) for run in runs):.3g}" for name in ("epoch_seconds", "peak_gb")]


def _kept(runs: Sequence[Result]) -> str:
    if KEPT not in runs[0].metrics:
        return ""
    kept, chance = (statistics.mean(run.metrics[name].value for run in runs) for name in (KEPT, CHANCE))
    return f"{kept:.0%} ({chance:.0%})"


if __name__ == "__main__":
    main()
