"""The reference: plain NumPy, one kernel tap at a time; serves every valid problem.

    y[n,o,i,j] = b[o] + Σ_pq ( Σ_c k[o,c,p,q] · x[n, c, row(i,p), column(j,q)] )

For each tap (p, q) the pixels that it reads are gathered and multiplied by the O × C matrix of that tap. Sums are
kept in a wider type than the result's (float64 for float32), and each kernel row and each 256 channels have a sum of
their own, so that rounding errors stay those of short sums. Memory stays inside the limit by cutting images, groups,
rows and columns. The gradient of the kernel takes the same pixels times the gradient of y; that of x is cut into
forward convolutions by ``phases``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import dtypes, schedule
from gpuconv.backends import phases, products, tables
from gpuconv.backends.gemm import plain_epilogue
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numpy.reference"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad", "weight_grad"))

# A sum of this many products at most; the partial sums are then added up.
_CHANNELS = 256

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
    if problem.op == "input_grad":
        return phases.plan(lambda part: _plan_forward(part, sums_in(problem), limit), problem)
    choose = _plan_weight_grad if problem.op == "weight_grad" else _plan_forward
    return choose(problem, sums_in(problem), limit)


def _plan_forward(problem: Conv2dProblem, sums: str, limit: int) -> Plan:
    wide, narrow = dtypes.itemsize(sums), dtypes.itemsize(problem.x_dtype)
    I, O = min(problem.C // problem.groups, _CHANNELS), problem.O // problem.groups

    def scratch(n: int, g: int, rows: int, columns: int) -> int:
        pixels = n * g * rows * columns
        # pixels as gathered and widened; running sum, one kernel row's sum and one product; the padded patch, twice
        # while an index array gathers it
        taps = pixels * I * (narrow + wide) + 3 * pixels * O * wide
        taps += 2 * n * g * I * tables.patch_pixels(problem, rows, columns) * narrow
        kernel = 2 * g * O * I * problem.KW * wide
        return taps + kernel + problem.table_bytes()

    extents = (problem.N, problem.groups, problem.OH, problem.OW)
    block = schedule.fit(extents, scratch, limit, f"{NAME} on {problem}")
    return Plan(problem, scratch(*block), sums, "tap by tap", {"block": block})


def _plan_weight_grad(problem: Conv2dProblem, sums: str, limit: int) -> Plan:
    wide, narrow = dtypes.itemsize(sums), max(dtypes.itemsize(problem.x_dtype), dtypes.itemsize(problem.k_dtype))
    I, O = problem.C // problem.groups, problem.O // problem.groups
    integers = dtypes.is_integer(problem.y_dtype)

    def scratch(n: int, g: int, rows: int, columns: int) -> int:
        # dy and the pixels of one tap as gathered and as widened matrices; the padded patch; all sums of the groups,
        # of integers converted at the end, and one tap's product, twice where a long sum is made of short ones
        chunk = n * g * rows * columns * (O + I) * (narrow + 2 * wide)
        chunk += 2 * n * g * I * tables.patch_pixels(problem, rows, columns) * narrow
        sums = g * O * I * (problem.KH * problem.KW * (2 if integers else 1) + 2) * wide
        return chunk + sums + problem.table_bytes()

    extents = (problem.N, problem.groups, problem.OH, problem.OW)
    block = schedule.fit(extents, scratch, limit, f"{NAME} on {problem}")
    return Plan(problem, scratch(*block), sums, "tap by tap, times dy", {"block": block})


def pack_key(plan: Plan) -> None:
    """Nothing: the kernel is used as it is."""


def pack(plan: Plan, operands: Operands) -> None:
    """Nothing: the kernel is used as it is."""


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the result of NumPy operands into ``out``."""
    with np.errstate(all="ignore"):  # infinities and NaN are results here, not accidents
        if plan.problem.op == "input_grad":
            phases.run(_run_forward, plan, operands, out)
        elif plan.problem.op == "weight_grad":
            _run_weight_grad(plan, operands, out)
        else:
            _run_forward(plan, operands, out)


