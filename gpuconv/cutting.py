"""How a problem on host arrays is cut into pieces that go through a GPU one after the other.

A piece is some images, or some rows of the result of one image, and all that they read. The pieces of a weight gradient
are some images, or rows, of both operands: each gives a sum over its own pixels, and these are added up on the GPU. Of
an operand that is on the GPU already a piece reads its share there. How a problem is cut, and with that how its sums
are split, depends on it and on which operands are the host's, so that the same call gives the same bits whatever memory
is free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from gpuconv import dispatch, dtypes, geometry, schedule
from gpuconv.arrays import Array
from gpuconv.backends.protocol import Plan, Target
from gpuconv.problem import Conv2dProblem

ALIGN = 512  # bytes; CuPy's pool aligns so on the GPU
RING = 256 << 20  # bytes of the pieces that are on their way at once, at most: of large ones there are but two

# Not measured yet, by rule of thumb: a copy of 2 MiB takes a PCIe link some ten times as long as asking for it.
_LEAST, _MOST = 2 << 20, 16 << 20  # bytes of a piece, of its operand or its result, the larger
_PIECES = 8  # of the smallest problem that is worth cutting: filling and emptying the lanes takes about two pieces
_MOST_PIECES = 1 << 20  # 2 TiB and more: only shapes without arrays, which ``explain`` takes too, are larger

# Implementations whose sums do not depend on how many rows they make at a time, so that an image may be cut; and
# cuBLAS, of which nobody expects the same bits.
_BY_ROWS = ("cupy.gemm", "numba_cuda.direct", "numba_cuda.depthwise")

# What the pieces of a weight gradient are added up in.
_TOTALS = {"float32": "float64", "complex64": "complex128"}


@dataclass(frozen=True)
class Place:
    """Where an array lies in a block of memory: dense, its axes in the layout's order."""

    start: int  # in bytes
    shape: tuple[int, ...]  # as implementations see it
    order: tuple[int, ...]  # of its axes in memory, slowest first
    dtype: str

    @property
    def stop(self) -> int:
        """The byte after its last one."""
        return self.start + math.prod(self.shape) * dtypes.itemsize(self.dtype)

    def view(self, memory: Array) -> Array:
        """The array in ``memory``, bytes of NumPy's or of CuPy's."""
        dense = memory[self.start : self.stop].view(dtypes.numpy_dtype(self.dtype))
        ordered = dense.reshape([self.shape[axis] for axis in self.order])
        return ordered.transpose(np.argsort(self.order).tolist())


@dataclass(frozen=True)
class Piece:
    """Some images of a problem, or some rows of the y of one image, as a problem of its own."""

    plan: Plan
    images: slice
    rows: slice | None = None  # of y; None for all
    last: bool = False
    hosts: tuple[int, ...] = (0, 1)  # the operands that are in host memory, by number

    @property
    def x_bytes(self) -> int:
        """Bytes that go up."""
        return _stop(sent(self.plan.problem, self.hosts))

    @property
    def y_bytes(self) -> int:
        """Bytes that come down; of a weight gradient with the last piece, the sum of all, if the host is to have it."""
        problem = self.plan.problem
        if problem.op == "weight_grad":
            return total(problem).stop if self.last and 0 in self.hosts else 0
        return made(problem).stop


