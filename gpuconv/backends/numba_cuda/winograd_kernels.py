"""The kernels of ``numba_cuda.winograd`` that transform: weights, the image, and sums to the result.

    U[ξ, g, c, o] = (G k[g,o,c] Gᵀ)[ξ]                              ``weights``
    V[ξ, g, c, t] = (Bᵀ window(n,g,c,i,j) B)[ξ]                     ``image``
    y[n, g, o, 4i…4i+3, 4j…4j+3] = b[g,o] + Aᵀ [ Σ_part M[part, ξ, g, o, t] ] A      ``result``

ξ is one of 36 points and t a tile: of all tiles (n,i,j) of the batch, counted along rows, those from ``first`` on. A
thread transforms one tile of one channel, in registers. A block has SIDE tiles or weights side by side by CHANNELS
channels, so that where channels lie side by side in memory, a 32-byte sector that one of its warps reads serves all.

U, V and M are written and read along their last axis, of ``pitch`` elements, a multiple of a vector: neighbouring
threads, neighbouring elements. Whatever stands where they are rounded up, no result depends on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv.backends.numba_cuda import ptx, winograd_transforms
from gpuconv.backends.numba_cuda.convert import numba_type
from gpuconv.backends.numba_cuda.depthwise_loads import READERS
from gpuconv.backends.numba_cuda.winograd_transforms import POINTS, TILE, WINDOW

SIDE, CHANNELS = 32, 8
# Channels side by side in a warp where they are so in memory: with 8 tiles to 4 channels a warp writes whole sectors of
# V, with 4 to 8 whole sectors of y; what it reads in pieces, its neighbours read from the cache.
NEAR_IMAGE, NEAR_RESULT = 4, 8


def threads() -> int:
    """Threads of a block."""
    return SIDE * CHANNELS


def build_weights() -> Any:
    """The kernel that transforms weights; one for all, so that they have the same bits whoever made them."""
    FLOAT, HALF = numba_type("float32"), 3 * WINDOW
    transform = winograd_transforms.kernel

    def weights(  # type: ignore[no-untyped-def]  # Numba infers the types
        k, k0, kG, kO, kC, kH, kW,  # the elements of k, the offset of its first, its strides
        U, pitch, C, O, groups,  # C and O per group
    ):  # fmt: skip
        half = cuda.local.array(HALF, FLOAT)
        t = np.int32(cuda.threadIdx.x)
        block, blocks_o, blocks_c = np.int64(cuda.blockIdx.x), (O + SIDE - 1) // SIDE, (C + CHANNELS - 1) // CHANNELS
        o = block % blocks_o * SIDE + t % SIDE
        c = block // blocks_o % blocks_c * CHANNELS + t // SIDE
        group = block // (blocks_o * blocks_c)
        if o < O and c < C:
            at = k0 + group * kG + o * kO + c * kC
            for q in range(3):
                column = transform(k[at + q * kW], k[at + kH + q * kW], k[at + 2 * kH + q * kW])
                for p in range(WINDOW):
                    half[p * 3 + q] = column[p]
            to = (group * C + c) * pitch + o
            step = groups * C * pitch
            for p in range(WINDOW):
                row = transform(half[p * 3], half[p * 3 + 1], half[p * 3 + 2])
                for q in range(WINDOW):
                    U[to + (p * WINDOW + q) * step] = row[q]

    return weights


def build_image(reader: str, channels_last: bool) -> Any:
    """The kernel that transforms the image; ``reader``, of ``READERS``, is how it looks up a position."""
    FLOAT, ZERO = numba_type("float32"), np.float32(0)
    NEAR = NEAR_IMAGE if channels_last else 1
    find, transform = READERS[reader], winograd_transforms.image

    def image(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, x0, xN, xG, xC, xH, xW,  # the elements of x, the offset of its first, its strides
        V, pitch, first, tiles, C, groups,  # C per group
        H, W, OH, OW, tables, top, last_row, left, last_column, fill,
    ):  # fmt: skip
        half = cuda.local.array(POINTS, FLOAT)
        values = cuda.local.array(WINDOW, FLOAT)
        t = np.int32(cuda.threadIdx.x)
        block, blocks_t, blocks_c = (
            np.int32(cuda.blockIdx.x),
            (tiles + SIDE - 1) // SIDE,
            (C + CHANNELS - 1) // CHANNELS,
        )
        tile = np.int32(block % blocks_t * SIDE + t // NEAR % SIDE)
        c = np.int32(block // blocks_t % blocks_c * CHANNELS + t // (NEAR * SIDE) * NEAR + t % NEAR)
        group = np.int32(block // (blocks_t * blocks_c))
        if tile < tiles and c < C:
            down, across = np.int32((OH + TILE - 1) // TILE), np.int32((OW + TILE - 1) // TILE)
            number = np.int32(first + tile)
            j = np.int32(number % across * TILE)
            i = np.int32(number // across % down * TILE)
            at = x0 + np.int64(number // across // down) * xN + group * xG + c * xC
            # Rows and columns that an output reads. Of others nothing is asked: they may be beyond a crop, and a NaN
            # there would spread.
            rows, columns = np.int32(OH + WINDOW - TILE - i), np.int32(OW + WINDOW - TILE - j)
            for p in range(WINDOW):
                row, in_rows = find(tables, np.int32(top + i + p), last_row, H)
                for q in range(WINDOW):
                    column, in_columns = find(tables, np.int32(left + j + q), last_column, W)
                    value = ZERO
                    if p < rows and q < columns:
                        value = fill
                        if in_rows and in_columns:
                            value = x[at + row * xH + column * xW]
                    values[q] = value
                done = transform(values[0], values[1], values[2], values[3], values[4], values[5])
                for q in range(WINDOW):
                    half[p * WINDOW + q] = done[q]
            to = (np.int64(group) * C + c) * pitch + tile
            step = np.int64(groups) * C * pitch
            for q in range(WINDOW):
                done = transform(
                    half[q], half[WINDOW + q], half[2 * WINDOW + q],
                    half[3 * WINDOW + q], half[4 * WINDOW + q], half[5 * WINDOW + q],
                )  # fmt: skip
                for p in range(WINDOW):
                    V[to + (p * WINDOW + q) * step] = done[p]

    return image


@cuda.jit(device=True, inline="always")
def column(M, at, step, parts, part_step):  # type: ignore[no-untyped-def]  # Numba infers the types
    """The points of one column, WINDOW steps apart, of all parts, transformed along it."""
    values = cuda.local.array(WINDOW, np.float32)
    for p in range(WINDOW):
        values[p] = M[at + p * WINDOW * step]
    # The parts are added in their order, whoever finished first.
    for _ in range(1, parts):
        at += part_step
        for p in range(WINDOW):
            values[p] += M[at + p * WINDOW * step]
    return winograd_transforms.result(values[0], values[1], values[2], values[3], values[4], values[5])


def build_result(channels_last: bool, vectors: bool) -> Any:
    """The kernel that transforms sums to the result.

    ``vectors``: whether it writes 16 bytes at a time, which the rows of y, contiguous, are whole multiples of.
    """
    FLOAT, ZERO = numba_type("float32"), np.float32(0)
    NEAR = NEAR_RESULT if channels_last else 1
    VECTORS = vectors
    transform, store_vector = winograd_transforms.result, ptx.store_vector(TILE)

    @cuda.jit(device=True, inline="always")
    def write(y, at, yW, columns, more, relu, a, b, c, d, e, f):  # type: ignore[no-untyped-def]
        """A row of a tile, of which there are ``columns``."""
        made = cuda.local.array(TILE, FLOAT)
        done = transform(a, b, c, d, e, f)
        for q in range(TILE):
            total = done[q] + more
            if relu and total < ZERO:  # false for NaN, which passes through
                total = ZERO
            made[q] = total
        if VECTORS:
            store_vector(made, 0, y, at)
        else:
            for q in range(TILE):
                if q < columns:
                    y[at + q * yW] = made[q]

    def result(  # type: ignore[no-untyped-def]  # Numba infers the types
        M, pitch, parts, part_step, first, tiles,
        bias, has_bias, relu,
        y, y0, yN, yG, yO, yH, yW,
        O, groups, OH, OW,  # O per group
    ):  # fmt: skip
        t = np.int32(cuda.threadIdx.x)
        block, blocks_t, blocks_o = (
            np.int32(cuda.blockIdx.x),
            (tiles + SIDE - 1) // SIDE,
            (O + CHANNELS - 1) // CHANNELS,
        )
        tile = np.int32(block % blocks_t * SIDE + t // NEAR % SIDE)
        o = np.int32(block // blocks_t % blocks_o * CHANNELS + t // (NEAR * SIDE) * NEAR + t % NEAR)
        group = np.int32(block // (blocks_t * blocks_o))
        if tile < tiles and o < O:
            channel = np.int64(group) * O + o
            at, step = channel * pitch + tile, np.int64(groups) * O * pitch
            a = column(M, at, step, parts, part_step)
            b = column(M, at + step, step, parts, part_step)
            c = column(M, at + 2 * step, step, parts, part_step)
            d = column(M, at + 3 * step, step, parts, part_step)
            e = column(M, at + 4 * step, step, parts, part_step)
            f = column(M, at + 5 * step, step, parts, part_step)
            down, across = np.int32((OH + TILE - 1) // TILE), np.int32((OW + TILE - 1) // TILE)
            number = np.int32(first + tile)
            j = np.int32(number % across * TILE)
            i = np.int32(number // across % down * TILE)
            to = y0 + np.int64(number // across // down) * yN + group * yG + o * yO + i * yH + j * yW
            more = ZERO
            if has_bias:
                more = bias[channel]
            rows, columns = OH - i, OW - j
            write(y, to, yW, columns, more, relu, a[0], b[0], c[0], d[0], e[0], f[0])
            if rows > 1:
                write(y, to + yH, yW, columns, more, relu, a[1], b[1], c[1], d[1], e[1], f[1])
            if rows > 2:
                write(y, to + 2 * yH, yW, columns, more, relu, a[2], b[2], c[2], d[2], e[2], f[2])
            if rows > 3:
                write(y, to + 3 * yH, yW, columns, more, relu, a[3], b[3], c[3], d[3], e[3], f[3])

    return result
