"""Numba's CUDA simulator without what makes it slow: threads that wait are woken, not polled.

Every CUDA thread stays a thread of Python. Numba's own loop asks all threads of a block, over and over, whether they
wait at ``syncthreads``, and keeps Python's lock from them meanwhile; here the last one to arrive wakes the others. And
it finds out by a traceback, with the lines of its source, which array of shared memory a thread asks for.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np


class Meeting:
    """Where the threads of a block wait for each other."""

    def __init__(self, threads: list[Any]) -> None:
        self.threads, self.running, self.failed = threads, len(threads), None
        self.waiting: list[Any] = []
        self.lock = threading.Lock()

    def wait(self, thread: Any) -> None:
        with self.lock:
            self.waiting.append(thread)
            self._wake_when_all_wait()
        thread.syncthreads_event.wait()
        thread.syncthreads_event.clear()

    def leave(self, thread: Any) -> None:
        """``thread`` has ended: after the last line of its kernel, or by an exception, which ends the others too."""
        with self.lock:
            self.running -= 1
            if thread.exception and self.failed is None:
                self.failed = thread.exception
                for other in self.threads:
                    other.abort = True
                    other.syncthreads_event.set()
            self._wake_when_all_wait()

    def _wake_when_all_wait(self) -> None:
        if len(self.waiting) == self.running:
            for thread in self.waiting:
                thread.syncthreads_event.set()
            self.waiting = []


def _run(block: Any, grid_point: tuple[int, ...], *arguments: Any) -> None:
    """In place of ``BlockManager.run``."""
    from numba.cuda.simulator.kernel import BlockThread

    def body() -> None:
        try:
            block._f(*arguments)
        except Exception as error:
            me = threading.current_thread()
            where = f"tid={list(me.threadIdx)} ctaid={list(me.blockIdx)}"
            me.exception = type(error)(f"{where}: {error}"), sys.exc_info()[2]
        finally:
            block.meeting.leave(threading.current_thread())

    points = np.ndindex(*block._block_dim)
    threads = [BlockThread(body, block, grid_point, point, block._debug) for point in points]
    block.meeting = Meeting(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if block.meeting.failed is not None:
        error, traceback = block.meeting.failed
        raise error.with_traceback(traceback)


def _syncthreads(thread: Any) -> None:
    """In place of ``BlockThread.syncthreads``."""
    if not thread.abort:
        thread._manager.meeting.wait(thread)
    if thread.abort:
        raise RuntimeError("another thread of the block has failed")


_sharing = threading.Lock()


def install() -> None:
    """In this process, which simulates CUDA."""
    from numba.cuda.simulator import kernel, kernelapi

    plain = kernelapi.FakeCUDAShared.array

    def array(shared: Any, shape: Any, dtype: Any, alignment: Any = None) -> Any:
        """One array for each line of source that asks: no thread makes another between finding none and keeping its
        own, as Numba's can.
        """
        if alignment is not None or shape == 0:
            return plain(shared, shape, dtype, alignment)
        caller = sys._getframe(1)
        place = caller.f_code.co_filename, caller.f_lineno
        with _sharing:
            if place not in shared._allocations:
                own = isinstance(dtype, kernelapi.types.Type)
                shared._allocations[place] = np.empty(shape, kernelapi.numpy_support.as_dtype(dtype) if own else dtype)
            return shared._allocations[place]

    kernel.BlockManager.run = _run
    kernel.BlockThread.syncthreads = _syncthreads
    kernelapi.FakeCUDAShared.array = array
