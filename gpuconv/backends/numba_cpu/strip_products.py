"""The products of a strip: tiles of the micro-kernel, all its pixels by all output channels of a block.

Either the strip's pixels are one long row, with the columns between two rows of outputs computed along, and the sums
stay in the cache until the last block of input channels is in them; or, where one block is all there is, each row of
outputs is cut into tiles by itself, and they are written straight to y.
"""

from __future__ import annotations

from typing import Any

from gpuconv.backends.numba_cpu.copies import rows, woven
from gpuconv.backends.numba_cpu.microkernel import BLOCK, TILES, tile
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.vectors import Lanes


def summed(lanes: Lanes) -> Any:
    """A function for compiled code: multiply(weights, inputs, offsets, sums, K, pixels, ldc, panels, accumulate,
    finish, bias), of all pixels of a strip as one row.
    """
    size, lane_count = lanes.size, lanes.count
    MR, NV = TILES[lanes.bits]
    width = NV * lane_count
    tiles = [tile(lanes, MR, count + 1, 1) for count in range(NV)]
    full, one, two = tiles[-1], tiles[0], tiles[min(1, NV - 1)]
    # What the first panels have fetched the others need not; on AVX-512 that was not measured.
    again = full if lanes.bits == 512 else tile(lanes, MR, NV)

    @compiled
    def part(a, b, offsets, c, K, stored, pixels, ldc, panels, accumulate, bias, bias_step, floor):
        """All panels of weights with all pixels of a strip, for K of the ``stored`` products of a panel."""
        for j in range(0, pixels, width):
            left, here = pixels - j, b + size * j
            for o in range(panels):
                weight = a + size * o * stored * MR
                sums = c + size * (o * MR * ldc + j)
                following = here + size * (width + lane_count * (o % NV))
                more = bias + o * bias_step
                # A row of sums has room for whole registers.
                if left > width - lane_count:
                    if o < NV:
                        full((weight, here, offsets, sums, K, ldc, accumulate, lane_count, following, more, floor))
                    else:
                        again((weight, here, offsets, sums, K, ldc, accumulate, lane_count, here, more, floor))
                elif left > lane_count:
                    two((weight, here, offsets, sums, K, ldc, accumulate, lane_count, following, more, floor))
                else:
                    one((weight, here, offsets, sums, K, ldc, accumulate, lane_count, following, more, floor))

    @compiled
    def multiply(a, b, offsets, c, K, pixels, ldc, panels, accumulate, finish, bias):
        """All products of a block of channels, in sums of at most BLOCK; the last adds the bias, if there is one."""
        sums = (K + BLOCK - 1) // BLOCK
        each = (K + sums - 1) // sums
        for k in range(0, K, each):
            more = accumulate or k > 0
            count = min(each, K - k)
            at, here = offsets + 8 * k, a + size * k * MR
            if bias != 0 and k + count == K:
                part(here, b, at, c, count, K, pixels, ldc, panels, more, bias, size * MR, finish + size)
            else:
                part(here, b, at, c, count, K, pixels, ldc, panels, more, 0, 0, 0)

    return multiply


def written(lanes: Lanes) -> Any:
    """A function for compiled code: multiply(weights, inputs, offsets, y, K, high, wide, pitch, line, step, outputs,
    floor, bias, beside), of each row of a strip's outputs by itself; steps of rows and channels of y in bytes.
    """
    size, lane_count = lanes.size, lanes.count
    MR, NV = TILES[lanes.bits]
    width = NV * lane_count
    tiles = [tile(lanes, MR, count + 1) for count in range(NV)]
    full, one, two = tiles[-1], tiles[0], tiles[min(1, NV - 1)]
    _, write, _ = rows(lanes, lanes.dtype)

    @compiled
    def product(vectors, a, b, offsets, c, K, ldc, last, bias, floor):
        if vectors == NV:
            full((a, b, offsets, c, K, ldc, 0, last, b, bias, floor))
        elif vectors > 1:
            two((a, b, offsets, c, K, ldc, 0, last, b, bias, floor))
        else:
            one((a, b, offsets, c, K, ldc, 0, last, b, bias, floor))

    @compiled
    def multiply(a, b, offsets, y, K, high, wide, pitch, line, step, outputs, floor, bias, beside):
        whole, ldc = outputs // MR, step // size
        for i in range(high):
            j = 0
            while j < wide:
                left = (wide - j + lane_count - 1) // lane_count
                # Two tiles of two registers rather than one of three and one of one, which has too few sums to keep
                # the multipliers busy.
                vectors = min(left, 2) if left == NV + 1 else min(left, NV)
                count = min(wide - j, vectors * lane_count)
                last = count - (vectors - 1) * lane_count
                here, to = b + size * (i * pitch + j), y + i * line + size * j
                for o in range(whole):
                    weight, more = a + size * o * K * MR, bias + size * o * MR
                    product(vectors, weight, here, offsets, to + o * MR * step, K, ldc, last, more, floor)
                if whole * MR < outputs:  # the last panel has channels that y has not
                    weight, more = a + size * whole * K * MR, bias + size * whole * MR
                    product(vectors, weight, here, offsets, beside, K, width, lane_count, more, floor)
                    for o in range(whole * MR, outputs):
                        write(to + o * step, beside + size * width * (o - whole * MR), count, size)
                j += count

    return multiply


def handed_over(lanes: Lanes, stored: str, parts: int) -> Any:
    """A function for compiled code: hand_over(y, sums, outputs, high, wide, ldc, pitch, step, line, column, part), of
    the sums of a strip to memory of ``stored``; steps of channels, rows, columns and parts of y in bytes.
    """
    size = lanes.size
    if parts == 1:
        _, write, _ = rows(lanes, stored)

        @compiled
        def hand_over(y, sums, outputs, high, wide, ldc, pitch, step, line, column, part):
            for o in range(outputs):
                for i in range(high):
                    write(y + o * step + i * line, sums + size * (o * ldc + i * pitch), wide, column)

    else:
        weave = woven(lanes)

        @compiled
        def hand_over(y, sums, outputs, high, wide, ldc, pitch, step, line, column, part):
            for o in range(0, outputs, 2):
                for i in range(high):
                    real = sums + size * (o * ldc + i * pitch)
                    weave(y + o // 2 * step + i * line, real, real + size * ldc, wide, column, part)

    return hand_over
