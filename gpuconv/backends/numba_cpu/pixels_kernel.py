"""The micro-kernel for channels that lie side by side (NHWC): MP pixels × NV vectors of output channels.

    y[py[i] + o] = (y[py[i] + o] +) Σ_r Σ_k x[px[i] + offset[r] + k] · A[r, k, o]          0 ≤ i < MP, 0 ≤ o < NV·lanes

Each pixel has an address of its own, so that nothing needs to be copied or regular; a *run* is what lies side by side
in x, such as the channels of a pixel or a whole kernel row of a padded copy. A is packed, NV·lanes numbers per product.
The sums of some runs begin at zero, and are *flushed* into y where the table says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from gpuconv.backends.numba_cpu import runtime
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.vectors import I32, I64, Emitter, Lanes, Value, get, routine, scalar

# Pixels by the bits of a register and the vectors of output channels: as many sums as the register file holds beside
# the vectors of A and one pixel. More pixels than twelve would not leave enough registers for their addresses.
PIXELS = {512: {4: 6, 3: 8, 2: 12, 1: 12}, 256: {2: 6, 1: 12}, 128: {4: 6, 3: 8, 2: 12, 1: 12}}

# Products of a turn of the loop without AVX-512, where a product is few instructions: in whole layers 2 to 5 % faster
# than one at a time, a fifth where runs are short.
_UNROLLED = 4

# How a loop is entered or left: the block, [k, weights, what is fetched], the sums.
Loop = tuple[Value, list[Value], list[list[Value]]]


def vectors_of(outputs: int, lanes: Lanes) -> int:
    """Vectors of output channels of a panel, so that little of the last panel is in vain. One vector for each
    pixel that is read is the slowest.
    """
    needed = -(-outputs // lanes.count)
    choices = sorted(PIXELS[lanes.bits], reverse=True)
    return min(choices, key=lambda count: -(-needed // count) * count * (1.15 if count == 1 else 1))


@functools.lru_cache(maxsize=64)
def tile(lanes: Lanes, pixels: int, vectors: int) -> Any:
    """The micro-kernel: a function of (A, x, runs, px, py, y, R, accumulate, final, last, bias, floor, next, rate).

    ``runs`` is a table of R times (offset, products, flush); the last run is always flushed. Only the first flush
    without ``accumulate`` does not read y. The last flush of a ``final`` call adds the vectors at ``bias`` and raises
    what is below the number at ``floor``. The first ``last`` outputs of the panel exist in y. Each product fetches the
    memory at ``next`` into the second-level cache, ``rate`` elements further from product to product.
    """

    def emit(e: Emitter, a: Value, x: Value, runs: Value, px: Value, py: Value, y: Value, R: Value, accumulate: Value,
             final: Value, last: Value, bias: Value, floor: Value, following: Value, rate: Value) -> None:  # fmt: skip
        builder = e.builder
        entry, run, loop, ended = builder.block, e.block("run"), e.block("loop"), e.block("ended")
        flush, add, flushed, plain, finish, after, done = (
            e.block(name) for name in ("flush", "add", "flushed", "plain", "finish", "after", "done")
        )
        panel = Panel(e, last, vectors)
        addresses = [e.at(x, builder.load(e.at(px, i))) for i in range(pixels)]
        builder.branch(run)

        builder.position_at_end(run)
        r, weights, ahead, more = (builder.phi(kind) for kind in (I64, a.type, following.type, I64))
        for phi, value in ((r, I64(0)), (weights, a), (ahead, following), (more, accumulate)):
            phi.add_incoming(value, entry)
        begun = e.sums(pixels, vectors, [(entry, None)])
        entry_of = builder.mul(r, I64(3))
        offset, count = builder.load(e.at(runs, entry_of)), builder.load(e.at(runs, entry_of, 1))
        here = [e.at(address, offset) for address in addresses]

        def products(loop: Value, entries: list[Loop], at_once: int, end: Value, past: Value) -> Loop:
            """A loop over ``at_once`` products at a time, as long as k is below ``end``."""
            builder.position_at_end(loop)
            k, weight, fetched = phis = [builder.phi(kind) for kind in (I64, a.type, following.type)]
            for origin, state, _ in entries:
                _incoming([phis], [state], origin)
            before = new = e.sums(pixels, vectors, [(origin, values) for origin, _, values in entries])
            e.prefetch(fetched, 2)
            for u in range(at_once):
                w = [e.load(e.at(weight, (u * vectors + j) * e.lanes.count)) for j in range(vectors)]
                sums, new = new, []
                for i in range(pixels):
                    place = e.at(here[i], k)
                    pixel = e.splat(builder.load(e.at(place, u) if u else place))
                    new.append([e.fma(pixel, w[j], sums[i][j]) for j in range(vectors)])
            step = rate if at_once == 1 else e.times(rate, at_once)
            further = [builder.add(k, I64(at_once)), e.at(weight, at_once * vectors * e.lanes.count)]
            further.append(e.at(fetched, step))
            _incoming([phis, *before], [further, *new], loop)
            builder.cbranch(builder.icmp_signed("<", further[0], end), loop, past)
            return loop, further, new

        begin: Loop = (run, [I64(0), weights, ahead], begun)
        if lanes.bits == 512:
            builder.branch(loop)
            _, (_, following_weight, following_fetch), new = products(loop, [begin], 1, count, ended)
        else:
            several, rest = e.block("several"), e.block("rest")
            limit = builder.sub(count, I64(_UNROLLED - 1))
            builder.cbranch(builder.icmp_signed(">", limit, I64(0)), several, loop)
            _, state, sums = products(several, [begin], _UNROLLED, limit, rest)
            builder.position_at_end(rest)
            builder.cbranch(builder.icmp_signed("<", state[0], count), loop, ended)
            ways = [(rest, state, sums), products(loop, [begin, (rest, state, sums)], 1, count, ended)]
            builder.position_at_end(ended)
            following_weight, following_fetch = phis = [builder.phi(kind) for kind in (a.type, following.type)]
            for block, state, _ in ways:
                _incoming([phis], [state[1:]], block)
            new = e.sums(pixels, vectors, [(block, values) for block, _, values in ways])

        builder.position_at_end(ended)
        builder.cbranch(builder.icmp_signed("!=", builder.load(e.at(runs, entry_of, 2)), I64(0)), flush, after)

        builder.position_at_end(flush)
        following_r = builder.add(r, I64(1))
        places = [e.at(y, builder.load(e.at(py, i))) for i in range(pixels)]
        builder.cbranch(builder.icmp_signed("!=", more, I64(0)), add, flushed)
        builder.position_at_end(add)
        sums_before: list[tuple[Value, Any]] = [(flush, new)]
        for load, _ in panel.ways():
            added = []
            for i in range(pixels):
                before = [load(j, e.at(places[i], j * e.lanes.count)) for j in range(vectors)]
                added.append([builder.fadd(before[j], new[i][j]) for j in range(vectors)])
            sums_before.append((builder.block, added))
            builder.branch(flushed)

        builder.position_at_end(flushed)
        totals = e.sums(pixels, vectors, sums_before)
        is_last = builder.icmp_signed("==", following_r, R)
        builder.cbranch(builder.and_(is_last, builder.icmp_signed("!=", final, I64(0))), finish, plain)

        builder.position_at_end(plain)
        written = []
        for _, store in panel.ways():
            for i in range(pixels):
                for j in range(vectors):
                    store(j, totals[i][j], e.at(places[i], j * e.lanes.count))
            written.append(builder.block)
            builder.branch(after)

        builder.position_at_end(finish)
        least = e.splat(builder.load(floor))
        for _, store in panel.ways():
            for j in range(vectors):
                b = e.load(e.at(bias, j * e.lanes.count))
                for i in range(pixels):
                    value = builder.fadd(totals[i][j], b)
                    value = builder.select(builder.fcmp_ordered("<", value, least), least, value)
                    store(j, value, e.at(places[i], j * e.lanes.count))
            builder.branch(done)

        builder.position_at_end(after)
        going = e.sums(pixels, vectors, [(ended, new), *((block, None) for block in written)])
        now = builder.phi(I64)
        now.add_incoming(more, ended)
        for block in written:
            now.add_incoming(I64(1), block)
        next_r = builder.add(r, I64(1))
        for phi, value in ((r, next_r), (weights, following_weight), (ahead, following_fetch), (more, now)):
            phi.add_incoming(value, after)
        _incoming(begun, going, after)
        builder.cbranch(builder.icmp_signed("<", next_r, R), run, done)
        builder.position_at_end(done)

    return routine(f"pixels_{lanes}_{pixels}x{vectors}", lanes, "eettteiiiieeei", emit)


def _incoming(phis: list[list[Value]], values: list[list[Value]], block: Value) -> None:
    """The values that ``phis`` take on the way from ``block``."""
    for phi_row, row in zip(phis, values, strict=True):
        for phi, value in zip(phi_row, row, strict=True):
            phi.add_incoming(value, block)


class Panel:
    """Reading and writing the vectors of a panel of y, of which the first ``last`` outputs exist.

    AVX-512 masks for nothing. A masked store of AVX2 is dozens of instructions inside AMD's processors, and one of NEON
    a branch for each lane: there, a panel that exists as a whole is told from one that does not.
    """

    def __init__(self, e: Emitter, last: Value, vectors: int) -> None:
        """For ``vectors`` vectors."""
        self.e, self.last, self.vectors = e, last, vectors
        self.masks = self._masks() if e.lanes.bits == 512 else None

    def _masks(self) -> list[Value]:
        e = self.e
        return [e.mask(e.builder.sub(self.last, I64(j * e.lanes.count))) for j in range(self.vectors)]

    def ways(self) -> Iterator[tuple[Callable[[int, Value], Value], Callable[[int, Value, Value], None]]]:
        """For each way to go, from here on: load(vector, pointer) and store(vector, value, pointer). Code must be
        emitted for both; each ends with a branch.
        """
        e, builder, masks = self.e, self.e.builder, self.masks
        if masks is None:
            whole, cut = e.block("whole"), e.block("cut")
            builder.cbranch(builder.icmp_signed(">=", self.last, I64(self.vectors * e.lanes.count)), whole, cut)
            builder.position_at_end(whole)
            yield lambda j, pointer: e.load(pointer), lambda j, value, pointer: e.store(value, pointer)
            builder.position_at_end(cut)
            masks = self._masks()
        yield (
            lambda j, pointer: e.masked_load(pointer, masks[j]),
            lambda j, value, pointer: e.masked_store(value, pointer, masks[j]),
        )


@functools.lru_cache(maxsize=64)
def zeros(lanes: Lanes, vectors: int) -> Any:
    """A function of (py, y, count, last) that writes zero where the micro-kernel for ``count`` pixels would write."""

    def emit(e: Emitter, py: Value, y: Value, count: Value, last: Value) -> None:
        done = e.block("done")
        for _, store in Panel(e, last, vectors).ways():

            def body(i: Value, store: Callable[[int, Value, Value], None] = store) -> None:
                place = e.at(y, e.builder.load(e.at(py, i)))
                for j in range(vectors):
                    store(j, e.zero, e.at(place, j * e.lanes.count))

            e.loop(0, count, 1, body)
            e.builder.branch(done)
        e.builder.position_at_end(done)

    return routine(f"pixels_zero_{lanes}_{vectors}", lanes, "teii", emit)


@intrinsic
def put(typing: Any, address: Any, index: Any, value: Any) -> Any:
    """Write the 64-bit integer number ``index`` at ``address``."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        base, at, number = (
            context.cast(builder, v, t, types.intp) for v, t in zip(values, signature.args, strict=True)
        )
        builder.store(number, builder.gep(builder.inttoptr(base, I64.as_pointer()), [at]))
        return context.get_dummy_value()

    return types.void(address, index, value), lower


