"""Notes on images, counted: a thousand slides with the same fault are one line."""

from __future__ import annotations

import re
from dataclasses import dataclass

NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)")


@dataclass
class Alike:
    """Notes that differ in nothing but their numbers.

    Attributes:
        count: Number of the notes.
        name: Image of the first.
        text: Text of the first.
        same: All texts are the same.
    """

    count: int
    name: str
    text: str
    same: bool = True


class Tally:
    """Notes by kind: those of one kind differ in nothing but their numbers.

    >>> tally = Tally()
    >>> for name, text in (("a", "2 patches"), ("b", "3 patches"), ("c", "no mask")):
    ...     tally.add(name, text)
    >>> tally.lines(5)
    ['2 of 5 images, such as a: 2 patches', '1 of 5 images: no mask']
    """

    def __init__(self) -> None:
        self.kinds: dict[str, Alike] = {}

    def add(self, name: str, text: str) -> None:
        """Count a note on the image `name`."""
        kind = NUMBER.sub("#", text)
        if kind not in self.kinds:
            self.kinds[kind] = Alike(0, name, text)
        alike = self.kinds[kind]
        alike.count += 1
        alike.same = alike.same and alike.text == text

    def lines(self, images: int) -> list[str]:
        """Return a line for each kind, with the number of its images out of all `images`."""
        return [
            f"{each.count} of {images} images{'' if each.same else f', such as {each.name}'}: {each.text}"
            for each in self.kinds.values()
        ]
