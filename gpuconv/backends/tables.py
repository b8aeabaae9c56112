"""Reading an array through index tables, in NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

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
        if problem.padding_mode != "constant":
            counts = (i.stop - i.start, j.stop - j.start)
            rows, columns = (
                table.index[block.start * table.outer :][:span]
                for table, block, span in zip(tables, (i, j), problem.table_spans(*counts), strict=True)
            )
            self.x = gather(x, reads(rows), reads(columns), fill)
            tables = (
                IndexTable(np.arange(len(rows)), tables[0].outer, tables[0].inner),
                IndexTable(np.arange(len(columns)), tables[1].outer, tables[1].inner),
            )
            i, j = slice(0, counts[0]), slice(0, counts[1])
        self.rows = [reads(tables[0].tap(p, i.start, i.stop)) for p in range(problem.KH)]
        self.columns = [reads(tables[1].tap(q, j.start, j.stop)) for q in range(problem.KW)]

    def tap(self, p: int, q: int, out: Any | None = None) -> Any:
        """The pixels that tap (p, q) reads, in a new array or in ``out``."""
        return gather(self.x, self.rows[p], self.columns[q], self.fill, out)


def patch_pixels(problem: Conv2dProblem, rows: int, columns: int) -> int:
    """Pixels of the patch that ``Windows`` makes for a block, per image and channel."""
    spans = problem.table_spans(rows, columns)
    return 0 if problem.padding_mode == "constant" else spans[0] * spans[1]


class Reads(NamedTuple):
    """What a run of positions of one axis reads: ``source`` at the positions ``inside``, the constant elsewhere."""

    length: int
    inside: slice
    source: slice | IntArray


def reads(indices: IntArray) -> Reads:
    """Source indices, -1 for the constant, as a slice where they rise in equal steps, which is all there is under
    constant padding.
    """
    found = np.flatnonzero(indices >= 0)
    if not len(found):
        return Reads(len(indices), slice(0, 0), slice(0, 0))
    inside = slice(int(found[0]), int(found[-1]) + 1)
    picked = indices[inside]
    step = int(picked[1] - picked[0]) if len(picked) > 1 else 1
    if step < 1 or (picked[1:] - picked[:-1] != step).any():
        return Reads(len(indices), inside, picked)
    return Reads(len(indices), inside, slice(int(picked[0]), int(picked[-1]) + 1, step))


def gather(x: Any, rows: Reads, columns: Reads, fill: complex, out: Any | None = None) -> Any:
    """``x[..., rows, columns]``, ``fill`` where they read no source."""
    if out is None:
        out = np.empty((*x.shape[:-2], rows.length, columns.length), x.dtype)
    i, j = rows.inside, columns.inside
    if (i.start, i.stop, j.start, j.stop) != (0, rows.length, 0, columns.length):
        out[...] = fill
    if i.start == i.stop or j.start == j.stop:
        return out
    if isinstance(rows.source, slice) and isinstance(columns.source, slice):
        out[..., i, j] = x[..., rows.source, columns.source]
    else:
        down, across = (
            np.arange(read.source.start, read.source.stop, read.source.step)
            if isinstance(read.source, slice)
            else read.source
            for read in (rows, columns)
        )
        out[..., i, j] = x[..., down[:, None], across]
    return out
