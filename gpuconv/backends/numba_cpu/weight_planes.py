"""The gradient of kernels with few output channels per group, depthwise ones above all: pixels in the lanes.

    dK[o,c,p,q] = Σ_nij dy[n,o,i,j] · x[n,c, i·s+p·d-pad, j·s+q·d-pad]

With one output channel there is nothing to put side by side but the pixels of a row. For a padded strip of one channel
of x, each vector of a row of dy is multiplied with the vectors that some taps read, into one vector of sums for each
tap. The lanes are added up in float64 after every strip, of at most as many rows as one sum of vectors is to have; the
sums of strips are added up for about √n of the n strips, so that none is long in float64 either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from llvmlite import ir

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime, strip
from gpuconv.backends.numba_cpu.copies import lines, rows
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.planes_kernel import inside, mask_of
from gpuconv.backends.numba_cpu.strip import (
    COLUMN_EXTENT,
    COLUMN_PHASES,
    FILL,
    HIGH,
    INSIDE,
    KH,
    KW,
    OH,
    OW,
    PER_THREAD,
    PITCH,
    PLACES,
    ROW_PHASES,
    SCRATCH,
    SKC,
    SKG,
    SKO,
    SKP,
    SKQ,
    STRIDE,
    SXC,
    SXG,
    SXH,
    SXN,
    SYG,
    SYH,
    SYN,
    SYO,
    SYW,
    WEIGHTS,
    WIDE,
    C,
    G,
    N,
    O,
    X,
    Y,
)  # fmt: skip
from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, get, routine, scalar
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.weight_planes"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("weight_grad",))

unavailable = runtime.unavailable

# Output channels of a group, at most: from 8 on they fill half a register.
_OUTPUTS = 7
# Vectors that one vector of sums is to have, at most, and elements of a strip of x.
_VECTORS, _STRIP = 256, 1 << 15
# Tiles of taps whose sums are in registers together, rows × columns: those of the usual kernels, with few taps in vain.
_TILES = ((1, 1), (3, 3), (2, 5), (1, 7))
_ALONE = 1 << 18  # products below which starting threads costs more than it gives

# The table of arguments: that of the strips, with dy for y and dK for the weights, and then the offsets of all rows and
# of all columns of taps; the tile, how many there are in each direction, and the place of each tap's total; whether dy
# is read in place, elements of a strip, strips of a lot; whether x is copied line by line, the insides of row phases,
# the bytes between lines of one.
(
    AT_ROWS, AT_COLUMNS, TILE_ROWS, TILE_COLUMNS, DOWN, ACROSS, TOTALS, DIRECT, STRIP, LOT, NEAR, ROWS_INSIDE, LINE,
) = range(strip.END, strip.END + 13)  # fmt: skip


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = dense.unsupported_as_they_are(problem, target)
    if problem.O // problem.groups > _OUTPUTS:
        reasons.append(f"it is for at most {_OUTPUTS} output channels per group; numba_cpu.weight_grad is for more")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the strips, which are those of the sums: a matter of the problem alone."""
    lanes = dense.lanes_of(problem, target)
    geometry = replace(strip.geometry_of(problem, lanes), kc=1)

    def elements(high: int, wide: int) -> int:
        return geometry.shape(high, wide, 1).channel

    wide = schedule.halved(max(problem.OW, 1), lambda w: elements(1, w) <= _STRIP and w <= _VECTORS * lanes.count)
    wide = -(-problem.OW // -(-problem.OW // wide)) if problem.OW else 1
    most = _VECTORS // -(-wide // lanes.count)
    high = schedule.halved(max(problem.OH, 1), lambda h: h <= most and elements(h, wide) <= _STRIP)
    high = -(-problem.OH // -(-problem.OH // high)) if problem.OH else 1
    shape = geometry.shape(high, wide, 1)
    tile, (down, across) = tiles_of(problem)
    outputs = problem.O // problem.groups
    each = (shape.channel + high * wide) * lanes.size + 16 * outputs * math.prod(tile) * down * across + 256
    each = (each + 63) // 64 * 64
    strips = problem.N * -(-problem.OH // high) * -(-problem.OW // wide)
    threads = target.threads if problem.result_size * problem.products >= _ALONE else 1
    threads = max(1, min(threads, problem.C))
    tables = geometry.down.phases * geometry.down.extent + geometry.across.phases * geometry.across.extent
    tables += 3 * geometry.down.phases + 2 * problem.KH * problem.KW + tile[0] * down + tile[1] * across
    tables = 8 * tables + 4096

    (threads,) = schedule.fit((threads,), lambda t: t * each + tables, limit, f"{NAME} on {problem}")
    detail = f"strips of {high}×{wide} pixels of one channel, {lanes}"
    config = {
        "lanes": lanes, "geometry": geometry, "shape": shape, "threads": threads, "each": each, "extra": 0,
        "lot": math.isqrt(strips) + 1,
    }  # fmt: skip
    return Plan(problem, threads * each + tables, lanes.dtype, detail, config)


def tiles_of(problem: Conv2dProblem) -> tuple[tuple[int, int], tuple[int, int]]:
    """The tile of taps that leaves the fewest in vain, and how many of it there are down and across. A single tap has a
    tile of its own, others not: sums of one tap each would wait for themselves.
    """

    def tiles(tile: tuple[int, int]) -> tuple[int, int]:
        return -(-problem.KH // tile[0]), -(-problem.KW // tile[1])

    if problem.KH == problem.KW == 1:
        return _TILES[0], (1, 1)
    tile = min(_TILES[1:], key=lambda tile: math.prod(tile) * math.prod(tiles(tile)))
    return tile, tiles(tile)


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    problem = plan.problem
    return f"weight_planes_{plan.config['lanes']}_{problem.x_dtype}_{problem.k_dtype}_{problem.y_dtype}"


def pack_key(plan: Plan) -> Any:
    """Nothing is kept for later: neither operand is a kernel."""
    return None


def pack(plan: Plan, operands: Operands) -> Any:
    """Nothing."""
    return None


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the weight gradient of NumPy operands into ``out``, (G, O/G, C/G, KH, KW)."""
    if plan.problem.products == 0:
        out[...] = 0
        return
    Bound(plan, operands.x, operands.k, out)(operands.x, operands.k, None, None, out)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(self, plan: Plan, x: Any, dy: Any, out: Any) -> None:
        """For arrays like ``x``, ``dy`` and ``out``."""
        problem, config = plan.problem, plan.config
        lanes: Lanes = config["lanes"]
        self.alone = problem.result_size * problem.products < _ALONE
        entries, kept = strip.table_of(plan, x, out, dy)
        entries[PER_THREAD - runtime.ARRAYS] = config["each"]
        tile, tiles = tiles_of(problem)
        offsets = kept[3].reshape(problem.KH, problem.KW)
        # Of taps in vain, those of the last.
        placed = [
            np.ascontiguousarray(of_axis[np.minimum(np.arange(taps * count), of_axis.size - 1)])
            for of_axis, taps, count in zip((offsets[:, 0], offsets[0] - offsets[0, 0]), tile, tiles, strict=True)
        ]
        direct = dy.dtype == lanes.dtype and dy.strides[4] == lanes.size and dy.strides[3] % lanes.size == 0
        (rows_, columns), p, q = tile, *np.indices((problem.KH, problem.KW))
        totals = (p // rows_ * tiles[1] + q // columns) * rows_ * columns + p % rows_ * columns + q % columns
        placed.append(8 * totals)
        entries += [*(table.ctypes.data for table in placed[:2]), *tile, *tiles, placed[2].ctypes.data, direct]
        entries += [config["shape"].channel, config["lot"]]
        down, across = config["geometry"].down, config["geometry"].across
        rows_inside = np.array(down.inside, np.int64)
        near = (
            config["shape"].wide >= problem.OW
            and across.stride <= 2
            and x.dtype == lanes.dtype
            and x.strides[4] == lanes.size
            and x.strides[3] % lanes.size == 0
        )
        entries += [near, rows_inside.ctypes.data, down.stride * x.strides[3]]
        kernel = runtime.kernel(kernel_name(plan), lambda: _kernel(problem, lanes))
        self.task = runtime.Task(kernel, entries, config["threads"], (kept, placed, rows_inside))
        self.scratch = config["threads"] * config["each"] + 64
        self.fill = dense.constant(problem, lanes)

    def __call__(self, x: Any, dy: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Write the gradient into ``out``."""
        self.task(x, out, dy, np.empty(self.scratch, np.uint8), None, self.fill)


@functools.lru_cache(maxsize=64)
def correlation(lanes: Lanes, taps: tuple[int, int]) -> Any:
    """A function of (x, down, across, dy, high, columns, ldx, ldy, totals, more) for ``taps`` rows × columns of taps:
    the float64 totals[p][q] = (totals[p][q] +) Σ_ij dy[i·ldy + j] · x[down[p] + across[q] + i·ldx + j].
    """
    wide = ir.VectorType(ir.DoubleType(), lanes.count)

    def emit(e: Emitter, x: Value, down: Value, across: Value, dy: Value, high: Value, columns: Value, ldx: Value,
             ldy: Value, totals: Value, more: Value) -> None:  # fmt: skip
        builder, n = e.builder, lanes.count
        # An address for each row of taps and an offset for each column: one for each tap would be too many to be held.
        starts = [e.at(x, builder.load(e.at(down, p))) for p in range(taps[0])]
        aside = [builder.load(e.at(across, q)) for q in range(taps[1])]
        entry = builder.block
        row, vector, rest, cut, ended, after = (
            e.block(name) for name in ("row", "vector", "rest", "cut", "ended", "after")
        )
        whole = builder.and_(columns, I64(-n))
        left = inside(e, I64(0), builder.sub(columns, whole))
        builder.branch(row)

        def walked(origin: Value, pointers: list[Value]) -> list[Value]:
            """Pointers that come from ``origin``, and from a block that is not there yet."""
            phis = [builder.phi(pointer.type) for pointer in pointers]
            for phi, pointer in zip(phis, pointers, strict=True):
                phi.add_incoming(pointer, origin)
            return phis

        def moved(phis: list[Value], steps: list[Value], block: Value) -> None:
            """The next round of a loop: each pointer a step further."""
            for phi, step in zip(phis, steps, strict=True):
                phi.add_incoming(e.at(phi, step), block)

        def more_of(sums: list[Value], places: list[Value], part: bool = False) -> list[Value]:
            """The sums with a vector of every row of x and of dy; what is cut off is not read."""

            def loaded(place: Value) -> Value:
                return e.masked_load(place, mask_of(e, left)) if part else e.load(place)

            gradient = loaded(places[-1])
            pixels = [loaded(e.at(place, offset)) for place in places[:-1] for offset in aside]
            return [e.fma(pixel, gradient, total) for pixel, total in zip(pixels, sums, strict=True)]

        builder.position_at_end(row)
        i = builder.phi(I64)
        i.add_incoming(I64(0), entry)
        lines = walked(entry, [*starts, dy])
        (begun,) = e.sums(1, taps[0] * taps[1], [(entry, None)])
        builder.cbranch(builder.icmp_signed(">", whole, I64(0)), vector, rest)

        builder.position_at_end(vector)
        j = builder.phi(I64)
        j.add_incoming(I64(0), row)
        places = walked(row, lines)
        (sums,) = e.sums(1, len(begun), [(row, [begun])])
        new = more_of(sums, places)
        following = builder.add(j, I64(n))
        j.add_incoming(following, vector)
        moved(places, [I64(n)] * len(places), vector)
        for total, value in zip(sums, new, strict=True):
            total.add_incoming(value, vector)
        builder.cbranch(builder.icmp_signed("<", following, whole), vector, rest)

        builder.position_at_end(rest)
        (sums,) = e.sums(1, len(begun), [(row, [begun]), (vector, [new])])
        builder.cbranch(builder.icmp_signed("<", whole, columns), cut, ended)
        builder.position_at_end(cut)
        last = more_of(sums, [e.at(line, whole) for line in lines], True)
        builder.branch(ended)

        builder.position_at_end(ended)
        (new,) = e.sums(1, len(begun), [(rest, [sums]), (cut, [last])])
        following = builder.add(i, I64(1))
        i.add_incoming(following, ended)
        moved(lines, [ldx] * len(starts) + [ldy], ended)
        for total, value in zip(begun, new, strict=True):
            total.add_incoming(value, ended)
        builder.cbranch(builder.icmp_signed("<", following, high), row, after)

        builder.position_at_end(after)
        going_on = builder.icmp_signed("!=", more, I64(0))
        for t, value in enumerate(new):
            total = _across(e, value if lanes.dtype == "float64" else builder.fpext(value, wide))
            place = e.at(totals, t)
            before = builder.select(going_on, builder.load(place), ir.Constant(ir.DoubleType(), 0.0))
            builder.store(builder.fadd(before, total), place)

    return routine(f"correlation_{lanes}_{taps[0]}x{taps[1]}", lanes, "etteiiiidi", emit)


def _across(e: Emitter, value: Value) -> Value:
    """The sum of a vector's lanes: halves added, and their halves."""
    count = e.lanes.count
    while count > 1:
        count //= 2
        low, high = (e.shuffle(value, value, range(start, start + count)) for start in (0, count))
        value = e.builder.fadd(low, high)
    return e.builder.extract_element(value, ir.IntType(32)(0))


def _kernel(problem: Conv2dProblem, lanes: Lanes) -> Callable[..., None]:
    size = lanes.size
    one, square, low, row = (correlation(lanes, tile) for tile in _TILES)
    of_one, of_square, of_low, _ = (columns for _, columns in _TILES)
    fill = strip.filler(lanes, problem.x_dtype)
    plain, second = lines(lanes, 1), lines(lanes, 2)
    read, _, repeat = rows(lanes, problem.k_dtype)
    load, keep = scalar("float64")
    _, store = scalar(problem.y_dtype)

    @compiled
    def multiply(arguments, x, dy, high, wide, ldy, totals, more):
        """All taps of a strip."""
        rows_, columns = get(arguments, TILE_ROWS), get(arguments, TILE_COLUMNS)
        for p in range(get(arguments, DOWN)):
            for q in range(get(arguments, ACROSS)):
                down, across = get(arguments, AT_ROWS) + 8 * rows_ * p, get(arguments, AT_COLUMNS) + 8 * columns * q
                given = (x, down, across, dy, high, wide, get(arguments, PITCH), ldy, totals, more)
                if columns == of_square:
                    square(given)
                elif columns == of_low:
                    low(given)
                elif columns == of_one:
                    one(given)
                else:
                    row(given)
                totals += 8 * rows_ * columns

    @compiled
    def enter(arguments, to, plane, i0, high, fresh):
        """What a strip as wide as the plane reads, into a copy whose border is zero: phase after phase, from the first
        line to the last, as ``lines`` has it. Without ``fresh``, lines outside are those of the strip before.
        """
        pitch, phases = get(arguments, PITCH), get(arguments, COLUMN_PHASES)
        for a in range(get(arguments, ROW_PHASES)):
            down = get(arguments, ROWS_INSIDE) + 24 * a
            first = min(max(get(down, 0) - i0, 0), high)
            end = max(min(get(down, 1) - i0, high), first)
            source = plane + get(down, 2) * get(arguments, SXH) + (i0 + first - get(down, 0)) * get(arguments, LINE)
            for b in range(phases):
                across = get(arguments, INSIDE) + 24 * b
                start, columns = get(across, 0), get(across, 1) - get(across, 0)
                block = to + size * (a * phases + b) * get(arguments, PLACES) * pitch
                if fresh:
                    repeat(block, get(arguments, FILL), first * pitch)
                    repeat(block + size * end * pitch, get(arguments, FILL), (high - end) * pitch)
                given = (
                    block + size * (first * pitch + start), source + get(across, 2) * size, end - first, columns, pitch,
                    get(arguments, LINE) // size,
                )  # fmt: skip
                if columns > 0 and get(arguments, STRIDE) == 1:
                    plain(given)
                elif columns > 0:
                    second(given)

    @compiled
    def summed(arguments, x, dy, copy, beside, totals, again):
        """The totals of one channel of x, taps of one output channel after those of another; images at addresses.

        ``again``: the copy holds another channel.
        """
        OH_, OW_, O_ = get(arguments, OH), get(arguments, OW), get(arguments, O)
        high, wide = get(arguments, HIGH), get(arguments, WIDE)
        reach_down, reach_across = get(arguments, PLACES) - high, get(arguments, COLUMN_EXTENT) - OW_
        step = (
            8 * get(arguments, DOWN) * get(arguments, ACROSS) * get(arguments, TILE_ROWS) * get(arguments, TILE_COLUMNS)
        )
        # Where all of an image is one strip, the border of the copy is that of the image before.
        single = high >= OH_ and wide >= OW_
        recent, held = totals + O_ * step, 0  # the totals of the strips of a lot, and how many they are
        for t in range(0, O_ * step, 8):
            keep(totals + t, 0.0)
        for n in range(get(arguments, N)):
            for i0 in range(0, OH_, high):
                i1 = min(OH_, i0 + high)
                for j0 in range(0, OW_, wide):
                    j1 = min(OW_, j0 + wide)
                    if get(arguments, NEAR):
                        enter(arguments, copy, x + n * get(arguments, SXN), i0, i1 - i0 + reach_down, not single)
                    else:
                        fill(
                            arguments, copy, x + n * get(arguments, SXN), 1, i0, i1 - i0 + reach_down, j0,
                            j1 - j0 + reach_across, single and again + n > 0,
                        )  # fmt: skip
                    for o in range(O_):
                        source = dy + n * get(arguments, SYN) + o * get(arguments, SYO) + i0 * get(arguments, SYH)
                        source += j0 * get(arguments, SYW)
                        ldy = get(arguments, SYH) // size
                        if get(arguments, DIRECT) == 0:
                            ldy = j1 - j0
                            for i in range(i1 - i0):
                                at = source + i * get(arguments, SYH)
                                read(beside + size * i * ldy, at, ldy, get(arguments, SYW))
                            source = beside
                        multiply(arguments, copy, source, i1 - i0, j1 - j0, ldy, recent + o * step, held > 0)
                    held += 1
                    if held == get(arguments, LOT):
                        for t in range(0, O_ * step, 8):
                            keep(totals + t, load(totals + t) + load(recent + t))
                        held = 0
        if held > 0:
            for t in range(0, O_ * step, 8):
                keep(totals + t, load(totals + t) + load(recent + t))

    def work(arguments, thread, threads):
        C_, O_, KH_, KW_ = get(arguments, C), get(arguments, O), get(arguments, KH), get(arguments, KW)
        copy = (get(arguments, SCRATCH) + 63) // 64 * 64 + thread * get(arguments, PER_THREAD)
        totals = copy + (size * get(arguments, STRIP) + 63) // 64 * 64
        step = (
            8 * get(arguments, DOWN) * get(arguments, ACROSS) * get(arguments, TILE_ROWS) * get(arguments, TILE_COLUMNS)
        )
        beside = (totals + 2 * O_ * step + 63) // 64 * 64
        if get(arguments, NEAR):
            repeat(copy, get(arguments, FILL), get(arguments, STRIP))
        tasks = get(arguments, G) * C_
        first = thread * tasks // threads
        for task in range(first, (thread + 1) * tasks // threads):
            g, c = task // C_, task % C_
            x = get(arguments, X) + g * get(arguments, SXG) + c * get(arguments, SXC)
            dy = get(arguments, Y) + g * get(arguments, SYG)
            summed(arguments, x, dy, copy, beside, totals, task - first)
            to = get(arguments, WEIGHTS) + g * get(arguments, SKG) + c * get(arguments, SKC)
            for o in range(O_):
                for p in range(KH_):
                    for q in range(KW_):
                        total = load(totals + o * step + get(get(arguments, TOTALS), p * KW_ + q))
                        store(to + o * get(arguments, SKO) + p * get(arguments, SKP) + q * get(arguments, SKQ), total)

    return work
