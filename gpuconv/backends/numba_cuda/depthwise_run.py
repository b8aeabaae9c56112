"""The launch of ``numba_cuda.depthwise``: which specialisation reads and writes what, and its arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import depthwise_kernel, depthwise_loads, depthwise_shape, launch, ptx, uploads
from gpuconv.backends.numba_cuda.depthwise_shape import Block, Shape
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.problem import Conv2dProblem

# The kernel's types of what it is handed.
_narrow, _wide = np.int32, np.int64


@lru_cache(maxsize=128)
def kernel(shape: Shape, dtype: str, reader: str, load: str, vectors: bool) -> Any:
    """The compiled-on-demand kernel of one specialisation."""
    return launch.jit(depthwise_kernel.build(shape, dtype, reader, load, vectors), depthwise_shape.REGISTERS)


def run(problem: Conv2dProblem, x: Flat, k: Flat, y: Flat, bias: Any, has_bias: bool, like: Any, stream: Any) -> Any:
    """Make y of x and k by a forward ``problem``; returns the table that the kernel uses until it has run."""
    made = block_of(problem, x)
    load = load_of(problem, made, x)
    function = kernel(made.shape, problem.x_dtype, reader_of(problem), load, in_vectors(problem, made, y))
    tables, reads = _reads(problem, made, like, stream)
    C, O = problem.C // problem.groups, problem.O // problem.groups
    sizes = C, O, problem.H, problem.W, problem.KH, problem.KW, problem.OH, problem.OW, problem.groups
    fill = dtypes.numpy_dtype(problem.sum_dtype).type(problem.fill)
    most = depthwise_shape.MOST // max(made.tiles(problem), 1)  # images
    for image in range(0, problem.N, most):
        tiles = min(most, problem.N - image) * made.tiles(problem)
        grid = min(tiles, launch.MAX_GRID_X), made.threads, stream, made.shared_bytes
        function[*grid](
            *x.start(0, image).wide(), *k.wide(), bias, has_bias, problem.activation == "relu",
            *y.start(0, image).wide(), *map(_narrow, sizes), fill,
            tables, *reads, *map(_narrow, numbers(problem, made, load, tiles)),
        )  # fmt: skip
    return tables


def numbers(problem: Conv2dProblem, made: Block, load: str, tiles: int) -> tuple[int, ...]:
    """The last arguments of the kernel, from ``tiles`` on."""
    shape, side, rows, columns = made.shape, made.shape.side, made.rows, made.columns
    near = shape.stride is not None
    lead = -problem.padding[1][0] % (ptx.VECTOR_BYTES // dtypes.itemsize(problem.x_dtype))
    lead = lead if load == "along_columns" else 0
    units, at_a_time = depthwise_loads.units_of(load, problem.x_dtype, made.threads, lead, columns.entries)
    plane = made.taps_h * made.taps_w
    x_tap = columns.local_inner * side
    return (
        tiles, *made.shares(problem)[:4], made.threads_h * shape.rows, made.threads_w * shape.columns,
        made.groups, made.threads_h, made.threads_w, made.taps_h, made.taps_w, 1 if near else made.threads_w,
        rows.entries, columns.entries, made.pitch,
        lead, units, at_a_time % units, at_a_time // units % rows.entries, at_a_time // units // rows.entries,
        rows.entries * made.pitch if side == 1 else 1,
        shape.rows * rows.local_outer * made.pitch * side,
        (shape.placed(shape.columns * columns.local_outer) if near else columns.local_outer) * side,
        (1 if near else rows.local_inner) * made.pitch * side,
        made.threads_w * columns.local_outer * side, x_tap,
        shape.placed(shape.taps) * side if near else shape.taps * x_tap,
        made.image, made.groups * shape.outputs * plane, shape.outputs * plane if side == 1 else 1,
        plane * side, made.taps_w * side,
    )  # fmt: skip


def block_of(problem: Conv2dProblem, x: Flat) -> Block:
    """The block, by what of x is contiguous in memory: groups, or rows."""
    channels_last = 0 < abs(x.strides[1]) < abs(x.strides[4])
    made = depthwise_shape.block(problem, depthwise_shape.side_of(problem, channels_last))
    assert made is not None
    return made


def reader_of(problem: Conv2dProblem) -> str:
    """How a position is looked up."""
    return "inside" if depthwise_shape.arithmetic(problem) else "tabled"


def load_of(problem: Conv2dProblem, made: Block, x: Flat) -> str:
    """How the kernel reads x: in vectors where groups or rows are contiguous, and everything else is whole vectors."""
    lanes = ptx.VECTOR_BYTES // dtypes.itemsize(problem.x_dtype)
    n, group, channel, row, column = x.strides
    if made.shape.side > 1:
        whole = group == 1 and problem.groups % lanes == 0 and x.in_vectors(problem.x_dtype, (n, channel, row, column))
        return "across_groups_in_vectors" if whole else "across_groups"
    whole = column == 1 and problem.W % lanes == 0 and x.in_vectors(problem.x_dtype, (n, group, channel, row))
    near = made.shape.stride is not None and depthwise_shape.arithmetic(problem)
    return "along_columns" if whole and near else "by_element"


def in_vectors(problem: Conv2dProblem, made: Block, y: Flat) -> bool:
    """Whether the kernel writes y in vectors: rows are contiguous, and everything else is whole vectors."""
    lanes = ptx.VECTOR_BYTES // dtypes.itemsize(problem.y_dtype)
    whole = y.strides[4] == 1 and problem.OW % lanes == 0 and y.in_vectors(problem.y_dtype, y.strides[:4])
    return whole and made.shape.side == 1 and made.shape.stride is not None


def _reads(problem: Conv2dProblem, made: Block, like: Any, stream: Any) -> tuple[Any, tuple[Any, ...]]:
    """The table, of rows and then columns, or a number where none is read, and how a tile reads each axis."""
    axes = zip((made.rows, made.columns), depthwise_shape.steps_of(problem), strict=True)
    steps = [(outer, inner, axis.run, axis.step) for axis, (outer, inner) in axes]
    if depthwise_shape.arithmetic(problem):
        tables, ends = _narrow(0), [(-low, 0) for low, _ in problem.padding]
    else:
        tables = uploads.joined_tables(problem, like, stream)
        start, columns = problem.table_spans(problem.OH, problem.OW)
        ends = [(0, start - 1), (start, start + columns - 1)]
    number = _wide if made.shape.stride is None else _narrow
    return tables, tuple(
        number(value)
        for (first, last), (outer, inner, run, step) in zip(ends, steps, strict=True)
        for value in (first, outer, inner, last, run, step)
    )
