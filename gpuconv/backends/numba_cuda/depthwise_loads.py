"""How ``numba_cuda.depthwise`` brings a tile of the image to shared memory: all threads of a block together.

What a maker here returns is for kernels:

    load(shared, x, at, xG, xH, xW, groups, tables, top, last_row, H, left, last_column, W, fill,
         own_groups, rows, row_run, row_outer, row_step, columns, column_run, column_outer, column_step, pitch,
         lead, units, over_unit, over_row, over_group)

``at`` is the offset in x of the first of ``own_groups`` neighbouring groups, of which ``groups`` exist, (top, left) the
position of the tile's first entry, and ``last_row`` and ``last_column`` those of the last that any output reads.
Entries of a row or column are those of ``depthwise_shape.Axis``. Numbers are widened to the type of the sums here.

A thread brings one unit at a time, an element or a vector, of which a row has ``units``; from one to its next it is as
many groups, rows and units on as the last three say: adding digits with a carry costs no division.

Where a position is in the image is said by one of two readers, ``inside`` of the extent or ``tabled``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert, ptx
from gpuconv.backends.numba_cuda.depthwise_shape import SIDE, Shape


@cuda.jit(device=True, inline="always")
def inside(tables, position, last, extent):  # type: ignore[no-untyped-def]
    """The source of a position, and whether there is one, where the constant surrounds the image."""
    return position, position >= 0 and position < extent


@cuda.jit(device=True, inline="always")
def tabled(tables, position, last, extent):  # type: ignore[no-untyped-def]
    """The same in any padding mode. What is beyond the last output's window is in no table, and of no use."""
    source = tables[min(position, last)]
    return source, source >= 0


READERS = {"inside": inside, "tabled": tabled}


