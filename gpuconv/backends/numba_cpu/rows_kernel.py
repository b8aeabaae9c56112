"""The micro-kernel for one input channel: a tile of sums in registers, rows of outputs × vectors of columns.

    C[t, j] = (C[t, j] +) Σ_mq A[q, n-1-m+t] · B[line(t + m), col[q] + j]       0 ≤ t < rows, 0 ≤ m < n

Output rows that lie one below the other read mostly the same lines of the image, each with another row of the kernel.
So the loop goes over the lines: line l meets the outputs t with 0 ≤ l - t < n, fewer of them at the beginning and at
the end of the tile, and every load of the image serves all of these. No product is made that the sum does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, routine


@functools.lru_cache(maxsize=64)
def row_tile(lanes: Lanes, rows: int, vectors: int, kinds: tuple[int, ...]) -> Any:
    """The micro-kernel for n of ``kinds`` kernel rows, of which 0, the last, stands for any n ≥ ``rows``: a function of
    (A, B, col, C, n, KW, line, ldc, accumulate, finish, last, bias, floor).

    A has for each kernel column its n rows backwards. ``line`` are the elements from a line of B to the next, ``last``
    lanes of the last vector of a row exist in C. With ``finish`` the number at ``bias`` is added at the end, and the
    one at ``floor`` is the least result.
    """

    def emit(e: Emitter, a: Value, b: Value, col: Value, c: Value, n: Value, KW: Value, line: Value, ldc: Value,
             accumulate: Value, finish: Value, last: Value, bias: Value, floor: Value) -> None:  # fmt: skip
        builder = e.builder
        mask = e.mask(last)
        everyone = range(rows)

        def meet(
            at: Value, weights: Value, n: Value, sums: list[list[Value]], active: Sequence[int]
        ) -> list[list[Value]]:
            """A line of the image with the outputs ``active``, for all kernel columns."""
            before, loop, after = builder.block, e.block("columns"), e.block("after")
            builder.branch(loop)
            builder.position_at_end(loop)
            q = builder.phi(I64)
            q.add_incoming(I64(0), before)
            held = e.sums(len(active), vectors, [(before, [sums[t] for t in active])])
            place = builder.load(e.at(col, q))
            pixels = [e.load(e.at(at, place, j * e.lanes.count)) for j in range(vectors)]
            weight_row = e.at(weights, builder.mul(q, n))
            new = []
            for i, t in enumerate(active):
                weight = e.splat(builder.load(e.at(weight_row, t)))
                new.append([e.fma(weight, pixels[j], held[i][j]) for j in range(vectors)])
            following = builder.add(q, I64(1))
            q.add_incoming(following, loop)
            for i in range(len(active)):
                for j in range(vectors):
                    held[i][j].add_incoming(new[i][j], loop)
            builder.cbranch(builder.icmp_signed("<", following, KW), loop, after)
            builder.position_at_end(after)
            merged = list(sums)
            for i, t in enumerate(active):
                merged[t] = new[i]
            return merged

        def products(taps: int, n: Value) -> list[list[Value]]:
            """All products of the tile."""

            def met(l: Value | int, sums: list[list[Value]], active: Sequence[int]) -> list[list[Value]]:
                l = e.i64(l)
                weights = e.at(a, builder.sub(n, builder.add(l, I64(1))))
                return meet(e.at(b, builder.mul(l, line)), weights, n, sums, active)

            sums = [[e.zero] * vectors for _ in everyone]
            if taps:
                for l in range(rows + taps - 1):
                    sums = met(l, sums, [t for t in everyone if 0 <= l - t < taps])
                return sums
            for l in range(rows - 1):
                sums = met(l, sums, range(l + 1))
            before, steady, done = builder.block, e.block("steady"), e.block("done")
            builder.branch(steady)
            builder.position_at_end(steady)
            l = builder.phi(I64)
            l.add_incoming(I64(rows - 1), before)
            held = e.sums(rows, vectors, [(before, sums)])
            sums = met(l, held, everyone)
            following = builder.add(l, I64(1))
            l.add_incoming(following, builder.block)
            for t in everyone:
                for j in range(vectors):
                    held[t][j].add_incoming(sums[t][j], builder.block)
            builder.cbranch(builder.icmp_signed("<", following, n), steady, done)
            builder.position_at_end(done)
            for t in range(1, rows):
                sums = met(builder.add(n, I64(t - 1)), sums, range(t, rows))
            return sums

        made, join = [], e.block("join")
        for taps in kinds:
            other = e.block("other")
            if taps != kinds[-1]:
                here = e.block("here")
                builder.cbranch(builder.icmp_signed("==", n, I64(taps)), here, other)
                builder.position_at_end(here)
            values = products(taps, I64(taps) if taps else n)
            made.append((builder.block, values))
            builder.branch(join)
            builder.position_at_end(other)
        builder.unreachable()
        builder.position_at_end(join)
        sums = e.sums(rows, vectors, made)

        def place(t: int, j: int) -> Value:
            return e.at(c, e.times(ldc, t), j * e.lanes.count)

        def either(condition: Value, values: list[list[Value]], other: Any) -> list[list[Value]]:
            """``other(values)`` where the integer ``condition`` is not 0."""
            before, apart, after = builder.block, e.block(), e.block()
            builder.cbranch(builder.icmp_signed("!=", condition, I64(0)), apart, after)
            builder.position_at_end(apart)
            changed = other(values)
            builder.branch(after)
            builder.position_at_end(after)
            return e.sums(rows, vectors, [(before, values), (apart, changed)])

        def with_earlier(values: list[list[Value]]) -> list[list[Value]]:
            return [
                [
                    builder.fadd(
                        e.load(place(t, j)) if j < vectors - 1 else e.masked_load(place(t, j), mask), values[t][j]
                    )
                    for j in range(vectors)
                ]
                for t in everyone
            ]  # fmt: skip

        def finished(values: list[list[Value]]) -> list[list[Value]]:
            offset, least = e.splat(builder.load(bias)), e.splat(builder.load(floor))

            def at_least(value: Value) -> Value:
                return builder.select(builder.fcmp_ordered("<", value, least), least, value)

            return [[at_least(builder.fadd(value, offset)) for value in row] for row in values]

        sums = either(accumulate, sums, with_earlier)
        sums = either(finish, sums, finished)
        for t in everyone:
            for j in range(vectors):
                if j < vectors - 1:
                    e.store(sums[t][j], place(t, j))
                elif e.lanes.bits == 512:
                    e.masked_store(sums[t][j], place(t, j), mask)
                else:
                    e.store_first(sums[t][j], place(t, j), last)

    name = f"row_tile_{lanes}_{rows}x{vectors}_{'_'.join(map(str, kinds))}"
    return routine(name, lanes, "eeteiiiiiiiee", emit)
