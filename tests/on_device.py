"""What the tests on a GPU share. They are marked `cuda`, and `pytest -m cuda` runs them on a machine that has one.

A session sees either the GPUs, if it runs nothing but tests marked `cuda`, or none of them. So the laws of the CPU (to
the bit, memory of the process, what is encoded once) hold for every other test on every machine, and for the processes
that it starts: see `pytest_collection_finish` in conftest.py.

`CUDA_TESTS_ON=cpu pytest -m cuda` is a dry run: the same tests on the CPU, where waiting for the device is not seen. It
shows tests that no longer fit the code, which would cost minutes on a GPU. Those that a CPU cannot stand in for are
marked `cuda(dry=False)`.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import config as jaxtyping_config

DRY = os.environ.get("CUDA_TESTS_ON") == "cpu"
GPU = torch.device("cpu" if DRY else "cuda")
"""Where the tests marked `cuda` compute."""
ONLY_GPU = "is of what a CPU does not have"
WITHOUT_GPU = "needs a GPU: run pytest -m cuda on a machine that has one"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device inside, except an event, raises RuntimeError.

    What waits by its nature, such as building or compiling a model and trying the decoder, belongs before it.
    """
    if DRY:
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_debug_mode("error")
        yield
    finally:
        _set_sync_debug_mode(before)


@contextmanager
def waits_counted() -> Iterator[list[str]]:
    """Yield a list that is filled, at the end, with a text for each time the host waited for the device inside.

    In a dry run it has one text, since it cannot be seen there.
    """
    if DRY:
        yield ["a dry run"]
        return
    torch.cuda.synchronize()
    found: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            texts = (str(warning.message) for warning in told)
            found += [text for text in texts if "called a synchronizing CUDA operation" in text]


def _set_sync_debug_mode(mode: int | str) -> None:
    """Set it without the warning of its first call, which comes after the mode is set and would be an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def without_checks_of_shapes() -> Iterator[None]:
    """Annotations of shapes are not checked inside: dynamo cannot trace the checks, and would break the graph at each."""
    before = jaxtyping_config.jaxtyping_disable
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping_config.update("jaxtyping_disable", before)


@contextmanager
def leaving_the_device_as_found() -> Iterator[None]:
    """A test on the device: without checks of shapes, and with nothing left for the next test, however it ends."""
    try:
        with without_checks_of_shapes():
            yield
    finally:
        if not DRY:
            _forget()


def _forget() -> None:
    """Undo what is kept for the whole process."""
    _set_sync_debug_mode("default")
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # it compiles a function for a limited number of shapes
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
