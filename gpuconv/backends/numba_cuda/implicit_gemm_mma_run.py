"""The launches of ``numba_cuda.implicit_gemm_mma``, and their arguments."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes
from gpuconv.backends.numba_cuda import (
    channels_last,
    implicit_gemm_mma_kernel,
    implicit_gemm_run,
    launch,
    ptx,
    uploads,
)
from gpuconv.backends.numba_cuda.implicit_gemm_mma import Launch
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.backends.numba_cuda.replay import Step
from gpuconv.backends.numba_cuda.tensor_shape import TensorTile
from gpuconv.backends.protocol import Operands

# 16-bit floats are copied as the integers of their bits.
_BITS = {"float16": "uint16", "bfloat16": "uint16", "float32": "float32"}


@lru_cache(maxsize=64)
def kernel(tile: TensorTile, way: str, dtype: str, y_dtype: str) -> Any:
    """The compiled-on-demand kernel of one specialisation."""
    body = implicit_gemm_mma_kernel.build(tile, way, dtype, y_dtype)
    return launch.jit(body, tile.registers, tile.dynamic_bytes)


@lru_cache(maxsize=4)
def turner(dtype: str, together: bool) -> Any:
    """The kernel that puts channels side by side."""
    return launch.jit(channels_last.build(dtype, together))


def bits(array: Any) -> Any:
    """A view of an operand whose elements kernels copy, in the machine's byte order."""
    if isinstance(array, Flat):
        vector = array.vector
        return Flat(vector.view(np.uint16) if vector.dtype == np.float16 else vector, array.offset, array.strides)
    array = arrays.native(array) if isinstance(array, np.ndarray) else array
    return array.view(_BITS[array.dtype.name])


def in_words(operands: Operands) -> Operands:
    """The operands as such views; k only where it is read, because it may have to be copied."""
    k = operands.k if operands.packed is not None else bits(operands.k)
    return replace(operands, x=bits(operands.x), k=k)


def packed(cut: Launch, k: Flat, like: Any, stream: Any) -> Any:
    """The panels of all parts."""
    weights = launch.scratch(like, np.dtype(_BITS[cut.part.problem.k_dtype]), max(cut.parts * cut.panel_size, 1))
    for step in _pack(cut, k, weights, 0, cut.parts):
        step.run(stream)
    return weights


