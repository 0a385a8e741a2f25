"""Pages, the list of images, tiles, scores and kept patches over HTTP. An image is named by its index, never a path.

/                            the page, with the files of /static
/api/images                  everything in the list
/api/images/N                one image, and what was predicted for it
/tiles/N/ZOOM/COLUMN/ROW     of the image
/thumbnails/N                of the image, for the list
/maps/N/TASK/ZOOM/COLUMN/ROW of the score of every patch, coloured; TASK is the index of a task
/scores/N/TASK/ZOOM/X/Y      the score that a pixel of that map shows, null where no patch is
/patches/N/RANK              a kept patch; 0 is the one with the highest score
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from keyhole.view.collection import Collection, Entry
from keyhole.view.decoders import NOT_FOUND, Decoders, Reply
from keyhole.view.scores import colors

MAX_CACHED_BYTES = 64 * 2**20
"""Encoded tiles that are kept for the next user."""
_NUMBER = re.compile(r"0|[1-9][0-9]{0,7}", re.ASCII)
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_KEEP = {"Cache-Control": "private, max-age=86400, immutable"}  # addresses carry the version of this server


class Viewer:
    """Answers requests about one collection.

    Args:
        collection: What is shown.
        bits: Bits in use of 16-bit images that do not state them.
        decoders: Processes that open images.
    """

    def __init__(self, collection: Collection, bits: int | None = None, decoders: Decoders | None = None) -> None:
        self.collection, self.bits = collection, bits
        self.decoders = decoders or Decoders()
        self.version = secrets.token_hex(4)
        self.tasks = list(collection.tasks)
        self._static = static_files()
        self._list: bytes | None = None
        self._cache: OrderedDict[tuple[Any, ...], Reply] = OrderedDict()
        self._cached_bytes = 0

    def app(self) -> Starlette:
        """Return the application, without a guard."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await self.decoders.close()

        routes = [
            Route("/", self.page),
            Route("/static/{name}", self.page),
            Route("/api/images", self.images),
            Route("/api/images/{index}", self.image),
            Route("/tiles/{index}/{zoom}/{column}/{row}", self.tile),
            Route("/thumbnails/{index}", self.thumbnail),
            Route("/maps/{index}/{task}/{zoom}/{column}/{row}", self.map),
            Route("/scores/{index}/{task}/{zoom}/{column}/{row}", self.score),
            Route("/patches/{index}/{rank}", self.patch),
        ]
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _refused})

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self._static:
            raise HTTPException(NOT_FOUND)
        return Response(self._static[name], media_type=_TYPES[Path(name).suffix], headers={"Cache-Control": "no-cache"})

    async def images(self, request: Request) -> Response:
        if self._list is None:
            about = {"version": self.version, "palette": colors()[::8].tolist()}
            shown = self.collection.to_json() | about
            self._list = json.dumps(shown, allow_nan=False).encode("utf-8", "backslashreplace")
        return Response(self._list, media_type="application/json")

    async def image(self, request: Request) -> Response:
        """Return what the file says, and what was predicted; a `problem` where either cannot be read."""
        entry, index = self._entry(request)
        described, predicted = await asyncio.gather(
            self._ask(request, index, {"do": "describe", **self._file(entry)}, keep=False), self._prediction(request)
        )
        answer: dict[str, Any] = {"name": entry.name, "path": str(entry.path), "notes": []}
        if described.status == 200:
            answer |= json.loads(described.body)
        else:
            answer["problem"] = described.body.decode(errors="replace")
            if described.status == NOT_FOUND and entry.answers:
                answer["problem"] += " If the images were moved, --root DIR names the folder that holds them now."
        answer |= predicted
        answer["notes"] += _changes(entry, answer)
        return JSONResponse(answer)

    async def tile(self, request: Request) -> Response:
        entry, index = self._entry(request)
        message = {"do": "tile", **self._file(entry), **self._place(request)}
        return self._response(await self._ask(request, index, message))

    async def thumbnail(self, request: Request) -> Response:
        entry, index = self._entry(request)
        return self._response(await self._ask(request, index, {"do": "thumbnail", **self._file(entry)}))

    async def map(self, request: Request) -> Response:
        return await self._of_scores("map", request)

    async def score(self, request: Request) -> Response:
        return await self._of_scores("score", request, keep=False)

    async def patch(self, request: Request) -> Response:
        entry, index = self._entry(request)
        rank = self._number(request, "rank")
        kept = (await self._prediction(request)).get("kept", [])
        if rank >= len(kept):
            raise HTTPException(NOT_FOUND)
        message = {"do": "patch", **self._file(entry), "box": kept[rank]["box"]}
        return self._response(await self._ask(request, index, message))

    async def _prediction(self, request: Request) -> dict[str, Any]:
        """Return the kept patches and what colours mean, unless they are of another prediction than the table."""
        entry, index = self._entry(request)
        if entry.scores is None:
            return {}
        reply = await self._ask(request, index, {"do": "prediction", "scores": str(entry.scores)})
        if reply.status != 200:
            return {"no_scores": reply.body.decode(errors="replace")}
        try:
            return _shown(entry, json.loads(reply.body))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return {"no_scores": f"{entry.scores}: damaged ({error!r}). Predict again."}

    async def _ask(self, request: Request, index: int, message: dict[str, Any], keep: bool = True) -> Reply:
        """Return the reply of a process; replies that are likely to be asked for again are kept."""
        key = tuple((name, str(value)) for name, value in message.items())
        if keep and key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        reply = await self.decoders.ask(index, message, message["do"] != "thumbnail", request.is_disconnected)
        if keep and reply.status == 200 and key not in self._cache and len(reply.body) <= MAX_CACHED_BYTES // 8:
            self._cache[key] = reply
            self._cached_bytes += len(reply.body)
            while self._cached_bytes > MAX_CACHED_BYTES:
                self._cached_bytes -= len(self._cache.popitem(last=False)[1].body)
        return reply

    def _entry(self, request: Request) -> tuple[Entry, int]:
        index = self._number(request, "index")
        if index >= len(self.collection.entries):
            raise HTTPException(NOT_FOUND)
        return self.collection.entries[index], index

    def _number(self, request: Request, name: str) -> int:
        """Return a number in the address; anything else than plain digits is not an address of this server."""
        text = request.path_params[name]
        if not _NUMBER.fullmatch(text):
            raise HTTPException(NOT_FOUND)
        return int(text)

    def _file(self, entry: Entry) -> dict[str, Any]:
        return {"path": str(entry.path), "bits": self.bits}

    async def _of_scores(self, do: str, request: Request, keep: bool = True) -> Response:
        entry, index = self._entry(request)
        task = self._number(request, "task")
        if entry.scores is None or task >= len(self.tasks):
            raise HTTPException(NOT_FOUND)
        message = {"do": do, "scores": str(entry.scores), "task": self.tasks[task], **self._place(request)}
        return self._response(await self._ask(request, index, message, keep))

    def _place(self, request: Request) -> dict[str, int]:
        return {name: self._number(request, name) for name in ("zoom", "column", "row")}

    def _response(self, reply: Reply) -> Response:
        headers = _KEEP if reply.status == 200 else None
        return Response(reply.body, reply.status, headers, media_type=reply.type)


