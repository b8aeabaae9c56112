"""How ``numba_cuda.depthwise`` brings a tile of the image to shared memory: all threads of a block together.

What a maker here returns is for kernels:

    load(shared, x, at, xG, xH, xW, groups, tables, first_row, last_row, H, first_column, last_column, W, fill,
         own_groups, rows, row_run, row_outer, row_step, columns, column_run, column_outer, column_step, pitch)

``at`` is the offset in x of the first of ``own_groups`` neighbouring groups, of which ``groups`` exist, ``first_row``
the padded position of the tile's first row, less the padding, and ``last_row`` of the last that any output reads.
Entries of a row or column are those of ``depthwise_shape.Axis``. Numbers are widened to the type of the sums here.

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
    """The source of a position where the constant surrounds the image; -1 for that."""
    found = position
    if position >= extent:
        found = np.int64(-1)
    return found


@cuda.jit(device=True, inline="always")
def tabled(tables, position, last, extent):  # type: ignore[no-untyped-def]
    """The same in any padding mode. What is beyond the last output's window is in no table, and of no use."""
    return tables[min(position, last)]


READERS = {"inside": inside, "tabled": tabled}


def by_element(shape: Shape, dtype: str, sum_dtype: str, reader: str) -> Any:
    """Element by element, any strides: neighbouring threads at neighbouring columns."""
    NUMBER = dtypes.numpy_dtype(sum_dtype).type
    ZERO = NUMBER(0)
    find, widen, SKEW = READERS[reader], convert.loader(dtype, sum_dtype), shape.skew
    NEAR = shape.stride is not None

    @cuda.jit(device=True, inline="always")
    def load(  # type: ignore[no-untyped-def]  # Numba infers the types
        shared, x, at, xG, xH, xW, groups, tables, first_row, last_row, H, first_column, last_column, W, fill,
        own_groups, rows, row_run, row_outer, row_step, columns, column_run, column_outer, column_step, pitch,
    ):  # fmt: skip
        t, threads = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x)
        # The digits of this thread's element in the mixed radix (groups, rows, columns), and those of its steps.
        column, row, z = np.int32(t % columns), np.int32(t // columns % rows), np.int32(t // columns // rows)
        over_column = np.int32(threads % columns)
        over_row, over_z = np.int32(threads // columns % rows), np.int32(threads // columns // rows)
        while z < own_groups:
            value = ZERO
            if z < groups:
                value = fill
                if NEAR:
                    i, j = first_row + row, first_column + column
                else:
                    i = first_row + row // row_run * row_outer + row % row_run * row_step
                    j = first_column + column // column_run * column_outer + column % column_run * column_step
                i, j = find(tables, i, last_row, H), find(tables, j, last_column, W)
                if i >= 0 and j >= 0:
                    value = NUMBER(widen(x[at + z * xG + i * xH + j * xW]))
            place = np.int32((z * rows + row) * pitch + column)
            if SKEW:
                place = np.int32(place + column // SKEW)
            shared[place] = value
            column, carry = over(column, over_column, np.int32(0), columns)
            row, carry = over(row, over_row, carry, rows)
            z = np.int32(z + over_z + carry)

    return load


def along_columns(shape: Shape, dtype: str, sum_dtype: str, reader: str) -> Any:
    """Columns in vectors of 16 bytes, which lie in the image or outside as a whole: its rows are whole vectors.

    ``first_column`` need not be a multiple of them: each row begins with the vector that it is in.
    """
    NUMBER = dtypes.numpy_dtype(sum_dtype).type
    ZERO = NUMBER(0)
    find, widen, SKEW = READERS[reader], convert.loader(dtype, sum_dtype), shape.skew
    LANES, ELEMENT = ptx.VECTOR_BYTES // dtypes.itemsize(dtype), convert.numba_type(dtype)
    load_vector = ptx.load_vector(LANES)

    @cuda.jit(device=True, inline="always")
    def load(  # type: ignore[no-untyped-def]  # Numba infers the types
        shared, x, at, xG, xH, xW, groups, tables, first_row, last_row, H, first_column, last_column, W, fill,
        own_groups, rows, row_run, row_outer, row_step, columns, column_run, column_outer, column_step, pitch,
    ):  # fmt: skip
        values = cuda.local.array(LANES, ELEMENT)
        t, threads = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x)
        lead = np.int32(first_column % LANES)
        vectors = np.int32((lead + columns + LANES - 1) // LANES)
        vector, row, z = np.int32(t % vectors), np.int32(t // vectors % rows), np.int32(t // vectors // rows)
        over_vector = np.int32(threads % vectors)
        over_row, over_z = np.int32(threads // vectors % rows), np.int32(threads // vectors // rows)
        while z < own_groups:
            first = np.int32(vector * LANES - lead)
            i, j = find(tables, first_row + row, last_row, H), find(tables, first_column + first, last_column, W)
            loaded = z < groups and i >= 0 and j >= 0
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
            vector, carry = over(vector, over_vector, np.int32(0), vectors)
            row, carry = over(row, over_row, carry, rows)
            z = np.int32(z + over_z + carry)

    return load


def across_groups(shape: Shape, dtype: str, sum_dtype: str, reader: str, vectors: bool) -> Any:
    """SIDE neighbouring groups of each pixel, side by side: element by element, or in vectors of 16 bytes."""
    NUMBER = dtypes.numpy_dtype(sum_dtype).type
    find, widen = READERS[reader], convert.loader(dtype, sum_dtype)
    LANES = ptx.VECTOR_BYTES // dtypes.itemsize(dtype) if vectors else 1
    THREADS_ACROSS = SIDE // LANES
    WORDS = ptx.VECTOR_BYTES // dtypes.itemsize(sum_dtype)
    ELEMENT, SUM = convert.numba_type(dtype), convert.numba_type(sum_dtype)
    VECTORS, ZERO = vectors, NUMBER(0)
    load_vector, store_vector = ptx.load_vector(LANES), ptx.store_vector(WORDS)
    NEAR = shape.stride is not None

    @cuda.jit(device=True, inline="always")
    def load(  # type: ignore[no-untyped-def]  # Numba infers the types
        shared, x, at, xG, xH, xW, groups, tables, first_row, last_row, H, first_column, last_column, W, fill,
        own_groups, rows, row_run, row_outer, row_step, columns, column_run, column_outer, column_step, pitch,
    ):  # fmt: skip
        values, numbers = cuda.local.array(LANES, ELEMENT), cuda.local.array(LANES, SUM)
        t, threads = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x)
        z = np.int32(t % THREADS_ACROSS * LANES)
        pixel, step = np.int32(t // THREADS_ACROSS), np.int32(threads // THREADS_ACROSS)
        column, row = np.int32(pixel % columns), np.int32(pixel // columns)
        over_column, over_row = np.int32(step % columns), np.int32(step // columns)
        while row < rows:
            if NEAR:
                i, j = first_row + row, first_column + column
            else:
                i = first_row + row // row_run * row_outer + row % row_run * row_step
                j = first_column + column // column_run * column_outer + column % column_run * column_step
            i, j = find(tables, i, last_row, H), find(tables, j, last_column, W)
            place = np.int32((row * pitch + column) * SIDE + z)
            source = at + z * xG + i * xH + j * xW
            if VECTORS:
                loaded = z < groups and i >= 0 and j >= 0
                if loaded:
                    load_vector(values, 0, x, source)
                for lane in range(LANES):
                    numbers[lane] = fill
                    if loaded:
                        numbers[lane] = NUMBER(widen(values[lane]))
                for word in range(0, LANES, WORDS):
                    store_vector(numbers, word, shared, place + word)
            else:
                value = ZERO
                if z < groups:
                    value = fill
                    if i >= 0 and j >= 0:
                        value = NUMBER(widen(x[source]))
                shared[place] = value
            column, carry = over(column, over_column, np.int32(0), columns)
            row = np.int32(row + over_row + carry)

    return load


@cuda.jit(device=True, inline="always")
def over(digit, step, carry, radix):  # type: ignore[no-untyped-def]
    """``digit + step + carry`` as a digit and what it carries."""
    digit = np.int32(digit + step + carry)
    carry = np.int32(0)
    if digit >= radix:
        digit = np.int32(digit - radix)
        carry = np.int32(1)
    return digit, carry
