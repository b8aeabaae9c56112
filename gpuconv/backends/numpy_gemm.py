"""im2col + GEMM in NumPy: the primitives that ``gemm`` needs, on the CPU's BLAS."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.backends import gemm as orchestration
from gpuconv.backends import gemm_gradients, products, tables
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numpy.gemm"
DEVICE = "cpu"
OPS = frozenset(("forward", "input_grad", "weight_grad"))
ARRAYS = "numpy"

xp = np

# Pixels that one product of a weight gradient sums over, at most: float32 sums stay those of short runs.
LONGEST_SUM = 4096


def unavailable() -> None:
    """Nothing: NumPy is always here."""


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """BLAS multiplies floating point only; 64-bit integers would take loops slower than the reference."""
    if _columns_in(problem) == "int64":
        return [f"no matrix product is exact for sums of {problem.x_dtype} beyond 2**53; numpy.reference serves them"]
    return orchestration.too_large(problem, "BLAS")


def _columns_in(problem: Conv2dProblem) -> str:
    """float64 sums of integers are exact below 2^53, and run through BLAS."""
    if dtypes.is_integer(problem.y_dtype):
        return "float64" if problem.largest_sum() < 2**53 else "int64"
    return problem.sum_dtype


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the chunk."""
    dtype = _columns_in(problem)
    patch = problem.padding_mode != "constant"
    return gemm_gradients.plan(NAME, problem, limit, dtype, dtype, 0, patch, LONGEST_SUM)


pack_key = orchestration.pack_key


def pack(plan: Plan, operands: Operands) -> Any:
    """The kernel as the matrices that BLAS takes."""
    return orchestration.pack(sys.modules[__name__], plan, operands)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the result of NumPy operands into ``out``."""
    with np.errstate(all="ignore"):  # infinities and NaN are results here, not accidents
        gemm_gradients.run(sys.modules[__name__], plan, operands, out)


def index_tables(problem: Conv2dProblem) -> orchestration.Tables:
    """The index tables as they are."""
    return problem.tables()


def im2col(problem: Conv2dProblem, given: orchestration.Tables, x: Any, i: slice, j: slice, out: Any) -> None:
    """Gather windows: x (n, g, C, H, W) into out (n, g, C, KH, KW, rows, columns), tap by tap."""
    windows = tables.Windows(problem, given, x, i, j, problem.fill)
    for p in range(problem.KH):
        for q in range(problem.KW):
            windows.tap(p, q, out[:, :, :, p, q])


def gemm(problem: Conv2dProblem, a: Any, b: Any, out: Any, accumulate: bool = False) -> None:
    """Multiply a (g, M, K) by b (n, g, K, P) into out (n, g, M, P), or add the product to it."""
    layout = orchestration.blas_layout(out.shape[2:], tuple(step // out.itemsize for step in out.strides[2:]))
    if layout is not None and not layout[0]:
        # NumPy hands a product to BLAS only when its rows are contiguous: (K·columns)ᵀ = columnsᵀ·Kᵀ.
        products.matmul(b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2), accumulate)
    else:
        products.matmul(a, b, out, accumulate)


def epilogue(problem: Conv2dProblem, sums: Any, bias: Any | None, out: Any) -> None:
    """Finish sums (n, g, O, rows, columns) into out of the same shape; bias is (g, O, 1, 1)."""
    orchestration.plain_epilogue(np, problem, sums, bias, out)
