"""Whether transforms are certain to keep the promise: the compiled part of ``fft_certain``, for tiles and segments."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from gpuconv.backends.numba_cpu.fft_certain import ABSOLUTE, RELATIVE, TOTAL
from gpuconv.backends.numba_cpu.fft_tiles import CELL
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.vectors import Lanes, scalar

# What a thread knows of what it transforms at once, each in the place of a register: the squares of what is in it; the
# least of its cells' magnitudes; its norm, and the noise of an output; the bias and the least result in float32, and a
# zero of float64; the least Σ|x||k|.
ENERGY, DARKEST, NORM, OFFSET, LEAST_SUM, NUMBERS = range(6)


class Verdicts(NamedTuple):
    """The functions, of the address of these numbers and of the facts of a kernel."""

    begin: Any  # begin(numbers): before anything is read
    measured: Any  # measured(numbers): after all is read, its norm
    at_once: Any  # at_once(facts, numbers): 1 if the darkest cell is bright enough; else least sums are to be found
    by_sums: Any  # by_sums(facts, numbers): 1 if the least sum that was found is large enough
    noise: Any  # noise(facts, numbers): what is no larger is noise


@functools.lru_cache(maxsize=16)
def verdicts(lanes: Lanes) -> Verdicts:
    """For registers of ``lanes``."""
    n = lanes.count
    load, store = scalar("float64")
    darkest, norm_at, zero_at, low_at = 8 * DARKEST * n, 8 * NORM * n, 8 * (OFFSET * n + 1), 8 * LEAST_SUM * n
    relative, absolute, total = 8 * RELATIVE, 8 * ABSOLUTE, 8 * TOTAL
    square_root, infinity = math.sqrt, math.inf

    @compiled
    def begin(numbers):
        store(numbers + zero_at, 0.0)
        for lane in range(n):
            store(numbers + 8 * lane, 0.0)
            store(numbers + darkest + 8 * lane, infinity)

    @compiled
    def measured(numbers):
        energy = 0.0
        for lane in range(n):
            energy += load(numbers + 8 * lane)
        store(numbers + norm_at, square_root(CELL * energy))

    @compiled
    def at_once(facts, numbers):
        dark = infinity
        for lane in range(n):
            dark = min(dark, load(numbers + darkest + 8 * lane))
            store(numbers + low_at + 8 * lane, infinity)
        return 1 if load(numbers + norm_at) * load(facts + relative) <= dark * load(facts + total) else 0

    @compiled
    def by_sums(facts, numbers):
        found = infinity
        for lane in range(n):
            found = min(found, load(numbers + low_at + 8 * lane))
        return 1 if load(numbers + norm_at) * load(facts + relative) <= found else 0

    @compiled
    def noise(facts, numbers):
        store(numbers + norm_at + 8, load(numbers + norm_at) * load(facts + absolute))

    return Verdicts(begin, measured, at_once, by_sums, noise)
