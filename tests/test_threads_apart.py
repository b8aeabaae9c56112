"""Threads of a compiled CPU kernel write to scratch of their own, wherever it begins.

Two threads that share some bytes are wrong now and then, when both are there at once; one after the other they never
are. So each thread runs alone here, and what it changed in the scratch is compared with what the others changed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from typing import Any

import numpy as np
import pytest
from guard_pages import Case, Fence

import gpuconv
from gpuconv import request
from gpuconv.backends.numba_cpu import runtime, strip
from gpuconv.backends.protocol import Operands

pytestmark = [
    pytest.mark.skipif(runtime.unavailable() is not None, reason="no compiled kernels on this machine"),
    pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="not about the CUDA simulator"),
]
SCRATCH = strip.SCRATCH
KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)


def changed(task: runtime.Task, arrays: tuple[Any, ...], thread: int, start: int) -> np.ndarray:
    """Which bytes of the scratch, laid ``start`` bytes behind a cache line's, thread ``thread`` writes."""
    size = arrays[SCRATCH].nbytes
    found = np.zeros(size, bool)
    memory = np.empty(size + 128, np.uint8)
    first = -memory.ctypes.data % 64 + start
    mine = memory[first : first + size]
    for pattern in (0x55, 0xAA):  # what happens to be written once is another byte the second time
        mine[:] = pattern
        table = task.keep[0].copy()
        for index, array in enumerate(arrays):
            if array is not None:
                table[index] = array.ctypes.data
        table[SCRATCH] = mine.ctypes.data
        KERNEL(task.kernel)(table.ctypes.data, thread, task.threads)
        found |= mine != pattern
    return found


@pytest.fixture
def compared(monkeypatch):
    """The shares that were compared, of every kernel that is run from here on."""
    seen: list[int] = []
    call = runtime.Task.__call__

    def judged(task: runtime.Task, *arrays: Any) -> None:
        call(task, *arrays)
        if task.threads > 1 and len(arrays) > SCRATCH and arrays[SCRATCH] is not None and arrays[SCRATCH].nbytes:
            for start in (0, 16, 32, 48):
                shares = [changed(task, arrays, thread, start) for thread in range(task.threads)]
                for (i, a), (j, b) in itertools.combinations(enumerate(shares), 2):
                    assert not (a & b).any(), f"threads {i} and {j} share {(a & b).sum()} bytes of scratch at {start}"
            seen.append(task.threads)

    monkeypatch.setattr(runtime.Task, "__call__", judged)
    return seen


def test_planes_whose_share_is_half_a_cache_line_too_long(compared):
    """24 channels of 90², dilated, from an array that is copied first: now and then three numbers were wrong."""
    rng = np.random.default_rng(5)
    x = rng.integers(0, 3, (1, 24, 90, 180)).astype(np.float32)[..., ::2]
    for rows in range(88, 92):  # shares of several lengths
        k = rng.integers(0, 3, (24, 1, 3, 3)).astype(np.float32)
        gpuconv.conv2d(x[:, :, :rows], k, groups=24, dilation=2, backend="numba_cpu.lanes")
    assert compared


@pytest.mark.parametrize(
    ("first", "count"), [(0, 40), pytest.param(10_000, 2_000, marks=pytest.mark.full)], ids=["some", "many"]
)
def test_random_problems(compared, first, count):
    for number in range(first, first + count):
        case = Case(number, ["float32"], [runtime.vector_bits()])
        plan = case.plan()
        if case.problem.result_size and case.problem.products:
            (x, k, out), bias = case.operands(Fence("none"))
            views = [request.view(case.problem, which, array) for which, array in enumerate((x, k, out))]
            case.implementation.run(plan, Operands(views[0], views[1], bias), views[2])
    assert len(compared) > count // 8, len(compared)
