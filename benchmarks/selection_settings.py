"""What `selection.py` measures: the published settings, for a CPU, for a GPU, and small ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keyhole.nn.selection import Rule
from keyhole.tasks.kinds import Task

DIGITS = tuple(map(str, range(10)))


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
        name, title: on the command line, and in the table.
        encoder: timm's name, or `features` for the projector.
        b, n, m, i: images, patches of each, kept of each, the published chunk.
        size: side of a patch in pixels, or numbers of a feature.
        inputs: `noise` patches that all differ, `canvases` of Megapixel MNIST, most of whose patches are blank,
            photographed `scenes` where they are beside the checkout (else noise), or `features`.
        goal: least ratio to the published code.
        channels, stages: of the encoder.
        hidden: width of the pool's MLP.
        tasks: one query each.
        position: the 1-D code.
        source: `memory` of the device, or `host` memory, from which patches are copied as they are needed.
        step: a whole training step; else the selection alone.
        steps: that are timed in a row, in a stream of their own, so that keyhole may read ahead as in an epoch.
        at_once: images the published code selects from together; None is the whole batch.
        chunk: patches keyhole encodes at once; divides b n, so that every chunk is full.
        rule: keyhole's while time is taken. "streaming" is the published one; of patches on the device it ties the
            chunk to I, so that with larger chunks "global", the default of keyhole, is timed. What is kept is compared
            under "streaming" in every case.
        precision: as --train.precision, where it is part of the setting; None takes the script's.
        half: features are stored as float16; the published code gets the same numbers in float32.
    """

    name: str
    title: str
    encoder: str
    b: int
    n: int
    m: int
    i: int
    size: int
    inputs: Literal["noise", "canvases", "scenes", "features"]
    goal: float
    channels: int = 3
    stages: int | None = None
    hidden: int = 2048
    tasks: tuple[Task, ...] = (Task("label", "multiclass", DIGITS[:4]),)
    position: bool = False
    source: Literal["memory", "host"] = "memory"
    step: bool = False
    steps: int = 1
    at_once: int | None = None
    chunk: int = 100
    rule: Rule = "streaming"
    precision: Literal["float32", "bf16"] | None = None
    half: bool = False


MNIST_TASKS = (
    *(Task(name, "multiclass", DIGITS) for name in ("majority", "max", "top")),
    Task("multi", "multilabel", DIGITS),
)


def mnist(name: str, title: str, goal: float, **changes: object) -> Setting:
    """Megapixel MNIST at 1500 px: ResNet-18's first two stages on one channel, D 128, four queries, 1-D code."""
    base: dict[str, object] = {
        "encoder": "resnet18",
        "b": 4,
        "n": 900,
        "m": 100,
        "i": 100,
        "size": 50,
        "inputs": "noise",
        "channels": 1,
        "stages": 2,
        "hidden": 512,
        "tasks": MNIST_TASKS,
        "position": True,
    }
    return Setting(name=name, title=title, goal=goal, **{**base, **changes})  # type: ignore[arg-type]


def traffic(name: str, title: str, goal: float, **changes: object) -> Setting:
    """Traffic signs: ResNet-18, 192 patches of 100 px, M 10, I 32."""
    base: dict[str, object] = {"encoder": "resnet18", "b": 16, "n": 192, "m": 10, "i": 32, "size": 100}
    base |= {"inputs": "scenes", "chunk": 512, "rule": "global"}
    return Setting(name=name, title=title, goal=goal, **{**base, **changes})  # type: ignore[arg-type]


def slides(name: str, title: str, goal: float, **changes: object) -> Setting:
    """CAMELYON16 features: 250k of 2048 numbers a slide, 16 slides, M and I 5,000, selected one slide at a time.

    In float32 they are 32.8 GB. On the device keyhole takes 62,500 at a time, a quarter of a slide: some 350 operations
    for all slides, where 16,000 at a time were thousands (`launches.py`). What is left is memory: uncompiled, the
    projector moves some 5 times these bytes, which takes 35 ms at the 4.8 TB/s of an H200. 20 times the published code,
    which took 681 ms on one, is 34 ms: that needs `--compile on`.

    From host memory the bus is the limit: PCIe 5 x16 has 63 GB/s, of which copies reach 50 to 55, so that 32.8 GB take
    0.6 to 0.65 s. 8 times the published 4.66 s would be 0.58 s, so the aim is 6 times. keyhole does not round features
    that are given in float32, to copy half of them: what is kept would not be the same. Features in float16 are copied
    as they are and become float32 on the device; of these the aim is 8 times.
    """
    base: dict[str, object] = {"encoder": "features", "b": 16, "n": 250_000, "m": 5000, "i": 5000, "size": 2048}
    base |= {
        "inputs": "features",
        "at_once": 1,
        "chunk": 62_500,
        "rule": "global",
        "tasks": (Task("label", "binary", DIGITS[:2]),),
    }
    return Setting(name=name, title=title, goal=goal, **{**base, **changes})  # type: ignore[arg-type]


