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
    "n2c20h9w9_o64kh3kw3_p1",
    "n2c20h9w9_o18kh3kw3_s2p1",
    "n2c20h9w9_o18kh1kw1",
    "n2c20h9w9_o20kh3kw3_p1g20",
    "n2c20h9w9_o20kh3kw3_s2p1g20",
    "n1c1h40w80_o1kh3kw3_p1",
    "n1c1h40w80_o1kh5kw5_p2",
    "n1c1h40w80_o1kh7kw7_p3",
    "n1c1h40w80_o1kh9kw9_p4",
    "n1c1h1w400_o1kh1kw65_p0x32",
)
# Of implementations that serve input gradients alone.
_INPUT_GRADIENTS = ("n2c20h9w9_o20kh3kw3_s2p1g20",)
# Of weight gradients: few output channels, and each number of vectors of them.
_WEIGHT_GRADIENTS = tuple(f"n2c20h9w9_o{outputs}kh3kw3_p1" for outputs in (4, 16, 32, 48, 64))
DTYPES = ("float32", "float64", "float16", "bfloat16")


def steps(wanted: Sequence[str] = ("float32",)) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what, do) for everything that may have to be compiled for arrays of the ``wanted`` dtypes."""
    yield "threads", _start
    convolving = dispatch.serving("forward", "cpu")
    for op, lines, endings in (
        ("forward", _PROBLEMS, ("", "_high")),
        ("input_grad", _INPUT_GRADIENTS, ("_dgrad",)),
        ("weight_grad", _WEIGHT_GRADIENTS, ("_wgrad",)),
    ):
        for name in dispatch.serving(op, "cpu"):
            if dispatch.library_of(name) == "numba_cpu" and (op != "input_grad" or name not in convolving):
                yield from _of(name, lines, endings, wanted)


def _of(
    name: str, lines: Sequence[str], endings: Sequence[str], wanted: Sequence[str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    target = Target("cpu", None, runtime.thread_count(), separable=True)  # weights of zero are
    for dtype in wanted:
        short = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}[dtype]
        for line in lines:
            for layout in ("", "_nhwc"):
                for more in endings:
                    problem = Conv2dProblem.parse(f"{line}{layout}{more}_{short}")
                    if not dispatch.implementation(name).unsupported(problem, target):
                        yield f"{name} {problem}", lambda p=problem: _run(name, p, target)  # type: ignore[misc]


def _start() -> None:
    runtime.starter(False)
    runtime.starter(True)


def _run(name: str, problem: Conv2dProblem, target: Target) -> None:
    implementation = dispatch.implementation(name)
    dtype = dtypes.numpy_dtype(problem.x_dtype)
    images = [problem.x_shape, problem.y_shape]
    if problem.layout == "NHWC":
        images = [(N, H, W, C) for N, C, H, W in images]
    first, last = (np.zeros(shape, dtype) for shape in images)
    kernel = np.zeros(problem.k_shape, dtype)
    x, k, y = {
        "forward": (first, kernel, last), "input_grad": (last, kernel, first), "weight_grad": (first, last, kernel),
    }[problem.op]  # fmt: skip
    plan = implementation.plan(problem, target, 1 << 28)
    views = [request.view(problem, which, array) for which, array in enumerate((x, k, y))]
    operands = Operands(views[0], views[1])
    implementation.run(plan, operands, views[2])
    operands.packed = implementation.pack(plan, operands)
    implementation.run(plan, operands, views[2])
