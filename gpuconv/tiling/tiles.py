"""How a result is cut into tiles: within a number of bytes, along the chunks of what is written, little read twice.

A tile is a block of images, groups of channels, rows and columns of the result. What it reads, its *window*, has all
padded pixels in it, so that every tile is a convolution without padding, of the same stride and dilation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes, geometry, layouts, schedule
from gpuconv.geometry import IntArray
from gpuconv.problem import NO_PADS, Conv2dProblem

Block = tuple[int, int, int, int]  # extents of a tile: images, groups, rows, columns

_PER_TILE = 1 << 20  # bytes that are read in the time that a tile takes for itself, roughly
_SOME = 4096  # tiles of an axis that are counted one by one; of more, every second or third ...
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

    def reach(self, outputs: int) -> int:
        """Source elements from the first to the last that ``outputs`` neighbouring outputs read, at most."""
        return min(self.n, (outputs - 1) * self.stride + geometry.window(self.k, self.dilation))

    @lru_cache(maxsize=4096)  # noqa: B019 - an axis is a few integers
    def touched(self, outputs: int, chunk: int) -> int:
        """Source elements read by all tiles of ``outputs``, each in whole chunks; borders aside."""
        count = -(-self.outputs // outputs)
        some = min(count, _SOME)
        starts = np.arange(some) * (count // some) * outputs
        stops = np.minimum(starts + outputs, self.outputs)
        low = np.clip(starts * self.stride - self.before, 0, self.n)
        high = (stops - 1) * self.stride + geometry.window(self.k, self.dilation) - self.before
        high = np.maximum(np.clip(high, 0, self.n), low)
        read = np.minimum(-(-high // chunk) * chunk, self.n) - low // chunk * chunk
        return int(read.sum()) * count // some


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

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        """The rows and the columns."""
        return axes(self.problem)

    def channels(self, groups: int) -> tuple[int, int]:
        """Channels of the source and of the result in ``groups``."""
        return self.problem.C // self.problem.groups * groups, self.problem.O // self.problem.groups * groups

    def tile(self, block: Block) -> int:
        """Bytes of a tile's window and result."""
        images, groups, height, width = block
        (C, O), (rows, columns) = self.channels(groups), self.axes
        window = C * rows.span(height) * columns.span(width) * dtypes.itemsize(self.problem.x_dtype)
        return images * (window + O * height * width * dtypes.itemsize(self.problem.y_dtype))

    def reading(self, block: Block) -> int:
        """Bytes of what is read at a time, and of its copies."""
        images, groups, height, width = block
        down, across = (axis.reach(extent) for axis, extent in zip(self.axes, (height, width), strict=True))
        extents, size = (images, self.channels(groups)[0], down, across), dtypes.itemsize(self.problem.x_dtype)
        return self.source.copies * math.prod(self.source.piece(self.problem.layout, extents, size, self.piece)) * size

    def writing(self, block: Block) -> int:
        """Bytes of the copies of what is written at a time."""
        images, groups, height, width = block
        extents, size = (images, self.channels(groups)[1], height, width), dtypes.itemsize(self.problem.y_dtype)
        return self.out.copies * math.prod(self.out.piece(self.problem.layout, extents, size, self.piece)) * size

    def total(self, block: Block) -> int:
        """Bytes in use while tiles of ``block`` are read, computed and written."""
        return 2 * self.tile(block) + self.reading(block) + self.writing(block) + self.scratch

    def traffic(self, block: Block) -> int:
        """What all tiles take, in bytes read in that time: what is read, in whole chunks, what every tile takes for
        itself, and the first one's reading and the last one's writing, which overlap with nothing.
        """
        p, (images, groups, height, width) = self.problem, block
        planes = _touched(p.N, images, self.source.chunks[0])
        planes *= _touched(p.C, max(self.channels(groups)[0], 1), self.source.chunks[1])
        rows, columns = (
            axis.touched(extent, chunk)
            for axis, extent, chunk in zip(self.axes, (height, width), self.source.chunks[2:], strict=True)
        )
        read = planes * rows * columns * dtypes.itemsize(p.x_dtype)
        return read + _PER_TILE * count(p, block) + 2 * self.tile(block)


@lru_cache(maxsize=4096)
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


def whole(problem: Conv2dProblem, block: Block, chunks: Block) -> bool:
    """Whether tiles of ``block`` write whole chunks."""
    extents = problem.N, problem.groups, problem.OH, problem.OW
    units = granule(problem, chunks)
    return all(size % unit == 0 or size == most for size, unit, most in zip(block, units, extents, strict=True))


def choose(call: str, costs: Costs, limit: int) -> Block:
    """The tile that reads least in all, of whole chunks of the result, within ``limit`` bytes."""
    problem, chunks = costs.problem, costs.out.chunks
    least = granule(problem, chunks)
    needed = costs.total(least)
    if needed > limit:
        chunked = " that writes whole chunks of out" if max(least) > 1 and max(chunks) > 1 else ""
        hint = ", or give out smaller chunks" if chunked else ""
        raise MemoryError(
            f"{call}: the smallest tile{chunked} ({' × '.join(map(str, part(problem, least).y_shape))}) needs {needed} "
            f"bytes in all and workspace_limit is {limit}; raise it{hint}"
        )
    extents = problem.N, problem.groups, problem.OH, problem.OW
    images, groups, rows, columns = (_shares(extent, size) for extent, size in zip(extents, least, strict=True))
    blocks = [(least[0], *rest) for rest in itertools.product(groups, rows, columns)]
    blocks += [(n, *extents[1:]) for n in images]  # several images only whole
    return min((block for block in blocks if costs.total(block) <= limit), key=costs.traffic)


def _shares(extent: int, unit: int) -> list[int]:
    """Extents, largest first, that cut an axis into 1, 2, 3, 4, 6, 9, 13, ... parts of whole units."""
    units = -(-extent // unit)
    found, parts = [], 1
    while parts < units:
        found.append(-(-units // parts) * unit)
        parts = max(parts + 1, parts * 3 // 2)
    found.append(unit)
    return [min(size, max(extent, unit)) for size in dict.fromkeys(found)]
