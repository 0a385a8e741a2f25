"""JPEG on the device: whether it gives the host's colours, on trial pictures and on a slide, and tiles a second."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from keyhole.datasets.slides import make_slide
from keyhole.engine.jpeg import Decoder, decodes
from keyhole.images.jpeg import COLORS, segments
from keyhole.patches.opener import FileOpener
from on_gpu.bench import Bench, rate

SIDE, SMOOTH = 64, 8
"""Side of a trial picture, and the levels by which decoders may differ on it; it changes slowly."""
SOF0 = 0xC0


def decoder(bench: Bench) -> None:
    start = time.perf_counter()
    trusted, why = decodes(bench.device)
    took = time.perf_counter() - start
    bench.say(f"trusted with {', '.join(sorted(trusted)) or 'nothing'} after {took:.2f} s{'; ' * bool(why)}{why}")
    bench.attempt("colours", lambda: colors(bench, trusted))
    tiles: list[bytes] = []
    bench.attempt("slide", lambda: tiles.extend(on_slide(bench)))
    if tiles:
        speed(bench, tiles)


def colors(bench: Bench, trusted: frozenset[str]) -> None:
    """Every kind of JPEG that the readers hand over, and RGB under all numbers that files give its samples."""
    right = bool(trusted)
    for title, kind, data, picture in trials():
        try:
            found = Decoder(bench.device)([data], 1 if kind == "grey" else 3).cpu().numpy()[0].astype(int)
            error = float(np.abs(found - np.asarray(picture).reshape(found.shape)).max())
            bench.say(f"{title}: off by {error:.0f} levels at most")
        except RuntimeError as refusal:
            error = float("inf")
            bench.say(f"{title}: refused ({' '.join(str(refusal).split())[:200]})")
        right = right and (error <= SMOOTH or kind not in trusted)
        if title == "rgb, samples 0 1 2":
            bench.figure("decoder.numbers", error <= SMOOTH or kind not in trusted, _said(error, kind in trusted))
    bench.figure(
        "decoder.colors", right, f"{', '.join(sorted(trusted)) or 'nothing'} trusted, {'right' if right else 'WRONG'}"
    )


def _said(error: float, trusted: bool) -> str:
    return f"off by {error:.0f} levels at most" if trusted else "not trusted: the host decodes it"


def trials() -> list[tuple[str, str, bytes, PIL.Image.Image]]:
    """(title, kind, JPEG, picture)."""
    across, down = np.meshgrid(np.linspace(40, 210, SIDE), np.linspace(60, 190, SIDE))
    color = PIL.Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))
    grey = PIL.Image.fromarray(across.astype(np.uint8))
    found = [("grey", "grey", saved(grey), grey)]
    for number, name in enumerate(("4:4:4", "4:2:2", "4:2:0")):
        found.append((f"ycbcr {name}", "ycbcr", saved(color, subsampling=number), color))
    rgb = saved(color, keep_rgb=True)
    for ids in (b"RGB", b"\0\1\2", b"\1\2\3"):
        name = "R G B" if ids == b"RGB" else " ".join(map(str, ids))
        found.append((f"rgb, samples {name}", "rgb", numbered(rgb, ids), color))
    return found


def saved(picture: PIL.Image.Image, **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=95, **options)
    return data.getvalue()


def numbered(jpeg: bytes, ids: bytes) -> bytes:
    """A JPEG of three samples with other numbers for them, in its frame (SOF) and in its scan (SOS)."""
    data, at = bytearray(jpeg), 2
    for marker, body in segments(jpeg) or []:
        if marker == SOF0:
            data[at + 10 : at + 19 : 3] = ids
        at += len(body)
    data[at + 5 : at + 11 : 2] = ids
    return bytes(data)


def on_slide(bench: Bench) -> list[bytes]:
    """How far the device is from the host on a slide's tiles; returns them as JPEG."""
    path = Path(bench.scratch) / "decoder.tif"
    make_slide(path, 2048 if bench.dry else 8192, 0, tissue=1.0, positive=True)
    source = FileOpener(path, "slide", 256)()
    tiles = [tile for tile in source.encoded(slice(None), COLORS) or [] if tile is not None]
    rows = np.arange(min(64, len(tiles)))
    found = Decoder(bench.device)([tiles[row] for row in rows], 3).cpu().numpy().astype(int)
    differences = np.abs(found - source.read(rows).astype(int))
    source.close()
    shown = f"{differences.mean():.2f}, largest {differences.max()}, on {len(rows)} tiles"
    bench.figure("decoder.slide", float(differences.mean()), shown)
    return tiles


def speed(bench: Bench, tiles: list[bytes]) -> None:
    best = 0.0
    bench.say(f"{len(tiles)} tiles of {np.mean([len(tile) for tile in tiles]) / 1e3:.1f} kB")
    for count in (4, 8) if bench.dry else (64, 128, 256, 512, 1024):
        decode = Decoder(bench.device)
        some = (tiles * -(-count // len(tiles)))[:count]
        found = rate(bench, lambda decode=decode, some=some: decode(some, 3), count, 1.0)  # type: ignore[misc]
        best = max(best, found)
        bench.say(f"decoder alone, {count:4} tiles a call: {found:9,.0f} tiles/s")
    if bench.device.type == "cuda":
        bench.say(f"device memory beside torch's: {_beside() / 1e6:.0f} MB")
    bench.figure("decoder.rate", best, f"{best:,.0f}")


def _beside() -> int:
    """Bytes of the device that are taken and not torch's: of the context, cuDNN and nvJPEG."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
