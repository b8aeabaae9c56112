"""A matrix product whose sums stay short."""

from __future__ import annotations

from typing import Any

import numpy as np

# Longer sums are cut, where BLAS would let one run on: it keeps sums short only in products large enough to be blocked
# for the cache. 512 is near its own blocks.
_LONG, _BLOCK = 1024, 512
_UNBLOCKED = 2e6  # multiplications; OpenBLAS's kernels for small matrices end at about half of that


def matmul(a: Any, b: Any, out: Any, accumulate: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``, for stacks of matrices; a long sum over the products of a small one is made
    of short sums.

    One running float32 sum over thousands of products of one sign loses a digit that short sums keep.
    """
    rows, length, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    short = length <= _LONG or (min(rows, columns) > 1 and rows * columns * length > _UNBLOCKED)
    step = max(length, 1) if short else _BLOCK
    first = 0
    if not accumulate:
        np.matmul(a[..., :step], b[..., :step, :], out=out)
        first = step
    if first >= length:
        return
    part = np.empty_like(out)
    for start in range(first, length, step):
        block = slice(start, start + step)
        np.matmul(a[..., block], b[..., block, :], out=part)
        out += part
