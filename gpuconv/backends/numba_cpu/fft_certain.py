"""When a result by Fourier transforms keeps the promise of ``precision="highest"``, and how that is known beforehand.

The promise is relative to each output's own Σ|x||k|. A transform spreads its rounding errors over all outputs of a
tile, as large as

    E = (8·(1 + log2(TH·TW)) + C)·2⁻⁵³ · ‖x‖ · (2·‖k‖ + ‖k‖₁)    ‖x‖ of both tiles of a pair and all channels

at most: ‖x‖·‖k‖ for the errors of the two transforms (by Cauchy and Schwarz), ‖k‖₁ for the one back, whose numbers'
norm is at most ‖x‖ times the largest frequency of k. In float64 that is about 10⁻¹² of a typical sum, but it may be
much of a small one: of dark pixels beside very bright ones.

So a least Σ|x||k| of every output is found first, of a few of its products. An output's window has whole *cells* in it,
4 rows of one column, of which the largest magnitude is known; wherever in the cell that is, the weight that meets it is
no less than the least of the seven that may. A pair of tiles with an output for which

    E > min(16, (K - 1) / 4) · 2⁻²⁴ · least Σ|x||k|        of sums of K products

(or with NaN, infinity, or a kernel that has such) is summed product by product instead. In all others the error of a
result is below 2·E and one rounding, about half of what K products are allowed, and at most that of 33 roundings.

What is no further than E from an integer is that integer, and no larger than E zero: sums of integers come out exactly,
as long as E is below a half, and flat images give the zeros that a sum of products gives.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from gpuconv.backends.numba_cpu.fft_tiles import CELL, POINTS

# The least rows of a kernel: a window has a whole cell in it wherever it begins, and seven weights may meet it.
LEAST = 2 * CELL

# What a kernel's facts are: E for ‖x‖ = 1, in units of what is allowed and as it is, its POINTS pairs of a place and a
# weight, and the sum of these weights.
RELATIVE, ABSOLUTE, PLACED, TOTAL, FACTS = 0, 1, 2, 2 + 2 * POINTS, 3 + 2 * POINTS


def allowed(products: int) -> float:
    """What E may be of Σ|x||k|, for sums of so many ``products``."""
    return min(16, (products - 1) / 4) * 2.0**-24


def relative_error(C: int, pixels: int) -> float:
    """E in units of ‖x‖ · (2·‖k‖ + ‖k‖₁)."""
    return float(8 * pixels.bit_length() + C) * 2.0**-53


class Choice(NamedTuple):
    """Where the POINTS products of a kernel are looked for, each in a part of its own."""

    weights: np.ndarray[Any, Any]  # the places (c, t, q) in a row, part by part
    cells: np.ndarray[Any, Any]  # for each of them, where its cell is
    ends: tuple[int, ...]  # of the parts

    @classmethod
    def of(cls, C: int, KH: int, KW: int, TH: int, TW: int) -> Choice:
        """For kernels (C, KH, KW) and tiles of TH × TW pixels. Of many channels some are enough."""
        cells, some = _cells(KH), min(C, POINTS)
        c, t, q = np.ogrid[:some, :cells, :KW]
        c = c * C // max(some, 1)
        places = (c * cells + t) * KW + q
        # The cells of a channel are those of two tiles; that of t begins 4·(t + 1) rows below the outputs' own.
        where = c * (2 * (TH // CELL) * TW) + (t + 1) * TW + q
        parts = _parts(some, cells, KW)
        ends = np.cumsum([places[part].size for part in parts]).tolist()
        weights, found = (np.concatenate([array[part].ravel() for part in parts]) for array in (places, where))
        return cls(weights, found, tuple(ends))


def _cells(KH: int) -> int:
    """Whole cells in a window, wherever in its own cell an output lies."""
    return KH // CELL - 1


def facts(k: Any, TH: int, TW: int, choice: Choice) -> np.ndarray[Any, Any]:
    """Of the kernels k (G, O, C, KH, KW), their FACTS for tiles of TH × TW pixels."""
    G, O, C, KH, KW = k.shape
    size = np.abs(k, dtype=np.float64)
    flat = size.reshape(G * O, -1)
    found = np.zeros((G * O, FACTS))
    norms = 2 * np.sqrt(np.einsum("oi,oi->o", flat, flat)) + flat.sum(axis=1)
    norms[~np.isfinite(norms)] = np.nan  # which is never certain, as infinity would be beside an infinite least sum
    found[:, ABSOLUTE] = relative_error(C, TH * TW) * norms
    found[:, RELATIVE] = found[:, ABSOLUTE] / allowed(C * KH * KW)

    # The least of the seven weights that may meet the largest pixel of cell t, from row 4·t + 1 on.
    last = CELL * (_cells(KH) - 1)
    rows = [size[..., start : start + last + 1 : CELL, :] for start in range(1, 2 * CELL)]
    weights = functools.reduce(np.minimum, rows)  # (G, O, C, cells, KW)
    weights = weights.reshape(G * O, -1)[:, choice.weights]
    everyone, start = np.arange(G * O), 0
    for point, end in enumerate(choice.ends):
        best = weights[:, start:end].argmax(axis=1) + start
        found[:, PLACED + 2 * point] = choice.cells[best].view(np.float64)
        found[:, PLACED + 2 * point + 1] = weights[everyone, best]
        start = end
    found[:, TOTAL] = found[:, PLACED + 1 : TOTAL : 2].sum(axis=1)
    return found


def _parts(C: int, cells: int, KW: int) -> list[tuple[slice, slice, slice]]:
    """Up to POINTS parts of the kernels: the largest is cut in half, across its longest side in pixels, again and
    again.
    """
    found = [((0, C), (0, cells), (0, KW))]

    def size(part: Any) -> int:
        return math.prod(end - start for start, end in part)

    while len(found) < POINTS and size(max(found, key=size)) > 1:
        part = max(found, key=size)
        found.remove(part)
        lengths = [end - start for start, end in part]
        axis = max(range(3), key=lambda axis: (lengths[axis] > 1, lengths[axis] * (CELL if axis == 1 else 1)))
        start, end = part[axis]
        for half in ((start, (start + end) // 2), ((start + end) // 2, end)):
            found.append((*part[:axis], half, *part[axis + 1 :]))  # type: ignore[arg-type]
    return [(slice(*c), slice(*t), slice(*q)) for c, t, q in found]
