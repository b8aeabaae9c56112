"""NumPy in, NumPy out on a GPU: host arrays go through it piece by piece, both ways at once.

    host        fill 3        drain 0   fill 4        drain 1   …
    upload      ── 2 ──  ─── 3 ───  ─── 4 ───
    compute        ─ 1 ─    ─ 2 ─     ─ 3 ─
    download    ── 0 ──  ─── 1 ───  ─── 2 ───

A piece, as ``cutting`` makes them, is some images, or some rows of one image, of the result and what they read. What it
reads is copied by the host into page-locked memory, from where it is uploaded; the chosen implementation computes it;
its result is downloaded into page-locked memory, from where the host copies it to its place. No more than a few pieces
are on a GPU at a time, whatever the size of the arrays.

The pieces of a weight gradient share one place for their results, to which each adds its own, in their order; it comes
down once, with the last. Where one of its operands is on the GPU already, only the other goes up; where that one is x,
so is the result, and nothing comes down.

``run`` is the order of all this, over ``Lanes``: it knows nothing of GPUs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from gpuconv import debug, dispatch, pinned
from gpuconv.arrays import Array
from gpuconv.backends import tables
from gpuconv.backends.protocol import Operands, Plan
from gpuconv.cutting import RING, Piece, adds_up, beside, made, on_their_way, sent, sizes, total
from gpuconv.problem import Conv2dProblem

UPLOAD, COMPUTE, DOWNLOAD = "upload", "compute", "download"

# Pieces on their way. With four, upload and download run without a pause while a piece is computed and copied by the
# host within twice the time of its upload; with three, within that time.
_SLOTS = 4


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
    """Memory for one piece on its way: bytes of page-locked host memory, and of the GPU's.

    Slots may share ``y`` and ``received``, where what pieces leave in y is for the last one to download.
    """

    sent: Array
    received: Array
    x: Array
    y: Array


class _Sized(Protocol):
    @property
    def x_bytes(self) -> int:
        """Bytes that go up; none of images that are padding alone."""

    @property
    def y_bytes(self) -> int:
        """Bytes that come down; none where another piece brings them."""


P = TypeVar("P", bound=_Sized)


@dataclass(frozen=True)
class Steps(Generic[P]):
    """What is done with a piece in a slot, besides its two copies over the bus."""

    fill: Callable[[P, Slot], None]  # by the host, into slot.sent
    launch: Callable[[P, Slot], None]  # asks the compute lane to make slot.y of slot.x
    drain: Callable[[P, Slot], None]  # by the host, from slot.received


def run(pieces: Iterable[P], slots: Sequence[Slot], lanes: Lanes, steps: Steps[P]) -> None:
    """Bring every piece through the lanes.

    A slot is used again when the host has drained it. By then the download lane has come past it, which waits for the
    computation, which waits for the upload, so nothing else has to be waited for.
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
            if piece.x_bytes:
                lanes.upload(slot, piece.x_bytes)
            lanes.wait(COMPUTE, lanes.record(UPLOAD))
            steps.launch(piece, slot)
            lanes.wait(DOWNLOAD, lanes.record(COMPUTE))
            if piece.y_bytes:
                lanes.download(slot, piece.y_bytes)
            flying.append((piece, slot, lanes.record(DOWNLOAD)))
        while flying:
            land()
    except BaseException:
        lanes.settle()  # nothing may read or write the slots when their memory is given back
        raise


