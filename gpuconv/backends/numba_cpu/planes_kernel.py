"""The micro-kernel of ``planes``: a tile of sums in registers, rows of outputs × vectors of columns, read in place.

    y[t, j] = Σ_pq x[s·t + p, r·j + q·d] · k[p, q]       0 ≤ t < rows, 0 ≤ j < vectors·lanes, 0 ≤ p < taps

One column q of the kernel after the other: its weights stand in registers, and the lines of the image go by. Each line
is loaded once per column and multiplied for all outputs that it meets, so that there are more multiplications than
loads can delay. Lines outside the image are left out; columns outside it are zero by a mask, and not touched.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

from llvmlite import ir

from gpuconv.backends.numba_cpu.vectors import I32, I64, Emitter, Lanes, Value, routine

# Where a tile may lie: anywhere; with all that it reads and writes inside; the same, with results that go past the
# caches to whole lines of memory.
ANYWHERE, INSIDE, STREAMED = range(3)


@functools.lru_cache(maxsize=64)
def band(
    lanes: Lanes, rows: int, vectors: int, taps: int, stride: tuple[int, int], kind: int, interleaved: bool = False
) -> Any:
    """The micro-kernel for ``taps`` kernel rows and strides of 1 or 2: a function of (count, k, k_next, x, x_next,
    y, y_next, bias, bias_next, KW, row, column, line, step, ldy, first, end, at, W, high, last, finish, floor).

    So many tiles are made one after the other: the same of several planes, or inside a plane, where all are alike, some
    side by side. All steps are in elements: from tile to tile, ``row`` and ``column`` of k, ``line`` of x, ``step``
    from tap to tap across, ``ldy`` of y. ``x`` is where the first output's first tap is, in the image or not: lines
    [first, end) from there exist, and it is column ``at`` of the image's W. The first ``high`` rows and ``last``
    columns of the tile are written. With ``finish`` the number at ``bias`` is added, and the one at ``floor`` is the
    least result. ``interleaved``: neighbouring columns have other weights and another bias, so that there is a vector
    of them where otherwise is a number, and a tile is one vector wide.
    """
    down, across = stride

    def given(e: Emitter, place: Value) -> Value:
        """The weights, or the bias, of a vector of columns."""
        return e.load(place) if interleaved else e.splat(e.builder.load(place))

    def emit(e: Emitter, count: Value, k: Value, k_next: Value, x: Value, x_next: Value, y: Value, y_next: Value,
             bias: Value, bias_next: Value, *others: Value) -> None:  # fmt: skip
        def one(i: Value) -> None:
            steps = (k, k_next), (x, x_next), (y, y_next), (bias, bias_next)
            tile(e, *(e.at(begin, e.times(i, step)) for begin, step in steps), *others)

        e.loop(0, count, 1, one)

    def tile(e: Emitter, k: Value, x: Value, y: Value, bias: Value, KW: Value, row: Value, column: Value,
             line: Value, step: Value, ldy: Value, first: Value, end: Value, at: Value, W: Value, high: Value,
             last: Value, finish: Value, floor: Value) -> None:  # fmt: skip
        builder, n = e.builder, e.lanes.count
        entry, loop, after = builder.block, e.block("columns"), e.block("after")
        met = [[(t, l - t * down) for t in range(rows) if 0 <= l - t * down < taps]
               for l in range((rows - 1) * down + taps)]  # fmt: skip
        # A bit for each line that exists: one test and no registers for a small plane, where a tile is soon done.
        exist = builder.and_(builder.shl(I64(-1), first), builder.not_(builder.shl(I64(-1), end)))
        builder.branch(loop)

        builder.position_at_end(loop)
        q = builder.phi(I64)
        q.add_incoming(I64(0), entry)
        begun = e.sums(rows, vectors, [(entry, None)])
        weights = [given(e, e.at(k, builder.mul(q, column), e.times(row, p))) for p in range(taps)]
        moved = builder.mul(q, step)
        masks = None
        if kind == ANYWHERE:
            here = builder.add(at, moved)
            masks = [inside(e, builder.add(here, I64(i * n)), W) for i in range(vectors * across)]

        def pixels(l: int) -> list[Value]:
            place = e.at(x, moved, e.times(line, l))
            read = [
                e.load(e.at(place, i * n)) if masks is None else e.masked_load(e.at(place, i * n), mask_of(e, masks[i]))
                for i in range(vectors * across)
            ]
            if across == 1:
                return read
            return [e.shuffle(a, b, range(0, 2 * n, 2)) for a, b in zip(read[::2], read[1::2], strict=True)]

        def multiplied(sums: list[list[Value]], l: int) -> list[list[Value]]:
            """The sums with what line ``l`` gives to the outputs that it meets."""
            sums, values = list(sums), pixels(l)
            for t, p in met[l]:
                sums[t] = [e.fma(weights[p], value, total) for value, total in zip(values, sums[t], strict=True)]
            return sums

        sums = begun
        for l in range(len(met)):
            if not met[l]:
                continue
            if kind != ANYWHERE:
                sums = multiplied(sums, l)
                continue
            before, there, following = builder.block, e.block("there"), e.block("following")
            builder.cbranch(builder.icmp_signed("!=", builder.and_(exist, I64(1 << l)), I64(0)), there, following)
            builder.position_at_end(there)
            new = multiplied(sums, l)
            builder.branch(following)
            builder.position_at_end(following)
            sums = list(sums)
            for t, _ in met[l]:
                (sums[t],) = e.sums(1, vectors, [(before, [sums[t]]), (there, [new[t]])])
        following_q = builder.add(q, I64(1))
        q.add_incoming(following_q, builder.block)
        for t in range(rows):
            for v in range(vectors):
                begun[t][v].add_incoming(sums[t][v], builder.block)
        builder.cbranch(builder.icmp_signed("<", following_q, KW), loop, after)

        builder.position_at_end(after)
        apart, write = e.block("apart"), e.block("write")
        builder.cbranch(builder.icmp_signed("!=", finish, I64(0)), apart, write)
        builder.position_at_end(apart)
        offset, least = given(e, bias), e.splat(builder.load(floor))
        finished = [[builder.fadd(total, offset) for total in totals] for totals in sums]
        finished = [
            [builder.select(builder.fcmp_ordered("<", total, least), least, total) for total in totals]
            for totals in finished
        ]
        builder.branch(write)

        builder.position_at_end(write)
        results = e.sums(rows, vectors, [(after, sums), (apart, finished)])
        if kind == ANYWHERE and e.lanes.bits < 512:
            # Masked stores are slow: none where all columns are there, and pieces of vectors where they are not.
            whole = builder.icmp_signed(">=", last, I64(vectors * n))
            with builder.if_else(whole) as (all_columns, some_columns):
                for branch, partly in ((all_columns, False), (some_columns, True)):
                    with branch:
                        for t in range(rows):
                            with builder.if_then(builder.icmp_signed(">", high, I64(t))):
                                for v, result in enumerate(results[t]):
                                    place = e.at(y, e.times(ldy, t), v * n)
                                    if partly:
                                        e.store_first(result, place, builder.sub(last, I64(v * n)))
                                    else:
                                        e.store(result, place)
            return
        there_are = [e.mask(builder.sub(last, I64(v * n))) for v in range(vectors)]
        for t in range(rows):
            with builder.if_then(builder.icmp_signed(">", high, I64(t))) if kind == ANYWHERE else nullcontext():
                for v, result in enumerate(results[t]):
                    place = e.at(y, e.times(ldy, t), v * n)
                    if kind == ANYWHERE:
                        e.masked_store(result, place, there_are[v])
                    elif kind == INSIDE:
                        e.store(result, place)
                    else:
                        e.stream(result, place)

    name = f"band_{lanes}_{rows}x{vectors}_{taps}_{down}{across}_{kind}{'_interleaved' if interleaved else ''}"
    return routine(name, lanes, "ieieieiei" + 13 * "i" + "e", emit)


def inside(e: Emitter, column: Value, W: Value) -> Value:
    """Those lanes of a vector from ``column`` on, which may be negative, that are among the ``W`` columns: what
    ``mask_of`` makes a mask of.
    """
    builder, n = e.builder, e.lanes.count

    def lane(number: Value) -> Value:
        number = builder.select(builder.icmp_signed("<", number, I64(0)), I64(0), number)
        return builder.select(builder.icmp_signed(">", number, I64(n)), I64(n), number)

    first, end = lane(builder.neg(column)), lane(builder.sub(W, column))
    if e.lanes.bits == 512:
        kind = ir.VectorType(I32, n)
        first, end = builder.trunc(first, I32), builder.trunc(end, I32)
        from_first = builder.sub(ir.Constant(kind, list(range(n))), e.splat_of(kind, first))
        return builder.icmp_unsigned("<", from_first, e.splat_of(kind, builder.sub(end, first)))
    # Masks are vectors here, of which the signs count: cut from a constant, which takes less than to compare.
    kind = ir.VectorType(ir.IntType(8 * e.lanes.size), n)
    name, values = f"some_lanes_{e.lanes}", [0] * n + [-1] * n + [0] * n
    if name not in e.function.module.globals:
        table = ir.GlobalVariable(e.function.module, ir.ArrayType(kind.element, 3 * n), name)
        table.initializer = ir.Constant(table.value_type, values)
        table.global_constant, table.linkage = True, "internal"
    table = builder.bitcast(e.function.module.globals[name], kind.element.as_pointer())

    def cut(start: Value) -> Value:
        value = builder.load(builder.bitcast(builder.gep(table, [start]), kind.as_pointer()))
        value.align = e.lanes.size
        return value

    return builder.and_(cut(builder.sub(I64(n), first)), cut(builder.sub(I64(2 * n), end)))


def mask_of(e: Emitter, inside: Value) -> Value:
    """A mask for the block it is used in: LLVM carries those of a bit per lane from block to block at a cost."""
    if e.lanes.bits == 512:
        return inside
    return e.builder.icmp_signed("<", inside, ir.Constant(inside.type, [0] * e.lanes.count))
