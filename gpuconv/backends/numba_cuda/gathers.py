"""How ``numba_cuda.implicit_gemm`` reads x: each thread its share of ``depth`` products of ``pixels`` output pixels.

What a maker here returns is for kernels. ``fetch`` loads the share into registers,

    c, p, q = fetch(x, places, rows, columns, row_table, row_inner, column_table, column_inner,
                    xC, C, KH, KW, fill, c, p, q, values)

where ``places`` has the offset of the image and group of each of the tile's pixels, and ``rows`` and ``columns`` say
where its entries begin in the two tables. These hold offsets of elements, or OUTSIDE where the constant of the padding
stands. (c, p, q) is the slice's first product (with ``mixed``, the thread's own first); the next slice's is returned.
``values[l]`` is then pixel ``pixel(t)`` of product ``product(t, l)``.

A product that there is not, because the last slice is not full, gives zero: its weight is zero, but zero times whatever
memory holds may be NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import ptx

# In a table of offsets: here is padding. A row and a column are added, and a sum with one or two of these is below
# LIMIT; offsets are far above it.
OUTSIDE = -(2**61)
LIMIT = -(2**60)


@dataclass(frozen=True)
class Gather:
    """A way to read x, as functions for kernels."""

    fetch: Callable[..., Any]
    pixel: Callable[[Any], Any]
    product: Callable[[Any, int], Any]


def _apart(pixels: int, threads: int) -> tuple[Any, Any]:
    """Neighbouring threads at neighbouring pixels, the products of one thread ``threads // pixels`` apart."""
    STEP, PIXELS = threads // pixels, pixels

    @cuda.jit(device=True, inline="always")
    def pixel(t):  # type: ignore[no-untyped-def]
        return t % PIXELS

    @cuda.jit(device=True, inline="always")
    def product(t, load):  # type: ignore[no-untyped-def]
        return t // PIXELS + load * STEP

    return pixel, product


def across_pixels(pixels: int, threads: int, depth: int, dtype: str) -> Gather:
    """Channels of one tap, element by element: the tables are read once per slice.

    For NCHW, whose pixels are contiguous, but shifted by the tap, so that no vector is aligned: a warp reads 128 bytes.
    """
    DEPTH, STEP = depth, threads // pixels
    LOADS = depth // STEP
    ZERO = dtypes.numpy_dtype(dtype).type(0)
    pixel, product = _apart(pixels, threads)

    @cuda.jit(device=True, inline="always")
    def fetch(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, places, rows, columns, row_table, row_inner, column_table, column_inner,
        xC, C, KH, KW, fill, c, p, q, values,
    ):  # fmt: skip
        t = cuda.threadIdx.x
        own_p = pixel(t)
        at = row_table[rows[own_p] + p * row_inner] + column_table[columns[own_p] + q * column_inner]
        inside = at > LIMIT
        own = c + product(t, 0)
        at += places[own_p] + own * xC
        for load in range(LOADS):
            value = ZERO
            if own + load * STEP < C:
                value = fill
                if inside:
                    value = x[at]
            values[load] = value
            at += STEP * xC
        return next_tap(np.int32(c + DEPTH), p, q, C, KW)

    return Gather(fetch, pixel, product)


def along_channels(pixels: int, threads: int, depth: int, dtype: str) -> Gather:
    """Channels of one tap in vectors of 16 bytes.

    For NHWC, whose channels are contiguous. The ``threads // pixels`` threads of one pixel read one vector each, next
    to each other, and then the next ones, so that every 32-byte sector is used whole.
    """
    DEPTH, NEAR = depth, threads // pixels
    LANES = ptx.VECTOR_BYTES // dtypes.itemsize(dtype)
    LOADS = depth // (LANES * NEAR)
    ZERO = dtypes.numpy_dtype(dtype).type(0)
    load_vector = ptx.load_vector(LANES)

    @cuda.jit(device=True, inline="always")
    def pixel(t):  # type: ignore[no-untyped-def]
        return t // NEAR

    @cuda.jit(device=True, inline="always")
    def product(t, load):  # type: ignore[no-untyped-def]
        return (t % NEAR + load // LANES * NEAR) * LANES + load % LANES

    @cuda.jit(device=True, inline="always")
    def fetch(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, places, rows, columns, row_table, row_inner, column_table, column_inner,
        xC, C, KH, KW, fill, c, p, q, values,
    ):  # fmt: skip
        t = cuda.threadIdx.x
        own_p = pixel(t)
        at = row_table[rows[own_p] + p * row_inner] + column_table[columns[own_p] + q * column_inner]
        inside = at > LIMIT
        own = c + product(t, 0)
        at += places[own_p] + own
        for load in range(LOADS):
            first = load * NEAR * LANES
            # C is a multiple of LANES here: a vector is all in or all out.
            value = fill if own + first < C else ZERO
            if inside and own + first < C:
                load_vector(values, load * LANES, x, at + first)
            else:
                for lane in range(LANES):
                    values[load * LANES + lane] = value
        return next_tap(np.int32(c + DEPTH), p, q, C, KW)

    return Gather(fetch, pixel, product)


def mixed(pixels: int, threads: int, depth: int, dtype: str) -> Gather:
    """Products in the order (c,p,q), each with a tap of its own.

    For few channels, where slices of one tap would be mostly empty, and for the weight gradient, whose channels are the
    images of the batch.
    """
    STEP = threads // pixels
    LOADS = depth // STEP
    ZERO = dtypes.numpy_dtype(dtype).type(0)
    pixel, product = _apart(pixels, threads)

    @cuda.jit(device=True, inline="always")
    def fetch(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, places, rows, columns, row_table, row_inner, column_table, column_inner,
        xC, C, KH, KW, fill, c, p, q, values,
    ):  # fmt: skip
        own_p = pixel(cuda.threadIdx.x)
        for load in range(LOADS):
            value = ZERO
            if c < C:
                at = row_table[rows[own_p] + p * row_inner] + column_table[columns[own_p] + q * column_inner]
                value = fill
                if at > LIMIT:
                    value = x[places[own_p] + at + c * xC]
            values[load] = value
            # STEP products on, in the mixed radix (C, KH, KW). STEP is 1 or 2: carrying by subtraction is cheaper than
            # the divisions that would do it at once.
            q = np.int32(q + STEP)
            while q >= KW:
                q = np.int32(q - KW)
                p = np.int32(p + 1)
            while p >= KH:
                p = np.int32(p - KH)
                c = np.int32(c + 1)
        return c, p, q

    return Gather(fetch, pixel, product)


@cuda.jit(device=True, inline="always")
def next_tap(c, p, q, C, KW):  # type: ignore[no-untyped-def]
    """The product ``c`` of tap (p, q), or the first of the next tap when the channels are done."""
    if c >= C:
        c = np.int32(0)
        q = np.int32(q + 1)
        if q == KW:
            q = np.int32(0)
            p = np.int32(p + 1)
    return c, p, q


MAKERS = {"across_pixels": across_pixels, "along_channels": along_channels, "mixed": mixed}
