"""NumPy in, NumPy out on a GPU: host arrays go through it piece by piece, both ways at once.

    host        fill 3        drain 0   fill 4        drain 1   …
    upload      ── 2 ──  ─── 3 ───  ─── 4 ───
    compute        ─ 1 ─    ─ 2 ─     ─ 3 ─
    download    ── 0 ──  ─── 1 ───  ─── 2 ───

A piece is some images, or some rows of one image, of the result and all that they read. The host copies what it reads
into page-locked memory, from where it is uploaded; the chosen implementation computes it; its result is downloaded into
page-locked memory, from where the host copies it to its place. No more than a few pieces are on a GPU at a time,
whatever the size of the arrays.

``run`` is the order of all this, over ``Lanes``: it knows nothing of GPUs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from gpuconv import debug, dispatch, dtypes, geometry, pinned, schedule
from gpuconv.arrays import Array
from gpuconv.backends import tables
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

UPLOAD, COMPUTE, DOWNLOAD = "upload", "compute", "download"

# Not measured yet, by rule of thumb: a copy of 2 MiB takes a PCIe link some ten times as long as asking for it.
_LEAST, _MOST = 2 << 20, 16 << 20  # bytes of a piece, of its operand or its result, the larger
_PIECES = 8  # of the smallest problem that is worth cutting: filling and emptying the lanes takes about two pieces

# Pieces on their way. With four, upload and download run without a pause while a piece is computed and copied by the
# host within twice the time of its upload; with three, within that time.
_SLOTS = 4
_RING = 256 << 20  # bytes of all slots, at most: larger pieces make do with two

# Each image is a problem of its own to these, so that a batch may be cut.
_OPS = ("forward", "input_grad", "unfold", "fold")
# Implementations whose sums do not depend on how many rows they make at a time, so that an image may be cut; and
# cuBLAS, of which nobody expects the same bits.
_BY_ROWS = ("cupy.gemm", "numba_cuda.direct", "numba_cuda.depthwise")


class Lanes(Protocol):
    """What does the work: three lanes, each of which does in order what it is asked, some time after it was asked."""

    def upload(self, slot: Slot, size: int) -> None:
        """Ask the upload lane to copy ``size`` bytes of ``slot.sent`` to ``slot.x``."""

    def download(self, slot: Slot, size: int) -> None:
        """Ask the download lane to copy ``size`` bytes of ``slot.y`` to ``slot.received``."""

    def record(self, lane: str) -> Any:
        """A mark behind all that ``lane`` has been asked for so far."""

    def wait(self, lane: str, mark: Any) -> None:
        """Let ``lane`` begin nothing more before ``mark`` is reached."""

    def reach(self, mark: Any) -> None:
        """Wait, on the host, until ``mark`` is reached."""

    def settle(self) -> None:
        """Wait, on the host, until every lane has done all that it was asked for."""


@dataclass(frozen=True)
class Slot:
    """Memory for one piece on its way: bytes of page-locked host memory, and of the GPU's."""

    sent: Array
    received: Array
    x: Array
    y: Array


class _Sized(Protocol):
    @property
    def x_bytes(self) -> int:
        """Bytes that go up."""

    @property
    def y_bytes(self) -> int:
        """Bytes that come down."""


P = TypeVar("P", bound=_Sized)


@dataclass(frozen=True)
class Steps(Generic[P]):
    """What is done with a piece in a slot, besides its two copies over the bus."""

    fill: Callable[[P, Slot], None]  # by the host, into slot.sent
    launch: Callable[[P, Slot], None]  # asks the compute lane to make slot.y of slot.x
    drain: Callable[[P, Slot], None]  # by the host, from slot.received


def run(pieces: Iterable[P], slots: Sequence[Slot], lanes: Lanes, steps: Steps[P]) -> None:
    """Bring every piece through the lanes.

    A slot is used again when the host has drained it. By then its download is over, hence also the computation before
    that and the upload before that one, so nothing else has to be waited for.
    """
    # What the lanes' memory held before belongs to the compute lane, on which it was allocated.
    lanes.wait(UPLOAD, lanes.record(COMPUTE))
    flying: deque[tuple[P, Slot, Any]] = deque()

    def land() -> None:
        piece, slot, downloaded = flying.popleft()
        lanes.reach(downloaded)
        steps.drain(piece, slot)

    try:
        for turn, piece in enumerate(pieces):
            if len(flying) == len(slots):
                land()
            slot = slots[turn % len(slots)]
            steps.fill(piece, slot)
            lanes.upload(slot, piece.x_bytes)
            lanes.wait(COMPUTE, lanes.record(UPLOAD))
            steps.launch(piece, slot)
            lanes.wait(DOWNLOAD, lanes.record(COMPUTE))
            lanes.download(slot, piece.y_bytes)
            flying.append((piece, slot, lanes.record(DOWNLOAD)))
        while flying:
            land()
    except BaseException:
        lanes.settle()  # nothing may read or write the slots when their memory is given back
        raise


