"""A stand-in for CuPy on the CPU, so that ``cupy.gemm`` runs from end to end where there is no GPU.

Its arrays are NumPy's. ``RawKernel`` compiles the CUDA C++ with the host's compiler and runs its threads one after the
other, ``ElementwiseKernel`` its loop; ``gemmStridedBatchedEx`` reads and writes memory by the addresses, leading
dimensions and steps it is given, as cuBLAS does, and notes the compute type. The current stream does everything at
once; on another one a copy lands only when somebody waits for it, and until then its destination is NaN. As a pytest
plugin it puts its modules in place.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

# By their values in CUDA's library_types.h; bfloat16 (14) is NumPy's through ml_dtypes.
_TYPES = {2: "float16", 0: "float32", 1: "float64", 4: "complex64", 5: "complex128"}
COMPUTE_TYPES: list[int] = []


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++")


_SHIM = r"""
#define __global__
struct Index { unsigned x; };
static thread_local Index blockIdx, threadIdx, gridDim, blockDim;
"""
_LAUNCHER = r"""
extern "C" void launch(unsigned blocks, unsigned threads, void** a) {
    gridDim.x = blocks; blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
            im2col((const WORD*)a[0], (WORD*)a[1], (const long long*)a[2], (const long long*)a[3], *(const WORD*)a[4],
                   *(const numbers*)a[5], *(const long long*)a[6]);
}
"""


class RawKernel:
    def __init__(self, source: str, name: str) -> None:
        assert name == "im2col"
        word = source.split("const ", 1)[1].split("*", 1)[0]
        self.launch = _compiled(_SHIM + source + _LAUNCHER.replace("WORD", word))

    def __call__(self, grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
        held = [a if isinstance(a, np.ndarray) else np.array(a, np.int64) for a in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(array.ctypes.data for array in held))
        self.launch(ctypes.c_uint(grid[0]), ctypes.c_uint(block[0]), pointers)


# S sums, B bias, Y y: what a sum may be, and what it may be rounded to. 16-bit floats are NumPy's to round.
_LOOP = r"""
#include <complex>
template <class S, class B, class Y> static void loop(const S* s, const B* b, Y* out, long long count) {
    for (long long t = 0; t < count; ++t) { S sums = s[t]; B bias = b[t]; Y y; OPERATION; out[t] = y; (void)bias; }
}
extern "C" void launch(int kind, const void* s, const void* b, void* y, long long count) {
    switch (kind) {
        KINDS
    }
}
"""
_REAL = (("float32", "float32"), ("float64", "float64"), ("float64", "float32"))
_COMPLEX = (("complex64", "complex64"), ("complex128", "complex128"), ("complex128", "complex64"))
_INTEGER = (("float64", "int64"), ("float64", "int32"))
_NAMES = {
    "float32": "float", "float64": "double", "complex64": "std::complex<float>", "complex128": "std::complex<double>",
    "int64": "long long", "int32": "int",
}  # fmt: skip


class ElementwiseKernel:
    def __init__(self, given: str, made: str, operation: str, name: str) -> None:
        assert (given, made) in (("S sums, B bias", "Y y"), ("S sums", "Y y"))
        self.kinds = _INTEGER if "long long v" in operation else _REAL
        self.kinds += _COMPLEX if self.kinds is _REAL and "<" not in operation else ()
        cases = []
        for kind, (sums, y) in enumerate(self.kinds):
            bias = "long long" if self.kinds is _INTEGER else _NAMES[sums]
            arguments = f"(const {_NAMES[sums]}*)s, (const {bias}*)b, ({_NAMES[y]}*)y, count"
            cases.append(f"case {kind}: loop({arguments}); break;")
        self.launch = _compiled(_LOOP.replace("OPERATION", operation).replace("KINDS", "\n".join(cases)))

    def __call__(self, sums: np.ndarray, *others: np.ndarray) -> None:
        *bias, y = others
        wide = y.dtype if y.dtype.itemsize > 2 else np.dtype(np.float32)
        kind = self.kinds.index((sums.dtype.name, wide.name))
        given = np.ascontiguousarray(np.broadcast_to(sums, y.shape))
        biases = given
        if bias:
            assert bias[0].dtype == (np.int64 if self.kinds is _INTEGER else sums.dtype), "of the type of the sums"
            biases = np.ascontiguousarray(np.broadcast_to(bias[0], y.shape))
        made = np.empty(y.shape, wide)
        places = (ctypes.c_void_p(array.ctypes.data) for array in (given, biases, made))
        self.launch(ctypes.c_int(kind), *places, ctypes.c_longlong(made.size))
        with np.errstate(all="ignore"):
            y[...] = made


@functools.cache
def _compiled(source: str) -> Any:
    """The function ``launch`` of ``source``, which the processes of one run of pytest compile once (conftest.py)."""
    folder = Path(tempfile.mkdtemp(prefix="gpuconv-tests-"))
    try:
        kept = Path(os.environ.get("GPUCONV_TEST_OBJECTS", folder)) / f"{sha256(source.encode()).hexdigest()}.so"
        if not kept.exists():
            (folder / "kernel.cpp").write_text(source)
            command = [str(compiler()), "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-o", "made", "kernel.cpp"]
            subprocess.run(command, cwd=folder, check=True)
            os.replace(folder / "made", kept)
        return ctypes.CDLL(str(kept)).launch
    finally:
        shutil.rmtree(folder)


def _dtype(code: int) -> np.dtype[Any]:
    if code == 14:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(_TYPES[code])


def _matrices(address: int, code: int, rows: int, columns: int, ld: int, step: int, batch: int) -> Any:
    """Column-major matrices at ``address``: element (r, c) of matrix b is at b·step + c·ld + r."""
    assert ld >= max(rows, 1), "cuBLAS refuses a leading dimension below the number of rows"
    dtype = _dtype(code)
    reach = (batch - 1) * abs(step) + (columns - 1) * ld + rows
    assert step >= 0
    memory = (ctypes.c_char * (reach * dtype.itemsize)).from_address(address)
    vector = np.frombuffer(memory, dtype)
    strides = tuple(dtype.itemsize * s for s in (step, 1, ld))
    return np.lib.stride_tricks.as_strided(vector, (batch, rows, columns), strides, writeable=True)


def gemm_strided_batched_ex(
    handle, trans_a, trans_b, m, n, k, alpha, a, a_type, lda, a_step, b, b_type, ldb, b_step, beta, c, c_type, ldc,
    c_step, batch, compute, algorithm,
):  # fmt: skip
    COMPUTE_TYPES.append(compute)
    left = _matrices(a, a_type, *((k, m) if trans_a else (m, k)), lda, a_step, batch)
    right = _matrices(b, b_type, *((n, k) if trans_b else (k, n)), ldb, b_step, batch)
    out = _matrices(c, c_type, m, n, ldc, c_step, batch)
    wide = _dtype(c_type)
    scalar = np.dtype({69: "float32", 77: "float32", 71: "float64"}[compute])
    scalar = np.result_type(scalar, np.complex64) if wide.kind == "c" else scalar
    one, more = (np.frombuffer((ctypes.c_char * scalar.itemsize).from_address(p), scalar)[0] for p in (alpha, beta))
    assert one == 1 and more in (0, 1)
    left = left.swapaxes(1, 2) if trans_a else left
    right = right.swapaxes(1, 2) if trans_b else right
    with np.errstate(all="ignore"):
        product = left.astype(wide) @ right.astype(wide)
        out[...] = product + out if more else product  # with a beta of 0 it is not read


class Device:
    def __init__(self, ordinal: int = 0) -> None:
        self.id = ordinal
        self.attributes = {"L2CacheSize": 50 << 20}
        self.compute_capability = "90"

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *details: Any) -> None:
        pass

    def synchronize(self) -> None:
        for stream in list(STREAMS.values()):
            stream.synchronize()


def _zeroed_errors(name: str) -> Any:
    """NumPy's function without its warnings: a GPU's NaN and infinities come silently."""

    def call(*arguments: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"):
            return getattr(np, name)(*arguments, **options)

    return call


class OutOfMemoryError(MemoryError):
    """CuPy's own, which is a MemoryError as well."""


