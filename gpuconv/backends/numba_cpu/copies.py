"""Rows of pixels between the caller's arrays and a kernel's own memory: any step, other types converted on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.planes_kernel import inside, mask_of
from gpuconv.backends.numba_cpu.vectors import I64, INTEGERS, SIZE, Emitter, Lanes, Value, routine, scalar

# Of ``routine``: what kind of memory.
LETTERS = {"float16": "h", "bfloat16": "2", "float32": "s", "float64": "d"} | {
    name: {1: "1", 2: "2", 4: "4", 8: "t"}[SIZE[name]] for name in INTEGERS
}


class Rows(NamedTuple):
    """The functions of one kind of memory; addresses and steps in bytes, counts in elements."""

    read: Any  # read(to, source, count, step): widen from the caller's memory
    write: Any  # write(to, source, count, step): round into the caller's memory
    fill: Any  # fill(to, value_at, count): repeat the number at an address


@functools.lru_cache(maxsize=64)
def rows(lanes: Lanes, stored: str) -> Rows:
    """Functions between vectors of ``lanes`` and memory of ``stored``."""
    letter, own = LETTERS[stored], LETTERS[lanes.dtype]
    size, wide = SIZE[stored], lanes.size
    near = routine(f"widen_{lanes}_{stored}", lanes, f"{own}{letter}i", functools.partial(_widen, stored=stored))
    apart = routine(f"widen2_{lanes}_{stored}", lanes, f"{own}{letter}i", functools.partial(_widen2, stored=stored))
    back = routine(f"narrow_{lanes}_{stored}", lanes, f"{letter}{own}i", functools.partial(_narrow, stored=stored))
    repeat = routine(f"fill_{lanes}", lanes, "eei", _fill)
    load, store = scalar(stored, lanes.dtype)
    load_wide, store_wide = scalar(lanes.dtype)

    @compiled
    def read(to, source, count, step):
        if step == size:
            near((to, source, count))
        elif step == 2 * size:
            apart((to, source, count))
        else:
            for i in range(count):
                store_wide(to + i * wide, load(source + i * step))

    @compiled
    def write(to, source, count, step):
        if step == size:
            back((to, source, count))
        else:
            for i in range(count):
                store(to + i * step, load_wide(source + i * wide))

    @compiled
    def fill(to, value_at, count):
        repeat((to, value_at, count))

    return Rows(read, write, fill)


@functools.lru_cache(maxsize=64)
def woven(lanes: Lanes) -> Any:
    """A function of (to, real, imaginary, count, step, part): two rows as the parts of complex numbers ``step`` bytes
    apart, the imaginary one ``part`` bytes behind the real.
    """
    size, own = lanes.size, LETTERS[lanes.dtype]
    near = routine(f"weave_{lanes}", lanes, f"{own * 3}i", _weave)
    load, store = scalar(lanes.dtype)

    @compiled
    def write(to, real, imaginary, count, step, part):
        if step == 2 * size and part == size:
            near((to, real, imaginary, count))
        else:
            for i in range(count):
                store(to + i * step, load(real + i * size))
                store(to + i * step + part, load(imaginary + i * size))

    return write


@functools.lru_cache(maxsize=64)
def lines(lanes: Lanes, step: int) -> Any:
    """A function of (to, source, count, columns, pitch, line): ``count`` lines of ``columns`` elements, every one or
    every second of those at ``source``, ``pitch`` and ``line`` elements from line to line.

    A line of fewer elements than a vector has lanes is one vector, with zeros behind its end: lines that begin there
    are to be copied after it.
    """

    def emit(e: Emitter, to: Value, source: Value, count: Value, columns: Value, pitch: Value, line: Value) -> None:
        builder, n = e.builder, e.lanes.count
        spanned = columns if step == 1 else builder.sub(builder.mul(columns, I64(2)), I64(1))
        there = [inside(e, I64(part * n), spanned) for part in range(step)]

        def each(i: Value) -> None:
            here, target = e.at(source, e.times(line, i)), e.at(to, e.times(pitch, i))

            def vector(j: Value) -> None:
                value = e.load(e.at(here, j)) if step == 1 else e.load_even(e.at(here, builder.mul(j, I64(2))))
                e.store(value, e.at(target, j))

            j = e.loop(0, columns, n, vector)
            with builder.if_then(builder.icmp_signed("<", j, columns)):
                vector(builder.sub(columns, I64(n)))

        def short(i: Value) -> None:
            here = e.at(source, e.times(line, i))
            parts = [e.masked_load(e.at(here, part * n), mask_of(e, mask)) for part, mask in enumerate(there)]
            value = parts[0] if step == 1 else e.shuffle(parts[0], parts[1], range(0, 2 * n, 2))
            e.store(value, e.at(to, e.times(pitch, i)))

        with builder.if_else(builder.icmp_signed(">=", columns, I64(n))) as (long, cut):
            with long:
                e.loop(0, count, 1, each)
            with cut:
                e.loop(0, count, 1, short)

    return routine(f"lines{step}_{lanes}", lanes, "eeiiii", emit)


def _weave(e: Emitter, to: Value, real: Value, imaginary: Value, count: Value) -> None:
    builder, lanes = e.builder, e.lanes.count
    low, high = ([i // 2 + i % 2 * lanes + start for i in range(lanes)] for start in (0, lanes // 2))

    def whole(i: Value) -> None:
        parts = e.load(e.at(real, i)), e.load(e.at(imaginary, i))
        place = builder.mul(i, I64(2))
        e.store(e.shuffle(*parts, low), e.at(to, place))
        e.store(e.shuffle(*parts, high), e.at(to, place, lanes))

    def one(i: Value) -> None:
        place = builder.mul(i, I64(2))
        builder.store(builder.load(e.at(real, i)), e.at(to, place))
        builder.store(builder.load(e.at(imaginary, i)), e.at(to, place, 1))

    i = e.loop(0, count, lanes, whole)
    e.loop(i, count, 1, one)


def _each(e: Emitter, count: Value, whole: Callable[[Value], None], cut: Callable[[Value, Value], None]) -> None:
    """``whole(i)`` for every vector of a row, ``cut(i, rest)`` for what is left, ``rest`` elements.

    Processors without AVX-512 are slow to store the first lanes of a vector: there the last vector overlaps the one
    before it, and only rows shorter than a vector are cut.
    """
    builder, lanes = e.builder, e.lanes.count
    i = e.loop(0, count, lanes, whole)
    rest = builder.sub(count, i)
    with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
        if e.lanes.bits == 512:
            cut(i, rest)
        else:
            with builder.if_else(builder.icmp_signed(">", i, I64(0))) as (long, short):
                with long:
                    whole(builder.sub(count, I64(lanes)))
                with short:
                    cut(i, rest)


def _store_first(e: Emitter, value: Value, place: Value, rest: Value) -> None:
    """The first ``rest`` lanes of a vector, fewer than all: without AVX-512 in pieces, a row of a small plane."""
    if e.lanes.bits == 512:
        e.masked_store(value, place, e.mask(rest))
    else:
        e.store_first(value, place, rest)


def _widen(e: Emitter, to: Value, source: Value, count: Value, stored: str) -> None:
    def cut(i: Value, rest: Value) -> None:
        _store_first(e, e.masked_load(e.at(source, i), e.mask(rest), stored), e.at(to, i), rest)

    _each(e, count, lambda i: e.store(e.load(e.at(source, i), stored), e.at(to, i)), cut)


def _narrow(e: Emitter, to: Value, source: Value, count: Value, stored: str) -> None:
    def cut(i: Value, rest: Value) -> None:
        value, place, mask = e.masked_load(e.at(source, i), e.mask(rest)), e.at(to, i), e.mask(rest)
        if stored == e.lanes.dtype:
            _store_first(e, value, place, rest)
        else:
            e.masked_store(value, place, mask, stored)

    _each(e, count, lambda i: e.store(e.load(e.at(source, i)), e.at(to, i), stored), cut)


def _widen2(e: Emitter, to: Value, source: Value, count: Value, stored: str) -> None:
    """Every second element."""

    def place(i: Value) -> Value:
        return e.at(source, e.builder.mul(i, I64(2)))

    def cut(i: Value, rest: Value) -> None:
        _store_first(e, e.masked_load_even(place(i), e.builder.sub(count, i), stored), e.at(to, i), rest)

    _each(e, count, lambda i: e.store(e.load_even(place(i), stored), e.at(to, i)), cut)


def _fill(e: Emitter, to: Value, value_at: Value, count: Value) -> None:
    number = e.builder.load(value_at)
    value = e.splat(number)

    def one(i: Value) -> None:
        e.builder.store(number, e.at(to, i))

    def cut(i: Value, rest: Value) -> None:
        if e.lanes.bits == 512:
            e.masked_store(value, e.at(to, i), e.mask(rest))
        else:  # a border of one or two, mostly
            e.loop(i, count, 1, one)

    _each(e, count, lambda i: e.store(value, e.at(to, i)), cut)
