"""Blocks of memory turned over: channels side by side from planes of pixels, and back.

Channels-first images have their pixels in lanes; the micro-kernel of ``pixels`` wants their channels there. Both ways
go through square blocks in registers, as many rows as a register has lanes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from gpuconv.backends.numba_cpu.copies import compiled, rows
from gpuconv.backends.numba_cpu.vectors import SIZE, Emitter, Lanes, Value, routine

_RUN = 64  # elements of a row of the buffer

# Bytes of the buffer that ``Turns`` are given: _RUN registers.
BUFFER = 64 * _RUN


class Turns(NamedTuple):
    """The two ways; addresses and steps in bytes, counts and ``ld`` in elements."""

    gather: Any  # gather(to, ld, source, channels, pixels, step_c, step_q, buffer): to[q·ld + c] = source[c, q]
    scatter: Any  # scatter(to, ld, source, channels, pixels, step_c, step_q, buffer): to[c, q] = source[q·ld + c]


@functools.lru_cache(maxsize=64)
def turned(lanes: Lanes, step: int = 1) -> Any:
    """A function of (to, source, ld_to, ld, present, count): to[k·ld_to + i] = source[i·ld + k·step] for i < present ≤
    lanes and k < count; ``step`` is 1 or 2.
    """
    return routine(f"turn{step}_{lanes}", lanes, "eeiiii", functools.partial(_turned, step=step))


def _turned(e: Emitter, to: Value, source: Value, ld_to: Value, ld: Value, present: Value, count: Value,
            step: int) -> None:  # fmt: skip
    builder, n = e.builder, e.lanes.count

    def place(i: int, k: Value) -> Value:
        return e.at(source, e.times(ld, i), builder.mul(k, e.i64(step)))

    def square(k: Value) -> None:
        lines = [e.load(place(i, k)) if step == 1 else e.load_even(place(i, k)) for i in range(n)]
        for u, column in enumerate(e.transposed(lines)):
            e.store(column, e.at(to, builder.mul(builder.add(k, e.i64(u)), ld_to)))

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

    whole = builder.select(builder.icmp_signed("==", present, e.i64(n)), count, e.i64(0))
    k = e.loop(0, whole, n, square)
    e.loop(k, builder.add(count, e.i64(n - 1)), n, part)


@functools.lru_cache(maxsize=64)
def turns(lanes: Lanes, stored: str) -> Turns:
    """Between memory of ``stored`` with any steps and vectors of ``lanes``, which have channels side by side."""
    size, width, direct = lanes.size, lanes.count, stored == lanes.dtype
    turn, turn_even = turned(lanes), turned(lanes, 2)
    read, write, _ = rows(lanes, stored)
    stored_size = SIZE[stored]

    @compiled
    def gather(to, ld, source, channels, pixels, step_c, step_q, buffer):
        for c in range(0, channels, width):
            present, plane = min(width, channels - c), source + c * step_c
            if direct and step_q == stored_size and step_c % size == 0:
                turn((to + size * c, plane, ld, step_c // size, present, pixels))
                continue
            if direct and step_q == 2 * stored_size and step_c % size == 0:
                turn_even((to + size * c, plane, ld, step_c // size, present, pixels))
                continue
            for q in range(0, pixels, _RUN):
                count = min(_RUN, pixels - q)
                for i in range(present):
                    read(buffer + size * _RUN * i, plane + i * step_c + q * step_q, count, step_q)
                turn((to + size * (q * ld + c), buffer, ld, _RUN, present, count))

    @compiled
    def scatter(to, ld, source, channels, pixels, step_c, step_q, buffer):
        for q in range(0, pixels, width):
            present, place = min(width, pixels - q), to + q * step_q
            if direct and step_q == stored_size and step_c % size == 0:
                turn((place, source + size * q * ld, step_c // size, ld, present, channels))
                continue
            for c in range(0, channels, _RUN):
                count = min(_RUN, channels - c)
                turn((buffer, source + size * (q * ld + c), width, ld, present, count))
                for i in range(count):
                    write(place + (c + i) * step_c, buffer + size * width * i, present, step_q)

    return Turns(gather, scatter)
