"""Shapes of ``numba_cuda.depthwise``: what a thread computes, what a block does, and the rules that pick them.

A block of ``threads_h × threads_w`` threads for each of some neighbouring groups makes a tile of the result, from a
tile of the image and the weights of some taps, both in shared memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import tiles
from gpuconv.geometry import Pair
from gpuconv.problem import Conv2dProblem

# Taps of a row that are multiplied in straight-line code; a longer row is several of them and a rest.
TAPS = 8
# Taps of a row and of a column for which weights and image are in shared memory at a time, at most.
ROW, COLUMN = 64, 16
# Products in one running sum. Where there are more, those of a row's (up to) TAPS are summed by themselves.
_SUM = 256
# Groups that lie side by side in shared memory where channels do in memory: one for each thread of a warp. With less
# than half as many, most of a warp would have none.
SIDE = 32
# Threads of a block, at most, and of those side by side; threads where groups are side by side.
THREADS, ACROSS = 128, 32
THREADS_SIDE = 256
# Registers of a thread, at most: two blocks of THREADS_SIDE on a multiprocessor. None of the kernels spills with them;
# left alone, some in float64 take 142.
REGISTERS = 128
# Extents, tiles and table entries: what the kernel counts in 32 bits, less what a tile may add.
MOST = 2**28
# Of a typical large GPU (A100): what short columns of threads are to keep busy.
_MULTIPROCESSORS = 108
# Entries of a row of the image after which one word is skipped, at most.
_SKEW = 8


@dataclass(frozen=True)
class Shape:
    """What a thread computes, frozen into the kernel: ``outputs × rows × columns`` sums of one group."""

    outputs: int
    rows: int
    columns: int
    stride: Pair | None  # each 1 or 2, with taps side by side; None for any other steps, of a single row
    taps: int  # in straight-line code
    rest: int  # taps of a row that are left by these
    by_row: bool  # whether (up to) TAPS products are summed by themselves
    side: int  # groups that lie side by side in shared memory: 1 or SIDE

    @property
    def sums(self) -> int:
        """Sums of a thread."""
        return self.outputs * self.rows * self.columns

    @property
    def reach(self) -> int:
        """Rows of the image from the first window of a thread's first row to that of its last."""
        return (self.rows - 1) * self.stride[0] if self.stride is not None else 0

    @property
    def skew(self) -> int:
        """Entries of a row of the image after which one word of shared memory is skipped; 0 for none.

        Threads that read the same place of neighbouring windows, some words apart, then read different banks.
        """
        if self.stride is None or self.side > 1:
            return 0
        return min(self.columns * self.stride[1], _SKEW)

    def placed(self, entry: int) -> int:
        """Where an entry of a row of the image is in shared memory, in steps of ``side`` elements."""
        return entry + entry // self.skew if self.skew else entry

    def __str__(self) -> str:
        steps = "any steps" if self.stride is None else "stride {}×{}".format(*self.stride)
        return f"{self.outputs}×{self.rows}×{self.columns} channels, rows and columns, {steps}"


@dataclass(frozen=True)
class Axis:
    """How a tile of the image holds what one axis of a tile of the result reads.

    Entry e is the position ``e // run · outer + e % run · step`` past the tile's first, and output i reads its tap p at
    entry ``i · local_outer + p · local_inner``. Either there is one run, of positions, or a run for each output, of its
    taps.
    """

    run: int
    step: int
    local_outer: int
    local_inner: int
    entries: int

    @classmethod
    def of(cls, outputs: int, taps: int, outer: int, inner: int, near: bool) -> Axis:
        """The shorter of the two; where the kernel relies on its stride (``near``), positions."""
        positions = (outputs - 1) * outer + (taps - 1) * inner + 1
        if near or positions <= outputs * taps:
            # Steps that are not taken may be larger than 32 bits hold.
            return cls(2**30, 1, outer if outputs > 1 else 0, inner if taps > 1 else 0, positions)
        return cls(taps, inner, taps, 1, outputs * taps)


