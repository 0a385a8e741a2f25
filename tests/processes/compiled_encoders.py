"""Compiled encoders, in a process of their own: the checks of shapes that tests run under and the compiler do not go together.

`python compiled_encoders.py FOLDER WHAT ...` prints one line of JSON. What is compiled is traced and guarded as ever; the
backend `aot_eager` writes no C++.
"""

import functools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch._dynamo.utils import counters

written_over: list[str] = []
"""Operations of what has been compiled that write over a tensor which was given to them as `out`."""


def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """As `eager`: what is traced runs as it is."""
    written_over.extend(str(node) for node in graph.graph.nodes if "out" in node.kwargs)
    return graph.forward


torch.compile = functools.partial(torch.compile, backend=backend)  # type: ignore[assignment]

from keyhole.engine.compiled import Compiled  # noqa: E402
from keyhole.engine.fast import FastEncoder  # noqa: E402
from keyhole.engine.memory.plan import Plan  # noqa: E402
from keyhole.nn import SmallEncoder  # noqa: E402
from keyhole.nn.classifier import encoded  # noqa: E402
from keyhole.runs.seal import read_state  # noqa: E402
from keyhole.training.loop import Loop, train  # noqa: E402

ROOM = 10
seen: list[int] | None = None
"""Rows of each call of the encoder once the run has begun, of those beyond the room too."""


@torch.library.custom_op("keyhole_tests::within_room", mutates_args=())
def within_room(patches: Tensor) -> Tensor:
    """A step of the encoder that runs out of memory with more than ROOM patches, when it runs, not when it is traced."""
    if seen is not None:
        seen.append(len(patches))
        if len(patches) > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory (a stand-in)")
    return patches.clone()


within_room.register_fake(torch.empty_like)
within_room.register_autograd(lambda _, gradient: gradient)


def out_of_memory(folder: Path) -> dict[str, Any]:
    """Trains with an encoder that has room for ten patches, under a plan for 64."""
    global seen
    embed, run, learn = SmallEncoder.embed, Loop.run, Loop.step
    learned: list[int] = []

    def counted_run(self: Loop) -> Any:
        global seen
        seen = []
        return run(self)

    def counted_step(self: Loop, *args: Any) -> float:
        global seen
        assert seen is not None
        before, seen = seen, []
        loss = learn(self, *args)
        learned.extend(seen)
        seen = before
        return loss

    SmallEncoder.embed = lambda self, patches: embed(self, within_room(patches))  # type: ignore[method-assign]
    Loop.run, Loop.step = counted_run, counted_step  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    for label in ("bright", "dark"):
        (folder / "data" / label).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 100, (80, 80, 3)) + (100 if label == "bright" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "data" / label / f"{number}.png")
    run = train(
        {"path": folder / "data", "val": 0.0, "test": 0.0},
        folder / "run",
        patch={"size": 16},
        model={"encoder": "small", "width": 4, "heads": 2},
        select={"m": 16, "chunk": 64},
        train={"epochs": 1, "batch": 4, "explore": 0},
        run={"compile": "on", "threads": 1},
    )
    plan = Plan.from_json(read_state(run).plan)
    return {"looked": seen, "learned": learned, "chunk": plan.chunk, "split": plan.split}


def plain(encoder: SmallEncoder, patches: Tensor, color: Tensor | None) -> Tensor:
    return encoded(encoder, patches, color, torch.float32)


def instances(_: Path) -> dict[str, Any]:
    """Eleven encoders in one process, the last two like earlier ones but with other weights.

    How many graphs each gives, looking with colours and without, learning from pixels and from numbers; where graphs
    broke; warnings; and the largest difference from what is not compiled.
    """
    graphs, apart = [], 0.0
    pixels, numbers = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8), torch.rand(6, 3, 16, 16)
    color = torch.eye(3, 4).repeat(6, 1, 1) * torch.rand(6, 1, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for width in (*range(4, 13), 4, 5):
            encoder = SmallEncoder(3, width, stages=1).eval()
            before = counters["stats"]["unique_graphs"]
            fast = FastEncoder(encoder, compile=True)
            learning = Compiled(functools.partial(plain, encoder), ("learn", repr(encoder)), most=2)
            looked = [fast(pixels[:k], each, rows=6) for k in (6, 4) for each in (None, color[:k])]
            learned = [learning(pixels, color), learning(numbers)]
            graphs.append(counters["stats"]["unique_graphs"] - before)
            fast.compiled = False
            looked_plainly = [fast(pixels[:k], each) for k in (6, 4) for each in (None, color[:k])]
            learned_plainly = [plain(encoder, pixels, color), encoder(numbers)]
            for found, expected in zip(looked + learned, looked_plainly + learned_plainly, strict=True):
                apart = max(apart, (found - expected).abs().max().item())
    return {
        "graphs": graphs,
        "apart": apart,
        "breaks": list(counters["graph_break"]),
        "written_over": written_over,
        "warnings": [str(each.message) for each in caught],
        "past the limit": past_the_limit(),
    }


def past_the_limit() -> list[str]:
    """What is warned of where the compiler reaches its limit."""
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings(record=True) as caught:  # type: ignore[attr-defined]
        warnings.simplefilter("always")
        fast = FastEncoder(SmallEncoder(3, 4, stages=1), compile=True)
        for side in (16, 24, 32):
            fast(torch.zeros(6, side, side, 3, dtype=torch.uint8), rows=6)
    return [str(each.message) for each in caught]


if __name__ == "__main__":
    what = {"instances": instances, "out_of_memory": out_of_memory}
    print(json.dumps({name: what[name](Path(sys.argv[1])) for name in sys.argv[2:]}))