class Pool:
    """The memory is the host's; a limit holds for each array by itself."""

    limit = 0

    def set_limit(self, size: int) -> None:
        self.limit = size

    def total_bytes(self) -> int:
        return 0

    def free_all_blocks(self) -> None:
        pass

    def check(self, size: int) -> None:
        if 0 < self.limit < size:
            raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes (limit set to: {self.limit:,} bytes).")


POOL = Pool()


class Event:
    def __init__(self, disable_timing: bool = False) -> None:
        self.stream: Stream | None = None
        self.count = 0

    @property
    def done(self) -> bool:
        return self.stream is None or self.stream.done >= self.count

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.land(self.count)


STREAMS: dict[int, Stream] = {}


class Stream:
    """Does nothing before it must."""

    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr = 0x1000 + len(STREAMS)
        self.asked: list[Any] = []
        self.done = 0
        STREAMS[self.ptr] = self

    def record(self, event: Event) -> Event:
        event.stream, event.count = self, len(self.asked)
        return event

    def wait_event(self, event: Event) -> None:
        self.asked.append(event.synchronize)

    def land(self, count: int) -> None:
        while self.done < count:
            self.done += 1
            self.asked[self.done - 1]()
            self.asked[self.done - 1] = None

    def synchronize(self) -> None:
        self.land(len(self.asked))


