"""Compiling ahead: a small problem for each kernel of each implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpuconv import dispatch, dtypes, request
from gpuconv.backends.numba_cpu import runtime
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

# Problems that between them reach every kernel; an implementation runs those that it can.
_PROBLEMS = (
    "n2c20h9w9_o18kh3kw3_p1",
    "n2c20h9w9_o18kh3kw3_s2p1",
    "n2c20h9w9_o18kh1kw1",
    "n2c20h9w9_o20kh3kw3_p1g20",
    "n2c20h9w9_o20kh3kw3_s2p1g20",
    "n1c1h40w80_o1kh3kw3_p1",
    "n1c1h40w80_o1kh5kw5_p2",
    "n1c1h40w80_o1kh7kw7_p3",
)
DTYPES = ("float32", "float64", "float16", "bfloat16")


def steps(wanted: Sequence[str] = ("float32",)) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what, do) for everything that may have to be compiled for arrays of the ``wanted`` dtypes."""
    yield "threads", _start
    for name in dispatch.serving("forward", "cpu"):
        if dispatch.library_of(name) != "numba_cpu":
            continue
        for dtype in wanted:
            short = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}[dtype]
            for line in _PROBLEMS:
                for layout in ("", "_nhwc"):
                    for precision in ("", "_high"):
                        problem = Conv2dProblem.parse(f"{line}_{short}{layout}{precision}")
                        target = Target("cpu", None, runtime.thread_count(), separable=True)  # weights of zero are
                        if not dispatch.implementation(name).unsupported(problem, target):
                            yield f"{name} {problem}", lambda n=name, p=problem, t=target: _run(n, p, t)  # type: ignore[misc]


def _start() -> None:
    runtime.starter(False)
    runtime.starter(True)


def _run(name: str, problem: Conv2dProblem, target: Target) -> None:
    implementation = dispatch.implementation(name)
    dtype = dtypes.numpy_dtype(problem.x_dtype)
    shape = problem.x_shape if problem.layout == "NCHW" else tuple(problem.x_shape[axis] for axis in (0, 2, 3, 1))
    result = problem.y_shape if problem.layout == "NCHW" else tuple(problem.y_shape[axis] for axis in (0, 2, 3, 1))
    x, k, y = np.zeros(shape, dtype), np.zeros(problem.k_shape, dtype), np.empty(result, dtype)
    plan = implementation.plan(problem, target, 1 << 28)
    views = [request.view(problem, which, array) for which, array in enumerate((x, k, y))]
    operands = Operands(views[0], views[1])
    implementation.run(plan, operands, views[2])
    operands.packed = implementation.pack(plan, operands)
    implementation.run(plan, operands, views[2])
