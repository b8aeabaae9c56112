"""The compiled kernel of ``fft_lines``: packets of segments transformed, multiplied and brought back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuconv.backends.numba_cpu import fft_lines_table as table
from gpuconv.backends.numba_cpu import fft_stages, fft_tiles, strip
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.fft_certain import FACTS, PLACED
from gpuconv.backends.numba_cpu.fft_lines_table import RUN
from gpuconv.backends.numba_cpu.fft_tiles import CELL
from gpuconv.backends.numba_cpu.fft_verdict import LEAST_SUM, NORM, OFFSET, verdicts
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.rows_kernel import row_tile
from gpuconv.backends.numba_cpu.runtime import take
from gpuconv.backends.numba_cpu.turns import turned
from gpuconv.backends.numba_cpu.vectors import INTEGERS, Lanes, get, scalar

X, PACKED, Y, SCRATCH, FINISH = strip.X, strip.WEIGHTS, strip.Y, strip.SCRATCH, strip.FINISH
SXN, SXG, SXC = strip.SXN, strip.SXG, strip.SXC
SYN, SYG, SYO, SYH, SYW = strip.SYN, strip.SYG, strip.SYO, strip.SYH, strip.SYW
N, G, C, O, OH, OW, KW = strip.N, strip.G, strip.C, strip.O, strip.OH, strip.OW, strip.KW
WIDE, PER_THREAD = strip.WIDE, strip.PER_THREAD
LENGTH, FACTORS, RAMP, Z, CELLS, FACTS_AT, WEIGHTS_AT, FINISHED, PACKETS = (
    table.LENGTH, table.FACTORS, table.RAMP, table.Z, table.CELLS, table.FACTS_AT, table.WEIGHTS_AT, table.FINISHED,
    table.PACKETS,
)  # fmt: skip

# Vectors of a tile of sums product by product, by the bits of a register.
_TILE = {512: 12, 256: 8, 128: 8}


def _sums(lanes: Lanes, y_dtype: str, fill: Any) -> Any:
    """A function that sums outputs ``first`` to ``end`` of a row product by product, in float32: sum_up(arguments,
    memory, buffer, image, target, a, i, first, end, bias); the weights at ``a`` and the bias, with the least result
    behind it, of float32.
    """
    single = Lanes.of("float32", lanes.bits)
    vectors, lane_count = _TILE[single.bits], single.count
    width = vectors * lane_count
    full, one = (row_tile(single, 1, count, (1,)) for count in (vectors, 1))
    _, narrow, _ = rows(lanes, "float32")
    _, write, _ = rows(single, y_dtype)

    @compiled
    def sum_up(arguments, memory, buffer, image, target, a, i, first, end, bias):
        taps, channels, ramp = get(arguments, KW), get(arguments, C), get(arguments, RAMP)
        count = end - first
        read = count + taps - 1
        sums = memory + 4 * (read + width)
        parts = (taps + BLOCK - 1) // BLOCK
        for c in range(channels):
            for j in range(0, read, RUN):
                here = min(RUN, read - j)
                fill(arguments, buffer, image + c * get(arguments, SXC), 1, i, 1, first + j, here, False)
                narrow(memory + 4 * j, buffer, here, 4)
            for part in range(parts):
                q = part * taps // parts
                n = (part + 1) * taps // parts - q
                finish = get(arguments, FINISHED) if c == channels - 1 and part == parts - 1 else 0
                u = 0
                while u < count:
                    given = (
                        a + 4 * (c * taps + q), memory + 4 * (u + q), ramp, sums + 4 * u, 1, n, 0, 0, c + part, finish,
                        lane_count, bias, bias + 4,
                    )  # fmt: skip
                    if count - u > lane_count:
                        full(given)
                        u += width
                    else:
                        one(given)
                        u += lane_count
        write(target + i * get(arguments, SYH) + first * get(arguments, SYW), sums, count, get(arguments, SYW))

    return sum_up


def kernel(lanes: Lanes, x_dtype: str, y_dtype: str) -> Callable[..., None]:
    """The kernel, of (arguments, thread, threads)."""
    n = lanes.count
    fill = strip.filler(lanes, x_dtype)
    sum_up = _sums(lanes, y_dtype, fill)
    turn, turn_back = turned(lanes), turned(lanes, 1, RUN // n)
    there, back = fft_stages.transforms(lanes)
    product, first, more = fft_stages.scaled(lanes)
    measure, least = fft_tiles.measure(lanes), fft_tiles.least(lanes)
    finish = fft_tiles.finish(lanes, y_dtype in INTEGERS)
    _, _, repeat = rows(lanes, x_dtype)
    _, write, _ = rows(lanes, y_dtype)
    begin, measured, at_once, by_sums, find_noise = verdicts(lanes)
    load64, _ = scalar("float64")
    _, store32 = scalar("float32")
    offset, zero_at, noise_at = 8 * OFFSET * n, 8 * (OFFSET * n + 1), 8 * (NORM * n + 1)
    low, placed, facts_size = 8 * LEAST_SUM * n, 8 * PLACED, 8 * FACTS

    @compiled
    def begin_of(arguments, segment):
        """The first output of a segment of a row: all are of one length, so that the last begins earlier."""
        return min(segment * get(arguments, WIDE), get(arguments, OW) - get(arguments, WIDE))

    @compiled
    def read(arguments, z, image, packet, buffer, zero):
        """The segments of a packet of a channel. In place of those that are missing, the last one."""
        length, read = get(arguments, LENGTH), get(arguments, WIDE) + get(arguments, KW) - 1
        segments = (get(arguments, OW) + get(arguments, WIDE) - 1) // get(arguments, WIDE)
        last = get(arguments, OH) * segments - 1
        for part in range(2):
            for r in range(0, length, RUN):
                here = min(RUN, max(0, read - r))
                for lane in range(n):
                    line, to = min(last, (2 * packet + part) * n + lane), buffer + 8 * RUN * lane
                    if here > 0:
                        start = begin_of(arguments, line % segments) + r
                        fill(arguments, to, image, 1, line // segments, 1, start, here, False)
                    if here < RUN:
                        repeat(to + 8 * here, zero, RUN - here)
                turn((z + 8 * n * (2 * r + part), buffer, 2 * n, RUN, n, RUN))

    @compiled
    def is_certain(arguments, facts, cells, numbers):
        """Whether a Fourier transform gives all outputs of a packet."""
        if at_once(facts, numbers) != 0:
            return 1
        for part in range(2):
            at = cells + 8 * part * (get(arguments, LENGTH) // CELL) * n
            least((numbers + low, at, facts + placed, (get(arguments, WIDE) + CELL - 1) // CELL, n, n))
        return by_sums(facts, numbers)

    @compiled
    def bring_back(arguments, z, target, packet, buffer, noise, bias):
        """The outputs of a packet from its transform."""
        made, step = get(arguments, WIDE), get(arguments, SYW)
        segments = (get(arguments, OW) + made - 1) // made
        lines = get(arguments, OH) * segments
        back(z, get(arguments, FACTORS), get(arguments, LENGTH))
        for part in range(2):
            for r in range(0, made, RUN):
                turn_back((buffer, z + 8 * n * (2 * r + part), RUN, 2 * n, n, n))
                finish((buffer, noise, bias, get(arguments, FINISH) + 8, RUN * n))
                for lane in range(min(n, lines - (2 * packet + part) * n)):
                    line = (2 * packet + part) * n + lane
                    start = begin_of(arguments, line % segments)
                    # What the segment before has not made.
                    begin = max(r, line % segments * made - start)
                    end = min(made, r + RUN)
                    if begin < end:
                        write(
                            target + line // segments * get(arguments, SYH) + (start + begin) * step,
                            buffer + 8 * (RUN * lane + begin - r), end - begin, step,
                        )  # fmt: skip

    @compiled
    def summed(arguments, image, target, which, packet, memory, buffer, numbers):
        """The outputs of a packet, product by product."""
        made, channels = get(arguments, WIDE), get(arguments, C)
        segments = (get(arguments, OW) + made - 1) // made
        a = get(arguments, PACKED) + 8 * get(arguments, WEIGHTS_AT) + 4 * which * channels * get(arguments, KW)
        store32(numbers + offset, load64(get(arguments, FINISH) + 8 * (2 + which)))
        store32(numbers + offset + 4, load64(get(arguments, FINISH) + 8))
        for line in range(2 * n * packet, min(2 * n * (packet + 1), get(arguments, OH) * segments)):
            begin = line % segments * made
            end = min(begin + made, get(arguments, OW))
            sum_up(arguments, memory, buffer, image, target, a, line // segments, begin, end, numbers + offset)

    @compiled
    def packet_of(arguments, image, target, g, packet, memory):
        """The outputs of a packet of a group."""
        length, size = get(arguments, LENGTH), 8 * get(arguments, Z)
        channels, outputs = get(arguments, C), get(arguments, O)
        several = 1 if outputs > 1 else 0
        result, buffer = memory + size * channels * several, memory + size * (channels + several)
        cells = buffer + 8 * RUN * n
        numbers = cells + 8 * channels * get(arguments, CELLS)
        begin(numbers)
        for c in range(channels):
            at = cells + 8 * c * get(arguments, CELLS)
            read(arguments, memory + size * c, image + c * get(arguments, SXC), packet, buffer, numbers + zero_at)
            measure((memory + size * c, at, at + 8 * length // CELL * n, numbers, length // CELL))
        measured(numbers)
        facts = get(arguments, PACKED) + 8 * get(arguments, FACTS_AT) + g * outputs * facts_size
        certain = 0
        for o in range(outputs):
            certain += is_certain(arguments, facts + o * facts_size, cells, numbers)
        if certain > 0:
            for c in range(channels):
                there(memory + size * c, get(arguments, FACTORS), length)
        for o in range(outputs):
            which, to, own = g * outputs + o, target + o * get(arguments, SYO), facts + o * facts_size
            if certain == outputs or is_certain(arguments, own, cells, numbers) != 0:
                find_noise(own, numbers)
                k = get(arguments, PACKED) + 16 * which * channels * length
                if several != 0:
                    first((result, memory, k, length))
                else:
                    product((result, k, length))
                for c in range(1, channels):
                    more((result, memory + size * c, k + 16 * c * length, length))
                bias = get(arguments, FINISH) + 8 * (2 + which)
                bring_back(arguments, result, to, packet, buffer, numbers + noise_at, bias)
            else:
                summed(arguments, image, to, which, packet, result, buffer, numbers)

    def convolve(arguments, thread, threads):
        memory = (get(arguments, SCRATCH) + 8 * thread * get(arguments, PER_THREAD) + 63) // 64 * 64
        G_, packets = get(arguments, G), get(arguments, PACKETS)
        task = take(arguments)
        while task < get(arguments, N) * G_ * packets:
            group, packet = task // packets, task % packets
            i, g = group // G_, group % G_
            image = get(arguments, X) + i * get(arguments, SXN) + g * get(arguments, SXG)
            target = get(arguments, Y) + i * get(arguments, SYN) + g * get(arguments, SYG)
            packet_of(arguments, image, target, g, packet, memory)
            task = take(arguments)

    return convolve
