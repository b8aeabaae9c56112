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
    """Tap p of output i reads place ``i + shift[p]`` of phase ``phase[p]``. A phase begins at position ``starts[f]`` of
    the padded axis and goes on in steps of the stride.
    """

    n: int
    outputs: int
    before: int
    stride: int
    mode: str
    starts: tuple[int, ...]
    phase: tuple[int, ...]
    shift: tuple[int, ...]

    @property
    def phases(self) -> int:
        """Number of phases."""
        return len(self.starts)

    @property
    def reach(self) -> int:
        """Places that an output reads beyond its own."""
        return max(self.shift)

    @property
    def extent(self) -> int:
        """Places of a phase."""
        return self.outputs + self.reach

    @property
    def inside(self) -> list[tuple[int, int, int]]:
        """Per phase: the places [from, to) that step through the source, and the source element at the first."""
        found = []
        for start in self.starts:
            first = min(max(-(-(self.before - start) // self.stride), 0), self.extent)
            last = min(max(-(-(self.n + self.before - start) // self.stride), first), self.extent)
            found.append((first, last, start + first * self.stride - self.before))
        return found

    @property
    def shared(self) -> int:
        """Places that the end of a row may share with the beginning of the next: both hold the constant."""
        first, last, _ = self.inside[0]
        if self.phases > 1 or first == last or self.mode != "constant":
            return 0
        return min(first, self.extent - last)

    def source(self) -> IntArray:
        """The source element at each place (phases × extent), -1 for the constant."""
        positions = np.array(self.starts)[:, None] + np.arange(self.extent) * self.stride - self.before
        return np.ascontiguousarray(geometry.source_index(positions, self.n, self.mode))


def axis(n: int, k: int, outputs: int, before: int, stride: int, dilation: int, mode: str) -> Axis:
    """The axis of ``n`` elements that ``outputs`` outputs of a kernel of ``k`` taps read."""
    taps = [p * dilation for p in range(k)]
    residues = sorted({tap % stride for tap in taps})
    if len(residues) * (outputs + taps[-1] // stride) <= k * outputs:
        place = {residue: f for f, residue in enumerate(residues)}
        phase = tuple(place[tap % stride] for tap in taps)
        return Axis(n, outputs, before, stride, mode, tuple(residues), phase, tuple(tap // stride for tap in taps))
    return Axis(n, outputs, before, stride, mode, tuple(taps), tuple(range(k)), (0,) * k)
