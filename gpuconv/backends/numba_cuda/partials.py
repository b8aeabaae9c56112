"""The second pass of the matrix products on a GPU where sums were cut into parts.

    y[n,o,i,j] = relu(b[o] + partial[0, g, o, pixel] + partial[1, g, o, pixel] + …)

The parts are added in their order, whoever finished first: the same call gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert


def build(dtype: str, y_dtype: str) -> Any:
    """The kernel that adds parts of ``dtype``, one thread per element of y, a stride of the grid apart."""
    ZERO, STORE = dtypes.numpy_dtype(dtype).type(0), convert.storer(y_dtype)

    def add(  # type: ignore[no-untyped-def]  # Numba infers the types
        partial, part_step, plane,  # (parts, groups, O, plane): the elements from part to part and channel to channel
        bias, has_bias, relu,
        y, y0, yN, yG, yO, yH, yW,
        parts, N, O, OH, OW, groups,  # O per group
    ):  # fmt: skip
        pixels = N * OH * OW
        element = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        while element < groups * O * pixels:
            pixel = element % pixels
            channel = element // pixels  # of all groups
            at = channel * plane + pixel
            total = partial[at]
            for part in range(1, parts):
                total += partial[at + part * part_step]
            if has_bias:
                total += bias[channel]
            if relu and total < ZERO:  # false for NaN, which passes through
                total = ZERO
            i, j = pixel // OW % OH, pixel % OW
            y[y0 + pixel // (OH * OW) * yN + channel // O * yG + channel % O * yO + i * yH + j * yW] = STORE(total)
            element += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return add
