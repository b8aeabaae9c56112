"""The launches of ``numba_cuda.implicit_gemm_mma``, and their arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes
from gpuconv.backends.numba_cuda import channels_last, implicit_gemm_mma_kernel, implicit_gemm_run, launch, ptx
from gpuconv.backends.numba_cuda.implicit_gemm_mma import Launch
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.backends.numba_cuda.tensor_shape import THREADS

# 16-bit floats are copied as the integers of their bits.
_BITS = {"float16": "uint16", "bfloat16": "uint16", "float32": "float32"}


@lru_cache(maxsize=16)
def kernel(way: str, dtype: str, y_dtype: str) -> Any:
    """The compiled-on-demand kernel of one specialisation."""
    return launch.jit(implicit_gemm_mma_kernel.build(way, dtype, y_dtype))


@lru_cache(maxsize=4)
def turner(dtype: str) -> Any:
    """The kernel that puts channels side by side."""
    return launch.jit(channels_last.build(dtype))


def bits(array: Any) -> Any:
    """A view of an operand whose elements kernels copy, in the machine's byte order."""
    array = arrays.native(array) if isinstance(array, np.ndarray) else array
    return array.view(_BITS[array.dtype.name])


def packed(cut: Launch, k: Flat, like: Any, stream: Any) -> Any:
    """The panels of all parts."""
    problem = cut.part.problem
    kind = _BITS[problem.k_dtype]
    weights = launch.scratch(like, np.dtype(kind), max(cut.panel_size, 1))
    if cut.panel_size:
        function = implicit_gemm_run.packer(kind, cut.outputs, cut.depth, True, True)
        slots = cut.parts * cut.part_slices * cut.depth
        sizes = (problem.C // problem.groups, problem.O // problem.groups, problem.KH, problem.KW, problem.groups)
        grid = implicit_gemm_run.blocks(cut.panel_size), implicit_gemm_run.THREADS, stream
        function[grid](*k.arguments(), weights, 0, slots, *sizes)
    return weights


def run(cut: Launch, x: Flat, weights: Any, y: Flat, bias: Any, has_bias: bool, like: Any, stream: Any) -> list[Any]:
    """Make y of x and the panels; returns the vectors that the kernels use until they have run."""
    problem = cut.part.problem
    kind = dtypes.numpy_dtype(_BITS[problem.x_dtype])
    fill = np.full(ptx.VECTOR_BYTES // kind.itemsize, problem.fill, dtypes.numpy_dtype(problem.x_dtype)).view(kind)
    border = launch.vector(like, fill, kind, len(fill), stream)
    in_place = _in_place(cut, x)
    copied = None if in_place else launch.scratch(like, kind, max(cut.copy_size(cut.images), 1))
    partial = launch.scratch(like, np.dtype(np.float32), cut.partial_size(cut.images)) if cut.parts > 1 else None
    tables: list[Any] = []
    for image in range(0, problem.N, cut.images):
        images = min(cut.images, problem.N - image)
        seen = implicit_gemm_run.from_image(x, image)
        made = implicit_gemm_run.from_image(y, image)
        if not in_place:
            seen = _turned(cut, seen, copied, images, stream)
        tables = tables or implicit_gemm_run.tables(problem, seen, like, stream)  # the strides stay the same
        plane = cut.plane(images)
        into = made if partial is None else implicit_gemm_run.left_of(problem, partial, 0, plane)
        _multiply(cut, seen, border, weights, into, bias, has_bias and partial is None, tables, images, stream)
        if partial is not None:
            implicit_gemm_run.add(problem, partial, cut.parts, plane, made, bias, has_bias, images, stream)
    return [border, copied, partial, weights, tables]


def _in_place(cut: Launch, x: Flat) -> bool:
    """Whether channels already lie side by side, in whole aligned vectors."""
    itemsize = dtypes.itemsize(cut.part.problem.x_dtype)
    n, group, channel, row, column = x.strides
    steps = [launch.address(x.vector)]
    steps += [
        step * itemsize for step in (x.offset, n, group, cut.part.problem.C // cut.part.problem.groups, row, column)
    ]
    return channel == 1 and all(step % ptx.VECTOR_BYTES == 0 for step in steps)


def _turned(cut: Launch, x: Flat, copied: Any, images: int, stream: Any) -> Flat:
    """x with its channels side by side, in ``copied``."""
    problem = cut.part.problem
    side, channels = channels_last.SIDE, cut.channels
    grid = images * problem.groups * -(-channels // side) * -(-problem.H * problem.W // side)
    if grid:
        sizes = (images, problem.C // problem.groups, problem.H, problem.W, problem.groups)
        function = turner(_BITS[problem.x_dtype])
        function[grid, channels_last.THREADS, stream](*x.arguments(), copied, channels, *sizes)
    pixel = problem.groups * channels
    return Flat(copied, 0, (problem.H * problem.W * pixel, channels, 1, problem.W * pixel, pixel))


def _multiply(
    cut: Launch,
    x: Flat,
    border: Any,
    weights: Any,
    y: Flat,
    bias: Any,
    has_bias: bool,
    tables: list[Any],
    images: int,
    stream: Any,
) -> None:
    """The sums of all parts, into y or what the parts leave."""
    problem = cut.part.problem
    grid = -(-images * problem.OH * problem.OW // cut.pixels) * cut.tiles_o * problem.groups * cut.parts
    left = cut.parts > 1
    function = kernel(cut.way, problem.x_dtype, "float32" if left else problem.y_dtype)
    narrow, wide = np.int32, np.int64
    function[grid, THREADS, stream](
        x.vector,
        *map(wide, (x.offset, x.strides[0], x.strides[1])),
        *tables,
        border,
        weights,
        bias,
        has_bias,
        not left and problem.activation == "relu",
        y.vector,
        *map(wide, (y.offset, problem.O * cut.plane(images), *y.strides)),
        wide(images),
        # Channels that round C up are zeros in the copy, and none in place.
        *map(narrow, (cut.channels, problem.O // problem.groups, problem.KH, problem.KW)),
        *map(wide, (problem.OH, problem.OW)),
        narrow(problem.groups),
        *map(narrow, (cut.slices, cut.parts, cut.part_slices)),
    )
