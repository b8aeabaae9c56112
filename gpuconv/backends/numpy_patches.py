"""unfold and fold in NumPy: the windows of one kernel tap at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends import patches, tables
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numpy.patches"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("unfold", "fold"))


def unavailable() -> None:
    """Nothing: NumPy is always here."""


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Nothing: every valid problem is served."""
    return []


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """unfold needs the index tables, fold its sums."""
    if problem.op == "fold":
        return patches.plan_fold(NAME, problem, limit)
    if problem.table_bytes() > limit:
        raise schedule.shortage(f"{NAME} on {problem}", problem.table_bytes(), limit)
    return Plan(problem, problem.table_bytes(), problem.x_dtype, "one copy per kernel tap")


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the windows, or their sums, into ``out``."""
    problem = plan.problem
    with np.errstate(all="ignore"):  # infinities and NaN are results here, not accidents
        if problem.op == "fold":
            patches.run_fold(np, plan, operands, out)
            return
        whole = slice(0, problem.OH), slice(0, problem.OW)
        windows = tables.Windows(problem, problem.tables(), operands.x[:, :, 0], *whole, problem.fill)
        for p in range(problem.KH):
            for q in range(problem.KW):
                windows.tap(p, q, out[:, :, p * problem.KW + q])
