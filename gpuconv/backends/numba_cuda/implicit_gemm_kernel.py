"""The kernel of ``numba_cuda.implicit_gemm``.

    y[n,o,i,j] = b[o] + Σ_cpq x[n,c, row(i,p), column(j,q)] · k[o,c,p,q]

as a product of matrices, of which the second is never in memory:

    y[O, pixels] = weights[O, slots] · window[slots, pixels]

A slot is a product (c,p,q), a pixel is an (n,i,j), and the window is gathered from x a slice of ``depth`` slots at a
time. One block computes one tile of one group:

    weights  [2, depth, outputs]     shared memory; from the packed panels, 16 bytes at a time
    window   [2, depth, pixels + 1]  shared memory; from x, see ``gathers``; + 1 vector, see ``Tile.pitch``
    sums     [rows, columns]         registers; outputs·pixels / threads of them in every thread

    turn 0         slice 0 → registers → first half of shared memory
    turn 1, 2, …   the next slice → registers                       its latency hides behind the arithmetic:
                   sums += weights[depth, rows] ⊗ window[depth, columns]
                   registers → other half of shared memory
                   wait for the block, once per turn: nobody reads the half that is written

Sums may be cut into parts, each a block's own work; ``partials`` adds what they leave, in order. Tiles ride grid.x, the
only axis that holds 2^31 - 1 blocks. Offsets of elements and numbers of pixels are 64-bit; channels, taps and slots are
32-bit, which the plan sees to: 64-bit ones took 25 more registers of the 128 that two blocks on a multiprocessor leave.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert, gathers, ptx, register_tile, scatters
from gpuconv.backends.numba_cuda.tiles import WARP_O, WARP_P, Tile


def build(tile: Tile, dtype: str, gather: str, scatter: str) -> Any:
    """The kernel as a Python function; its tile, element type and ways of reading x and writing y are frozen in."""
    ELEMENT = convert.numba_type(dtype)
    ZERO = dtypes.numpy_dtype(dtype).type(0)
    LANES = ptx.VECTOR_BYTES // dtypes.itemsize(dtype)
    ALIGNMENT = ptx.shared_alignment()
    load_vector, store_vector = ptx.load_vector(LANES), ptx.store_vector(LANES)
    multiply = register_tile.multiply_slice(tile, dtype)
    reader = gathers.MAKERS[gather](tile.pixels, tile.threads, tile.depth, dtype)
    fetch, pixel_of, product_of = reader.fetch, reader.pixel, reader.product
    MIXED = gather == "mixed"
    write = scatters.MAKERS[scatter](tile, dtype)
    OUTSIDE = np.int64(gathers.OUTSIDE)

    OUTPUTS, PIXELS, DEPTH, THREADS = tile.outputs, tile.pixels, tile.depth, tile.threads
    ROWS, COLUMNS = tile.rows, tile.columns
    ROW_STEP, PITCH = tile.row_step(LANES), tile.pitch(LANES)
    WARPS_P = PIXELS // COLUMNS // WARP_P  # side by side in a tile
    SUMS = ROWS * COLUMNS
    WEIGHTS, WINDOW = DEPTH * OUTPUTS, DEPTH * PITCH  # elements of one half
    WEIGHTS_SIZE, WINDOW_SIZE = 2 * WEIGHTS, 2 * WINDOW
    X_LOADS = DEPTH * PIXELS // THREADS  # elements per thread
    K_VECTORS = WEIGHTS // LANES // THREADS
    K_LOADS = K_VECTORS * LANES

    def implicit_gemm(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, x0, xN, xG, xC,  # the elements of x, the offset of its first, its strides; of rows and columns see tables
        row_table, row_outer, row_inner, column_table, column_outer, column_inner,
        panels,  # (groups, tiles of O, slots of these parts, OUTPUTS)
        bias, has_bias, relu,
        y, y0, y_part, yN, yG, yO, yH, yW,
        N, C, O, KH, KW, OH, OW, groups,  # C and O per group
        fill, slices, first_part, parts, part_slices,
    ):  # fmt: skip
        weights = cuda.shared.array(WEIGHTS_SIZE, ELEMENT, ALIGNMENT)
        window = cuda.shared.array(WINDOW_SIZE, ELEMENT, ALIGNMENT)
        x_places = cuda.shared.array(PIXELS, np.int64)
        x_rows = cuda.shared.array(PIXELS, np.int32)
        x_columns = cuda.shared.array(PIXELS, np.int32)
        y_places = cuda.shared.array(PIXELS, np.int64)
        sums = cuda.local.array(SUMS, ELEMENT)
        of_x = cuda.local.array(X_LOADS, ELEMENT)
        of_k = cuda.local.array(K_LOADS, ELEMENT)

        # This thread's first output channel and pixel of the tile: a warp covers WARP_O × WARP_P vectors.
        t = cuda.threadIdx.x
        warp, lane = t // 32, t % 32
        own_o = (warp // WARPS_P * WARP_O + lane // WARP_P) * LANES
        own_p = (warp % WARPS_P * WARP_P + lane % WARP_P) * LANES

        # Neighbouring blocks share their pixels, so that x comes from the cache.
        pixels = N * OH * OW
        tiles_p = (pixels + PIXELS - 1) // PIXELS
        tiles_o = (O + OUTPUTS - 1) // OUTPUTS
        block = np.int64(cuda.blockIdx.x)
        first_o = np.int32(block % tiles_o * OUTPUTS)
        first_p = block // tiles_o % tiles_p * PIXELS
        group = block // (tiles_o * tiles_p) % groups
        part = block // (tiles_o * tiles_p * groups)
        first_slice = (first_part + part) * part_slices
        count = min(part_slices, slices - first_slice)

        # The first product: of the slice, or of this thread where each product has a tap of its own.
        if MIXED:
            slot = first_slice * DEPTH + product_of(t, 0)
            c, p, q = np.int32(slot // (KH * KW)), np.int32(slot // KW % KH), np.int32(slot % KW)
        else:
            slices_c = (C + DEPTH - 1) // DEPTH
            tap = first_slice // max(slices_c, 1)
            c = np.int32(first_slice % max(slices_c, 1) * DEPTH)
            p, q = np.int32(tap // KW), np.int32(tap % KW)
        # This thread's vectors of the panels: element t·LANES of the slice, then every THREADS·LANES.
        panel_at = (group * tiles_o + block % tiles_o) * parts + part
        panel_at = panel_at * part_slices * WEIGHTS + t * LANES

        # The tile's pixels: divided into (n,i,j) once, by one thread for all that load or store them. In shared memory,
        # because every turn needs them and registers are scarce.
        if t < PIXELS:
            # One past the end is loaded as the last one, and never stored.
            pixel = min(first_p + t, pixels - 1)
            n, i, j = pixel // (OH * OW), pixel // OW % OH, pixel % OW
            x_places[t] = x0 + n * xN + group * xG
            x_rows[t], x_columns[t] = i * row_outer, j * column_outer
            y_places[t] = y0 + part * y_part + n * yN + group * yG + i * yH + j * yW
            if first_p + t >= pixels:
                y_places[t] = OUTSIDE
        cuda.syncthreads()

        # The sums start at the bias: one addition less to round.
        for a in range(ROWS):
            o = first_o + own_o + a // LANES * ROW_STEP + a % LANES
            start = ZERO
            if has_bias and o < O:
                start = bias[group * O + o]
            for b in range(COLUMNS):
                sums[a * COLUMNS + b] = start
        for turn in range(count + 1):
            if turn < count:
                c, p, q = fetch(
                    x, x_places, x_rows, x_columns, row_table, row_inner, column_table, column_inner,
                    xC, C, KH, KW, fill, c, p, q, of_x,
                )  # fmt: skip
                for load in range(K_VECTORS):
                    load_vector(of_k, load * LANES, panels, panel_at + load * THREADS * LANES)
                panel_at += WEIGHTS
            if turn > 0:
                half = (turn - 1) % 2
                multiply(sums, weights, half * WEIGHTS + own_o, window, half * WINDOW + own_p)
            if turn < count:
                half = turn % 2
                for load in range(X_LOADS):
                    window[half * WINDOW + product_of(t, load) * PITCH + pixel_of(t)] = of_x[load]
                for load in range(K_VECTORS):
                    store_vector(of_k, load * LANES, weights, half * WEIGHTS + (t + load * THREADS) * LANES)
            cuda.syncthreads()

        for s in range(SUMS):
            if relu and sums[s] < ZERO:  # false for NaN, which passes through
                sums[s] = ZERO
        write(y, y_places, sums, own_p, first_o + own_o, O, yO)

    return implicit_gemm
