"""Train with a compiled encoder on DATA into RUN; print the graphs that are compiled after each epoch."""

import functools
import sys
from typing import Any

import torch
from torch._dynamo.utils import counters

# traced and guarded as ever, no C++ to wait for
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]

from keyhole.training.loop import Loop, train  # noqa: E402

graphs, end_epoch = [], Loop.end_epoch


def count(self: Loop, row: Any) -> None:
    end_epoch(self, row)
    graphs.append(counters["stats"]["unique_graphs"])


Loop.end_epoch = count  # type: ignore[method-assign]
train(
    sys.argv[1],
    sys.argv[2],
    patch={"size": 32},
    model={"encoder": "small", "width": 4, "heads": 2},
    select={"m": 2, "chunk": 16},
    train={"epochs": 3, "batch": 3, "explore": 0},
    augment={"color": 0.1},
    run={"compile": "on", "threads": 1},
)
print("graphs", *graphs)
