"""Weights as the matrix products on a GPU read them, 16 aligned bytes at a time.

    panels[g, u, slice, …] = k[g, o, c, p, q]   with o = u·outputs + v and the slot's (c,p,q);
                                                0 where there is no such output or product

A slice is ``depth`` slots by ``outputs``, or where ``along_slots`` the other way round: (…) is (d, v) or (v, d). What a
block reads is one run of memory, its outputs rounded up to a whole tile and its slots to whole slices, so that the
kernel asks for no bounds. Slots are in one of two orders:

    by tap   (p, q, c), the channels of each tap rounded up to whole slices: a slice is of one tap
    mixed    (c, p, q): no slot is wasted between the taps
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda  # a global of this module: the simulator replaces it there

from gpuconv import dtypes


def build(dtype: str, outputs: int, depth: int, by_tap: bool, along_slots: bool = False, together: bool = False) -> Any:
    """The kernel that packs elements of ``dtype``, one thread per element of the panels, a stride of the grid apart.

    ``together``: c is r·images + n, and n and r have strides of their own, see ``columns_together``.
    """
    ZERO = dtypes.numpy_dtype(dtype).type(0)
    OUTPUTS, DEPTH, BY_TAP, ALONG_SLOTS, TOGETHER = outputs, depth, by_tap, along_slots, together
    SLICE = OUTPUTS * DEPTH

    def pack(  # type: ignore[no-untyped-def]  # Numba infers the types
        k, k0, kG, kO, kC, kH, kW,  # the elements of k, the offset of its first, its strides
        panels, first_slot, slots,
        C, O, KH, KW, groups,  # C and O per group
        images, kR,  # with columns together: images, and the stride of r
    ):  # fmt: skip
        element = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        tiles_o = (O + OUTPUTS - 1) // OUTPUTS
        while element < groups * tiles_o * slots * OUTPUTS:
            inside, before = element % SLICE, element // SLICE
            d, v = inside // OUTPUTS, inside % OUTPUTS
            if ALONG_SLOTS:
                d, v = inside % DEPTH, inside // DEPTH
            slices = slots // DEPTH
            slot = first_slot + before % slices * DEPTH + d
            o = before // slices % tiles_o * OUTPUTS + v
            group = before // (slices * tiles_o)
            if BY_TAP:
                slots_c = (C + DEPTH - 1) // DEPTH * DEPTH
                tap, c = slot // max(slots_c, 1), slot % max(slots_c, 1)
            else:
                c, tap = slot // (KH * KW), slot % (KH * KW)
            value = ZERO
            if o < O and c < C and tap < KH * KW:
                at = k0 + group * kG + o * kO + tap // KW * kH + tap % KW * kW
                value = k[at + c % images * kC + c // images * kR if TOGETHER else at + c * kC]
            panels[element] = value
            element += np.int64(cuda.gridDim.x) * cuda.blockDim.x

    return pack
