"""Kernels as functions of three integers, and the threads that run them.

A kernel is compiled once as ``kernel(arguments, thread, threads)``: ``arguments`` is the address of a table of 64-bit
integers (addresses, sizes), and thread ``thread`` of ``threads`` does its share. All kernels are started by one small
parallel function, so that each of them compiles as plain serial code.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange
from numba.core import types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from gpuconv.backends.numba_cpu.kernel_cache import KernelCache
from gpuconv.geometry import as_integer

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


@functools.cache
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


def unavailable() -> str | None:
    """Why this machine cannot run compiled kernels, with the remedy; None when it can."""
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT forbids Numba to compile; unset it"
    return None if vector_bits() else "this processor has no fused multiply-add, which the kernels are made of"


def thread_count() -> int:
    """Threads that a call may use: ``numba.get_num_threads()``, at most ``GPUCONV_NUM_THREADS``."""
    if _threads["lost"]:
        return 1
    count = int(numba.get_num_threads())
    limit = os.environ.get("GPUCONV_NUM_THREADS")
    if limit:
        count = min(count, as_integer("GPUCONV_NUM_THREADS", "its value", _number(limit), 1, None))
    return count


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


@intrinsic
def _call(typing: Any, function: Any, arguments: Any, thread: Any, threads: Any) -> Any:
    """Call the kernel at an address."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        integer = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [integer] * 3).as_pointer()
        given = [context.cast(builder, v, t, types.intp) for v, t in zip(values, signature.args, strict=True)]
        builder.call(builder.inttoptr(given[0], kind), given[1:])
        return context.get_dummy_value()

    return types.void(function, arguments, thread, threads), lower


def _spread(function, arguments, threads):  # type: ignore[no-untyped-def]
    for thread in prange(threads):
        _call(function, arguments, thread, threads)


def _alone(function, arguments, threads):  # type: ignore[no-untyped-def]
    for thread in range(threads):
        _call(function, arguments, thread, threads)


@functools.cache
def _starter(parallel: bool) -> Any:
    """The function that starts kernels, on threads or in the caller's own."""
    start = njit(_spread, parallel=True, nogil=True) if parallel else njit(_alone, nogil=True)
    start._cache = KernelCache("spread" if parallel else "alone")
    start.compile((types.intp, types.intp, types.intp))
    start.disable_compile()
    return start


def run(kernel: int, arguments: np.ndarray[Any, Any], threads: int) -> None:
    """Run ``kernel`` in ``threads`` shares. Any number of Python threads may do so at once."""
    address = arguments.ctypes.data
    if threads == 1 or _threads["lost"]:
        starter(False)(kernel, address, threads)
        return
    start = starter(True)
    _threads["started"] = True
    if numba.threading_layer() == "workqueue":  # which ends the process when two threads enter it at once
        with _lock:
            start(kernel, address, threads)
    else:
        start(kernel, address, threads)


def starter(parallel: bool) -> Any:
    """``_starter``, made once however many threads ask."""
    with _lock:
        return _starter(parallel)


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
            function = CFunc(make(), _SIGNATURE, {}, {"error_model": "numpy"})
            function._cache = KernelCache(name)
            function.compile()
            if not function._cache.hit:
                compiled.append(name)
            _kept.append(function)
            _kernels[name] = function.address
        return _kernels[name]


def is_ready(name: str) -> bool:
    """Whether the kernel ``name`` need not be compiled: it is in memory or in the cache on disk."""
    if name in _kernels:
        return True
    from numba.core.registry import cpu_target

    path = KernelCache(name).path(cpu_target.target_context.codegen())
    return path is not None and path.exists()


def aligned(count: int, lanes: Any) -> np.ndarray[Any, Any]:
    """Uninitialised memory for ``count`` elements, from the start of a cache line on."""
    raw = np.empty(count * lanes.size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * lanes.size].view(lanes.dtype)
