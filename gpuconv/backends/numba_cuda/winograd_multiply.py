"""The kernel of ``numba_cuda.winograd`` that multiplies: the products of all points, each of two matrices.

    M[part, z, o, t] = Σ_c U[z, c, o] · V[z, c, t]       c in the part's slices; z: a point and a group

One block computes a tile of one product, in the tiles of ``implicit_gemm`` and with its arithmetic:

    weights  [2, depth, outputs]        shared memory, from U
    window   [2, depth, tiles + 1 vector]  shared memory, from V
    sums     [rows, columns]            registers

Both matrices have a row per channel, so that 16 bytes are read at a time, whole rows of the tile one after the other.
A slice is multiplied while the next one is on its way into registers. Rows that there are not, beyond C, are zero;
columns that there are not are read from the last ones there are, and what comes of them is not stored.

Blocks ride grid.x: those of neighbouring output channels are neighbours, so that V comes from the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv.backends.numba_cuda import convert, ptx, register_tile
from gpuconv.backends.numba_cuda.tiles import WARP_O, WARP_P, Tile


def build(tile: Tile) -> Any:
    """The kernel as a Python function, its tile frozen in."""
    FLOAT, ZERO = convert.numba_type("float32"), np.float32(0)
    LANES = ptx.VECTOR_BYTES // 4
    ALIGNMENT = ptx.shared_alignment()
    load_vector, store_vector = ptx.load_vector(LANES), ptx.store_vector(LANES)
    multiply = register_tile.multiply_slice(tile, "float32")

    OUTPUTS, TILES, DEPTH, THREADS = tile.outputs, tile.pixels, tile.depth, tile.threads
    ROWS, COLUMNS = tile.rows, tile.columns
    ROW_STEP, COLUMN_STEP, PITCH = tile.row_step(LANES), tile.column_step(LANES), tile.pitch(LANES)
    WARPS_T = TILES // COLUMNS // WARP_P  # side by side in a tile
    SUMS = ROWS * COLUMNS
    WEIGHTS, WINDOW = DEPTH * OUTPUTS, DEPTH * PITCH  # elements of one half
    WEIGHTS_SIZE, WINDOW_SIZE = 2 * WEIGHTS, 2 * WINDOW
    # Threads side by side on a row of each matrix; a thread's vectors are as many rows apart as the threads cover.
    NEAR_K, NEAR_X = OUTPUTS // LANES, TILES // LANES
    STEP_K, STEP_X = THREADS // NEAR_K, THREADS // NEAR_X
    LOADS_K, LOADS_X = DEPTH // STEP_K, DEPTH // STEP_X  # vectors
    SIZE_K, SIZE_X = LOADS_K * LANES, LOADS_X * LANES

    def multiply_points(  # type: ignore[no-untyped-def]  # Numba infers the types
        U, pitch_u, V, pitch_v, M,  # pitches are multiples of LANES
        C, O, tiles, products, slices, part_slices,  # C and O per group; a product per point and group
    ):  # fmt: skip
        weights = cuda.shared.array(WEIGHTS_SIZE, FLOAT, ALIGNMENT)
        window = cuda.shared.array(WINDOW_SIZE, FLOAT, ALIGNMENT)
        sums = cuda.local.array(SUMS, FLOAT)
        of_k = cuda.local.array(SIZE_K, FLOAT)
        of_x = cuda.local.array(SIZE_X, FLOAT)

        # This thread's first output channel and tile of the block's: a warp covers WARP_O × WARP_P vectors.
        t = np.int32(cuda.threadIdx.x)
        warp, in_warp = np.int32(t // 32), np.int32(t % 32)
        own_o = np.int32((warp // WARPS_T * WARP_O + in_warp // WARP_P) * LANES)
        own_t = np.int32((warp % WARPS_T * WARP_P + in_warp % WARP_P) * LANES)

        block = np.int32(cuda.blockIdx.x)
        tiles_o, tiles_t = np.int32((O + OUTPUTS - 1) // OUTPUTS), np.int32((tiles + TILES - 1) // TILES)
        first_o = np.int32(block % tiles_o * OUTPUTS)
        first_t = np.int32(block // tiles_o % tiles_t * TILES)
        before = np.int32(block // (tiles_o * tiles_t))
        z, part = np.int64(before % products), np.int32(before // products)
        first_slice = np.int32(part * part_slices)
        count = np.int32(min(part_slices, slices - first_slice))

        # This thread's vectors of a slice: where they come from, where they go, and how many channels are left there.
        c = np.int32(first_slice * DEPTH)
        k_row, k_column = np.int32(t // NEAR_K), np.int32(t % NEAR_K * LANES)
        x_row, x_column = np.int32(t // NEAR_X), np.int32(t % NEAR_X * LANES)
        at_k = (z * C + c + k_row) * pitch_u + min(first_o + k_column, pitch_u - LANES)
        at_x = (z * C + c + x_row) * pitch_v + min(first_t + x_column, pitch_v - LANES)
        to_k, to_x = np.int32(k_row * OUTPUTS + k_column), np.int32(x_row * PITCH + x_column)
        left_k, left_x = np.int32(C - c - k_row), np.int32(C - c - x_row)

        for s in range(SUMS):
            sums[s] = ZERO
        turn = np.int32(0)
        while turn <= count:
            if turn < count:
                for load in range(LOADS_K):
                    if load * STEP_K < left_k:
                        load_vector(of_k, load * LANES, U, at_k + np.int32(load * STEP_K * pitch_u))
                    else:
                        for lane in range(LANES):
                            of_k[load * LANES + lane] = ZERO
                for load in range(LOADS_X):
                    if load * STEP_X < left_x:
                        load_vector(of_x, load * LANES, V, at_x + np.int32(load * STEP_X * pitch_v))
                    else:
                        for lane in range(LANES):
                            of_x[load * LANES + lane] = ZERO
                left_k, left_x = np.int32(left_k - DEPTH), np.int32(left_x - DEPTH)
                at_k += np.int32(DEPTH * pitch_u)
                at_x += np.int32(DEPTH * pitch_v)
            half = np.int32(turn % 2)
            if turn > 0:
                multiply(sums, weights, (1 - half) * WEIGHTS + own_o, window, (1 - half) * WINDOW + own_t)
            if turn < count:
                for load in range(LOADS_K):
                    store_vector(of_k, load * LANES, weights, half * WEIGHTS + to_k + load * STEP_K * OUTPUTS)
                for load in range(LOADS_X):
                    store_vector(of_x, load * LANES, window, half * WINDOW + to_x + load * STEP_X * PITCH)
            cuda.syncthreads()
            turn = np.int32(turn + 1)

        to = (part * products + z) * O * pitch_v
        for a in range(ROWS):
            o = first_o + own_o + a // LANES * ROW_STEP + a % LANES
            if o < O:
                for vector in range(COLUMNS // LANES):
                    column = first_t + own_t + vector * COLUMN_STEP
                    if column < pitch_v:
                        store_vector(sums, a * COLUMNS + vector * LANES, M, to + o * pitch_v + column)

    return multiply_points