def compute(
    name: str,
    problem: Conv2dProblem,
    pieces: list[Piece],
    operands: Operands,
    y: np.ndarray[Any, Any],
    pack: Callable[[Plan, Operands], Any],
) -> None:
    """Write the result into ``y``, computing on CuPy's current stream where there is CuPy.

    Of ``operands`` those are host arrays that the pieces say are, and without CuPy all; ``y`` is where the first is.
    ``pack`` makes of a kernel what ``run`` wants.
    """
    implementation = dispatch.implementation(name)
    row_table = problem.tables()[0]
    # The kernel in the forms that the plans of pieces want, most often one. Without CuPy that of an input gradient is
    # not on the GPU yet, and goes up once, not with every piece.
    packing = problem.op == "forward" or (problem.op == "input_grad" and not dispatch.has_cupy())
    packs: dict[Any, Any] | None = {} if packing else None

    def rows_of_x(piece: Piece, count: int) -> Any:
        """Which rows of x a piece of rows reads; -1 for the padding."""
        assert piece.rows is not None
        return row_table.index[piece.rows.start * row_table.outer :][:count]

    def fill(piece: Piece, slot: Slot) -> None:
        for number, place in sent(piece.plan.problem, piece.hosts).items():
            target = place.view(slot.sent)
            if number == 1:
                _copy(_rows_of(operands.k[piece.images], piece), target)
            elif piece.rows is None:
                _copy(operands.x[piece.images], target)
            else:
                rows = rows_of_x(piece, target.shape[3])
                _copy(operands.x[piece.images], target, rows, piece.plan.problem.fill)

    def given(piece: Piece, slot: Slot) -> Operands:
        part = piece.plan.problem
        uploaded = {number: ring.view(place, slot.x) for number, place in sent(part, piece.hosts).items()}
        if part.op == "weight_grad":
            x = uploaded[0] if 0 in uploaded else there(piece)
            dy = uploaded[1] if 1 in uploaded else _rows_of(operands.k[piece.images], piece)
            return replace(operands, x=x, k=dy)
        found = replace(operands, x=uploaded[0])
        if packs is not None:
            key = implementation.pack_key(piece.plan)
            if key not in packs:
                packs[key] = pack(piece.plan, found)
            found.packed = packs[key]
        return found

    def there(piece: Piece) -> Array:
        """What a piece reads of an x on the GPU: a view, or a copy of rows with those of the padding."""
        if piece.rows is None:
            return operands.x[piece.images]
        rows = beside(piece.plan.problem).view(spare)
        _take_rows(_bits(operands.x[piece.images]), rows_of_x(piece, rows.shape[3]), 0, _bits(rows))
        return rows

    def launch(piece: Piece, slot: Slot) -> None:
        part = piece.plan.problem
        target = ring.view(made(part), slot.y if summand is None else summand)
        implementation.run(piece.plan, given(piece, slot), target)
        if summand is not None:
            ring.add(target, ring.view(total(part), slot.y), piece is pieces[0])
            if piece.last and not piece.y_bytes:
                finish(ring.view(total(part), slot.y))
        debug.launched(name, part)

    def drain(piece: Piece, slot: Slot) -> None:
        part = piece.plan.problem
        if summand is None:
            _copy(made(part).view(slot.received), _rows_of(y[piece.images], piece))
        elif piece.y_bytes:
            finish(total(part).view(slot.received))

    def finish(sums: Array) -> None:
        with np.errstate(all="ignore"):  # a sum may be too large for the type of the result
            y[...] = sums

    with _ring(operands.ordinal) as ring:
        operands = replace(operands, stream=ring.begin(operands.stream))
        slots = [Slot(*memory) for memory in _slots(ring, pieces)]
        summand = ring.scratch(made(pieces[0].plan.problem).stop) if adds_up(pieces) else None
        spare = None
        if pieces[0].rows is not None and 0 not in pieces[0].hosts:
            spare = ring.scratch(max(beside(piece.plan.problem).stop for piece in pieces))
        run(pieces, slots, ring, Steps(fill, launch, drain))


@contextmanager
def _ring(ordinal: int | None) -> Iterator[pinned.Ring]:
    """The lanes of a GPU, which is current meanwhile: by CuPy, or where that is missing by Numba."""
    if dispatch.has_cupy():
        with pinned.ring(pinned.CupyRing, ordinal) as ring:
            yield ring
        return
    from gpuconv.backends.numba_cuda import launch
    from gpuconv.backends.numba_cuda.ring import NumbaRing

    with launch.on_gpu(ordinal), pinned.ring(NumbaRing, ordinal) as ring:
        yield ring


def _slots(ring: pinned.Ring, pieces: list[Piece]) -> list[tuple[Array, Array, Array, Array]]:
    """Memory for pieces on their way: of as many as there is room for, and where the GPU has too little, of two."""
    most = next(count for count in range(min(_SLOTS, len(pieces)), 1, -1) if on_their_way(pieces, count) <= RING)
    try:
        return ring.slots(most, *sizes(pieces), adds_up(pieces))
    except MemoryError:
        if most == 2:
            raise
    return ring.slots(2, *sizes(pieces), adds_up(pieces))


def _rows_of(image: np.ndarray[Any, Any], piece: Piece) -> np.ndarray[Any, Any]:
    """The piece's share of images of the size of y."""
    return image if piece.rows is None else image[..., piece.rows, :]


def _copy(
    source: np.ndarray[Any, Any], target: np.ndarray[Any, Any], rows: Any | None = None, fill: complex = 0
) -> None:
    """Copy host arrays of five axes on several threads; ``rows`` are those to take of the source, -1 for ``fill``."""
    if target.dtype.name == "bfloat16":
        fill = int(np.asarray(fill).astype(target.dtype).view(np.uint16))
        source, target = _bits(source), _bits(target)
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


def _bits(array: Array) -> Array:
    """bfloat16 as bits: NumPy holds its global lock for types that are not its own."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


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
