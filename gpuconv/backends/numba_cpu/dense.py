"""What the dense kernels for floating point have in common: which problems, which blocks of a sum, which arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.backends import phases
from gpuconv.backends.numba_cpu import runtime
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.vectors import SIZE, Lanes
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

# What a kernel sums in: the largest integer up to which it has every one, and what it does not read for it, which would
# lose digits.
_EXACT = {"float32": 1 << 24, "float64": 1 << 53}
_NOT_READ = {"float32": ("float64",), "float64": ()}

_TAPS = 1 << 16


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why the floating-point kernels cannot run ``problem``."""
    reasons = []
    sums = sums_in(problem, target)
    if problem.x_zero_point or problem.k_zero_point:
        reasons.append("it has no zero points")
    elif sums is None and _of_integers(problem):
        hint = "as far as the types of x and k tell; where the values of both are seen to rule that out, it can"
        reasons.append(f"it sums integers in floating point, for which these sums may be too large, {hint}")
    elif sums is None or not {problem.x_dtype, problem.k_dtype} <= set(SIZE) or problem.x_dtype in _NOT_READ[sums]:
        reasons.append(f"it sums real numbers; not {problem.x_dtype} times {problem.k_dtype} in {problem.sum_dtype}")
    if target.swapped:
        reasons.append("it reads numbers in the machine's own byte order: x.astype(x.dtype.newbyteorder('=')) gives it")
    if problem.KH * problem.KW > _TAPS:
        reasons.append(f"a kernel of {problem.KH}×{problem.KW} has more than {_TAPS} taps, for which it has no tables")
    return reasons


def unsupported_as_they_are(problem: Conv2dProblem, target: Target) -> list[str]:
    """``unsupported``, for kernels that read the second operand as it is, too, instead of a converted copy."""
    reasons = unsupported(problem, target)
    if not reasons and problem.sum_dtype not in _EXACT:
        reasons.append(f"it sums floating point, not {problem.sum_dtype}")
    elif not reasons and problem.k_dtype in _NOT_READ[problem.sum_dtype]:
        reasons.append(f"for sums in {problem.sum_dtype} it does not read {problem.k_dtype}")
    return reasons


def sums_in(problem: Conv2dProblem, target: Target) -> str | None:
    """The type of the kernels' sums: the problem's own, or for integers one in which every sum is exact; None where
    there is none.
    """
    if problem.sum_dtype in _EXACT:
        return problem.sum_dtype
    if not _of_integers(problem) or problem.x_zero_point or problem.k_zero_point:
        return None
    if target.sum_digits is not None:
        largest = 1 << target.sum_digits
    elif problem.bias and problem.y_dtype != "int32":
        return None  # a bias as large as the result's type allows
    else:
        largest = problem.largest_sum(1 << 31 if problem.bias else 0, target.k_digits)
    # Integers of 64 bits are converted to float64 much faster than to float32.
    types = {dtype: most for dtype, most in _EXACT.items() if problem.x_dtype != "int64" or dtype == "float64"}
    return next((dtype for dtype, most in types.items() if largest <= most), None)


def _of_integers(problem: Conv2dProblem) -> bool:
    return all(map(dtypes.is_integer, (problem.x_dtype, problem.k_dtype, problem.y_dtype)))


def parts(problem: Conv2dProblem) -> list[Conv2dProblem]:
    """The forward convolutions that make up ``problem``."""
    return [phase.problem for phase in phases.phases(problem)] if problem.op == "input_grad" else [problem]


def plan(
    forward: Callable[[Conv2dProblem, Target, int], Plan], problem: Conv2dProblem, target: Target, limit: int
) -> Plan:
    """The plan of ``problem``, or of each of its parts, by ``forward``."""
    if problem.op == "input_grad":
        return phases.plan(lambda part: forward(part, target, limit), problem)
    return forward(problem, target, limit)


def run(forward: Callable[[Plan, Operands, Any], None], plan: Plan, operands: Operands, out: Any) -> None:
    """Carry out ``plan``, or each of its parts, by ``forward``."""
    if plan.problem.op == "input_grad":
        phases.run(forward, plan, operands, out)
    else:
        forward(plan, operands, out)


def once(bound: Any, plan: Plan, operands: Operands, out: Any) -> None:
    """Bind ``plan`` to the arrays of one call, and run it."""
    packed = operands.packed
    ready = bound(plan, operands.x, operands.k if packed is None else None, out)
    ready(operands.x, operands.k, packed, operands.bias, out)


def converted(k: Any, dtype: str) -> np.ndarray[Any, Any]:
    """A dense copy of weights that a kernel reads as they are, in the type of its sums."""
    with np.errstate(all="ignore"):
        return np.array(k, dtype, order="C")


def lanes_of(problem: Conv2dProblem, target: Target) -> Lanes:
    """The vector registers that the problem's sums are in."""
    dtype = sums_in(problem, target)
    assert dtype is not None  # it is supported
    return Lanes.of(dtype, target.vector_bits or runtime.vector_bits())


def channels_at_once(problem: Conv2dProblem, parts: int = 1) -> int:
    """Input channels of a block, so that a block is about one sum of the micro-kernel: evenly, and a matter of the
    image's own sizes alone, because it decides how sums are split. ``parts`` of them stay together.
    """
    channels = problem.C // problem.groups // parts
    most = max(1, BLOCK // (parts * problem.KH * problem.KW))
    return parts * -(-channels // -(-channels // most)) if channels else parts


def finishing(problem: Conv2dProblem, bias: Any | None, padded: int, rows: int, lanes: Lanes) -> np.ndarray[Any, Any]:
    """What a sum ends with: a least value that changes nothing and the least value of a result, ``rows`` zeros for the
    sums that go on, and for each group a bias for each of ``padded`` channels.
    """
    groups = problem.groups
    values = np.zeros(2 + rows + groups * padded, lanes.dtype)
    values[:2] = -np.inf, (0.0 if problem.activation == "relu" else -np.inf)
    if bias is not None:
        with np.errstate(all="ignore"):
            by_group = values[2 + rows :].reshape(groups, padded)
            by_group[:, : problem.result_channels // groups] = bias.astype(lanes.dtype).reshape(groups, -1)
    return values


def constant(problem: Conv2dProblem, lanes: Lanes) -> np.ndarray[Any, Any]:
    """The padding value, in memory."""
    return np.array([dtypes.numpy_dtype(problem.x_dtype).type(problem.fill)]).astype(lanes.dtype)


def is_readable(k: Any, lanes: Lanes) -> bool:
    """Whether a kernel can read the weights where they lie, number by number."""
    return bool(k.dtype == lanes.dtype and k.dtype.isnative and all(step % lanes.size == 0 for step in k.strides))


def is_near(array: Any, lanes: Lanes) -> bool:
    """Whether vectors can read or write the rows of an image, (N, G, C, H, W), where they lie."""
    steps = array.strides
    return bool(array.dtype == lanes.dtype and steps[4] == lanes.size and all(step % lanes.size == 0 for step in steps))