@dataclass(frozen=True)
class Block:
    """What a block computes."""

    shape: Shape
    groups: int
    threads_h: int
    threads_w: int
    taps_h: int  # taps of a column for which weights and image are in shared memory at a time
    taps_w: int
    rows: Axis
    columns: Axis
    itemsize: int

    @property
    def threads(self) -> int:
        """Threads of the block."""
        return self.groups * self.threads_h * self.threads_w

    @property
    def pitch(self) -> int:
        """From one row of the image to the next, in steps of ``side`` elements."""
        return self.shape.placed(self.columns.entries - 1) + 1

    @property
    def image(self) -> int:
        """Elements of the image in shared memory, rounded up to whole vectors."""
        return -(-self.groups * self.rows.entries * self.pitch // 4) * 4

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the block."""
        return self.itemsize * (self.image + self.groups * self.shape.outputs * self.taps_h * self.taps_w)

    def shares(self, problem: Conv2dProblem) -> tuple[int, int, int, int]:
        """Tiles that make up a result: of groups, of output channels of a group, of rows and of columns."""
        return (
            -(-problem.groups // self.groups),
            -(-(problem.O // problem.groups) // self.shape.outputs),
            -(-problem.OH // (self.threads_h * self.shape.rows)),
            -(-problem.OW // (self.threads_w * self.shape.columns)),
        )

    def tiles(self, problem: Conv2dProblem) -> int:
        """Tiles that make up one image of a result."""
        return math.prod(self.shares(problem))


def even(extent: int, most: int) -> int:
    """``extent`` in even shares of at most ``most``."""
    return -(-extent // -(-extent // most)) if extent else 1


def steps_of(problem: Conv2dProblem) -> tuple[Pair, Pair]:
    """(outer, inner) of rows and of columns: padded positions from output to output, and from tap to tap.

    Those of the index tables where the kernel reads them, of which there are two kinds; else stride and dilation.
    """
    if arithmetic(problem):
        rows, columns = zip(problem.stride, problem.dilation, strict=True)
        return rows, columns
    row_table, column_table = problem.tables()
    return (row_table.outer, row_table.inner), (column_table.outer, column_table.inner)


def arithmetic(problem: Conv2dProblem) -> bool:
    """Whether positions are compared with the image's extent, which takes no table: constant padding, or none."""
    return problem.padding_mode == "constant"


def side_of(problem: Conv2dProblem, channels_last: bool) -> int:
    """How many groups lie side by side in shared memory, where channels do in memory or not."""
    side = SIDE if channels_last and problem.groups >= SIDE // 2 else 1
    return side if block(problem, side) is not None else 1


@lru_cache(maxsize=256)
def block(problem: Conv2dProblem, side: int) -> Block | None:
    """The block for a forward ``problem`` with ``side`` groups side by side; None where these fit no shared memory, as
    one group always does.

    In which order a sum is made depends on the extents of the kernel and the channels of a group alone. Rules of thumb,
    not measured on a GPU yet.
    """
    (outer_h, inner_h), (outer_w, inner_w) = steps_of(problem)
    C, O = problem.C // problem.groups, problem.O // problem.groups
    near = all(
        outer in (1, 2) and (inner == 1 or k == 1)
        for outer, inner, k in ((outer_h, inner_h, problem.KH), (outer_w, inner_w, problem.KW))
    )
    taps = min(problem.KW, TAPS)
    lanes = 16 // dtypes.itemsize(problem.x_dtype)
    columns = lanes if lanes > 4 and side == 1 else 4
    outputs = 1 if O == 1 else 4
    rows = (4 if outputs == 1 else 2) * 4 // columns if near else 1
    # Short columns of threads where long ones would leave most of a GPU idle: with 8 warps on each multiprocessor.
    sums = problem.N * problem.groups * -(-O // outputs) * problem.OH * problem.OW
    if sums < 8 * 32 * _MULTIPROCESSORS * rows * columns:
        rows = 1
    shape = Shape(
        outputs, rows, columns, (outer_h, outer_w) if near else None, taps, problem.KW % taps,
        C * problem.KH * problem.KW > _SUM, side,
    )  # fmt: skip
    most = THREADS_SIDE // side if side > 1 else THREADS
    threads_w = even(-(-problem.OW // columns), ACROSS if side == 1 else 2)
    threads_h = even(-(-problem.OH // rows), max(most // threads_w, 1))
    groups = side if side > 1 else min(problem.groups, most // (threads_w * threads_h))
    taps_h, taps_w = even(problem.KH, COLUMN), min(problem.KW, ROW)
    itemsize = dtypes.itemsize(problem.sum_dtype)
    while True:
        made = Block(
            shape, groups, threads_h, threads_w, taps_h, taps_w,
            Axis.of(threads_h * rows, taps_h, outer_h, inner_h, near),
            Axis.of(threads_w * columns, taps_w, outer_w, inner_w, near), itemsize,
        )  # fmt: skip
        if made.shared_bytes <= tiles.STATIC_SHARED_BYTES:
            return made
        if taps_h > TAPS:
            taps_h = -(-taps_h // 2)
        elif groups > side:
            groups = -(-groups // 2)
        elif threads_h > 1:
            threads_h = -(-threads_h // 2)
        elif threads_w > 1:
            threads_w = -(-threads_w // 2)
        elif taps_h > 1:
            taps_h = -(-taps_h // 2)
        else:
            return None
