"""What the three calls are to bring home: each quantity with what it should reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Figure(NamedTuple):
    """A measured quantity.

    Attributes:
        value: to compare with the aim.
        shown: for the reader.
    """

    value: float
    shown: str


@dataclass(frozen=True)
class Aim:
    """What a quantity should reach.

    Attributes:
        key: of the figure.
        what: the quantity.
        least, most: bounds of the value; without any the figure is for information.
        unit: behind the bounds.
        better: least value beyond the aim that is hoped for.
        words: the aim, where it is not a bound for the reader.
    """

    key: str
    what: str
    least: float | None = None
    most: float | None = None
    unit: str = ""
    better: float | None = None
    words: str = ""

    @property
    def wanted(self) -> str:
        """The aim in words."""
        if self.words:
            return self.words
        said = [f"at least {self.least:g}{self.unit}"] if self.least is not None else []
        said += [f"at most {self.most:g}{self.unit}"] if self.most is not None else []
        said += [f"better {self.better:g}{self.unit}"] if self.better is not None else []
        return ", ".join(said)

    def verdict(self, figure: Figure | None) -> str:
        if figure is None:
            return "not measured"
        if self.least is None and self.most is None:
            return ""
        low = self.least is not None and not figure.value >= self.least
        high = self.most is not None and not figure.value <= self.most
        if low or high:
            return "**not reached**"
        return "reached, the better aim too" if self.better is not None and figure.value >= self.better else "reached"


def works(key: str, what: str, words: str = "works") -> Aim:
    """Something that works or does not: the value is 1 or 0."""
    return Aim(key, what, least=1, words=words)


WORKS = (
    Aim("floor", "encoder alone: ResNet-18, 256 px, bf16, compiled, patches/s"),
    Aim("stream.device", "patches on the device, share of the encoder alone", least=0.95),
    Aim("stream.host", "patches from host memory, share of the encoder alone", least=0.93),
    Aim("stream.jpeg", "patches from a JPEG TIFF, share of the encoder alone", least=0.55, better=0.7),
    works("train", "`keyhole train` on slides, stopped by a signal after an epoch"),
    works("resume", "`keyhole resume` to the end"),
    works("evaluate", "`keyhole evaluate`"),
    works("predict", "`keyhole predict`"),
    works("embed", "`keyhole embed`, and training on its features"),
    Aim("tests", "failures among the tests marked `cuda`", most=0),
    works(
        "decoder.colors", "the device's decoder gives the host's colours for every kind that is trusted to it", "right"
    ),
    works("decoder.numbers", "the same for RGB whose samples are numbered 0, 1, 2, as Aperio writes it", "right"),
    Aim("decoder.slide", "levels between device and host on a slide's tiles (4:2:0), mean", most=2),
    Aim("decoder.rate", "tiles/s of the device's decoder alone, best"),
    works("folding", "batch norms folded in three networks, with TF32 on and off", "the same"),
    Aim("breaks", "graph breaks of the compiled encoder", most=0),
    works("foreach", "`_foreach_copy_` into tensors of different types", "right"),
    works("recovery.eager", "out of memory is survived with smaller chunks, not compiled"),
    works("recovery.compiled", "the same, compiled"),
    Aim("plan.ratio", "predicted over measured memory of whole steps, worst", least=0.87, most=1.15),
    Aim("plan.peak", "reserved memory of whole steps under --memory 3GB, GB", most=3.0),
)
MEASURES = (
    Aim("steps.traffic-step", "traffic step, patches on the device, times published", least=2.5),
    Aim("steps.traffic-step-host", "traffic step, patches in host memory, times published", least=8),
    Aim("steps.mnist-step", "Megapixel MNIST step, patches on the device, times published", least=3),
    Aim("steps.learning", "Megapixel MNIST, learning from kept patches, times its own encoder", most=1.3),
    Aim("slides.rate", "a step on slides of 250,000 patches from their files, patches/s"),
    Aim("slides.batch", "images of that step", least=16),
    Aim("slides.reserved", "its reserved memory under --memory 3GB, GB", most=3.0),
    Aim("slides.allocated", "its allocated memory, GB"),
    Aim("slides.ratio", "its predicted over its reserved memory", least=0.87, most=1.15),
    Aim("photographs", "short epochs from photographs with 100 px patches, times the published pipeline", least=4),
)
LEARNS = (
    Aim("digits-pace.published", "a step as published, ms", most=58, words="at most 58, as the published code"),
    Aim("digits-pace.advised", "a step as advised, ms"),
    *(
        aim
        for part, how in (("digits-advised", "as advised"), ("digits", "as published"))
        for aim in (
            Aim(f"{part}.epochs", f"{how}: epochs trained, of a schedule of 24"),
            Aim(
                f"{part}.seconds",
                f"{how}: seconds to train an epoch; the published code 18.1, data on the GPU",
                most=18.1,
            ),
            Aim(f"{part}.majority", f"{how}: accuracy of `majority` after the last epoch", least=0.981),
            Aim(f"{part}.max", f"{how}: accuracy of `max`", least=0.905),
            Aim(f"{part}.top", f"{how}: accuracy of `top`", least=0.904),
            Aim(f"{part}.multi", f"{how}: exact match of `multi`", least=0.655),
            Aim(f"{part}.reached", f"{how}: seconds until all four were reached, evaluations included", most=144.7),
        )
    ),
)
AIMS = {"works": WORKS, "measures": MEASURES, "learns": LEARNS}
