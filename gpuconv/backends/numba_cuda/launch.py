"""What every kernel's launch needs: is a GPU usable, operands as flat vectors, streams.

A kernel sees an operand as the vector of all elements between its lowest and highest address, with the offset of its
first element and its strides, so every view is served in place: transposed, stepped, reversed, broadcast.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuconv import arrays, diagnosis, dtypes
from gpuconv.backends.numba_cuda import convert, ptx

MAX_GRID_X = 2**31 - 1

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY

_REMEDY = 'pip install "gpuconv[cuda13]" (or [cuda12], by the driver)'


def unavailable() -> str | None:
    """Why Numba cannot launch kernels here, with the remedy; None when it can, in the simulator too."""
    try:
        cuda = importlib.import_module("numba.cuda")
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "numba.cuda", "numba_cuda"):
            return f"{diagnosis.broken_import('numba-cuda', error)}; {_REMEDY}"
        return f"Numba's CUDA target, numba-cuda, is not installed; {_REMEDY}"
    except Exception as error:
        return f"{diagnosis.broken_import('numba-cuda', error)}; {_REMEDY}"
    if convert.simulated():
        return None
    try:
        cause = _no_gpu(cuda)
    except Exception as error:  # so Numba says that there is no device, where there is a driver
        cause = str(error)
    if cause is not None:
        # Numba's text begins with the cause; advice follows.
        lines = [line.strip(" .:") for line in cause.splitlines() if line.strip()]
        cause = lines[0] if lines else "no CUDA driver"
        return f"no usable GPU ({cause}); {diagnosis.remedy(cause)}"
    from numba.cuda.cudadrv import nvvm

    if not nvvm.is_available():
        return f"NVVM, the CUDA compiler that Numba uses, is missing; {_REMEDY}"
    return None


def _no_gpu(cuda: Any) -> str | None:
    """What Numba says of a driver or a GPU that is not there; None where both are."""
    from numba.cuda.cudadrv import driver

    if not driver.driver.is_available:
        return str(driver.driver.initialization_error)
    return None if len(cuda.gpus) else "the CUDA driver reports no GPU"


@dataclass
class Flat:
    """An operand as a kernel sees it."""

    vector: Any  # one-dimensional, in device memory
    offset: int
    strides: tuple[int, ...]  # in elements

    def transpose(self, *axes: int) -> Flat:
        """The same elements, axes in another order."""
        return Flat(self.vector, self.offset, tuple(self.strides[axis] for axis in axes))

    def stepped(self, *slices: slice) -> Flat:
        """The last axes from each slice's start in its steps."""
        offset, strides = self.offset, list(self.strides)
        for axis, part in zip(range(-len(slices), 0), slices, strict=True):
            offset += part.start * strides[axis]
            strides[axis] *= part.step
        return Flat(self.vector, offset, tuple(strides))

    def start(self, axis: int, index: int) -> Flat:
        """The operand from ``index`` of an axis on."""
        return Flat(self.vector, self.offset + index * self.strides[axis], self.strides)

    def in_vectors(self, dtype: str, steps: Iterable[int]) -> bool:
        """Whether an operand of ``dtype`` begins at a multiple of 16 bytes, and such steps are multiples of them."""
        itemsize = dtypes.itemsize(dtype)
        places = (address(self.vector), *(itemsize * step for step in (self.offset, *steps)))
        return all(place % ptx.VECTOR_BYTES == 0 for place in places)

    def arguments(self) -> tuple[Any, ...]:
        """The kernel arguments of this operand."""
        return (self.vector, self.offset, *self.strides)

    def wide(self) -> tuple[Any, ...]:
        """The same where the kernel has 32-bit numbers too: beside these Python's own are 32-bit in the simulator."""
        return (self.vector, *map(np.int64, (self.offset, *self.strides)))


def resident(array: Any) -> bool:
    """Whether an array is CuPy's, in a GPU's memory; a Flat is Numba's own."""
    return not isinstance(array, (np.ndarray, Flat))


def in_elements(array: Any) -> bool:
    """Whether a kernel can read or write a GPU's array in place: it begins and goes on in whole elements."""
    begins = arrays.address(array) % array.dtype.alignment == 0
    return begins and all(step % array.itemsize == 0 for step in array.strides)


def _uploaded(host: np.ndarray[Any, Any], on: Any) -> Any:
    """A host array's copy in device memory, asked for on the stream ``on``.

    It holds the array: a GPU that reads the host's memory itself may do so after this returns.
    """
    from numba import cuda

    made = cuda.to_device(host, stream=on)
    made.copied = host
    return made