# ---- weights: packed[g][panel][(p, q, c)][o], NV·lanes outputs a panel, those beyond the last channel zero

# The table of arguments of the kernel that packs.
K, PACKED, PLACES, *_ = range(runtime.ARRAYS)
G, O, C, KH, KW, ORDER, SG, SO, SC, SP, SQ = range(runtime.ARRAYS, runtime.ARRAYS + 11)

# How the weights lie: an output's side by side; in any order of whole elements, those of input gradients above all,
# whose outputs are k's input channels; in any other.
_TURNED, _APART, _BETWEEN = range(3)


def _transposed(e: Emitter, to: Value, source: Value, places: Value, ld: Value, count: Value, present: Value,
                width: Value, squares: int) -> None:  # fmt: skip
    """to[places[k]·width + i] = source[i·ld + k] for as many i as there are lanes, zero from i = present on; with
    several ``squares`` for as many times the lanes, which are all present, and at least as many k as there are lanes.
    """
    builder, n = e.builder, e.lanes.count

    def place(k: Value, u: int) -> Value:
        return e.at(to, builder.mul(builder.load(e.at(places, k, u)), width))

    def square(k: Value) -> None:
        columns = []
        for first in range(0, n * squares, n):
            columns.append(e.transposed([e.load(e.at(source, e.times(ld, first + i), k)) for i in range(n)]))
        # What fills a cache line is written at once: the lines of taps often share few places of a cache.
        for u in range(n):
            line = place(k, u)
            for j in range(squares):
                e.store(columns[j][u], e.at(line, j * n))

    def part(k: Value) -> None:
        left = builder.sub(count, k)
        rows = []
        for i in range(n):
            there = builder.select(builder.icmp_signed("<", I64(i), present), left, I64(0))
            rows.append(e.masked_load(e.at(source, e.times(ld, i), k), e.mask(there)))
        for u, column in enumerate(e.transposed(rows)):
            with builder.if_then(builder.icmp_signed("<", I64(u), left)):
                e.store(column, place(k, u))

    if squares > 1:  # the last square reaches back into the one before
        k = e.loop(0, count, n, square)
        with builder.if_then(builder.icmp_signed("<", k, count)):
            square(builder.sub(count, I64(n)))
        return
    # Masks and branches make a square three times as slow: only edges have them.
    whole = builder.select(builder.icmp_signed(">=", present, I64(n)), count, I64(0))
    k = e.loop(0, whole, n, square)
    e.loop(k, builder.add(count, I64(n - 1)), n, part)


