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
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.strip import (
    COLUMN_EXTENT,
    HIGH,
    KH,
    KW,
    OH,
    OW,
    PER_THREAD,
    PITCH,
    PLACES,
    SCRATCH,
    SKC,
    SKG,
    SKO,
    SKP,
    SKQ,
    SXC,
    SXG,
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
# Taps whose sums are in registers together: all of 3×3, and fewer where that would leave many in vain.
_TAPS = (9, 5)
_ALONE = 1 << 18  # products below which starting threads costs more than it gives

# The table of arguments: that of the strips, with dy for y and dK for the weights, and then the offsets of all taps,
# how many groups of taps there are of each size, whether dy is read in place, elements of a strip, strips of a lot.
PLACED, MANY, SOME, DIRECT, STRIP, LOT = range(strip.END, strip.END + 6)


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
    many, some = _shares(problem.KH * problem.KW)
    outputs = problem.O // problem.groups
    each = (shape.channel + high * wide) * lanes.size + 16 * outputs * (many * _TAPS[0] + some * _TAPS[1]) + 256
    each = (each + 63) // 64 * 64
    strips = problem.N * -(-problem.OH // high) * -(-problem.OW // wide)
    threads = target.threads if problem.result_size * problem.products >= _ALONE else 1
    threads = max(1, min(threads, problem.C))
    tables = geometry.down.phases * geometry.down.extent + geometry.across.phases * geometry.across.extent
    tables = 8 * (tables + 2 * problem.KH * problem.KW + sum(_TAPS)) + 4096

    (threads,) = schedule.fit((threads,), lambda t: t * each + tables, limit, f"{NAME} on {problem}")
    detail = f"strips of {high}×{wide} pixels of one channel, {lanes}"
    config = {
        "lanes": lanes, "geometry": geometry, "shape": shape, "threads": threads, "each": each, "extra": 0,
        "lot": math.isqrt(strips) + 1,
    }  # fmt: skip
    return Plan(problem, threads * each + tables, lanes.dtype, detail, config)


def _shares(taps: int) -> tuple[int, int]:
    """How many groups of each size of _TAPS hold all taps, with as few as possible in vain."""
    many, rest = divmod(taps, _TAPS[0])
    return (many + 1, 0) if rest > _TAPS[1] else (many, int(rest > 0))


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
        many, some = _shares(problem.KH * problem.KW)
        offsets = kept[3].ravel()
        placed = np.resize(offsets[-1:], many * _TAPS[0] + some * _TAPS[1])
        placed[: offsets.size] = offsets
        direct = dy.dtype == lanes.dtype and dy.strides[4] == lanes.size and dy.strides[3] % lanes.size == 0
        entries += [placed.ctypes.data, many, some, direct, config["shape"].channel, config["lot"]]
        kernel = runtime.kernel(kernel_name(plan), lambda: _kernel(problem, lanes))
        self.task = runtime.Task(kernel, entries, config["threads"], (kept, placed))
        self.scratch = config["threads"] * config["each"] + 64
        self.fill = dense.constant(problem, lanes)

    def __call__(self, x: Any, dy: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Write the gradient into ``out``."""
        self.task(x, out, dy, np.empty(self.scratch, np.uint8), None, self.fill)


@functools.lru_cache(maxsize=64)
def correlation(lanes: Lanes, taps: int) -> Any:
    """A function of (x, off, dy, rows, columns, ldx, ldy, totals, more): the float64 totals[t] = (totals[t] +)
    Σ_ij dy[i·ldy + j] · x[off[t] + i·ldx + j], for as many taps t as given.
    """
    wide = ir.VectorType(ir.DoubleType(), lanes.count)

    def emit(e: Emitter, x: Value, off: Value, dy: Value, high: Value, columns: Value, ldx: Value, ldy: Value,
             totals: Value, more: Value) -> None:  # fmt: skip
        builder = e.builder
        addresses = [e.at(x, builder.load(e.at(off, t))) for t in range(taps)]
        entry = builder.block
        row, vector, rest, cut, ended, after = (
            e.block(name) for name in ("row", "vector", "rest", "cut", "ended", "after")
        )
        whole = builder.and_(columns, I64(-lanes.count))
        left = e.mask(builder.sub(columns, whole))
        builder.branch(row)

        def more_of(sums: list[Value], j: Value, mask: Value | None) -> list[Value]:
            """The sums with a vector of every row of x; what is cut off by ``mask`` is not read."""

            def loaded(place: Value) -> Value:
                return e.load(place) if mask is None else e.masked_load(place, mask)

            gradient = loaded(e.at(dy, at_dy, j))
            return [
                e.fma(loaded(e.at(address, at_x, j)), gradient, total)
                for address, total in zip(addresses, sums, strict=True)
            ]

        builder.position_at_end(row)
        i = builder.phi(I64)
        i.add_incoming(I64(0), entry)
        (begun,) = e.sums(1, taps, [(entry, None)])
        at_x, at_dy = builder.mul(i, ldx), builder.mul(i, ldy)
        builder.cbranch(builder.icmp_signed(">", whole, I64(0)), vector, rest)

        builder.position_at_end(vector)
        j = builder.phi(I64)
        j.add_incoming(I64(0), row)
        (sums,) = e.sums(1, taps, [(row, [begun])])
        new = more_of(sums, j, None)
        following = builder.add(j, I64(lanes.count))
        j.add_incoming(following, vector)
        for total, value in zip(sums, new, strict=True):
            total.add_incoming(value, vector)
        builder.cbranch(builder.icmp_signed("<", following, whole), vector, rest)

        builder.position_at_end(rest)
        (sums,) = e.sums(1, taps, [(row, [begun]), (vector, [new])])
        builder.cbranch(builder.icmp_signed("<", whole, columns), cut, ended)
        builder.position_at_end(cut)
        last = more_of(sums, whole, left)
        builder.branch(ended)

        builder.position_at_end(ended)
        (new,) = e.sums(1, taps, [(rest, [sums]), (cut, [last])])
        following = builder.add(i, I64(1))
        i.add_incoming(following, ended)
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

    return routine(f"correlation_{lanes}_{taps}", lanes, "eteiiiidi", emit)


def _across(e: Emitter, value: Value) -> Value:
    """The sum of a vector's lanes: halves added, and their halves."""
    count = e.lanes.count
    while count > 1:
        count //= 2
        low, high = (e.shuffle(value, value, range(start, start + count)) for start in (0, count))
        value = e.builder.fadd(low, high)
    return e.builder.extract_element(value, ir.IntType(32)(0))


def _kernel(problem: Conv2dProblem, lanes: Lanes) -> Callable[..., None]:
    size, count_many, count_some = lanes.size, *_TAPS
    many, some = (correlation(lanes, taps) for taps in _TAPS)
    fill = strip.filler(lanes, problem.x_dtype)
    read, _, _ = rows(lanes, problem.k_dtype)
    load, keep = scalar("float64")
    _, store = scalar(problem.y_dtype)

    @compiled
    def multiply(arguments, x, dy, high, wide, ldy, totals, more):
        """All taps of a strip."""
        off, pitch = get(arguments, PLACED), get(arguments, PITCH)
        for _ in range(get(arguments, MANY)):
            many((x, off, dy, high, wide, pitch, ldy, totals, more))
            off += 8 * count_many
            totals += 8 * count_many
        for _ in range(get(arguments, SOME)):
            some((x, off, dy, high, wide, pitch, ldy, totals, more))

    @compiled
    def summed(arguments, x, dy, copy, beside, totals, again):
        """The totals of one channel of x, taps of one output channel after those of another; images at addresses.

        ``again``: the copy holds another channel.
        """
        OH_, OW_, O_ = get(arguments, OH), get(arguments, OW), get(arguments, O)
        high, wide = get(arguments, HIGH), get(arguments, WIDE)
        reach_down, reach_across = get(arguments, PLACES) - high, get(arguments, COLUMN_EXTENT) - OW_
        step = 8 * (get(arguments, MANY) * count_many + get(arguments, SOME) * count_some)
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
        step = 8 * (get(arguments, MANY) * count_many + get(arguments, SOME) * count_some)
        beside = (totals + 2 * O_ * step + 63) // 64 * 64
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
                        total = load(totals + o * step + 8 * (p * KW_ + q))
                        store(to + o * get(arguments, SKO) + p * get(arguments, SKP) + q * get(arguments, SKQ), total)

    return work