@dataclass(frozen=True)
class Piece:
    """Some images of a problem, or some rows of the result of one image, as a problem of its own."""

    plan: Plan
    images: slice
    rows: slice | None = None  # of the result; None for all

    @property
    def x_bytes(self) -> int:
        """Bytes of the first operand."""
        return _bytes(self.plan.problem)[0]

    @property
    def y_bytes(self) -> int:
        """Bytes of the result."""
        return _bytes(self.plan.problem)[1]


def cut(name: str, problem: Conv2dProblem, target: Target, limit: int) -> list[Piece] | None:
    """The pieces in which implementation ``name`` is to make ``problem`` within ``limit`` bytes of scratch each; None
    where it is too small to be cut, or cannot be.
    """
    if problem.op not in _OPS or problem.N == 0:
        return None
    x_image, y_image = (bytes_ // problem.N for bytes_ in _bytes(problem))
    image = max(x_image, y_image)
    if problem.N * image < _PIECES * _LEAST:
        return None
    # The default limit allows the largest pieces; a lower one, which memory may be too short for more than, less.
    size = min(_MOST, _MOST * limit // schedule.DEFAULT_WORKSPACE, problem.N * image // _PIECES)
    size = max(size, _LEAST)
    images, rows = max(size // max(image, 1), 1), None
    if image > size and problem.op == "forward" and name in _BY_ROWS:
        rows = _rows(problem, size)
        rows = None if rows == problem.OH else rows
    # Even shares: 10 images in pieces of 9 would be 9 and 1.
    images = -(-problem.N // -(-problem.N // images))
    implementation = dispatch.implementation(name)
    planned: dict[Conv2dProblem, Plan] = {}
    pieces = []
    extents, block = (problem.N, problem.OH), (images, rows or problem.OH)
    for n, i in schedule.blocks(extents, block):
        part = replace(problem, N=n.stop - n.start)
        if rows is not None:
            part = _of_rows(part, i.stop - i.start)
        if part not in planned:
            if implementation.unsupported(part, target):
                return None
            try:
                planned[part] = implementation.plan(part, target, limit)
            except MemoryError:
                return None
        pieces.append(Piece(planned[part], n, None if rows is None else i))
    first = pieces[0]
    return pieces if len(pieces) > 1 and 2 * (first.x_bytes + first.y_bytes) <= _RING else None


def described(pieces: list[Piece]) -> str:
    """The pieces in a sentence."""
    first = pieces[0]
    images = first.images.stop - first.images.start
    size = f"{images} image(s)" if first.rows is None else f"{first.rows.stop - first.rows.start} rows of an image"
    traffic = " and ".join(f"{bytes_ / 2**20:.3g} MiB" for bytes_ in (first.x_bytes, first.y_bytes))
    return f"Host arrays go through the GPU in {len(pieces)} pieces of {size}, {traffic} up and down at a time."


def _bytes(problem: Conv2dProblem) -> tuple[int, int]:
    """Bytes of the first operand and of the result."""
    x, y = map(math.prod, _shapes(problem))
    return x * dtypes.itemsize(problem.x_dtype), y * dtypes.itemsize(problem.y_dtype)


def _shapes(problem: Conv2dProblem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the first operand and of the result, as implementations see them."""
    N, C, H, W = problem.x_shape
    _, O, OH, OW = problem.y_shape
    groups = problem.groups
    x = N, groups, C // groups, H, W
    if problem.op in ("unfold", "fold"):
        y: tuple[int, ...] = (N, C, problem.KH * problem.KW, OH, OW)
    else:
        y = N, groups, O // groups, OH, OW
    return (x, y) if problem.op in ("forward", "unfold") else (y, x)


def _rows(problem: Conv2dProblem, size: int) -> int:
    """Rows of the result that make a piece of ``size`` bytes; more where their windows overlap too much to be cut."""
    steps = geometry.table_steps(problem.KH, problem.OH, problem.stride[0], problem.dilation[0])
    x_row = problem.C * problem.W * dtypes.itemsize(problem.x_dtype)
    y_row = problem.O * problem.OW * dtypes.itemsize(problem.y_dtype)

    def fits(rows: int) -> bool:
        return max(geometry.span(problem.KH, rows, steps) * x_row, rows * y_row) <= size

    rows = schedule.halved(problem.OH, fits)
    # What a piece reads again that the one before has read: about a quarter of what it reads, at most.
    halo = max(geometry.span(problem.KH, 1, steps) - steps[0], 0)
    rows = min(max(rows, 4 * halo // steps[0]), problem.OH)
    return -(-problem.OH // -(-problem.OH // rows))


def _of_rows(problem: Conv2dProblem, rows: int) -> Conv2dProblem:
    """The problem of ``rows`` rows of the result, its x the rows that their windows read, those of the padding too."""
    steps = geometry.table_steps(problem.KH, problem.OH, problem.stride[0], problem.dilation[0])
    return replace(
        problem, H=geometry.span(problem.KH, rows, steps), stride=(steps[0], problem.stride[1]),
        padding=((0, 0), problem.padding[1]), dilation=(steps[1], problem.dilation[1]),
    )  # fmt: skip


def compute(
    name: str,
    problem: Conv2dProblem,
    pieces: list[Piece],
    operands: Operands,
    y: np.ndarray[Any, Any],
    pack: Callable[[Plan, Operands], Any],
) -> None:
    """Write the result into the host array ``y``, computing on CuPy's current stream.

    Of ``operands`` the first is a host array, the others are on the GPU. ``pack`` makes of a kernel what ``run`` wants.
    """
    implementation, x = dispatch.implementation(name), operands.x
    x_size, y_size = max(piece.x_bytes for piece in pieces), max(piece.y_bytes for piece in pieces)
    row_table = problem.tables()[0]
    count = min(_SLOTS, max(_RING // (x_size + y_size), 2), len(pieces))

    def device_views(piece: Piece, slot: Slot) -> tuple[Array, Array]:
        return _views(piece.plan.problem, slot.x, slot.y)

    def fill(piece: Piece, slot: Slot) -> None:
        target, _ = _views(piece.plan.problem, slot.sent, slot.received)
        rows = None
        if piece.rows is not None:
            start = piece.rows.start * row_table.outer
            rows = row_table.index[start : start + target.shape[3]]
        _copy(x[piece.images], target, rows, piece.plan.problem.fill)

    def launch(piece: Piece, slot: Slot) -> None:
        source, target = device_views(piece, slot)
        implementation.run(piece.plan, replace(operands, x=source), target)
        debug.launched(name, piece.plan.problem)

    def drain(piece: Piece, slot: Slot) -> None:
        _, source = _views(piece.plan.problem, slot.sent, slot.received)
        target = y[piece.images]
        _copy(source, target if piece.rows is None else target[..., piece.rows, :])

    with pinned.ring() as ring:
        slots = [Slot(*memory) for memory in ring.slots(count, x_size, y_size)]
        if problem.op == "forward":
            like = replace(operands, x=device_views(pieces[0], slots[0])[0])
            operands = replace(operands, packed=pack(pieces[0].plan, like))
        run(pieces, slots, ring, Steps(fill, launch, drain))


def _views(problem: Conv2dProblem, first: Array, result: Array) -> tuple[Array, Array]:
    """Bytes as the first operand and the result of ``problem``: as implementations see them, in the layout's order."""
    x, y = _shapes(problem)
    # groups and their channels last, for NHWC
    order = (0, 3, 4, 1, 2) if problem.layout == "NHWC" and problem.op not in ("unfold", "fold") else (0, 1, 2, 3, 4)
    views = []
    for memory, shape, dtype in ((first, x, problem.x_dtype), (result, y, problem.y_dtype)):
        size = math.prod(shape) * dtypes.itemsize(dtype)
        dense = memory[:size].view(dtypes.numpy_dtype(dtype)).reshape([shape[axis] for axis in order])
        views.append(dense.transpose(np.argsort(order).tolist()))
    return views[0], views[1]


def _copy(
    source: np.ndarray[Any, Any], target: np.ndarray[Any, Any], rows: Any | None = None, fill: complex = 0
) -> None:
    """Copy host arrays of five axes on several threads; ``rows`` are those to take of the source, -1 for ``fill``."""
    if target.dtype.name == "bfloat16":  # as bits: NumPy holds its global lock for types that are not its own
        fill = int(np.asarray(fill).astype(target.dtype).view(np.uint16))
        source, target = source.view(np.uint16), target.view(np.uint16)
    axis = max(range(4), key=lambda axis: (target.shape[axis], -axis))

    def part(start: int, stop: int) -> None:
        at = (*[slice(None)] * axis, slice(start, stop))
        if rows is None:
            target[at] = source[at]
        elif axis == 3:
            _take_rows(source, rows[start:stop], fill, target[at])
        else:
            _take_rows(source[at], rows, fill, target[at])

    pinned.in_parallel(part, target.shape[axis], target.nbytes)


def _take_rows(source: np.ndarray[Any, Any], rows: Any, fill: complex, target: np.ndarray[Any, Any]) -> None:
    """Copy the ``rows`` of the source, in any order; ``fill`` where one is -1."""
    read = tables.reads(rows)
    if isinstance(read.source, slice) or (read.source >= 0).all():
        columns = tables.Reads(target.shape[4], slice(0, target.shape[4]), slice(0, target.shape[4]))
        tables.gather(source, read, columns, fill, target)
        return
    # Windows of far taps take turns between the padding and the image.
    inside = np.flatnonzero(rows >= 0)
    target[...] = fill
    target[..., inside, :] = source[..., rows[inside], :]
