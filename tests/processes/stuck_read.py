"""Ends though a read never does; prints the error of the read."""

import threading

from keyhole.errors import StalledRead
from keyhole.loading import Reader

with Reader(threads=2, stall=0.1) as reader:
    try:
        reader.run("a.svs", threading.Event().wait)
    except StalledRead as error:
        print(error)
