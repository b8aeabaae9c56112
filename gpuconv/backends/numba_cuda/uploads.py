"""What kernels read besides the operands, and calls like an earlier one need again, kept in a GPU's memory.

These are mostly index tables, of a few KiB, which depend on shapes alone. They are uploaded on a stream of their own
that is waited for before anybody gets them, so that they are there for every stream; the caller's is not waited for.
Their memory is Numba's, which the driver frees when no kernel runs any more: one that reads what is dropped here may
still do so.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from gpuconv import geometry
from gpuconv.backends.numba_cuda import convert, launch
from gpuconv.problem import Conv2dProblem

# Vectors that are kept, and bytes of them, on all GPUs together; bytes of one.
_COUNT, _BYTES, _LARGEST = 512, 1 << 24, 1 << 22


class Uploads:
    """Vectors in device memory, by device and how they were made; the least recently used are dropped first."""

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, like: Any, on: Any, make: Callable[..., np.ndarray[Any, Any]], *arguments: Hashable) -> Any:
        """``make(*arguments)`` on the current GPU, as a call with arrays like ``like`` needs it.

        What is too large to keep is uploaded for this call, on its stream, ``on``.
        """
        place = _device(), make, arguments
        with self._lock:
            found = self._found.get(place)
            if found is not None:
                self._found.move_to_end(place)
                return found[0]
        values = make(*arguments)
        if not 0 < values.nbytes <= _LARGEST:
            return launch.vector(like, values, values.dtype, on)
        vector = _uploaded(like, values)
        with self._lock:
            if place not in self._found:  # where no other thread was faster
                self._found[place] = vector, values.nbytes
                self._bytes += values.nbytes
            while len(self._found) > _COUNT or self._bytes > _BYTES:
                self._bytes -= self._found.popitem(last=False)[1][1]
        return vector

    def cache_clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._found.clear()
            self._bytes = 0


KEPT = Uploads()


def _device() -> int:
    """The GPU that is current for Numba."""
    from numba import cuda

    return 0 if convert.simulated() else int(cuda.current_context().device.id)


def _uploaded(like: Any, values: np.ndarray[Any, Any]) -> Any:
    """The values in device memory, there for every stream."""
    from numba import cuda

    if convert.simulated() or not launch.resident(like):
        # Calls on NumPy arrays leave nothing behind that this one would wait for.
        stream = cuda.stream()
    else:
        import cupy

        own = cupy.cuda.Stream(non_blocking=True)  # held until the end
        stream = cuda.external_stream(own.ptr)
    vector = cuda.device_array(values.shape, values.dtype)
    vector.copy_to_device(np.ascontiguousarray(values), stream=stream)
    stream.synchronize()
    return vector


def vector(like: Any, values: Any | None, dtype: np.dtype[Any], size: int, on: Any) -> Any:
    """What a call was given, on the device that holds ``like``; of what it was not, ``size`` zeros, which are kept: a
    call has no memory to get and to fill for them, and a graph that it is captured in none that others may get.
    """
    if values is None:
        return KEPT.get(like, on, np.zeros, size, dtype)
    return launch.vector(like, values, dtype, on)


def axis_key(problem: Conv2dProblem, axis: int) -> tuple[Any, ...]:
    """What the index table of the rows (0) or the columns (1) is made of: the arguments of ``geometry.index_table``."""
    return (
        problem.x_shape[2 + axis], problem.k_shape[2 + axis], problem.y_shape[2 + axis], problem.padding[axis][0],
        problem.stride[axis], problem.dilation[axis], problem.padding_mode,
    )  # fmt: skip


def index(key: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    """The indices of the table of ``axis_key``."""
    return geometry.index_table(*key).index.astype(np.int64, copy=False)


def joined_tables(problem: Conv2dProblem, like: Any, on: Any) -> Any:
    """The indices of rows and then those of columns, in one vector."""
    return KEPT.get(like, on, _joined, *(axis_key(problem, axis) for axis in (0, 1)))


def _joined(*keys: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    return np.concatenate([index(key) for key in keys])


def index_tables(problem: Conv2dProblem, like: Any, on: Any) -> list[Any]:
    """The tables of rows and columns as kernels take them: for each a vector of indices, and its two steps."""
    found: list[Any] = []
    for axis in (0, 1):
        found += [KEPT.get(like, on, index, axis_key(problem, axis)), *steps(problem, axis)]
    return found


def steps(problem: Conv2dProblem, axis: int) -> tuple[int, int]:
    """(outer, inner) of an axis' table."""
    extents = (problem.KH, problem.OH) if axis == 0 else (problem.KW, problem.OW)
    return geometry.table_steps(*extents, problem.stride[axis], problem.dilation[axis])
