"""Convolution by Fourier transforms, for kernels so large that a transform costs less than their products.

    Y[n,g,o] = Σ_c X[n,g,c] · conj(K[g,o,c])        X, K, Y: real transforms of a tile of x, of the kernels and of y

The result is cut in tiles (overlap-save): TH × TW pixels of the padded x give TH-KH+1 rows and TW-KW+1 columns of y,
whatever the kernel's values. The channels are summed before the transform back, so that C images and O results take
C + O transforms a tile. Tiles are worked on by threads, each on its own: NumPy's transforms release the interpreter.

All of it is in float64. A transform spreads its rounding errors over the whole tile, relative to the tile's largest
values; in float32 a bright pixel that only small weights meet, as at a border, could break the promise on errors. In
float64 it would have to be ten thousand million times as bright as all else. NaN or infinity in x reaches whole tiles.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuconv import dtypes, schedule
from gpuconv.backends import gemm, tables
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numpy.fft"
DEVICE = "cpu"
OPS = frozenset(("forward",))
ARRAYS = "numpy"

# Nanoseconds that a transform takes for each pixel of a tile in the cache and of a larger one, that a product of two
# transforms takes, and a call of NumPy's, of which a transform is about four and a product two.
_TRANSFORM, _LARGE, _PRODUCT, _CALL = 2.8, 4.4, 0.6, 3000
_CACHED = 768 * 768
# Sizes for which transforms are quick are these times a power of two.
_FACTORS = (1, 3, 5, 9, 15)


def unavailable() -> None:
    """Nothing: NumPy is always here."""


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = []
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        reasons.append("it is for kernels without stride and dilation")
    if {problem.x_dtype, problem.k_dtype, problem.y_dtype} != {"float32"}:
        reasons.append("it is for float32")
    if problem.precision == "highest":
        reasons.append("its rounding errors are larger than precision='highest' allows")
    return reasons


@dataclass(frozen=True)
class Tile:
    """The pixels that are transformed at once."""

    TH: int
    TW: int
    high: int  # rows and columns of y that they give
    wide: int

    @property
    def real(self) -> int:
        """Bytes of a tile."""
        return 8 * self.TH * self.TW

    @property
    def transformed(self) -> int:
        """Bytes of its transform."""
        return 16 * self.TH * (self.TW // 2 + 1)


def _tiles(problem: Conv2dProblem) -> list[Tile]:
    """The tiles worth a thought, those of least work first: a matter of the image's own sizes alone."""
    C, O = problem.C // problem.groups, problem.O // problem.groups

    def lengths(outputs: int, taps: int) -> list[int]:
        """Sizes from twice a kernel's up to eight times or what all outputs need, and the least that will do."""
        enough, found = _quick(outputs + taps - 1), [_quick(taps)]
        size = _quick(2 * taps)
        while size < min(enough, max(8 * taps, 512)):
            found.append(size)
            size = _quick(size + 1)
        return [*found, enough]

    def tile(TH: int, TW: int) -> Tile:
        return Tile(TH, TW, min(problem.OH, TH - problem.KH + 1), min(problem.OW, TW - problem.KW + 1))

    def work(tile: Tile) -> float:
        pixels = tile.TH * tile.TW
        count = -(-problem.OH // tile.high) * -(-problem.OW // tile.wide)
        transform = _TRANSFORM if pixels <= _CACHED else _LARGE
        both, product = pixels * transform + 4 * _CALL, pixels * _PRODUCT + 2 * _CALL
        return count * ((C + O) * both + C * O * product) + C * O * both

    found = {tile(TH, TW) for TH in lengths(problem.OH, problem.KH) for TW in lengths(problem.OW, problem.KW)}
    return sorted(found, key=lambda tile: (work(tile), tile.TH, tile.TW))


def _quick(least: int) -> int:
    """The smallest even size of at least ``least`` for which transforms are quick."""
    return min(factor << max(1, (-(-least // factor) - 1).bit_length()) for factor in _FACTORS)


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the tile, and how many kernels are transformed at a time."""
    C, groups, O = problem.C // problem.groups, problem.groups, problem.O // problem.groups

    def scratch(tile: Tile, g: int, o: int) -> int:
        kernels = g * o * C * tile.transformed
        # A tile, what is gathered for it, and transforms of C channels, of a sum and of a product.
        each = 2 * tile.real + (C + 2) * tile.transformed
        return kernels + target.threads * each + problem.table_bytes() + 65536

    tiles = _tiles(problem)
    tile = next((tile for tile in tiles if scratch(tile, 1, 1) <= limit), None)
    if tile is None:
        least = min(scratch(tile, 1, 1) for tile in tiles)
        raise schedule.shortage(f"{NAME} on {problem}", least, limit)
    chosen = tile
    block = schedule.fit((groups, O), lambda g, o: scratch(chosen, g, o), limit, f"{NAME} on {problem}")
    detail = f"tiles of {tile.TH}×{tile.TW} pixels for {tile.high}×{tile.wide} outputs"
    config = {"tile": tile, "block": block, "threads": target.threads}
    return Plan(problem, scratch(tile, *block), "float64", detail, config)


def _whole(plan: Plan) -> bool:
    """Whether all kernels are transformed at once."""
    problem = plan.problem
    return bool(plan.config["block"] == (problem.groups, problem.O // problem.groups))


def pack_key(plan: Plan) -> Any:
    """What the kept kernels depend on besides the kernels."""
    tile = plan.config["tile"]
    return "fft", (tile.TH, tile.TW) if _whole(plan) else None


def pack(plan: Plan, operands: Operands) -> Any:
    """The transformed kernels; where they do not fit the workspace all at once, as they are."""
    if not _whole(plan):
        return operands.k
    with _threads(plan) as spread:
        return _transformed(operands.k, _room(plan), spread)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution of NumPy operands into ``out``."""
    problem, tile = plan.problem, plan.config["tile"]
    k = operands.k if operands.packed is None else operands.packed
    ready = operands.packed is not None and _whole(plan)
    bias = gemm.grouped_bias(plan, operands)
    index = problem.tables()
    places = list(schedule.blocks((problem.OH, problem.OW), (tile.high, tile.wide)))
    room = None if ready else _room(plan)
    spare: list[Scratch] = []
    with _threads(plan) as spread:
        for g, o in schedule.blocks((problem.groups, problem.O // problem.groups), plan.config["block"]):
            kernels = k if room is None else _transformed(k[g, o], room, spread)

            def one(task: Any, kernels: Any = kernels, g: slice = g, o: slice = o) -> None:
                n, h, (i, j) = task  # an image, a group, and the place of a tile
                try:
                    scratch = spare.pop()
                except IndexError:
                    scratch = Scratch(tile, problem.C // problem.groups)
                _transform_images(problem, tile, index, operands.x[n, h], i, j, scratch)
                for which, y in enumerate(out[n, h, o, i, j]):
                    sums = _sums(tile, kernels[h - g.start, which], scratch)[: y.shape[0], : y.shape[1]]
                    gemm.plain_epilogue(np, problem, sums, None if bias is None else bias[h, o][which], y)
                spare.append(scratch)

            spread(one, list(itertools.product(range(problem.N), range(g.start, g.stop), places)))


class Scratch:
    """What a thread works on, kept from tile to tile: fresh memory costs as much as a transform."""

    def __init__(self, tile: Tile, channels: int) -> None:
        form = tile.TH, tile.TW // 2 + 1
        self.real = np.empty((tile.TH, tile.TW))
        self.images = np.empty((channels, *form), np.complex128)
        self.sums, self.product = np.empty(form, np.complex128), np.empty(form, np.complex128)


def _transform_images(
    problem: Conv2dProblem, tile: Tile, index: gemm.Tables, x: Any, i: slice, j: slice, scratch: Scratch
) -> None:
    """Transform what the outputs of rows ``i`` and columns ``j`` read of each channel of x (C, H, W)."""
    rows, columns = (
        tables.reads(table.index[outputs.start : outputs.stop + taps - 1])
        for table, outputs, taps in zip(index, (i, j), (problem.KH, problem.KW), strict=True)
    )
    real, fill = scratch.real, dtypes.numpy_dtype(problem.x_dtype).type(problem.fill)
    # Further rows and columns have no part in these outputs, but they must be finite.
    real[:, columns.length :] = 0
    for image, transform in zip(x, scratch.images, strict=True):
        tables.gather(image, rows, columns, fill, real[: rows.length, : columns.length])
        transform[rows.length :] = 0
        np.fft.rfft(real[: rows.length], out=transform[: rows.length])
        np.fft.fft(transform, axis=0, out=transform)


def _sums(tile: Tile, kernels: Any, scratch: Scratch) -> Any:
    """One channel of a tile of y, from the transforms of the images and of its ``kernels`` (C, TH, TW/2 + 1)."""
    sums, product = scratch.sums, scratch.product
    for c, (image, kernel) in enumerate(zip(scratch.images, kernels, strict=True)):
        np.multiply(image, kernel, out=product if c else sums)
        if c:
            sums += product
    np.fft.ifft(sums, axis=0, out=sums)
    return np.fft.irfft(sums[: tile.high], tile.TW, out=scratch.real[: tile.high])


def _room(plan: Plan) -> np.ndarray[Any, Any]:
    """Memory for the transforms of a block of kernels."""
    tile, C = plan.config["tile"], plan.problem.C // plan.problem.groups
    return np.empty((*plan.config["block"], C, tile.TH, tile.TW // 2 + 1), np.complex128)


def _transformed(k: Any, room: Any, spread: Spread) -> Any:
    """The conjugate transforms of the kernels k (g, O, C, KH, KW), in ``room``."""
    KH, TW = k.shape[3], 2 * (room.shape[4] - 1)

    def one(place: tuple[int, ...]) -> None:
        transform = room[place]
        transform[KH:] = 0
        np.fft.rfft(k[place].astype(np.float64), TW, out=transform[:KH])
        np.fft.fft(transform, axis=0, out=transform)
        np.conjugate(transform, out=transform)

    spread(one, list(np.ndindex(*k.shape[:3])))
    return room


Spread = Callable[[Callable[[Any], None], list[Any]], None]


@contextlib.contextmanager
def _threads(plan: Plan) -> Iterator[Spread]:
    """A function ``spread(one, items)`` that does ``one`` for all items, on the plan's threads.

    They are started for each call: threads that are kept would not survive a fork.
    """

    def quietly(one: Callable[[Any], None], item: Any) -> None:
        with np.errstate(all="ignore"):  # infinities and NaN are results here, not accidents
            one(item)

    with ThreadPoolExecutor(plan.config["threads"]) as pool:

        def spread(one: Callable[[Any], None], items: list[Any]) -> None:
            if plan.config["threads"] == 1 or len(items) == 1:
                for item in items:
                    quietly(one, item)
            else:
                list(pool.map(functools.partial(quietly, one), items))

        yield spread
