"""Reading an array through index tables, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv.geometry import IntArray


def as_slice(indices: IntArray) -> slice | None:
    """The slice that selects ``indices`` when they rise in equal steps, else None."""
    if len(indices) == 1:
        return slice(int(indices[0]), int(indices[0]) + 1)
    step = int(indices[1] - indices[0])
    if step < 1 or np.any(np.diff(indices) != step):
        return None
    return slice(int(indices[0]), int(indices[-1]) + 1, step)


def inside(indices: IntArray) -> slice:
    """The run of positions that read the source (are not -1); under constant padding there is one."""
    reads = np.flatnonzero(indices >= 0)
    return slice(int(reads[0]), int(reads[-1]) + 1) if len(reads) else slice(0, 0)


def gather(x: Any, rows: IntArray, columns: IntArray, fill: complex, out: Any | None = None) -> Any:
    """``x[..., rows, columns]`` with ``fill`` wherever an index is -1.

    Equal steps, which is all there is under constant padding, are read through slices without index arrays.
    """
    if out is None:
        out = np.empty((*x.shape[:-2], len(rows), len(columns)), x.dtype)
    i, j = inside(rows), inside(columns)
    if i != slice(0, len(rows)) or j != slice(0, len(columns)):
        out[...] = fill
    if i.start == i.stop or j.start == j.stop:
        return out
    picked = (rows[i], columns[j])
    row_steps, column_steps = map(as_slice, picked)
    if row_steps is None or column_steps is None:
        out[..., i, j] = x[..., picked[0][:, None], picked[1]]
    else:
        out[..., i, j] = x[..., row_steps, column_steps]
    return out
