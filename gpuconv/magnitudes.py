"""How large the sums of an integer convolution can become, told by the values of its operands.

The types of wide integers allow sums that floating point has not; the numbers in an image seldom do. One look at them
proves that every sum, and every partial sum in any order, is an integer that float64 has:

    |Σ x·k + b| ≤ max|x| · max_o Σ|k_o| + max|b|
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.problem import Conv2dProblem

# float64 has every integer up to two to this power.
DIGITS = 53
# Elements at a time, in whole rows: the second pass over them finds them in the cache.
_AT_ONCE = 1 << 15


def largest(array: np.ndarray[Any, Any]) -> int:
    """The largest magnitude in an array of integers or bools, 0 where it is empty."""
    if array.size == 0:
        return 0
    # In the order of memory; an axis that repeats its elements holds nothing new.
    array = array[tuple(slice(1 if step == 0 else None) for step in array.strides)]
    array = array.transpose(sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis])))
    array = array.reshape(tuple(extent for extent in array.shape if extent > 1) or (1,))
    rows = max(1, _AT_ONCE * len(array) // array.size)
    low = high = 0
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        low, high = min(low, int(part.min())), max(high, int(part.max()))
    return max(-low, high)


def largest_weights(problem: Conv2dProblem, k: np.ndarray[Any, Any]) -> int | None:
    """The largest sum of the magnitudes of the weights of one result; ``k`` is (G, O/G, I, KH, KW). None where that
    is beyond all use.
    """
    top = largest(k)
    if top * problem.products >= 1 << 62:
        return None
    # A result of an input gradient sums over the output channels.
    axes = (1, 3, 4) if problem.op == "input_grad" else (2, 3, 4)
    return int(np.abs(k.astype(np.int64)).sum(axes).max(initial=0))


def sum_digits(
    problem: Conv2dProblem, weights: int | None, x: np.ndarray[Any, Any], bias: np.ndarray[Any, Any] | None
) -> int | None:
    """The least d so that no sum of ``problem`` is larger than 2^d, or None where d would be larger than ``DIGITS``.

    ``weights`` is what ``largest_weights`` says. The values of x are looked at only where its type allows too much.
    """
    if weights is None:
        return None
    low, high = dtypes.RANGES[problem.x_dtype]
    added = 0 if bias is None else largest(bias)
    top = max(-low, high)
    if weights * top + added > 1 << DIGITS and weights + added <= 1 << DIGITS:
        top = max(largest(x), abs(int(problem.fill.real)))
    digits = max(weights * top + added - 1, 0).bit_length()
    return digits if digits <= DIGITS else None
