"""The compiled kernel of ``fft``: kernels and pairs of tiles transformed, multiplied and brought back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuconv.backends.numba_cpu import fft_stages, fft_tiles, strip
from gpuconv.backends.numba_cpu import fft_table as table
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.fft_certain import FACTS, PLACED
from gpuconv.backends.numba_cpu.fft_tiles import CELL
from gpuconv.backends.numba_cpu.fft_verdict import LEAST_SUM, NORM, OFFSET, verdicts
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.rows_kernel import row_tile
from gpuconv.backends.numba_cpu.runtime import take
from gpuconv.backends.numba_cpu.vectors import INTEGERS, SIZE, Lanes, get, scalar

X, PACKED, Y, SCRATCH, FINISH = strip.X, strip.WEIGHTS, strip.Y, strip.SCRATCH, strip.FINISH
SXN, SXG, SXC, SXH = strip.SXN, strip.SXG, strip.SXC, strip.SXH
SYN, SYG, SYO, SYH, SYW = strip.SYN, strip.SYG, strip.SYO, strip.SYH, strip.SYW
N, G, C, O, OH, OW, KH, KW = strip.N, strip.G, strip.C, strip.O, strip.OH, strip.OW, strip.KH, strip.KW
HIGH, WIDE, PER_THREAD = strip.HIGH, strip.WIDE, strip.PER_THREAD
TH, TW, DOWN, ACROSS, Z, STEP, CELLS = (
    table.TH, table.TW, table.DOWN, table.ACROSS, table.Z, table.STEP, table.CELLS,
)  # fmt: skip
FACTS_AT, WEIGHTS_AT, SCALE, KERNELS = table.FACTS_AT, table.WEIGHTS_AT, table.SCALE, table.KERNELS

# Rows, and vectors of columns, of a tile of sums product by product, by the bits of a register.
_TILE = {512: (4, 6), 256: (4, 3), 128: (4, 2)}


def _sums(lanes: Lanes, y_dtype: str, fill: Any) -> Any:
    """A function that sums a tile of y product by product, in float32: sum_up(arguments, memory, window, image, target,
    a, i0, high, j0, wide, bias); the weights at ``a`` and the bias, with the least result behind it, of float32.
    """
    single = Lanes.of("float32", lanes.bits)
    height, vectors = _TILE[single.bits]
    width, lane_count = vectors * single.count, single.count
    full, one = (row_tile(single, height, count, (0,)) for count in (vectors, 1))
    _, narrow, _ = rows(lanes, "float32")
    _, write, _ = rows(single, y_dtype)
    line_at, passes_at, pass_count, finished = table.LINE, table.PASSES, table.PASS_COUNT, table.FINISHED
    shift, first, count, taps, weight, size = (
        table.SHIFT, table.FIRST, table.COUNT, table.ROWS, table.WEIGHT, 8 * table.PASS,
    )  # fmt: skip
    ramp = table.RAMP

    @compiled
    def sum_up(arguments, memory, window, image, target, a, i0, high, j0, wide, bias):
        line, channels, all_taps = get(arguments, line_at), get(arguments, C), get(arguments, KH) * get(arguments, KW)
        sums = memory + 4 * line * (get(arguments, TH) + 8)
        columns, passes, read = get(arguments, ramp), get(arguments, pass_count), wide + get(arguments, KW) - 1
        for c in range(channels):
            for t in range(high + get(arguments, KH) - 1):
                fill(arguments, window, image + c * get(arguments, SXC), 1, i0 + t, 1, j0, read, False)
                narrow(memory + 4 * t * line, window, read, 4)
            for index in range(passes):
                entry = get(arguments, passes_at) + size * index
                weights = a + 4 * (c * all_taps + get(entry, weight))
                more = c + index
                finish = get(arguments, finished) if c == channels - 1 and index == passes - 1 else 0
                for t in range(0, high, height):
                    u = 0
                    while u < wide:
                        given = (
                            weights, memory + 4 * ((t + get(entry, shift)) * line + u), columns + 8 * get(entry, first),
                            sums + 4 * (t * line + u), get(entry, taps), get(entry, count), line, line, more, finish,
                            lane_count, bias, bias + 4,
                        )  # fmt: skip
                        if wide - u > lane_count:
                            full(given)
                            u += width
                        else:
                            one(given)
                            u += lane_count
        for r in range(high):
            write(target + r * get(arguments, SYH), sums + 4 * r * line, wide, get(arguments, SYW))

    return sum_up


def _images(lanes: Lanes, x_dtype: str, fill: Any) -> Any:
    """A function that reads a pair of tiles of a channel: read(arguments, z, image, pair, window, cells, numbers)."""
    load, near, n = fft_tiles.load(lanes, "float64"), fft_tiles.load(lanes, x_dtype), lanes.count
    _, _, repeat = rows(lanes, x_dtype)
    size = SIZE[x_dtype]
    top_at, left_at, high_at, wide_at, in_place, zero_at = (
        table.TOP, table.LEFT, table.H, table.W, table.IN_PLACE_X, 8 * (OFFSET * n + 1),
    )  # fmt: skip

    @compiled
    def inside(arguments, i0, j0):
        """Whether all of a tile is in the image."""
        i, j = i0 - get(arguments, top_at), j0 - get(arguments, left_at)
        down = i >= 0 and i + get(arguments, TH) <= get(arguments, high_at)
        return 1 if down and j >= 0 and j + get(arguments, TW) <= get(arguments, wide_at) else 0

    @compiled
    def read(arguments, z, image, pair, window, cells, numbers):
        th, tw, step = get(arguments, TH), get(arguments, TW), get(arguments, STEP)
        across = (get(arguments, OW) + get(arguments, WIDE) - 1) // get(arguments, WIDE)
        tiles = (get(arguments, OH) + get(arguments, HIGH) - 1) // get(arguments, HIGH) * across
        beside = 8 * th // CELL * tw
        first, second = 2 * pair, 2 * pair + 1
        i0, i1 = first // across * get(arguments, HIGH), second // across * get(arguments, HIGH)
        j0, j1 = first % across * get(arguments, WIDE), second % across * get(arguments, WIDE)
        if get(arguments, in_place) != 0 and inside(arguments, i0, j0) * inside(arguments, i1, j1) != 0:
            corner = image - get(arguments, top_at) * get(arguments, SXH) - size * get(arguments, left_at)
            for r in range(0, th, CELL):
                at = cells + 8 * (r // CELL) * tw
                near((
                    z + 16 * n * r, corner + (i0 + r) * get(arguments, SXH) + size * j0,
                    corner + (i1 + r) * get(arguments, SXH) + size * j1, at, at + beside, numbers, tw // n, step,
                    get(arguments, SXH) // size,
                ))  # fmt: skip
            return
        zero = numbers + zero_at
        for r in range(0, th, CELL):
            for which in range(2):
                to, i, j = window + 8 * which * CELL * tw, i1 if which else i0, j1 if which else j0
                high, wide = 0, min(tw, get(arguments, OW) + get(arguments, KW) - 1 - j)
                if 2 * pair + which < tiles:
                    high = min(CELL, max(0, get(arguments, OH) + get(arguments, KH) - 1 - i - r))
                if high > 0:
                    fill(arguments, to, image, 1, i + r, high, j, wide, False)
                    if wide < tw:
                        for t in range(high):
                            repeat(to + 8 * (t * tw + wide), zero, tw - wide)
                if high < CELL:
                    repeat(to + 8 * high * tw, zero, (CELL - high) * tw)
            at = cells + 8 * (r // CELL) * tw
            load((z + 16 * n * r, window, window + 8 * CELL * tw, at, at + beside, numbers, tw // n, step, tw))

    return read


def _kernels(lanes: Lanes) -> Any:
    """A function that transforms a kernel: transform(arguments, k, to, z, work, window, cells, numbers)."""
    n, zero_at = lanes.count, 8 * (OFFSET * lanes.count + 1)
    read, _, repeat = rows(lanes, "float32")
    load, turn, keep = fft_tiles.load(lanes, "float64"), fft_stages.turned(lanes), fft_stages.conjugate(lanes)
    there, _ = fft_stages.transforms(lanes)

    @compiled
    def transform(arguments, k, to, z, work, window, cells, numbers):
        th, tw, taps, wide = get(arguments, TH), get(arguments, TW), get(arguments, KH), get(arguments, KW)
        step, zero = get(arguments, STEP), numbers + zero_at
        repeat(z, zero, get(arguments, Z))
        for p in range(0, taps, CELL):
            repeat(window, zero, 2 * CELL * tw)
            for t in range(min(CELL, taps - p)):
                read(window + 8 * t * tw, k + 4 * (p + t) * wide, wide, 4)
            load((z + 16 * n * p, window, window + 8 * CELL * tw, cells, cells + 8 * tw, numbers, tw // n, step, tw))
        for g in range((wide + n - 1) // n):
            there(z + 8 * g * step, get(arguments, DOWN), th)
        for r in range(0, th, n):
            turn((work, z + 16 * n * r, 2 * n * n, step, tw // n))
            there(work, get(arguments, ACROSS), tw)
            keep((to + 16 * r * tw, work, get(arguments, SCALE), tw))

    return transform


def _certain(lanes: Lanes) -> Any:
    """A function that tells whether Fourier transforms give all outputs of a pair of tiles: is_certain(arguments,
    facts, pair, cells, numbers).
    """
    n, least = lanes.count, fft_tiles.least(lanes)
    _, _, at_once, by_sums, _ = verdicts(lanes)
    placed, low = 8 * PLACED, 8 * LEAST_SUM * n

    @compiled
    def is_certain(arguments, facts, pair, cells, numbers):
        tw, wide = get(arguments, TW), get(arguments, WIDE)
        down = (get(arguments, OH) + get(arguments, HIGH) - 1) // get(arguments, HIGH)
        across = (get(arguments, OW) + wide - 1) // wide
        if at_once(facts, numbers) != 0:
            return 1
        for which in range(2):
            tile = 2 * pair + which
            if tile < down * across:
                i0, j0 = tile // across * get(arguments, HIGH), tile % across * wide
                high = min(get(arguments, HIGH), get(arguments, OH) - i0)
                least((
                    numbers + low, cells + 8 * which * (get(arguments, TH) // CELL) * tw, facts + placed,
                    (high + CELL - 1) // CELL, min(wide, get(arguments, OW) - j0), tw,
                ))  # fmt: skip
        return by_sums(facts, numbers)

    return is_certain


def _results(lanes: Lanes, y_dtype: str) -> Any:
    """A function that writes the outputs of a pair of tiles from their transform, of which the rows are back already:
    bring_back(arguments, z, pair, target, window, noise, bias).
    """
    n, size = lanes.count, SIZE[y_dtype]
    _, back = fft_stages.transforms(lanes)
    store, near = (fft_tiles.store(lanes, stored, y_dtype in INTEGERS) for stored in ("float64", y_dtype))
    _, write, _ = rows(lanes, y_dtype)
    in_place = table.IN_PLACE_Y

    @compiled
    def bring_back(arguments, z, pair, target, window, noise, bias):
        th, tw, high, wide = get(arguments, TH), get(arguments, TW), get(arguments, HIGH), get(arguments, WIDE)
        step, across = get(arguments, STEP), (get(arguments, OW) + wide - 1) // wide
        down, floor = (get(arguments, OH) + high - 1) // high, get(arguments, FINISH) + 8
        line, across_step = get(arguments, SYH), get(arguments, SYW)
        columns = (min(wide, get(arguments, OW)) + n - 1) // n
        for g in range(columns):
            back(z + 8 * g * step, get(arguments, DOWN), th)
        first, second = 2 * pair, 2 * pair + 1
        i0, i1, j0, j1 = first // across * high, second // across * high, first % across * wide, second % across * wide
        h0, h1 = min(high, get(arguments, OH) - i0), min(high, get(arguments, OH) - i1)
        w0, w1 = min(wide, get(arguments, OW) - j0), min(wide, get(arguments, OW) - j1)
        if second >= down * across:
            h1 = 0
        # Whole registers of columns that both tiles have are written where they belong.
        whole = min(w0, w1) // n if get(arguments, in_place) != 0 and h0 == h1 else 0
        to0, to1 = target + i0 * line + j0 * across_step, target + i1 * line + j1 * across_step
        for r in range(0, max(h0, h1), CELL):
            if whole > 0:
                near((
                    to0 + r * line, to1 + r * line, z + 16 * n * r, noise, bias, floor, min(CELL, h0 - r), whole, step,
                    line // size,
                ))  # fmt: skip
            if whole * n < max(w0, w1):
                store((
                    window, window + 8 * CELL * tw, z + 16 * n * r + 8 * whole * step, noise, bias, floor, CELL,
                    columns - whole, step, tw,
                ))  # fmt: skip
                done = whole * n
                for t in range(CELL):
                    if r + t < h0 and done < w0:
                        write(to0 + (r + t) * line + done * across_step, window + 8 * t * tw, w0 - done, across_step)
                    if r + t < h1 and done < w1:
                        write(
                            to1 + (r + t) * line + done * across_step, window + 8 * (CELL + t) * tw, w1 - done,
                            across_step,
                        )  # fmt: skip

    return bring_back


def kernel(lanes: Lanes, x_dtype: str, y_dtype: str) -> Callable[..., None]:
    """The kernel, of (arguments, thread, threads)."""
    n = lanes.count
    fill = strip.filler(lanes, x_dtype)
    read, transform, sum_up = _images(lanes, x_dtype, fill), _kernels(lanes), _sums(lanes, y_dtype, fill)
    is_certain, bring_back = _certain(lanes), _results(lanes, y_dtype)
    there, back = fft_stages.transforms(lanes)
    turn, lay = fft_stages.turned(lanes), fft_stages.laid(lanes)
    product, first, more = fft_stages.products(lanes)
    begin, measured, _, _, find_noise = verdicts(lanes)
    load64, _ = scalar("float64")
    _, store32 = scalar("float32")
    offset, noise_at, facts_size = 8 * OFFSET * n, 8 * (NORM * n + 1), 8 * FACTS

    @compiled
    def transformed_rows(arguments, z, r, work):
        """The rows of a transform from r on, as many as a register has lanes, in ``work``."""
        tw = get(arguments, TW)
        turn((work, z + 16 * n * r, 2 * n * n, get(arguments, STEP), tw // n))
        there(work, get(arguments, ACROSS), tw)

    @compiled
    def summed(arguments, image, target, which, pair, memory, window, numbers):
        """The outputs of a pair of tiles, product by product."""
        taps = get(arguments, KH) * get(arguments, KW)
        a = get(arguments, PACKED) + 8 * get(arguments, WEIGHTS_AT) + 4 * which * get(arguments, C) * taps
        store32(numbers + offset, load64(get(arguments, FINISH) + 8 * (2 + which)))
        store32(numbers + offset + 4, load64(get(arguments, FINISH) + 8))
        wide = get(arguments, WIDE)
        across = (get(arguments, OW) + wide - 1) // wide
        for tile in range(2 * pair, 2 * pair + 2):
            i, j = tile // across * get(arguments, HIGH), tile % across * wide
            high = min(get(arguments, HIGH), get(arguments, OH) - i)
            if high > 0:
                sum_up(
                    arguments, memory, window, image, target + i * get(arguments, SYH) + j * get(arguments, SYW), a, i,
                    high, j, min(wide, get(arguments, OW) - j), numbers + offset,
                )  # fmt: skip

    @compiled
    def multiplied(arguments, which, memory, result, work):
        """Of a pair of tiles, transform the image, multiply it by the kernel ``which``, and bring the rows back."""
        th, tw, step, size = get(arguments, TH), get(arguments, TW), get(arguments, STEP), 8 * get(arguments, Z)
        channels, several = get(arguments, C), get(arguments, O) > 1
        for r in range(0, th, n):
            k = get(arguments, PACKED) + 16 * tw * (which * channels * th + r)
            at = memory + 16 * n * r
            if channels == 1 and not several:
                transformed_rows(arguments, memory, r, work)
                product((work, k, tw))
            else:
                for c in range(0 if several else channels):
                    transformed_rows(arguments, memory + size * c, r, work)
                    lay((at + size * c, work, step, tw // n))
                first((work, at, k, step, tw // n))
                for c in range(1, channels):
                    more((work, at + size * c, k + 16 * tw * th * c, step, tw // n))
            back(work, get(arguments, ACROSS), tw)
            turn((result + 16 * n * r, work, step, 2 * n * n, tw // n))

    @compiled
    def pair_of(arguments, image, target, g, pair, memory):
        """The outputs of a pair of tiles of a group."""
        th, tw, step, size = get(arguments, TH), get(arguments, TW), get(arguments, STEP), 8 * get(arguments, Z)
        channels, outputs = get(arguments, C), get(arguments, O)
        several = 1 if outputs > 1 else 0
        result, work = memory + size * channels * several, memory + size * (channels + several)
        window = work + 16 * n * max(th, tw)
        cells = window + 16 * CELL * tw
        numbers = cells + 8 * channels * get(arguments, CELLS)
        begin(numbers)
        for c in range(channels):
            read(
                arguments, memory + size * c, image + c * get(arguments, SXC), pair, window,
                cells + 8 * c * get(arguments, CELLS), numbers,
            )  # fmt: skip
        measured(numbers)
        facts = get(arguments, PACKED) + 8 * get(arguments, FACTS_AT) + g * outputs * facts_size
        certain = 0
        for o in range(outputs):
            certain += is_certain(arguments, facts + o * facts_size, pair, cells, numbers)
        if certain > 0:
            for c in range(channels):
                for i in range(tw // n):
                    there(memory + size * c + 8 * i * step, get(arguments, DOWN), th)
                for r in range(0, th * several, n):
                    transformed_rows(arguments, memory + size * c, r, work)
                    lay((memory + size * c + 16 * n * r, work, step, tw // n))
        for o in range(outputs):
            which, to, own = g * outputs + o, target + o * get(arguments, SYO), facts + o * facts_size
            if certain == outputs or is_certain(arguments, own, pair, cells, numbers) != 0:
                find_noise(own, numbers)
                multiplied(arguments, which, memory, result, work)
                bias = get(arguments, FINISH) + 8 * (2 + which)
                bring_back(arguments, result, pair, to, window, numbers + noise_at, bias)
            else:
                summed(arguments, image, to, which, pair, result, window, numbers)

    def convolve(arguments, thread, threads):
        memory = (get(arguments, SCRATCH) + 8 * thread * get(arguments, PER_THREAD) + 63) // 64 * 64
        th, tw, kernels = get(arguments, TH), get(arguments, TW), get(arguments, KERNELS)
        if kernels > 0:
            work = memory + 8 * get(arguments, Z)
            window = work + 16 * n * max(th, tw)
            cells = window + 16 * CELL * tw
            numbers = cells + 8 * get(arguments, CELLS)
            begin(numbers)
            task = take(arguments)
            while task < kernels:
                k = get(arguments, X) + 4 * task * get(arguments, KH) * get(arguments, KW)
                to = get(arguments, PACKED) + 16 * task * th * tw
                transform(arguments, k, to, memory, work, window, cells, numbers)
                task = take(arguments)
            return
        G_, wide = get(arguments, G), get(arguments, WIDE)
        down = (get(arguments, OH) + get(arguments, HIGH) - 1) // get(arguments, HIGH)
        pairs = (down * ((get(arguments, OW) + wide - 1) // wide) + 1) // 2
        task = take(arguments)
        while task < get(arguments, N) * G_ * pairs:
            group, pair = task // pairs, task % pairs
            i, g = group // G_, group % G_
            image = get(arguments, X) + i * get(arguments, SXN) + g * get(arguments, SXG)
            target = get(arguments, Y) + i * get(arguments, SYN) + g * get(arguments, SYG)
            pair_of(arguments, image, target, g, pair, memory)
            task = take(arguments)

    return convolve
