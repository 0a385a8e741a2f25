"""Embed DATA into OUT with WEIGHTS; print the peak of memory."""

import sys

from usage import memory

from keyhole.config.settings import PatchConfig
from keyhole.inference.embed import embed

data, out, weights = sys.argv[1:]
embed(data, out, encoder="small", width=8, weights=weights, patch=PatchConfig(size=16), threads=2, quiet=True)
print(memory("VmHWM"))
