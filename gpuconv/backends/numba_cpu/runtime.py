"""Kernels as functions of three integers, and the threads that run them.

A kernel is compiled once as ``kernel(arguments, thread, threads)``: ``arguments`` is the address of a table of 64-bit
integers (addresses, sizes), and thread ``thread`` of ``threads`` does its share. All kernels are started by one small
parallel function, so that each of them compiles as plain serial code.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange
from numba.core import cgutils, types
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from gpuconv import arrays
from gpuconv.backends.numba_cpu.kernel_cache import KernelCache, alone
from gpuconv.backends.numba_cpu.vectors import I64

_SIGNATURE = (types.intp, types.intp, types.intp), types.void
_lock = threading.RLock()

# The state of the threads in this process. Where a forked child's parent had started them, they are not in the child.
_threads = {"started": False, "lost": False}


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    _threads.update(started=False, lost=_threads["started"] or _threads["lost"])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.lru_cache(maxsize=64)
def vector_bits() -> int:
    """Bits of the machine's vector registers: 512, 256 or 128, or what ``GPUCONV_VECTOR_BITS`` says; 0 where there is
    no fused multiply-add.
    """
    forced = os.environ.get("GPUCONV_VECTOR_BITS")
    if forced:
        if forced not in ("128", "256", "512"):
            raise ValueError(f"GPUCONV_VECTOR_BITS must be 128, 256 or 512; got {forced!r}")
        return int(forced)
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 512
    if features.get("avx2") and features.get("fma"):
        return 256
    return 128 if llvm.get_process_triple().startswith(("aarch64", "arm64")) else 0


# Bytes of a core's second-level cache where the system does not tell.
_L2 = 1 << 20


@functools.lru_cache(maxsize=64)
def l2_bytes(told: str = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """Bytes of a core's second-level cache, on Linux as ``told`` in a folder. Blocks are measured by it; no sum is."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.platform == "darwin":
            size, room = ctypes.c_int64(), ctypes.c_size_t(8)
            ctypes.CDLL(None).sysctlbyname(b"hw.l2cachesize", ctypes.byref(size), ctypes.byref(room), None, 0)
            return size.value or _L2
        for cache in Path(told).glob("index*"):
            level, kind, given = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
            if level == "2" and kind != "Instruction":
                return int(given.removesuffix("K")) * 1024 or _L2
    return _L2


def unavailable() -> str | None:
    """Why this machine cannot run compiled kernels, with the remedy; None when it can."""
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT forbids Numba to compile; unset it"
    return None if vector_bits() else "this processor has no fused multiply-add, which the kernels are made of"


@functools.lru_cache(maxsize=64)
def _numba_threads() -> Callable[[], int]:
    """``numba.get_num_threads``, without the two locks that it takes: some 15 µs where they have left the caches."""
    numba.get_num_threads()  # starts the threading layer, whose function it asks
    address = llvm.address_of_symbol("get_num_threads")
    return ctypes.PYFUNCTYPE(ctypes.c_int)(address) if address else numba.get_num_threads


def thread_count() -> int:
    """Threads that a call may use: ``numba.get_num_threads()``, at most ``GPUCONV_NUM_THREADS``."""
    if _threads["lost"]:
        return 1
    count = int(_numba_threads()())
    limit = os.environ.get("GPUCONV_NUM_THREADS")
    if limit:
        if not limit.isdecimal() or int(limit) < 1:
            raise ValueError(f"GPUCONV_NUM_THREADS must be a positive integer; got {limit!r}")
        count = min(count, int(limit))
    return count


