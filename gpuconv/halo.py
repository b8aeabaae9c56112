"""Which elements of an array in blocks each block of a convolution's result reads: exact integers, one axis at a time.

An axis of x is a row of blocks, given by their extents (dask's ``chunks``); an axis of the result is cut into blocks
of its own. A ``Reach`` says what one of those reads, and which convolution of that alone gives it. Padding and stride
are those of the whole axis: a block in the middle is not padded, and its first window begins where the stride of the
whole says.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpuconv import geometry
from gpuconv.geometry import IntArray, Pair

Chunks = tuple[int, ...]
Part = tuple[int, int, int]  # of one block: its position in the row, and where in it what is read starts and stops

# A result needs no more blocks per axis than this, as long as larger blocks help: each is a piece of a task's input.
_FEW = 6
# A border much larger than x's own blocks is cut into blocks of at least so many outputs, and at most so many blocks.
_LEAST, _MOST = 64, 1000
# Windows with so many times more elements than products have large gaps, which are left out.
_SPARSE = 4


class Row:
    """The blocks of one axis."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks
        self.ends = list(itertools.accumulate(chunks))
        self.starts = [0, *self.ends[:-1]]
        self.size = self.ends[-1]

    def parts(self, start: int, stop: int) -> tuple[Part, ...]:
        """What the blocks have of the elements ``start`` to ``stop``; of none, the empty part of one block."""
        if start >= stop:
            return ((0, 0, 0),)
        blocks = range(bisect.bisect_right(self.ends, start), bisect.bisect_left(self.ends, stop) + 1)
        return tuple(
            (block, max(start - self.starts[block], 0), min(stop - self.starts[block], self.chunks[block]))
            for block in blocks
            if self.chunks[block]
        )


@dataclass(frozen=True)
class Reach:
    """What one block of ``outputs`` reads along one axis, and the convolution that makes it of that.

    The parts, one after the other, are what is read; each element once, in the order of the axis. Where ``table`` is
    set, they are gathered by the index table that ``geometry.index_table`` makes of it, and hold every element that the
    table names; ``firsts`` are the positions on the whole axis at which the parts begin.
    """

    outputs: int
    parts: tuple[Part, ...]
    stride: int
    dilation: int
    padding: Pair = (0, 0)
    firsts: tuple[int, ...] = ()
    table: tuple[int, int, int, int, int, int, str] | None = None
    output_padding: int = 0  # of a transposed convolution

    def gathered(self) -> IntArray:
        """Where in the parts, laid end to end, each element of the window is; -1 where the padding constant stands."""
        assert self.table is not None
        index = geometry.index_table(*self.table).index
        firsts = np.array(self.firsts)
        extents = np.array([stop - start for _, start, stop in self.parts])
        part = np.maximum(np.searchsorted(firsts, index, side="right") - 1, 0)
        local = index - firsts[part] + (np.cumsum(extents) - extents)[part]
        return np.where(index < 0, -1, local)


def forward(
    chunks: Chunks, k: int, outputs: int, padding: Pair, stride: int, dilation: int, mode: str
) -> tuple[Chunks, list[Reach]]:
    """The blocks of x to work on, which are ``chunks`` or neighbours of them made one, and what each block of the
    result reads of them.
    """
    width = geometry.window(k, dilation)

    def planned(chunks: Chunks) -> list[Reach]:
        row, cut = Row(chunks), _forward_blocks(chunks, width, outputs, padding[0], stride)
        return [
            _forward_reach(row, k, end - size, size, padding[0], stride, dilation, mode)
            for size, end in zip(cut, itertools.accumulate(cut), strict=True)
        ]

    return _of_few_blocks(chunks, width, planned)


def transposed(
    chunks: Chunks, k: int, outputs: int, before: int, stride: int, dilation: int
) -> tuple[Chunks, list[Reach]]:
    """The same for a transposed convolution of x, whose result begins ``before`` elements after that of no padding."""
    width = geometry.window(k, dilation)

    def planned(chunks: Chunks) -> list[Reach]:
        # The outputs in the middle of what an element reaches are in its block; all of them, where they are stride
        # times as many.
        row = Row(chunks)
        shift = 0 if outputs == row.size * stride else (width - 1) // 2 - before
        cut = _cut(chunks, [end * stride + shift for end in row.ends], outputs, stride, 1)
        return [
            _transposed_reach(row, width, end - size, size, before, stride, dilation)
            for size, end in zip(cut, itertools.accumulate(cut), strict=True)
        ]

    return _of_few_blocks(chunks, width, planned)


