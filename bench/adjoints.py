"""Operands and right answers of both gradients: each is a forward convolution, which the loops of ``check`` can do.

dx[n,c,h,w] = Σ_opq dy with zeros between its pixels · k, turned by 180°, its two channel axes exchanged
dk[o,c,p,q] = Σ_nij x, images and channels exchanged · dy, likewise, stride and dilation exchanged
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from bench import check
from bench.check import Accuracy, Arrays, Truth
from gpuconv import dtypes
from gpuconv.problem import NO_PADS, Conv2dProblem


def operands(problem: Conv2dProblem) -> Arrays:
    """Random operands of any op: ``x`` is the first, ``k`` the second."""
    if problem.op == "forward":
        return check.operands(problem)
    rng = np.random.default_rng(zlib.crc32(str(problem).encode()))
    dtype = dtypes.numpy_dtype(problem.x_dtype)
    first, second = problem.operand_shapes
    if second is None:
        raise ValueError(f"the benchmarks take convolutions and their gradients; got {problem}")
    x = rng.standard_normal(first, np.float32).astype(dtype)
    k = (rng.standard_normal(second, np.float32) / np.sqrt(max(problem.products, 1))).astype(dtype)
    if problem.layout == "NHWC":
        x = x.transpose(0, 2, 3, 1)
        k = k.transpose(0, 2, 3, 1) if problem.op == "weight_grad" else k
    return Arrays(np.ascontiguousarray(x), np.ascontiguousarray(k), None)


def truth(problem: Conv2dProblem, given: Arrays, affordable: int) -> Truth:
    """The right answer for any op."""
    if problem.op == "forward":
        return Truth(problem, given, affordable)
    return _Adjoint(problem, given, affordable)


class _Adjoint(Truth):
    """Judges a gradient as the forward convolution that it is."""

    def __init__(self, problem: Conv2dProblem, given: Arrays, affordable: int) -> None:
        lower = _input_gradient if problem.op == "input_grad" else _weight_gradient
        self.weight = problem.op == "weight_grad"
        super().__init__(*lower(problem, given), affordable)

    def judge(self, y: np.ndarray) -> Accuracy:
        return super().judge(y.transpose(1, 0, 2, 3) if self.weight and y.ndim == 4 else y)


def _first(problem: Conv2dProblem, array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 3, 1, 2) if problem.layout == "NHWC" else array


def _input_gradient(problem: Conv2dProblem, given: Arrays) -> tuple[Conv2dProblem, Arrays]:
    dy, groups = _first(problem, given.x), problem.groups
    apart = [(extent - 1) * step + 1 for extent, step in zip(dy.shape[2:], problem.stride, strict=True)]
    x = np.zeros((*dy.shape[:2], *apart), dy.dtype)
    x[:, :, :: problem.stride[0], :: problem.stride[1]] = dy
    k = given.k.reshape(groups, problem.O // groups, -1, problem.KH, problem.KW).swapaxes(1, 2)
    k = k.reshape(problem.C, problem.O // groups, problem.KH, problem.KW)[:, :, ::-1, ::-1]
    x = _bordered(x, problem, (problem.H, problem.W), (problem.KH, problem.KW), problem.dilation, True)
    return _forward(problem, x, k, problem.C, (1, 1), problem.dilation, groups)


def _weight_gradient(problem: Conv2dProblem, given: Arrays) -> tuple[Conv2dProblem, Arrays]:
    x, dy, groups = _first(problem, given.x), _first(problem, given.k), problem.groups
    x = _bordered(x, problem, (problem.KH, problem.KW), dy.shape[2:], problem.stride, False, problem.dilation)
    N, C, H, W = x.shape
    x = x.reshape(N, groups, C // groups, H, W).transpose(2, 1, 0, 3, 4).reshape(C // groups, groups * N, H, W)
    k = dy.transpose(1, 0, 2, 3)
    return _forward(problem, x, k, problem.O, problem.dilation, problem.stride, groups)


def _bordered(
    x: np.ndarray,
    problem: Conv2dProblem,
    outputs: tuple[int, ...],
    taps: tuple[int, ...],
    spacing: tuple[int, int],
    turned: bool,
    steps: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """x with zeros around it, or cropped, so that windows of ``taps`` fit in it ``outputs`` times."""
    for axis in (0, 1):
        low = problem.padding[axis][0]
        low = (taps[axis] - 1) * spacing[axis] - low if turned else low
        needed = (outputs[axis] - 1) * steps[axis] + (taps[axis] - 1) * spacing[axis] + 1
        high = needed - low - x.shape[2 + axis]
        border = [(0, 0)] * 4
        border[2 + axis] = max(low, 0), max(high, 0)
        x = np.pad(x, border)
        inside = [slice(None)] * 4
        inside[2 + axis] = slice(max(-low, 0), x.shape[2 + axis] - max(-high, 0))
        x = x[tuple(inside)]
    return x


def _forward(
    problem: Conv2dProblem,
    x: np.ndarray,
    k: np.ndarray,
    outputs: int,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[Conv2dProblem, Arrays]:
    N, C, H, W = x.shape
    lowered = replace(
        problem, op="forward", N=N, C=C, H=H, W=W, O=outputs, KH=k.shape[2], KW=k.shape[3], stride=stride,
        dilation=dilation, padding=NO_PADS, groups=groups, layout="NCHW", kernel_layout="OIHW", conjugate=False,
    )  # fmt: skip
    return lowered, Arrays(np.ascontiguousarray(x), np.ascontiguousarray(k), None)
