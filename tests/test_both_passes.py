"""Law 6: both passes see the same pixels. Changes of the images are drawn once per image and epoch, in a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import settings, write_toy
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import keyhole
from keyhole.nn import SmallEncoder


class Watch:
    """Notes the normalized patches that encoders are given: all without gradients, and those that a step learns from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looked: list[Tensor] = []
        self.learned: list[Tensor] = []
        self.pending: list[Tensor] = []
        embed = SmallEncoder.embed

        def embed_and_note(encoder: SmallEncoder, patches: Tensor) -> Tensor:
            seen = patches.detach().float().clone()
            if torch.is_grad_enabled():
                self.pending.append(seen)
            else:
                self.looked.append(seen)
                self.pending.clear()  # what was learned from before the last selection was to measure what it costs
            return embed(encoder, patches)

        monkeypatch.setattr(SmallEncoder, "embed", embed_and_note)

    def step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, torch.optim.AdamW):  # the loss of guessing is found by another one
            self.learned += self.pending


@pytest.mark.parametrize(
    ("options", "chunk"),
    [
        ({"patch": {"stride": 12}}, 16),
        ({"patch": {"edge": "background"}, "data": {"cache": 0.0}}, 5),
        ({"select": {"rule": "streaming"}}, 6),
        ({"model": {"position": "2d"}, "memory": "20GB"}, 64),
    ],
    ids=["overlapping", "read twice", "streaming", "placed"],
)
def test_what_is_learned_from_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], chunk: int
) -> None:
    data = write_toy(tmp_path / "data", count=4, side=56)
    changed = settings(**{name: value for name, value in options.items() if isinstance(value, dict)})
    changed = changed | {name: value for name, value in options.items() if not isinstance(value, dict)}
    changed["select"] = changed["select"] | {"chunk": chunk}
    watch = Watch(monkeypatch)
    stepping = register_optimizer_step_pre_hook(watch.step)
    try:
        keyhole.train(
            {"path": str(data), "val": 0.25, "test": 0.0, **changed.pop("data", {})},
            tmp_path / "run",
            augment={"color": 0.5},
            **changed,
        )
    finally:
        stepping.remove()
    looked, learned = (torch.cat(seen).flatten(1) for seen in (watch.looked, watch.learned))
    distance = torch.cdist(learned, looked, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
    assert len(learned) == 2 * 6 * 4, "two epochs, six images, four patches of each"
    assert distance.max() < 1e-3
    assert len(np.unique(learned.numpy().round(2), axis=0)) == len(learned), "drawn again in each epoch"
