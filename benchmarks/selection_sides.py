"""The two sides of `selection.py`: the published code, and keyhole's own code over the same weights and patches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from published import Published, published_from
from selection_inputs import Inputs, activations, published_labels
from selection_settings import Setting
from torch import Tensor

from keyhole.config.settings import Config, SelectConfig, TrainConfig
from keyhole.engine import Engine
from keyhole.engine.bags import Bags
from keyhole.engine.device import Arithmetic
from keyhole.engine.memory.plan import Plan
from keyhole.nn import IPSClassifier, Kept, total_loss
from keyhole.nn.selection import Rule, Selection
from keyhole.nn.tensors import prepare, values_of
from keyhole.patches.sources import TensorPatches
from keyhole.training.finite import step_if_finite
from keyhole.training.setup import new_optimizer


class Theirs:
    """The published selection and step over the inputs of a setting."""

    def __init__(self, setting: Setting, model: IPSClassifier, inputs: Inputs) -> None:
        self.setting, self.patches = setting, inputs.theirs
        self.network: Published = published_from(model, setting.m, setting.i, activations(setting)).train()
        self.labels = published_labels(setting, inputs)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=0.1)

    def select(self) -> Tensor:
        """Indices (b m) of the kept patches."""
        return self.network.select(self.patches, self.setting.at_once)[2]

    def step(self, steps: int = 1) -> float:
        """Whole training steps; the last loss."""
        loss = 0.0
        for _ in range(steps):
            loss = self.network.step(self.patches, self.labels, self.optimizer, self.setting.at_once)
        return loss


@dataclass(frozen=True)
class Opener:
    """One image of patches in host memory."""

    name: str
    patches: Tensor

    def __call__(self) -> TensorPatches:
        return TensorPatches(self.patches.numpy(), self.name)


class Ours:
    """keyhole's selection and step: `IPSClassifier.select` for patches on the device, the reader and both passes of
    `keyhole train` for patches in host memory. A context manager, for the reading threads.

    Args:
        setting: what to do.
        model: whose weights are copied.
        inputs: patches and labels.
        device: where the copy is.
        precision: arithmetic of the encoder.
        compiled: whether `torch.compile` is used.
    """

    def __init__(
        self,
        setting: Setting,
        model: IPSClassifier,
        inputs: Inputs,
        device: torch.device,
        precision: Arithmetic,
        compiled: bool = False,
    ) -> None:
        self.setting, self.inputs, self.device = setting, inputs, device
        self.model = copy.deepcopy(model).train()
        self.engine = Engine(
            self.model, self._settings(setting.rule), plan=Plan(chunk=setting.chunk), arithmetic=precision, warn=print
        )
        if compiled:
            self.engine.encoders.compile()
        self.optimizer = new_optimizer(Config(train=TrainConfig(lr=1e-3)), self.model)
        self.from_host = setting.source == "host"
        self.labels = {name: labels.cpu() for name, labels in inputs.labels.items()}
        self.openers = [Opener(str(image), patches) for image, patches in enumerate(inputs.ours)]

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def select(self, rule: Rule | None = None) -> Tensor:
        """Indices (b m) of the kept patches, best first."""
        if not self.from_host:
            return self._select_tensor(rule or self.setting.rule)
        [(kept, _)] = self.stream(1, rule)
        return torch.stack([image.index for image in kept])

    def logits(self) -> Tensor:
        """Attention logits (b n h t) of all patches."""
        if not self.from_host:
            found = [self._selection("global").logits]
        else:
            [(kept, _)] = self.stream(1, keep_logits=True)
            found = [None if image.logits is None else image.logits[None] for image in kept]
        return torch.cat([logits for logits in found if logits is not None])

    def step(self, steps: int = 1) -> float:
        """Whole training steps; the last loss. From host memory the patches of a step are read while one learns."""
        if not self.from_host:
            loss = 0.0
            for _ in range(steps):
                loss = self.learn(self.bags(self._select_tensor(self.setting.rule)))
            return loss
        return self.stream(steps, learn=True)[-1][1]

    def stream(
        self, batches: int, rule: Rule | None = None, learn: bool = False, keep_logits: bool = False
    ) -> list[tuple[list[Kept], float]]:
        """The batch from host memory, several times over: what its images keep, and the loss."""
        engine = self.engine
        engine.settings = self._settings(rule or self.setting.rule)
        hold = self.inputs.ours.nbytes if learn else 0
        done = []
        for batch in engine.stream([self.openers] * batches, hold=hold):
            found = engine.select(batch, keep_logits=keep_logits)
            kept = [image for image in found if image is not None]
            done.append((kept, self.learn(engine.fetch(batch, found, together=True)) if learn else 0.0))
        return done

    def learn(self, bags: Bags) -> float:
        """The gradient step on the kept patches, as the training loop takes it."""
        tasks, labels = self.setting.tasks, self.labels
        loss = self.engine.backward(bags, lambda logits: total_loss(tasks, logits, labels))
        learned = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in learned if parameter.grad is not None])
        figures = step_if_finite(self.optimizer, torch.stack([loss, norm]))
        assert all(map(math.isfinite, figures))
        return figures[0]

    def bags(self, index: Tensor) -> Bags:
        """The kept patches of every image, from the device's memory."""
        rows = torch.arange(len(index), device=self.inputs.ours.device)[:, None]
        loose = self.inputs.ours[rows, index.to(self.inputs.ours.device)].flatten(0, 1).to(self.device)
        mask = torch.ones(index.shape, dtype=torch.bool)
        position = index if self.model.position is not None else None
        return Bags(position, mask, list(range(len(index))), lambda start, stop: self._values(loose[start:stop]))

    def floor(self) -> Callable[[], None]:
        """The fast encoder alone over all patches on the device, in the same chunks, into nothing."""
        loose = self.inputs.ours.flatten(0, 1)
        chunks = list((loose if not self.from_host else loose.to(self.device)).split(self.setting.chunk))

        def look() -> None:
            for chunk in chunks:
                self.engine.encoders.fast(chunk)

        return look

    def learning(self, compiled: bool) -> dict[str, Callable[[], object]]:
        """The gradient step on kept patches that are at hand, and the learning encoder alone, forward and backward.

        Args:
            compiled: both, as the step itself is.
        """
        setting = self.setting
        bags = self.bags(torch.arange(setting.m, device=self.device).expand(setting.b, setting.m))
        loose = values_of(bags.part(0, len(bags)))
        encoder = copy.deepcopy(self.model.encoder).train()
        forward = torch.compile(encoder, dynamic=False) if compiled else encoder
        precision, enabled = self.model.precision, self.model.precision != torch.float32

        def both_ways() -> None:
            with torch.autocast(self.device.type, precision, enabled=enabled):
                embedding = forward(loose)
            embedding.float().square().sum().backward()
            encoder.zero_grad(set_to_none=True)

        return {"learning": lambda: self.learn(bags), "own encoder": both_ways}

    def _settings(self, rule: Rule) -> SelectConfig:
        return SelectConfig(m=self.setting.m, chunk=self.setting.i if rule == "streaming" else None, rule=rule)

    def _select_tensor(self, rule: Rule) -> Tensor:
        return self._selection(rule).index

    def _selection(self, rule: Rule) -> Selection:
        setting, encoders = self.setting, self.engine.encoders
        chunk = setting.i if rule == "streaming" else setting.chunk
        with encoders.inference():
            return self.model.select(self._as_images(), setting.m, chunk, rule, encode=encoders.embed)

    def _as_images(self) -> Tensor:
        """(b n c h w) as `IPSClassifier.select` takes pixels, without a copy; features as they are."""
        ours = self.inputs.ours
        return ours if ours.ndim == 3 else ours.permute(0, 1, 4, 2, 3)

    @staticmethod
    def _values(patches: Tensor) -> Tensor:
        return prepare(patches) if patches.dtype == torch.uint8 else patches


def overlap(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Share of `expected` (b m) that is in `found` (b m): the mean over the images, and the worst image's."""
    shares = [
        len(set(here) & set(there)) / len(there) for here, there in zip(found.tolist(), expected.tolist(), strict=True)
    ]
    return sum(shares) / len(shares), min(shares)


def logits_error(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference of logits (b n h t), in standard deviations over an image's patches."""
    spread = expected.std(dim=1, keepdim=True)
    relative = (found - expected) / spread
    return float(relative.abs().max()), float(relative.square().mean().sqrt())
