"""What ``guard_pages`` compares compiled kernels with: ``numpy.reference``, in float64, in units of the bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import units
from oracle import Answer

from gpuconv import dispatch, request
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

KERNEL_AXES = {"OIHW": (0, 1, 2, 3), "HWIO": (2, 3, 1, 0), "OHWI": (0, 2, 3, 1)}


def reference(problem: Conv2dProblem, x: Any, k: Any, bias: Any) -> np.ndarray:
    """The result as implementations see it, in float64 or complex128."""
    dtype = "complex128" if any(array.dtype.kind == "c" for array in (x, k)) else "float64"
    wide = {name: dtype for name in ("x_dtype", "k_dtype", "y_dtype")}
    problem = replace(problem, **wide, precision="highest")
    implementation = dispatch.implementation("numpy.reference")
    plan = implementation.plan(problem, Target("cpu"), 1 << 28)
    views = [request.view(problem, which, a.astype(dtype)) for which, a in enumerate((x, k))]
    out = request.view(problem, 2, np.empty(held(problem, problem.result_shape, problem.op != "weight_grad"), dtype))
    implementation.run(plan, Operands(*views, None if bias is None else bias.astype(dtype)), out)
    return out


def held(problem: Conv2dProblem, shape: tuple[int, ...], image: bool) -> tuple[int, ...]:
    """The shape of an array as its caller holds it: an image, or a kernel."""
    if image:
        return shape if problem.layout == "NCHW" else tuple(shape[axis] for axis in (0, 2, 3, 1))
    return tuple(shape[axis] for axis in KERNEL_AXES[problem.kernel_layout])


def check(problem: Conv2dProblem, y: np.ndarray, x: np.ndarray, k: np.ndarray, bias: np.ndarray | None) -> None:
    """``y``, as implementations see it, is within the bound of its precision."""
    wanted = reference(problem, x, k, bias)
    if y.dtype.kind == "i":
        assert np.array_equal(y, wanted), "integers differ"
        return
    positive = replace(problem, activation=None, padding_value=abs(problem.padding_value))
    magnitude = reference(positive, abs(x), abs(k), None if bias is None else abs(bias))
    if problem.precision == "high":
        error = np.linalg.norm((y - wanted).ravel())
        limit = 2e-5 * np.linalg.norm(magnitude.ravel())
        assert error <= limit, f"an error of {error:.3g}, and {limit:.3g} is allowed"
        return
    parts = 1 + (y.dtype.kind == "c")  # whose products are sums of two, and whose error is that of both
    answer = Answer(wanted.real, magnitude, parts * problem.products, bias is not None, y.real.dtype)
    error, limit = np.abs(y.astype(wanted.dtype) - wanted), parts * units.bound(answer).astype(np.float64)
    wrong = ~(error <= (2 if y.dtype == np.float64 else 1.001) * limit)  # the reference rounds in float64 too
    where = np.unravel_index(np.argmax(wrong), wrong.shape)
    assert not wrong.any(), (
        f"{wrong.sum()} of {y.size} elements are wrong, first at {where}: {y[where]}, not {wanted[where]}"
    )
