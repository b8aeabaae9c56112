"""How a result is cut into tiles: within a number of bytes, along the chunks of what is written, little read twice.

A tile is a block of images, groups of channels, rows and columns of the result. What it reads, its *window*, has all
padded pixels in it, so that every tile is a convolution without padding, of the same stride and dilation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpuconv import dtypes, geometry, layouts, schedule
from gpuconv.geometry import IntArray
from gpuconv.problem import NO_PADS, Conv2dProblem

Block = tuple[int, int, int, int]  # extents of a tile: images, groups, rows, columns

# Bytes of a tile's window and result, at most. Larger tiles read little less twice, and reading, computing and writing
# can overlap only where there are several.
_MOST = 64 << 20
_PIECES = 8  # tiles, at least, of a large result
_LEAST = 4 << 20
_PER_TILE = 1 << 20  # bytes that are read in the time that a tile takes for itself, roughly
_PIECE = 8 << 20  # bytes that are read or written at a time, at most, so that whole tiles are not there twice


@dataclass(frozen=True)
class Axis:
    """Rows or columns: which of the ``n`` source elements the outputs read, through the border of the whole axis."""

    n: int
    k: int
    outputs: int
    before: int
    stride: int
    dilation: int
    mode: str

    @property
    def steps(self) -> geometry.Pair:
        """Stride and dilation over a window, which leaves out what no tap reads where that is most of it."""
        return geometry.table_steps(self.k, self.outputs, self.stride, self.dilation)

    def span(self, outputs: int) -> int:
        """Extent of the window of ``outputs`` neighbouring outputs."""
        return geometry.span(self.k, outputs, self.steps)

    def source(self, start: int, stop: int) -> IntArray:
        """The source element at each place of the window of the outputs ``start`` to ``stop``; -1 for the constant."""
        if self.steps == (self.stride, self.dilation):
            position = start * self.stride + np.arange(self.span(stop - start)) - self.before
        else:
            taps = np.arange(self.k) * self.dilation
            position = (np.arange(start, stop)[:, None] * self.stride + taps - self.before).ravel()
        return geometry.source_index(position, self.n, self.mode)

    def touched(self, outputs: int, chunk: int) -> int:
        """Source elements read by all tiles of ``outputs``, each in whole chunks; borders aside."""
        starts = np.arange(0, self.outputs, outputs)
        stops = np.minimum(starts + outputs, self.outputs)
        low = np.clip(starts * self.stride - self.before, 0, self.n)
        high = (stops - 1) * self.stride + geometry.window(self.k, self.dilation) - self.before
        high = np.maximum(np.clip(high, 0, self.n), low)
        return int(np.minimum(-(-high // chunk) * chunk, self.n).sum() - (low // chunk * chunk).sum())


def axes(problem: Conv2dProblem) -> tuple[Axis, Axis]:
    """The rows and the columns of ``problem``."""
    rows, columns = (
        Axis(n, k, outputs, pads[0], stride, dilation, problem.padding_mode)
        for n, k, outputs, pads, stride, dilation in zip(
            (problem.H, problem.W), (problem.KH, problem.KW), (problem.OH, problem.OW), problem.padding,
            problem.stride, problem.dilation, strict=True,
        )
    )  # fmt: skip
    return rows, columns


@dataclass(frozen=True)
class Tile:
    """One tile of the result: slices of images, groups, rows and columns."""

    number: int
    images: slice
    groups: slice
    rows: slice
    columns: slice

    @property
    def block(self) -> Block:
        """Its extents."""
        images, groups, rows, columns = (
            part.stop - part.start for part in (self.images, self.groups, self.rows, self.columns)
        )
        return images, groups, rows, columns

    def of_result(self, problem: Conv2dProblem) -> tuple[slice, slice, slice, slice]:
        """Its place in the result, in the order N O OH OW."""
        return self.images, _channels(self.groups, problem.O // problem.groups), self.rows, self.columns

    def of_image(self, problem: Conv2dProblem) -> tuple[slice, slice]:
        """The images and channels that it reads."""
        return self.images, _channels(self.groups, problem.C // problem.groups)


def _channels(groups: slice, each: int) -> slice:
    return slice(groups.start * each, groups.stop * each)


def part(problem: Conv2dProblem, block: Block) -> Conv2dProblem:
    """The problem of one tile: its window without padding."""
    rows, columns = axes(problem)
    images, groups, height, width = block
    return replace(
        problem, N=images, C=problem.C // problem.groups * groups, O=problem.O // problem.groups * groups,
        groups=groups, H=rows.span(height), W=columns.span(width), stride=(rows.steps[0], columns.steps[0]),
        dilation=(rows.steps[1], columns.steps[1]), padding=NO_PADS, padding_mode="constant", padding_value=0,
    )  # fmt: skip


def placed(layout: str, ndim: int, four: tuple[Any, ...]) -> tuple[Any, ...]:
    """What ``four`` has for N C H W, for the axes of an array of ``ndim`` axes in ``layout``."""
    order = layouts.image_axes(layout, ndim)
    result = [None] * ndim
    for axis, item in zip(order, four[4 - ndim :], strict=True):
        result[axis] = item
    return tuple(result)


def four(layout: str, shape: tuple[int, ...]) -> Block:
    """``shape``, or extents of chunks, of an array in ``layout`` for N C H W; 1 where it has no such axis."""
    given = tuple(shape[axis] for axis in layouts.image_axes(layout, len(shape)))
    N, C, H, W = (1,) * (4 - len(given)) + given
    return N, C, H, W


@dataclass(frozen=True)
class Medium:
    """How an array is read or written: in whole ``chunks`` (in the order N C H W), of which ``copies`` are made."""

    chunks: Block
    copies: int

    def piece(self, layout: str, extents: Block, size: int, most: int) -> Block:
        """Extents, in whole chunks, of what is read or written at a time of a block of elements of ``size`` bytes.

        It takes about ``most`` bytes, and at least a chunk.
        """
        piece = list(self.chunks)
        for axis in (1, 3, 2, 0) if layout == "NHWC" else (3, 2, 1, 0):
            chunk = self.chunks[axis]
            wanted = -(-extents[axis] // chunk)
            possible = most // max(math.prod(piece) * size, 1)
            piece[axis] = max(min(wanted, possible), 1) * chunk
            if possible < wanted:
                break
        N, C, H, W = piece
        return N, C, H, W


def cut(start: int, stop: int, chunk: int, size: int) -> Iterator[tuple[int, int]]:
    """The interval in parts that end where chunks do and lie in ``size`` elements of whole chunks."""
    while start < stop:
        end = min(stop, start // chunk * chunk + size)
        yield start, end
        start = end


def piece_bytes(limit: int) -> int:
    """Bytes that are read or written at a time under ``workspace_limit``."""
    return min(_PIECE, limit // 32)


@dataclass(frozen=True)
class Costs:
    """Bytes that tiles of ``problem`` take.

    Two windows and two results are there at a time: one of each computed, one read, one written. They are read and
    written in pieces, of which ``source`` and ``out`` make copies on the way.
    """

    problem: Conv2dProblem
    source: Medium
    out: Medium
    scratch: int  # of conv2d
    piece: int  # bytes of a piece, where chunks are not larger

    def window(self, block: Block) -> int:
        """Bytes of a tile's window."""
        return math.prod(part(self.problem, block).x_shape) * dtypes.itemsize(self.problem.x_dtype)

    def result(self, block: Block) -> int:
        """Bytes of a tile's result."""
        return math.prod(part(self.problem, block).y_shape) * dtypes.itemsize(self.problem.y_dtype)

    def reading(self, block: Block) -> int:
        """Bytes of what is read at a time, and of its copies."""
        p = self.problem
        rows, columns = (
            min(axis.n, (extent - 1) * axis.stride + geometry.window(axis.k, axis.dilation))
            for axis, extent in zip(axes(p), block[2:], strict=True)
        )
        extents = block[0], p.C // p.groups * block[1], rows, columns
        size = dtypes.itemsize(p.x_dtype)
        return self.source.copies * math.prod(self.source.piece(p.layout, extents, size, self.piece)) * size

    def writing(self, block: Block) -> int:
        """Bytes of the copies of what is written at a time."""
        p, size = self.problem, dtypes.itemsize(self.problem.y_dtype)
        return self.out.copies * math.prod(self.out.piece(p.layout, part(p, block).y_shape, size, self.piece)) * size

    def total(self, block: Block) -> int:
        """Bytes in use while tiles of ``block`` are read, computed and written."""
        buffers = 2 * (self.window(block) + self.result(block))
        return buffers + self.reading(block) + self.writing(block) + self.scratch

    def traffic(self, block: Block) -> int:
        """Bytes read for all tiles, and what the tiles themselves take, in bytes read in that time."""
        p, (images, groups, height, width) = self.problem, block
        rows, columns = axes(p)
        chunks = self.source.chunks
        planes = _touched(p.N, images, chunks[0]) * _touched(p.C, max(p.C // p.groups * groups, 1), chunks[1])
        read = planes * rows.touched(height, chunks[2]) * columns.touched(width, chunks[3])
        return read * dtypes.itemsize(p.x_dtype) + _PER_TILE * count(p, block)


def _touched(extent: int, size: int, chunk: int) -> int:
    """As ``Axis.touched``, of an axis that has neither kernel nor border."""
    return Axis(extent, 1, extent, 0, 1, 1, "constant").touched(size, chunk) if extent else 0


def count(problem: Conv2dProblem, block: Block) -> int:
    """Number of tiles."""
    extents = problem.N, problem.groups, problem.OH, problem.OW
    return math.prod(-(-extent // size) for extent, size in zip(extents, block, strict=True))


def tiles(problem: Conv2dProblem, block: Block) -> Iterator[Tile]:
    """Every tile, in the order in which they are made: columns fastest."""
    extents = problem.N, problem.groups, problem.OH, problem.OW
    for number, at in enumerate(schedule.blocks(extents, block)):
        yield Tile(number, *at)


def shapes(problem: Conv2dProblem, block: Block) -> set[Block]:
    """The extents that tiles have: those of ``block``, and less at the end of each axis."""
    extents = problem.N, problem.groups, problem.OH, problem.OW
    each = [{min(size, extent), extent % size or size} for extent, size in zip(extents, block, strict=True)]
    return set(itertools.product(*each))  # type: ignore[arg-type]


def granule(problem: Conv2dProblem, chunks: Block) -> Block:
    """The smallest tile that writes whole ``chunks`` of the result (in the order N O OH OW)."""
    images, channels, rows, columns = chunks
    each = problem.O // problem.groups
    groups = math.lcm(channels, each) // each
    if channels >= problem.O:  # the last chunk may reach beyond the end
        groups = problem.groups
    extents = problem.N, problem.groups, problem.OH, problem.OW
    N, G, OH, OW = (max(1, min(pair)) for pair in zip((images, groups, rows, columns), extents, strict=True))
    return N, G, OH, OW


def choose(call: str, costs: Costs, limit: int) -> Block:
    """The tile that reads least in all, of whole chunks of the result, within ``limit`` bytes."""
    problem, chunks = costs.problem, costs.out.chunks
    least = granule(problem, chunks)
    needed = costs.total(least)
    if needed > limit:
        whole = " that writes whole chunks of out" if max(least) > 1 and max(chunks) > 1 else ""
        hint = ", or give out smaller chunks" if whole else ""
        raise MemoryError(
            f"{call}: the smallest tile{whole} ({' × '.join(map(str, part(problem, least).y_shape))}) needs {needed} "
            f"bytes in all and workspace_limit is {limit}; raise it{hint}"
        )
    extents = problem.N, problem.groups, problem.OH, problem.OW
    everything = costs.window(extents) + costs.result(extents)
    most = min(_MOST, max(everything // _PIECES, _LEAST))

    def fits(block: Block) -> bool:
        if costs.total(block) > limit:
            return False
        return block == least or costs.window(block) + costs.result(block) <= most

    best, lowest = least, costs.traffic(least)
    images, groups, rows, columns = (_shares(extent, size) for extent, size in zip(extents, least, strict=True))
    for n, g, j in itertools.product(images, groups, columns):
        for i in rows:  # from the most on
            block = n, g, i, j
            if fits(block):
                cost = costs.traffic(block)
                if cost < lowest:
                    best, lowest = block, cost
                break
    return best


def _shares(extent: int, unit: int) -> list[int]:
    """Extents, largest first, that cut an axis into 1, 2, 3, 4, 6, 8, 11, ... parts of whole units."""
    units = -(-extent // unit)
    found, parts = [], 1
    while parts < units:
        found.append(-(-units // parts) * unit)
        parts = max(parts + 1, parts * 4 // 3)
    found.append(unit)
    return [min(size, max(extent, unit)) for size in dict.fromkeys(found)]
