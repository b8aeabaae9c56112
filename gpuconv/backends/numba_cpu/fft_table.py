"""Where ``fft`` keeps what: its table of arguments, the parts of a thread's scratch and of the packed kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpuconv.backends.numba_cpu import strip
from gpuconv.backends.numba_cpu.fft_certain import FACTS, LEAST
from gpuconv.backends.numba_cpu.fft_tiles import CELL
from gpuconv.backends.numba_cpu.fft_verdict import NUMBERS
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.vectors import Lanes
from gpuconv.problem import Conv2dProblem

# The table of arguments is that of ``strip``, whose windows these are, and more: sizes in elements of float64 but for
# LINE, a line of float32. KERNELS, where it is not 0, are to be transformed, and there is nothing else to do.
(
    TH, TW, DOWN, ACROSS, Z, STEP, CELLS, FACTS_AT, WEIGHTS_AT, SCALE, RAMP, PASS_COUNT, LINE,
) = range(strip.END, strip.END + 13)  # fmt: skip
# In the places of what windows have no use for.
KERNELS, PASSES, FINISHED, H, W, TOP, LEFT, IN_PLACE_X, IN_PLACE_Y = (
    strip.RAW, strip.OFFSETS, strip.SUMS, strip.SKG, strip.SKO, strip.SKC, strip.SKP, strip.SKQ, strip.KC,
)  # fmt: skip
# What the table of passes has for each: the products of some taps with all outputs of a tile.
SHIFT, FIRST, COUNT, ROWS, WEIGHT, PASS = range(6)


class Sizes(NamedTuple):
    """Of one tile; in elements of float64."""

    TH: int
    TW: int
    step: int  # from a register of columns to the next
    z: int  # a transform in the making
    cells: int  # the magnitudes of a pair of tiles
    each: int  # a thread's scratch
    line: int  # of a window of float32, in its own elements
    facts: int  # where the packed kernels' facts begin, and their weights
    weights: int
    packed: int

    @classmethod
    def of(cls, problem: Conv2dProblem, TH: int, TW: int, lanes: Lanes) -> Sizes:
        """Of tiles of TH × TW pixels."""
        C, O, n = problem.C // problem.groups, problem.O // problem.groups, lanes.count
        # Steps of whole pages would put what is turned over into the same few lines of the first-level cache.
        step = 2 * n * (TH + n)
        # The window and the sums of an output tile in float32, and what a whole tile of sums reaches beyond them.
        line = TW + 16 * n
        z = max(TW // n * step, line * (TH + 16))
        cells = 2 * (TH // CELL) * TW
        work, rows_of_two, numbers = 2 * n * max(TH, TW), 2 * CELL * TW, NUMBERS * n
        each = z * (C + (O > 1)) + work + rows_of_two + C * cells + numbers
        each = -(-each // 8) * 8 + 8
        spectra = 2 * TH * TW * problem.O * C
        weights = spectra + problem.O * FACTS
        packed = weights + -(-problem.O * C * problem.KH * problem.KW // 2)
        return cls(TH, TW, step, z, cells, each, line, spectra, weights, packed)


def order_of(KH: int, KW: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The passes of the sums product by product, of at most about BLOCK products each, and the order of the taps of a
    kernel in them: no pass has fewer rows than a tile, which ``fft_certain.LEAST`` sees to.
    """
    columns = -(-KW // -(-KW // (BLOCK // LEAST)))
    count = -(-KH // max(LEAST, BLOCK // columns))
    found: list[list[int]] = []
    order: list[int] = []
    for part in range(count):
        lines = range(part * KH // count, (part + 1) * KH // count)
        for first in range(0, KW, columns):
            taps = range(first, min(KW, first + columns))
            found.append([lines[0], first, len(taps), len(lines), len(order)])
            order += [p * KW + q for q in taps for p in reversed(lines)]
    return np.array(found, np.int64), np.array(order, np.int64)


def shape(sizes: Sizes) -> dict[int, int]:
    """The entries that are a tile's own."""
    return {
        TH: sizes.TH, TW: sizes.TW, Z: sizes.z, STEP: sizes.step, CELLS: sizes.cells, FACTS_AT: sizes.facts,
        WEIGHTS_AT: sizes.weights, LINE: sizes.line, strip.PER_THREAD: sizes.each,
    }  # fmt: skip
