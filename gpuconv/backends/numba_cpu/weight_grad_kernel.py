"""The micro-kernel of weight gradients, and the two transposes around it.

    y[i·ld + o] = (y[i·ld + o] +) Σ_k x[place[i] + at[k]] · A[from[k] + o]          0 ≤ i < MP, 0 ≤ o < NV·lanes

The summed index k runs over output pixels. A is the gradient of y, packed with the output channels side by side; x is
read where it lies: a list of pairs says where pixel k is in x and in A, and ``place`` where row i, a channel, begins.
These tables make one kernel of any stride, dilation, padding and memory layout.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir

from gpuconv.backends.numba_cpu.copies import LETTERS
from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, routine


@functools.lru_cache(maxsize=64)
def tile(lanes: Lanes, rows: int, vectors: int) -> Any:
    """The micro-kernel: a function of (A, x, list, place, y, K, ld, accumulate).

    Each call sums its K products, of which there is at least one, from zero and only then adds what was in y.
    """

    def emit(e: Emitter, a: Value, x: Value, pairs: Value, place: Value, y: Value, K: Value, ld: Value,
             accumulate: Value) -> None:  # fmt: skip
        builder = e.builder
        entry, loop, after, add, write = builder.block, *(e.block(name) for name in ("loop", "after", "add", "write"))
        addresses = [e.at(x, builder.load(e.at(place, i))) for i in range(rows)]
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(I64)
        k.add_incoming(I64(0), entry)
        sums = e.sums(rows, vectors, [(entry, None)])
        pair = e.at(pairs, builder.shl(k, I64(1)))
        offset, here = builder.load(pair), e.at(a, builder.load(e.at(pair, 1)))
        gradients = [e.load(e.at(here, j * lanes.count)) for j in range(vectors)]
        new = []
        for i in range(rows):
            pixel = e.splat(builder.load(e.at(addresses[i], offset)))
            new.append([e.fma(pixel, gradients[j], sums[i][j]) for j in range(vectors)])
        following = builder.add(k, I64(1))
        k.add_incoming(following, loop)
        for i in range(rows):
            for j in range(vectors):
                sums[i][j].add_incoming(new[i][j], loop)
        builder.cbranch(builder.icmp_signed("<", following, K), loop, after)

        builder.position_at_end(after)
        places = [[e.at(y, e.times(ld, i), j * lanes.count) for j in range(vectors)] for i in range(rows)]
        builder.cbranch(builder.icmp_signed("!=", accumulate, I64(0)), add, write)
        builder.position_at_end(add)
        more = [[builder.fadd(e.load(places[i][j]), new[i][j]) for j in range(vectors)] for i in range(rows)]
        builder.branch(write)
        builder.position_at_end(write)
        totals = e.sums(rows, vectors, [(after, new), (add, more)])
        for i in range(rows):
            for j in range(vectors):
                e.store(totals[i][j], places[i][j])

    return routine(f"weight_grad_{lanes}_{rows}x{vectors}", lanes, "eetteiii", emit)


@functools.lru_cache(maxsize=64)
def inward(lanes: Lanes) -> Any:
    """A function of (to, source, ld, count, present, width): to[k·width + o] = source[o·ld + k] for k < count and as
    many o as there are lanes, zero from o = present on.
    """

    def emit(e: Emitter, to: Value, source: Value, ld: Value, count: Value, present: Value, width: Value) -> None:
        builder, n = e.builder, lanes.count

        def columns(k: Value, left: Value | None) -> list[Value]:
            """The pixels from ``k`` on, of ``left`` of which nothing more is read; all exist where it is None."""
            found = []
            for o in range(n):
                place = e.at(source, e.times(ld, o), k)
                if left is None:
                    found.append(e.load(place))
                else:
                    there = builder.select(builder.icmp_signed("<", I64(o), present), left, I64(0))
                    found.append(e.masked_load(place, e.mask(there)))
            return e.transposed(found)

        def whole(k: Value, left: Value | None) -> None:
            for u, vector in enumerate(columns(k, left)):
                e.store(vector, e.at(to, builder.mul(builder.add(k, I64(u)), width)))

        full = builder.select(builder.icmp_signed(">=", present, I64(n)), count, I64(0))
        k = e.loop(0, full, n, lambda k: whole(k, None))
        k = e.loop(k, count, n, lambda k: whole(k, I64(n)))
        left = builder.sub(count, k)
        with builder.if_then(builder.icmp_signed(">", left, I64(0))):
            for u, vector in enumerate(columns(k, left)):
                with builder.if_then(builder.icmp_signed("<", I64(u), left)):
                    e.store(vector, e.at(to, builder.mul(builder.add(k, I64(u)), width)))

    return routine(f"weight_grad_inward_{lanes}", lanes, "eeiiii", emit)


@functools.lru_cache(maxsize=64)
def outward(lanes: Lanes, stored: str) -> Any:
    """A function of (to, source, ld, count, present, width): to[o·ld + i] = source[i·width + o], rounded to
    ``stored``, for i < count and o < present, which is at most the number of lanes.
    """

    def emit(e: Emitter, to: Value, source: Value, ld: Value, count: Value, present: Value, width: Value) -> None:
        builder, n = e.builder, lanes.count

        def put(i: Value, rows: list[Value], left: Value | None) -> None:
            for o, vector in enumerate(e.transposed(rows)):
                place = e.at(to, e.times(ld, o), i)
                with builder.if_then(builder.icmp_signed("<", I64(o), present)):
                    if left is None:
                        e.store(vector, place, stored)
                    else:
                        e.masked_store(vector, place, e.mask(left), stored)

        def row(i: Value, u: int) -> Value:
            return e.load(e.at(source, builder.mul(builder.add(i, I64(u)), width)))

        i = e.loop(0, count, n, lambda i: put(i, [row(i, u) for u in range(n)], None))
        left = builder.sub(count, i)
        with builder.if_then(builder.icmp_signed(">", left, I64(0))):
            # Rows beyond the last are not read: the last stands for them.
            last = builder.sub(count, I64(1))
            rows = []
            for u in range(n):
                at = builder.add(i, I64(u))
                at = builder.select(builder.icmp_signed("<", at, count), at, last)
                rows.append(e.load(e.at(source, builder.mul(at, width))))
            put(i, rows, left)

    return routine(f"weight_grad_outward_{lanes}_{stored}", lanes, f"{LETTERS[stored]}eiiii", emit)


@functools.lru_cache(maxsize=64)
def totals(lanes: Lanes) -> tuple[Any, Any]:
    """Two functions between sums and totals in float64: add(total, sums, count, more), which begins a total where
    ``more`` is 0, and rounded(sums, total, count). Counts are multiples of the lanes.
    """
    wide = ir.VectorType(ir.DoubleType(), lanes.count)

    def loaded(e: Emitter, place: Value) -> Value:
        value = e.builder.load(e.builder.bitcast(place, wide.as_pointer()))
        value.align = 8
        return value

    def store(e: Emitter, value: Value, place: Value) -> None:
        e.builder.store(value, e.builder.bitcast(place, wide.as_pointer())).align = 8

    def add(e: Emitter, total: Value, sums: Value, count: Value, more: Value) -> None:
        def widened(i: Value) -> Value:
            value = e.load(e.at(sums, i))
            return value if lanes.dtype == "float64" else e.builder.fpext(value, wide)

        def go_on(i: Value) -> None:
            place = e.at(total, i)
            store(e, e.builder.fadd(loaded(e, place), widened(i)), place)

        with e.builder.if_else(e.builder.icmp_signed("!=", more, I64(0))) as (going_on, beginning):
            with going_on:
                e.loop(0, count, lanes.count, go_on)
            with beginning:
                e.loop(0, count, lanes.count, lambda i: store(e, widened(i), e.at(total, i)))

    def rounded(e: Emitter, sums: Value, total: Value, count: Value) -> None:
        def body(i: Value) -> None:
            value = loaded(e, e.at(total, i))
            e.store(value if lanes.dtype == "float64" else e.builder.fptrunc(value, e.vector), e.at(sums, i))

        e.loop(0, count, lanes.count, body)

    return (
        routine(f"weight_grad_add_{lanes}", lanes, "deii", add),
        routine(f"weight_grad_rounded_{lanes}", lanes, "edi", rounded),
    )
