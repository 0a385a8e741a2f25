"""The folder of a generated data set: empty at first, and without half a data set after an error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from keyhole.errors import OutputError
from keyhole.util.files import csv_text, writable_folder, write_atomic


def check_new(out: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "exists and is not empty" if out.is_dir() else "is a file, expected a folder"
        raise OutputError(f"{out}: {what}. Choose another folder (--out), or remove what is there.")


class NewFolder:
    """A context that creates `out` and the folders `inside`; on an error it removes them and the files that it named.

    Write the manifest last: a folder without one holds no data set.

    >>> with NewFolder(Path("letters"), "images") as folder:
    ...     _ = folder.file("images/a.txt").write_text("a")
    ...     folder.write_csv("manifest.csv", ["image", "label"], [["images/a.txt", "vowel"]]).read_text()
    'image,label\\nimages/a.txt,vowel\\n'
    """

    def __init__(self, out: Path, *inside: str) -> None:
        check_new(out)
        self.out, self.inside, self._created = out, [out / name for name in inside], not out.exists()
        self._files: list[Path] = []

    def __enter__(self) -> Self:
        for path in self.inside:
            writable_folder(path)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            for file in self._files:
                file.unlink(missing_ok=True)
            for path in self.inside:
                path.rmdir()
            if self._created:
                self.out.rmdir()

    def file(self, name: str) -> Path:
        """Return the path of a file that is about to be written."""
        self._files.append(self.out / name)
        return self._files[-1]

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
        return write_atomic(self.file(name), csv_text([header, *rows]))