class CurrentStream:
    ptr = 0

    def record(self, event: Event) -> Event:
        return event

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        pass


def memcpy_async(to: int, source: int, size: int, kind: int, stream: int) -> None:
    ctypes.memset(to, 0xFF, size)
    STREAMS[stream].asked.append(lambda: ctypes.memmove(to, source, size))


PINNED: list[int] = []  # sizes of the blocks that were asked for


def pinned_memory(size: int) -> bytearray:
    PINNED.append(size)
    return bytearray(b"\xff") * size


def modules() -> dict[str, ModuleType]:
    cupy = ModuleType("cupy")
    cupy.get_default_memory_pool = cupy.get_default_pinned_memory_pool = lambda: POOL
    cupy.asarray = lambda array, blocking=False: np.asarray(array)
    for name in ("ascontiguousarray", "broadcast_to", "int64", "ndarray", "ones", "zeros"):
        setattr(cupy, name, getattr(np, name))
    for name in ("add", "conjugate", "maximum"):
        setattr(cupy, name, _zeroed_errors(name))

    def empty(shape: Any, dtype: Any) -> Any:
        """Poisoned: what is read before it is written shows."""
        array = np.empty(shape, dtype)
        POOL.check(array.nbytes)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array

    cupy.empty = empty
    cupy.lib = SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=np.lib.stride_tricks.as_strided))
    cupy.empty_like = lambda array: empty(array.shape, array.dtype)
    cupy.RawKernel = RawKernel
    cupy.ElementwiseKernel = ElementwiseKernel
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 1,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        CUDARuntimeError=RuntimeError,
        memcpyAsync=memcpy_async,
        memcpyHostToDevice=1,
        memcpyDeviceToHost=2,
    )
    cupy.cuda = SimpleNamespace(
        Device=Device,
        runtime=runtime,
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        device=SimpleNamespace(get_cublas_handle=lambda: 0),
        ExternalStream=None,
        Event=Event,
        Stream=Stream,
        PinnedMemory=pinned_memory,
        PinnedMemoryPointer=lambda memory, offset: memory,
        get_current_stream=CurrentStream,
    )
    libs = ModuleType("cupy_backends.cuda.libs")
    libs.cublas = SimpleNamespace(gemmStridedBatchedEx=gemm_strided_batched_ex)
    found = {"cupy": cupy, "cupy_backends.cuda.libs": libs}
    return found | {name: ModuleType(name) for name in ("cupy_backends", "cupy_backends.cuda")}


if os.environ.get("GPUCONV_TEST_FAKE_CUPY") == "1":
    sys.modules |= modules()
