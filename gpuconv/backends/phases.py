"""The input gradient as forward convolutions, one for each residue of the result's positions modulo the stride.

    dx[n,c,h,w] = Σ_opq dy[n,o, (h + pad - p·d) / s, (w + pad - q·d) / s] · k[o,c,p,q]     where the divisions are exact

With g = gcd(s, d), the taps p0, p0 + s/g, p0 + 2·s/g, … divide exactly for the same rows h, which lie s apart, and from
one such row to the next they read dy one row further: a convolution of stride 1 and dilation d/g, its taps in reverse.
No product with the zeros of a dilated dy is ever made, nothing is scattered, and every implementation that has a
forward convolution has the gradient. Rows that no tap divides are never touched by the forward convolution: their
gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.backends.protocol import Operands, Plan
from gpuconv.geometry import Pair, window
from gpuconv.problem import Conv2dProblem


@dataclass(frozen=True)
class AxisPhase:
    """One axis of a phase: which taps make which outputs, and the padding of the forward convolution."""

    taps: slice  # of the kernel, backwards
    outputs: slice  # of the result
    k: int
    pads: Pair
    dilation: int


def axis_phases(n: int, k: int, outputs: int, before: int, stride: int, dilation: int) -> list[AxisPhase]:
    """The phases of an axis of ``n`` inputs, of which the forward convolution makes ``outputs``."""
    common = gcd(stride, dilation)
    tap_step, reach = stride // common, dilation // common
    found = []
    for p in range(min(k, tap_step)):
        taps = -(-(k - p) // tap_step)
        first = (p * dilation - before) % stride
        if first >= n:
            continue
        count = -(-(n - first) // stride)
        # The row of dy that tap p reads for the first output; later taps read `reach` rows less each.
        source = (first + before - p * dilation) // stride
        low = (taps - 1) * reach - source
        pads = low, count + window(taps, reach) - 1 - outputs - low
        last = p + (taps - 1) * tap_step
        backwards = slice(last, p - tap_step if p >= tap_step else None, -tap_step)
        found.append(AxisPhase(backwards, slice(first, None, stride), taps, pads, reach))
    return found


@dataclass(frozen=True)
class Phase:
    """A forward convolution that makes part of an input gradient."""

    problem: Conv2dProblem
    rows: AxisPhase
    columns: AxisPhase


def phases(problem: Conv2dProblem) -> list[Phase]:
    """The forward convolutions that make the input gradient ``problem``."""
    (top, _), (left, _) = problem.padding
    rows = axis_phases(problem.H, problem.KH, problem.OH, top, problem.stride[0], problem.dilation[0])
    columns = axis_phases(problem.W, problem.KW, problem.OW, left, problem.stride[1], problem.dilation[1])
    return [
        Phase(
            replace(
                problem, op="forward", C=problem.O, H=problem.OH, W=problem.OW, O=problem.C, KH=row.k, KW=column.k,
                stride=(1, 1), padding=(row.pads, column.pads), dilation=(row.dilation, column.dilation),
                flip=False, kernel_layout="OIHW",
            ),
            row,
            column,
        )
        for row in rows
        for column in columns
    ]  # fmt: skip


def plan(plan_forward: Callable[[Conv2dProblem], Plan], problem: Conv2dProblem) -> Plan:
    """A plan of all phases, each by ``plan_forward``; they run one after the other."""
    found = phases(problem)
    parts = [(phase, plan_forward(phase.problem)) for phase in found]
    if not parts:  # every tap misses the result, which is a crop of what they reach
        return Plan(problem, 0, problem.sum_dtype, "no tap reaches the result", {"parts": [], "complete": False})
    detail = f"{len(parts)} forward convolution(s) of stride 1, the first: {parts[0][1].detail}"
    config = {"parts": parts, "complete": complete(problem, found)}
    return Plan(problem, max(part.workspace for _, part in parts), parts[0][1].sums_in, detail, config)


def complete(problem: Conv2dProblem, found: list[Phase]) -> bool:
    """Whether the phases make every element of the result."""
    made = sum(phase.problem.OH * phase.problem.OW for phase in found)
    return made == problem.H * problem.W


def operands_of(phase: Phase, operands: Operands) -> Operands:
    """The operands of a phase: dy whole, the phase's taps of k, its outputs and inputs exchanged."""
    return replace(operands, k=operands.k.swapaxes(1, 2)[..., phase.rows.taps, phase.columns.taps])


def run(run_forward: Callable[[Plan, Operands, Any], None], plan: Plan, operands: Operands, out: Any) -> None:
    """Write the input gradient into ``out``, (N, G, C/G, H, W), phase by phase."""
    if not plan.config["complete"]:
        fill_with_bias(plan.problem, operands.bias, out)
    for phase, part in plan.config["parts"]:
        run_forward(part, operands_of(phase, operands), out[..., phase.rows.outputs, phase.columns.outputs])


def fill_with_bias(problem: Conv2dProblem, bias: Any | None, out: Any) -> None:
    """Write a sum of no products, which is the bias or zero, into ``out``: (N, G, channels, rows, columns)."""
    out[...] = 0
    if bias is not None:
        with np.errstate(all="ignore"):
            values = bias.astype(dtypes.numpy_dtype(problem.sum_dtype))
            if problem.activation == "relu":
                values = values.clip(0, None)
            out[...] = values.astype(out.dtype).reshape((1, problem.groups, -1, 1, 1))
