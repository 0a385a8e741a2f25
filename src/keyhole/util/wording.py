"""Words for messages: the name that was probably meant, short lists, numbers with their nouns."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def nearest(wrong: str, known: Iterable[str], prefix: str = "", quote: str = "'") -> str:
    """Return ` (did you mean 'val'?)`, or "" if no known name is similar; case and `-` for `_` do not matter."""
    by_plain = {name.lower().replace("-", "_"): name for name in known}
    near = difflib.get_close_matches(wrong.lower().replace("-", "_"), by_plain, n=1, cutoff=0.5)
    return f" (did you mean {quote}{prefix}{by_plain[near[0]]}{quote}?)" if near else ""


def must_be_one_of(option: str, value: object, known: Iterable[str]) -> str:
    """Return the message on an argument of a function, if it is none of the known names.

    >>> must_be_one_of("edge", "shfit", ("drop", "shift"))
    "edge (='shfit') must be one of 'drop', 'shift' (did you mean 'shift'?)"
    """
    known = list(known)
    return f"{option} (={value!r}) must be one of {', '.join(map(repr, known))}{nearest(str(value), known)}"


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first names, and how many there are if some are not shown."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int, one: str = "image", several: str = "") -> str:
    """Return a number with its noun.

    >>> counted(1), counted(2), counted(2, "file or row", "files or rows")
    ('1 image', '2 images', '2 files or rows')
    """
    return f"1 {one}" if number == 1 else f"{number} {several or one + 's'}"


def from_to(low: str, high: str, joint: str = " to ") -> str:
    """Return a range in words: both ends, or one if they read the same.

    >>> from_to("3", "7"), from_to("7", "7")
    ('3 to 7', '7')
    """
    return low if low == high else f"{low}{joint}{high}"


def distinct(names: Iterable[str], form: str = "{} ({})", key: Callable[[str], str] = str) -> list[str]:
    """Return the names, with a number after those whose `key` is repeated: `a`, `b`, `a (2)`."""
    found: dict[str, str] = {}
    for name in names:
        number, unique = 1, name
        while key(unique) in found:
            number += 1
            unique = form.format(name, number)
        found[key(unique)] = unique
    return list(found.values())


def problem_and_fix(message: str) -> tuple[str, str]:
    """Split an error message into what is wrong and what to do; the second is "" if the message does not say.

    The first sentence ends with a dot before a capital, outside of brackets: `0 ... 3` and `(No. 7)` are not ends.
    """
    depth = 0
    for place, char in enumerate(message):
        depth += (char in "([{") - (char in ")]}")
        before, after = message[place - 1 : place], message[place + 1 : place + 3]
        if char == "." and depth == 0 and before != "." and after[:1] == " " and after[1:].isupper():
            return message[:place], message[place + 2 :]
    return message, ""
