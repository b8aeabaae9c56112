"""How ``numba_cuda.implicit_gemm`` writes y: each thread the sums it holds.

    scatter(y, places, sums, own_p, first_o, O, yO)

is for kernels. ``places[pixel]`` is the offset in y of the tile's pixel, or OUTSIDE; ``own_p`` is the thread's first
pixel and ``first_o`` its first output channel, of O.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert, gathers, ptx
from gpuconv.backends.numba_cuda.tiles import Tile


def one_by_one(tile: Tile, dtype: str) -> Any:
    """Element by element: any strides."""
    LANES = ptx.VECTOR_BYTES // dtypes.itemsize(dtype)
    ROWS, COLUMNS = tile.rows, tile.columns
    ROW_STEP, COLUMN_STEP = tile.row_step(LANES), tile.column_step(LANES)
    LIMIT = np.int64(gathers.LIMIT)

    @cuda.jit(device=True, inline="always")
    def scatter(y, places, sums, own_p, first_o, O, yO):  # type: ignore[no-untyped-def]
        for b in range(COLUMNS):
            at = places[b // LANES * COLUMN_STEP + own_p + b % LANES]
            if at > LIMIT:
                for a in range(ROWS):
                    o = first_o + a // LANES * ROW_STEP + a % LANES
                    if o < O:
                        y[at + o * yO] = sums[a * COLUMNS + b]

    return scatter


def along_pixels(tile: Tile, dtype: str) -> Any:
    """Pixels in vectors: where planes are contiguous and whole vectors, so that a vector is all in or all out."""
    LANES = ptx.VECTOR_BYTES // dtypes.itemsize(dtype)
    ROWS, COLUMNS = tile.rows, tile.columns
    ROW_STEP, COLUMN_STEP = tile.row_step(LANES), tile.column_step(LANES)
    LIMIT = np.int64(gathers.LIMIT)
    store_vector = ptx.store_vector(LANES)

    @cuda.jit(device=True, inline="always")
    def scatter(y, places, sums, own_p, first_o, O, yO):  # type: ignore[no-untyped-def]
        for vector in range(COLUMNS // LANES):
            at = places[vector * COLUMN_STEP + own_p]
            if at > LIMIT:
                for a in range(ROWS):
                    o = first_o + a // LANES * ROW_STEP + a % LANES
                    if o < O:
                        store_vector(sums, a * COLUMNS + vector * LANES, y, at + o * yO)

    return scatter


def along_outputs(tile: Tile, dtype: str) -> Any:
    """Output channels in vectors: where they are contiguous, O is whole vectors, and so is every other stride."""
    LANES = ptx.VECTOR_BYTES // dtypes.itemsize(dtype)
    ROWS, COLUMNS = tile.rows, tile.columns
    ROW_STEP, COLUMN_STEP = tile.row_step(LANES), tile.column_step(LANES)
    LIMIT = np.int64(gathers.LIMIT)
    ELEMENT = convert.numba_type(dtype)
    store_vector = ptx.store_vector(LANES)

    @cuda.jit(device=True, inline="always")
    def scatter(y, places, sums, own_p, first_o, O, yO):  # type: ignore[no-untyped-def]
        turned = cuda.local.array(LANES, ELEMENT)
        for b in range(COLUMNS):
            at = places[b // LANES * COLUMN_STEP + own_p + b % LANES]
            if at > LIMIT:
                for vector in range(ROWS // LANES):
                    o = first_o + vector * ROW_STEP
                    if o < O:
                        for lane in range(LANES):
                            turned[lane] = sums[(vector * LANES + lane) * COLUMNS + b]
                        store_vector(turned, 0, y, at + o)

    return scatter


MAKERS = {"one_by_one": one_by_one, "along_pixels": along_pixels, "along_outputs": along_outputs}
