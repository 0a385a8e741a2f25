"""What the three calls consist of: their parts, in which order, and how many minutes each may take.

The seconds are estimates for one H100 and 16 cores, from figures measured on such cards (../../docs/performance.md and
the paper's code on an H200) and on two CPU cores:

    starting Python, torch and CUDA          8 s in each part
    compiling ResNet-18 to look and to learn 10 and 25 s the first time, 5 and 8 s from torch's cache on disk
    a rate                                   2 to 3 s of work, after two calls that warm up
    16 slides of 250,000 patches             4,000,000 patches at 25,000 to 45,000 a second: 90 to 160 s
    an epoch of Megapixel MNIST              312 steps of 52 ms, measured on an H200: 16 s

Parts of one stage run at the same time: none of them is timed. A part is stopped some seconds after its estimate, so
that those after it keep theirs; the limits of all stages but the last leave it the better part of a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A piece of a call with a process of its own.

    Attributes:
        name: of the function in `part.py` that it runs, with `_` for `-`.
        shows: what it tells.
        expected: seconds on an H100.
        limit: seconds after which it is stopped.
        command: what is run instead of that function.
    """

    name: str
    shows: str
    expected: int = 1
    limit: int = 60
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """What runs in one go.

    Attributes:
        name, shows: on the command line, and what it tells.
        seconds: for all of it.
        stages: one after the other; the parts of one run at the same time.
    """

    name: str
    shows: str
    seconds: int
    stages: tuple[tuple[Part, ...], ...]

    @property
    def parts(self) -> list[Part]:
        return [part for stage in self.stages for part in stage]


WORKS = Call(
    "works",
    "whether everything works on this GPU, and what the encoder, the decoder and the streams do alone",
    305,
    (
        (Part("facts", "versions, requirements, rates of copies and of matrix products", 12, 20),),
        (Part("decoder", "JPEG on the device: colours beside the host's, tiles a second", 20, 30),),
        (Part("encoder", "batch norm folded, graph breaks, the encoder alone", 55, 70),),
        (Part("memory-stream", "patches from device and host memory, as shares of the encoder", 35, 45),),
        (Part("file-stream", "patches from a JPEG TIFF, by threads, chunk and who decodes", 60, 70),),
        (
            Part("commands", "train, stop, resume, evaluate, predict, embed through the command line", 60, 120),
            Part("tests", "the tests that are marked `cuda`", 60, 120),
            Part("recovery", "running out of memory, compiled and not", 45, 120),
            Part("plan", "predicted and measured memory of whole steps", 40, 120),
        ),
    ),
)
MEASURES = Call(
    "measures",
    "steps beside the published code, slides of 250,000 patches, photographs",
    370,
    (
        (
            Part("compile-traffic", "fills torch's cache on disk for `steps`", 50, 90),
            Part("compile-digits", "fills torch's cache on disk for `steps`", 50, 90),
            Part("compile-slides", "fills torch's cache on disk for `slides`", 65, 90),
            Part("draw", "slide and photographs for the parts below", 10, 60),
        ),
        (Part("steps", "training steps of the published settings beside the published code", 55, 70),),
        (Part("slides", "a step on slides of 250,000 patches from their files under --memory 3GB", 135, 150),),
        (Part("photographs", "epochs from JPEG files beside the published pipeline", 35, 50),),
    ),
)
LEARNS = Call(
    "learns",
    "Megapixel MNIST at 1500 px, its pace and what it reaches",
    590,
    (
        (
            Part("compile-published", "fills torch's cache on disk for `digits`", 60, 100),
            Part("compile-advised", "fills torch's cache on disk for `digits-advised`", 60, 100),
            Part("draw-canvases", "6,000 canvases", 50, 90),
        ),
        (Part("digits-pace", "milliseconds of a step, by chunk and threads", 60, 100),),
        (Part("digits-advised", "trained with the settings that are advised", 200, 290),),
        (Part("digits", "trained as published, for the time that is left", 250, 450),),
    ),
)
CALLS: Mapping[str, Call] = {call.name: call for call in (WORKS, MEASURES, LEARNS)}
