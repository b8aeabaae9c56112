"""unfold and fold in kernels of our own; the kernels are in ``patches_kernel``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import arrays, schedule
from gpuconv.backends.numba_cuda import launch, uploads
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


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Launch the kernel on NumPy operands (uploaded and downloaded here) or on CuPy ones, on the given stream."""
    from gpuconv.backends.numba_cuda import patches_kernel

    problem = plan.problem
    like = operands.x
    blocks = min(-(-problem.result_size // _THREADS), launch.MAX_GRID_X)
    # (N, C, KH·KW, OH, OW) with the taps as two axes; (N, C, 1, H, W) without the one
    windows = (problem.N, problem.C, problem.KH, problem.KW, problem.OH, problem.OW)
    with ExitStack() as stack:
        stack.enter_context(launch.on_gpu(operands.ordinal))
        stream = launch.stream(operands.stream, like)
        if problem.op == "unfold":
            word = patches_kernel.WORDS[out.dtype.itemsize]
            image = arrays.native(like) if isinstance(like, np.ndarray) else like
            y = stack.enter_context(launch.output(out.view(word).reshape(windows), stream))
            x = launch.flat(image.view(word)[:, :, 0], stream)
            tables = uploads.index_tables(problem, like, stream)
            function = kernel(patches_kernel.build_unfold, out.dtype.itemsize)
            function[blocks, _THREADS, stream](*x.arguments(), *y.arguments(), *tables, *windows)
        else:
            x = stack.enter_context(launch.output(out[:, :, 0], stream))
            y = launch.flat(operands.x.reshape(windows), stream)
            (top, _), (left, _) = problem.padding
            sizes = (problem.N, problem.C, problem.H, problem.W, *windows[2:], *problem.stride, *problem.dilation)
            function = kernel(patches_kernel.build_fold, problem.x_dtype, problem.y_dtype)
            function[blocks, _THREADS, stream](*y.arguments(), *x.arguments(), *sizes, top, left)
