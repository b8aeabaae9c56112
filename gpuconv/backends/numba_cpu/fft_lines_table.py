"""Where ``fft_lines`` keeps what: its table of arguments, the parts of a thread's scratch and of the packed kernels."""

from __future__ import annotations

from typing import NamedTuple

from gpuconv.backends.numba_cpu import strip
from gpuconv.backends.numba_cpu.fft_certain import FACTS
from gpuconv.backends.numba_cpu.fft_tiles import CELL
from gpuconv.backends.numba_cpu.fft_verdict import NUMBERS
from gpuconv.backends.numba_cpu.vectors import Lanes
from gpuconv.problem import Conv2dProblem

# The table of arguments is that of ``strip``, whose windows these are, and more: sizes in elements of float64.
LENGTH, FACTORS, RAMP, Z, CELLS, FACTS_AT, WEIGHTS_AT, FINISHED, PACKETS = range(strip.END, strip.END + 9)

# Pixels of a segment that are turned over at once.
RUN = 64


class Sizes(NamedTuple):
    """Of one length of segments; in elements of float64."""

    made: int  # outputs of a segment
    packets: int  # of segments that are transformed at once, of an image
    z: int  # a packet's transform
    cells: int  # its magnitudes
    each: int  # a thread's scratch
    facts: int  # where the packed kernels' facts begin, and their weights
    weights: int
    packed: int

    @classmethod
    def of(cls, problem: Conv2dProblem, length: int, lanes: Lanes) -> Sizes:
        """Of segments of ``length`` pixels."""
        C, O, n = problem.C // problem.groups, problem.O // problem.groups, lanes.count
        made = min(length - problem.KW + 1, problem.OW)
        packets = -(-problem.OH * -(-problem.OW // max(made, 1)) // (2 * n))
        z = 2 * n * length
        # The line and the sums of a segment in float32, and what whole tiles of sums reach beyond them.
        z = max(z, length + 64 * n)
        cells = 2 * (length // CELL) * n
        each = z * (C + (O > 1)) + RUN * n + C * cells + NUMBERS * n
        each = -(-each // 8) * 8 + 8
        facts = 2 * length * problem.O * C
        weights = facts + problem.O * FACTS
        packed = weights + -(-problem.O * C * problem.KW // 2)
        return cls(made, packets, z, cells, each, facts, weights, packed)
