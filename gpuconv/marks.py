"""What one stream was asked for once and calls on every stream rely on: the weights that a ``Conv2d`` keeps on a GPU.

A mark is an event behind what made them. A later call looks whether it is reached, and once it is, nobody looks again.
Until then the call's stream waits for it, on the GPU; the host waits for nothing. Which streams have waited is not
remembered: a stream that is gone leaves its address to another.

A graph that is being captured cannot depend on an event outside of it. There the host waits, once, and whenever the
graph is launched, what it reads is there.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_DEFAULT = (0, 1)  # the addresses of the default stream, of which no graph can be captured
_PER_THREAD = 2  # that of each thread's own default stream


class Mark:
    """An event behind all that CuPy's current stream of GPU ``ordinal`` has been asked for so far."""

    def __init__(self, ordinal: int) -> None:
        import cupy

        self.ordinal, self.process = ordinal, os.getpid()
        self.shared = False  # whether a call on another stream has relied on it
        with cupy.cuda.Device(ordinal):
            stream = cupy.cuda.get_current_stream()
            self._stream = _place(stream)
            self._event = stream.record(cupy.cuda.Event(disable_timing=True))

    def wait(self) -> None:
        """Let what CuPy's current stream is asked for from here on begin after it."""
        import cupy

        event, current = self._event, cupy.cuda.get_current_stream()
        self.shared = self.shared or _place(current) != self._stream
        if event is None:
            return
        with relaxed():
            reached = bool(event.done)
            if not reached and captures(int(current.ptr)):
                event.synchronize()
                reached = True
        if reached:
            self._event = None
        else:
            current.wait_event(event)

    def reach(self) -> None:
        """Wait for it, on the host."""
        event = self._event
        if event is not None:
            with relaxed():
                event.synchronize()
            self._event = None


def _place(stream: Any) -> tuple[int, int | None]:
    """What tells one stream from another that is there, too: each thread's own default stream is 2 in every thread."""
    address = int(stream.ptr)
    return address, threading.get_ident() if address == _PER_THREAD else None


def captures(address: int | None = None) -> bool:
    """Whether a graph is made of what a stream, CuPy's current one if none is given, is asked for."""
    import cupy

    address = int(cupy.cuda.get_current_stream().ptr) if address is None else address
    return address not in _DEFAULT and bool(cupy.cuda.runtime.streamIsCapturing(address))


def settle(ordinals: Iterable[int]) -> None:
    """Wait, on the host, for all that GPUs are asked for, because memory that any stream may be reading is given back.

    CuPy's pool gives it at once to the next array of the stream on which it was allocated.
    """
    import cupy

    for ordinal in ordinals:
        device = cupy.cuda.Device(ordinal)
        with relaxed(), device:
            device.synchronize()


@contextmanager
def relaxed() -> Iterator[None]:
    """Let this thread ask about what is no part of any graph, also while it or another thread captures one: that it
    could be a part is what CUDA assumes, and it gives up the capture.
    """
    exchange = _exchange()
    if exchange is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    exchange(ctypes.byref(mode))  # what it was is in ``mode`` now
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@lru_cache(maxsize=1)
def _exchange() -> Any | None:
    """The driver's function for that, which CuPy does not have; None where the driver has another name."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return driver.cuThreadExchangeStreamCaptureMode
    except (AttributeError, OSError):
        return None
