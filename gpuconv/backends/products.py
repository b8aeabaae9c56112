"""A matrix product whose sums stay short."""

from __future__ import annotations

from typing import Any

import numpy as np

# Longer sums are cut, where BLAS would let one run on: it keeps sums short only in products large enough to be blocked
# for the cache. 512 is near its own blocks.
_LONG, _BLOCK = 1024, 512
_UNBLOCKED = 2e6  # multiplications; OpenBLAS's kernels for small matrices end at about half of that


def matmul(a: Any, b: Any, out: Any) -> None:
    """``out = a @ b`` for stacks of matrices; a long sum over the products of a small one is made of short sums.

    One running float32 sum over thousands of products of one sign loses a digit that short sums keep.
    """
    rows, length, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    if length <= _LONG or (min(rows, columns) > 1 and rows * columns * length > _UNBLOCKED):
        np.matmul(a, b, out=out)
        return
    np.matmul(a[..., :_BLOCK], b[..., :_BLOCK, :], out=out)
    part = np.empty_like(out)
    for start in range(_BLOCK, length, _BLOCK):
        block = slice(start, start + _BLOCK)
        np.matmul(a[..., block], b[..., block, :], out=part)
        out += part
