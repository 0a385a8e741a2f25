"""Hold the lock of RUN until the process is killed."""

import sys
import time
from pathlib import Path

from keyhole.runs.lock import RunLock

lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
