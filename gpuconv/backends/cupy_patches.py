"""unfold and fold on CuPy: unfold is the im2col of ``cupy.gemm``, fold one addition per kernel tap."""

from __future__ import annotations

from typing import Any

from gpuconv import schedule
from gpuconv.backends import cupy_gemm, patches
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "cupy.patches"
DEVICE = "cuda"
ARRAYS = "cupy"
OPS = frozenset(("unfold", "fold"))

unavailable = cupy_gemm.unavailable


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Nothing: every valid problem is served."""
    return []


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """unfold needs the index tables, fold its sums."""
    if problem.op == "fold":
        return patches.plan_fold(NAME, problem, limit)
    if problem.table_bytes() > limit:
        raise schedule.shortage(f"{NAME} on {problem}", problem.table_bytes(), limit)
    return Plan(problem, problem.table_bytes(), problem.x_dtype, "one thread per window and channel")


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the windows, or their sums, into ``out``, on the current stream."""
    problem = plan.problem
    if problem.op == "fold":
        import cupy

        patches.run_fold(cupy, plan, operands, out)
        return
    # (N, G = C, KH·KW, OH, OW) as (N, G, C/G = 1, KH, KW, OH, OW)
    windows = out.reshape((problem.N, problem.C, 1, problem.KH, problem.KW, problem.OH, problem.OW))
    whole = slice(0, problem.OH), slice(0, problem.OW)
    cupy_gemm.im2col(problem, cupy_gemm.index_tables(problem), operands.x, *whole, windows)