def flat(array: Any, on: Any = 0) -> Flat:
    """A GPU array in place, or a host array uploaded, on the stream ``on``, in its own memory order."""
    if isinstance(array, Flat):
        return array
    if not resident(array):
        array = arrays.native(array)
        axes = _memory_order(array)
        dense = np.ascontiguousarray(array.transpose(axes))
        with memory_for(dense.nbytes):
            return Flat(_uploaded(_bits(dense.reshape(-1)), on), 0, _strides(dense, axes))
    if not in_elements(array):
        array = array.copy()
    low, high = arrays.byte_bounds(array)
    offset = (arrays.address(array) - low) // array.itemsize
    vector = _in_place(_Span(array, low, (high - low) // array.itemsize))
    return Flat(vector, offset, tuple(step // array.itemsize for step in array.strides))


def _in_place(span: _Span) -> Any:
    """The vector that a kernel is handed for memory of another library."""
    from numba import cuda

    return cuda.as_cuda_array(span, sync=False)


@contextmanager
def output(out: Any, on: Any = 0) -> Iterator[Flat]:
    """Where the kernel writes ``out``: in place on a GPU, else device memory that is downloaded at the end."""
    from numba import cuda

    if isinstance(out, Flat):
        yield out
        return
    if resident(out):
        target = out if in_elements(out) else out.copy()
        yield flat(target)
        if target is not out:
            out[...] = target
        return
    axes = _memory_order(out)
    ordered = out.transpose(axes)
    host = ordered if ordered.flags.c_contiguous else np.empty(ordered.shape, out.dtype)
    bits = _bits(host.reshape(-1))
    with memory_for(bits.nbytes):
        vector = cuda.device_array(bits.shape, bits.dtype)
    yield Flat(vector, 0, _strides(host, axes))
    if on:
        on.synchronize()  # the download below is ordered after the default stream only
    vector.copy_to_host(bits)
    if host is not ordered:
        ordered[...] = host


def _memory_order(array: np.ndarray[Any, Any]) -> list[int]:
    """The axes from the largest step to the smallest."""
    return sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))


def _strides(dense: np.ndarray[Any, Any], axes: list[int]) -> tuple[int, ...]:
    """The steps, in elements and in the original order of the axes, of an array whose axes were put in order."""
    strides = [0] * dense.ndim
    for axis, step in zip(axes, dense.strides, strict=True):
        strides[axis] = step // dense.itemsize
    return tuple(strides)


def _bits(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The vector in the dtype that kernels see."""
    return vector.view(convert.BITS.get(vector.dtype.name, vector.dtype.name))


class _Span:
    """The memory of a GPU array as a vector, through ``__cuda_array_interface__`` version 3."""

    def __init__(self, owner: Any, address: int, size: int) -> None:
        self.owner = owner
        seen = np.dtype(convert.BITS.get(owner.dtype.name, owner.dtype.name))
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "strides": None,
            "typestr": seen.str,
            "data": (address, False),
            "version": 3,
        }


def vector(like: Any, values: Any, dtype: np.dtype[Any], on: Any = 0) -> Any:
    """A small contiguous vector on the device that holds ``like``."""
    if not resident(like):
        return _uploaded(np.ascontiguousarray(values, dtype), on)
    import cupy

    return flat(cupy.ascontiguousarray(cupy.asarray(values), dtype)).vector


def scratch(like: Any, dtype: np.dtype[Any], size: int) -> Any:
    """Uninitialised memory of ``size`` elements on the device that holds ``like``."""
    from numba import cuda

    if not resident(like):
        with memory_for(size * dtype.itemsize):
            return cuda.device_array(size, dtype)
    import cupy

    return flat(cupy.empty(size, dtype)).vector


@contextmanager
def memory_for(size: int) -> Iterator[None]:
    """A MemoryError with the number of bytes, as CuPy raises, where Numba's driver has no memory for them."""
    try:
        yield
    except driver_error() as error:
        if int(getattr(error, "code", 0)) != _OUT_OF_MEMORY:
            raise
        raise MemoryError(f"a GPU has no {size} bytes free ({error})") from None


def driver_error() -> type[Exception]:
    """What Numba raises where the driver refuses."""
    if convert.simulated():
        return OSError  # which nothing raises there
    from numba.cuda.cudadrv.driver import CudaAPIError

    error: type[Exception] = CudaAPIError
    return error


def address(vector: Any) -> int:
    """Where a vector of a kernel begins, in bytes."""
    if convert.simulated():
        return int(vector.ctypes.data)
    return int(vector.__cuda_array_interface__["data"][0])


def jit(body: Any, registers: int | None = None, dynamic: int = 0) -> Kernel:
    """The kernel ``body``, to be compiled at its first launch, each thread with so many registers at most.

    A block of it has ``dynamic`` bytes of shared memory beyond what its code declares.
    """
    from numba import cuda

    made = cuda.jit(body) if registers is None or convert.simulated() else cuda.jit(body, max_registers=registers)
    return Kernel(made, dynamic)


def check_grid(blocks: int) -> None:
    """Refuse what no launch can do, and what would be launched with the rest of a division by 2^32 instead."""
    if not 1 <= blocks <= MAX_GRID_X:
        raise ValueError(f"a launch of {blocks} blocks; a grid has from 1 to {MAX_GRID_X}")


def too_many(blocks: Iterable[int]) -> list[str]:
    """Why one image cannot be computed where every block computes one tile; nothing where it can."""
    most = max(blocks, default=0)
    if most <= MAX_GRID_X:
        return []
    return [f"a grid has up to {MAX_GRID_X} blocks; one image takes {most}; use backend='numba_cuda.direct'"]


# Held by who has a warning of Numba's off, which is off for the whole process.
_UNWARNED = threading.Lock()


class Kernel:
    """A kernel of Numba's, which is launched like one: ``kernel[blocks, threads, stream](*arguments)``.

    It says nothing of grids of fewer than 128 blocks, of which Numba warns: small images have no more. And it asks for
    more shared memory than a launch may have without, 48 KiB.
    """

    def __init__(self, kernel: Any, dynamic: int = 0) -> None:
        self.kernel, self.dynamic = kernel, dynamic
        self.asked: set[Any] = set()  # (function, device)

    def __getitem__(self, shape: tuple[Any, ...]) -> Callable[..., None]:
        check_grid(shape[0])
        whole = shape + (0, self.dynamic)[len(shape) - 2 :]

        def launch(*arguments: Any) -> None:
            if self.dynamic and not convert.simulated():
                self.ask(arguments)
            self.configured(whole)(*arguments)

        return launch

    def configured(self, shape: tuple[Any, ...]) -> Any:
        """Numba's kernel with the blocks, threads, stream and shared memory of its launch."""
        if convert.simulated():
            return self.kernel[shape]
        from numba.cuda import dispatcher

        with _UNWARNED:
            warned = dispatcher.config.CUDA_LOW_OCCUPANCY_WARNINGS
            dispatcher.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
            try:
                return self.kernel[shape]
            finally:
                dispatcher.config.CUDA_LOW_OCCUPANCY_WARNINGS = warned

    def compiled(self, arguments: tuple[Any, ...]) -> Any:
        """What Numba makes of the kernel for arguments like these."""
        return self.kernel.compile(tuple(self.kernel.typeof_pyval(argument) for argument in arguments))

    def ask(self, arguments: tuple[Any, ...]) -> None:
        """Raise the limit of the compiled function, once on each device; Numba's driver has the call but no method."""
        from numba.cuda.cudadrv import driver

        function = self.compiled(arguments)._codelibrary.get_cufunc()
        asked = function.handle, function.device.id
        if asked not in self.asked:
            attribute = driver.binding.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.driver.cuKernelSetAttribute(attribute, self.dynamic, *asked)
            self.asked.add(asked)


def on_gpu(ordinal: int | None) -> AbstractContextManager[Any]:
    """Make the GPU ``ordinal`` current for Numba."""
    from numba import cuda

    if ordinal is None or convert.simulated():
        return nullcontext()
    return cuda.gpus[ordinal]  # type: ignore[no-any-return]


def stream_address(address: int | None, like: Any) -> int:
    """Where the stream of a launch is: the given one, CuPy's current one for CuPy arrays, or the default, 0."""
    if address is None and resident(like):
        import cupy

        address = int(cupy.cuda.get_current_stream().ptr)
    return address or 0


def stream_number(address: int) -> int:
    """What tells a stream from all others that there are or were, one of which may have had its address.

    The driver counts them, also each thread's own default stream, whose address is 2 in every thread; -1 is the default
    stream of all.
    """
    if address in (0, 1):
        return -1
    if convert.simulated():
        return address
    from numba.cuda.cudadrv import driver

    return int(driver.driver.cuStreamGetId(address))


def packed_on(stream: Any, like: Any) -> None:
    """Wait for what was packed for calls with arrays like ``like``: for host arrays, whose results are waited for too.

    What a GPU's are packed for is put in order by who keeps it.
    """
    from numba import cuda

    if not resident(like):
        (stream or cuda.default_stream()).synchronize()


def stream(address: int | None, like: Any) -> Any:
    """The Numba stream for a launch: of ``stream_address``."""
    from numba import cuda

    address = stream_address(address, like)
    return cuda.external_stream(address) if address and not convert.simulated() else 0
