"""x with its channels side by side, as tensor cores read it.

    copied[n, h, w, g, c] = x[n, g, c, h, w], and 0 for the channels that round C up to whole vectors
    copied[n, h, w, g, r·C + c] = x[n, g, c, h, w - left + r·step], or 0 beside x, with ``columns_together``

Where x lies otherwise (NCHW, or a view that is not aligned), ``numba_cuda.implicit_gemm_mma`` makes this copy first. A
block turns a tile of 32 pixels × 32 channels round in shared memory, so that it reads and writes runs of memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert
from gpuconv.backends.numba_cuda.tensor_shape import SIDE

ROWS = 4  # of the tile that a block copies at once
THREADS = SIDE * ROWS


def build(dtype: str, together: bool = False) -> Any:
    """The kernel that copies elements of ``dtype``, perhaps with columns together."""
    ELEMENT, ZERO = convert.numba_type(dtype), dtypes.numpy_dtype(dtype).type(0)
    TILE, ROUNDS, TOGETHER = SIDE * (SIDE + 1), SIDE // ROWS, together

    def turn(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, x0, xN, xG, xC, xH, xW,  # the elements of x, the offset of its first, its strides
        copied, channels,  # C rounded up
        N, C, H, W, groups,  # C per group, with those of all columns
        images, width, left, step,  # with columns together: C of one of them, the columns of x, and as above
    ):  # fmt: skip
        tile = cuda.shared.array(TILE, ELEMENT)  # one element more than a row: a column is in 32 different banks
        across, down = cuda.threadIdx.x % SIDE, cuda.threadIdx.x // SIDE
        tiles_c, tiles_p = (channels + SIDE - 1) // SIDE, (H * W + SIDE - 1) // SIDE
        block = np.int64(cuda.blockIdx.x)
        first_c, first_p = block % tiles_c * SIDE, block // tiles_c % tiles_p * SIDE
        group = block // (tiles_c * tiles_p) % groups
        n = block // (tiles_c * tiles_p * groups)
        for turn in range(ROUNDS):
            c, pixel = first_c + down + turn * ROWS, first_p + across
            value = ZERO
            if c < C and pixel < H * W:
                column, of_x = pixel % W, c
                if TOGETHER:
                    column += c // images * step - left
                    of_x = c % images
                if not TOGETHER or 0 <= column < width:
                    value = x[x0 + n * xN + group * xG + of_x * xC + pixel // W * xH + column * xW]
            tile[(down + turn * ROWS) * (SIDE + 1) + across] = value
        cuda.syncthreads()
        for turn in range(ROUNDS):
            c, pixel = first_c + across, first_p + down + turn * ROWS
            if c < channels and pixel < H * W:
                at = ((n * H * W + pixel) * groups + group) * channels + c
                copied[at] = tile[across * (SIDE + 1) + down + turn * ROWS]

    return turn
