"""The kernel of ``numba_cuda.direct``.

    y[n,o,i,j] = b[o] + Σ_cpq x[n,c, row(i,p), column(j,q)] · k[o,c,p,q]

One block computes a tile of ``outputs`` × ``pixels`` of one group, ``pixels`` running over (n, i, j) together:

    for each slice of ``depth`` products (c,p,q):
        weights[depth, outputs]  <- k           every thread loads one product for some outputs
        window [depth, pixels]   <- x           every thread loads one pixel for some products
        sums[rows, columns] += weights ⊗ window  in registers, rows·columns per thread

Rows and columns go through the problem's index tables, so stride, dilation and every padding mode cost the same and
no padded copy exists. Element offsets are 64-bit. Tiles ride grid.x, the only axis that holds 2^31 - 1 blocks, and a
block takes another tile when there are more. Numbers are converted to the type they are summed in as they are loaded;
a 16-bit result is rounded once, at the end. The gradients run through the same kernel, their operands seen through
other strides and tables: see ``direct.parts``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert
from gpuconv.backends.numba_cuda.direct import Tile


def build(tile: Tile, x_dtype: str, k_dtype: str, y_dtype: str, zero_points: bool, conjugate: str | None = None) -> Any:
    """The kernel as a Python function, its tile and types frozen in; ``conjugate`` is None, ``"x"`` or ``"k"``."""
    sum_dtype = "float32" if y_dtype in ("float16", "bfloat16") else y_dtype
    ACCUMULATOR = convert.numba_type(sum_dtype)
    NUMBER = dtypes.numpy_dtype(sum_dtype).type
    ZERO = NUMBER(0)
    load_x, load_k = convert.loader(x_dtype, sum_dtype), convert.loader(k_dtype, sum_dtype)
    store = convert.storer(y_dtype)
    ZERO_POINTS, ORDERED = zero_points, not dtypes.is_complex(y_dtype)
    CONJUGATE_X, CONJUGATE_K = conjugate == "x", conjugate == "k"

    ROWS, COLUMNS, DEPTH = tile.rows, tile.columns, tile.depth
    OUTPUTS, PIXELS, THREADS, THREADS_P = tile.outputs, tile.pixels, tile.threads, tile.threads_p
    SUMS = ROWS * COLUMNS
    # One more than the tile is wide: the threads that store a column then hit different banks.
    PITCH = OUTPUTS + 1
    WEIGHTS_SIZE, WINDOW_SIZE = DEPTH * PITCH, DEPTH * PIXELS
    # Loads of x: THREADS // PIXELS products at a time; loads of k: THREADS // DEPTH outputs at a time.
    X_STEP = THREADS // PIXELS
    X_LOADS = DEPTH // X_STEP
    K_STEP = THREADS // DEPTH
    K_LOADS = -(-OUTPUTS // K_STEP)

    def direct(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, x0, xN, xG, xC, xH, xW,  # the elements of x, the offset of its first, its strides
        k, k0, kG, kO, kC, kH, kW,
        bias, has_bias, relu,
        y, y0, yN, yG, yO, yH, yW,
        row_table, row_outer, row_inner, column_table, column_outer, column_inner,
        N, C, O, KH, KW, OH, OW, groups,  # C and O per group
        padding, x_zero, k_zero,
    ):  # fmt: skip
        weights = cuda.shared.array(WEIGHTS_SIZE, ACCUMULATOR)
        window = cuda.shared.array(WINDOW_SIZE, ACCUMULATOR)
        sums = cuda.local.array(SUMS, ACCUMULATOR)

        t = cuda.threadIdx.x
        thread_o, thread_p = t // THREADS_P, t % THREADS_P
        products = C * KH * KW
        pixels = N * OH * OW
        tiles_p = (pixels + PIXELS - 1) // PIXELS
        tiles_o = (O + OUTPUTS - 1) // OUTPUTS
        tiles = tiles_p * tiles_o * groups

        # The digits of the products that this thread loads, in the mixed radix (C, KH, KW), and of one step onwards:
        # adding digits with a carry costs no division.
        x_start, k_start = np.int64(t // PIXELS), np.int64(t % DEPTH)
        xc_step, xp_step, xq_step = X_STEP // (KH * KW), X_STEP // KW % KH, X_STEP % KW
        kc_step, kp_step, kq_step = DEPTH // (KH * KW), DEPTH // KW % KH, DEPTH % KW

        tile = np.int64(cuda.blockIdx.x)
        while tile < tiles:
            # Neighbouring blocks share their pixels, so that x comes from the cache.
            first_o = tile % tiles_o * OUTPUTS
            first_p = tile // tiles_o % tiles_p * PIXELS
            group = tile // (tiles_o * tiles_p)

            # The pixel this thread loads, clamped: a pixel past the end is loaded and never stored.
            pixel = min(first_p + t % PIXELS, pixels - 1)
            x_base = x0 + pixel // (OH * OW) * xN + group * xG
            row_base = pixel // OW % OH * row_outer
            column_base = pixel % OW * column_outer
            xc, xp, xq = x_start // (KH * KW), x_start // KW % KH, x_start % KW
            kc, kp, kq = k_start // (KH * KW), k_start // KW % KH, k_start % KW

            # The sums start at the bias: one addition less to round, and no branch at the end.
            for a in range(ROWS):
                o = first_o + thread_o * ROWS + a
                start = ZERO
                if has_bias and o < O:
                    start = bias[group * O + o]
                for b in range(COLUMNS):
                    sums[a * COLUMNS + b] = start
            for _ in range(0, products, DEPTH):
                for load in range(X_LOADS):
                    value = ZERO
                    if xc < C:
                        row = row_table[row_base + xp * row_inner]
                        column = column_table[column_base + xq * column_inner]
                        if row >= 0 and column >= 0:
                            value = NUMBER(load_x(x[x_base + xc * xC + row * xH + column * xW]))
                            if CONJUGATE_X:
                                value = value.conjugate()
                            if ZERO_POINTS:
                                value -= x_zero
                        else:
                            value = padding
                    window[(t // PIXELS + load * X_STEP) * PIXELS + t % PIXELS] = value
                    xq += xq_step
                    carry = xq >= KW
                    xq -= KW if carry else 0
                    xp += xp_step + (1 if carry else 0)
                    carry = xp >= KH
                    xp -= KH if carry else 0
                    xc += xc_step + (1 if carry else 0)
                for load in range(K_LOADS):
                    o = t // DEPTH + load * K_STEP
                    if o < OUTPUTS:
                        value = ZERO
                        if kc < C and first_o + o < O:
                            at_k = k0 + group * kG + (first_o + o) * kO + kc * kC + kp * kH + kq * kW
                            value = NUMBER(load_k(k[at_k]))
                            if CONJUGATE_K:
                                value = value.conjugate()
                            if ZERO_POINTS:
                                value -= k_zero[group * O + first_o + o]
                        weights[t % DEPTH * PITCH + o] = value
                kq += kq_step
                carry = kq >= KW
                kq -= KW if carry else 0
                kp += kp_step + (1 if carry else 0)
                carry = kp >= KH
                kp -= KH if carry else 0
                kc += kc_step + (1 if carry else 0)
                cuda.syncthreads()
                for d in range(DEPTH):
                    for a in range(ROWS):
                        weight = weights[d * PITCH + thread_o * ROWS + a]
                        for b in range(COLUMNS):
                            sums[a * COLUMNS + b] += weight * window[d * PIXELS + thread_p + b * THREADS_P]
                cuda.syncthreads()

            # Pixels in the outer loop, so that each is taken apart once; a body this small unrolls, which keeps the
            # sums in registers.
            for b in range(COLUMNS):
                pixel = first_p + thread_p + b * THREADS_P
                if pixel < pixels:
                    at = y0 + group * yG + pixel // (OH * OW) * yN + pixel // OW % OH * yH + pixel % OW * yW
                    for a in range(ROWS):
                        o = first_o + thread_o * ROWS + a
                        total = sums[a * COLUMNS + b]
                        if ORDERED:
                            if relu and total < ZERO:  # false for NaN, which passes through
                                total = ZERO
                        if o < O:
                            y[at + o * yO] = store(total)
            tile += np.int64(cuda.gridDim.x)

    return direct
