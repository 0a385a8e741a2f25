"""Embeds within a budget, in a process of its own: `OUT DATA WEIGHTS ROOM`.

A memory limit is one of the process, and in a process that has run many other tests, little of what its heap holds free
is of use to a new thread. Prints JSON: exit code, what was said, the budget, the peak, patches of each call of the encoder.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

import torch
from torch import Tensor

from keyhole.cli.main import main
from keyhole.engine.memory.meter import taken
from keyhole.nn import SmallEncoder
from keyhole.util.platform import peak_memory, restart_peak


def embed(out: str, data: str, weights: str, room: int) -> dict[str, object]:
    calls, right = [], SmallEncoder.embed

    def embed_(self: SmallEncoder, patches: Tensor) -> Tensor:
        calls.append(len(patches))
        return right(self, patches)

    SmallEncoder.embed = embed_  # type: ignore[method-assign]
    line = ["embed", data, "--out", out, "--encoder", "small", "--width", "8", "--weights", weights]
    line += ["--patch.size", "256", "--threads", "1", "--memory"]
    with torch.inference_mode():  # what torch loads with its first convolution is not part of the budget
        SmallEncoder(3, 8).eval()(torch.zeros(1, 3, 256, 256))
    calls.clear()
    budget = (taken(torch.device("cpu")) + room) // 10**6
    restart_peak()
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        code = main([*line, f"{budget}MB"])
    return {
        "code": code,
        "said": said.getvalue(),
        "budget": budget * 10**6,
        "peak": peak_memory(since_restart=True),
        "calls": calls,
    }


if __name__ == "__main__":
    json.dump(embed(*sys.argv[1:4], int(sys.argv[4])), sys.stdout)
