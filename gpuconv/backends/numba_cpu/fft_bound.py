"""What ``fft`` and ``fft_lines`` have in common: the refusals, integers, and a plan bound to arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.backends.numba_cpu import dense, fft_certain, fft_stages, runtime, strip
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why neither can run ``problem``."""
    reasons = dense.unsupported(problem, target)
    if not reasons and not is_whole(problem) and (problem.sum_dtype != "float32" or problem.y_dtype == "float64"):
        reasons.append(f"it is for integers and for sums in float32, not {problem.sum_dtype}")
    if problem.stride != (1, 1) or problem.dilation[1] != 1 or (problem.KH > 1 and problem.dilation[0] != 1):
        reasons.append("it is for kernels without stride and dilation")
    return reasons


def is_whole(problem: Conv2dProblem) -> bool:
    """Whether the results are integers: of sums that are off by less than a half the nearest integers."""
    return dtypes.is_integer(problem.y_dtype)


def too_large(problem: Conv2dProblem, target: Target, pixels: int) -> list[str]:
    """Why transforms of so many ``pixels`` are not certain to give the integers of a forward convolution."""
    low, high = dtypes.RANGES[problem.x_dtype]
    x, (low, high) = max(-low, high), dtypes.RANGES[problem.k_dtype]
    k = max(-low, high) if target.k_digits is None else min(max(-low, high), (1 << target.k_digits) - 1)
    C, products = problem.C // problem.groups, problem.products
    norms = x * math.sqrt(2 * C * pixels) * k * (2 * math.sqrt(products) + products)
    # A quarter, not a half: then the nearest integer stays so.
    if k <= 1 << 24 and fft_certain.relative_error(C, pixels) * norms < 0.25:
        return []
    return ["integers as large as these types allow are not certain to come out exactly"]


@functools.lru_cache(maxsize=32)
def factors(length: int) -> np.ndarray[Any, Any]:
    """The twiddle factors of a transform, kept."""
    return fft_stages.twiddles(length)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(
        self, plan: Plan, x: Any, k: Any | None, out: Any, table: np.ndarray[Any, Any], kept: Any, kernel: int,
        pack: Callable[[Plan, Operands], Any],
    ) -> None:  # fmt: skip
        """For arrays like ``x``, ``out``, and the kernels ``k`` where they are not packed already; ``table`` are the
        arguments but for the strides, and ``kept`` what it points to.
        """
        problem, config, self.plan, self.pack = plan.problem, plan.config, plan, pack
        self.form = None if k is None else (k.shape, k.strides)
        self.lanes, self.scratch = config["lanes"], config["threads"] * config["sizes"].each
        self.alone = config["alone"]
        table = table.copy()
        table[strip.SXN : strip.SXN + 10] = [*x.strides, *out.strides]
        self.task = runtime.Task(kernel, table[runtime.ARRAYS :].tolist(), config["threads"], kept)
        self.fill = dense.constant(problem, self.lanes)
        self.finish = dense.finishing(problem, None, problem.O // problem.groups, 0, self.lanes)

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if packed is None:
            assert self.form is not None
            # It may come in its caller's form, which begins at the same place.
            packed = self.pack(self.plan, Operands(x, np.lib.stride_tricks.as_strided(k, *self.form)))
        finish = self.finish
        if bias is not None:
            problem = self.plan.problem
            finish = dense.finishing(problem, bias, problem.O // problem.groups, 0, self.lanes)
        self.task(x, packed, out, runtime.aligned(self.scratch, "float64"), finish, self.fill)
