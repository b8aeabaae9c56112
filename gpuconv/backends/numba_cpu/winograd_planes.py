"""The compiled part of ``winograd`` for channels-first images: tiles in the lanes of a register."""

from __future__ import annotations

from collections.abc import Callable

from gpuconv.backends.numba_cpu import winograd_transforms, winograd_work
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.microkernel import TILES, tile
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.vectors import Lanes, get
from gpuconv.backends.numba_cpu.winograd_transforms import POINTS, TILE, WINDOW
from gpuconv.backends.numba_cpu.winograd_work import (
    FILL,
    FINISH,
    INPUT_STEP,
    KC,
    LEFT,
    OH,
    OW,
    OWN,
    SUM_STEP,
    SXC,
    SXH,
    SXW,
    SYH,
    SYO,
    SYW,
    TOP,
    C,
    H,
    W,
)  # fmt: skip

# The table of arguments goes on: the sizes, in elements, of a row of the image, of one of the planes that it is split
# in, and of a row of sums; how far apart the channels of one, two, … vectors of tiles are.
LINE, PLANE, LDC, OFFSETS = range(OWN, OWN + 4)


def kernel(lanes: Lanes) -> Callable[..., None]:
    """The kernel."""
    size, count = lanes.size, lanes.count
    MR, NV = TILES[lanes.bits]
    width = NV * count
    tiles = [tile(lanes, MR, vectors + 1) for vectors in range(NV)]
    full, one, two = tiles[-1], tiles[0], tiles[min(1, NV - 1)]
    read, write, fill = rows(lanes, "float32")
    split = winograd_transforms.split(lanes)
    image, result = winograd_transforms.image(lanes), winograd_transforms.result(lanes)

    @compiled
    def together(left):
        """Tiles to be multiplied together, where some are left: four registers of them are two and two."""
        return 2 * count if left == width + count else min(left, width)

    @compiled
    def transform(arguments, mine, inputs, source, i0, i1, j0, j1):
        """All channels of a strip's part of the image at ``source``, transformed."""
        high, wide = i1 - i0, j1 - j0
        tiles = (high * wide + count - 1) // count * count
        line, plane, zero = get(arguments, LINE), get(arguments, PLANE), get(arguments, FINISH) + 2 * size
        W_, top, left = get(arguments, W), TILE * i0 - get(arguments, TOP), TILE * j0 - get(arguments, LEFT)
        constant = get(arguments, FILL)
        # A row of the strip: the constant, pixels, the constant, and zeros where no output reads.
        end = min(get(arguments, OW) - TILE * j0, TILE * wide) + WINDOW - TILE
        first = min(max(-left, 0), end)
        last = min(max(W_ - left, first), end)
        row, border, planes = mine, mine + size * line, mine + 2 * size * line
        fill(mine, zero, 2 * line + TILE * WINDOW * plane)
        fill(row, constant, end)
        fill(border, constant, end)
        pixels = source + (left + first) * get(arguments, SXW)
        for c in range(get(arguments, C)):
            for i in range(TILE * high + WINDOW - TILE):
                to = planes + size * (i % TILE * WINDOW * plane + i // TILE * wide)
                if i + TILE * i0 >= get(arguments, OH) + WINDOW - TILE:
                    for j in range(WINDOW):
                        fill(to + size * j * plane, zero, wide)
                elif top + i < 0 or top + i >= get(arguments, H):
                    split((to, border, plane, wide))
                else:
                    at = pixels + c * get(arguments, SXC) + (top + i) * get(arguments, SXH)
                    read(row + size * first, at, last - first, get(arguments, SXW))
                    split((to, row, plane, wide))
            j = 0
            while j < tiles:
                here = together(tiles - j)
                to = inputs + size * (j * get(arguments, C) + c * here)
                image((to, planes + size * j, plane, wide, get(arguments, INPUT_STEP), here))
                j += here

    @compiled
    def multiply(arguments, sums, weight, step, inputs, panels, tiles):
        """The sums over the channels at every point, of some panels of output channels."""
        C_, kc, ldc = get(arguments, C), get(arguments, KC), get(arguments, LDC)
        offsets, tiles = get(arguments, OFFSETS), (tiles + count - 1) // count * count
        for point in range(POINTS):
            for c in range(0, C_, kc):
                K_, more = min(kc, C_ - c), c > 0
                a, j = weight + size * (point * step + c * MR), 0
                while j < tiles:
                    here = together(tiles - j)
                    b = inputs + size * (point * get(arguments, INPUT_STEP) + j * C_ + c * here)
                    to = sums + size * (point * get(arguments, SUM_STEP) + j)
                    off = offsets + 8 * kc * (here // count - 1)
                    for o in range(panels):
                        A, s = a + size * o * C_ * MR, to + size * o * MR * ldc
                        if here > 2 * count:
                            full((A, b, off, s, K_, ldc, more, count, b, 0, 0))
                        elif here > count:
                            two((A, b, off, s, K_, ldc, more, count, b, 0, 0))
                        else:
                            one((A, b, off, s, K_, ldc, more, count, b, 0, 0))
                    j += here

    @compiled
    def finish(arguments, mine, sums, target, bias, outputs, i0, i1, j0, j1):
        """The channels of the result, row by row of the image."""
        OH_, OW_, ldc = get(arguments, OH), get(arguments, OW), get(arguments, LDC)
        syo, syh, syw = get(arguments, SYO), get(arguments, SYH), get(arguments, SYW)
        made, line = (
            mine + size * (2 * get(arguments, LINE) + TILE * WINDOW * get(arguments, PLANE)),
            TILE * ldc + 64 // size,
        )
        tiles, floor = ((i1 - i0) * (j1 - j0) + count - 1) // count * count, get(arguments, FINISH) + size
        for o in range(outputs):
            result((made, sums + size * o * ldc, get(arguments, SUM_STEP), line, tiles, bias + size * o, floor))
            for i in range(TILE * i0, min(TILE * i1, OH_)):
                write(
                    target + o * syo + i * syh + TILE * j0 * syw,
                    made + size * (i % TILE * line + TILE * (i // TILE - i0) * (j1 - j0)),
                    min(TILE * (j1 - j0), OW_ - TILE * j0), syw,
                )  # fmt: skip

    return winograd_work.kernel(lanes, MR, MR, winograd_work.Steps(transform, multiply, finish))
