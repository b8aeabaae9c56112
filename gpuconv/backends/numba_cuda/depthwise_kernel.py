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

Tiles ride grid.x, and a block takes another tile when there are more. Offsets of elements are 64-bit; extents, tiles
and what is in shared memory are counted in 32 bits, which the plan sees to. Whatever depends on the launch alone is
computed by the host: here it would be computed by every thread, and kept in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert, depthwise_loads, depthwise_taps, ptx
from gpuconv.backends.numba_cuda.depthwise_shape import Shape


def build(shape: Shape, dtype: str, reader: str, load: str, vectors: bool) -> Any:
    """The kernel as a Python function; what its threads compute, and how it reads x, are frozen in.

    ``vectors``: whether y is written 16 bytes at a time, which its rows, contiguous, are whole multiples of.
    """
    sum_dtype = "float32" if dtype in ("float16", "bfloat16") else dtype
    NUMBER = dtypes.numpy_dtype(sum_dtype).type
    ZERO, SUM, ELEMENT = NUMBER(0), convert.numba_type(sum_dtype), convert.numba_type(dtype)
    widen, store = convert.loader(dtype, sum_dtype), convert.storer(dtype)
    multiply = depthwise_taps.multiply_row(shape, shape.taps)
    multiply_rest = depthwise_taps.multiply_row(shape, shape.rest)
    load_image = loader(shape, dtype, sum_dtype, reader, load)
    LANES = ptx.VECTOR_BYTES // dtypes.itemsize(dtype)
    store_vector = ptx.store_vector(LANES)
    ALIGNMENT = ptx.shared_alignment()

    OUTPUTS, ROWS, COLUMNS, SIDE, SUMS = shape.outputs, shape.rows, shape.columns, shape.side, shape.sums
    TAPS, REST, NEAR, VECTORS = shape.taps, shape.rest > 0, shape.stride is not None, vectors
    TAPS_K = TAPS * SIDE
    REACH = shape.reach

    def depthwise(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, x0, xN, xG, xC, xH, xW,  # the elements of x, the offset of its first, its strides
        k, k0, kG, kO, kC, kH, kW,
        bias, has_bias, relu,
        y, y0, yN, yG, yO, yH, yW,
        C, O, H, W, KH, KW, OH, OW, groups, fill,  # C and O per group
        tables, top, row_outer, row_inner, last_row, row_run, row_step,
        left, column_outer, column_inner, last_column, column_run, column_step,
        tiles, tiles_g, tiles_o, tiles_h, tiles_w, tile_h, tile_w,
        own_groups, threads_h, threads_w, taps_h, taps_w, apart,
        rows, columns, pitch, lead, units, over_unit, over_row, over_group,  # see ``depthwise_loads``
        x_group, x_own_h, x_own_w, x_row, x_apart, x_tap, x_taps,  # steps in shared memory
        k_base, k_size, k_group, k_plane, k_row,
    ):  # fmt: skip
        shared = cuda.shared.array(0, SUM, ALIGNMENT)
        sums = cuda.local.array(SUMS, SUM)
        packed = cuda.local.array(LANES, ELEMENT)

        # This thread's group of the block's, and its first row and column of the tile: side by side with its others,
        # or as many apart as there are threads.
        t = np.int32(cuda.threadIdx.x)
        if SIDE > 1:
            z, rest = np.int32(t % SIDE), np.int32(t // SIDE)
        else:
            z, rest = np.int32(t // (threads_h * threads_w)), np.int32(t % (threads_h * threads_w))
        own_h, own_w = np.int32(rest // threads_w), np.int32(rest % threads_w)
        at_x = np.int32(z * x_group + own_h * x_own_h + own_w * x_own_w)
        at_k = np.int32(k_base + z * k_group)
        own_i = np.int32(own_h * ROWS)
        own_j = np.int32(own_w * COLUMNS if NEAR else own_w)

        tile = np.int32(cuda.blockIdx.x)
        while tile < tiles:
            # Neighbouring blocks share their seams, so that these come from the cache.
            first_j = np.int32(tile % tiles_w * tile_w)
            before = np.int32(tile // tiles_w)
            first_i = np.int32(before % tiles_h * tile_h)
            before = np.int32(before // tiles_h)
            first_o = np.int32(before % tiles_o * OUTPUTS)
            before = np.int32(before // tiles_o)
            first_g = np.int32(before % tiles_g * own_groups)
            n = np.int32(before // tiles_g)

            # The sums start at the bias: one addition less to round.
            for o in range(OUTPUTS):
                start = ZERO
                if has_bias and first_o + o < O and first_g + z < groups:
                    start = bias[np.int64(first_g + z) * O + first_o + o]
                for s in range(ROWS * COLUMNS):
                    sums[o * ROWS * COLUMNS + s] = start
            c = np.int32(0)
            while c < C:
                first_q = np.int32(0)
                while first_q < KW:
                    count_q = np.int32(min(taps_w, KW - first_q))
                    first_p = np.int32(0)
                    while first_p < KH:
                        count_p = np.int32(min(taps_h, KH - first_p))
                        cuda.syncthreads()
                        load_image(
                            shared, x, x0 + n * xN + first_g * xG + c * xC, xG, xH, xW, np.int32(groups - first_g),
                            tables, top + first_i * row_outer + first_p * row_inner, last_row, H,
                            left + first_j * column_outer + first_q * column_inner, last_column, W, fill,
                            own_groups, rows, row_run, row_outer, row_step,
                            columns, column_run, column_outer, column_step, pitch,
                            lead, units, over_unit, over_row, over_group,
                        )  # fmt: skip
                        # Each thread some weights, a stride of the block apart.
                        place = t
                        while place < k_size:
                            if SIDE > 1:
                                of_group, slot = np.int32(place % SIDE), np.int32(place // SIDE)
                            else:
                                of_group, slot = np.int32(place // k_group), np.int32(place % k_group)
                            q, slot = np.int32(slot % taps_w), np.int32(slot // taps_w)
                            p, of_o = np.int32(slot % taps_h), np.int32(slot // taps_h)
                            value = ZERO
                            if p < count_p and q < count_q and first_o + of_o < O and first_g + of_group < groups:
                                at = k0 + (first_g + of_group) * kG + (first_o + of_o) * kO + c * kC
                                value = NUMBER(widen(k[at + (first_p + p) * kH + (first_q + q) * kW]))
                            shared[k_base + place] = value
                            place = np.int32(place + cuda.blockDim.x)
                        cuda.syncthreads()
                        at_row, step = at_x, np.int32(0)
                        while step < count_p + REACH:
                            at, of_k, q = at_row, at_k, np.int32(TAPS)
                            while q <= count_q:
                                multiply(sums, shared, at, x_apart, x_tap, of_k, k_plane, k_row, step, count_p)
                                at, of_k, q = np.int32(at + x_taps), np.int32(of_k + TAPS_K), np.int32(q + TAPS)
                            if REST:
                                if count_q % TAPS > 0:
                                    multiply_rest(sums, shared, at, x_apart, x_tap, of_k, k_plane, k_row, step, count_p)
                            at_row, step = np.int32(at_row + x_row), np.int32(step + 1)
                        first_p = np.int32(first_p + taps_h)
                    first_q = np.int32(first_q + taps_w)
                c = np.int32(c + 1)

            at_plane = y0 + n * yN + (first_g + z) * yG + first_o * yO + (first_i + own_i) * yH + (first_j + own_j) * yW
            for o in range(OUTPUTS):
                for a in range(ROWS):
                    if first_g + z < groups and first_o + o < O and first_i + own_i + a < OH:
                        at_y = at_plane + o * yO + a * yH
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
            tile = np.int32(tile + cuda.gridDim.x)

    return depthwise


def loader(shape: Shape, dtype: str, sum_dtype: str, reader: str, load: str) -> Any:
    """One of the ways to read x."""
    if load == "by_element":
        return depthwise_loads.by_element(shape, dtype, sum_dtype, reader)
    if load == "along_columns":
        return depthwise_loads.along_columns(shape, dtype, sum_dtype, reader)
    return depthwise_loads.across_groups(shape, dtype, sum_dtype, reader, load == "across_groups_in_vectors")
