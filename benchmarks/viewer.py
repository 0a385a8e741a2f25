"""How long a tile of the viewer takes, with several users who look at one slide at the same time.

    python benchmarks/viewer.py [--side 128000] [--users 4] [--tiles 300] [--quick] [--no-write]

Every user asks `keyhole view`, a process of its own, for one tile after the other, at places and zooms drawn at random;
no tile is asked for twice, so none comes from a cache of whole tiles. OpenSlide's DeepZoomGenerator, with as many
threads, makes the same tiles of the same file in this process, JPEG files included, without a server.
"""

from __future__ import annotations

import argparse
import http.client
import io
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from gigapixel import write_slide
from machine import write_result

TILE = 256
LOOKS = 0.7
"""Share of the tiles that are asked for at the three highest zooms, where most of looking is."""


class Place(NamedTuple):
    """Of a tile; the highest zoom is that of full resolution."""

    zoom: int
    column: int
    row: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=128_000)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--tiles", type=int, default=300, help="for each user")
    parser.add_argument("--folder", type=Path, help="for the slide, which stays there")
    parser.add_argument("--quick", action="store_true", help="a small slide and few tiles")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.side, options.tiles = 8192, 40
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        slide, _ = write_slide(folder, options.side)
        places = draw_places(options.side, options.users * options.tiles)
        ours, memory = by_viewer(slide, places, options.users)
        theirs = by_openslide(slide, places, options.users)
    lines = table(options, ours, theirs, memory)
    print("\n".join(lines))
    if not options.no_write and not options.quick:
        print(write_result("viewer", "Tiles of the viewer", lines))


def draw_places(side: int, count: int) -> list[Place]:
    """Different tiles, at all zooms that have more than a few."""
    draw, highest = random.Random(0), math.ceil(math.log2(side / TILE))
    found: dict[Place, None] = {}
    while len(found) < count:
        near = draw.random() < LOOKS
        zoom = draw.randint(highest - 2, highest) if near else draw.randint(min(3, highest), highest)
        across = math.ceil(side / 2 ** (highest - zoom) / TILE)
        found[Place(zoom, draw.randrange(across), draw.randrange(across))] = None
    return list(found)


def timed(places: Sequence[Place], users: int, make: Callable[[], Callable[[Place], bytes]]) -> list[float]:
    """Seconds of every tile; each user has a function of its own from `make`, and every `users`-th place."""

    def look(user: int) -> list[float]:
        tile, took = make(), []
        for place in places[user::users]:
            start = time.perf_counter()
            assert tile(place)
            took.append(time.perf_counter() - start)
        return took

    with ThreadPoolExecutor(users) as pool:
        return [seconds for took in pool.map(look, range(users)) for seconds in took]


def by_viewer(slide: Path, places: Sequence[Place], users: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of every tile, and the peak memory in MB of the server and of all its processes."""
    command = [sys.executable, "-m", "keyhole", "view", str(slide), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = ""
            while "Ctrl-C" not in said:
                said += server.stdout.readline()
            port = int(re.findall(r"http://localhost:(\d+)/", said)[0])

            def make() -> Callable[[Place], bytes]:
                connection = http.client.HTTPConnection("localhost", port)

                def tile(place: Place) -> bytes:
                    connection.request("GET", f"/tiles/0/{place.zoom}/{place.column}/{place.row}")
                    answer = connection.getresponse()
                    assert answer.status == 200, answer.status
                    return answer.read()

                return tile

            timed([Place(0, 0, 0)] * users * 2, users, make)  # processes start
            took = timed(places, users, make)
            decoders = children(server.pid)
            memory = {"server": peak_mb(server.pid), "decoders": sum(map(peak_mb, decoders)), "number": len(decoders)}
            return took, memory
        finally:
            server.terminate()


def by_openslide(slide: Path, places: Sequence[Place], users: int) -> list[float]:
    import openslide
    from openslide.deepzoom import DeepZoomGenerator

    handle = openslide.OpenSlide(slide)
    deep = DeepZoomGenerator(handle, TILE, overlap=0)
    less = deep.level_count - 1 - max(place.zoom for place in places)

    def tile(place: Place) -> bytes:
        out = io.BytesIO()
        picture = deep.get_tile(place.zoom + less, (place.column, place.row))
        picture.save(out, "JPEG", quality=90, subsampling=0)
        return out.getvalue()

    return timed(places, users, lambda: tile)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def peak_mb(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def table(
    options: argparse.Namespace, ours: Sequence[float], theirs: Sequence[float], memory: dict[str, float]
) -> list[str]:
    """The result as Markdown."""

    def row(name: str, took: Sequence[float]) -> str:
        cuts = statistics.quantiles(took, n=20)
        ms = [1000 * value for value in (statistics.median(took), cuts[0], cuts[-1], max(took))]
        return f"| {name} | {ms[0]:.1f} | {ms[1]:.1f} to {ms[2]:.1f} | {ms[3]:.0f} |"

    ratio = statistics.median(ours) / statistics.median(theirs)
    return [
        f"{options.users} users, {options.tiles} tiles of {TILE} px each, of a generated slide of {options.side:,} x "
        f"{options.side:,} pixels ({options.side**2 / 1e9:.1f} gigapixels). One run, one after the other.",
        "",
        "| milliseconds of a tile | median | 5th to 95th percentile | most |",
        "|---|---|---|---|",
        row("`keyhole view`, over HTTP", ours),
        row("OpenSlide's DeepZoomGenerator, without a server", theirs),
        "",
        f"The median of the viewer is {ratio:.2f} times that of OpenSlide. Peak memory: server "
        f"{memory['server']:.0f} MB, its {memory['number']} decoders together {memory['decoders']:.0f} MB.",
    ]


if __name__ == "__main__":
    main()
