"""Convolution of few channels on a GPU: depthwise, with or without a multiplier, and image filters.

Such sums are short, and what they cost is the way of x and y through memory. The kernel is in ``depthwise_kernel``, what
it computes at a time in ``depthwise_shape``, and its launch in ``depthwise_run``.

No GPU has run this yet: it runs when asked for by name, and ``explain`` says so.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import depthwise_shape, direct, launch
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.depthwise"
DEVICE = "cuda"
ARRAYS = "any"
OPS = frozenset(("forward", "input_grad"))
EXPERIMENTAL = True

_DTYPES = ("float32", "float64", "float16", "bfloat16")
# Channels of a group. With more of either, x is read again and again: that is work for a matrix product.
_INPUTS, _OUTPUTS = 5, 32
# Taps of one axis, and table entries: what the kernel counts in 32 bits, less what a tile may add.
_MOST = 2**30

unavailable = launch.unavailable
pack_key = direct.pack_key
pack = direct.pack


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Other element types, more channels in a group, and kernels or tables longer than 32 bits can count."""
    reasons = []
    kinds = (problem.x_dtype, problem.k_dtype, problem.y_dtype)
    if kinds not in ((name,) * 3 for name in _DTYPES):
        got = " × ".join(kinds[:2]) + f" → {kinds[2]}"
        reasons.append(f"takes {', '.join(_DTYPES)}, all operands alike; got {got}; convert them")
    inputs, outputs = problem.C // problem.groups, problem.O // problem.groups
    if problem.op == "input_grad":
        inputs, outputs = outputs, inputs
    for what, count, most in (("read", inputs, _INPUTS), ("made", outputs, _OUTPUTS)):
        if count > most:
            reasons.append(
                f"is for up to {most} channels {what} per group; got {count}; use backend='numba_cuda.direct' or "
                "'numba_cuda.implicit_gemm'"
            )
    entries = max((part.problem.table_bytes() // 8 for part in direct.parts(problem)), default=0)
    if not depthwise_shape.arithmetic(problem) and entries > _MOST:
        reasons.append(f"counts up to {_MOST} table entries; got {entries}; use backend='numba_cuda.direct'")
    if max(problem.KH, problem.KW) > _MOST:
        reasons.append(f"counts up to {_MOST} taps of an axis; got {problem.KH}×{problem.KW}")
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
    side = depthwise_shape.SIDE if problem.layout == "NHWC" and problem.groups > 1 else 1
    made = depthwise_shape.block(problem, side) or depthwise_shape.block(problem, 1)
    assert made is not None, "the smallest block fits always"
    told = f"a thread makes {made.shape}, a block {made.threads_h}×{made.threads_w} of these for {made.groups} group(s)"
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
        bias = launch.vector(like, operands.bias, dtypes.numpy_dtype(problem.sum_dtype), 1, stream)
        held = []  # until the stack unwinds: what was uploaded must outlive the kernels
        for part in plan.config["parts"]:
            of_x, of_k, of_y = direct.views(problem, part, x, k, y)
            has_bias = operands.bias is not None
            held.append(depthwise_run.run(part.problem, of_x, of_k, of_y, bias, has_bias, like, stream))
