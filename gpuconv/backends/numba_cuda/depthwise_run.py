"""The launch of ``numba_cuda.depthwise``: which specialisation reads and writes what, and its arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import depthwise_kernel, depthwise_shape, launch, ptx
from gpuconv.backends.numba_cuda.depthwise_shape import SIDE, Block, Shape
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.problem import Conv2dProblem

# The kernel's types of what it is handed.
_narrow, _wide = np.int32, np.int64


@lru_cache(maxsize=128)
def kernel(shape: Shape, dtype: str, reader: str, load: str, vectors: bool) -> Any:
    """The compiled-on-demand kernel of one specialisation."""
    return launch.jit(depthwise_kernel.build(shape, dtype, reader, load, vectors))


def run(problem: Conv2dProblem, x: Flat, k: Flat, y: Flat, bias: Any, has_bias: bool, like: Any, stream: Any) -> Any:
    """Make y of x and k by a forward ``problem``; returns the table that the kernel uses until it has run."""
    made = block_of(problem, x, y)
    tables, rows, columns = _reads(problem, like, stream)
    function = kernel(
        made.shape, problem.x_dtype, reader_of(problem), load_of(problem, made, x), in_vectors(problem, made, y)
    )
    grid = min(tiles(problem, made), launch.MAX_GRID_X)
    if grid == 0:
        return tables
    C, O = problem.C // problem.groups, problem.O // problem.groups
    function[grid, made.threads, stream, made.shared_bytes](
        x.vector, *map(_wide, (x.offset, *x.strides)),
        k.vector, *map(_wide, (k.offset, *k.strides)),
        bias, has_bias, problem.activation == "relu",
        y.vector, *map(_wide, (y.offset, *y.strides)),
        tables, *map(_wide, (*rows, *columns)),
        *map(_wide, (problem.N, C, O, problem.H, problem.W)), *map(_narrow, (problem.KH, problem.KW)),
        *map(_wide, (problem.OH, problem.OW, problem.groups)),
        dtypes.numpy_dtype(problem.sum_dtype).type(problem.fill),
        *map(_narrow, block_arguments(made)),
    )  # fmt: skip
    return tables


def block_arguments(made: Block) -> tuple[int, ...]:
    """The last arguments of the kernel, all of 32 bits."""
    return (
        made.groups, made.threads_h, made.threads_w, made.taps_h, made.taps_w, made.image,
        made.rows.entries, made.rows.run, made.rows.step, made.rows.local_outer, made.rows.local_inner,
        made.columns.entries, made.columns.run, made.columns.step, made.columns.local_outer, made.columns.local_inner,
        made.pitch,
    )  # fmt: skip


def tiles(problem: Conv2dProblem, made: Block) -> int:
    """Tiles that make up the result."""
    shape = made.shape
    extents = (
        (problem.OH, made.threads_h * shape.rows), (problem.OW, made.threads_w * shape.columns),
        (problem.groups, made.groups), (problem.O // problem.groups, shape.outputs),
    )  # fmt: skip
    count = problem.N
    for extent, share in extents:
        count *= -(-extent // share)
    return count


def block_of(problem: Conv2dProblem, x: Flat, y: Flat) -> Block:
    """The block, by what is contiguous in memory: groups, or rows."""
    if problem.groups > 1 and 0 < abs(x.strides[1]) < abs(x.strides[4]) and abs(y.strides[1]) < abs(y.strides[4]):
        made = depthwise_shape.block(problem, SIDE)
        if made is not None:
            return made
    made = depthwise_shape.block(problem, 1)
    assert made is not None, "the smallest block fits always"
    return made


def reader_of(problem: Conv2dProblem) -> str:
    """How a position is looked up."""
    return "inside" if depthwise_shape.arithmetic(problem) else "tabled"


def load_of(problem: Conv2dProblem, made: Block, x: Flat) -> str:
    """How the kernel reads x: in vectors where groups or rows are contiguous, and everything else is whole vectors."""
    lanes = ptx.VECTOR_BYTES // dtypes.itemsize(problem.x_dtype)
    n, group, channel, row, column = x.strides
    if made.shape.side > 1:
        whole = group == 1 and problem.groups % lanes == 0 and _aligned(problem.x_dtype, x, (n, channel, row, column))
        return "across_groups_in_vectors" if whole else "across_groups"
    whole = column == 1 and problem.W % lanes == 0 and _aligned(problem.x_dtype, x, (n, group, channel, row))
    near = made.shape.stride is not None and depthwise_shape.arithmetic(problem)
    return "along_columns" if whole and near else "by_element"


def in_vectors(problem: Conv2dProblem, made: Block, y: Flat) -> bool:
    """Whether the kernel writes y in vectors: rows are contiguous, and everything else is whole vectors."""
    lanes = ptx.VECTOR_BYTES // dtypes.itemsize(problem.y_dtype)
    whole = y.strides[4] == 1 and problem.OW % lanes == 0 and _aligned(problem.y_dtype, y, y.strides[:4])
    return whole and made.shape.side == 1 and made.shape.stride is not None


def _aligned(dtype: str, flat: Flat, steps: tuple[int, ...]) -> bool:
    """Whether the operand begins at a multiple of 16 bytes and these steps are such."""
    itemsize = dtypes.itemsize(dtype)
    places = (launch.address(flat.vector), *(step * itemsize for step in (flat.offset, *steps)))
    return all(place % ptx.VECTOR_BYTES == 0 for place in places)


def _reads(problem: Conv2dProblem, like: Any, stream: Any) -> tuple[Any, list[int], list[int]]:
    """The table, of rows and then columns, or 0; and of both where the first output begins, the two steps, the last."""
    if depthwise_shape.arithmetic(problem):
        axes = zip(problem.padding, problem.stride, problem.dilation, strict=True)
        rows, columns = ([-low, stride, dilation, 0] for (low, _), stride, dilation in axes)
        return _wide(0), rows, columns
    row_table, column_table = problem.tables()
    joined = np.concatenate([row_table.index, column_table.index])
    start, stop = len(row_table.index), len(joined)
    tables = launch.vector(like, joined, np.dtype(np.int64), 1, stream)
    return (
        tables,
        [0, row_table.outer, row_table.inner, start - 1],
        [start, column_table.outer, column_table.inner, stop - 1],
    )
