"""Reading an array through index tables, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv.geometry import IndexTable, IntArray
from gpuconv.problem import Conv2dProblem


class Windows:
    """What one block of outputs reads: ``tap(p, q)`` gives the pixels of one kernel tap.

    Under constant padding a tap is a slice of x with a border. The other modes reach across x, so a patch with all that
    the block reads is made first, and each tap is a slice of it.
    """

    def __init__(
        self,
        problem: Conv2dProblem,
        tables: tuple[IndexTable, IndexTable],
        x: Any,
        i: slice,
        j: slice,
        fill: complex,
    ) -> None:
        self.x, self.fill = x, fill
        self.tables, self.blocks = tables, (i, j)
        if problem.padding_mode != "constant":
            counts = (i.stop - i.start, j.stop - j.start)
            rows, columns = (
                table.index[block.start * table.outer :][:span]
                for table, block, span in zip(tables, (i, j), problem.table_spans(*counts), strict=True)
            )
            self.x = gather(x, rows, columns, fill)
            self.tables = (
                IndexTable(np.arange(len(rows)), tables[0].outer, tables[0].inner),
                IndexTable(np.arange(len(columns)), tables[1].outer, tables[1].inner),
            )
            self.blocks = slice(0, counts[0]), slice(0, counts[1])

    def tap(self, p: int, q: int, out: Any | None = None) -> Any:
        """The pixels that tap (p, q) reads, in a new array or in ``out``."""
        (rows, columns), (i, j) = self.tables, self.blocks
        return gather(self.x, rows.tap(p, i.start, i.stop), columns.tap(q, j.start, j.stop), self.fill, out)


def patch_pixels(problem: Conv2dProblem, rows: int, columns: int) -> int:
    """Pixels of the patch that ``Windows`` makes for a block, per image and channel."""
    spans = problem.table_spans(rows, columns)
    return 0 if problem.padding_mode == "constant" else spans[0] * spans[1]


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
