"""The process that opens images and scores, which a broken file may end.

It answers one message after the other on standard input: a line of JSON, see `Desk.answer`. The answer is a line of
JSON with the number of `bytes` that follow it and their `type`, or with `lost` or `problem` instead. torch is not
imported here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

from keyhole.errors import ImageLost, KeyholeError
from keyhole.images.geometry import Box
from keyhole.images.image import Image, open_image
from keyhole.util.files import file_size
from keyhole.view.scores import ScoreMap, read_scores
from keyhole.view.tiles import encoded, filled, read_patch, read_tile, zooms

MAX_OPEN, MAX_HELD_PIXELS, MAX_MAPS = 8, 2**27, 4
"""Open images, pixels that these hold in memory, and maps of scores."""
Reply = tuple[bytes, str]
JSON = "application/json"


class Desk:
    """Open images and maps of one process; the ones that were used last stay open."""

    def __init__(self) -> None:
        self._images: OrderedDict[tuple[Any, ...], Image] = OrderedDict()
        self._maps: OrderedDict[tuple[Any, ...], ScoreMap] = OrderedDict()

    def image(self, path: Path, bits: int | None) -> Image:
        key = (path, bits, *_state(path))
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        image = self._images[key] = open_image(path, bits)
        while len(self._images) > 1 and (len(self._images) > MAX_OPEN or self._held() > MAX_HELD_PIXELS):
            self._images.popitem(last=False)[1].close()
        return image

    def map(self, path: Path) -> ScoreMap:
        key = (path, *_state(path))
        if key not in self._maps:
            self._maps[key] = read_scores(path)
            while len(self._maps) > MAX_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]

    def _held(self) -> int:
        return sum(image.held_pixels for image in self._images.values())

    def answer(self, message: dict[str, Any]) -> Reply | None:
        """Return what a message asks for, None if there is no such thing.

        `do` is what to do, `path` and `bits` are of an image, and `scores` is a file of scores:
        `describe` the image; `tile` it at `zoom`, `column`, `row`; a `thumbnail`, zoom 0 without a border; `patch` a
        `box` of it; the `prediction` with what the colours mean; `map`, a tile of the scores of a `task`; the `score`
        that a pixel of the map at `zoom` shows.
        """
        do, at = message["do"], [message.get(name, 0) for name in ("zoom", "column", "row")]
        if do in ("prediction", "score", "map"):
            scores = self.map(Path(message["scores"]))
            if do == "prediction":
                return _json(scores.prediction | _colors(scores))
            if (task := message["task"]) not in scores.scales:
                return None
            if do == "score":
                return _json(scores.score(task, *at))
            tile = scores.tile(task, *at)
            return None if tile is None else (tile, "image/png")
        image = self.image(Path(message["path"]), message["bits"])
        if do == "describe":
            return _json(_described(image))
        if do == "patch":
            return encoded(read_patch(image, Box(*message["box"])))
        pixels = read_tile(image, *at)
        return None if pixels is None else encoded(pixels if do == "thumbnail" else filled(pixels))


def _state(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is replaced."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0  # opening it says what is wrong
    return status.st_ino, status.st_size, status.st_mtime_ns


def _described(image: Image) -> dict[str, Any]:
    return {
        "width": image.size.width,
        "height": image.size.height,
        "zooms": zooms(image.size),
        "levels": [[*level.size, level.downsample] for level in image.levels],
        "mpp": image.mpp,
        "note": image.note or image.mpp_note,
        "bytes": file_size(image.path),
    }


def _colors(scores: ScoreMap) -> dict[str, Any]:
    return {"map": {"patches": len(scores.scores), "top": {task: scale.top for task, scale in scores.scales.items()}}}


def _json(data: Any) -> Reply:
    return json.dumps(data, allow_nan=False).encode(), JSON


def main() -> None:
    """Answer messages until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the server ends this one
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not be read as an answer
    desk = Desk()
    for line in sys.stdin.buffer:
        body, head = b"", dict[str, Any]()
        try:
            reply = desk.answer(json.loads(line))
            if reply is None:
                head = {"lost": "there is no such tile"}
            else:
                body, head = reply[0], {"bytes": len(reply[0]), "type": reply[1]}
        except ImageLost as error:
            head = {"lost": str(error)}
        except KeyholeError as error:
            head = {"problem": str(error)}
        except Exception as error:  # noqa: BLE001 - reported; the next message is of another file
            head = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        out.write(json.dumps(head).encode() + b"\n" + body)
        out.flush()


if __name__ == "__main__":
    main()
