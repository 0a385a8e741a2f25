"""Read files of stored features in whole and in part; print the peak of memory."""

import sys
from pathlib import Path

import numpy as np
import torch  # noqa: F401 - not part of what is compared
from usage import memory

from keyhole.patches.features import FeatureOpener

sources = [FeatureOpener(Path(path), path)() for path in sys.argv[1:]]
n = len(sources[0])
for source in sources:  # as a batch: all are open until the last is read
    for start in range(0, n, 32):
        source.read(np.arange(start, min(start + 32, n)))
    for start in range(0, n, 997):
        source.read([start])
print(memory("VmHWM"))
