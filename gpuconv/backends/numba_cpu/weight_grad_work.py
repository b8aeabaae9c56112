"""The compiled part of ``weight_grad``: chunks of pixels, their lists, and the loops around the micro-kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuconv.backends.numba_cpu import strip, weight_grad_kernel
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.pixels_kernel import PIXELS, put
from gpuconv.backends.numba_cpu.strip import (
    CHANNEL,
    COLUMN_EXTENT,
    FILL,
    HIGH,
    KC,
    KH,
    KW,
    OFFSETS,
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
from gpuconv.backends.numba_cpu.vectors import SIZE, Lanes, get
from gpuconv.problem import Conv2dProblem

# The table of arguments: that of the strips, with dy for y and dK for the weights, and then
(
    IN_PLACE, SHIFT, DOWN, ACROSS, TAP_DOWN, TAP_ACROSS,  # how x is read in place: bytes to its border, steps
    BY_TAPS, REACHED,  # whether a row is a channel, tap by tap; the output rows and columns that taps reach
    IMAGES, LOT, PARTS, ROWS, PANELS,  # a chunk's images; chunks of a lot; parts; a block
    WHAT,  # to be done: SUMS, or PARTIAL sums and then their ENDING
) = range(strip.END, strip.END + 14)  # fmt: skip
SUMS, PARTIAL, ENDING = range(3)


def _packer(lanes: Lanes, vectors: int, stored: str) -> Any:
    """A function that packs the output channels of panels side by side, for the pixels of a chunk."""
    size, count, width, given = lanes.size, lanes.count, vectors * lanes.count, SIZE[stored]
    same = stored == lanes.dtype
    read, _, fill = rows(lanes, stored)
    inward = weight_grad_kernel.inward(lanes)

    @compiled
    def pack(arguments, to, beside, source, images, high, wide, o0, panels):
        O_, syn, syo, syh, syw = (
            get(arguments, O), get(arguments, SYN), get(arguments, SYO), get(arguments, SYH), get(arguments, SYW),
        )  # fmt: skip
        pixels = images * high * wide
        flat = same and (syw == size or wide == 1) and (syh == wide * size or high == 1) and syo % size == 0
        if syo == given and O_ > 1:  # they lie side by side already
            for panel in range(panels):
                o = o0 + panel * width
                present = min(O_ - o, width)
                for n in range(images):
                    for i in range(high):
                        at = source + n * syn + i * syh + o * syo
                        for j in range(wide):
                            read(to, at + j * syw, present, syo)
                            if present < width:
                                fill(to + size * present, get(arguments, FILL), width - present)
                            to += size * width
            return
        for part in range(panels * vectors):
            o = o0 + part * count
            present = max(min(O_ - o, count), 0)
            place = to + size * (part // vectors * pixels * width + part % vectors * count)
            at = source + o * syo if present > 0 else source
            if flat:
                for n in range(images):
                    inward((place, at + n * syn, syo // size, high * wide, present, width))
                    place += size * high * wide * width
            else:
                line = beside
                for c in range(present):
                    for n in range(images):
                        for i in range(high):
                            read(line, at + c * syo + n * syn + i * syh, wide, syw)
                            line += size * wide
                inward((place, beside, pixels, pixels, present, width))

    return pack


def _writer(lanes: Lanes, vectors: int, stored: str) -> Any:
    """A function that writes rows [m0, m1) of some panels into the caller's kernel."""
    size, count, width, given = lanes.size, lanes.count, vectors * lanes.count, SIZE[stored]
    _, write, _ = rows(lanes, stored)
    outward = weight_grad_kernel.outward(lanes, stored)

    @compiled
    def written(arguments, g, m0, m1, o0, panels, y, panel_step):
        O_, C_, KH_, KW_ = get(arguments, O), get(arguments, C), get(arguments, KH), get(arguments, KW)
        sko, skc, skp, skq = get(arguments, SKO), get(arguments, SKC), get(arguments, SKP), get(arguments, SKQ)
        taps = KH_ * KW_
        whole = (
            (KW_ == 1 or skq == given) and (KH_ == 1 or skp == KW_ * given) and (C_ == 1 or skc == taps * given)
            and sko % given == 0
        )  # fmt: skip
        start = get(arguments, WEIGHTS) + g * get(arguments, SKG)
        for panel in range(panels):
            sums, o = y + panel * panel_step, o0 + panel * width
            if whole:
                for _ in range(vectors):
                    present = min(O_ - o, count)
                    if present > 0:
                        outward((start + o * sko + m0 * given, sums, sko // given, m1 - m0, present, width))
                    sums += size * count
                    o += count
            else:
                for m in range(m0, m1):
                    at = start + o * sko + m // taps * skc + m % taps // KW_ * skp + m % KW_ * skq
                    write(at, sums + size * (m - m0) * width, min(O_ - o, width), sko)

    return written


def kernel(problem: Conv2dProblem, lanes: Lanes, vectors: int) -> Callable[..., None]:
    """The kernel: blocks of the result, and where that is small parts of the sum, are shared out over the threads."""
    size, width, most = lanes.size, vectors * lanes.count, PIXELS[lanes.bits][vectors]
    half, lane_count = most // 2, lanes.count
    full, some = (weight_grad_kernel.tile(lanes, count, vectors) for count in (most, half))
    add, rounded = weight_grad_kernel.totals(lanes)
    add_totals, _ = weight_grad_kernel.totals(Lanes("float64", lanes.count))
    fill = strip.filler(lanes, problem.x_dtype)
    _, _, fill_row = rows(lanes, lanes.dtype)
    pack = _packer(lanes, vectors, problem.k_dtype)
    written = _writer(lanes, vectors, problem.y_dtype)

    @compiled
    def placed(arguments, place, m0, count, c0):
        """Where the rows of a block begin in x; the last also stands for those that fill its tile."""
        KW_, taps = get(arguments, KW), get(arguments, KH) * get(arguments, KW)
        if get(arguments, BY_TAPS):
            m0, step = m0 // taps, taps
        else:
            step = 1
        channel = get(arguments, CHANNEL)
        if get(arguments, IN_PLACE):
            channel = get(arguments, SXC) // size
        for row in range((count + most - 1) // most * most):
            m = m0 + min(row, count - 1)
            if step > 1:
                at = (m - c0) * channel
            else:
                tap = m % taps
                at = (m // taps - c0) * channel
                if get(arguments, IN_PLACE):
                    at += (tap // KW_ * get(arguments, TAP_DOWN) + tap % KW_ * get(arguments, TAP_ACROSS)) // size
                else:
                    at += get(get(arguments, OFFSETS), tap)
            put(place, row, at)

    @compiled
    def listed(arguments, lists, counts, room, images, i0, high, j0, wide):
        """The pixels of a chunk that each tap reaches, where they are in x and in the packed gradients."""
        image, down, across = get(arguments, KC) * get(arguments, CHANNEL), get(arguments, PITCH), 1
        if get(arguments, IN_PLACE):
            image = get(arguments, SXN) // size
            down, across = get(arguments, DOWN) // size, get(arguments, ACROSS) // size
        reached, KH_, KW_ = get(arguments, REACHED), 1, 1
        if get(arguments, BY_TAPS):
            KH_, KW_ = get(arguments, KH), get(arguments, KW)
        for tap in range(KH_ * KW_):
            rows_, columns = reached + 16 * (tap // KW_), reached + 16 * (KH_ + tap % KW_)
            first, last = max(get(rows_, 0) - i0, 0), min(get(rows_, 1) - i0, high)
            left, right = max(get(columns, 0) - j0, 0), min(get(columns, 1) - j0, wide)
            to, k = lists + 16 * room * tap, 0
            for n in range(images):
                for i in range(first, last):
                    for j in range(left, right):
                        put(to, k, n * image + i * down + j * across)
                        put(to, k + 1, ((n * high + i) * wide + j) * width)
                        k += 2
            put(counts, tap, k // 2)

    @compiled
    def inside(arguments, i0, i1, j0, j1):
        """Whether all taps reach all rows and columns of a chunk."""
        reached, KH_, KW_ = get(arguments, REACHED), 1, 1
        if get(arguments, BY_TAPS):
            KH_, KW_ = get(arguments, KH), get(arguments, KW)
        for p in range(KH_):
            if get(reached, 2 * p) > i0 or get(reached, 2 * p + 1) < i1:
                return 0
        for q in range(KH_, KH_ + KW_):
            if get(reached, 2 * q) > j0 or get(reached, 2 * q + 1) < j1:
                return 0
        return 1

    @compiled
    def multiply(arguments, a, x, lists, counts, room, place, y, pixels, count, panels, panel_step, accumulate):
        """All rows of a block with all panels, for the pixels of a chunk."""
        taps, KW_ = 1, 1
        if get(arguments, BY_TAPS):
            taps, KW_ = get(arguments, KH) * get(arguments, KW), get(arguments, KW)
        for row in range(0, count, most):
            for tap in range(taps):
                K, pairs, source = get(counts, tap), lists + 16 * room * tap, x
                if taps > 1 and get(arguments, IN_PLACE):
                    source += tap // KW_ * get(arguments, TAP_DOWN) + tap % KW_ * get(arguments, TAP_ACROSS)
                elif taps > 1:
                    source += size * get(get(arguments, OFFSETS), tap)
                for panel in range(panels):
                    gradients = a + size * panel * pixels * width
                    sums = y + panel * panel_step + size * width * (row * taps + tap)
                    if K == 0:
                        if not accumulate:
                            for i in range(most):
                                fill_row(sums + size * width * taps * i, get(arguments, FILL), width)
                    elif count - row > half:
                        full((gradients, source, pairs, place + 8 * row, sums, K, taps * width, accumulate))
                    else:
                        some((gradients, source, pairs, place + 8 * row, sums, K, taps * width, accumulate))

    @compiled
    def summed(arguments, g, m0, m1, o0, panels, first, last, scratch, y, step, total, single):
        """The sums of chunks [first, last) in ``total``, or in ``y`` where all are a ``single`` lot."""
        OH_, OW_ = get(arguments, OH), get(arguments, OW)
        images, high, wide = get(arguments, IMAGES), get(arguments, HIGH), get(arguments, WIDE)
        down, across = (OH_ + high - 1) // high, (OW_ + wide - 1) // wide
        taps = get(arguments, KH) * get(arguments, KW)
        lists, count = 1, m1 - m0
        if get(arguments, BY_TAPS):
            lists, count = taps, count // taps
        room = images * high * wide
        counts = scratch + 16 * lists * room
        place = counts + 8 * lists
        beside = (place + 8 * (count + most) + 63) // 64 * 64
        packed = (beside + size * room * lane_count + 63) // 64 * 64
        copy = (packed + size * room * panels * width + 63) // 64 * 64
        c0, c1 = m0 // taps, (m1 - 1) // taps + 1
        reach_down, reach_across = get(arguments, PLACES) - high, get(arguments, COLUMN_EXTENT) - OW_
        image = size * get(arguments, KC) * get(arguments, CHANNEL)
        placed(arguments, place, m0, count, c0)
        known = 0, 0, 0, 0, 0
        for chunk in range(first, last):
            n0, i0, j0 = chunk // (down * across) * images, chunk // across % down * high, chunk % across * wide
            n1, i1, j1 = min(get(arguments, N), n0 + images), min(OH_, i0 + high), min(OW_, j0 + wide)
            here = n1 - n0, i0, i1, j0, j1
            if inside(arguments, i0, i1, j0, j1):
                here = n1 - n0, 0, i1 - i0, 0, j1 - j0
            if here != known:
                listed(arguments, scratch, counts, room, n1 - n0, i0, i1 - i0, j0, j1 - j0)
                known = here
            gradients = get(arguments, Y) + g * get(arguments, SYG) + n0 * get(arguments, SYN)
            gradients += i0 * get(arguments, SYH) + j0 * get(arguments, SYW)
            pack(arguments, packed, beside, gradients, n1 - n0, i1 - i0, j1 - j0, o0, panels)
            source = get(arguments, X) + g * get(arguments, SXG) + n0 * get(arguments, SXN) + c0 * get(arguments, SXC)
            if get(arguments, IN_PLACE):
                source += get(arguments, SHIFT) + i0 * get(arguments, DOWN) + j0 * get(arguments, ACROSS)
            else:
                for n in range(n1 - n0):
                    fill(
                        arguments, copy + image * n, source + n * get(arguments, SXN), c1 - c0, i0,
                        i1 - i0 + reach_down, j0, j1 - j0 + reach_across, 0,
                    )  # fmt: skip
                source = copy
            at = (chunk - first) % get(arguments, LOT)
            pixels = (n1 - n0) * (i1 - i0) * (j1 - j0)
            multiply(
                arguments, packed, source, scratch, counts, room, place, y, pixels, count, panels, step, at > 0
            )  # fmt: skip
            if single == 0 and (at + 1 == get(arguments, LOT) or chunk + 1 == last):
                add((total, y, panels * step // size, chunk - at > first))

    def work(arguments, thread, threads):
        O_, G_, rows_, panels_ = get(arguments, O), get(arguments, G), get(arguments, ROWS), get(arguments, PANELS)
        taps = get(arguments, KH) * get(arguments, KW)
        lists = taps if get(arguments, BY_TAPS) else 1
        all_rows, all_panels = get(arguments, C) * taps, (O_ + width - 1) // width
        chunks = (get(arguments, N) + get(arguments, IMAGES) - 1) // get(arguments, IMAGES)
        chunks *= (get(arguments, OH) + get(arguments, HIGH) - 1) // get(arguments, HIGH)
        chunks *= (get(arguments, OW) + get(arguments, WIDE) - 1) // get(arguments, WIDE)
        parts, what = get(arguments, PARTS), get(arguments, WHAT)
        single = parts == 1 and chunks <= get(arguments, LOT)
        block = (rows_ // lists + most - 1) // most * most * lists * width * panels_
        y = (get(arguments, SCRATCH) + 63) // 64 * 64
        partial = y + threads * get(arguments, PER_THREAD)
        y += thread * get(arguments, PER_THREAD)
        grand = y + size * block
        total = grand + 8 * block
        rest = total + 8 * block if single == 0 else grand
        down, across = (all_rows + rows_ - 1) // rows_, (all_panels + panels_ - 1) // panels_
        blocks = G_ * down * across
        shares = 1
        if what == PARTIAL:
            shares = parts
        elif what == ENDING:
            shares = threads
        tasks = blocks * shares
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            share, place = task // blocks, task % blocks
            g, m0, o0 = place // (down * across), place // across % down * rows_, place % across * panels_
            m1, panels = min(all_rows, m0 + rows_), min(panels_, all_panels - o0)
            o0 *= width
            held = ((m1 - m0) // lists + most - 1) // most * most * lists * width
            if what == SUMS:
                for part in range(parts):
                    summed(
                        arguments, g, m0, m1, o0, panels, part * chunks // parts, (part + 1) * chunks // parts, rest, y,
                        size * held, grand if part == 0 else total, single,
                    )  # fmt: skip
                    if part > 0:
                        add_totals((grand, total, panels * held, 1))
                if single == 0:
                    rounded((y, grand, panels * held))
                written(arguments, g, m0, m1, o0, panels, y, size * held)
            elif what == PARTIAL:
                summed(
                    arguments, g, m0, m1, o0, panels, share * chunks // parts, (share + 1) * chunks // parts, rest, y,
                    size * held, partial + 8 * (share * blocks + place) * block, 0,
                )  # fmt: skip
            else:
                first, last = (m1 - m0) * share // shares, (m1 - m0) * (share + 1) // shares
                for panel in range(panels if first < last else 0):
                    begin = partial + 8 * (place * block + panel * held + first * width)
                    for part in range(1, parts):
                        add_totals((begin, begin + 8 * part * blocks * block, (last - first) * width, 1))
                    rounded((y, begin, (last - first) * width))
                    written(arguments, g, m0 + first, m0 + last, o0 + panel * width, 1, y, 0)

    return work
