"""The kernel of ``numba_cuda.depthwise``.

    y[n,g,o,i,j] = b[g,o] + Σ_cpq x[n,g,c, row(i,p), column(j,q)] · k[g,o,c,p,q]      with few c and few o

One block computes a tile of rows and columns of some neighbouring groups, and of ``outputs`` output channels of each:

    for each channel c, each ``taps_w`` columns of taps and each ``taps_h`` rows of them (all, but for large kernels):
        image   [groups, rows, columns]            <- x    all threads together, see ``depthwise_loads``
        weights [groups, outputs, taps_h, taps_w]  <- k    the same
        sums    [outputs, rows, columns] += …              in registers, row by row of the image: ``depthwise_taps``

The image is read once but for the seams of tiles, each of its rows serves all rows of the result that a thread makes,
and nothing but x, k, y and perhaps the bias is in the GPU's memory. Where channels lie side by side in memory, SIDE
groups do so in shared memory too, one for each thread of a warp; else neighbouring threads are neighbouring columns.

Tiles ride grid.x, the only axis that holds 2^31 - 1 blocks, and a block takes another tile when there are more. Offsets
of elements and positions are 64-bit; what is in shared memory is counted in 32 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert, depthwise_loads, depthwise_taps, ptx
from gpuconv.backends.numba_cuda.depthwise_shape import Shape

LOADS = ("by_element", "along_columns", "across_groups", "across_groups_in_vectors")


def build(shape: Shape, dtype: str, reader: str, load: str, vectors: bool) -> Any:
    """The kernel as a Python function; what its threads compute, and how it reads x, are frozen in.

    ``vectors``: whether y is written 16 bytes at a time, which its rows, contiguous, are whole multiples of.
    """
    sum_dtype = "float32" if dtype in ("float16", "bfloat16") else dtype
    NUMBER = dtypes.numpy_dtype(sum_dtype).type
    ZERO, SUM, ELEMENT = NUMBER(0), convert.numba_type(sum_dtype), convert.numba_type(dtype)
    widen, store = convert.loader(dtype, sum_dtype), convert.storer(dtype)
    multiply, multiply_rest = depthwise_taps.multiply_row(shape, shape.taps), depthwise_taps.multiply_row(shape, shape.rest)
    load_image = loader(shape, dtype, sum_dtype, reader, load)
    LANES = ptx.VECTOR_BYTES // dtypes.itemsize(dtype)
    store_vector = ptx.store_vector(LANES)
    ALIGNMENT = ptx.shared_alignment()

    OUTPUTS, ROWS, COLUMNS, SIDE, SUMS = shape.outputs, shape.rows, shape.columns, shape.side, shape.sums
    TAPS, REST, NEAR, VECTORS = shape.taps, shape.rest > 0, shape.stride is not None, vectors
    DOWN, ACROSS = shape.stride or (0, 0)
    REACH = (ROWS - 1) * DOWN  # rows of the image from a thread's first window to its last
    PLACED, TAPS_PLACED = shape.placed(COLUMNS * ACROSS), shape.placed(TAPS)

    def depthwise(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, x0, xN, xG, xC, xH, xW,  # the elements of x, the offset of its first, its strides
        k, k0, kG, kO, kC, kH, kW,
        bias, has_bias, relu,
        y, y0, yN, yG, yO, yH, yW,
        tables, top, row_outer, row_inner, last_row, left, column_outer, column_inner, last_column,
        N, C, O, H, W, KH, KW, OH, OW, groups,  # C and O per group
        fill, own_groups, threads_h, threads_w, taps_h, taps_w, image_size,
        rows, row_run, row_step, local_row, local_tap_h,
        columns, column_run, column_step, local_column, local_tap_w, pitch,
    ):  # fmt: skip
        shared = cuda.shared.array(0, SUM, ALIGNMENT)
        sums = cuda.local.array(SUMS, SUM)
        packed = cuda.local.array(LANES, ELEMENT)

        # This thread's group of the block's, and its first row and column of the tile.
        t = np.int32(cuda.threadIdx.x)
        if SIDE > 1:
            z, rest = np.int32(t % SIDE), np.int32(t // SIDE)
        else:
            z, rest = np.int32(t // (threads_h * threads_w)), np.int32(t % (threads_h * threads_w))
        own_h, own_w = np.int32(rest // threads_w), np.int32(rest % threads_w)
        # Its columns are side by side, or as many apart as there are threads.
        apart = np.int32(1)
        own_i, own_j = np.int32(own_h * ROWS), np.int32(own_w * COLUMNS)
        if not NEAR:
            apart, own_j = threads_w, own_w
        # Where its first window is in shared memory, and its weights: a group's are one plane, or side by side.
        if SIDE > 1:
            at_x = np.int32((own_i * local_row * pitch + own_j * local_column) * SIDE + z)
            at_k = np.int32(image_size + z)
        elif NEAR:
            at_x = np.int32((z * rows + own_i * local_row) * pitch + own_w * PLACED)
            at_k = np.int32(image_size + z * OUTPUTS * taps_h * taps_w)
        else:
            at_x = np.int32((z * rows + own_i * local_row) * pitch + own_j * local_column)
            at_k = np.int32(image_size + z * OUTPUTS * taps_h * taps_w)
        k_row, k_plane = np.int32(taps_w * SIDE), np.int32(taps_h * taps_w * SIDE)
        x_row, x_apart = np.int32(local_tap_h * pitch * SIDE), np.int32(apart * local_column)

        tile_h, tile_w = threads_h * ROWS, threads_w * COLUMNS
        tiles_w, tiles_h = (OW + tile_w - 1) // tile_w, (OH + tile_h - 1) // tile_h
        tiles_o, tiles_g = (O + OUTPUTS - 1) // OUTPUTS, (groups + own_groups - 1) // own_groups
        tiles = N * tiles_g * tiles_o * tiles_h * tiles_w
        tile = np.int64(cuda.blockIdx.x)
        while tile < tiles:
            # Neighbouring blocks share their seams, so that these come from the cache.
            first_j = tile % tiles_w * tile_w
            first_i = tile // tiles_w % tiles_h * tile_h
            plane = tile // (tiles_w * tiles_h)
            first_o = plane % tiles_o * OUTPUTS
            first_g = plane // tiles_o % tiles_g * own_groups
            n = plane // (tiles_o * tiles_g)
            group = first_g + z

            # The sums start at the bias: one addition less to round.
            for o in range(OUTPUTS):
                start = ZERO
                if has_bias and first_o + o < O and group < groups:
                    start = bias[group * O + first_o + o]
                for s in range(ROWS * COLUMNS):
                    sums[o * ROWS * COLUMNS + s] = start
            for c in range(C):
                for first_q in range(0, KW, taps_w):
                    count_q = np.int32(min(taps_w, KW - first_q))
                    for first_p in range(0, KH, taps_h):
                        count_p = np.int32(min(taps_h, KH - first_p))
                        cuda.syncthreads()
                        load_image(
                            shared, x, x0 + n * xN + first_g * xG + c * xC, xG, xH, xW, groups - first_g, tables,
                            top + first_i * row_outer + first_p * row_inner, last_row, H,
                            left + first_j * column_outer + first_q * column_inner, last_column, W, fill,
                            own_groups, rows, row_run, row_outer, row_step,
                            columns, column_run, column_outer, column_step, pitch,
                        )  # fmt: skip
                        # Each thread some weights, a stride of the block apart.
                        for place in range(t, own_groups * OUTPUTS * taps_h * taps_w, cuda.blockDim.x):
                            slot, of_group = place, np.int32(0)
                            if SIDE > 1:
                                slot, of_group = place // SIDE, np.int32(place % SIDE)
                            q, p, o = slot % taps_w, slot // taps_w % taps_h, slot // (taps_w * taps_h)
                            if SIDE == 1:
                                o, of_group = o % OUTPUTS, np.int32(o // OUTPUTS)
                            value = ZERO
                            if p < count_p and q < count_q and first_o + o < O and first_g + of_group < groups:
                                at = k0 + (first_g + of_group) * kG + (first_o + o) * kO + c * kC
                                value = NUMBER(widen(k[at + (first_p + p) * kH + (first_q + q) * kW]))
                            shared[image_size + place] = value
                        cuda.syncthreads()
                        at_row = at_x
                        for step in range(REACH + count_p):
                            at, of_k = at_row, at_k
                            for _ in range(count_q // TAPS):
                                multiply(
                                    sums, shared, at, x_apart, local_tap_w, of_k, k_plane, k_row, step, count_p
                                )  # fmt: skip
                                of_k = np.int32(of_k + TAPS * SIDE)
                                if NEAR:
                                    at = np.int32(at + TAPS_PLACED * SIDE)
                                else:
                                    at = np.int32(at + TAPS * local_tap_w * SIDE)
                            if REST:
                                if count_q % TAPS > 0:
                                    multiply_rest(
                                        sums, shared, at, x_apart, local_tap_w, of_k, k_plane, k_row, step, count_p
                                    )  # fmt: skip
                            at_row = np.int32(at_row + x_row)

            y_at = y0 + n * yN + group * yG + first_o * yO + (first_i + own_i) * yH + (first_j + own_j) * yW
            for o in range(OUTPUTS):
                for a in range(ROWS):
                    if group < groups and first_o + o < O and first_i + own_i + a < OH:
                        at_y = y_at + o * yO + a * yH
                        if VECTORS:
                            for vector in range(COLUMNS // LANES):
                                for lane in range(LANES):
                                    total = sums[(o * ROWS + a) * COLUMNS + vector * LANES + lane]
                                    if relu and total < ZERO:  # false for NaN, which passes through
                                        total = ZERO
                                    packed[lane] = store(total)
                                if first_j + own_j + vector * LANES < OW:
                                    store_vector(packed, 0, y, at_y + vector * LANES)
                        else:
                            for b in range(COLUMNS):
                                total = sums[(o * ROWS + a) * COLUMNS + b]
                                if relu and total < ZERO:
                                    total = ZERO
                                if first_j + own_j + b * apart < OW:
                                    y[at_y + b * apart * yW] = store(total)
            tile += np.int64(cuda.gridDim.x)

    return depthwise


def loader(shape: Shape, dtype: str, sum_dtype: str, reader: str, load: str) -> Any:
    """One of the ways of LOADS to read x."""
    if load == "by_element":
        return depthwise_loads.by_element(shape, dtype, sum_dtype, reader)
    if load == "along_columns":
        return depthwise_loads.along_columns(shape, dtype, sum_dtype, reader)
    return depthwise_loads.across_groups(shape, dtype, sum_dtype, reader, load == "across_groups_in_vectors")
