"""The gradient of a convolution in its kernel, without im2col: output channels in the lanes, a sum over pixels.

    dK[o,c,p,q] = Σ_nij dy[n,o,i,j] · x[n,c, i·s+p·d-pad, j·s+q·d-pad]

The pixels (n,i,j) are cut in *chunks* of at most one sum of the micro-kernel. For a chunk, dy is packed with its output
channels side by side, and x is read in place or, where it has a border, from a padded copy of what the chunk reads. A
row of the result is a channel and a tap; each thread keeps a block of rows in its cache, and writes it when all pixels
are summed.

How the sum is split depends on the problem alone, on no thread and no workspace: the sums of chunks are added up in
float32 for a *lot* of about 4096 pixels, those of lots in float64; and where the result is small the chunks are divided
into a few *parts*, which threads may sum apart, and which are added in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime, strip, weight_grad_kernel
from gpuconv.backends.numba_cpu.copies import compiled, rows
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.pixels_kernel import PIXELS, put, vectors_of
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
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import NO_PADS, Conv2dProblem

NAME = "numba_cpu.weight_grad"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("weight_grad",))

unavailable = runtime.unavailable
unsupported = dense.unsupported

# Pixels whose sums are added up in float32, and chunks from which on a part is worth its memory.
_LOT, _PART = 4096, 8
_PARTS = 16
# Elements of a result that is summed in parts.
_SMALL = 1 << 15
# Bytes of a thread's block of the result, and of its copy of x; output channels of a block.
_SUMS, _INPUTS, _OUTPUTS = 512 << 10, 512 << 10, 256
_ALONE = 1 << 19  # products below which starting threads costs more than it gives

# The most taps that lists of their own are kept for.
_LISTED = 128

# The table of arguments: that of the strips, with dy for y and dK for the weights, and then
(
    IN_PLACE, SHIFT, DOWN, ACROSS, TAP_DOWN, TAP_ACROSS,  # how x is read in place: bytes to its border, steps
    BY_TAPS, REACHED,  # whether a row is a channel, tap by tap; the output rows and columns that taps reach
    IMAGES, LOT, PARTS, ROWS, PANELS,  # a chunk's images; chunks of a lot; parts; a block
    WHAT,  # to be done: SUMS, or PARTIAL sums and then their ENDING
) = range(strip.END, strip.END + 14)  # fmt: skip
SUMS, PARTIAL, ENDING = range(3)


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the chunks, which decide the sums, and the blocks of the result."""
    lanes = dense.lanes_of(problem, target)
    vectors = vectors_of(problem.O // problem.groups, lanes)
    most, width, size = PIXELS[lanes.bits][vectors], vectors * lanes.count, lanes.size
    all_rows = problem.C // problem.groups * problem.KH * problem.KW
    all_panels = -(-(problem.O // problem.groups) // width)
    chunk = _chunk(problem)
    pixels = chunk[0] * chunk[1] * chunk[2]
    chunks = 1
    for extent, share in zip((problem.N, problem.OH, problem.OW), chunk, strict=True):
        chunks *= -(-extent // max(share, 1))
    lot = max(1, _LOT // max(pixels, 1))
    parts = 1
    while problem.result_size <= _SMALL and 2 * parts <= min(_PARTS, chunks // _PART):
        parts *= 2
    whole = parts == 1 and chunks <= lot  # all of the sum is one lot
    threads = target.threads if problem.result_size * problem.products >= _ALONE else 1
    base = strip.geometry_of(problem, lanes)
    lists = problem.KH * problem.KW if _by_taps(problem, most) else 1

    def geometry_of(block: int) -> tuple[strip.Geometry, strip.Shape]:
        taps = problem.KH * problem.KW
        geometry = replace(base, kc=min(max(problem.C // problem.groups, 1), (block - 1) // taps + 2))
        return geometry, geometry.shape(chunk[1], chunk[2], 1)

    def padded(block: int) -> int:
        """Rows of a block, in whole tiles."""
        return -(-block // lists // most) * most * lists

    def copied(block: int) -> int:
        geometry, shape = geometry_of(block)
        return chunk[0] * geometry.kc * shape.channel * size + 64

    def each(block: int, panels: int) -> int:
        """Bytes of a thread."""
        held = panels * width * padded(block)
        tables = 8 * (2 * pixels * lists + lists + padded(block))
        packed = (panels * width + lanes.count) * pixels * size
        sums = held * size + (0 if whole else 16 * held)
        return packed + sums + copied(block) + tables + 8 * 64

    def apart_bytes(block: int, panels: int) -> int:
        blocks = -(-all_rows // block) * problem.groups * -(-all_panels // panels)
        return 8 * parts * blocks * panels * width * padded(block) if parts > 1 else 0

    def scratch(threads: int, block: int, panels: int) -> int:
        tables = 8 * (base.down.phases * base.down.extent + base.across.phases * base.across.extent)
        offsets = 8 * geometry_of(block)[0].kc * problem.KH * problem.KW
        return threads * each(block, panels) + tables + offsets + 4096

    panels = max(1, min(all_panels, _OUTPUTS // width))

    def cached(share: int) -> bool:
        return share * lists * panels * width * size <= _SUMS and copied(share * lists) <= _INPUTS

    # In shares of the rows that a list serves: channels where there is a list for each tap.
    shares = max(all_rows // lists, 1)
    share = schedule.halved(shares, cached, at_least=most)
    threads, share, panels = schedule.fit(
        (threads, share, panels), lambda t, s, p: scratch(t, s * lists, p), limit, f"{NAME} on {problem}"
    )
    block = share * lists
    in_place = (lists > 1 or problem.padding == NO_PADS) and problem.x_dtype == lanes.dtype
    apart = threads > 1 and parts >= min(threads, max(shares // most * all_panels, 2))
    apart = apart and scratch(threads, block, panels) + apart_bytes(block, panels) <= limit
    if not apart:
        if in_place and all_panels % threads == 0:
            panels = min(panels, all_panels // threads)
        outer = problem.groups * -(-all_panels // panels)
        blocks = -(-shares // share)
        while outer * blocks % threads and shares // (blocks + 1) >= most:
            blocks += 1
        if blocks > 1:
            even, tile = -(-shares // blocks), most // 2
            block = min(share, -(-even // tile) * tile) * lists
    partial = apart_bytes(block, panels) if apart else 0
    workspace = scratch(threads, block, panels) + partial
    detail = (
        f"chunks of {pixels} pixels, blocks of {block} rows × {panels * width} output channels, {lanes}"
        + f", in {parts} parts" * (parts > 1)
    )
    geometry, shape = geometry_of(block)
    config = {
        "lanes": lanes, "vectors": vectors, "threads": threads, "geometry": geometry, "shape": shape, "chunk": chunk,
        "lot": lot, "sums": parts, "apart": apart, "block": block, "panels": panels, "extra": 0,
        "lists": lists, "each": (each(block, panels) + 63) // 64 * 64, "partial": partial,
    }  # fmt: skip
    return Plan(problem, workspace, lanes.dtype, detail, config)


def _chunk(problem: Conv2dProblem) -> tuple[int, int, int]:
    """Images, output rows and columns whose pixels one call of the micro-kernel sums, in equal shares."""

    def share(extent: int, most: int) -> int:
        return -(-extent // -(-extent // most)) if extent else 1

    N_, OH_, OW_ = problem.N, problem.OH, problem.OW
    if OW_ > BLOCK:
        return 1, 1, share(OW_, BLOCK)
    if OH_ * OW_ > BLOCK:
        return 1, share(OH_, BLOCK // OW_), OW_
    return share(N_, BLOCK // max(OH_ * OW_, 1)), max(OH_, 1), max(OW_, 1)


def _by_taps(problem: Conv2dProblem, most: int) -> bool:
    """Whether the rows of a tile are channels of one tap, for which only the pixels that it reaches are summed. With
    fewer channels than a tile has rows, taps are mixed in one, and what lies outside of x is multiplied as zeros.
    """
    return (
        problem.padding != NO_PADS
        and problem.C // problem.groups >= most
        and problem.KH * problem.KW <= _LISTED
    )  # fmt: skip


def _reached(problem: Conv2dProblem, by_taps: bool) -> np.ndarray[Any, Any]:
    """The first and the end of the output rows, and of the columns, that each tap reaches; all where taps are mixed."""
    found = []
    axes = zip(
        (problem.H, problem.W), (problem.KH, problem.KW), (problem.OH, problem.OW), problem.padding, problem.stride,
        problem.dilation, strict=True,
    )  # fmt: skip
    for n, taps, outputs, (before, _), stride, dilation in axes:
        for tap in range(taps if by_taps else 1):
            first = min(max(-(-(before - tap * dilation) // stride), 0), outputs)
            last = min(max(-(-(n + before - tap * dilation) // stride), first), outputs)
            found.append((first, last) if by_taps else (0, outputs))
    return np.array(found, np.int64)


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    problem = plan.problem
    return (
        f"weight_grad_{plan.config['lanes']}_{plan.config['vectors']}_{problem.x_dtype}_{problem.k_dtype}_"
        f"{problem.y_dtype}"
    )


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
        by_taps = config["lists"] > 1
        in_place = (
            (by_taps or problem.padding == NO_PADS)
            and x.dtype == lanes.dtype
            and all(step % lanes.size == 0 for step in x.strides)
        )
        entries, kept = strip.table_of(plan, x, out, dy)
        entries[PER_THREAD - runtime.ARRAYS] = config["each"]
        (top, _), (left, _) = problem.padding
        (down, across), (tap_down, tap_across) = problem.stride, problem.dilation
        sxh, sxw = x.strides[3:]
        reached = _reached(problem, by_taps)
        entries += [
            in_place, -top * sxh - left * sxw, down * sxh, across * sxw, tap_down * sxh, tap_across * sxw, by_taps,
            reached.ctypes.data, config["chunk"][0], config["lot"], config["sums"], config["block"], config["panels"],
        ]  # fmt: skip
        kernel = runtime.kernel(kernel_name(plan), lambda: _kernel(problem, lanes, config["vectors"]))
        steps = (PARTIAL, ENDING) if config["apart"] else (SUMS,)
        self.tasks = [runtime.Task(kernel, [*entries, what], config["threads"], (kept, reached)) for what in steps]
        self.scratch = config["threads"] * config["each"] + config["partial"] + 64
        self.fill = dense.constant(problem, lanes)

    def __call__(self, x: Any, dy: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Write the gradient into ``out``."""
        scratch = np.empty(self.scratch, np.uint8)
        for task in self.tasks:
            task(x, out, dy, scratch, None, self.fill)


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


def _kernel(problem: Conv2dProblem, lanes: Lanes, vectors: int) -> Callable[..., None]:
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