@contextlib.contextmanager
def share_of_threads(callers: int) -> Iterator[None]:
    """Let this Python thread use a share of the threads, as one of up to ``callers`` that call at once."""
    if _threads["lost"]:
        yield
        return
    before = numba.get_num_threads()
    numba.set_num_threads(max(1, before // callers))  # of this Python thread alone
    try:
        yield
    finally:
        numba.set_num_threads(before)


@intrinsic
def _call(typing: Any, function: Any, arguments: Any, thread: Any, threads: Any) -> Any:
    """Call the kernel at an address."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * 3).as_pointer()
        given = [context.cast(builder, v, t, types.intp) for v, t in zip(values, signature.args, strict=True)]
        builder.call(builder.inttoptr(given[0], kind), given[1:])
        return context.get_dummy_value()

    return types.void(function, arguments, thread, threads), lower


# Entries of a table of arguments. The first ARRAYS are the addresses of a call's arrays; one after the last counts the
# tasks that threads have taken: every call has a table of its own, in which it begins at 0.
TABLE, ARRAYS = 64, 6
_TAKEN = TABLE
_LENGTH = TABLE + 1


@intrinsic
def take(typing: Any, arguments: Any) -> Any:
    """The number of a call's next task, from 0 on, which no other thread gets: so all threads end at about the same
    time, also where one has the slower core, or has to share it.
    """

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = context.cast(builder, values[0], signature.args[0], types.intp)
        counter = builder.gep(builder.inttoptr(address, I64.as_pointer()), [I64(_TAKEN)])
        return builder.atomic_rmw("add", counter, I64(1), "monotonic")

    return types.intp(arguments), lower


@intrinsic
def _filled(typing: Any, template: Any, arrays: Any) -> Any:
    """The address of a copy of ``template`` on the stack, with the data addresses of NumPy arrays, given as objects'
    addresses, in its first entries; an object of 0 leaves an entry as it is.
    """

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        table = cgutils.alloca_once(builder, ir.ArrayType(I64, _LENGTH))
        source = builder.inttoptr(values[0], ir.ArrayType(I64, _LENGTH).as_pointer())
        cgutils.raw_memcpy(builder, table, source, I64(_LENGTH), 8, align=8)
        for index, given in enumerate(cgutils.unpack_tuple(builder, values[1])):
            with builder.if_then(builder.icmp_unsigned("!=", given, I64(0))):
                field = builder.inttoptr(builder.add(given, I64(_DATA)), I64.as_pointer())
                place = builder.gep(table, [I64(0), I64(index)])
                builder.store(builder.load(field), place)
        return builder.ptrtoint(table, I64)

    return types.intp(template, arrays), lower


# Where a NumPy array object has the address of its data: first after what every Python object begins with. That spares
# the microseconds that ``array.ctypes.data`` takes.
_DATA = object.__basicsize__


def _checked() -> bool:
    probe = np.arange(3)
    return ctypes.c_void_p.from_address(id(probe) + _DATA).value == probe.ctypes.data


if not _checked():  # pragma: no cover
    raise ImportError("this NumPy keeps its arrays' addresses where gpuconv does not know them; please report it")


def _spread(function, template, threads, a, b, c, d, e, f):
    table = _filled(template, (a, b, c, d, e, f))
    for thread in prange(threads):
        _call(function, table, thread, threads)


def _alone(function, template, threads, a, b, c, d, e, f):
    table = _filled(template, (a, b, c, d, e, f))
    for thread in range(threads):
        _call(function, table, thread, threads)


@functools.lru_cache(maxsize=64)
def _starter(parallel: bool) -> Any:
    """The function that starts kernels, on threads or in the caller's own."""
    start = njit(_spread, parallel=True, nogil=True) if parallel else njit(_alone, nogil=True)
    start._cache = KernelCache("spread" if parallel else "alone")
    start.compile((types.intp,) * (3 + ARRAYS))
    start.disable_compile()
    return start


def starter(parallel: bool) -> Any:
    """``_starter``, made once however many threads ask."""
    with _lock:
        return _starter(parallel)


class Task:
    """A kernel with its table of arguments, to be run on the arrays of a call."""

    __slots__ = ("address", "keep", "kernel", "start", "threads")

    def __init__(self, kernel: int, entries: Sequence[int], threads: int, keep: Any = None) -> None:
        """``entries`` follow the addresses of arrays in the table; ``keep`` is what they point to."""
        table = np.zeros(_LENGTH, np.int64)
        table[ARRAYS:TABLE][: len(entries)] = entries
        self.kernel, self.address, self.threads, self.keep = kernel, table.ctypes.data, threads, (table, keep)
        self.start = starter(False) if threads == 1 else _parallel

    def __call__(self, a: Any, b: Any, c: Any, d: Any = None, e: Any = None, f: Any = None) -> None:
        """Run on up to six NumPy arrays, whose data addresses become the first entries. Any number of Python threads
        may do so at once.
        """
        self.start(
            self.kernel, self.address, self.threads, id(a), id(b), id(c), 0 if d is None else id(d),
            0 if e is None else id(e), 0 if f is None else id(f),
        )  # fmt: skip


def _parallel(*arguments: int) -> None:
    if _threads["lost"]:
        starter(False)(*arguments)
        return
    start = starter(True)
    _threads["started"] = True
    if numba.threading_layer() == "workqueue":  # which ends the process when two threads enter it at once
        with _lock:
            start(*arguments)
    else:
        start(*arguments)


_kernels: dict[str, int] = {}
_kept: list[Any] = []  # what the machine code belongs to
compiled: list[str] = []  # names of what this process had to compile


def kernel(name: str, make: Callable[[], Callable[..., None]]) -> int:
    """The address of the kernel ``name``: from memory, from the cache on disk, or compiled from what ``make`` gives."""
    found = _kernels.get(name)
    if found is not None:
        return found
    with _lock:
        if name not in _kernels:
            _kernels[name] = _machine_code(name, make)
        return _kernels[name]


@global_compiler_lock
def _machine_code(name: str, make: Callable[[], Callable[..., None]]) -> int:
    cache = KernelCache(name)
    # What is on disk is loaded without ``make``, which compiles the functions that a kernel calls.
    kept = cache.load_overload(None, cpu_target.target_context)
    if kept is None:
        function: Any = CFunc(alone(make()), _SIGNATURE, {}, {"error_model": "numpy"})
        function._cache = cache
        function.compile()
        compiled.append(name)
        _kept.append(function)
        return int(function.address)
    _kept.append(kept)
    return int(kept.library.get_pointer_to_function(kept.fndesc.llvm_cfunc_wrapper_name))


def is_ready(name: str) -> bool:
    """Whether the kernel ``name`` need not be compiled: it is in memory or in the cache on disk."""
    if name in _kernels:
        return True
    path = KernelCache(name).path(cpu_target.target_context.codegen())
    return path is not None and path.exists()


def aligned(count: int, dtype: Any) -> np.ndarray[Any, Any]:
    """Uninitialised memory for ``count`` elements, from the start of a cache line on."""
    return arrays.lined((count,), np.dtype(dtype))
