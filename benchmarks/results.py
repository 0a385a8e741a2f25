"""The table of all results, `benchmarks/results.md`: one row per configuration, its seeds joined.

    python benchmarks/results.py [FOLDER ...]

Every `result.json` below the FOLDERs becomes a line of `benchmarks/results/DATA.jsonl`, in place of an earlier run of
the same data, recipe, seed and hardware; runs of other days and machines stay. The table is made from these lines
alone: without a FOLDER it is only written again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from result import KINDS, NAME, Figure, Result, read

from keyhole.util.files import write_atomic

RECORDS = Path(__file__).parent / "results"
TABLE = Path(__file__).parent / "results.md"
HEAD = ("recipe", "seeds", "result on images never trained on", "epochs", "s an epoch", "peak GB", "hardware", "made")
ABOUT = """# Results of training

One row per configuration. Several seeds: mean ± standard deviation over the seeds; one seed: the value and its 95 %
interval over the images. Time and memory are medians over the seeds; time includes the validation of each epoch, memory
is the peak of the process. Generated and composite images compare settings, and say nothing about real ones.

Made by `python benchmarks/results.py` from the lines of [`results/`](results), one per run, which name the processor
and the versions.
"""


def main(arguments: Sequence[str] | None = None, records: Path = RECORDS, table: Path = TABLE) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="runs are looked for below it")
    folders = parser.parse_args(arguments).folders
    found = [read(path.parent) for folder in folders for path in sorted(folder.rglob(NAME))]
    if folders and not found:
        parser.error(f"no {NAME} below {', '.join(map(str, folders))}")
    add(found, records)
    write_atomic(table, table_of(recorded(records)))
    print(f"{len(found)} runs read; {table}")


def add(results: Iterable[Result], records: Path) -> None:
    """Write results among the recorded ones, each in place of an earlier run of the same key."""
    by_file: defaultdict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_file[re.sub(r"[^a-z0-9]+", "-", result.data.lower()).strip("-")].append(result)
    records.mkdir(exist_ok=True)
    for name, new in by_file.items():
        path = records / f"{name}.jsonl"
        of = {_key(each): each for each in [*_lines(path), *sorted(new, key=lambda each: each.date)]}
        write_atomic(path, "".join(json.dumps(asdict(of[key])) + "\n" for key in sorted(of)))


def recorded(records: Path = RECORDS) -> list[Result]:
    """Return all recorded results."""
    return [result for path in sorted(records.glob("*.jsonl")) for result in _lines(path)]


def _lines(path: Path) -> list[Result]:
    if not path.exists():
        return []
    return [Result.from_json(json.loads(line)) for line in path.read_text().splitlines()]


def _key(result: Result) -> tuple[str, str, str, int]:
    return result.data, result.recipe, result.hardware, result.seed


def table_of(results: Iterable[Result]) -> str:
    """Return the Markdown of the table: a section for each data set, real ones first."""
    sections: defaultdict[tuple[int, str], defaultdict[tuple[str, str], list[Result]]]
    sections = defaultdict(lambda: defaultdict(list))
    for each in sorted(results, key=_key):
        sections[KINDS.index(each.kind), each.data][each.recipe, each.hardware].append(each)
    lines = [ABOUT]
    for (kind, data), rows in sorted(sections.items()):
        lines += [f"## {data} ({KINDS[kind]})", "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += ["| " + " | ".join(_cells(runs)) + " |" for runs in rows.values()]
        lines.append("")
    return "\n".join(lines)


def _cells(runs: Sequence[Result]) -> list[str]:
    """Return the cells of a row from the runs of a configuration, which differ in their seeds."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    figures = [f"{name} {shown([run.metrics[name] for run in runs if name in run.metrics])}" for name in names]
    return [
        runs[0].recipe,
        ", ".join(str(run.seed) for run in runs),
        "; ".join(figures),
        _range([run.epochs for run in runs]),
        f"{statistics.median(run.epoch_seconds for run in runs):.3g}",
        f"{statistics.median(run.peak_gb for run in runs):.2f}",
        runs[0].hardware,
        "; ".join(dict.fromkeys(f"{run.date}, {run.commit}" for run in runs)),
    ]


def shown(figures: Sequence[Figure]) -> str:
    """Return mean and standard deviation of several seeds; value and interval of one.

    >>> shown([Figure(0.9), Figure(0.8)]), shown([Figure(0.9, 0.85, 0.94)])
    ('0.850 ± 0.071', '0.900 [0.850 0.940]')
    """
    values = [each.value for each in figures]
    if len(values) > 1:
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    (one,) = figures
    return f"{one.value:.3f}" if one.low is None else f"{one.value:.3f} [{one.low:.3f} {one.high:.3f}]"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
