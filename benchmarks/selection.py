"""Selection and training step beside the published code, and beside the encoder alone, on the same weights and patches.

    python benchmarks/selection.py [--device auto] [--only NAME ...] [--rounds 5] [--compile auto] [--trained 10]
                                   [--quick] [--no-write]

Each setting is run in turns: the published code (`published.py`), keyhole, and keyhole's encoder alone over the same
patches in the same chunks, which nothing can be faster than but by looking at fewer patches. Times are medians. What
keyhole keeps is compared, image by image: in float32 with the published code, in bf16 with its own float32, all under
the published rule; and the attention logits, in standard deviations of an image's logits.

On a GPU the settings of `CUDA` in `selection_settings.py` are run, else those of `CPU`; `--quick` takes small ones.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from alternate import ROUNDS, alternate, as_keyhole, as_plain, medians, peaks, seconds_of
from machine import write_result
from selection_inputs import Inputs, build, load_lite0, make_inputs, settle
from selection_settings import CPU, CUDA, QUICK, Setting
from selection_sides import Ours, Theirs, logits_error, overlap

from keyhole.engine.device import Arithmetic, choose_device, choose_precision
from keyhole.engine.encoders import CompileChoice, Encoders
from keyhole.nn import IPSClassifier
from keyhole.nn.encoder import multiply_adds

EPOCHS = {"noise": 150, "canvases": 150, "scenes": 150, "features": 50}
IMAGES = {"resnet18": 747, "tf_efficientnet_lite0": 747, "features": 270}
MNIST_IMAGES = 5000


@dataclass
class Result:
    """What one setting gave.

    Attributes:
        setting: which.
        seconds: medians of `published`, `keyhole`, and where measured `encoder`, `learning`, `own encoder`.
        spread: smallest and largest ratio of a round.
        first: seconds of keyhole's first call beyond the median.
        choice: whether the encoder is compiled, and why.
        precision: of the encoder.
        work: multiply-adds of the encoder for a patch.
        peak: GFLOP/s of matrix products, measured right after; a machine shared with others is not always as fast.
        agreement: lines on what is kept, by the weights they were measured on.
    """

    setting: Setting
    seconds: dict[str, float]
    spread: tuple[float, float]
    first: float
    choice: CompileChoice
    precision: Arithmetic
    work: int
    peak: dict[torch.dtype, float]
    agreement: list[Agreement] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.seconds["published"] / self.seconds["keyhole"]

    @property
    def bound(self) -> float:
        """The ratio if every multiply-add of keyhole's encoder ran at the rate of a matrix product."""
        setting = self.setting
        seconds = setting.n / self.peak[self.precision.look]
        if setting.step:
            seconds += 3 * setting.m / self.peak[self.precision.learn]  # a gradient costs a forward and twice that
        return self.seconds["published"] / (2e-9 * self.work * setting.b * seconds)


@dataclass(frozen=True)
class Agreement:
    """How far what is kept agrees, for one set of weights.

    Attributes:
        weights: which.
        float32: overlap of keyhole's float32 with the published code: mean, worst image.
        fast: overlap of the fast arithmetic with keyhole's float32: mean, worst image.
        logits: difference of the two in standard deviations: largest, root mean square.
    """

    weights: str
    float32: tuple[float, float]
    fast: tuple[float, float]
    logits: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="settings to run; default all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each side")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="as --run.compile")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto", help="as --train.precision")
    parser.add_argument(
        "--trained", type=int, default=10, help="training steps before the kept sets are compared again"
    )
    parser.add_argument("--lite0-weights", type=Path, metavar="FILE", help="compare what is kept with these, too")
    parser.add_argument("--quick", action="store_true", help="small settings, three turns, some 20 s")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    device = choose_device(options.device)
    if options.quick:
        options.rounds, options.trained = min(options.rounds, 3), 0
        options.compile = "off" if options.compile == "auto" else options.compile
    settings = [each for each in chosen(options.quick, device) if not options.only or each.name in options.only]
    if not settings:
        parser.error(f"--only: choose from {', '.join(each.name for each in chosen(options.quick, device))}")
    results = []
    for result in measured(settings, device, options):
        results.append(result)
        print(line(result), flush=True)
    lines = report(results, device, options)
    print("\n".join(["", *lines]))
    if not options.no_write:
        print(write_result("selection", "Selection and step beside the published code", lines, str(device)))


def chosen(quick: bool, device: torch.device) -> tuple[Setting, ...]:
    return QUICK if quick else CUDA if device.type == "cuda" else CPU


def measured(settings: list[Setting], device: torch.device, options: argparse.Namespace) -> Iterator[Result]:
    """Each setting in a process of its own, since memory that an earlier one has left makes a later one faster."""
    if options.quick:
        yield from (measure(setting, device, options) for setting in settings)
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for setting in settings:
            yield pool.submit(measure, setting, device, options).result()


