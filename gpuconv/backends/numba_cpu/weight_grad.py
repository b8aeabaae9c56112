"""The gradient of a convolution in its kernel, without im2col: output channels in the lanes, pixels as the summed index.

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

# The table of arguments: that of the strips, with dy for y and dK for the weights, and then
(
    IN_PLACE, DOWN, ACROSS, TAP_DOWN, TAP_ACROSS, TAPS,  # how x is read; steps in elements, offsets of taps in a copy
    IMAGES, LOT, PARTS,  # a chunk's images; chunks of a lot; parts
    ROWS, PANELS, APART, ENDING,  # a block; whether parts are summed apart; whether this is their end
) = range(strip.END, strip.END + 13)  # fmt: skip


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

    def geometry_of(block: int) -> tuple[strip.Geometry, strip.Shape]:
        taps = problem.KH * problem.KW
        geometry = replace(base, kc=min(max(problem.C // problem.groups, 1), (block - 1) // taps + 2))
        return geometry, geometry.shape(chunk[1], chunk[2], 1)

    def copied(block: int) -> int:
        geometry, shape = geometry_of(block)
        return chunk[0] * geometry.kc * shape.channel * size + 64

    def each(block: int, panels: int) -> int:
        """Bytes of a thread."""
        padded = -(-block // most) * most
        held = panels * width * padded
        tables = 8 * (pixels + padded)
        packed = (panels * width + lanes.count) * pixels * size
        sums = held * size + (0 if whole else 16 * held)
        return packed + sums + copied(block) + tables + 8 * 64

    def apart_bytes(block: int) -> int:
        padded = -(-all_rows // block) * -(-block // most) * most
        return 8 * parts * problem.groups * all_panels * width * padded if parts > 1 else 0

    def scratch(threads: int, block: int, panels: int) -> int:
        tables = 8 * (base.down.phases * base.down.extent + base.across.phases * base.across.extent)
        offsets = 8 * geometry_of(block)[0].kc * problem.KH * problem.KW
        return threads * each(block, panels) + tables + offsets + 4096

    panels = max(1, min(all_panels, _OUTPUTS // width))
    block = schedule.halved(
        max(all_rows, 1),
        lambda b: b * panels * width * size <= _SUMS and copied(b) <= _INPUTS,
        at_least=most,
    )
    threads, block, panels = schedule.fit((threads, block, panels), scratch, limit, f"{NAME} on {problem}")
    in_place = problem.padding == NO_PADS and problem.x_dtype == lanes.dtype
    apart = 1 < threads <= parts and scratch(threads, block, panels) + apart_bytes(block) <= limit
    if not apart:
        if in_place and all_panels % threads == 0:
            panels = min(panels, all_panels // threads)
        outer = problem.groups * -(-all_panels // panels)
        blocks = -(-all_rows // block)
        while outer * blocks % threads and all_rows // (blocks + 1) >= 2 * most:
            blocks += 1
        if blocks > 1:
            block = min(block, -(-(-(-all_rows // blocks)) // most) * most)
    workspace = scratch(threads, block, panels) + (apart_bytes(block) if apart else 0)
    detail = (
        f"chunks of {pixels} pixels, blocks of {block} rows × {panels * width} output channels, {lanes}"
        + f", in {parts} parts" * (parts > 1)
    )
    geometry, shape = geometry_of(block)
    config = {
        "lanes": lanes, "vectors": vectors, "threads": threads, "geometry": geometry, "shape": shape, "chunk": chunk,
        "lot": lot, "sums": parts, "apart": apart, "block": block, "panels": panels, "extra": 0,
        "each": (each(block, panels) + 63) // 64 * 64, "partial": apart_bytes(block) if apart else 0,
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
        in_place = (
            problem.padding == NO_PADS and x.dtype == lanes.dtype and all(step % lanes.size == 0 for step in x.strides)
        )
        entries, kept = strip.table_of(plan, x, out, dy)
        entries[PER_THREAD - runtime.ARRAYS] = config["each"]
        (down, across), (tap_down, tap_across) = problem.stride, problem.dilation
        sxh, sxw = (step // lanes.size for step in x.strides[3:])
        entries += [
            in_place, down * sxh, across * sxw, tap_down * sxh, tap_across * sxw, kept[3].ctypes.data,
            config["chunk"][0], config["lot"], config["sums"], config["block"], config["panels"], config["apart"],
        ]  # fmt: skip
        kernel = runtime.kernel(kernel_name(plan), lambda: _kernel(problem, lanes, config["vectors"]))
        self.task = runtime.Task(kernel, [*entries, 0], config["threads"], kept)
        self.ending = runtime.Task(kernel, [*entries, 1], config["threads"], kept) if config["apart"] else None
        self.scratch = config["threads"] * config["each"] + config["partial"] + 64
        self.fill = dense.constant(problem, lanes)

    def __call__(self, x: Any, dy: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Write the gradient into ``out``."""
        scratch = np.empty(self.scratch, np.uint8)
        self.task(x, out, dy, scratch, None, self.fill)
        if self.ending is not None:
            self.ending(x, out, dy, scratch, None, self.fill)


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
                for part in range(vectors):
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
    half, lanes_count = most // 2, lanes.count
    full, some = (weight_grad_kernel.tile(lanes, count, vectors) for count in (most, half))
    add, rounded = weight_grad_kernel.totals(lanes)
    add_totals, _ = weight_grad_kernel.totals(Lanes("float64", lanes.count))
    fill = strip.filler(lanes, problem.x_dtype)
    pack = _packer(lanes, vectors, problem.k_dtype)
    written = _writer(lanes, vectors, problem.y_dtype)

    @compiled
    def placed(arguments, place, m0, m1, c0):
        """Where the channel and tap of each row begin; the last row also stands for those that fill its tile."""
        KW_, taps = get(arguments, KW), get(arguments, KH) * get(arguments, KW)
        for m in range(m0, m0 + (m1 - m0 + most - 1) // most * most):
            c, tap = min(m, m1 - 1) // taps, min(m, m1 - 1) % taps
            if get(arguments, IN_PLACE):
                at = c * get(arguments, SXC) // size
                at += tap // KW_ * get(arguments, TAP_DOWN) + tap % KW_ * get(arguments, TAP_ACROSS)
            else:
                at = (c - c0) * get(arguments, CHANNEL) + get(get(arguments, TAPS), tap)
            put(place, m - m0, at)

    @compiled
    def listed(arguments, off, images, high, wide):
        """Where each pixel of a chunk is."""
        image, down, across = get(arguments, KC) * get(arguments, CHANNEL), get(arguments, PITCH), 1
        if get(arguments, IN_PLACE):
            image, down, across = get(arguments, SXN) // size, get(arguments, DOWN), get(arguments, ACROSS)
        k = 0
        for n in range(images):
            for i in range(high):
                for j in range(wide):
                    put(off, k, n * image + i * down + j * across)
                    k += 1

    @compiled
    def multiply(a, x, off, place, y, pixels, count, panels, panel_step, accumulate):
        """All rows of a block with all panels, for the pixels of a chunk."""
        for m in range(0, count, most):
            for panel in range(panels):
                weights = a + size * panel * pixels * width
                sums = y + panel * panel_step + size * m * width
                if count - m > half:
                    full((weights, x, off, place + 8 * m, sums, pixels, accumulate))
                else:
                    some((weights, x, off, place + 8 * m, sums, pixels, accumulate))

    @compiled
    def summed(arguments, g, m0, m1, o0, panels, first, last, scratch, y, total, single):
        """The sums of chunks [first, last) in ``total``, or in ``y`` where all are a ``single`` lot."""
        OH_, OW_, C_ = get(arguments, OH), get(arguments, OW), get(arguments, C)
        images, high, wide = get(arguments, IMAGES), get(arguments, HIGH), get(arguments, WIDE)
        down, across = (OH_ + high - 1) // high, (OW_ + wide - 1) // wide
        taps = get(arguments, KH) * get(arguments, KW)
        most_pixels = images * high * wide
        off = scratch
        place = off + 8 * most_pixels
        beside = (place + 8 * (m1 - m0 + most) + 63) // 64 * 64
        packed = (beside + size * most_pixels * lanes_count + 63) // 64 * 64
        copy = (packed + size * most_pixels * panels * width + 63) // 64 * 64
        step = size * width * ((m1 - m0 + most - 1) // most * most)
        c0, c1 = m0 // taps, (m1 - 1) // taps + 1
        reach_down, reach_across = get(arguments, PLACES) - high, get(arguments, COLUMN_EXTENT) - OW_
        placed(arguments, place, m0, m1, c0)
        known = 0, 0, 0
        for chunk in range(first, last):
            n0, i0, j0 = chunk // (down * across) * images, chunk // across % down * high, chunk % across * wide
            n1, i1, j1 = min(get(arguments, N), n0 + images), min(OH_, i0 + high), min(OW_, j0 + wide)
            here = n1 - n0, i1 - i0, j1 - j0
            if here != known:
                listed(arguments, off, n1 - n0, i1 - i0, j1 - j0)
                known = here
            gradients = get(arguments, Y) + g * get(arguments, SYG) + n0 * get(arguments, SYN)
            gradients += i0 * get(arguments, SYH) + j0 * get(arguments, SYW)
            pack(arguments, packed, beside, gradients, n1 - n0, i1 - i0, j1 - j0, o0, panels)
            source = get(arguments, X) + g * get(arguments, SXG) + n0 * get(arguments, SXN)
            if get(arguments, IN_PLACE):
                source += size * (i0 * get(arguments, DOWN) + j0 * get(arguments, ACROSS))
            else:
                source += c0 * get(arguments, SXC)
                for n in range(n1 - n0):
                    fill(
                        arguments, copy + size * n * get(arguments, KC) * get(arguments, CHANNEL),
                        source + n * get(arguments, SXN), c1 - c0, i0, i1 - i0 + reach_down, j0, j1 - j0 + reach_across,
                        0,
                    )  # fmt: skip
                source = copy
            at = (chunk - first) % get(arguments, LOT)
            pixels = (n1 - n0) * (i1 - i0) * (j1 - j0)
            multiply(packed, source, off, place, y, pixels, m1 - m0, panels, step, at > 0)
            if single == 0 and (at + 1 == get(arguments, LOT) or chunk + 1 == last):
                add((total, y, panels * step // size, chunk - at > first))

    def work(arguments, thread, threads):
        O_, G_, rows_, panels_ = get(arguments, O), get(arguments, G), get(arguments, ROWS), get(arguments, PANELS)
        all_rows = get(arguments, C) * get(arguments, KH) * get(arguments, KW)
        all_panels = (O_ + width - 1) // width
        down = (get(arguments, OH) + get(arguments, HIGH) - 1) // get(arguments, HIGH)
        across = (get(arguments, OW) + get(arguments, WIDE) - 1) // get(arguments, WIDE)
        chunks = (get(arguments, N) + get(arguments, IMAGES) - 1) // get(arguments, IMAGES) * down * across
        parts, apart, ending = get(arguments, PARTS), get(arguments, APART), get(arguments, ENDING)
        single = parts == 1 and chunks <= get(arguments, LOT)
        block = width * ((rows_ + most - 1) // most * most) * panels_
        scratch = (get(arguments, SCRATCH) + 63) // 64 * 64
        partial = scratch + threads * get(arguments, PER_THREAD)
        y = scratch + thread * get(arguments, PER_THREAD)
        total = y + size * block
        grand = total + 8 * block
        rest = (grand + 8 * block) if single == 0 else total
        down, across = (all_rows + rows_ - 1) // rows_, (all_panels + panels_ - 1) // panels_
        blocks = G_ * down * across
        shares = parts if apart and ending == 0 else 1
        if ending:
            shares = threads
        tasks = blocks * shares
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            share, place = task // blocks, task % blocks
            g, m0, o0 = place // (down * across), place // across % down * rows_, place % across * panels_
            m1, panels = min(all_rows, m0 + rows_), min(panels_, all_panels - o0)
            o0 *= width
            padded = (m1 - m0 + most - 1) // most * most
            if ending:
                first, last = (m1 - m0) * share // shares, (m1 - m0) * (share + 1) // shares
                if first == last:
                    continue
                for panel in range(panels):
                    begin = partial + 8 * (place * block + (panel * padded + first) * width)
                    for part in range(1, parts):
                        add_totals((begin, begin + 8 * part * blocks * block, (last - first) * width, 1))
                    rounded((y, begin, (last - first) * width))
                    written(arguments, g, m0 + first, m0 + last, o0 + panel * width, 1, y, 0)
                continue
            if apart:
                summed(
                    arguments, g, m0, m1, o0, panels, share * chunks // parts, (share + 1) * chunks // parts, rest, y,
                    partial + 8 * (share * blocks + place) * block, 0,
                )  # fmt: skip
                continue
            held = panels * padded * width
            for part in range(parts):
                to = grand if part == 0 else total
                summed(
                    arguments, g, m0, m1, o0, panels, part * chunks // parts, (part + 1) * chunks // parts, rest, y, to,
                    single,
                )  # fmt: skip
                if part > 0:
                    add_totals((grand, total, held, 1))
            if single == 0:
                rounded((y, grand, held))
            written(arguments, g, m0, m1, o0, panels, y, size * padded * width)

    return work
