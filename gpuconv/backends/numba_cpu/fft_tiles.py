"""Tiles of an image on their way into a Fourier transform and out of it, and how large their sums are at least.

Two tiles are transformed at once, as the real and the imaginary part of one: the kernel is real, so that the results
are the real and the imaginary part of what comes back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from gpuconv.backends.numba_cpu.copies import LETTERS
from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, routine

# Rows of a *cell*, which is one column wide. What is known of its pixels is the largest magnitude.
CELL = 4
# Products that speak for a sum.
POINTS = 8


def _magnitude(e: Emitter, value: Value) -> Value:
    name = f"llvm.fabs.v{e.lanes.count}f64"
    signature = ir.FunctionType(e.vector, [e.vector])
    return e.builder.call(cgutils.get_or_insert_function(e.function.module, signature, name), [value])


def _larger(e: Emitter, a: Value, b: Value) -> Value:
    return e.builder.select(e.builder.fcmp_ordered(">", a, b), a, b)


def _load(e: Emitter, z: Value, a: Value, b: Value, cells_a: Value, cells_b: Value, energy: Value, groups: Value,
          step: Value, pitch: Value, stored: str) -> None:  # fmt: skip
    builder, n = e.builder, e.lanes.count
    before, head, after = builder.block, e.block("columns"), e.block("after")
    least = e.at(energy, n)
    begun = [e.load(energy), e.zero, e.load(least)]
    builder.branch(head)
    builder.position_at_end(head)
    g = builder.phi(I64)
    g.add_incoming(I64(0), before)
    (held,) = e.sums(1, 3, [(before, [begun])])
    column, place = builder.mul(g, I64(n)), e.at(z, builder.mul(g, step))
    made = list(held)
    everything = None
    for which, (source, cells) in enumerate(((a, cells_a), (b, cells_b))):
        largest = None
        for row in range(CELL):
            value = e.load(e.at(source, e.times(pitch, row), column), stored)
            e.store(value, e.at(place, 2 * n * row + n * which))
            everything = value if everything is None else builder.fadd(everything, value)
            size = _magnitude(e, value)
            largest = size if largest is None else _larger(e, largest, size)
        e.store(largest, e.at(cells, column))
        made[which] = e.fma(largest, largest, made[which])
        made[2] = builder.select(builder.fcmp_ordered("<", largest, made[2]), largest, made[2])
    # What is not finite makes a sum that is not, and zero times that is not a number.
    made[0] = e.fma(everything, e.zero, made[0])
    following = builder.add(g, I64(1))
    g.add_incoming(following, head)
    for phi, value in zip(held, made, strict=True):
        phi.add_incoming(value, head)
    builder.cbranch(builder.icmp_signed("<", following, groups), head, after)
    builder.position_at_end(after)
    e.store(builder.fadd(*made[:2]), energy)
    e.store(made[2], least)


@functools.lru_cache(maxsize=16)
def load(lanes: Lanes, stored: str) -> Any:
    """A function of (z, a, b, cells_a, cells_b, energy, groups, step, pitch): the CELL rows of two tiles at a and b,
    of ``stored``, ``pitch`` elements apart, as complex numbers at z, ``groups`` registers a row, ``step`` elements
    apart; the largest magnitudes of each column; the squares of these, added to the vector at ``energy``, which is NaN
    from the first value that is not finite; and the least of them in the vector behind it, if that was larger.
    """
    letter = LETTERS[stored]
    return routine(f"fft_load_{lanes}_{stored}", lanes, f"e{letter * 2}eeeiii", functools.partial(_load, stored=stored))


def _finished(e: Emitter, noise: Value, bias: Value, floor: Value, whole: bool) -> Callable[[Value], Value]:
    builder = e.builder
    most, offset, lowest = (e.splat(builder.load(number)) for number in (noise, bias, floor))

    def is_noise(value: Value) -> Value:
        return builder.fcmp_ordered("<=", _magnitude(e, value), most)

    def finished(value: Value) -> Value:
        name, signature = f"llvm.rint.v{e.lanes.count}f64", ir.FunctionType(e.vector, [e.vector])
        near = builder.call(cgutils.get_or_insert_function(e.function.module, signature, name), [value])
        if not whole:
            near = builder.select(is_noise(value), e.zero, near)
            near = builder.select(is_noise(builder.fsub(value, near)), near, value)
        value = builder.fadd(near, offset)
        return builder.select(builder.fcmp_ordered("<", value, lowest), lowest, value)

    return finished


def _store(e: Emitter, a: Value, b: Value, z: Value, noise: Value, bias: Value, floor: Value, rows: Value,
           groups: Value, step: Value, pitch: Value, stored: str, whole: bool) -> None:  # fmt: skip
    builder, n, finished = e.builder, e.lanes.count, _finished(e, noise, bias, floor, whole)

    def column(g: Value) -> None:
        here, to = e.at(z, builder.mul(g, step)), builder.mul(g, I64(n))

        def row(r: Value) -> None:
            place, line = e.at(here, builder.mul(r, I64(2 * n))), builder.add(to, builder.mul(r, pitch))
            e.store(finished(e.load(place)), e.at(a, line), stored)
            e.store(finished(e.load(e.at(place, n))), e.at(b, line), stored)

        e.loop(0, rows, 1, row)

    e.loop(0, groups, 1, column)


@functools.lru_cache(maxsize=16)
def store(lanes: Lanes, stored: str, whole: bool) -> Any:
    """A function of (a, b, z, noise, bias, floor, rows, groups, step, pitch): the way back of ``load``, for ``rows``
    rows. Sums are rounded to integers: if ``whole`` all, else those that are no further from one than the number at
    ``noise``, and no larger ones to zero. The one at ``bias`` is added, and the one at ``floor`` is the least result.
    """
    emit = functools.partial(_store, stored=stored, whole=whole)
    return routine(f"fft_store{whole:d}_{lanes}_{stored}", lanes, LETTERS[stored] * 2 + "eeeeiiii", emit)


def _least(e: Emitter, result: Value, cells: Value, points: Value, rows: Value, columns: Value, pitch: Value) -> None:
    builder, n = e.builder, e.lanes.count
    offsets = [builder.load(e.at(builder.bitcast(points, I64.as_pointer()), 2 * i)) for i in range(POINTS)]
    weights = [e.splat(builder.load(e.at(points, 2 * i + 1))) for i in range(POINTS)]

    def row(b: Value) -> None:
        line = e.at(cells, builder.mul(b, pitch))

        def vector(j: Value) -> None:
            sums = [e.zero, e.zero]
            for i in range(POINTS):
                sums[i % 2] = e.fma(e.load(e.at(line, builder.add(offsets[i], j))), weights[i], sums[i % 2])
            held = e.load(result)
            total = builder.fadd(*sums)
            e.store(builder.select(builder.fcmp_ordered("<", total, held), total, held), result)

        j = e.loop(0, columns, n, vector)
        with builder.if_then(builder.icmp_signed("<", j, columns)):
            last = builder.sub(columns, I64(n))
            vector(builder.select(builder.icmp_signed("<", last, I64(0)), I64(0), last))

    e.loop(0, rows, 1, row)


@functools.lru_cache(maxsize=16)
def least(lanes: Lanes) -> Any:
    """A function of (result, cells, points, rows, columns, pitch): in the vector at ``result``, if it was larger, the
    least Σ|x||k| that can be of the outputs of ``rows`` rows of cells, as far as POINTS products tell; ``points`` has
    for each the place of its cell and its weight.
    """
    return routine(f"fft_least_{lanes}", lanes, "eeeiii", _least)


def _measure(e: Emitter, z: Value, cells_a: Value, cells_b: Value, energy: Value, count: Value) -> None:
    builder, n = e.builder, e.lanes.count
    least = e.at(energy, n)

    def cell(b: Value) -> None:
        here, place = e.at(z, builder.mul(b, I64(2 * n * CELL))), builder.mul(b, I64(n))
        squares, dark = e.load(energy), e.load(least)
        for which, cells in enumerate((cells_a, cells_b)):
            values = [e.load(e.at(here, 2 * n * row + n * which)) for row in range(CELL)]
            largest, everything = _magnitude(e, values[0]), values[0]
            for value in values[1:]:
                largest, everything = _larger(e, largest, _magnitude(e, value)), builder.fadd(everything, value)
            e.store(largest, e.at(cells, place))
            squares = e.fma(everything, e.zero, e.fma(largest, largest, squares))
            dark = builder.select(builder.fcmp_ordered("<", largest, dark), largest, dark)
        e.store(squares, energy)
        e.store(dark, least)

    e.loop(0, count, 1, cell)


@functools.lru_cache(maxsize=16)
def measure(lanes: Lanes) -> Any:
    """A function of (z, cells_a, cells_b, energy, count): what ``load`` finds out, of ``count`` cells of complex
    numbers, one below the other at z.
    """
    return routine(f"fft_measure_{lanes}", lanes, "eeeei", _measure)


def _finish(
    e: Emitter, values: Value, noise: Value, bias: Value, floor: Value, count: Value, whole: bool
) -> None:  # fmt: skip
    finished = _finished(e, noise, bias, floor, whole)
    e.loop(0, count, e.lanes.count, lambda i: e.store(finished(e.load(e.at(values, i))), e.at(values, i)))


@functools.lru_cache(maxsize=16)
def finish(lanes: Lanes, whole: bool) -> Any:
    """A function of (values, noise, bias, floor, count): what ``store`` does to values, in place."""
    return routine(f"fft_finish{whole:d}_{lanes}", lanes, "eeeei", functools.partial(_finish, whole=whole))