def groups(chunks: Chunks, count: int, channels: int) -> tuple[Chunks, list[tuple[Pair, tuple[Part, ...]]]]:
    """Runs of ``count`` groups of ``channels`` each that follow the blocks of the channel axis, as (start, stop), and
    the parts that each run reads; before them the blocks to work on. One group is never cut.
    """
    row = Row(chunks)
    stops = [count]
    if count > 1 and channels > 0:
        stops = sorted({-(-end // channels) for end in row.ends} - {0})
    runs = list(zip([0, *stops], stops, strict=False))
    read = [row.parts(start * channels, stop * channels) for start, stop in runs]
    if max(map(len, read)) > _FEW:
        chunks = tuple((stop - start) * channels for start, stop in runs)
        read = [((run, 0, extent),) for run, extent in enumerate(chunks)]
    return chunks, list(zip(runs, read, strict=True))


def _of_few_blocks(chunks: Chunks, width: int, planned: Callable[[Chunks], list[Reach]]) -> tuple[Chunks, list[Reach]]:
    """What ``planned`` makes of the blocks, or of larger ones where many are smaller than what a window needs."""
    reaches = planned(chunks)
    if max(len(reach.parts) for reach in reaches) > _FEW:
        merged = _merged(chunks, width - 1)
        if merged != chunks:
            return merged, planned(merged)
    return chunks, reaches


def _merged(chunks: Chunks, least: int) -> Chunks:
    """Neighbouring blocks made one until each has ``least`` elements, as far as there are so many."""
    merged, run = [], 0
    for extent in chunks:
        run += extent
        if run >= least:
            merged.append(run)
            run = 0
    if run:
        merged[-1:] = [merged[-1] + run] if merged else [run]
    return tuple(merged)


def _forward_blocks(chunks: Chunks, width: int, outputs: int, before: int, stride: int) -> Chunks:
    """Blocks of the result: those of x, where there are as many outputs as elements; else an output is in the block
    that has the middle of its window.
    """
    ends = list(itertools.accumulate(chunks))
    if outputs == ends[-1] and stride == 1:
        return tuple(extent for extent in chunks if extent) or (0,)
    shift = before - (width - 1) // 2
    return _cut(chunks, [-(-(end + shift) // stride) for end in ends], outputs, 1, stride)


def _cut(chunks: Chunks, stops: Sequence[int], outputs: int, times: int, over: int) -> Chunks:
    """Blocks of ``outputs`` that end at ``stops``; empty ones are left out, and those in a border that is far larger
    than x's blocks (an element has ``times / over`` outputs) are cut.
    """
    stops = [min(max(stop, 0), outputs) for stop in stops[:-1]] + [outputs]
    sizes = [stop - start for start, stop in zip([0, *stops], stops, strict=False) if stop > start]
    usual = max(-(-max(chunks) * times // over), _LEAST, outputs // _MOST)
    found: list[int] = []
    for size in sizes:
        pieces = -(-size // usual) if size > 2 * usual else 1
        found += [size * (piece + 1) // pieces - size * piece // pieces for piece in range(pieces)]
    return tuple(found) or (0,)


def _forward_reach(
    row: Row, k: int, first: int, outputs: int, before: int, stride: int, dilation: int, mode: str
) -> Reach:
    """What the ``outputs`` from ``first`` on read."""
    start = first * stride - before
    stop = start + geometry.span(k, outputs, (stride, dilation)) if outputs else start
    sparse = stop - start > _SPARSE * outputs * k
    if not sparse and (mode == "constant" or (start >= 0 and stop <= row.size)):
        low, high = max(start, 0), min(stop, row.size)
        if low >= high:  # nothing but padding
            return Reach(outputs, row.parts(0, 0), stride, dilation, (stop - start, 0))
        return Reach(outputs, row.parts(low, high), stride, dilation, (low - start, stop - high))
    table = (row.size, k, outputs, before - first * stride, stride, dilation, mode)
    made = geometry.index_table(*table)
    wanted = np.unique(made.index[made.index >= 0])
    if not wanted.size:
        return Reach(outputs, row.parts(0, 0), made.outer, made.inner, firsts=(0,), table=table)
    blocks, cuts = np.unique(np.searchsorted(row.ends, wanted, side="right"), return_index=True)
    parts, firsts = [], []
    for block, mine in zip(blocks.tolist(), np.split(wanted, cuts[1:]), strict=True):
        origin, low, high = row.starts[block], int(mine[0]), int(mine[-1]) + 1
        firsts.append(low)
        parts.append((block, low - origin, high - origin))
    return Reach(outputs, tuple(parts), made.outer, made.inner, firsts=tuple(firsts), table=table)


def _transposed_reach(row: Row, width: int, first: int, outputs: int, before: int, stride: int, dilation: int) -> Reach:
    """What the ``outputs`` from ``first`` on of a transposed convolution read; at least one element of x."""
    start, stop = first + before, first + before + outputs
    low = min(max(-(-(start - width + 1) // stride), 0), start // stride, row.size - 1)
    high = max(min((stop - 1) // stride, row.size - 1), low) + 1
    reach = (high - low - 1) * stride + width  # of what is read, from low·stride on
    cut = reach - (stop - low * stride)
    return Reach(
        outputs, row.parts(low, high), stride, dilation, (start - low * stride, max(cut, 0)),
        output_padding=max(-cut, 0),
    )  # fmt: skip
