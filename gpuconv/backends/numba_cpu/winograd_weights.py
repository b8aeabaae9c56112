"""Weights for ``winograd``: transformed, point by point, in panels as its micro-kernels read them.

transformed[g][point][panel][c][i] = (G k Gᵀ)[point] of k[g, panel·rows + i, c]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv.backends.numba_cpu import runtime, weights, winograd_transforms
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.vectors import Lanes, get
from gpuconv.backends.numba_cpu.winograd_transforms import POINTS

# The table of arguments.
K, TRANSFORMED, ROOM = range(3)
WG, WO, WC, WSG, WSO, WSC, WSP, WSQ, WSTEP, PANELS = range(runtime.ARRAYS, runtime.ARRAYS + 10)

# Channels of which a thread packs the weights before it transforms them.
_PACKED = 32


def room(lanes: Lanes, rows: int) -> int:
    """Elements, whole cache lines, that a thread needs to transform weights in panels of ``rows`` output channels."""
    unit = max(lanes.count, 64 // lanes.size)
    return -(-(9 * rows * (_PACKED + 1) + 2 * lanes.count) // unit) * unit


class Transform:
    """The transform of weights of one shape and strides."""

    def __init__(self, k: Any, lanes: Lanes, rows: int, panels: int, step: int, threads: int) -> None:
        """For views like ``k`` (G, O, C, 3, 3), of any strides; ``panels`` of a group, and ``step`` elements from point
        to point.
        """
        self.lanes, self.converted = lanes, not k.dtype.isnative
        groups, outputs, channels = k.shape[:3]
        strides = np.empty_like(k, lanes.dtype).strides if self.converted else k.strides
        # Starting threads costs more than transforming little.
        threads = threads if k.size >= 1 << 13 else 1
        self.count, self.room = groups * POINTS * step, threads * room(lanes, rows)
        kernel = runtime.kernel(f"winograd_weights_{lanes}_{rows}", lambda: _transformer(lanes, rows))
        self.task = runtime.Task(kernel, [groups, outputs, channels, *strides, step, panels], threads)

    def __call__(self, k: Any) -> np.ndarray[Any, Any]:
        """The transform of ``k``."""
        if self.converted:
            k = k.astype(self.lanes.dtype)
        transformed = runtime.aligned(self.count, self.lanes.dtype)
        self.task(k, transformed, runtime.aligned(self.room, self.lanes.dtype))
        return transformed


def _transformer(lanes: Lanes, rows: int) -> Callable[..., None]:
    size, needed, transform = lanes.size, room(lanes, rows), panel(lanes, rows)

    def transform_weights(arguments, thread, threads):
        O_, C_, step = get(arguments, WO), get(arguments, WC), get(arguments, WSTEP)
        so, sc, sp, sq = get(arguments, WSO), get(arguments, WSC), get(arguments, WSP), get(arguments, WSQ)
        own = get(arguments, ROOM) + size * thread * needed
        panels = get(arguments, PANELS)
        tasks = get(arguments, WG) * panels
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            g, o = task // panels, task % panels * rows
            to = get(arguments, TRANSFORMED) + size * (g * POINTS * step + o * C_)
            source = get(arguments, K) + g * get(arguments, WSG) + o * so
            transform(to, own, source, max(min(rows, O_ - o), 0), C_, so, sc, sp, sq, step)

    return transform_weights


@functools.lru_cache(maxsize=64)
def panel(lanes: Lanes, rows: int) -> Any:
    """A function that transforms the weights of a panel at ``source``, of which the first ``present`` exist."""
    size = lanes.size
    pack_block = weights.block(lanes, rows)
    transform = winograd_transforms.kernel(lanes, rows)

    @compiled
    def transformed(to, own, source, present, channels, so, sc, sp, sq, step):
        for c in range(0, channels, _PACKED):
            count = min(_PACKED, channels - c)
            pack_block(own, source + c * sc, present, count, 3, 3, so, sc, sp, sq)
            transform((to + size * c * rows, own, step, count))

    return transformed
