"""The kernel of ``numba_cuda.implicit_gemm_mma``.

    y[n,o,i,j] = b[o] + Σ_pqc x[n, row(i,p), column(j,q), c] · k[o,c,p,q]

as the product of matrices that ``implicit_gemm_kernel`` describes, on tensor cores: sm_80 and later. Both operands have
their channels side by side, so that a slice, which is of one tap, is a run of 64 bytes for every output channel and
every pixel, and goes from global to shared memory without passing through registers:

    memory  [STAGES, outputs + pixels, PITCH]   words of shared memory: a row per output channel or pixel
    sums    [rows·columns of 16 × 8 per warp]   registers; see ``tensor_tile``

    slices 0 … STAGES - 2 are under way
    turn 0, 1, …   wait until this turn's slice has landed, and for the block: everyone's part of it has, and
                   everyone is done with the turn before
                   slice turn + STAGES - 1 → the stage that the turn before read
                   sums += weights ⊗ window, on tensor cores

A copy moves 16 bytes: 8 channels of 16 bits or 4 of float32. Beyond the last channel it fills in zeros, and where a tap
meets padding it reads ``border`` instead of x, a run of the padding's value. Sums may be cut into parts, which
``partials`` adds. Offsets are 64-bit; channels, taps and slices 32-bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert, gathers, ptx, tensor_tile
from gpuconv.backends.numba_cuda.tensor_shape import PITCH, SLICE_BYTES, TensorTile

CHUNKS = SLICE_BYTES // ptx.VECTOR_BYTES  # copies that one row of a slice takes


def build(tile: TensorTile, way: str, dtype: str, y_dtype: str) -> Any:
    """The kernel as a Python function; tile, element types and way of multiplying (see ``tensor_tile``) frozen in."""
    STORE, ZERO, FLOAT32 = convert.storer(y_dtype), np.float32(0), convert.numba_type("float32")
    LANES = ptx.VECTOR_BYTES // dtypes.itemsize(dtype)  # channels of one copy
    DEPTH = SLICE_BYTES // dtypes.itemsize(dtype)
    OUTPUTS, PIXELS, THREADS, SUMS = tile.outputs, tile.pixels, tile.threads, tile.sums
    STAGES, STAGE = tile.stages, tile.stage
    SIZE = 0 if tile.dynamic_bytes else tile.words  # 0: as much as the launch asks for
    WARPS_O, WARPS_P, WARP_OUTPUTS, WARP_PIXELS = tile.warps_o, tile.warps_p, tile.warp_outputs, tile.warp_pixels
    PARKING_PITCH = tile.parking_pitch
    ROWS_AT_ONCE = THREADS // CHUNKS  # that the block copies 16 bytes of each
    K_COPIES, X_COPIES = OUTPUTS // ROWS_AT_ONCE, PIXELS // ROWS_AT_ONCE
    AHEAD = STAGES - 1
    PROMOTED = tensor_tile.PROMOTED.get(way, 0)
    TOTALS = SUMS if PROMOTED else 1
    OUTSIDE, LIMIT = np.int64(gathers.OUTSIDE), np.int64(gathers.LIMIT)
    ALIGNMENT = ptx.shared_alignment()
    copy, commit, wait = ptx.async_copies(STAGES - 2)
    multiply = tensor_tile.multiply_slice(tile, way)
    promote, park = tensor_tile.promote_sums(tile), tensor_tile.park_sums(tile)
    next_tap = gathers.next_tap

    def implicit_gemm_mma(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, x0, xN, xG,  # the elements of x, the offset of its first, its strides; channels are side by side
        row_table, row_outer, row_inner, column_table, column_outer, column_inner,
        border,  # 16 bytes of the padding's value
        panels,  # (groups, tiles of O, slices of these parts, OUTPUTS, DEPTH)
        bias, has_bias, relu,
        y, y0, y_part, yN, yG, yO, yH, yW,
        N, C, O, KH, KW, OH, OW, groups,  # C and O per group; C is a multiple of LANES
        slices, first_part, parts, part_slices,
    ):  # fmt: skip
        memory = cuda.shared.array(SIZE, FLOAT32, ALIGNMENT)
        x_places = cuda.shared.array(PIXELS, np.int64)
        x_rows = cuda.shared.array(PIXELS, np.int32)
        x_columns = cuda.shared.array(PIXELS, np.int32)
        y_places = cuda.shared.array(PIXELS, np.int64)
        sums = cuda.local.array(SUMS, np.float32)
        totals = cuda.local.array(TOTALS, np.float32)

        # Neighbouring blocks share their pixels, so that x comes from the cache.
        t = cuda.threadIdx.x
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

        # The tile's pixels: divided into (n,i,j) once, by one thread for all that load or store them.
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

        # This thread copies chunk t % CHUNKS of rows t // CHUNKS, and every so many rows on.
        own_row, chunk = t // CHUNKS, t % CHUNKS
        slices_c = max((C + DEPTH - 1) // DEPTH, 1)
        tap = first_slice // slices_c
        c = np.int32(first_slice % slices_c * DEPTH)
        p, q = np.int32(tap // KW), np.int32(tap % KW)
        panel_at = ((group * tiles_o + block % tiles_o) * parts + part) * part_slices * OUTPUTS * DEPTH
        panel_at += own_row * DEPTH + chunk * LANES

        # Where ldmatrix reads for this thread: of weights, four 8 × 8 quarters of a 16 × 16 tile; of the window, both
        # halves of two tiles of 8 pixels.
        warp, lane = t // 32, t % 32
        warp_o, warp_p = warp // WARPS_P * WARP_OUTPUTS, warp % WARPS_P * WARP_PIXELS
        at_o = (warp_o + lane % 16) * PITCH + lane // 16 * 4
        at_p = (OUTPUTS + warp_p + lane // 16 * 8 + lane % 8) * PITCH + lane // 8 % 2 * 4

        for s in range(SUMS):
            sums[s] = ZERO
        for s in range(TOTALS):
            totals[s] = ZERO
        for turn in range(-AHEAD, count):
            if turn >= 0:
                # All but the youngest groups: a group is committed each turn, also an empty one, so that this counts.
                wait()
                cuda.syncthreads()
            ahead = turn + AHEAD
            if ahead < count:
                stage = ahead % STAGES * STAGE
                for load in range(K_COPIES):
                    row = own_row + load * ROWS_AT_ONCE
                    copy(memory, stage + row * PITCH + chunk * 4, panels, panel_at + load * ROWS_AT_ONCE * DEPTH, 16)
                own_c = c + chunk * LANES
                size = 16 if own_c < C else 0
                for load in range(X_COPIES):
                    row = own_row + load * ROWS_AT_ONCE
                    at = row_table[x_rows[row] + p * row_inner] + column_table[x_columns[row] + q * column_inner]
                    to = stage + (OUTPUTS + row) * PITCH + chunk * 4
                    if at > LIMIT:
                        # Nothing is read of 0 bytes, but the address stays inside x.
                        copy(memory, to, x, x_places[row] + at + (own_c if own_c < C else 0), size)
                    else:
                        copy(memory, to, border, 0, size)
                panel_at += OUTPUTS * DEPTH
                c, p, q = next_tap(np.int32(c + DEPTH), p, q, C, KW)
            commit()
            if turn >= 0:
                stage = turn % STAGES * STAGE
                multiply(sums, memory, stage + at_o, stage + at_p)
                if PROMOTED:
                    if turn % PROMOTED == PROMOTED - 1:
                        promote(sums, totals)
        if PROMOTED:
            promote(totals, sums)

        # The sums go through shared memory, those of one row of warps at a time, so that neighbouring threads write
        # neighbouring elements of y.
        for row_of_warps in range(WARPS_O):
            cuda.syncthreads()
            if warp // WARPS_P == row_of_warps:
                park(sums, memory, lane // 4 * PARKING_PITCH + warp_p + lane % 4 * 2)
            cuda.syncthreads()
            for element in range(t, WARP_OUTPUTS * PIXELS, THREADS):
                row, pixel = element // PIXELS, element % PIXELS
                if yO == 1:  # channels last
                    row, pixel = element % WARP_OUTPUTS, element // WARP_OUTPUTS
                at = y_places[pixel]
                o = first_o + row_of_warps * WARP_OUTPUTS + row
                if at > LIMIT and o < O:
                    total = memory[row * PARKING_PITCH + pixel]
                    if has_bias:
                        total += bias[group * O + o]
                    if relu and total < ZERO:  # false for NaN, which passes through
                        total = ZERO
                    y[at + o * yO] = STORE(total)

    return implicit_gemm_mma
