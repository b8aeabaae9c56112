"""Page-locked host memory, streams and threads for copies between the host and a GPU, kept from call to call.

By CuPy here; ``numba_cuda.ring`` does the same by Numba, for machines without CuPy.
Page-locking memory takes longer than copying it, so it is never done per call. ``gpuconv.clear()`` releases all of it.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuconv import arrays
from gpuconv.arrays import Array
from gpuconv.cutting import ALIGN, Place

if TYPE_CHECKING:
    from gpuconv.streaming import Slot

_THREADS = 8  # that copy, at most: fewer saturate the memory of most machines
_ALONE = 1 << 20  # bytes that one thread copies sooner than several are told to

_free: dict[tuple[type[Ring], int | None], Ring] = {}  # by library and GPU: one that no call is using
_lock = threading.Lock()


class Ring(ABC):
    """Page-locked memory, and the lanes of one GPU, each a stream; what is a library's own is in its own class."""

    def __init__(self) -> None:
        self.block = np.empty(0, np.uint8)
        self.streams: dict[str, Any] = {}

    def slots(
        self, count: int, x_size: int, y_size: int, shared: bool = False
    ) -> list[tuple[Array, Array, Array, Array]]:
        """Memory for ``count`` pieces: of the host, to upload and to download; of the GPU, the same.

        With ``shared`` all pieces have one memory for what comes down.
        """
        x_step, y_step = (-(-size // ALIGN) * ALIGN for size in (x_size, y_size))
        downs = 1 if shared else count
        needed = count * x_step + downs * y_step
        if self.block.nbytes < needed:
            self.block = np.empty(0, np.uint8)  # the old one first
            self.block = self.page_locked(needed)
        ups = [(self.block[i * x_step :][:x_size], self.scratch(x_size)) for i in range(count)]
        below = self.block[count * x_step :]
        results = [(below[i * y_step :][:y_size], self.scratch(y_size)) for i in range(downs)]
        both = zip(ups, results * (count // downs), strict=True)
        return [(sent, received, x, y) for (sent, x), (received, y) in both]

    def reach(self, mark: Any) -> None:
        """Wait for the event."""
        mark.synchronize()

    def settle(self) -> None:
        """Wait for all lanes, for the others too where one has failed or an interrupt ends its wait."""
        with ExitStack() as stack:
            for stream in self.streams.values():
                stack.callback(stream.synchronize)

    @abstractmethod
    def begin(self, stream: int | None) -> int | None:
        """Make ready for a call that was given the stream at this address; the address of the compute lane's, or None
        for the current one.
        """

    @abstractmethod
    def page_locked(self, size: int) -> np.ndarray[Any, Any]:
        """Bytes of host memory; of ordinary memory where the system grants no more that is page-locked."""

    @abstractmethod
    def scratch(self, size: int) -> Array:
        """Bytes of the GPU's memory, for the compute lane."""

    @abstractmethod
    def view(self, place: Place, memory: Array) -> Any:
        """What lies at ``place`` in memory of the GPU, as implementations take it."""

    @abstractmethod
    def add(self, summand: Any, total: Any, first: bool) -> None:
        """Ask the compute lane to add one view to another, or with the ``first`` one to begin it."""

    @abstractmethod
    def upload(self, slot: Slot, size: int) -> None:
        """Copy from the host, on the upload lane."""

    @abstractmethod
    def download(self, slot: Slot, size: int) -> None:
        """Copy to the host, on the download lane."""

    @abstractmethod
    def record(self, lane: str) -> Any:
        """An event behind all that the lane was asked for."""

    @abstractmethod
    def wait(self, lane: str, mark: Any) -> None:
        """The lane goes on after the event."""


class CupyRing(Ring):
    """By CuPy, whose current stream computes; two streams of its own copy."""

    def __init__(self) -> None:
        import cupy

        super().__init__()
        self._own = {lane: cupy.cuda.Stream(non_blocking=True) for lane in ("upload", "download")}

    def begin(self, stream: int | None) -> int | None:
        """The given stream is the current one."""
        import cupy

        self.streams = self._own | {"compute": cupy.cuda.get_current_stream()}
        return stream

    def page_locked(self, size: int) -> np.ndarray[Any, Any]:
        """Not of CuPy's pool, which would round it up to a power of two."""
        import cupy

        try:
            memory = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(size), 0)
        except cupy.cuda.runtime.CUDARuntimeError:
            # The system grants no more of it: copies from and to other memory are right too, and slower.
            return np.empty(size, np.uint8)
        return np.frombuffer(memory, np.uint8, size)

    def scratch(self, size: int) -> Array:
        """Of CuPy's pool."""
        import cupy

        return cupy.empty(size, np.uint8)

    def view(self, place: Place, memory: Array) -> Array:
        """A CuPy array."""
        return place.view(memory)

    def add(self, summand: Array, total: Array, first: bool) -> None:
        """One pass over both."""
        import cupy

        if first:
            total[...] = summand
        else:
            cupy.add(total, summand, out=total)

    def upload(self, slot: Slot, size: int) -> None:
        """By the runtime: a CuPy array's own copies are from and to whole arrays."""
        self._ask("upload", slot.x, slot.sent, size, "memcpyHostToDevice")

    def download(self, slot: Slot, size: int) -> None:
        """As ``upload``."""
        self._ask("download", slot.received, slot.y, size, "memcpyDeviceToHost")

    def _ask(self, lane: str, to: Array, source: Array, size: int, direction: str) -> None:
        import cupy

        runtime = cupy.cuda.runtime
        places = arrays.address(to), arrays.address(source)
        runtime.memcpyAsync(*places, size, getattr(runtime, direction), self.streams[lane].ptr)

    def record(self, lane: str) -> Any:
        """An event that takes no time."""
        import cupy

        return self.streams[lane].record(cupy.cuda.Event(disable_timing=True))

    def wait(self, lane: str, mark: Any) -> None:
        """On the GPU."""
        self.streams[lane].wait_event(mark)


@contextmanager
def ring(kind: type[Ring], ordinal: int | None) -> Iterator[Ring]:
    """The current GPU's ring, or a new one while another call uses it; kept for the next call if this one succeeds."""
    with _lock:
        found = _free.pop((kind, ordinal), None)
    found = found or kind()
    yield found
    found.streams = {}
    with _lock:
        _free.setdefault((kind, ordinal), found)


def release() -> None:
    """Give back the page-locked memory and the threads that no call is using."""
    with _lock:
        _free.clear()
    _copiers.cache_clear()  # its threads end with their last task


def in_parallel(part: Callable[[int, int], None], extent: int, size: int) -> None:
    """Call ``part(start, stop)`` for shares of ``range(extent)``, on several threads if ``size`` bytes are worth it.

    A share belongs to whichever thread comes first, this one among them: where no other can be started, it does all.
    All shares are over when this returns or raises, because their memory may then be given back or used again.
    """
    shares = 1 if size <= _ALONE else min(_threads(), extent)
    if shares <= 1:
        part(0, extent)
        return
    bounds = [extent * share // shares for share in range(shares + 1)]
    left = deque(pairwise(bounds))
    over: list[BaseException | None] = []  # one for each share
    all_over = threading.Event()

    def work() -> None:
        while True:
            try:
                both = left.popleft()
            except IndexError:
                return
            error = None
            try:
                part(*both)
            except BaseException as found:
                error = found
            over.append(error)
            if len(over) == shares:
                all_over.set()

    try:
        for _ in range(shares - 1):
            _copiers().submit(work)
    except RuntimeError:  # no more threads, or the interpreter is shutting down
        pass
    work()
    interrupt = None
    while not all_over.is_set():
        try:
            all_over.wait()
        except KeyboardInterrupt as found:
            interrupt = found
    for error in (*over, interrupt):
        if error is not None:
            raise error


def _threads() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _THREADS)


@lru_cache(maxsize=1)
def _copiers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "gpuconv-copy")


_inherited: list[dict[tuple[type[Ring], int | None], Ring]] = []


def _after_fork() -> None:
    """In the child: threads do not survive a fork, nor does CUDA, which is asked for nothing, not even to free."""
    global _free, _lock
    _inherited.append(_free)
    _free, _lock = {}, threading.Lock()  # the lock may have been held by another thread
    _copiers.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
