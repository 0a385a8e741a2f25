"""The host does not wait for the device inside a step: counted on the CPU through the loop of `keyhole train`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import settings, write_toy
from on_device import GPU, waits_counted
from torch import nn

from keyhole.config.file import configuration
from keyhole.data.item import Item
from keyhole.engine.bags import Bags
from keyhole.training.finite import step_if_finite
from keyhole.training.interrupt import Interrupt
from keyhole.training.job import start_job
from keyhole.training.loop import Loop

KINDS = "kind=multiclass", "red=binary", "marks=multilabel", "size=regression"


@pytest.fixture(scope="module")
def bench(benchmark: Callable[[str], Any]) -> Any:
    """What counts operations."""
    return SimpleNamespace(**{name: benchmark(name) for name in ("operations", "launches")})


@pytest.fixture(scope="module")
def four_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with a task of each kind; every third label of a task is missing."""
    folder = write_toy(tmp_path_factory.mktemp("four") / "images", count=6)
    path = folder / "four.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "split", *(kind.partition("=")[0] for kind in KINDS)])
        for number in range(12):
            name = f"{'red' if number % 2 else 'green'}/{number // 2}.png"
            labels = ["abc"[number % 3], "ny"[number % 2], ("", "p", "p|q", "q")[number % 4] or "p", str(number)]
            shown = ["" if (number + place) % 3 == 2 else label for place, label in enumerate(labels)]
            table.writerow([name, "train", *shown])
    return path


def loop_of(path: Path, out: Path, loop: type[Loop], device: str = "cpu") -> Loop:
    """After one epoch over the four tasks, with classes balanced by the loss."""
    sections: dict[str, Any] = settings(
        train={"epochs": 1, "batch": 6, "balance": "loss", "clip": 1.0, "metric": "loss"},
        run={"device": device, "compile": "off"},
        select={"rule": "streaming"},
    )
    config = configuration({"path": path, "tasks": KINDS}, sections).replace(out=out)
    with Interrupt() as interrupt, closing(start_job(config, lambda _: None)) as job:
        made = loop(job, interrupt)
        made.learn()
        return made


def test_a_step_waits_once_and_reading_never(bench: Any, four_tasks: Path, tmp_path: Path) -> None:
    class Counted(Loop):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            on_device = [*self.job.model.parameters(), *self.job.model.buffers(), *self.weights.values()]
            self.whole = bench.operations.Operations(on_device)
            timer = bench.operations.CountingTimer(self.whole)
            self.engine.timer = self.engine.stager.timer = timer

        def learn(self) -> dict[str, float]:
            with self.whole:
                return super().learn()

    parts = loop_of(four_tasks, tmp_path / "run", Counted).whole.parts  # type: ignore[attr-defined]
    steps = 2
    assert parts["learning"].launched > 100
    # in `learning` for the loss and whether it is finite, outside of all parts for what was selected
    assert {name: count.waits for name, count in parts.items() if count.waits} == {"learning": steps, "other": steps}


def test_a_batch_of_a_published_recipe_takes_few_operations_and_two_waits(bench: Any, tmp_path: Path) -> None:
    parts = bench.launches.training_batch(tmp_path, "megapixel-mnist", columns=2, rows=2, channels=1, tasks=4)
    whole = sum(parts.values(), bench.operations.Count())
    assert whole.waits == 2
    assert parts["learning"].launched <= 230
    assert whole.launched - parts["encoding"].launched <= 290


def momentum_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("figures", [(1.0, 2.0), (torch.nan, 1.0), (1.0, torch.inf)])
def test_a_step_is_taken_only_where_all_figures_are_finite(figures: tuple[float, float]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for given in ((1.0, 1.0), figures):
        layer(torch.ones(2, 5)).sum().backward()
        before = [weight.detach().clone() for weight in layer.parameters()], momentum_of(optimizer)
        found = step_if_finite(optimizer, torch.tensor(given))
        finite = all(torch.tensor(given).isfinite())
        torch.testing.assert_close(torch.tensor(found), torch.tensor(given), equal_nan=True)
        after = list(layer.parameters()), momentum_of(optimizer)
        same = all(a.equal(b) for a, b in zip(before[0], after[0], strict=True))
        assert same != finite
        if not finite:
            assert all(a.equal(b) for a, b in zip(before[1], after[1], strict=True))


def test_a_fused_step_takes_gradients_in_the_layout_of_their_weights() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 1), nn.Conv2d(1, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(5, 3)]
    weights = [weight for layer in layers for weight in layer.parameters()]
    plain = [weight.detach().clone().requires_grad_() for weight in weights]
    for weight, other in zip(weights, plain, strict=True):
        gradient = torch.randn_like(weight)
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        weight.grad, other.grad = torch.empty_like(gradient, memory_format=layout).copy_(gradient), gradient
    assert sum(weight.grad.stride() != weight.stride() for weight in weights if weight.grad is not None) == 3
    step_if_finite(torch.optim.AdamW(weights, fused=True), torch.ones(2))
    torch.optim.AdamW(plain, fused=True).step()
    for weight, other in zip(weights, plain, strict=True):
        assert weight.grad is not None
        assert weight.grad.stride() == weight.stride()
        assert weight.equal(other)


@pytest.mark.cuda
def test_on_a_gpu_a_step_waits_once(four_tasks: Path, tmp_path: Path) -> None:
    waits: list[list[str]] = []

    class Counted(Loop):
        def step(self, items: list[Item], bags: Bags) -> float:
            super().step(items, bags)  # builds what there is to build
            with waits_counted() as found:
                loss = super().step(items, bags)
            waits.append(found)
            return loss

    loop_of(four_tasks, tmp_path / "run", Counted, str(GPU))
    assert [len(each) for each in waits] == [1] * len(waits)
    assert len(waits) == 2