def units_of(load: str, dtype: str, threads: int, lead: int, columns: int) -> tuple[int, int]:
    """Units of a row of a tile of the image, and how many units a block brings at a time."""
    lanes = ptx.VECTOR_BYTES // dtypes.itemsize(dtype)
    if load == "along_columns":
        return -(-(lead + columns) // lanes), threads
    across = {"by_element": 1, "across_groups": SIDE, "across_groups_in_vectors": SIDE // lanes}[load]
    return columns, threads // across


def by_element(shape: Shape, dtype: str, sum_dtype: str, reader: str) -> Any:
    """Element by element, any strides: neighbouring threads at neighbouring columns."""
    NUMBER = dtypes.numpy_dtype(sum_dtype).type
    ZERO = NUMBER(0)
    find, widen, SKEW = READERS[reader], convert.loader(dtype, sum_dtype), shape.skew
    NEAR = shape.stride is not None

    @cuda.jit(device=True, inline="always")
    def load(  # type: ignore[no-untyped-def]  # Numba infers the types
        shared, x, at, xG, xH, xW, groups, tables, top, last_row, H, left, last_column, W, fill,
        own_groups, rows, row_run, row_outer, row_step, columns, column_run, column_outer, column_step, pitch,
        lead, units, over_unit, over_row, over_group,
    ):  # fmt: skip
        t = np.int32(cuda.threadIdx.x)
        column, row, z = np.int32(t % units), np.int32(t // units % rows), np.int32(t // units // rows)
        while z < own_groups:
            value = ZERO
            if z < groups:
                value = fill
                if NEAR:
                    i, j = top + row, left + column
                else:
                    i = top + row // row_run * row_outer + row % row_run * row_step
                    j = left + column // column_run * column_outer + column % column_run * column_step
                i, in_rows = find(tables, i, last_row, H)
                j, in_columns = find(tables, j, last_column, W)
                if in_rows and in_columns:
                    value = NUMBER(widen(x[at + z * xG + i * xH + j * xW]))
            place = np.int32((z * rows + row) * pitch + column)
            if SKEW > 0:
                place = np.int32(place + column // SKEW)
            shared[place] = value
            column, row, z = onwards(column, row, z, over_unit, over_row, over_group, units, rows)

    return load


def along_columns(shape: Shape, dtype: str, sum_dtype: str, reader: str) -> Any:
    """Columns in vectors of 16 bytes, which lie in the image or outside as a whole: its rows are whole vectors.

    ``left`` need not be a multiple of them: each row begins with the vector that it is in, ``lead`` columns before.
    """
    NUMBER = dtypes.numpy_dtype(sum_dtype).type
    ZERO = NUMBER(0)
    find, widen, SKEW = READERS[reader], convert.loader(dtype, sum_dtype), shape.skew
    LANES, ELEMENT = ptx.VECTOR_BYTES // dtypes.itemsize(dtype), convert.numba_type(dtype)
    load_vector = ptx.load_vector(LANES)

    @cuda.jit(device=True, inline="always")
    def load(  # type: ignore[no-untyped-def]  # Numba infers the types
        shared, x, at, xG, xH, xW, groups, tables, top, last_row, H, left, last_column, W, fill,
        own_groups, rows, row_run, row_outer, row_step, columns, column_run, column_outer, column_step, pitch,
        lead, units, over_unit, over_row, over_group,
    ):  # fmt: skip
        values = cuda.local.array(LANES, ELEMENT)
        t = np.int32(cuda.threadIdx.x)
        vector, row, z = np.int32(t % units), np.int32(t // units % rows), np.int32(t // units // rows)
        while z < own_groups:
            first = np.int32(vector * LANES - lead)
            i, in_rows = find(tables, top + row, last_row, H)
            j, in_columns = find(tables, left + first, last_column, W)
            loaded = z < groups and in_rows and in_columns
            if loaded:
                load_vector(values, 0, x, at + z * xG + i * xH + j)
            start = np.int32((z * rows + row) * pitch)
            for lane in range(LANES):
                value = fill if z < groups else ZERO
                if loaded:
                    value = NUMBER(widen(values[lane]))
                column = np.int32(first + lane)
                if column >= 0 and column < columns:
                    shared[np.int32(start + column + column // SKEW)] = value
            vector, row, z = onwards(vector, row, z, over_unit, over_row, over_group, units, rows)

    return load


def across_groups(shape: Shape, dtype: str, sum_dtype: str, reader: str, vectors: bool) -> Any:
    """SIDE neighbouring groups of each pixel, side by side: element by element, or in vectors of 16 bytes."""
    NUMBER = dtypes.numpy_dtype(sum_dtype).type
    ZERO = NUMBER(0)
    find, widen = READERS[reader], convert.loader(dtype, sum_dtype)
    LANES = ptx.VECTOR_BYTES // dtypes.itemsize(dtype) if vectors else 1
    ACROSS = SIDE // LANES  # threads at one pixel
    WORDS = ptx.VECTOR_BYTES // dtypes.itemsize(sum_dtype)
    ELEMENT, SUM = convert.numba_type(dtype), convert.numba_type(sum_dtype)
    VECTORS, NEAR = vectors, shape.stride is not None
    load_vector, store_vector = ptx.load_vector(LANES), ptx.store_vector(WORDS)

    @cuda.jit(device=True, inline="always")
    def load(  # type: ignore[no-untyped-def]  # Numba infers the types
        shared, x, at, xG, xH, xW, groups, tables, top, last_row, H, left, last_column, W, fill,
        own_groups, rows, row_run, row_outer, row_step, columns, column_run, column_outer, column_step, pitch,
        lead, units, over_unit, over_row, over_group,
    ):  # fmt: skip
        values, numbers = cuda.local.array(LANES, ELEMENT), cuda.local.array(LANES, SUM)
        t = np.int32(cuda.threadIdx.x)
        z, pixel = np.int32(t % ACROSS * LANES), np.int32(t // ACROSS)
        column, row, over = np.int32(pixel % units), np.int32(pixel // units % rows), np.int32(pixel // units // rows)
        while over == 0:
            if NEAR:
                i, j = top + row, left + column
            else:
                i = top + row // row_run * row_outer + row % row_run * row_step
                j = left + column // column_run * column_outer + column % column_run * column_step
            i, in_rows = find(tables, i, last_row, H)
            j, in_columns = find(tables, j, last_column, W)
            loaded = z < groups and in_rows and in_columns
            place = np.int32((row * pitch + column) * SIDE + z)
            source = at + z * xG + i * xH + j * xW
            if VECTORS:
                if loaded:
                    load_vector(values, 0, x, source)
                for lane in range(LANES):
                    numbers[lane] = fill if z < groups else ZERO
                    if loaded:
                        numbers[lane] = NUMBER(widen(values[lane]))
                for word in range(0, LANES, WORDS):
                    store_vector(numbers, word, shared, place + word)
            else:
                value = fill if z < groups else ZERO
                if loaded:
                    value = NUMBER(widen(x[source]))
                shared[place] = value
            column, row, over = onwards(column, row, over, over_unit, over_row, over_group, units, rows)

    return load


@cuda.jit(device=True, inline="always")
def onwards(unit, row, group, over_unit, over_row, over_group, units, rows):  # type: ignore[no-untyped-def]
    """A thread's next unit."""
    unit, row, group = np.int32(unit + over_unit), np.int32(row + over_row), np.int32(group + over_group)
    if unit >= units:
        unit, row = np.int32(unit - units), np.int32(row + 1)
    if row >= rows:
        row, group = np.int32(row - rows), np.int32(group + 1)
    return unit, row, group