# Products of all outputs of a panel that are turned over before the next: 16 channels of a 3×3 kernel. What is read and
# written meanwhile lies in few places.
_AT_ONCE = 144

# Where an output's weights are not side by side: input channels of a panel that are packed before the next panel, and
# before the next tap.
_CHANNELS, _NEAR = 32, 8


@functools.lru_cache(maxsize=64)
def packing_of(lanes: Lanes, vectors: int) -> Any:
    """A function for compiled code: pack(to, source, places, so, present, first, products) packs ``products`` of a
    panel from ``first`` on. Their weights lie side by side at ``source`` and go to the places listed; from output to
    output there are ``so`` bytes, and the first ``present`` outputs of the panel exist.
    """
    size, count, width = lanes.size, lanes.count, vectors * lanes.count
    transposed = routine(f"pixels_panel_{lanes}", lanes, "eetiiii", functools.partial(_transposed, squares=1))
    # Two registers of AVX2 fill a cache line: it is written at once, since the taps' lines share few places of a cache.
    together = vectors > 1 and lanes.bits < 512
    squares = vectors if together else 1
    all_transposed = routine(
        f"pixels_panels{squares}_{lanes}", lanes, "eetiiii", functools.partial(_transposed, squares=squares)
    )

    @compiled
    def pack(to, source, places, so, present, first, products):
        for k in range(first, first + products, _AT_ONCE):
            length = min(_AT_ONCE, first + products - k)
            if together and present >= width and length >= count:
                all_transposed((to, source + size * k, places + 8 * k, so // size, length, present, width))
                continue
            for part in range(vectors):
                outputs = min(max(present - part * count, 0), count)
                at = source + size * k
                if outputs > 0:
                    at += part * count * so
                line = to + size * part * count
                transposed((line, at, places + 8 * k, so // size, length, outputs, width))

    return pack


def _gathered(e: Emitter, to: Value, source: Value, vectors: Value, so: Value, channels: Value, sc: Value, KH: Value,
              sp: Value, KW: Value, sq: Value, width: Value, tap: Value) -> None:  # fmt: skip
    """to[(p·KW + q)·tap + c·width + i] = source[i·so + c·sc + p·sp + q·sq] for all i of some vectors."""
    builder, n = e.builder, e.lanes.count
    near = builder.icmp_signed("==", so, I64(1))

    def of_tap(p: Value, q: Value) -> None:
        line = e.at(source, builder.mul(p, sp), builder.mul(q, sq))
        target = e.at(to, builder.mul(builder.add(builder.mul(p, KW), q), tap))

        def one(c: Value, v: Value) -> None:
            first = builder.mul(v, I64(n))
            place = e.at(line, builder.mul(c, sc), builder.mul(first, so))
            with builder.if_else(near) as (side_by_side, apart):
                with side_by_side:
                    e.store(e.load(place), e.at(target, builder.mul(c, width), first))
                with apart:
                    vector = e.zero
                    for i in range(n):
                        vector = builder.insert_element(vector, builder.load(e.at(place, e.times(so, i))), I32(i))
                    e.store(vector, e.at(target, builder.mul(c, width), first))

        # A cache line is written as a whole before others, which are often a power of two from it.
        e.loop(0, channels, 1, lambda c: e.loop(0, vectors, 1, lambda v: one(c, v)))

    e.loop(0, KH, 1, lambda p: e.loop(0, KW, 1, lambda q: of_tap(p, q)))


def _packer(lanes: Lanes, vectors: int) -> Callable[..., None]:
    size, count, width = lanes.size, lanes.count, vectors * lanes.count
    pack_panel = packing_of(lanes, vectors)
    gathered = routine(f"pixels_gathered_{lanes}", lanes, "ee" + 10 * "i", _gathered)
    read, _, _ = rows(lanes, lanes.dtype)
    _, store = scalar(lanes.dtype)

    @compiled
    def scattered(arguments, to, source, channels, present):
        """A panel's outputs, of which some are present, for some input channels, from memory of any order."""
        C_, KH_, KW_, so = get(arguments, C), get(arguments, KH), get(arguments, KW), get(arguments, SO)
        sc, sp, sq = get(arguments, SC), get(arguments, SP), get(arguments, SQ)
        whole = 0
        if get(arguments, ORDER) == _APART:
            whole = min(present, width) // count
            for c in range(0, channels, _NEAR):
                here, steps = min(_NEAR, channels - c), (KH_, sp // size, KW_, sq // size, width, C_ * width)
                at = source + c * sc
                gathered((to + size * width * c, at, whole, so // size, here, sc // size, *steps))
        for v in range(whole, vectors):
            here = min(max(present - v * count, 0), count)
            at = source if here == 0 else source + v * count * so  # of an output that exists
            for p in range(KH_):
                for q in range(KW_):
                    for c in range(channels):
                        place = to + size * (width * ((p * KW_ + q) * C_ + c) + v * count)
                        read(place, at + c * sc + p * sp + q * sq, here, so)
                        for o in range(here, count):
                            store(place + o * size, 0.0)

    def pack(arguments, thread, threads):
        O_, C_, so, order = get(arguments, O), get(arguments, C), get(arguments, SO), get(arguments, ORDER)
        products = C_ * get(arguments, KH) * get(arguments, KW)
        panels = (O_ + width - 1) // width
        # A panel in parts, of products or of input channels.
        parts = (products + _AT_ONCE - 1) // _AT_ONCE if order == _TURNED else (C_ + _CHANNELS - 1) // _CHANNELS
        tasks = get(arguments, G) * panels * parts
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            g, panel, part = task // (panels * parts), task // parts % panels, task % parts
            if order != _TURNED:  # outputs lie near each other: some channels of all panels
                panel, part = task % panels, task // panels % parts
            to = get(arguments, PACKED) + size * (g * panels + panel) * products * width
            source = get(arguments, K) + g * get(arguments, SG) + panel * width * so
            present = O_ - panel * width
            if order == _TURNED:
                first = part * _AT_ONCE
                pack_panel(to, source, get(arguments, PLACES), so, present, first, min(_AT_ONCE, products - first))
                continue
            c = part * _CHANNELS
            scattered(
                arguments, to + size * width * c, source + c * get(arguments, SC), min(_CHANNELS, C_ - c), present
            )

    return pack


def packed_size(groups: int, outputs: int, products: int, width: int) -> int:
    """Elements of the packed weights."""
    return groups * -(-outputs // width) * width * products


def places_of(k: Any, lanes: Lanes) -> np.ndarray[Any, Any] | None:
    """Where each product of weights like ``k`` (G, O, C, KH, KW) is in a panel, in the order in which they lie side by
    side; None where they do not.
    """
    if k.strides[1] % lanes.size or lanes.count == 1:
        return None
    order, one = np.arange(k[0, 0].size).reshape(*k.shape[3:], k.shape[2]), k[0, 0]
    if one.flags.c_contiguous:
        return np.ascontiguousarray(order.transpose(2, 0, 1))
    return order if one.transpose(1, 2, 0).flags.c_contiguous else None


class Packing:
    """The packing of weights of one shape and strides."""

    def __init__(self, k: Any, lanes: Lanes, vectors: int, threads: int) -> None:
        """For views like ``k`` (G, O, C, KH, KW), of any strides."""
        G_, O_, C_, KH_, KW_ = k.shape
        self.lanes, self.count = lanes, packed_size(G_, O_, C_ * KH_ * KW_, vectors * lanes.count)
        self.converted = k.dtype != lanes.dtype or not k.dtype.isnative
        like = np.empty_like(k, lanes.dtype) if self.converted else k
        places = places_of(like, lanes)
        self.places = np.zeros(1, np.int64) if places is None else places
        # Starting threads costs more than packing little.
        threads = threads if self.count >= 1 << 16 else 1
        kernel = runtime.kernel(f"pixels_weights_{lanes}_{vectors}", lambda: _packer(lanes, vectors))
        whole = all(step % lanes.size == 0 for step in like.strides)
        order = _TURNED if places is not None else _APART if whole else _BETWEEN
        self.task = runtime.Task(kernel, [G_, O_, C_, KH_, KW_, order, *like.strides], threads)

    def __call__(self, k: Any) -> np.ndarray[Any, Any]:
        """The packed form of ``k``."""
        if self.converted:
            with np.errstate(all="ignore"):
                k = k.astype(self.lanes.dtype)
        packed = runtime.aligned(self.count, self.lanes.dtype)
        self.task(k, packed, self.places)
        return packed
