"""A part of a benchmark, that goes well or wrong: `WHAT [ARGUMENT ...]`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

what, *arguments = sys.argv[1:]
if what == "writes":
    Path(arguments[0]).write_text("#")
    print("sound at last")
elif what == "prints":
    print(*arguments)
elif what == "fails":
    print("before")
    raise SystemExit(3)
elif what == "sleeps":
    time.sleep(60)
elif what == "starts":
    print(subprocess.Popen(arguments, start_new_session=True).pid, flush=True)
    time.sleep(60)
elif what == "hangs":
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)
elif what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "cuts":
    print("cutting", flush=True)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