STEP = "Megapixel MNIST, training step"
DRAWN_STEP: dict[str, object] = {"inputs": "canvases", "step": True, "source": "host"}
LITE0: dict[str, object] = {"encoder": "tf_efficientnet_lite0", "b": 4, "chunk": 64}
CPU = (
    mnist("mnist-noise", "Megapixel MNIST, selection, all patches differ", 5),
    mnist("mnist-noise-reader", "the same through the reader", 5, source="host"),
    mnist("mnist-canvases", "Megapixel MNIST, selection, drawn canvases", 5, inputs="canvases", source="host"),
    mnist("mnist-step-noise", f"{STEP}, all patches differ", 4, step=True, source="host"),
    mnist("mnist-step-noise-bf16", f"{STEP}, learning in bf16", 4, step=True, source="host", precision="bf16"),
    mnist("mnist-step-canvases", f"{STEP}, drawn canvases", 4, **DRAWN_STEP),
    mnist("mnist-step-canvases-bf16", f"{STEP}, drawn canvases, learning in bf16", 4, precision="bf16", **DRAWN_STEP),
    traffic("lite0", "EfficientNet-Lite0, 100 px, selection", 2, **LITE0),
    traffic("lite0-bf16", "EfficientNet-Lite0, 100 px, selection in bf16", 2, precision="bf16", **LITE0),
)
CUDA = (
    traffic("traffic-selection", "Traffic signs, selection, patches on the device", 2.5),
    traffic("traffic-selection-host", "Traffic signs, selection, from host memory", 8, source="host"),
    traffic("traffic-step", "Traffic signs, training step, patches on the device", 2.5, step=True),
    traffic(
        "traffic-step-host", "Traffic signs, training step, from host memory", 8, step=True, source="host", steps=5
    ),
    mnist("mnist", "Megapixel MNIST 1500, selection, all patches differ", 3, b=16, chunk=1440, rule="global"),
    mnist(
        "mnist-canvases",
        "Megapixel MNIST 1500, selection, drawn canvases",
        3,
        b=16,
        chunk=1440,
        rule="global",
        inputs="canvases",
    ),
    mnist(
        "mnist-step",
        "Megapixel MNIST 1500, training step, all patches differ",
        3,
        b=16,
        chunk=1440,
        rule="global",
        step=True,
    ),
    mnist(
        "mnist-10000",
        "Megapixel MNIST 10,000 px, selection",
        10,
        b=16,
        n=40_000,
        chunk=4000,
        rule="global",
        inputs="canvases",
    ),
    mnist(
        "mnist-10000-noise",
        "Megapixel MNIST 10,000 px, selection, all patches differ",
        10,
        b=16,
        n=40_000,
        chunk=4000,
        rule="global",
    ),
    slides("features", "250k x 2048 features of 16 slides, on the device", 20),
    slides("features-host", "250k x 2048 features of 16 slides, from host memory", 6, source="host", chunk=16_000),
    slides(
        "features-host-half",
        "250k x 2048 features of 16 slides, float16 in host memory",
        8,
        source="host",
        chunk=16_000,
        half=True,
    ),
)
QUICK = (
    mnist("mnist-noise", "Megapixel MNIST, selection, all patches differ", 5, b=1, n=225, m=25, i=45, chunk=45),
    mnist("mnist-canvases", "Megapixel MNIST, selection, drawn canvases", 5, b=1, inputs="canvases", source="host"),
    mnist("mnist-step-noise", "Megapixel MNIST, training step", 4, b=1, n=225, m=25, i=45, chunk=45, step=True),
    traffic("lite0", "EfficientNet-Lite0", 2, encoder="tf_efficientnet_lite0", b=1, n=96, chunk=48),
)
