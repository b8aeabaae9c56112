"""Convolution of few channels on a GPU: depthwise, with or without a multiplier, and image filters.

Such sums are short, and what they cost is the way of x and y through memory. The kernel is in ``depthwise_kernel``,
what it computes at a time in ``depthwise_shape``, and its launch in ``depthwise_run``.

No GPU has run this yet: it runs when asked for by name, and ``explain`` says so.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import depthwise_shape, direct, launch, uploads
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.depthwise"
DEVICE = "cuda"
ARRAYS = "any"
OPS = frozenset(("forward", "input_grad"))
EXPERIMENTAL = True

DTYPES = ("float32", "float64", "float16", "bfloat16")
# Channels of a group. With more of either, x is read again and again: that is work for a matrix product.
_INPUTS, _OUTPUTS = 5, 32

unavailable = launch.unavailable
pack_key = direct.pack_key
pack = direct.pack


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Other element types, more channels in a group, and kernels or tables longer than 32 bits can count."""
    reasons = []
    kinds = (problem.x_dtype, problem.k_dtype, problem.y_dtype)
    if kinds not in ((name,) * 3 for name in DTYPES):
        got = " × ".join(kinds[:2]) + f" → {kinds[2]}"
        reasons.append(f"takes {', '.join(DTYPES)}, all operands alike; got {got}; convert them")
    inputs, outputs = problem.C // problem.groups, problem.O // problem.groups
    if problem.op == "input_grad":
        inputs, outputs = outputs, inputs
    for what, count, most in (("read", inputs, _INPUTS), ("made", outputs, _OUTPUTS)):
        if count > most:
            reasons.append(
                f"is for up to {most} channels {what} per group; got {count}; use backend='numba_cuda.direct' or "
                "'numba_cuda.implicit_gemm'"
            )
    lowered = direct.parts(problem)
    entries = [part.problem.table_bytes() // 8 for part in lowered if not depthwise_shape.arithmetic(part.problem)]
    extents = max(max(problem.x_shape[1:]), max(problem.y_shape[1:]), problem.KH, problem.KW)
    image = max(math.prod(part.problem.y_shape[1:]) for part in lowered) if lowered else 0
    counts = ("extents", extents), ("results of one image", image), ("table entries", max(entries, default=0))
    for what, count in counts:
        if count > depthwise_shape.MOST:
            reasons.append(f"counts {what} up to {depthwise_shape.MOST}; got {count}; use backend='numba_cuda.direct'")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the blocks; the only scratch are index tables, of paddings that need them, and the bias as it is added."""
    lowered = direct.parts(problem)
    scratch = sum(part.problem.table_bytes() for part in lowered if not depthwise_shape.arithmetic(part.problem))
    scratch += problem.result_channels * dtypes.itemsize(problem.sum_dtype)
    if scratch > limit:
        raise MemoryError(f"{NAME} on {problem} needs {scratch} bytes of scratch and workspace_limit is {limit}")
    return Plan(problem, scratch, problem.sum_dtype, _told(lowered), {"parts": lowered})


def _told(lowered: tuple[direct.Part, ...]) -> str:
    """The choices in a few words, for explain."""
    if not lowered:
        return "nothing to compute"
    problem = lowered[-1].problem
    made = depthwise_shape.block(problem, depthwise_shape.side_of(problem, problem.layout == "NHWC"))
    assert made is not None
    told = f"a thread makes {made.shape}, a block {made.threads_h}×{made.threads_w} of these for {made.groups} group(s)"
    told += ", a rule of thumb, not measured"
    return told + (f", {len(lowered)} launches" if len(lowered) > 1 else "")


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Launch the kernel on NumPy operands (uploaded and downloaded here) or on CuPy ones, on the given stream."""
    from gpuconv.backends.numba_cuda import depthwise_run

    problem, like = plan.problem, operands.x
    with ExitStack() as stack:
        stack.enter_context(launch.on_gpu(operands.ordinal))
        stream = launch.stream(operands.stream, like)
        y = stack.enter_context(launch.output(out, stream))
        x = launch.flat(like, stream)
        k = launch.flat(operands.k, stream) if operands.packed is None else operands.packed
        bias = uploads.vector(like, operands.bias, dtypes.numpy_dtype(problem.sum_dtype), 1, stream)
        held = []  # until the stack unwinds: what was uploaded must outlive the kernels
        for part in plan.config["parts"]:
            of_x, of_k, of_y = direct.views(problem, part, x, k, y)
            has_bias = operands.bias is not None
            held.append(depthwise_run.run(part.problem, of_x, of_k, of_y, bias, has_bias, like, stream))