def measure(setting: Setting, device: torch.device, options: argparse.Namespace) -> Result:
    """Times one setting and compares what is kept."""
    inputs, model = settled(setting, device)
    result = timed(setting, model, inputs, device, options)
    precision, compiled = result.precision, result.choice.compile
    result.agreement.append(compare("fresh", setting, model, inputs, device, precision, compiled))
    if options.lite0_weights and setting.encoder == "tf_efficientnet_lite0":
        load_lite0(model, options.lite0_weights)
        result.agreement.append(compare("pretrained", setting, model, inputs, device, precision, compiled))
    if options.trained and setting.inputs != "features":
        trained = train(setting, model, inputs, device, options.trained)
        about = f"{result.agreement[-1].weights}, after {options.trained} steps"
        result.agreement.append(compare(about, setting, trained, inputs, device, precision, compiled))
    return result


def settled(setting: Setting, device: torch.device) -> tuple[Inputs, IPSClassifier]:
    """The patches of a setting, and a model with fresh weights whose batch norm has seen some of them."""
    inputs, model = make_inputs(setting, device), build(setting, device)
    some = torch.linspace(0, setting.n - 1, 512 // setting.b).long()
    settle(model, inputs.theirs[:, some.to(inputs.theirs.device)].flatten(0, 1).to(device))
    return inputs, model


def timed(
    setting: Setting,
    model: IPSClassifier,
    inputs: Inputs,
    device: torch.device,
    options: argparse.Namespace,
    parts: bool = True,
) -> Result:
    """Both sides in turns; nothing is compared yet.

    Args:
        setting, model, inputs, device: what is timed; the model stays as it is.
        options: `rounds`, `precision`, `compile` and `quick` of the command line.
        parts: time the encoder alone as well, or of a step the learning and its encoder.
    """
    precision = choose_precision(setting.precision or options.precision, model.encoder, patch_shape(setting))
    theirs = Theirs(setting, model, inputs)
    choice = choose(setting, model, precision, options.compile)
    with Ours(setting, model, inputs, device, precision, choice.compile) as ours:
        first = seconds_of(ours.step if setting.step else ours.select, device)
        pieces: dict[str, Callable[[], object]] = {"published": theirs.select, "keyhole": ours.select}
        if setting.step:
            pieces = {
                name: partial(side.step, setting.steps) for name, side in (("published", theirs), ("keyhole", ours))
            }
        if parts:
            pieces |= ours.learning(choice.compile) if setting.step else {"encoder": ours.floor()}
        pieces = {name: (as_plain if name == "published" else as_keyhole)(piece) for name, piece in pieces.items()}
        for piece in pieces.values():
            piece()
        taken = alternate(pieces, device, options.rounds)
        peak = peaks(device, 512 if options.quick else None)
    del theirs, ours, pieces
    gc.collect()
    seconds = medians(taken)
    for name in ("published", "keyhole"):
        seconds[name] /= setting.steps
    ratios = [here / there for here, there in zip(taken["published"], taken["keyhole"], strict=True)]
    work = multiply_adds(model.encoder, patch_shape(setting))
    return Result(
        setting, seconds, (min(ratios), max(ratios)), first - seconds["keyhole"], choice, precision, work, peak
    )


def patch_shape(setting: Setting) -> tuple[int, ...]:
    return (setting.size,) if setting.inputs == "features" else (setting.size, setting.size, setting.channels)


def choose(setting: Setting, model: IPSClassifier, precision: Arithmetic, asked: str) -> CompileChoice:
    """Whether `keyhole train` would compile in a run of the published length."""
    images = MNIST_IMAGES if setting.position else IMAGES[setting.encoder]
    expected = EPOCHS[setting.inputs] * images * setting.n
    encoders = Encoders(copy.deepcopy(model), precision)
    return encoders.choose_compile(asked, patch_shape(setting), setting.chunk, expected)  # type: ignore[arg-type]


def compare(
    weights: str,
    setting: Setting,
    model: IPSClassifier,
    inputs: Inputs,
    device: torch.device,
    precision: Arithmetic,
    compiled: bool,
) -> Agreement:
    """What both sides keep under the published rule, and how far fast arithmetic is from float32."""
    expected = Theirs(setting, model, inputs).select()
    with Ours(setting, model, inputs, device, Arithmetic(torch.float32, torch.float32)) as exact:
        kept, logits = exact.select("streaming"), exact.logits()
    with Ours(setting, model, inputs, device, precision, compiled) as fast:
        fast_kept, fast_logits = fast.select("streaming"), fast.logits()
    return Agreement(weights, overlap(kept, expected), overlap(fast_kept, kept), logits_error(fast_logits, logits))


def train(setting: Setting, model: IPSClassifier, inputs: Inputs, device: torch.device, steps: int) -> IPSClassifier:
    """The model after some steps on its own batch: attention that has begun to tell patches apart."""
    with Ours(setting, model, inputs, device, Arithmetic(torch.float32, torch.float32)) as ours:
        ours.step(steps)
    return ours.model


def line(result: Result) -> str:
    """One line for the terminal."""
    setting, seconds = result.setting, result.seconds
    floor = f", {seconds['encoder'] / seconds['keyhole']:.2f} of its encoder alone" if "encoder" in seconds else ""
    agreement = result.agreement[0]
    return (
        f"{setting.name}: {seconds['published']:.3f} s published, {seconds['keyhole']:.3f} s keyhole, "
        f"{result.ratio:.2f} times as fast{floor}; kept {agreement.float32[0]:.3f} in float32, "
        f"{agreement.fast[0]:.3f} in {result.precision}"
    )


def report(results: list[Result], device: torch.device, options: argparse.Namespace) -> list[str]:
    """Markdown."""
    exact, fast = ([result.peak[kind] for result in results] for kind in (torch.float32, torch.bfloat16))
    lines = [
        f"Medians of {options.rounds} turns{'' if options.quick else ', each setting in a process of its own'}. "
        "Published: `published.py`, float32, eager, channels first, its shuffle left out, under glibc's malloc as it "
        "is. keyhole: its own code, folded batch norm, channels last, freed memory kept. Times in seconds.",
        "",
        f"This machine multiplied matrices at {min(exact):,.0f} to {max(exact):,.0f} GFLOP/s in float32 and at "
        f"{min(fast):,.0f} to {max(fast):,.0f} in bf16, measured after each setting: others use it too.",
        "",
        "`encoder alone` is keyhole's encoder over the same patches in the same chunks; `reached` is that over "
        "keyhole's time, above 1 where patches of one colour are encoded once; `ceiling` is the ratio if there were "
        "nothing but this encoder, `bound` the ratio if all patches were encoded at the rate of matrix products, as "
        "measured right after.",
        "",
        "| setting | published | keyhole | ratio (range) | aim | encoder alone | reached | ceiling | bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        seconds, (low, high) = result.seconds, result.spread
        floor = seconds.get("encoder")
        ends = ["-", "-", "-"]
        if floor is not None:
            ends = [f"{floor:.4g}", f"{floor / seconds['keyhole']:.2f}", f"{seconds['published'] / floor:.2f}"]
        lines.append(
            f"| {result.setting.title} | {seconds['published']:.4g} | {seconds['keyhole']:.4g} | {result.ratio:.2f} "
            f"({low:.2f} ... {high:.2f}) | {result.setting.goal:g} | {' | '.join(ends)} | {result.bound:.2f} |"
        )
    lines += [
        "",
        "Learning alone (the gradient step on the kept patches), beside its own encoder forward and backward:",
        "",
    ]
    lines += ["| setting | learning | encoder | ratio |", "|---|---|---|---|"]
    for result in results:
        if result.setting.step:
            learn, own = result.seconds["learning"], result.seconds["own encoder"]
            lines.append(f"| {result.setting.title} | {learn:.4g} | {own:.4g} | {learn / own:.2f} |")
    lines += [
        "",
        "What is kept, under the published rule (mean over the images, worst image), and the logits' error:",
        "",
    ]
    lines += [
        "| setting | weights | float32 with published | fast with float32 | largest logit error | root mean square |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for each in result.agreement:
            lines.append(
                f"| {result.setting.title} | {each.weights} | {each.float32[0]:.3f}, {each.float32[1]:.3f} | "
                f"{each.fast[0]:.3f}, {each.fast[1]:.3f} | {each.logits[0]:.3f} | {each.logits[1]:.4f} |"
            )
    lines += ["", "Choices, and what the first call cost beyond a later one (building, compiling):", ""]
    for result in results:
        compiled = "compiled" if result.choice.compile else "not compiled"
        lines.append(
            f"- {result.setting.title}: {result.precision}, {compiled} ({result.choice.why}); first call "
            f"{result.first:.2f} s more; {shape(result.setting)}."
        )
    return lines


def shape(setting: Setting) -> str:
    """B, N, M, I and how keyhole goes over the patches."""
    rule = f"{setting.chunk} patches at a time, timed under the rule `{setting.rule}`"
    return f"B {setting.b}, N {setting.n:,}, M {setting.m:,}, I {setting.i:,}; {rule}"


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is loaded; see keyhole/cli/main.py
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    main()
