"""Laws of images that are decoded whole: many at once, each once, and no thread waits for the decoding of another."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from make_images import picture
from PIL import Image as Pictures
from PIL.PngImagePlugin import PngImageFile
from test_reading import PATIENCE, eventually, no_thread_is_left, threads

from keyhole.errors import StalledRead
from keyhole.loading import FetchOnly, Reader
from keyhole.patches.opener import FileOpener
from keyhole.util.threads import ReadingThreads

__all__ = ["no_thread_is_left"]  # a fixture that every test here uses

SIDE, WIDTH, HEIGHT, PATCHES = 16, 64, 48, 4 * 3
MANY = 16
"""Images of a batch, and threads."""

Decoding = Callable[[Callable[[str], None]], Counter[str]]


def photographs(folder: Path, count: int = MANY) -> tuple[list[FileOpener], list[np.ndarray]]:
    """Openers of pictures, and all patches of each."""
    openers, expected = [], []
    for number in range(count):
        pixels = picture(3, WIDTH, HEIGHT, number)
        Pictures.fromarray(pixels).save(folder / f"{number}.png")
        openers.append(FileOpener(folder / f"{number}.png", str(number), SIDE))
        blocks = pixels.reshape(HEIGHT // SIDE, SIDE, WIDTH // SIDE, SIDE, 3)
        expected.append(blocks.transpose(0, 2, 1, 3, 4).reshape(PATCHES, SIDE, SIDE, 3))
    return openers, expected


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Decoding:
    """Has a function called before a file is checked and decoded, with its name; counts these by file."""
    verify = PngImageFile.verify
    seen: Counter[str] = Counter()

    def first(function: Callable[[str], None]) -> Counter[str]:
        def verified(self: PngImageFile) -> None:
            name = Path(self.filename).name
            seen[name] += 1
            function(name)
            verify(self)

        monkeypatch.setattr(PngImageFile, "verify", verified)
        return seen

    return first


@pytest.mark.parametrize("fetched", [False, True])
def test_as_many_images_are_decoded_at_once_as_there_are_threads(
    tmp_path: Path, decoding: Decoding, fetched: bool
) -> None:
    """A decoding does not go on before there are sixteen, and of each image there is one."""
    openers, expected = photographs(tmp_path)
    together = threading.Barrier(MANY, timeout=PATIENCE)
    decoded = decoding(lambda _: together.wait() and None)
    chunk = 4 * PATCHES  # two runs of an image in a chunk
    with Reader(MANY, stall=4 * PATIENCE) as reader:
        for batch in reader.stream([[FetchOnly(each) for each in openers] if fetched else openers], chunk):
            rows = [[chunk.pixels[: chunk.count].copy(), chunk.image] for chunk in batch.chunks()]
            found = batch.fetch([np.arange(PATCHES)] * MANY)
            for number, pixels in enumerate(expected):
                np.testing.assert_array_equal(found[number], pixels)
                if not fetched:
                    streamed = np.concatenate([block[image == number] for block, image in rows])
                    np.testing.assert_array_equal(streamed, pixels)
    assert not together.broken
    assert set(decoded.values()) == {1}
    assert len(decoded) == MANY


def test_a_decoding_that_stalls_takes_one_thread(tmp_path: Path, decoding: Decoding) -> None:
    openers, expected = photographs(tmp_path, 2)
    gate = threading.Event()
    told: list[str] = []
    decoded = decoding(lambda name: hang() if name == "0.png" and not told else None)

    def hang() -> None:
        gate.wait(2 * PATIENCE)

    before = threads()
    with Reader(6, stall=1.0, retry_wait=0.01, on_retry=lambda name, reason: told.append(name)) as reader:
        for batch in reader.stream([openers], 2 * PATCHES):  # two runs of each
            (chunk,) = batch.chunks()
            np.testing.assert_array_equal(chunk.pixels[: chunk.count], np.concatenate(expected))
        reading = [thread for thread in threads() - before if thread.name.startswith("keyhole-read")]
        assert len(reading) == 6 + 1, "those of the reader, and the one that is stuck"
        gate.set()
    assert told == ["0"]
    assert decoded == {"0.png": 2, "1.png": 1}


def test_a_damaged_image_is_decoded_once(tmp_path: Path, decoding: Decoding) -> None:
    openers, expected = photographs(tmp_path, 2)
    path = tmp_path / "0.png"
    path.write_bytes(path.read_bytes()[:-2000])
    decoded = decoding(lambda _: None)
    with Reader(4, stall=PATIENCE) as reader:
        for batch in reader.stream([openers], 2 * PATCHES, "mask"):
            (chunk,) = batch.chunks()
            np.testing.assert_array_equal(chunk.pixels[: chunk.count], expected[1])
        assert "cannot be decoded" in str(batch.failed[0])
    assert decoded == {"0.png": 1, "1.png": 1}


def test_tasks_that_follow_another_go_before_what_is_queued_and_also_when_it_is_given_up() -> None:
    order: list[str] = []
    gate = threading.Event()
    before = threads()
    pool = ReadingThreads(1, stall=0.5)
    try:
        first = pool.submit("first", lambda: gate.wait(PATIENCE))
        queued = pool.submit("queued", lambda: order.append("queued"))
        followers = [pool.submit(name, lambda name=name: order.append(name), after=first) for name in ("b", "c")]
        pool.submit("urgent", lambda: order.append("urgent"), urgent=True, after=first)
        for task in (first, queued, *followers):
            pool.wait(task)
        assert isinstance(first.error, StalledRead)
        assert order == ["urgent", "b", "c", "queued"]
        late = pool.submit("late", lambda: order.append("late"), after=first)
        pool.wait(late)
        assert order[-1] == "late"
    finally:
        gate.set()
        pool.close()
    assert eventually(lambda: not threads() - before)
