"""Blocks of memory turned over: channels side by side from planes of pixels, and back.

Channels-first images have their pixels in lanes; the micro-kernel of ``pixels`` wants their channels there. Both ways
go through square blocks in registers, as many rows as a register has lanes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.vectors import I64, SIZE, Emitter, Lanes, Value, routine

_RUN = 64  # elements of a row of the buffer

# Bytes of the buffer that ``Turns`` are given: _RUN registers.
BUFFER = 64 * _RUN


class Turns(NamedTuple):
    """The two ways; addresses and steps in bytes, counts and ``ld`` in elements."""

    gather: Any  # gather(to, ld, source, channels, pixels, step_c, step_q, buffer): to[q·ld + c] = source[c, q]
    scatter: Any  # scatter(to, ld, source, channels, pixels, step_c, step_q, buffer): to[c, q] = source[q·ld + c]


@functools.lru_cache(maxsize=64)
def turned(lanes: Lanes, step: int = 1, squares: int = 1) -> Any:
    """A function of (to, source, ld_to, ld, present, count): to[k·ld_to + i] = source[i·ld + k·step] for i < present ≤
    lanes and k < count; ``step`` is 1 or 2. With several ``squares`` all their i are present.
    """
    emit = functools.partial(_turned, step=step, squares=squares)
    return routine(f"turn{step}_{squares}_{lanes}", lanes, "eeiiii", emit)


def _turned(e: Emitter, to: Value, source: Value, ld_to: Value, ld: Value, present: Value, count: Value,
            step: int, squares: int) -> None:  # fmt: skip
    builder, n = e.builder, e.lanes.count

    def place(i: int, k: Value) -> Value:
        return e.at(source, e.times(ld, i), builder.mul(k, e.i64(step)))

    def square(k: Value) -> None:
        for first in range(0, n * squares, n):
            chosen = range(first, first + n)
            lines = [e.load(place(i, k)) if step == 1 else e.load_even(place(i, k)) for i in chosen]
            beside = e.at(to, first) if first else to
            for u, column in enumerate(e.transposed(lines)):
                e.store(column, e.at(beside, builder.mul(builder.add(k, e.i64(u)), ld_to)))

    def part(k: Value) -> None:
        left, there = builder.sub(count, k), e.mask(present)
        lines = []
        for i in range(n):
            exists = builder.select(builder.icmp_signed("<", e.i64(i), present), left, e.i64(0))
            if step == 1:
                lines.append(e.masked_load(place(i, k), e.mask(exists)))
            else:
                lines.append(e.masked_load_even(place(i, k), exists))
        for u, column in enumerate(e.transposed(lines)):
            with builder.if_then(builder.icmp_signed("<", e.i64(u), left)):
                e.masked_store(column, e.at(to, builder.mul(builder.add(k, e.i64(u)), ld_to)), there)

    if squares > 1:
        whole = count
    else:
        whole = builder.select(builder.icmp_signed("==", present, e.i64(n)), count, e.i64(0))
    k = e.loop(0, whole, n, square)
    if overlapping(e.lanes):
        # The last square of as many as there are reaches back into the one before.
        rest = builder.and_(builder.icmp_signed(">", k, e.i64(0)), builder.icmp_signed("<", k, count))
        before = builder.block
        with builder.if_then(rest):
            square(builder.sub(count, e.i64(n)))
            within = builder.block
        done = builder.phi(I64)
        done.add_incoming(k, before)
        done.add_incoming(count, within)
        k = done
    if squares == 1:
        e.loop(k, builder.add(count, e.i64(n - 1)), n, part)


def overlapping(lanes: Lanes) -> bool:
    """Whether edges are made of whole squares that overlap: masked stores are slow without AVX-512."""
    return lanes.bits < 512


def _all_turned(lanes: Lanes, step: int) -> Any:
    """``turned`` for any number ``present``."""
    size, width, overlap = lanes.size, lanes.count, overlapping(lanes)
    turn = turned(lanes, step)
    # A cache line is 64 bytes: two squares side by side fill one where one square fills half of it.
    pair = turned(lanes, step, 2) if overlap else turn

    @compiled
    def turn_all(to, source, ld_to, ld, present, count):
        i = 0
        while i < present:
            if overlap and present - i >= 2 * width and count >= width:
                pair((to + size * i, source + size * i * ld, ld_to, ld, width, count))
                i += width
            else:
                if overlap and present >= width:
                    i = min(i, present - width)
                turn((to + size * i, source + size * i * ld, ld_to, ld, min(width, present - i), count))
            i += width

    return turn_all


@functools.lru_cache(maxsize=64)
def turns(lanes: Lanes, stored: str) -> Turns:
    """Between memory of ``stored`` with any steps and vectors of ``lanes``, which have channels side by side."""
    size, width, direct = lanes.size, lanes.count, stored == lanes.dtype
    turn, turn_all, turn_even = turned(lanes), _all_turned(lanes, 1), _all_turned(lanes, 2)
    read, write, _ = rows(lanes, stored)
    stored_size = SIZE[stored]

    @compiled
    def gather(to, ld, source, channels, pixels, step_c, step_q, buffer):
        if direct and step_q == stored_size and step_c % size == 0:
            turn_all(to, source, ld, step_c // size, channels, pixels)
            return
        if direct and step_q == 2 * stored_size and step_c % size == 0:
            turn_even(to, source, ld, step_c // size, channels, pixels)
            return
        for c in range(0, channels, width):
            present, plane = min(width, channels - c), source + c * step_c
            for q in range(0, pixels, _RUN):
                count = min(_RUN, pixels - q)
                for i in range(present):
                    read(buffer + size * _RUN * i, plane + i * step_c + q * step_q, count, step_q)
                turn((to + size * (q * ld + c), buffer, ld, _RUN, present, count))

    @compiled
    def scatter(to, ld, source, channels, pixels, step_c, step_q, buffer):
        if direct and step_q == stored_size and step_c % size == 0:
            turn_all(to, source, step_c // size, ld, pixels, channels)
            return
        for q in range(0, pixels, width):
            present, place = min(width, pixels - q), to + q * step_q
            for c in range(0, channels, _RUN):
                count = min(_RUN, channels - c)
                turn((buffer, source + size * (q * ld + c), width, ld, present, count))
                for i in range(count):
                    write(place + (c + i) * step_c, buffer + size * width * i, present, step_q)

    return Turns(gather, scatter)
