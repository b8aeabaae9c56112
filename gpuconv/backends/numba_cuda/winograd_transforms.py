"""The transforms of Winograd's F(4×4, 3×3), of one axis each, as functions for kernels.

    y = Aᵀ [ (G k) ⊙ (Bᵀ x) ]       x: 6 neighbouring pixels, k: 3 weights, y: 4 neighbouring outputs

The points at which the products are made are 0, ±1, ±2 and ∞. Done along columns and then along rows, 36 products make
the 16 outputs that take 144 directly. Every factor of ``image`` and of ``result`` is a power of two: whether a compiler
fuses the product with the addition after it or not, the bits are the same.

A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

TILE, WINDOW = 4, 6  # the sides of what a tile makes and of what it reads
POINTS = WINDOW * WINDOW

_TWO, _FOUR, _EIGHT = np.float32(2), np.float32(4), np.float32(8)
_QUARTER, _SIXTH, _TWELFTH, _TWENTYFOURTH = (np.float32(1 / n) for n in (4, 6, 12, 24))


@cuda.jit(device=True, inline="always")
def image(a, b, c, d, e, f):  # type: ignore[no-untyped-def]  # Numba infers the types
    """Bᵀ x."""
    near, far = e - _FOUR * c, d - _FOUR * b
    even, odd = e - c, _TWO * (d - b)
    return _FOUR * (a - c) + even, near + far, near - far, even + odd, even - odd, _FOUR * (b - d) + (f - d)


@cuda.jit(device=True, inline="always")
def result(a, b, c, d, e, f):  # type: ignore[no-untyped-def]
    """Aᵀ m."""
    near, less, far, apart = b + c, b - c, d + e, d - e
    return a + near + far, less + _TWO * apart, near + _FOUR * far, (less + _EIGHT * apart) + f


@cuda.jit(device=True, inline="always")
def kernel(a, b, c):  # type: ignore[no-untyped-def]
    """G k."""
    ends, wide = a + c, a + _FOUR * c
    return (
        _QUARTER * a,
        -_SIXTH * (ends + b),
        -_SIXTH * (ends - b),
        _TWENTYFOURTH * wide + _TWELFTH * b,
        _TWENTYFOURTH * wide - _TWELFTH * b,
        c,
    )
