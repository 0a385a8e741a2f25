"""What keyhole raises when the input, not the program, is wrong.

Every message is one line that names the file or option, says what was expected and what came,
and what to do. The command line prints it and exits with code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

from pathlib import Path


class KeyholeError(Exception):
    """A user's mistake or a broken input: one clear line, exit code 2."""


class ImageError(KeyholeError):
    """An image file that cannot be opened or read."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.path, self.problem)


class ImageLost(ImageError):  # noqa: N818 - names the event
    """The file cannot be reached (any more): gone, or its disk or share does not answer. Worth another try."""


class StalledRead(ImageError):  # noqa: N818 - names the event, as TimeoutError does
    """A read that gave nothing within the stated time."""


class BitsUnknown(ImageError):  # noqa: N818 - says what is the matter
    """A picture of 16 bits a value of which neither the file nor the user says how many are in use.

    Attributes:
        largest: value that was found.
    """

    def __init__(self, path: str | Path, largest: int) -> None:
        super().__init__(
            path,
            f"16 bits a value, and the file does not say how many of them are in use; the largest value is {largest:,} "
            "of 65,535, so it would be nearly black. Say how many bits the camera or scanner uses, for all images: "
            "--patch.bits 12, for example (of new images: --bits 12). Or save them with 8 bits.",
        )
        self.largest = largest

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, int]]:  # type: ignore[override]
        return type(self), (self.path, self.largest)


class DataError(KeyholeError):
    """A manifest, CSV or folder of classes that does not say what it must."""


class ConfigError(KeyholeError):
    """An option or configuration value of a wrong name, type or range."""


class RunError(KeyholeError):
    """A run folder or model that cannot be used as asked."""


class OutputError(KeyholeError):
    """A place that cannot be written: no permission, no space, already there."""


class NonFiniteLoss(KeyholeError):  # noqa: N818
    """A training step gave a loss that is not a number; the images of the step are named."""


class Interrupted(KeyholeError):  # noqa: N818
    """Ctrl-C, SIGTERM, SIGHUP or SIGUSR1: the state is saved and the message says how to resume."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
