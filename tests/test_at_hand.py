"""Laws of images in memory: opening and copying them needs neither files nor threads, unless the consumer waits."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from keyhole.loading import FetchOnly, Reader, Shuffled
from keyhole.loading.chunks import at_hand
from keyhole.patches.image_cache import ImageCache
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import FilePatches


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[20:70, 30:100] = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.parametrize("foreground", ["all", "non-empty", "tissue"])
@pytest.mark.parametrize("offset", [(0, 0), (-5, -9)])
def test_what_is_at_hand_is_opened_without_its_file(path: Path, foreground: str, offset: tuple[int, int]) -> None:
    cache = ImageCache(keep=True)
    opener = FileOpener(path, "image", 16, foreground=foreground, offset=offset, cache=cache)  # type: ignore[arg-type]
    assert not at_hand(opener)
    first = opener()
    assert at_hand(opener)
    assert at_hand(Shuffled(opener, (0,)))
    assert at_hand(FetchOnly(opener))
    path.unlink()
    again = opener()
    assert len(again) == len(first)
    assert (again.read(slice(None)) == first.read(slice(None))).all()
    assert again.grid.boxes(slice(None)).tolist() == first.grid.boxes(slice(None)).tolist()


def test_without_its_mask_or_its_level_an_image_is_not_at_hand(path: Path) -> None:
    cache = ImageCache(keep=True)
    FileOpener(path, "image", 16, cache=cache)()
    assert at_hand(FileOpener(path, "image", 32, cache=cache))
    assert not at_hand(FileOpener(path, "image", 16, foreground="non-empty", cache=cache))
    assert not cache.holds(path, 1)
    assert not at_hand(FileOpener(path, "image", 16, cache=ImageCache(keep=False)))


def test_what_is_at_hand_is_opened_while_another_thread_hangs_in_the_same_file(path: Path) -> None:
    cache = ImageCache(keep=True)
    opener = FileOpener(path, "image", 16, foreground="non-empty", cache=cache)
    opener()
    with cache._lock_of(path), ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: len(opener())).result(timeout=30)


def test_a_damaged_image_is_not_at_hand_and_its_grids_are_not_kept(path: Path) -> None:
    cache = ImageCache(keep=True)
    opener = FileOpener(path, "image", 16, foreground="non-empty", cache=cache)
    opener()
    cache._damaged.add(path)  # as another level of it may be
    other = replace(opener, min_foreground=0.5)
    assert not at_hand(opener)
    assert not at_hand(other)
    before = dict(cache.grids)
    assert len(other())
    assert cache.grids == before


def test_settings_that_do_not_fit_are_told_by_opening(path: Path) -> None:
    cache = ImageCache(keep=True)
    FileOpener(path, "image", 16, mpp=0.5, image_mpp=0.5, cache=cache)()
    opener = FileOpener(path, "image", 16, mpp=0.5, cache=cache)
    assert not at_hand(opener)
    with Reader(threads=1) as reader:
        (batch,) = reader.stream([[opener]], chunk=4, on_error="skip")
    assert "microns" in str(batch.failed[0])


def test_grids_of_very_many_patches_are_not_kept(path: Path) -> None:
    cache = ImageCache(keep=True)
    FileOpener(path, "image", 16, stride=1, foreground="non-empty", cache=cache)()
    assert not cache.grids


def test_a_grid_on_a_mask_is_made_once_for_equal_settings(path: Path) -> None:
    cache = ImageCache(keep=True)

    def opened(size: int, offset: tuple[int, int] = (0, 0), least: float = 0.01) -> FilePatches:
        return FileOpener(
            path, "image", size, foreground="non-empty", min_foreground=least, offset=offset, cache=cache
        )()

    assert opened(16).grid is opened(16).grid
    for other in (opened(32), opened(16, (-5, -9)), opened(16, least=0.5)):
        assert other.grid is not opened(16).grid
    plain = FileOpener(path, "image", 16, foreground="non-empty", cache=ImageCache())()
    assert opened(16).grid.boxes(slice(None)).tolist() == plain.grid.boxes(slice(None)).tolist()


@pytest.mark.parametrize("slow", [True, False])
def test_images_in_memory_are_copied_by_the_planning_thread_while_it_keeps_ahead(
    path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    opener = FileOpener(path, "image", 16, cache=ImageCache(keep=True))
    whole = opener().read(slice(None))
    threads: list[str] = []
    read = FilePatches.read

    def noted(self: FilePatches, index: object, out: np.ndarray | None = None) -> np.ndarray:
        threads.append(threading.current_thread().name)
        if not slow:
            time.sleep(0.02)  # the consumer waits
        return read(self, index, out)  # type: ignore[arg-type]

    monkeypatch.setattr(FilePatches, "read", noted)
    with Reader(threads=2) as reader:
        for batch in reader.stream([[opener, opener]] * 6, chunk=48):
            chunks = [(chunk.image.copy(), chunk.index.copy(), chunk.pixels.copy()) for chunk in batch.chunks()]
            if slow:
                time.sleep(0.05)
            for image, index, pixels in chunks:
                assert (pixels[: len(image)] == whole[index]).all()
    assert any(name == "keyhole-plan" for name in threads[-4:]) is slow
    assert len(threads) >= 12
