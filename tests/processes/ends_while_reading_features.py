"""Ends while threads read a file of stored features."""

import sys
import time
from pathlib import Path

from keyhole.patches.features.source import open_features
from keyhole.util.threads import ReadingThreads

path = Path(sys.argv[1])


def read() -> None:
    end = time.monotonic() + 1
    while time.monotonic() < end:
        open_features(path).close()


kept = [open_features(path) for _ in range(20)]
pool = ReadingThreads(2, 60)
tasks = [pool.submit("a", read) for _ in range(2)]
time.sleep(0.2)
