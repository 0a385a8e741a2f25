"""Ends while a stream is open and its lock is held, as by a thread that the end of the interpreter stopped."""

import atexit
import threading


def hold() -> None:
    thread = threading.Thread(target=reader.threads.lock.acquire)
    thread.start()
    thread.join()


atexit.register(hold)  # before keyhole is imported: what is registered first comes last

import numpy as np  # noqa: E402

from keyhole.loading import Reader  # noqa: E402
from keyhole.patches.sources import TensorPatches  # noqa: E402


class Opener:
    name = "tensor"

    def __call__(self) -> TensorPatches:
        return TensorPatches(np.zeros((4, 8, 8, 3), np.uint8))


reader = Reader(threads=1)
stream = reader.stream([[Opener()]], chunk=4)
next(stream)
print("the end")
