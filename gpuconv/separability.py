"""Whether a kernel is an outer product of a column and a row, which is a matter of its values.

A kernel k[p,q] = u[p]·v[q] (Gaussians, boxes, Sobel's) is a convolution with the column u after one with the row v:
KH + KW products for each output instead of KH·KW. Which kernels are told apart here, before an implementation is
chosen, so that choosing stays a matter of plain facts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# What k[p,q] and u[p]·v[q] may differ by, relative to k[p,q]: a fifth of what precision="high" allows, and more than
# what rounding a kernel, or the exponents of a Gaussian, to float32 makes of it.
TOLERANCE = 4e-6
# Where k[p,q] is zero or has few bits left at float32's lower end, the difference may be one of its smallest steps.
_STEP = 2.0**-149
# Weights at a time: of these, a few copies in float64 are made.
_AT_ONCE = 4096


def factors(k: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Columns (..., KH) and rows (..., KW), in float32, whose products are the kernels ``k`` (..., KH, KW), or None.

    Every product is within ``TOLERANCE`` of its weight, relative to that weight, so that the error of a convolution is
    within the same of ``|x| ∗ |k|`` whatever x is. The column is taken where the row has its largest weight: with what
    it makes of an image, nothing gets smaller than in a direct sum. Columns whose weights sum to more than 1 are made
    smaller by a power of two, and the row larger: no image becomes infinite halfway.
    """
    KH, KW = k.shape[-2:]
    kernels = k.reshape((-1, KH, KW))
    columns, rows = np.empty((len(kernels), KH), np.float32), np.empty((len(kernels), KW), np.float32)
    step = max(1, _AT_ONCE // (KH * KW))
    with np.errstate(all="ignore"):
        for first in range(0, len(kernels), step):
            block = slice(first, first + step)
            if not _split(kernels[block].astype(np.float64), columns[block], rows[block]):
                return None
    return columns.reshape((*k.shape[:-2], KH)), rows.reshape((*k.shape[:-2], KW))


def scratch(KH: int, KW: int) -> int:
    """Bytes that ``factors`` takes beside a copy of the kernels and what it gives."""
    return 6 * 8 * max(_AT_ONCE, KH * KW)


def _split(k: np.ndarray[Any, Any], columns: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> bool:
    """Write the factors of the kernels ``k`` (n, KH, KW); False if one of them has none."""
    each = np.arange(len(k))
    p, q = np.unravel_index(np.abs(k).reshape((len(k), -1)).argmax(1), k.shape[1:])
    largest = k[each, p, q][:, None]
    column, row = k[each, :, q], k[each, p] / np.where(largest == 0, 1, largest)
    # The exponent e of a sum s < 2^e.
    scale = np.exp2(np.maximum(np.frexp(np.abs(column).sum(1))[1], 0))[:, None]
    columns[...], rows[...] = column / scale, row * scale
    difference = columns[:, :, None].astype(np.float64) * rows[:, None]
    difference -= k
    np.abs(difference, out=difference)
    np.abs(k, out=k)
    k *= TOLERANCE
    k += _STEP
    return bool((difference <= k).all())  # False for NaN and for infinities