def sent(problem: Conv2dProblem, hosts: tuple[int, ...] = (0, 1)) -> dict[int, Place]:
    """Where the operands that go up with a piece lie in its memory, by number: those of ``hosts`` that are cut."""
    x, y = _shapes(problem)
    operands = [(x if problem.op in ("forward", "unfold", "weight_grad") else y, problem.x_dtype)]
    if problem.op == "weight_grad":
        operands.append((y, problem.k_dtype))
    found: dict[int, Place] = {}
    for number, (shape, dtype) in enumerate(operands):
        if number in hosts:
            found[number] = _image(problem, -(-_stop(found) // ALIGN) * ALIGN, shape, dtype)
    return found


def _stop(places: dict[int, Place]) -> int:
    """The byte after the last one of all."""
    return max((place.stop for place in places.values()), default=0)


def beside(problem: Conv2dProblem) -> Place:
    """Where the rows of x that a piece of a weight gradient reads lie, when they are of an image on the GPU."""
    return sent(problem, (0,))[0]


def made(problem: Conv2dProblem) -> Place:
    """Where what is made of a piece lies in its memory."""
    if problem.op == "weight_grad":
        O, *rest = problem.k_shape
        return Place(0, (problem.groups, O // problem.groups, *rest), (0, 1, 2, 3, 4), problem.y_dtype)
    x, y = _shapes(problem)
    return _image(problem, 0, y if problem.op in ("forward", "unfold") else x, problem.y_dtype)


def total(problem: Conv2dProblem) -> Place:
    """Where the sum of all pieces of a weight gradient lies, of which ``problem`` is one."""
    return replace(made(problem), dtype=_TOTALS.get(problem.y_dtype, problem.y_dtype))


def _shapes(problem: Conv2dProblem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of x and of y as implementations see them."""
    N, C, H, W = problem.x_shape
    _, O, OH, OW = problem.y_shape
    groups = problem.groups
    per_group = (C, problem.KH * problem.KW) if problem.op in ("unfold", "fold") else (groups, O // groups)
    return (N, groups, C // groups, H, W), (N, *per_group, OH, OW)


def _image(problem: Conv2dProblem, start: int, shape: tuple[int, ...], dtype: str) -> Place:
    # groups and their channels last, for NHWC
    last = problem.layout == "NHWC" and problem.op not in ("unfold", "fold")
    return Place(start, shape, (0, 3, 4, 1, 2) if last else (0, 1, 2, 3, 4), dtype)


def cut(
    name: str, problem: Conv2dProblem, target: Target, limit: int, hosts: tuple[int, ...] = (0, 1)
) -> list[Piece] | None:
    """The pieces in which implementation ``name`` is to make ``problem`` within ``limit`` bytes of scratch each, its
    operands ``hosts`` in host memory; None where these are too few bytes to be cut, or cannot be.
    """
    if problem.N == 0:
        return None
    one = replace(problem, N=1)
    image = _load(one, hosts)
    whole = problem.N * image
    if whole < _PIECES * _LEAST:
        return None
    size = min(_MOST, whole // _PIECES)
    kept, y_dtype = 0, problem.y_dtype
    if problem.op == "weight_grad":
        problem = replace(problem, y_dtype=problem.sum_dtype)  # rounded when all is added up
        kept = made(problem).stop + total(problem).stop
    else:
        # The default limit allows the largest pieces; a lower one, which memory may be too short for more than, less.
        size = min(size, _MOST * limit // schedule.DEFAULT_WORKSPACE)
    size = max(size, _LEAST)
    images, rows = max(size // max(image, 1), 1), None
    if image > size and (problem.op == "weight_grad" or (problem.op == "forward" and name in _BY_ROWS)):
        rows = _rows(one, size, hosts)
        rows = None if rows == problem.OH else rows
    # Even shares: 10 images in pieces of 9 would be 9 and 1.
    images = -(-problem.N // -(-problem.N // images))
    if -(-problem.N // images) * -(-problem.OH // (rows or problem.OH)) > _MOST_PIECES:
        return None
    implementation = dispatch.implementation(name)
    planned: dict[Conv2dProblem, Plan] = {}
    pieces = []
    extents, block = (problem.N, problem.OH), (images, rows or problem.OH)
    for n, i in schedule.blocks(extents, block):
        part = replace(problem, N=n.stop - n.start)
        if rows is not None:
            part = _of_rows(part, i.stop - i.start)
        if part not in planned:
            # Whether a type is served is asked of the result: tensor cores may make sums that will be rounded.
            if implementation.unsupported(replace(part, y_dtype=y_dtype), target):
                return None
            taken = kept + (beside(part).stop if rows is not None and 0 not in hosts else 0)
            try:
                planned[part] = implementation.plan(part, target, limit - taken)
            except MemoryError:
                return None
        last = (n.stop, i.stop) == extents
        pieces.append(Piece(planned[part], n, None if rows is None else i, last, hosts))
    return pieces if len(pieces) > 1 and on_their_way(pieces, 2) <= RING else None


def sizes(pieces: list[Piece]) -> tuple[int, int]:
    """The most bytes that go up with one piece, and that its result takes; of a weight gradient, the sum of all."""
    results = [total(pieces[0].plan.problem).stop] if adds_up(pieces) else [piece.y_bytes for piece in pieces]
    return max(piece.x_bytes for piece in pieces), max(results)


def on_their_way(pieces: list[Piece], count: int) -> int:
    """Bytes of ``count`` pieces that are on their way at once; those of a weight gradient share what comes down."""
    up, down = sizes(pieces)
    return count * up + (down if adds_up(pieces) else count * down)


def adds_up(pieces: list[Piece]) -> bool:
    """Whether the results of the pieces are summands of the result, rather than parts."""
    return pieces[0].plan.problem.op == "weight_grad"


def described(pieces: list[Piece]) -> str:
    """The pieces in a sentence."""
    first = pieces[0]
    images = first.images.stop - first.images.start
    size = f"{images} image(s)" if first.rows is None else f"{first.rows.stop - first.rows.start} rows of an image"
    told = f"Host arrays go through the GPU in {len(pieces)} pieces of {size}, {first.x_bytes / 2**20:.3g} MiB "
    if adds_up(pieces):
        return told + "up at a time; the sums over each are added up there. The size is a rule of thumb, not measured."
    down = first.y_bytes / 2**20
    return told + f"and {down:.3g} MiB up and down at a time, a rule of thumb, not measured."


def _load(problem: Conv2dProblem, hosts: tuple[int, ...]) -> int:
    """Bytes that go up with a problem or come down with it, whichever are more; sums come down but once."""
    up = sum(place.stop - place.start for place in sent(problem, hosts).values())
    return up if problem.op == "weight_grad" else max(up, made(problem).stop)


def _rows(problem: Conv2dProblem, size: int, hosts: tuple[int, ...]) -> int:
    """Rows of y that make a piece of ``size`` bytes; more where their windows overlap too much to be cut."""
    steps = geometry.table_steps(problem.KH, problem.OH, problem.stride[0], problem.dilation[0])
    rows = schedule.halved(problem.OH, lambda rows: _load(_of_rows(problem, rows), hosts) <= size)
    # What a piece reads again that the one before has read: about a quarter of what it reads, at most.
    halo = max(geometry.span(problem.KH, 1, steps) - steps[0], 0)
    rows = min(max(rows, 4 * halo // steps[0]), problem.OH)
    return -(-problem.OH // -(-problem.OH // rows))


def _of_rows(problem: Conv2dProblem, rows: int) -> Conv2dProblem:
    """The problem of ``rows`` rows of y, its x the rows that their windows read, those of the padding too."""
    steps = geometry.table_steps(problem.KH, problem.OH, problem.stride[0], problem.dilation[0])
    return replace(
        problem, H=geometry.span(problem.KH, rows, steps), stride=(steps[0], problem.stride[1]),
        padding=((0, 0), problem.padding[1]), dilation=(steps[1], problem.dilation[1]),
    )  # fmt: skip