def _pack(cut: Launch, k: Flat, weights: Any, part: int, parts: int) -> list[Step]:
    """The launch that makes panels of ``parts`` parts from ``part`` on, in ``weights``; none of a sum of nothing."""
    problem, slots = cut.part.problem, cut.part_slices * cut.depth
    if cut.panel_size == 0:
        return []
    together = cut.together
    function = implicit_gemm_run.packer(
        _BITS[problem.k_dtype], cut.tile.outputs, cut.depth, True, True, together is not None
    )
    images, column = 1, 0
    if together is not None:
        images, column = problem.C // problem.groups // together.columns, k.strides[4]
        k = replace(k, strides=(*k.strides[:4], together.columns * column))
    sizes = (problem.C // problem.groups, problem.O // problem.groups, problem.KH, problem.KW, problem.groups)
    arguments = (*k.arguments(), weights, part * slots, parts * slots, *sizes, images, column)
    return [Step(function, implicit_gemm_run.blocks(parts * cut.panel_size), implicit_gemm_run.THREADS, arguments)]


def steps(cut: Launch, x: Flat, k: Any, y: Flat, bias: Any, has_bias: bool, like: Any, stream: Any) -> list[Step]:
    """The launches that make y of x and k, a Flat or its panels."""
    problem = cut.part.problem
    kind = dtypes.numpy_dtype(_BITS[problem.x_dtype])
    fill = np.full(ptx.VECTOR_BYTES // kind.itemsize, problem.fill, dtypes.numpy_dtype(problem.x_dtype)).view(kind)
    border = uploads.KEPT.get(like, stream, np.frombuffer, fill.tobytes(), kind)
    weights = k
    if isinstance(k, Flat):
        weights = launch.scratch(like, kind, max(cut.parts_packed * cut.panel_size, 1))
    in_place = _in_place(cut, x)
    copied = None if in_place else launch.scratch(like, kind, max(cut.copy_size(cut.images), 1))
    partial = launch.scratch(like, np.dtype(np.float32), cut.partial_size(cut.images)) if cut.parts > 1 else None
    tables: list[Any] = []
    made: list[Step] = []
    # Both loops go round once where the scratch has room for all images and parts.
    for image in range(0, problem.N, cut.images):
        images = min(cut.images, problem.N - image)
        of_x, of_y = x.start(0, image), y.start(0, image)
        if not in_place:
            made += _turn(cut, of_x, copied, images)
            of_x = _turned(cut, copied)
        tables = tables or implicit_gemm_run.tables(problem, of_x, like, stream)  # the strides stay the same
        plane = cut.plane(images)
        for part in range(0, cut.parts, cut.parts_packed):
            parts = min(cut.parts_packed, cut.parts - part)
            if isinstance(k, Flat) and (image == 0 or parts < cut.parts):
                made += _pack(cut, k, weights, part, parts)
            into = of_y if partial is None else implicit_gemm_run.left_of(problem, partial, part, plane)
            made.append(_multiply(cut, of_x, border, weights, into, bias, has_bias, tables, images, part, parts))
        if partial is not None:
            made.append(implicit_gemm_run.add(problem, partial, cut.parts, plane, of_y, bias, has_bias, images))
    return made


def _in_place(cut: Launch, x: Flat) -> bool:
    """Whether channels already lie side by side, in whole aligned vectors."""
    if cut.together is not None:
        return False
    problem = cut.part.problem
    n, group, channel, row, column = x.strides
    return channel == 1 and x.in_vectors(problem.x_dtype, (n, group, problem.C // problem.groups, row, column))


def _turn(cut: Launch, x: Flat, copied: Any, images: int) -> list[Step]:
    """The launch that copies x with its channels side by side; none where there is nothing to copy."""
    problem = cut.part.problem
    channels, grid = cut.channels, cut.turning_blocks(images)
    sizes = (images, problem.C // problem.groups, problem.H, problem.W, problem.groups)
    together = cut.together
    places = (1, 0, 0, 0)
    if together is not None:
        places = sizes[1] // together.columns, together.width, together.left, together.step
    function = turner(_BITS[problem.x_dtype], together is not None)
    return (
        [Step(function, grid, channels_last.THREADS, (*x.arguments(), copied, channels, *sizes, *places))]
        if grid
        else []
    )


def _turned(cut: Launch, copied: Any) -> Flat:
    """The copy as an operand."""
    problem, channels = cut.part.problem, cut.channels
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
    part: int,
    parts: int,
) -> Step:
    """The sums of ``parts`` parts from ``part`` on, into y or what the parts leave."""
    problem, tile = cut.part.problem, cut.tile
    grid = cut.blocks(images, parts)
    left = cut.parts > 1
    function = kernel(tile, cut.way, problem.x_dtype, "float32" if left else problem.y_dtype)
    narrow, wide = np.int32, np.int64
    arguments = (
        x.vector,
        *map(wide, (x.offset, x.strides[0], x.strides[1])),
        *tables,
        border,
        weights,
        bias,
        has_bias and not left,
        not left and problem.activation == "relu",
        y.vector,
        *map(wide, (y.offset, problem.O * cut.plane(images), *y.strides)),
        wide(images),
        # Channels that round C up are zeros in the copy, and none in place.
        *map(narrow, (cut.channels, problem.O // problem.groups, problem.KH, problem.KW)),
        *map(wide, (problem.OH, problem.OW)),
        narrow(problem.groups),
        *map(narrow, (cut.slices, part, parts, cut.part_slices)),
    )
    return Step(function, grid, tile.threads, arguments)
