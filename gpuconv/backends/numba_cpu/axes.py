"""One axis of a strip: which source element stands at each place, and where each kernel tap begins to read.

Places are sorted into *phases*, by position modulo the stride, so that what neighbouring outputs read of one tap lies
side by side. Where stride and dilation leave few places in common, each tap gets a phase of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpuconv import geometry
from gpuconv.geometry import IntArray


@dataclass(frozen=True)
class Axis:
    """``source[f, t]`` is the source element at place t of phase f, -1 for the constant. Tap p of output i reads place
    ``i + shift[p]`` of phase ``phase[p]``.
    """

    source: IntArray
    phase: tuple[int, ...]
    shift: tuple[int, ...]
    inside: tuple[tuple[int, int, int], ...]  # per phase: places [from, to) that step through the source, and its first
    outputs: int
    stride: int

    @property
    def phases(self) -> int:
        """Number of phases."""
        return int(self.source.shape[0])

    @property
    def reach(self) -> int:
        """Places that an output reads beyond its own."""
        return max(self.shift)

    @property
    def extent(self) -> int:
        """Places of a phase."""
        return self.outputs + self.reach

    @property
    def shared(self) -> int:
        """Places that the end of a row may share with the beginning of the next: both hold the constant."""
        first, last, _ = self.inside[0]
        if self.phases > 1 or first == last or (self.source[0, :first] >= 0).any() or (self.source[0, last:] >= 0).any():
            return 0
        return min(first, self.extent - last)


def axis(n: int, k: int, outputs: int, before: int, stride: int, dilation: int, mode: str) -> Axis:
    """The axis of ``n`` elements that ``outputs`` outputs of a kernel of ``k`` taps read."""
    taps = [p * dilation for p in range(k)]
    residues = sorted({tap % stride for tap in taps})
    reach = taps[-1] // stride
    if len(residues) * (outputs + reach) <= k * outputs:
        starts, phase = residues, tuple(residues.index(tap % stride) for tap in taps)
        shift = tuple(tap // stride for tap in taps)
    else:
        starts, phase, shift = taps, tuple(range(k)), (0,) * k
    places = np.arange(outputs + max(shift))
    positions = np.array(starts)[:, None] + places * stride - before
    source = geometry.source_index(positions, n, mode)
    inside = []
    for start in starts:
        # Where the first place inside is, and the first beyond.
        first = min(max(-(-(before - start) // stride), 0), len(places))
        last = min(max(-(-(n + before - start) // stride), first), len(places))
        inside.append((first, last, start + first * stride - before))
    return Axis(np.ascontiguousarray(source), phase, shift, tuple(inside), outputs, stride)
