"""The transforms of Winograd's F(4×4, 3×3), each for as many tiles at once as a register has lanes.

    y = Aᵀ [ (G k Gᵀ) ⊙ (Bᵀ x B) ] A           x: 6 × 6 of the image, k: 3 × 3, y: 4 × 4

In 36 products it makes the 16 outputs that take 144 directly. Neighbouring tiles lie four pixels apart, so the image is
first *split*, by row modulo four and by the column of a tile: then what neighbouring tiles read at one place of theirs
lies side by side, and a transform is nothing but sums of vectors.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir

from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, routine

TILE, WINDOW = 4, 6  # the sides of what a tile makes and of what it reads
POINTS = WINDOW * WINDOW


@functools.lru_cache(maxsize=64)
def split(lanes: Lanes) -> Any:
    """A function of (to, source, plane, count): to[r·plane + u] = source[4·u + r] for u < count and r < 6.

    Whole vectors are read and written, up to a register's width beyond ``count`` in each of the six.
    """
    n = lanes.count
    even, odd = [2 * lane for lane in range(n)], [2 * lane + 1 for lane in range(n)]

    def emit(e: Emitter, to: Value, source: Value, plane: Value, count: Value) -> None:
        def body(u: Value) -> None:
            for first, numbers in ((0, (0, 2, 1, 3)), (TILE, (0, 1))):
                a, b, c, d = (e.load(e.at(source, e.times(u, TILE), first + i * n)) for i in range(TILE))
                for r in numbers:
                    parity, more = (even, odd)[r % 2], (even, odd)[r // 2]
                    value = e.shuffle(e.shuffle(a, b, parity), e.shuffle(c, d, parity), more)
                    e.store(value, e.at(to, e.times(plane, first + r), u))

        e.loop(0, e.builder.add(count, I64(n - 1)), n, body)

    return routine(f"winograd_split_{lanes}", lanes, "eeii", emit)


@functools.lru_cache(maxsize=64)
def image(lanes: Lanes) -> Any:
    """Bᵀ x B: a function of (to, planes, plane, pitch, step, count) for ``count`` tiles, a multiple of the lanes.

    Tile t reads x[i, j] at place t + ⌊i/4⌋·pitch of plane 6·(i mod 4) + j. Point p of it goes to to[p·step + t].
    """

    def emit(e: Emitter, to: Value, planes: Value, plane: Value, pitch: Value, step: Value, count: Value) -> None:
        def body(t: Value) -> None:
            columns = []
            for j in range(WINDOW):
                places = (
                    e.at(planes, e.times(plane, WINDOW * (i % TILE) + j), e.times(pitch, i // TILE), t)
                    for i in range(WINDOW)
                )
                columns.append(_image(e, [e.load(place) for place in places]))
            for i in range(WINDOW):
                for j, value in enumerate(_image(e, [column[i] for column in columns])):
                    e.store(value, e.at(to, e.times(step, i * WINDOW + j), t))

        e.loop(0, count, e.lanes.count, body)

    return routine(f"winograd_image_{lanes}", lanes, "eeiiii", emit)


def _image(e: Emitter, x: list[Value]) -> list[Value]:
    add, subtract = e.builder.fadd, e.builder.fsub
    a, b = e.fma(e.constant(-4), x[2], x[4]), e.fma(e.constant(-4), x[1], x[3])
    c, d = subtract(x[4], x[2]), subtract(x[3], x[1])
    return [
        e.fma(e.constant(4), x[0], e.fma(e.constant(-5), x[2], x[4])), add(a, b), subtract(a, b),
        e.fma(e.constant(2), d, c), e.fma(e.constant(-2), d, c),
        e.fma(e.constant(4), x[1], e.fma(e.constant(-5), x[3], x[5])),
    ]  # fmt: skip


@functools.lru_cache(maxsize=64)
def pixels(lanes: Lanes) -> Any:
    """Bᵀ x B of one tile, channels side by side: a function of (to, places, step, channels).

    ``places`` are the addresses of its 36 pixels. Point p of channel c goes to to[p·step + c]; whole registers are
    written.
    """

    def emit(e: Emitter, to: Value, places: Value, step: Value, channels: Value) -> None:
        builder = e.builder

        def body(c: Value, mask: Value | None) -> None:
            def pixel(p: int) -> Value:
                place = e.at(builder.inttoptr(builder.load(e.at(places, p)), to.type), c)
                return e.load(place) if mask is None else e.masked_load(place, mask)

            columns = [_image(e, [pixel(WINDOW * i + j) for i in range(WINDOW)]) for j in range(WINDOW)]
            for i in range(WINDOW):
                for j, value in enumerate(_image(e, [column[i] for column in columns])):
                    e.store(value, e.at(to, e.times(step, i * WINDOW + j), c))

        c = e.loop(0, channels, e.lanes.count, lambda c: body(c, None))
        with builder.if_then(builder.icmp_signed("<", c, channels)):
            body(c, e.mask(builder.sub(channels, c)))

    return routine(f"winograd_pixels_{lanes}", lanes, "etii", emit)


@functools.lru_cache(maxsize=64)
def result(lanes: Lanes) -> Any:
    """Aᵀ m A: a function of (to, source, step, line, count, bias, floor) for ``count`` tiles, a multiple of the lanes.

    Point p of tile t is at source[p·step + t]. Output (i, j) goes to to[i·line + 4·t + j], after the number at
    ``bias`` was added; what is less than the number at ``floor`` becomes that.
    """
    n = lanes.count
    low = [lane // 2 + n * (lane % 2) for lane in range(n)]
    high = [n // 2 + lane // 2 + n * (lane % 2) for lane in range(n)]

    def emit(
        e: Emitter, to: Value, source: Value, step: Value, line: Value, count: Value, bias: Value, floor: Value
    ) -> None:
        builder = e.builder
        more, least = e.splat(builder.load(bias)), e.splat(builder.load(floor))

        def finished(value: Value) -> Value:
            value = builder.fadd(value, more)
            return builder.select(builder.fcmp_ordered("<", value, least), least, value)

        def body(t: Value) -> None:
            columns = []
            for j in range(WINDOW):
                points = (e.at(source, e.times(step, i * WINDOW + j), t) for i in range(WINDOW))
                columns.append(_result(e, [e.load(point) for point in points]))
            for i in range(TILE):
                a, b, c, d = (finished(value) for value in _result(e, [column[i] for column in columns]))
                part = 0
                for half in (low, high):
                    left, right = e.shuffle(a, c, half), e.shuffle(b, d, half)
                    for quarter in (low, high):
                        place = e.at(to, e.times(line, i), e.times(t, TILE), part * n)
                        e.store(e.shuffle(left, right, quarter), place)
                        part += 1

        e.loop(0, count, n, body)

    return routine(f"winograd_result_{lanes}", lanes, "eeiiiee", emit)


@functools.lru_cache(maxsize=64)
def outputs(lanes: Lanes) -> Any:
    """Aᵀ m A of one tile, channels side by side: a function of (to, source, step, down, across, count, bias, floor).

    Point p of channel o is at source[p·step + o], where whole registers are read. Output (i, j) goes to
    to[i·down + j·across + o], after bias[o] was added; what is less than the number at ``floor`` becomes that.
    """

    def emit(
        e: Emitter, to: Value, source: Value, step: Value, down: Value, across: Value, count: Value, bias: Value,
        floor: Value,
    ) -> None:  # fmt: skip
        builder = e.builder
        least = e.splat(builder.load(floor))

        def body(o: Value, mask: Value | None) -> None:
            more = e.load(e.at(bias, o))
            columns = []
            for j in range(WINDOW):
                points = (e.at(source, e.times(step, i * WINDOW + j), o) for i in range(WINDOW))
                columns.append(_result(e, [e.load(point) for point in points]))
            for i in range(TILE):
                for j, value in enumerate(_result(e, [column[i] for column in columns])):
                    value = builder.fadd(value, more)
                    value = builder.select(builder.fcmp_ordered("<", value, least), least, value)
                    place = e.at(to, e.times(down, i), e.times(across, j), o)
                    if mask is None:
                        e.store(value, place)
                    else:
                        e.masked_store(value, place, mask)

        o = e.loop(0, count, e.lanes.count, lambda o: body(o, None))
        with builder.if_then(builder.icmp_signed("<", o, count)):
            body(o, e.mask(builder.sub(count, o)))

    return routine(f"winograd_outputs_{lanes}", lanes, "eeiiiiee", emit)


def _result(e: Emitter, m: list[Value]) -> list[Value]:
    add, subtract = e.builder.fadd, e.builder.fsub
    a, b, c, d = add(m[1], m[2]), subtract(m[1], m[2]), add(m[3], m[4]), subtract(m[3], m[4])
    return [
        add(add(m[0], a), c), e.fma(e.constant(2), d, b), e.fma(e.constant(4), c, a),
        add(e.fma(e.constant(8), d, b), m[5]),
    ]  # fmt: skip


@functools.lru_cache(maxsize=64)
def kernel(lanes: Lanes, rows: int) -> Any:
    """G k Gᵀ: a function of (to, source, step, channels) for a panel of ``rows`` output channels.

    Weight (p, q) of channel c is at source[(9·c + 3·p + q)·rows + i]; its point p goes to to[p·step + c·rows + i].
    Memory behind the last channel is read, as far as a register reaches.
    """
    together = max(1, lanes.count // rows)  # channels in a register
    lanes = Lanes(lanes.dtype, rows * together)

    def emit(e: Emitter, to: Value, source: Value, step: Value, channels: Value) -> None:
        builder = e.builder
        part = ir.VectorType(e.element, rows)

        def weight(c: Value, tap: int) -> Value:
            parts = []
            for i in range(together):
                place = e.at(source, e.times(c, 9 * rows), (9 * i + tap) * rows)
                value = builder.load(builder.bitcast(place, part.as_pointer()))
                value.align = e.lanes.size
                parts.append(value)
            while len(parts) > 1:
                wide = list(range(2 * parts[0].type.count))
                parts = [e.shuffle(a, b, wide) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            return parts[0]

        def body(c: Value, masked: bool) -> None:
            taps = [[weight(c, 3 * p + q) for q in range(3)] for p in range(3)]
            columns = [_kernel(e, [taps[p][q] for p in range(3)]) for q in range(3)]
            mask = e.mask(builder.mul(builder.sub(channels, c), I64(rows))) if masked else None
            for i in range(WINDOW):
                for j, value in enumerate(_kernel(e, [column[i] for column in columns])):
                    place = e.at(to, e.times(step, i * WINDOW + j), e.times(c, rows))
                    if mask is None:
                        e.store(value, place)
                    else:
                        e.masked_store(value, place, mask)

        c = e.loop(0, channels, together, lambda c: body(c, False))
        if together > 1:
            with builder.if_then(builder.icmp_signed("<", c, channels)):
                body(c, True)

    return routine(f"winograd_kernel_{lanes}_{rows}", lanes, "eeii", emit)


def _kernel(e: Emitter, k: list[Value]) -> list[Value]:
    builder = e.builder
    a, b, c = k
    ends, wide = builder.fadd(a, c), e.fma(e.constant(4), c, a)
    sixth, middle = builder.fmul(e.constant(-1 / 6), ends), builder.fmul(e.constant(-1 / 6), b)
    small, twelfth = builder.fmul(e.constant(1 / 24), wide), builder.fmul(e.constant(1 / 12), b)
    return [
        builder.fmul(e.constant(0.25), a), builder.fadd(sixth, middle), builder.fsub(sixth, middle),
        builder.fadd(small, twelfth), builder.fsub(small, twelfth), c,
    ]  # fmt: skip