def static_files() -> dict[str, bytes]:
    """Return the files of the pages and of Leaflet by name: no request names a path."""
    from xstatic.pkg import leaflet

    pages = {
        file.name: file.read_bytes() for file in files("keyhole.view").joinpath("pages").iterdir() if file.is_file()
    }
    leaflet_files = {name: Path(leaflet.BASE_DIR, name).read_bytes() for name in ("leaflet.js", "leaflet.css")}
    return {name: data for name, data in (pages | leaflet_files).items() if Path(name).suffix in _TYPES}


def _shown(entry: Entry, told: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of a stored prediction, if it is the one of the table."""
    for task, answer in entry.answers.items():
        if (
            told["name"] != entry.name
            or (answer.probability or told["tasks"][task]["probability"]) != (told["tasks"][task]["probability"])
        ):
            return {"no_scores": "the stored scores are of another prediction than the table; predict again"}
    kept = [{**patch, "box": [int(side) for side in patch["box"]]} for patch in told["kept"]["patches"]]
    return {
        "kept": [patch for patch in kept if len(patch["box"]) == 4 and min(patch["box"][2:]) > 0],
        "predicted_size": [int(told["size"]["width"]), int(told["size"]["height"])],
        "model": str(told["model"]),
        "notes": [str(note) for note in told["notes"]],
        "map": told["map"],
    }


def _changes(entry: Entry, answer: dict[str, Any]) -> list[str]:
    """Return how the file differs from the one that was predicted."""
    if "problem" in answer:
        return []
    size = [answer["width"], answer["height"]]
    if answer.get("predicted_size", size) != size:
        was = " x ".join(map(str, answer["predicted_size"]))
        return [f"The image has changed: {was} pixels when it was predicted. Kept patches and scores may not fit it."]
    if entry.bytes is not None and answer["bytes"] != entry.bytes:
        return [f"The file has changed: {entry.bytes:,} bytes when the run began, {answer['bytes']:,} now."]
    return []


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(error.detail, error.status_code)
