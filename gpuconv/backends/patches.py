"""fold, written once over an array namespace: the windows of each kernel tap are added where they came from.

    x[n,c,h,w] = Σ_pq windows[n,c, p·KW + q, i, j]    over the i, j with i·s + p·d - pad = h, j·s + q·d - pad = w

The windows of one tap go to as many different places, so each tap is one addition of two strided views.
"""

from __future__ import annotations

from typing import Any

from gpuconv import dtypes, schedule
from gpuconv.backends.protocol import Operands, Plan
from gpuconv.problem import Conv2dProblem


def plan_fold(name: str, problem: Conv2dProblem, limit: int) -> Plan:
    """Sum in place, or in blocks of images and channels where the sums are wider than the result."""
    sums = dtypes.itemsize(problem.sum_dtype) if problem.sum_dtype != problem.y_dtype else 0
    # A tap's windows as NumPy casts them to the type of the sums, in one buffer of a few thousand elements.
    cast = 16 * 8192 if problem.x_dtype != problem.sum_dtype else 0

    def scratch(n: int, c: int) -> int:
        return n * c * problem.H * problem.W * sums + cast

    block = schedule.fit((problem.N, problem.C), scratch, limit, f"{name} on {problem}")
    return Plan(problem, scratch(*block), problem.sum_dtype, "one addition per kernel tap", {"block": block})


def run_fold(xp: Any, plan: Plan, operands: Operands, out: Any) -> None:
    """Add windows (N, C, KH·KW, OH, OW) up into ``out``, (N, C, 1, H, W)."""
    problem = plan.problem
    dtype = dtypes.numpy_dtype(problem.sum_dtype)
    rows = [_reach(problem, 0, p) for p in range(problem.KH)]
    columns = [_reach(problem, 1, q) for q in range(problem.KW)]
    for n, c in schedule.blocks((problem.N, problem.C), plan.config["block"]):
        target = out[n, c, 0]
        total = target if dtype == target.dtype else xp.empty(target.shape, dtype)
        total[...] = 0
        for p, (i, down) in enumerate(rows):
            for q, (j, across) in enumerate(columns):
                place = total[..., down, across]
                xp.add(place, operands.x[n, c, p * problem.KW + q, i, j], out=place, dtype=dtype)
        if total is not target:
            target[...] = total


def _reach(problem: Conv2dProblem, axis: int, tap: int) -> tuple[slice, slice]:
    """The windows of which ``tap`` lies inside the image, and where it lies, along ``axis``."""
    n, outputs = problem.x_shape[2 + axis], problem.y_shape[2 + axis]
    stride, offset = problem.stride[axis], tap * problem.dilation[axis] - problem.padding[axis][0]
    first = max(0, -(offset // stride))
    last = min(outputs - 1, (n - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)
