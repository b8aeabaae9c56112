"""The kernels of ``numba_cuda.patches``: one thread per element of the result, a stride of the grid apart.

    unfold  y[n,c,p,q,i,j] = x[n,c, row(i,p), column(j,q)], 0 outside x
    fold    x[n,c,h,w] = Σ_pq y[n,c,p,q, (h + top - p·dh) / sh, (w + left - q·dw) / sw], where the divisions are exact

Both gather: no element is written twice, and fold adds in the same order every time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert

# Elements move as bits of their size: no arithmetic touches them, NaN payloads included.
WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64", 16: "complex128"}


def build_unfold(itemsize: int) -> Any:
    """The kernel that copies elements of ``itemsize`` bytes."""
    ZERO = np.dtype(WORDS[itemsize]).type(0)

    def unfold(  # type: ignore[no-untyped-def]  # Numba infers the types
        x, x0, xN, xC, xH, xW,  # the elements of x, the offset of its first, its strides
        y, y0, yN, yC, yP, yQ, yI, yJ,
        row_table, row_outer, row_inner, column_table, column_outer, column_inner,
        N, C, KH, KW, OH, OW,
    ):  # fmt: skip
        element = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while element < N * C * KH * KW * OH * OW:
            j = element % OW
            i = element // OW % OH
            q = element // (OW * OH) % KW
            p = element // (OW * OH * KW) % KH
            c = element // (OW * OH * KW * KH) % C
            n = element // (OW * OH * KW * KH * C)
            row = row_table[i * row_outer + p * row_inner]
            column = column_table[j * column_outer + q * column_inner]
            value = ZERO
            if row >= 0 and column >= 0:
                value = x[x0 + n * xN + c * xC + row * xH + column * xW]
            y[y0 + n * yN + c * yC + p * yP + q * yQ + i * yI + j * yJ] = value
            element += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return unfold


def build_fold(x_dtype: str, y_dtype: str) -> Any:
    """The kernel that sums windows of ``x_dtype`` into a result of ``y_dtype``."""
    sum_dtype = "float32" if y_dtype in ("float16", "bfloat16") else y_dtype
    NUMBER = dtypes.numpy_dtype(sum_dtype).type
    ZERO = NUMBER(0)
    load, store = convert.loader(x_dtype, sum_dtype), convert.storer(y_dtype)

    def fold(  # type: ignore[no-untyped-def]  # Numba infers the types
        y, y0, yN, yC, yP, yQ, yI, yJ,
        x, x0, xN, xC, xH, xW,
        N, C, H, W, KH, KW, OH, OW, sh, sw, dh, dw, top, left,
    ):  # fmt: skip
        element = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while element < N * C * H * W:
            w = element % W
            h = element // W % H
            c = element // (W * H) % C
            n = element // (W * H * C)
            total = ZERO
            for p in range(KH):
                down = h + top - p * dh
                i = down // sh
                if down >= 0 and i * sh == down and i < OH:
                    for q in range(KW):
                        across = w + left - q * dw
                        j = across // sw
                        if across >= 0 and j * sw == across and j < OW:
                            total += NUMBER(load(y[y0 + n * yN + c * yC + p * yP + q * yQ + i * yI + j * yJ]))
            x[x0 + n * xN + c * xC + h * xH + w * xW] = store(total)
            element += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return fold
