"""unfold and fold in kernels of our own; the kernels are in ``patches_kernel``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes, schedule
from gpuconv.backends.numba_cuda import launch, uploads
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.patches"
DEVICE = "cuda"
ARRAYS = "any"
OPS = frozenset(("unfold", "fold"))

_THREADS = 256

unavailable = launch.unavailable


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Nothing: every valid problem is served."""
    return []


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """The only scratch are the index tables of unfold."""
    scratch = problem.table_bytes() if problem.op == "unfold" else 0
    if scratch > limit:
        raise schedule.shortage(f"{NAME} on {problem}", scratch, limit)
    sums = problem.x_dtype if problem.op == "unfold" else problem.sum_dtype
    return Plan(problem, scratch, sums, "one thread per element of the result")


@lru_cache(maxsize=64)
def kernel(build: Callable[..., Any], *facts: Any) -> Any:
    """The compiled-on-demand kernel of one specialisation."""
    return launch.jit(build(*facts))


def _words(array: Any, itemsize: int) -> Any:
    """The operand as words of its elements' size."""
    from gpuconv.backends.numba_cuda import patches_kernel

    word = patches_kernel.WORDS[itemsize]
    if isinstance(array, Flat):
        return replace(array, vector=array.vector.view(word))
    return (arrays.native(array) if isinstance(array, np.ndarray) else array).view(word)


def _image(image: Flat) -> Flat:
    """(N, C, 1, H, W) without the axis of one channel per group."""
    n, c, _, h, w = image.strides
    return replace(image, strides=(n, c, h, w))


def _windows(windows: Flat, problem: Conv2dProblem) -> Flat:
    """(N, C, KH·KW, OH, OW) with the taps as two axes."""
    n, c, tap, i, j = windows.strides
    return replace(windows, strides=(n, c, problem.KW * tap, tap, i, j))


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Launch the kernel on NumPy operands (uploaded and downloaded here) or on those of a GPU, on the given stream."""
    from gpuconv.backends.numba_cuda import patches_kernel

    problem = plan.problem
    like = operands.x
    blocks = min(-(-problem.result_size // _THREADS), launch.MAX_GRID_X)
    extents = (problem.N, problem.C, problem.KH, problem.KW, problem.OH, problem.OW)
    with ExitStack() as stack:
        stack.enter_context(launch.on_gpu(operands.ordinal))
        stream = launch.stream(operands.stream, like)
        if problem.op == "unfold":
            itemsize = dtypes.itemsize(problem.y_dtype)
            y = _windows(stack.enter_context(launch.output(_words(out, itemsize), stream)), problem)
            x = _image(launch.flat(_words(like, itemsize), stream))
            tables = uploads.index_tables(problem, like, stream)
            function = kernel(patches_kernel.build_unfold, itemsize)
            function[blocks, _THREADS, stream](*x.arguments(), *y.arguments(), *tables, *extents)
        else:
            x = _image(stack.enter_context(launch.output(out, stream)))
            y = _windows(launch.flat(like, stream), problem)
            (top, _), (left, _) = problem.padding
            sizes = (problem.N, problem.C, problem.H, problem.W, *extents[2:], *problem.stride, *problem.dilation)
            function = kernel(patches_kernel.build_fold, problem.x_dtype, problem.y_dtype)
            function[blocks, _THREADS, stream](*y.arguments(), *x.arguments(), *sizes, top, left)