def _run_forward(plan: Plan, operands: Operands, out: Any) -> None:
    problem = plan.problem
    groups, wide = problem.groups, np.dtype(plan.sums_in)
    index_tables = problem.tables()
    x, k = operands.x, operands.k
    z = None if operands.k_zero_point is None else operands.k_zero_point.reshape((groups, -1, 1))
    for n, g, i, j in schedule.blocks((problem.N, groups, problem.OH, problem.OW), plan.config["block"]):
        target = out[n, g, :, i, j]
        total = np.zeros((*target.shape[:3], target.shape[3] * target.shape[4]), wide)
        for first in range(0, x.shape[2], _CHANNELS):
            c = slice(first, first + _CHANNELS)
            windows = tables.Windows(problem, index_tables, x[n, g, c], i, j, problem.fill)
            for p in range(problem.KH):
                weights = k[g, :, c, p].astype(wide)
                if z is not None:
                    weights -= z[g][..., None]
                if problem.conjugate:
                    np.conjugate(weights, out=weights)
                total += _kernel_row(problem, windows, p, weights, total.shape)
            del windows  # its patch, before the next one is made
        bias = None
        if operands.bias is not None:
            sums = np.int64 if dtypes.is_integer(problem.y_dtype) else wide
            bias = operands.bias.reshape((groups, -1, 1, 1))[g].astype(sums)
        plain_epilogue(np, problem, total.reshape(target.shape), bias, target)


def _run_weight_grad(plan: Plan, operands: Operands, out: Any) -> None:
    problem = plan.problem
    wide = np.dtype(plan.sums_in)
    index_tables = problem.tables()
    x, dy = operands.x, operands.k
    images, groups, rows, columns = plan.config["block"]
    for (g,) in schedule.blocks((problem.groups,), (groups,)):
        total = np.zeros((problem.KH, problem.KW, *out[g].shape[:3]), wide)
        product = np.empty(total.shape[2:], wide)
        for n, i, j in schedule.blocks((problem.N, problem.OH, problem.OW), (images, rows, columns)):
            a = _as_matrices(dy[n, g, :, i, j], wide)
            windows = tables.Windows(problem, index_tables, x[n, g], i, j, problem.fill)
            for p, q in np.ndindex(problem.KH, problem.KW):
                pixels = _as_matrices(windows.tap(p, q), wide)
                if problem.conjugate:
                    np.conjugate(pixels, out=pixels)
                products.matmul(a, pixels.swapaxes(1, 2), product)
                total[p, q] += product
                del pixels
        sums = np.int64 if dtypes.is_integer(problem.y_dtype) else wide
        out[g] = total.transpose(2, 3, 4, 0, 1).astype(sums, copy=False)


def _as_matrices(array: Any, dtype: Any) -> Any:
    """(n, g, C, rows, columns) as (g, C, pixels of all images) of ``dtype``."""
    n, g, C, rows, columns = array.shape
    return array.transpose(1, 2, 0, 3, 4).astype(dtype, order="C").reshape((g, C, n * rows * columns))


def _kernel_row(problem: Conv2dProblem, windows: tables.Windows, p: int, weights: Any, shape: tuple[int, ...]) -> Any:
    """The products of kernel row ``p``, whose ``weights`` are (g, O, I, KW): a sum (n, g, O, pixels)."""
    total, products = np.empty(shape, weights.dtype), np.empty(shape, weights.dtype)
    for q in range(problem.KW):
        pixels = windows.tap(p, q).astype(weights.dtype)
        if problem.x_zero_point:
            pixels -= problem.x_zero_point
        # (g, O, I) @ (n, g, I, pixels) -> (n, g, O, pixels)
        np.matmul(weights[..., q], pixels.reshape((*pixels.shape[:3], -1)), out=products if q else total)
        del pixels  # before the next tap's are gathered
        if q:
            total += products
    return total
