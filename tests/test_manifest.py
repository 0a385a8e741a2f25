"""Reading data sets: what counts, what is left out and listed, and one clear line for what cannot be used."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import csv_rows
from data_sets import left, read, touch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keyhole.config.settings import DataConfig
from keyhole.data.hashes import hash_files
from keyhole.data.item import exists
from keyhole.data.listing import expand_images
from keyhole.data.manifest import read_for_tasks, read_manifest
from keyhole.errors import ConfigError, DataError, ImageError, KeyholeError, StalledRead
from keyhole.tasks.kinds import Task


def write(path: Path, text: str, images: int = 12) -> Path:
    """A CSV and, beside it, images 0.png, 1.png, ..."""
    path.write_text(text, encoding="utf-8")
    touch(path.parent, *(f"{i}.png" for i in range(images)))
    return path


def table(header: str, *rows: str) -> str:
    return "\n".join([header, *rows]) + "\n"


TWELVE = table("image,grade", *(f"{i}.png,{'ab'[i % 2]}" for i in range(12)))


def test_the_positive_class_is_named_also_where_column_or_class_hold_an_equals_sign(tmp_path: Path) -> None:
    rows = [f"{i}.png,{('x=1', 'x=2')[i % 2]},{'ab'[i % 2]}" for i in range(12)]
    path = write(tmp_path / "t.csv", table("image,p=q,p", *rows))
    for asked, name, classes in (
        ("p=q=binary:x=1", "p=q", ("x=2", "x=1")),
        ("p=q", "p=q", ("x=1", "x=2")),
        ("p=binary:a", "p", ("b", "a")),
    ):
        manifest = read(path, tasks=(asked,))
        assert [(task.name, task.classes) for task in manifest.tasks] == [(name, classes)]
    assert any("the positive class is 'x=2', the second in order" in note for note in read(path).notes)


# Folders


def test_a_folder_of_classes_is_one_task_and_everything_else_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{i}.PNG" for c in ("cat", "dog") for i in range(5)), "cat/deep/er/5.tiff")
    touch(tmp_path, "loose.png", "cat/notes.txt", "cat/.DS_Store", "dog/._0.png", ".git/x.png", "dog/README")
    touch(tmp_path, "dog/slide.mrxs", "dog/slide/Data0001.dat")
    (tmp_path / "empty").mkdir()
    manifest = read(tmp_path)
    assert manifest.tasks == (Task("label", "binary", ("cat", "dog")),)
    assert len(manifest.items) == 12
    assert [item.name for item in manifest.items] == sorted(item.name for item in manifest.items)
    deep = next(item for item in manifest.items if item.name == "cat/deep/er/5.tiff")
    assert (deep.labels, deep.image) == ({"label": "cat"}, tmp_path / "cat/deep/er/5.tiff")
    assert left(manifest) == {
        "loose.png": "not in a class folder",
        "cat/notes.txt": "not an image (suffix .txt)",
        "cat/.DS_Store": "not an image",
        "dog/._0.png": "hidden file",
        "dog/README": "not an image (no suffix)",
        ".git/": "hidden folder",
        "dog/slide/": "part of slide.mrxs",
        "empty/": "class folder without images",
    }


def test_links_are_followed_and_a_circle_of_them_ends(tmp_path: Path) -> None:
    touch(tmp_path, *(f"data/{c}/{i}.png" for c in "ab" for i in range(3)))
    touch(tmp_path, "elsewhere/9.png")
    (tmp_path / "data/b/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data", target_is_directory=True)
    manifest = read(tmp_path / "data")
    assert len(manifest.items) == 7
    assert left(manifest) == {"a/up/": "link to a folder that is already read"}


def test_images_of_the_command_line_are_files_as_given_and_folders_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.png", "b/10.png", "b/sub/1.jpg", "b/x.txt", "odd.data")
    images, left_out = expand_images([tmp_path / "odd.data", tmp_path / "b", tmp_path / "b/2.png"])
    assert [image.relative_to(tmp_path).as_posix() for image in images] == [
        "odd.data",
        "b/10.png",
        "b/2.png",
        "b/sub/1.jpg",
    ]
    assert [item.name for item in left_out] == [str(tmp_path / "b/x.txt")]
    for wrong in ([tmp_path / "none.png"], [], [tmp_path / "empty"]):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=r"no such file|no images"):
            expand_images(wrong)


# CSV


def test_the_line_that_tells_excel_the_delimiter_is_skipped_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.csv", "sep=;\n" + TWELVE.replace(",", ";"))
    assert len(read(path).items) == 12
    write(path, "sep=;\nimage;grade;split\n0.png;a;trian\n")
    with pytest.raises(DataError, match="line 3: unknown split 'trian'"):
        read(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiter_byte_order_mark_and_line_ends_do_not_matter(
    tmp_path: Path, delimiter: str, mark: str, end: str
) -> None:
    text = mark + TWELVE.replace(",", delimiter).replace("\n", end)
    path = write(tmp_path / "labels.csv", "")
    path.write_bytes(text.encode())
    manifest = read(path)
    assert [item.name for item in manifest.items] == [f"{i}.png" for i in range(12)]
    assert manifest.tasks == (Task("grade", "binary", ("a", "b")),)


def test_every_column_of_a_csv_arrives(tmp_path: Path) -> None:
    touch(tmp_path / "scans", *(f"{i}.svs" for i in range(4)))
    text = table(
        "Image,name,grade,findings,age,Split,group,MPP",
        '0.svs,"first, of all",low,a|b,61.5,train,p1,0.25',
        "1.svs,,high,|,40,train,p2,",
        "2.svs,,,b,,val,p3,0.5",
        "3.svs,,high,a,70,test,p4,",
    )
    manifest = read_manifest(
        DataConfig(
            path=write(tmp_path / "l.csv", text), root=tmp_path / "scans", tasks=("grade", "findings", "age=regression")
        )
    )
    first, second, third, _ = manifest.items
    assert (first.name, first.image, first.group, first.mpp) == ("first, of all", tmp_path / "scans/0.svs", "p1", 0.25)
    assert (second.name, second.group, second.mpp) == ("1.svs", "p2", None)
    grade, findings, age = manifest.tasks
    assert (grade.kind, findings.kind, age.kind) == ("binary", "multilabel", "regression")
    targets = manifest.targets([first, second, third])
    assert targets["grade"][0] == 1
    assert targets["findings"][:2].tolist() == [[1, 1], [0, 0]]
    assert np.isnan(targets["grade"][2]).all()
    assert np.isnan(targets["age"][2]).all()
    # Of the training split alone.
    assert (age.mean, age.std) == pytest.approx((50.75, 10.75))
    assert [len(manifest.split(name)) for name in ("train", "val", "test")] == [2, 1, 1]


def test_a_label_is_encoded_once_and_targets_follow_the_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read(write(tmp_path / "l.csv", TWELVE))
    first = manifest.targets(manifest.items)["grade"]
    assert first.shape == (12, 1)
    monkeypatch.delattr(Task, "encode")
    assert (manifest.targets(manifest.items[::-1])["grade"] == first[::-1]).all()


def test_rows_without_a_label_repeated_rows_and_empty_rows_are_listed(tmp_path: Path) -> None:
    text = TWELVE + table("0.png,a", "./1.png,b", "13.png,", ",", "")
    manifest = read(write(tmp_path / "l.csv", text))
    assert len(manifest.items) == 12
    assert left(manifest) == {
        "0.png": "line 14: same image as line 2",
        "./1.png": "line 15: same image as line 3",
        "13.png": "no label for grade",
        "line 17": "empty row",
    }
    manifest.write_left_out(tmp_path / "left_out.csv")
    assert {row["name"]: row["reason"] for row in csv_rows(tmp_path / "left_out.csv")} == left(manifest)


def test_missing_files_end_the_run_or_are_left_out_as_the_user_said(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", TWELVE + table(*(f"gone{i}.png,a" for i in range(5)), f"{'x' * 300}.png,a"))
    with pytest.raises(DataError, match=r"6 of 18 image files .*gone0.png, .*gone2.png, \.\.\. \(6 in all\)") as error:
        read(path)
    assert "keyhole check" in str(error.value)
    manifest = read(path, on_bad_image="skip")
    assert len(manifest.items) == 12
    assert {name: left(manifest)[name] for name in left(manifest) if "gone" in name} == dict.fromkeys(
        (f"gone{i}.png" for i in range(5)), "no such file"
    )


def test_a_missing_val_split_is_drawn_from_training(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'ab'[i % 2]},{'test' if i < 4 else 'train'}" for i in range(24)]
    manifest = read(write(tmp_path / "l.csv", table("image,grade,split", *rows), 24))
    assert Counter(item.split for item in manifest.items) == {"train": 17, "val": 3, "test": 4}
    assert all(item.split == "test" for item in manifest.items[:4])
    assert any("became val" in note for note in manifest.notes)
    assert not read(tmp_path / "l.csv", val=0.0).split("val")


def test_splits_that_are_made_follow_names_and_seed_not_rows_or_place(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'ab'[i % 2]},p{i // 3}" for i in range(30)]
    made = []
    for number, order in enumerate((rows, rows[::-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        manifest = read(write(folder / "l.csv", table("image,grade,group", *order), 30))
        made.append({item.name: item.split for item in manifest.items})
        sides = {(item.group, item.split) for item in manifest.items}
        assert len(sides) == 10
    assert made[0] == made[1]
    other = read_manifest(DataConfig(path=tmp_path / "0/l.csv"), seed=1)
    assert {item.name: item.split for item in other.items} != made[0]


def test_a_group_on_two_given_sides_is_noted(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'ab'[i % 2]},{'train' if i < 8 else 'val'},p{i % 3}" for i in range(12)]
    manifest = read(write(tmp_path / "l.csv", table("image,grade,split,group", *rows)))
    assert "3 groups have images in more than one split: p0, p1, p2" in manifest.notes
    manifest = read(write(tmp_path / "l.csv", table("image,grade,split,patient", *rows)))
    assert "images of one `patient` are in more than one split: p0, p1, p2" in manifest.notes
    assert any("`patient` is the group: it has 3 values" in note for note in manifest.notes)
    assert not any("stay in one split" in note for note in manifest.notes)
    found = read_for_tasks(DataConfig(path=tmp_path / "l.csv"), manifest.tasks)
    assert any(note.endswith("`patient` is the group: it has 3 values") for note in found.notes)


def test_a_multilabel_data_set_is_split_with_every_label_in_training(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'|'.join('abc'[k] for k in range(3) if i % (k + 2) == 0) or '|'}" for i in range(40)]
    rows[1] = "1.png,rare|a"
    manifest = read(write(tmp_path / "l.csv", table("image,findings", *rows), 40))
    assert Counter(item.split for item in manifest.items) == {"train": 28, "val": 6, "test": 6}
    assert manifest.items[1].split == "train"


def test_leaving_images_out_later_is_refused_once_training_loses_a_class(tmp_path: Path) -> None:
    manifest = read(write(tmp_path / "l.csv", TWELVE))
    one = manifest.split("train")[0]
    fewer = manifest.without({one.name: "damaged"})
    assert len(fewer.items) == 11
    assert left(fewer)[one.name] == "damaged"
    with pytest.raises(DataError, match="only 'b'"):
        manifest.without({item.name: "damaged" for item in manifest.items if item.labels["grade"] == "a"})


# A manifest as a file


def test_a_written_manifest_reads_as_the_same_items_and_tasks(tmp_path: Path) -> None:
    rows = [f'"sub/../{i}.png",{"ab"[i % 2]},{i / 7},"x, ""y""|z",p{i},{0.1 + i}' for i in range(12)]
    manifest = read(
        write(tmp_path / "l.csv", table("image,grade,age,findings,group,mpp", *rows)),
    )
    (tmp_path / "run").mkdir()
    written = manifest.write(tmp_path / "run/manifest.csv", hash_files(manifest.items))
    again = read_manifest(DataConfig(path=written), seed=5)
    assert (again.items, again.tasks, again.left_out) == (manifest.items, manifest.tasks, ())
    row = csv_rows(written)[0]
    content = (tmp_path / "0.png").read_bytes()
    assert (row["sha256"], row["bytes"]) == (hashlib.sha256(content).hexdigest(), str(len(content)))


def test_a_folder_written_as_a_manifest_reads_as_the_same_items(tmp_path: Path) -> None:
    touch(tmp_path / "data", *(f"{c}/{i}.png" for c in ("1", "2", "10") for i in range(5)))
    manifest = read(tmp_path / "data")
    again = read(manifest.write(tmp_path / "manifest.csv"))
    assert (again.items, again.tasks) == (manifest.items, manifest.tasks)
    assert manifest.tasks[0].classes == ("1", "2", "10")


# Hashes


def test_hashes_are_those_of_the_bytes_and_name_a_file_that_is_gone(tmp_path: Path) -> None:
    manifest = read(write(tmp_path / "l.csv", TWELVE))
    (tmp_path / "3.png").write_bytes(os.urandom(20_000_000))
    hashes = hash_files(manifest.items, threads=2)
    for item in manifest.items:
        assert hashes[item.name].sha256 == hashlib.sha256(item.image.read_bytes()).hexdigest()
        assert hashes[item.name].bytes == item.image.stat().st_size
    (tmp_path / "5.png").unlink()
    with pytest.raises(ImageError, match=r"5\.png"):
        hash_files(manifest.items)
    assert hash_files([]) == {}


def test_hashing_a_file_that_gives_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read(write(tmp_path / "l.csv", TWELVE))
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    (tmp_path / "7.png").unlink()
    (tmp_path / "pipe").rename(tmp_path / "7.png")
    with pytest.raises(StalledRead, match=r"7\.png: no data for 0.2 s"):
        hash_files(manifest.items, threads=3, stall=0.2)


# A trained model's tasks


def test_data_for_a_trained_model_are_read_by_its_tasks(tmp_path: Path) -> None:
    tasks = (Task("grade", "multiclass", ("a", "b", "c")), Task("age", "regression", (), 50.0, 10.0))
    path = write(tmp_path / "l.csv", table("image,grade", "0.png,a", "1.png,a", "2.png,"))
    manifest = read_for_tasks(DataConfig(path=path), tasks)
    assert [item.split for item in manifest.items] == ["test", "test"]
    assert manifest.tasks == tasks
    assert np.isnan(manifest.targets(manifest.items)["age"]).all()
    assert left(manifest) == {"2.png": "no label for grade"}
    write(path, table("image,grade", "0.png,a", "1.png,d"))
    with pytest.raises(DataError, match=r"line 3: grade: unknown class 'd'"):
        read_for_tasks(DataConfig(path=path), tasks)
    write(path, table("image,tumour", "0.png,a"))
    with pytest.raises(DataError, match="the model predicts grade, age, but the columns with labels are tumour"):
        read_for_tasks(DataConfig(path=path), tasks)


# Bad input


BAD: dict[str, tuple[str | bytes, tuple[str, ...], str]] = {
    "no image column": (TWELVE.replace("image", "img"), (), r"no column `image` \(did you mean 'img'\?\)"),
    "no task column": ("image,split\n0.png,train\n", (), "no task column"),
    "unknown split": (
        "image,grade,split\n0.png,a,trian\n",
        (),
        r"line 2: unknown split 'trian' \(did you mean 'train'\?\)",
    ),
    "a split for some": ("image,grade,split\n0.png,a,train\n1.png,b,\n", (), "line 3: no split, but line 2 has one"),
    "no training split": ("image,grade,split\n0.png,a,test\n1.png,b,test\n", (), "no row with a label has split train"),
    "one class": (TWELVE.replace(",b", ",a"), (), "grade: all labels are 'a'"),
    "one class in training": (
        "image,grade,split\n0.png,a,train\n1.png,a,train\n2.png,b,val\n3.png,a,val\n",
        (),
        "grade: the training split has only 'a', other splits have 'b'",
    ),
    "a class outside training": (
        "image,grade,split\n0.png,a,train\n1.png,b,train\n2.png,c,val\n3.png,c,val\n",
        (),
        "grade: the training split has no 'c'",
    ),
    "two labels": (TWELVE + "0.png,b\n", (), r"line 14: 0.png has grade 'b', but 'a' in line 2"),
    "two labels under two spellings": (TWELVE + "./0.png,b\n", (), r"line 14: ./0.png has grade 'b'"),
    "two splits": (
        "image,grade,split\n0.png,a,train\n0.png,a,test\n",
        (),
        "0.png has split 'test', but 'train' in line 2",
    ),
    "a name twice": ("image,name,grade\n0.png,x,a\n1.png,x,b\n", (), "line 3: name 'x' is taken by line 2"),
    "empty": ("", (), "the file is empty"),
    "only a mark": (b"\xef\xbb\xbf\n", (), "the file is empty"),
    "only a header": ("image,grade\n", (), "no rows below the header"),
    "no label at all": ("image,grade\n0.png,\n1.png,\n", (), "no row has a label for grade"),
    "binary junk": (bytes(range(256)), (), r"not UTF-8 text \(byte 128 is 0x80\)"),
    "zero bytes": (b"image,grade\n0.png,a\x00\n", (), "zero bytes"),
    "UTF-16": (TWELVE.encode("utf-16"), (), "not UTF-8 text"),
    "Latin-1": ("image,grade\n0.png,größer\n".encode("latin-1"), (), "CSV UTF-8"),
    "unknown task": (TWELVE, ("grad",), r"no column 'grad' \(did you mean 'grade'\?\)"),
    "a column that is no task": (TWELVE, ("image",), "no column 'image'|is no task"),
    "unknown kind": (TWELVE, ("grade=multilable",), r"grade=multilable: no such kind \(did you mean 'multilabel'\?\)"),
    "a task twice": (TWELVE, ("grade", "grade=binary"), "names 'grade' twice"),
    "columns of one name": ("image,grade,grade\n0.png,a,b\n", (), "the header names grade more than once"),
    "two image columns": ("image,Image,grade\n0.png,1.png,b\n", (), "the header names image more than once"),
    "too many fields": (TWELVE + "0.png,a,b\n", (), "line 14: 3 fields where the header has 2"),
    "too few fields": (TWELVE + "0.png\n", (), "line 14: 1 fields where the header has 2"),
    "an open quote": (TWELVE + '"0.png,a\n', (), "line 14: not valid CSV"),
    "no number": (TWELVE, ("grade=regression",), "line 2: grade: 'a' is not a finite number"),
    "not a finite number": ("image,age\n0.png,1\n1.png,inf\n", ("age=regression",), "line 3: age: 'inf'"),
    "too many classes for binary": ("image,g\n0.png,a\n1.png,b\n2.png,c\n", ("g=binary",), "3 classes"),
    "an identifier": (table("image,id", *(f"{i}.png,id{i}" for i in range(12))), (), "id differs in every row"),
    "mpp of zero": ("image,grade,mpp\n0.png,a,0\n", (), "line 2: mpp is '0'"),
    "mpp in words": ("image,grade,mpp\n0.png,a,40x\n", (), "line 2: mpp is '40x'"),
    "mpp of nm": (
        "image,grade,mpp\n0.png,a,250\n",
        (),
        "line 2: mpp is '250'. Expected microns per pixel of the full resolution, 0.02 ... 100",
    ),
    "mpp not a number": ("image,grade,mpp\n0.png,a,nan\n", (), "line 2: mpp is 'nan'"),
    "mpp with a comma": (
        "image;grade;mpp\n0.png;a;0,5\n",
        (),
        r"line 2: mpp is '0,5'. .* such as 0.25 \(with a point\)",
    ),
    "only the delimiter": (b"sep=;\n\n", (), "no column `image`; the columns are sep="),
    "a spreadsheet": (
        b"PK\x03\x04\x14\x00",
        (),
        "a spreadsheet or another archive. Expected a CSV: save it as `CSV UTF-8`",
    ),
    "backslashes": ("image,grade\n.\\0.png,a\n", (), r"With / for \\ the first is there: .*/0\.png"),
    "no ending": ("image,grade\n0,a\n1,b\n", (), r"With its ending the first is there: .*/0\.png"),
    "all left out but one class": (
        "image,grade,annotation\n0.png,a,\n1.png,a,\n2.png,,gone.geojson\n",
        (),
        "grade: all labels are 'a'.* 1 image could not be used, the first is 2.png: no label for grade",
    ),
    "no image": ("image,grade\n,a\n", (), "line 2: the image column is empty"),
    "no file at all": ("image,grade\nx.png,a\ny.png,b\n", (), r"all 2 image files are not there: .*x\.png"),
    "one image": ("image,grade\n0.png,1.5\n", (), "1 image cannot be shared out"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_csv_ends_with_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    content, tasks, message = BAD[case]
    path = write(tmp_path / "labels.csv", "")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises((DataError, ConfigError), match=message) as error:
        read_manifest(DataConfig(path=path, tasks=tasks))
    assert "\n" not in str(error.value)
    if isinstance(error.value, DataError):
        assert str(path) in str(error.value)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(alphabet="ab01.,;|\"'\n\r\t \x00\ufeff", max_size=60).map(
            lambda text: f"image,grade,split\n{text}".encode()
        ),
        st.lists(
            st.tuples(*[st.sampled_from(["0.png", "1.png", "a", "b", "train", "val", "0.5", "|", ""])] * 4), max_size=12
        ).map(lambda rows: "\n".join(["image,grade,split,mpp", *map(",".join, rows)]).encode()),
    )
)
def test_whatever_a_csv_holds_it_is_read_or_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "labels.csv", "", 2)
    path.write_bytes(content)
    try:
        manifest = read(path)
    except KeyholeError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - either outcome is right
    else:
        assert manifest.split("train")


def test_missing_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "flat/0.png", "flat/1.png", "one/a/0.png", "one/a/1.png")
    os.mkfifo(tmp_path / "pipe")
    for path, message in {
        None: "no data given",
        tmp_path / "gone": "no such file or folder",
        tmp_path / "empty": "no images in class folders",
        tmp_path / "flat": "no images in class folders",
        tmp_path / "one": "all images are in one class folder, .a.",
        tmp_path / "pipe": "not a regular file",
    }.items():
        with pytest.raises(DataError, match=message):
            read_manifest(DataConfig(path=path))
    with pytest.raises(KeyholeError, match=re.escape("data.val (=0.5) and data.test (=0.5) must leave images")):
        read_manifest(DataConfig(path=write(tmp_path / "l.csv", TWELVE), val=0.5, test=0.5))


def test_a_file_name_that_is_not_text_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    odd = os.fsencode(tmp_path / "a") + b"/\xff.png"
    with open(odd, "wb"):  # noqa: PTH123 - a Path cannot hold these bytes on every system
        pass
    manifest = read(tmp_path)
    assert len(manifest.items) == 6
    manifest.write_left_out(tmp_path / "left_out.csv")
    assert "name is not UTF-8" in (tmp_path / "left_out.csv").read_text()


# Stored features, masks, annotations, and images that are folders


def features(folder: Path, *names: str) -> Path:
    touch(folder, *names)
    return folder


def test_files_beside_an_image_arrive_and_are_written_and_read_again(tmp_path: Path) -> None:
    touch(tmp_path, *(f"masks/{i}.png" for i in range(12)), "lesions/0.xml", *(f"f/{i}.h5" for i in range(12)))
    rows = [f"{i}.png,{'ab'[i % 2]},masks/{i}.png,{'lesions/0.xml' if i == 0 else ''},f/{i}.h5" for i in range(12)]
    text = table("image,grade,Mask,annotation,FEATURES", *rows)
    manifest = read(write(tmp_path / "l.csv", text, 0))
    assert manifest.tasks == (Task("grade", "binary", ("a", "b")),)
    first, second = manifest.items[:2]
    assert (first.mask, first.annotation) == (tmp_path / "masks/0.png", tmp_path / "lesions/0.xml")
    assert (first.features, first.source) == (tmp_path / "f/0.h5", tmp_path / "f/0.h5")
    assert second.annotation is None
    hashes = hash_files(manifest.items)
    assert hashes["0.png"].sha256 == hashlib.sha256(b"f/0.h5").hexdigest(), "of what is read"
    again = read_manifest(DataConfig(path=manifest.write(tmp_path / "run.csv", hashes)))
    assert (again.items, again.tasks) == (manifest.items, manifest.tasks)
    (tmp_path / "masks/3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 12 feature files are not there: .*masks/3\.png"):
        read(tmp_path / "l.csv")
    assert left(read(tmp_path / "l.csv", on_bad_image="skip")) == {"3.png": f"no such file: {tmp_path}/masks/3.png"}


def test_a_manifest_has_columns_for_files_only_where_there_are_any(tmp_path: Path) -> None:
    manifest = read(write(tmp_path / "l.csv", TWELVE))
    header = manifest.write(tmp_path / "run.csv").read_text().splitlines()[0]
    assert header == "image,name,sha256,bytes,split,group,mpp,grade"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["{}.h5"], "{}.h5"),
        (["{}.svs.h5"], "{}.svs.h5"),
        (["h5_files/{}.h5", "pt_files/{}.pt"], "h5_files/{}.h5"),
        (["pt_files/{}.pt"], "pt_files/{}.pt"),
        (["{}.pt", "h5_files/{}.h5"], "h5_files/{}.h5"),
        (["{}.hdf5", "{}.pt"], "{}.hdf5"),
        (["slides/{}.svs.h5", "{}.h5"], "slides/{}.svs.h5"),
        (["{}.h5", "0.1.h5"], "{}.h5"),
    ],
)
def test_a_folder_of_features_is_searched_as_the_tools_lay_it_out(names: list[str], found: str, tmp_path: Path) -> None:
    folder = features(tmp_path / "archive", *(name.format(i) for name in names for i in range(12)))
    rows = [f"slides/{i}.svs,{'ab'[i % 2]}" for i in range(12)]  # the slides themselves are elsewhere
    manifest = read(write(tmp_path / "l.csv", table("image,grade", *rows), 0), features=folder)
    assert [item.features for item in manifest.items] == [folder / found.format(i) for i in range(12)]


def test_clams_own_list_and_archive_work_at_once(tmp_path: Path) -> None:
    slides = [f"TCGA-{i // 2}-01Z-00-DX{i % 2}.F6E9A5DF-D8FB-45CF-B4BD-C6B76294C29{i}" for i in range(8)]
    folder = features(tmp_path / "archive", *(f"h5_files/{slide}.h5" for slide in slides))
    touch(folder, *(f"pt_files/{slide}.pt" for slide in slides))
    rows = [f"p{i // 2},{slide},{'tumour' if i < 4 else 'normal'}" for i, slide in enumerate(slides)]
    path = write(tmp_path / "l.csv", table("case_id,slide_id,label", *rows), 0)
    manifest = read(path, features=folder)
    assert manifest.tasks == (Task("label", "binary", ("normal", "tumour")),)
    assert [item.features for item in manifest.items] == [folder / f"h5_files/{slide}.h5" for slide in slides]
    assert [(item.name, item.group) for item in manifest.items] == [
        (slide, f"p{i // 2}") for i, slide in enumerate(slides)
    ]
    assert f"{path}: `slide_id` as image and `case_id` as group" in manifest.notes
    with pytest.raises(DataError, match=r"only `slide_id`.* --data\.features DIR"):
        read(path)
    again = read_manifest(DataConfig(path=manifest.write(tmp_path / "run.csv"), features=folder))
    assert again.items == manifest.items


def test_missing_features_are_told_like_missing_images(tmp_path: Path) -> None:
    folder = features(tmp_path / "f", *(f"{i}.h5" for i in range(1, 12)))
    path = write(tmp_path / "l.csv", TWELVE, 0)
    with pytest.raises(DataError, match=r"1 of 12 feature files are not there: .*f/0\.h5"):
        read(path, features=folder)
    manifest = read(path, features=folder, on_bad_image="skip")
    assert len(manifest.items) == 11
    assert left(manifest) == {"0.png": f"no such file: {folder}/0.h5"}
    with pytest.raises(DataError, match=r"none: no such folder\. --data\.features names a folder"):
        read(path, features=tmp_path / "none")


def test_images_and_features_do_not_mix_and_no_two_images_share_features(tmp_path: Path) -> None:
    touch(tmp_path, "f/1.h5")
    rows = [f"{i}.png,{'ab'[i % 2]},{'f/1.h5' if i == 1 else ''}" for i in range(12)]
    path = write(tmp_path / "l.csv", table("image,grade,features", *rows))
    with pytest.raises(DataError, match=r"0\.png is an image, but 1\.png has stored features"):
        read(path)
    touch(tmp_path, *(f"f/{i}.h5" for i in range(12)))
    rows = [f"{'cat' if i < 6 else 'dog'}/{i % 6}.png,{'ab'[i % 2]}" for i in range(12)]
    path = write(tmp_path / "l.csv", table("image,grade", *rows))
    with pytest.raises(DataError, match=r"cat/0\.png \(line 2\) and dog/0\.png \(line 8\) would both read .*f/0\.h5"):
        read(path, features=tmp_path / "f")


def test_a_folder_of_classes_may_hold_features(tmp_path: Path) -> None:
    touch(
        tmp_path / "data",
        *(
            f"{c}/{part}/{i}.{s}"
            for c in "ab"
            for i in range(6)
            for part, s in [("h5_files", "h5"), ("pt_files", "pt")]
        ),
    )
    manifest = read(tmp_path / "data")
    assert len(manifest.items) == 12
    assert all(item.features == item.image and item.image.suffix == ".h5" for item in manifest.items)
    assert set(left(manifest).values()) == {"features that an .h5 file holds too"}
    images, _ = expand_images([tmp_path / "data"])
    assert images == [item.image for item in manifest.items]
    touch(tmp_path / "data", "a/0.png", "b/0.png", "a/1.png", "b/1.png")
    manifest = read(tmp_path / "data")
    assert len(manifest.items) == 4
    assert list(left(manifest).values()).count("stored features beside images") == 24


def test_masks_are_found_by_name_and_lacking_ones_are_counted(tmp_path: Path) -> None:
    folder = features(tmp_path / "masks", "0.png", "1.geojson", "2.png.png", "2.geojson")
    manifest = read(write(tmp_path / "l.csv", TWELVE), masks=folder)
    assert [item.mask for item in manifest.items[:4]] == [
        folder / "0.png",
        folder / "1.geojson",
        folder / "2.png.png",
        None,
    ]
    assert any("no mask for 9 of 12 images" in note for note in manifest.notes)


def test_a_zarr_folder_is_one_image(tmp_path: Path) -> None:
    for c in "ab":
        for i in range(5):
            touch(
                tmp_path / "data", f"{c}/{i}.ome.zarr/0/c/0/0", f"{c}/{i}.ome.zarr/zarr.json", f"{c}/{i}.ome.zarr/x.png"
            )
    manifest = read(tmp_path / "data")
    assert [item.name for item in manifest.items] == [f"{c}/{i}.ome.zarr" for c in "ab" for i in range(5)]
    assert manifest.left_out == ()
    assert expand_images([tmp_path / "data/a/0.ome.zarr"])[0] == [tmp_path / "data/a/0.ome.zarr"]
    assert expand_images([tmp_path / "data/a"])[0] == [item.image for item in manifest.items[:5]]
    before = hash_files(manifest.items)
    one = manifest.items[0].image
    assert before["a/0.ome.zarr"].bytes == sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
    again = read_manifest(DataConfig(path=manifest.write(tmp_path / "run.csv", before)))
    assert again.items == manifest.items
    (one / "0/c/0/0").rename(one / "0/c/0/1")
    (manifest.items[1].image / "x.png").write_bytes(b"other")
    after = hash_files(manifest.items)
    assert {name for name in before if before[name].sha256 != after[name].sha256} == {"a/0.ome.zarr", "a/1.ome.zarr"}


@pytest.mark.parametrize(
    ("fault", "there"),
    [
        (errno.ENOENT, False),
        (errno.ENOTDIR, False),
        (errno.ENAMETOOLONG, False),
        (errno.ESTALE, True),
        (errno.EACCES, True),
    ],
)
def test_a_file_is_missing_only_where_the_system_says_so(
    fault: int, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Path, **__: object) -> object:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(Path, "stat", failing)
    assert exists(tmp_path / "0.png") == there


def test_a_name_with_a_zero_byte_is_missing() -> None:
    assert not exists(Path("a\0b.png"))
