"""Page-locked memory and lanes by Numba alone, for machines without CuPy: what ``pinned.CupyRing`` is with it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import pinned
from gpuconv.backends.numba_cuda import convert, launch
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.cutting import Place

if TYPE_CHECKING:
    from gpuconv.streaming import Slot

# Bytes: an empty operand's vector has that many too, none of which is read.
_LEAST = 16
_THREADS, _MOST_BLOCKS = 256, 1 << 16


class NumbaRing(pinned.Ring):
    """Three streams of its own, because Numba's wait for the default stream, and it for them.

    Operands are ``Flat``, so that implementations take their scratch from Numba too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._own = {lane: cuda.stream() for lane in ("upload", "compute", "download")}

    def begin(self, stream: int | None) -> int | None:
        """The given stream computes, if there is one."""
        self.streams = dict(self._own)
        if convert.simulated():
            return None
        if stream:
            self.streams["compute"] = cuda.external_stream(stream)
        return int(self.streams["compute"])

    def page_locked(self, size: int) -> np.ndarray[Any, Any]:
        """A new array."""
        try:
            locked: np.ndarray[Any, Any] = cuda.pinned_array(size, np.uint8)
        except launch.driver_error():
            # The system grants no more of it: copies from and to other memory are right too, and slower.
            return np.empty(size, np.uint8)
        return locked

    def scratch(self, size: int) -> Any:
        """A new array, at once for every stream."""
        with launch.memory_for(size):
            return cuda.device_array(max(size, _LEAST), np.uint8)

    def view(self, place: Place, memory: Any) -> Flat:
        """A vector with its steps."""
        steps, step = [0] * len(place.shape), 1
        for axis in reversed(place.order):
            steps[axis], step = step, step * place.shape[axis]
        vector = memory[place.start : max(place.stop, place.start + _LEAST)]
        return Flat(vector.view(convert.BITS.get(place.dtype, place.dtype)), 0, tuple(steps))

    def add(self, summand: Flat, total: Flat, first: bool) -> None:
        """One pass over both, which lie alike."""
        size = total.vector.shape[0]
        blocks = min(-(-size // _THREADS), _MOST_BLOCKS)
        adder(first)[blocks, _THREADS, self.streams["compute"]](summand.vector, total.vector, size)

    def upload(self, slot: Slot, size: int) -> None:
        """In the background, because the host's memory is page-locked and a stream is given."""
        slot.x[:size].copy_to_device(slot.sent[:size], stream=self.streams["upload"])

    def download(self, slot: Slot, size: int) -> None:
        """As ``upload``."""
        slot.y[:size].copy_to_host(slot.received[:size], stream=self.streams["download"])

    def record(self, lane: str) -> Any:
        """An event that takes no time."""
        event = cuda.event() if convert.simulated() else cuda.event(timing=False)
        event.record(self.streams[lane])
        return event

    def wait(self, lane: str, mark: Any) -> None:
        """On the GPU."""
        mark.wait(self.streams[lane])


@lru_cache(maxsize=2)
def adder(first: bool) -> Any:
    """The compiled-on-demand kernel that adds, or begins with, a vector; the total may be of a wider type."""
    return launch.jit(build(first))


def build(first: bool) -> Any:
    """The kernel: one thread per element, a stride of the grid apart."""

    def add(summand, total, size):  # type: ignore[no-untyped-def]  # Numba infers the types
        at = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while at < size:
            if first:
                total[at] = summand[at]
            else:
                total[at] += summand[at]
            at += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return add
