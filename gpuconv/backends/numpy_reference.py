"""The reference: plain NumPy, one kernel tap at a time; serves every valid problem.

    y[n,o,i,j] = b[o] + Σ_pq ( Σ_c k[o,c,p,q] · x[n, c, row(i,p), column(j,q)] )

For each tap (p, q) the pixels that it reads are gathered and multiplied by the O × C matrix of that tap. Sums are
kept in a wider type than the result's (float64 for float32), one kernel row at a time, so that the result is the
definition's within about one rounding. Memory stays inside the limit by cutting images, groups, rows and columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import dtypes, schedule
from gpuconv.backends import tables
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numpy.reference"
DEVICE = "cpu"
ARRAYS = "numpy"

_WIDER = {"float32": "float64", "complex64": "complex128"}


def unavailable() -> None:
    """Nothing: NumPy is always here."""


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Nothing: every valid problem is served."""
    return []


def sums_in(problem: Conv2dProblem) -> str:
    """The dtype of the accumulators: wider than the result's where NumPy has a fast matrix product of it.

    Integers are summed in float64, through BLAS, where every partial sum is below 2^53 and thus exact; otherwise in
    int64, whose wrap-around is the definition's.
    """
    if dtypes.is_integer(problem.y_dtype):
        return "float64" if problem.largest_sum() < 2**53 else "int64"
    return _WIDER.get(problem.sum_dtype, problem.sum_dtype)


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Cut into blocks of (images, groups, rows, columns)."""
    sums = sums_in(problem)
    wide, narrow = dtypes.itemsize(sums), dtypes.itemsize(problem.x_dtype)
    I, O = problem.C // problem.groups, problem.O // problem.groups

    def scratch(n: int, g: int, rows: int, columns: int) -> int:
        pixels = n * g * rows * columns
        # pixels as gathered (twice while an index array gathers them) and widened; running sum, one kernel row's
        # sum and one product
        taps = pixels * I * (2 * narrow + wide) + 3 * pixels * O * wide
        kernel = 2 * g * O * I * wide
        return taps + kernel + problem.table_bytes()

    extents = (problem.N, problem.groups, problem.OH, problem.OW)
    block = schedule.fit(extents, scratch, limit, f"{NAME} on {problem}")
    return Plan(problem, scratch(*block), sums, "tap by tap", {"block": block})


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution of NumPy operands into ``out``."""
    problem, sums = plan.problem, plan.sums_in
    groups, wide = problem.groups, np.dtype(sums)
    rows, columns = problem.tables()
    # Splitting an axis is a view for any strides.
    x = operands.x.reshape((problem.N, groups, -1, problem.H, problem.W))
    k = operands.k.reshape((groups, -1, *operands.k.shape[1:]))
    y = out.reshape((problem.N, groups, -1, problem.OH, problem.OW))
    x_zero, k_zero = problem.x_zero_point, operands.k_zero_point
    fill = problem.x_zero_point or problem.padding_value
    with np.errstate(all="ignore"):  # infinities and NaN are results here, not accidents
        for n, g, i, j in schedule.blocks((problem.N, groups, problem.OH, problem.OW), plan.config["block"]):
            total: Any = 0
            for p in range(problem.KH):
                row_sum: Any = 0
                for q in range(problem.KW):
                    taps = tables.gather(
                        x[n, g], rows.tap(p, i.start, i.stop), columns.tap(q, j.start, j.stop), fill
                    ).astype(wide)
                    weights = k[g, :, :, p, q].astype(wide)
                    if x_zero:
                        taps -= x_zero
                    if k_zero is not None:
                        weights -= k_zero.reshape(groups, -1, 1)[g]
                    # (g, O, I) @ (n, g, I, pixels) -> (n, g, O, pixels)
                    row_sum = row_sum + weights @ taps.reshape((*taps.shape[:3], -1))
                total = total + row_sum
            target = y[n, g, :, i, j]
            finish(problem, total.reshape(target.shape), operands.bias, g, target)


def finish(problem: Conv2dProblem, total: Any, bias: Any | None, g: slice, target: Any) -> None:
    """Add the bias, apply the activation and round once into ``target`` (n, g, O, rows, columns)."""
    if dtypes.is_integer(problem.y_dtype):
        total = total.astype(np.int64)
    if bias is not None:
        total = total + bias.reshape((problem.groups, -1, 1, 1))[g].astype(total.dtype)
    if problem.activation == "relu":
        total = np.maximum(total, 0)
    target[...] = total.astype(target.dtype)
