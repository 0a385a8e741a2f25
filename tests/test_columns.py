"""What the columns of a CSV mean where nobody says it: labels, identifiers, patients, splits, unknown labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import Say
from data_sets import read
from PIL import Image

from keyhole.config.settings import DataConfig
from keyhole.data.manifest import Manifest, read_for_tasks
from keyhole.errors import ConfigError, DataError
from keyhole.tasks.kinds import Task

N = 24


def table(folder: Path, columns: dict[str, Sequence[object]], delimiter: str = ",") -> Path:
    """A CSV of 24 images (files that nobody looks into), with these columns beside `image`."""
    for i in range(N):
        (folder / f"{i}.png").write_bytes(b"")
    path = folder / "labels.csv"
    rows = [["image", *columns]] + [[f"{i}.png", *(str(cells[i]) for cells in columns.values())] for i in range(N)]
    path.write_text("\n".join(delimiter.join(row) for row in rows) + "\n")
    return path


LABEL = ["cat", "dog"] * (N // 2)
PATIENT = [f"P{i // 3}" for i in range(N)]


def sides(manifest: Manifest, of: Sequence[str]) -> int:
    """The values whose images are in more than one split."""
    found = defaultdict(set)
    for item in manifest.items:
        found[of[int(item.image.stem)]].add(item.split)
    return sum(len(splits) > 1 for splits in found.values())


@pytest.mark.parametrize(
    "name",
    "patient,patient_id,PatientID,Patient No.,patients,case_id,case,subject,subject_id,donor_id,specimen,"
    "anonymous_patient_id,slide_id,slide,Slide Name".split(","),
)
def test_patients_and_the_like_are_groups_and_never_classes(name: str, tmp_path: Path) -> None:
    manifest = read(table(tmp_path, {name: PATIENT, "label": LABEL}))
    assert [task.name for task in manifest.tasks] == ["label"]
    assert [item.group for item in manifest.items] == PATIENT
    assert sides(manifest, PATIENT) == 0
    notes = [note for note in manifest.notes if f"`{name}` is the group" in note]
    assert len(notes) == 1
    assert "each of its 8 values stay in one split" in notes[0]
    assert "--data.group" in notes[0]


def test_the_widest_of_several_groups_is_taken_unless_there_is_a_column_group(tmp_path: Path) -> None:
    slide = [f"S{i // 2}" for i in range(N)]
    manifest = read(table(tmp_path, {"slide_id": slide, "patient": PATIENT, "label": LABEL}))
    assert [item.group for item in manifest.items] == PATIENT
    assert any("`slide_id` (names what images belong together)" in note for note in manifest.notes)
    manifest = read(table(tmp_path, {"group": slide, "patient": PATIENT, "label": LABEL}))
    assert [item.group for item in manifest.items] == slide
    assert [task.name for task in manifest.tasks] == ["label"]
    (doubt,) = manifest.doubts
    assert (doubt.name, doubt.fix) == ("patient", "If they are patients or the like: --data.group 'patient'.")
    assert doubt.line() in manifest.notes


def test_the_user_says_what_is_meant(tmp_path: Path) -> None:
    site = ["north", "south", "east", "west"] * (N // 4)
    path = table(tmp_path, {"patient": PATIENT, "site": site, "label": LABEL})
    manifest = read(path, group="none", tasks=("label",))
    assert {item.group for item in manifest.items} == {None}
    manifest = read(path, group="site", tasks=("label",))
    assert [item.group for item in manifest.items] == site
    assert sides(manifest, site) == 0
    manifest = read(path, tasks=("patient",))
    assert [task.name for task in manifest.tasks] == ["patient"]
    assert {item.group for item in manifest.items} == {None}
    with pytest.raises(DataError, match=r"no column 'pateint' for --data.group \(did you mean 'patient'\?\)"):
        read(path, group="pateint")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"names a column, but .* is a folder"):
        read(tmp_path / "folder", group="patient")


IDENTIFIERS = {
    "Unnamed: 0": range(N),
    "index": range(N),
    "slide_number": range(100, 100 + N),
    "id": [i // 2 for i in range(N)],
    "image_id": [f"x{i // 2}" for i in range(N)],
    "running": range(7, 7 + N),
    "padded": [f"{i * i:04d}" for i in range(N)],
    "remark": [f"seen on day {i}" for i in range(N)],
    "comment": [f"text {i % 21}" for i in range(N)],
}


@pytest.mark.parametrize("name", IDENTIFIERS)
def test_identifying_columns_are_left_out_and_named_or_refused_if_there_are_no_others(
    name: str, tmp_path: Path
) -> None:
    columns = {name: IDENTIFIERS[name], "label": LABEL}
    manifest = read(table(tmp_path, columns))
    assert [task.name for task in manifest.tasks] == ["label"]
    assert len([note for note in manifest.notes if f"`{name}`" in note]) == 1
    with pytest.raises(DataError, match=r"no column to learn: .*--data.tasks"):
        read(table(tmp_path, {name: IDENTIFIERS[name]}))


DESCRIBE = {
    "age": ([30 + (7 * i) % 51 for i in range(N)], "regression"),
    "score": ([i * 0.37 for i in range(N)], "regression"),
    "patient": ([("yes", "no")[i % 2] for i in range(N)], "binary"),
    "case": ([("case", "control")[i % 2] for i in range(N)], "binary"),
    "class_id": ([i % 4 for i in range(N)], "multiclass"),
    "patient_age": ([30 + (5 * i) % 23 for i in range(N)], "regression"),
    "case_type": ([("a", "b", "c")[i % 3] for i in range(N)], "multiclass"),
    "marks": ([("a|b", "b", "|")[i % 3] for i in range(N)], "multilabel"),
}


@pytest.mark.parametrize("name", DESCRIBE)
def test_columns_that_describe_are_learned(name: str, tmp_path: Path) -> None:
    cells, kind = DESCRIBE[name]
    manifest = read(table(tmp_path, {name: cells}))
    assert [(task.name, task.kind) for task in manifest.tasks] == [(name, kind)]


def test_patients_in_several_given_splits_are_named(tmp_path: Path) -> None:
    split = ["train"] * 13 + ["val"] * 4 + ["test"] * 7
    manifest = read(table(tmp_path, {"patient": PATIENT, "split": split, "label": LABEL}))
    assert "images of one `patient` are in more than one split: P4, P5" in manifest.notes


def test_too_few_patients_to_share_out_name_the_column(tmp_path: Path) -> None:
    path = table(tmp_path, {"patient": [f"P{i % 2}" for i in range(N)], "label": LABEL})
    with pytest.raises(DataError, match=r"2 groups cannot be shared out .* values of `patient`; --data.group none"):
        read(path)


def test_a_run_s_manifest_is_read_as_written(tmp_path: Path) -> None:
    manifest = read(table(tmp_path, {"patient": PATIENT, "label": LABEL}), tasks=("label",), group="patient")
    written = manifest.write(tmp_path / "manifest.csv")
    again = read(written, group="patient")
    assert [(item.group, item.split) for item in again.items] == [(item.group, item.split) for item in manifest.items]
    odd = read(
        table(tmp_path, {"patient": [("NA", "EU", "none")[i % 3] for i in range(N)]}), tasks=("patient",), missing=()
    )
    assert read(odd.write(tmp_path / "manifest.csv")).tasks == odd.tasks


# --- splits


@pytest.mark.parametrize("header", ["split", "subset", "fold"])
def test_other_words_for_splits_are_understood_also_under_another_header(header: str, tmp_path: Path) -> None:
    cells = (["Training"] * 6 + ["valid"] * 3 + ["dev"] + ["testing"] * 2) * 2
    manifest = read(table(tmp_path, {header: cells, "label": LABEL}))
    assert Counter(item.split for item in manifest.items) == {"train": 12, "val": 8, "test": 4}
    assert [task.name for task in manifest.tasks] == ["label"]
    assert any("split" in note and "valid" in note for note in manifest.notes)


# --- unknown labels


@pytest.mark.parametrize("word", ["", "nan", "NaN", "NA", "N/A", "#N/A", "null", "NULL", "None", "<NA>", "#REF!"])
@pytest.mark.parametrize("cells", [("0", "1"), ("1", "2", "3"), ("cat", "dog"), ("0.5", "1.25", "7"), ("a|b", "b")])
def test_words_for_unknown_are_unknown_in_every_kind_of_task(word: str, cells: tuple[str, ...], tmp_path: Path) -> None:
    full = [cells[i % len(cells)] for i in range(N)]
    some = [word if i % 6 == 5 else cell for i, cell in enumerate(full)]
    path = table(tmp_path, {"label": some, "other": LABEL})
    manifest, expected = read(path), infer(full)
    assert (manifest.tasks[0].kind, manifest.tasks[0].classes) == expected
    unknown = [item for item in manifest.items if np.isnan(manifest.targets([item])[manifest.tasks[0].name]).all()]
    assert [int(item.image.stem) for item in unknown] == [i for i in range(N) if i % 6 == 5]
    said = [note for note in manifest.notes if "mean that the label is unknown" in note]
    assert len(said) == bool(word)
    assert all(f"4 cells {word!r}" in note for note in said)


def infer(cells: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    from keyhole.tasks.kinds import infer_task

    task = infer_task("label", cells)
    return task.kind, task.classes


@pytest.mark.parametrize("word", ["?", "-", "none", "unknown"])
def test_words_among_numbers_alone_are_unknown(word: str, tmp_path: Path) -> None:
    grade = [("1", "2", "3", word)[i % 4] for i in range(N)]
    assert read(table(tmp_path, {"grade": grade})).tasks[0].classes == ("1", "2", "3")
    defect = [("crack", "dent", word)[i % 3] for i in range(N)]
    assert len(read(table(tmp_path, {"defect": defect})).tasks[0].classes) == 3


def test_a_word_for_unknown_can_be_a_class_where_the_user_or_the_model_says_so(tmp_path: Path) -> None:
    path = table(tmp_path, {"region": [("NA", "EU", "nan")[i % 3] for i in range(N)]})
    manifest = read(path, missing=("nan",))
    assert manifest.tasks[0].classes == ("EU", "NA")
    assert read(path, missing=()).tasks[0].classes == ("EU", "NA", "nan")
    model = Task("region", "binary", ("EU", "NA"))
    known = [item.labels["region"] for item in read_for_tasks(DataConfig(path=path), [model]).items]
    assert Counter(known) == {"NA": 8, "EU": 8}


# --- doubtful labels


def test_classes_that_differ_in_case_alone_are_told(tmp_path: Path) -> None:
    manifest = read(table(tmp_path, {"label": [("cat", "Cat", "dog")[i % 3] for i in range(N)]}))
    assert manifest.tasks[0].classes == ("Cat", "cat", "dog")
    (doubt,) = manifest.doubts
    assert "'Cat' and 'cat' differ in upper and lower case alone" in doubt.problem


def test_a_rare_class_that_is_almost_a_frequent_one_is_told(tmp_path: Path) -> None:
    for rare, usual in {"defctive": "defective", "defectvie": "defective", "healty cell": "healthy cell"}.items():
        (doubt,) = read(table(tmp_path, {"label": [rare, *["sound", usual] * 11, usual]})).doubts
        assert doubt.problem == f"{rare!r} (1 image) is almost {usual!r} (12 images)"
    different = {
        **{"grade iii": "grade ii", "abnormal": "normal", "mass2": "mass1", "cat": "bat", "atypical": "typical"},
        **{"LumB": "LumA", "luminal_b": "luminal_a", "LuminalB": "LuminalA", "stage_iii": "stage_ii", "KIRP": "KIRC"},
        **{"grade-III": "grade-II", "stage IIIB": "stage IIIA", "B_cell": "T_cell", "grade 2 tumour": "grade 3 tumor"},
        **{"asymptomatic": "symptomatic", "MSI-H": "MSI-L", "viii": "vii"},
    }
    for rare, usual in different.items():
        assert not read(table(tmp_path, {"label": [rare, *["other", usual] * 11, usual]})).doubts, rare
    assert not read(table(tmp_path, {"label": ["defctive", "defctive", *["defective"] * 19, *["sound"] * 3]})).doubts


@pytest.mark.parametrize("tasks", [(), ("age=regression",)])
def test_a_decimal_comma_is_refused_with_the_number_as_it_should_be(tasks: tuple[str, ...], tmp_path: Path) -> None:
    path = table(tmp_path, {"age": [f"{30 + i % 5},5" for i in range(N)]}, ";")
    with pytest.raises(DataError, match=r"age: '30,5' has a decimal comma\. Write 30\.5 with a point"):
        read(path, tasks=tasks)
    assert len(read(path, tasks=("age=multiclass",)).tasks[0].classes) == 5


def test_check_init_and_train_say_in_one_line_what_columns_mean(say: Say, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    label = [("cat", "Cat", "nan")[i % 3] for i in range(N)]
    path = table(tmp_path, {"Unnamed: 0": range(N), "patient": PATIENT, "label": label})
    for i in range(N):
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / f"{i}.png")
    small = ["--patch.size=32", "--select.m=2", "--run.threads=1"]
    model = ["--model.encoder=small", "--model.width=4", "--train.epochs=1", "--run.device=cpu"]
    for line in (
        ["check", path, *small],
        ["init", path, "--out", tmp_path / "keyhole.yaml"],
        ["train", path, *small, *model, "--out", tmp_path / "run"],
    ):
        done = say(*line)
        assert done.code == 0, done.all
        about = [text for text in done.all.splitlines() if "`patient` is the group" in text]
        assert len(about) == 1
        assert "`Unnamed: 0` (numbers the rows)" in about[0]
        assert sum("8 cells 'nan' mean that the label is unknown" in text for text in done.all.splitlines()) == 1
        assert sum("differ in upper and lower case alone" in text for text in done.all.splitlines()) == 1
    done = say("train", path, *small, *model, "--data.group", "none", "--data.missing", "--out", tmp_path / "run2")
    assert done.code == 0, done.all
    assert "is the group" not in done.all
    assert "tasks: label (multiclass)" in done.all
