"""The compiled part of ``pixels``: units of work, their lists of pixels, and the loops around the micro-kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuconv.backends.numba_cpu import runtime
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.pixels_kernel import PIXELS, packing_of, put, tile, zeros
from gpuconv.backends.numba_cpu.runtime import take
from gpuconv.backends.numba_cpu.turns import BUFFER, overlapping, turns
from gpuconv.backends.numba_cpu.vectors import SIZE, Lanes, get

IN_PLACE, STRIPS, TAPS = range(3)

# The table of arguments.
X, WEIGHTS, Y, SCRATCH, FINISH, FILL = range(runtime.ARRAYS)
(
    SXN, SXG, SXC, SXH, SXW, SYN, SYG, SYO, SYH, SYW,  # steps in bytes
    COPY_X, COPY_Y,  # whether x and y are copied
    RAW, PLACES, SKG, SKO,  # whether weights are still to be packed; where their products go, and their steps
    N, G, C, O, H, W, OH, OW, KH, KW, TOP, LEFT, DOWN, ACROSS, STEP_DOWN, STEP_ACROSS,  # strides, dilations
    WAY, IMAGES, HIGH, WIDE, COUNT, SHARES,  # a unit: images, output rows and columns, pixels; shares of the panels
    INSIDE, STAGES, STAGE_TABLE, RUN_TABLE,  # whether weights are the inner loop
    PIXEL, PITCH, INPUTS, SUMS,  # elements of a copied pixel, of a row, of the copies
    LISTS, FINISHED, PER_THREAD,  # lists of pixels; whether a bias or an activation ends the sums; bytes in all
) = range(runtime.ARRAYS, runtime.ARRAYS + 49)  # fmt: skip


def _copier(lanes: Lanes, stored: str) -> Any:
    """A function that copies a window of an image, with what lies outside: copy(arguments, to, pitch, image, top, high,
    left, wide, buffer).
    """
    size, stored_size = lanes.size, SIZE[stored]
    read, _, fill = rows(lanes, stored)
    gather, _ = turns(lanes, stored)

    @compiled
    def copy(arguments, to, pitch, image, top, high, left, wide, buffer):
        H_, W_, C_, constant = get(arguments, H), get(arguments, W), get(arguments, C), get(arguments, FILL)
        sxc, sxw, pixel = get(arguments, SXC), get(arguments, SXW), get(arguments, PIXEL)
        start = min(max(-left, 0), wide)
        stop = min(max(W_ - left, start), wide)
        one = sxc * C_ == sxw and pixel == C_  # all channels of all pixels have one step
        if sxc != stored_size and get(arguments, SXH) == W_ * sxw and pitch == W_ * pixel:
            if start == 0 and stop == wide and wide == W_ and top >= 0 and top + high <= H_:  # one run of pixels
                gather(to, pixel, image + top * get(arguments, SXH), C_, high * W_, sxc, sxw, buffer)
                return
        for row in range(high):
            line = to + row * pitch * size
            if top + row < 0 or top + row >= H_ or start == stop:
                fill(line, constant, wide * pixel)
            else:
                fill(line, constant, start * pixel)
                fill(line + stop * pixel * size, constant, (wide - stop) * pixel)
                source = image + (top + row) * get(arguments, SXH) + (left + start) * sxw
                if one:
                    read(line + start * pixel * size, source, (stop - start) * C_, sxc)
                elif sxc == stored_size:
                    for column in range(start, stop):
                        read(line + column * pixel * size, source, C_, sxc)
                        source += sxw
                else:
                    gather(line + start * pixel * size, pixel, source, C_, stop - start, sxc, sxw, buffer)

    return copy


def _multiplier(lanes: Lanes, vectors: int) -> Any:
    """A function that multiplies listed pixels with panels [o0, o1) of the ``weights`` of a group. Panel o1 will be the
    one at ``ahead``, of the same form or still to be packed; 0 if there is none.
    """
    size, width, most = lanes.size, vectors * lanes.count, PIXELS[lanes.bits][vectors]
    half, line, fetching = most // 2, 64 // lanes.size, lanes.bits < 512
    # A few pixels less than a tile are made of smaller tiles.
    tile0, tile1, tile2, tile3 = (tile(lanes, count, vectors) for count in (most, half, 2, 1))
    # Sums fewer than these wait for each other: what does not divide is better spread over tiles of one pixel less.
    fewer = most - 1 if lanes.bits == 256 and vectors > 1 else most
    tile4 = tile(lanes, fewer, vectors) if fewer < most else tile0

    @compiled
    def sized(left):
        """The pixels of the next tile."""
        missing = -left % most
        if fewer < most and missing > 0 and left >= missing * fewer:
            return fewer
        return most if left >= most else half if left >= half else min(left, 2)

    zero = zeros(lanes, vectors)

    @compiled
    def multiply(arguments, g, weights, o0, o1, ahead, count, x, y, px, py, counts, lists):
        O_, stages, inside = get(arguments, O), get(arguments, STAGES), get(arguments, INSIDE)
        stage_table, run_table, by_taps = get(arguments, STAGE_TABLE), get(arguments, RUN_TABLE), lists != 0
        raw = get(arguments, RAW)
        products = get(arguments, C) * get(arguments, KH) * get(arguments, KW)
        padded = (O_ + width - 1) // width * width
        finish = get(arguments, FINISH)
        left = count if inside else 0
        i, j, panel = px, py, size * width * products
        while left > 0:  # one stage, and all panels of it for each tile of pixels
            made = sized(left)
            R, final = get(stage_table, 1), get(arguments, FINISHED)
            a, place, last = weights + o0 * panel, y + size * o0 * width, O_ - o0 * width
            bias = finish + size * (2 + final * (width + g * padded + o0 * width))
            floor = finish + size * final
            following, rate, share = a, 0, panel
            if fetching and get(arguments, COPY_Y) == 0 and get(arguments, SYW) == size * O_:
                # What the next tile writes, fetched evenly over the panels and their products: memory that is only
                # written is waited for like any other.
                share = made * size * O_ // (o1 - o0)
                following = y + size * get(j, 0) + made * size * O_
                rate = min((share // size + products - 1) // products, line // 4)
            for _ in range(o0, o1):
                if made == most:
                    tile0((a, x, run_table, i, j, place, R, 0, final, last, bias, floor, following, rate))
                elif made == half:
                    tile1((a, x, run_table, i, j, place, R, 0, final, last, bias, floor, following, rate))
                elif made == fewer:
                    tile4((a, x, run_table, i, j, place, R, 0, final, last, bias, floor, following, rate))
                elif made == 2:
                    tile2((a, x, run_table, i, j, place, R, 0, final, last, bias, floor, following, rate))
                else:
                    tile3((a, x, run_table, i, j, place, R, 0, final, last, bias, floor, following, rate))
                a += panel
                following += share
                place += size * width
                bias += size * width * final
                last -= width
            left -= made
            i += 8 * made
            j += 8 * made
        for o in range(o1 if inside else o0, o1):
            last = O_ - o * width
            place = y + size * o * width
            if by_taps:
                zero((py, place, count, last))
            for s in range(stages):
                stage = stage_table + 56 * s
                a = weights + o * panel + size * width * get(stage, 3)
                run, R, here = run_table + 24 * get(stage, 0), get(stage, 1), get(stage, 2)
                left, i, j = count, px, py
                if by_taps:
                    left = get(counts, s)
                    i, j = lists + 16 * count * s, lists + 8 * count * (2 * s + 1)
                # What comes next, fetched evenly over the tiles of this stage.
                following = 0
                if raw:  # its own panel is in the cache, and of the next one each stage fetches a part
                    if ahead != 0:
                        following = ahead + size * width * get(stage, 3)
                elif s + 1 < stages:
                    following = weights + o * panel + size * width * get(stage, 10)
                elif o + 1 < o1:
                    following = weights + (o + 1) * panel + size * width * get(stage_table, 3)
                elif ahead != 0:
                    following = ahead + size * width * get(stage_table, 3)
                rate = 0
                if following == 0:
                    following = a
                else:
                    tiles = (left + most - 1) // most
                    rate = min((width + tiles - 1) // max(tiles, 1), line)
                fetched = size * rate * here
                more = 1 if by_taps or s > 0 else 0
                final = get(arguments, FINISHED) if s + 1 == stages else 0
                bias = finish + size * (2 + final * (width + g * padded + o * width))
                floor = finish + size * final
                while left > 0:
                    made = sized(left)
                    if made == most:
                        tile0((a, x, run, i, j, place, R, more, final, last, bias, floor, following, rate))
                    elif made == half:
                        tile1((a, x, run, i, j, place, R, more, final, last, bias, floor, following, rate))
                    elif made == fewer:
                        tile4((a, x, run, i, j, place, R, more, final, last, bias, floor, following, rate))
                    elif made == 2:
                        tile2((a, x, run, i, j, place, R, more, final, last, bias, floor, following, rate))
                    else:
                        tile3((a, x, run, i, j, place, R, more, final, last, bias, floor, following, rate))
                    left -= made
                    i += 8 * made
                    j += 8 * made
                    following += fetched

    return multiply


def _lister(lanes: Lanes, stored: str) -> Any:
    """A function that lists the pixels of a unit and copies what they read: how many they are, and where x is."""
    size, stored_size = lanes.size, SIZE[stored]
    copy = _copier(lanes, stored)
    read, _, _ = rows(lanes, stored)
    gather, _ = turns(lanes, stored)
    # Squares are made of every second pixel as it lies.
    square, even = lanes.count, overlapping(lanes) and stored == lanes.dtype

    @compiled
    def listed(arguments, unit, g, px, py, targets, counts, lists, copied, pitch_y, buffer):
        way, C_, copy_x, copy_y = get(arguments, WAY), get(arguments, C), get(arguments, COPY_X), get(arguments, COPY_Y)
        OH_, OW_, down, across = get(arguments, OH), get(arguments, OW), get(arguments, DOWN), get(arguments, ACROSS)
        H_, W_, top, left = get(arguments, H), get(arguments, W), get(arguments, TOP), get(arguments, LEFT)
        step_down, step_across = get(arguments, STEP_DOWN), get(arguments, STEP_ACROSS)
        sxn, sxh, sxw, pitch = get(arguments, SXN), get(arguments, SXH), get(arguments, SXW), get(arguments, PITCH)
        syn, syh, syw, pixel = get(arguments, SYN), get(arguments, SYH), get(arguments, SYW), get(arguments, PIXEL)
        image = get(arguments, X) + g * get(arguments, SXG)
        x = copied if copy_x else image
        most = get(arguments, INPUTS) // pixel  # that the copy has room for
        wider = even and across == 2 and sxw == size and sxh == W_ * size
        high, wide = get(arguments, HIGH), get(arguments, WIDE)
        # The first pixel and how many; columns [j0, j1); bytes from x to the first pixel's, and from pixel to pixel.
        if way == IN_PLACE:
            first = unit * get(arguments, COUNT)
            count = min(get(arguments, COUNT), get(arguments, N) * OH_ * OW_ - first)
            n, i, j = first // (OH_ * OW_), first // OW_ % OH_, first % OW_
            j0, j1 = 0, OW_
            at, to_n, to_i, to_j = -top * sxh - left * sxw, sxn, down * sxh, across * sxw
        elif way == STRIPS:
            strips, columns = (OH_ + high - 1) // high, (OW_ + wide - 1) // wide
            n, place = unit // (strips * columns), unit % (strips * columns)
            i, j0 = place // columns * high, place % columns * wide
            j, j1 = j0, min(j0 + wide, OW_)
            high, wide = min(high, OH_ - i), j1 - j0
            count = high * wide
            copy(
                arguments, copied, pitch, image + n * sxn, i * down - top,
                (high - 1) * down + (get(arguments, KH) - 1) * step_down + 1, j0 * across - left,
                (wide - 1) * across + (get(arguments, KW) - 1) * step_across + 1, buffer,
            )  # fmt: skip
            to_n, to_i, to_j = 0, size * down * pitch, size * across * pixel
            at = -i * to_i - j0 * to_j
        else:
            n = unit * get(arguments, IMAGES)
            images = min(get(arguments, IMAGES), get(arguments, N) - n)
            count = images * OH_ * OW_
            i, j, j0, j1 = 0, 0, 0, OW_
            at, to_n, to_i, to_j = 0, 0, 0, 0
            x_n, x_h, x_w = sxn // size, sxh // size, sxw // size
            if copy_x:
                for m in range(images):
                    copy(arguments, copied + size * m * H_ * pitch, pitch, image + (n + m) * sxn, 0, H_, 0, W_, buffer)
                x_n, x_h, x_w = H_ * pitch, pitch, pixel
            else:
                x += n * sxn
        q, ready = 0, 0
        while q < count:  # the pixels of a row at a time, which are at equal steps
            run = min(j1 - j, count - q)
            target = n * syn + i * syh + j * syw
            source = at + n * to_n + i * to_i + j * to_j
            from_x, step_x = source // size, to_j // size
            from_y, step_y = target // size, syw // size
            if way == IN_PLACE and copy_x:
                from_x, step_x = q * pixel, pixel
                if q == ready:
                    # The rest of a row, or of the plane where rows follow each other.
                    length = OW_ - j
                    if across * OW_ == W_ and down == 1 and to_i == OW_ * to_j:
                        length += (OH_ - 1 - i) * OW_
                    length = min(length, count - q)
                    ready = q + length
                    # Every second pixel of a short row: what is read beyond, which is in the plane and will be written
                    # over, makes a whole square of it; to leave out lanes takes many times as long.
                    if wider and length < square and q + square <= most:
                        if (i * down - top) * W_ + j * across - left + 2 * square <= H_ * W_:
                            length = square
                    if get(arguments, SXC) == stored_size:
                        for u in range(length):
                            read(copied + size * (q + u) * pixel, image + source + u * to_j, C_, stored_size)
                    else:
                        at_q = copied + size * q * pixel
                        gather(at_q, pixel, image + source, C_, length, get(arguments, SXC), to_j, buffer)
            if copy_y:
                from_y, step_y = q * pitch_y, pitch_y
                for u in range(run):
                    put(targets, q + u, target + u * syw)
            for u in range(run):
                put(px, q + u, from_x + u * step_x)
                put(py, q + u, from_y + u * step_y)
            q += run
            j, i = j0, i + 1
            if i == OH_:
                i = 0
                n += 1
        if way == TAPS:
            for s in range(get(arguments, STAGES)):
                stage = get(arguments, STAGE_TABLE) + 56 * s
                to_x, to_y = lists + 16 * count * s, lists + 8 * count * (2 * s + 1)
                t, found = get(stage, 5) * step_down - top, 0
                l = get(stage, 6) * step_across - left
                for q in range(count):
                    m, i, j = q // (OH_ * OW_), q // OW_ % OH_ * down + t, q % OW_ * across + l
                    if i >= 0 and i < H_ and j >= 0 and j < W_:
                        put(to_x, found, m * x_n + i * x_h + j * x_w)
                        put(to_y, found, get(py, q))
                        found += 1
                put(counts, s, found)
        return count, x

    return listed


def _writer(lanes: Lanes, stored: str) -> Any:
    """A function that writes sums of listed pixels to y: written(arguments, y, targets, sums, pitch, outputs, count,
    buffer).
    """
    size, stored_size = lanes.size, SIZE[stored]
    _, write, _ = rows(lanes, stored)
    _, scatter = turns(lanes, stored)

    @compiled
    def written(arguments, y, targets, sums, pitch, outputs, count, buffer):
        syo, syw = get(arguments, SYO), get(arguments, SYW)
        first = 0
        while first < count:
            stop = first + 1
            if syo == stored_size:
                write(y + get(targets, first), sums + size * first * pitch, outputs, syo)
            else:
                while stop < count and get(targets, stop) - get(targets, stop - 1) == syw:
                    stop += 1
                place = y + get(targets, first)
                scatter(place, pitch, sums + size * first * pitch, outputs, stop - first, syo, syw, buffer)
            first = stop

    return written


def kernel(lanes: Lanes, vectors: int, x_dtype: str, y_dtype: str) -> Callable[..., None]:
    """The kernel: units of work are shared out over the threads."""
    size, width = lanes.size, vectors * lanes.count
    written, pack = _writer(lanes, y_dtype), packing_of(lanes, vectors)
    listed, multiply = _lister(lanes, x_dtype), _multiplier(lanes, vectors)

    def work(arguments, thread, threads):
        scratch = (get(arguments, SCRATCH) + 63) // 64 * 64 + thread * get(arguments, PER_THREAD)
        most = get(arguments, COUNT)
        px = scratch
        py = px + 8 * most
        targets = py + 8 * most
        counts = targets + 8 * most
        lists = counts + 8 * get(arguments, LISTS) if get(arguments, WAY) == TAPS else 0
        buffer = (counts + 8 * get(arguments, LISTS) * (2 * most + 1) + 63) // 64 * 64
        copied = buffer + BUFFER
        sums = copied
        if get(arguments, COPY_X):
            sums = (copied + size * get(arguments, INPUTS) + 63) // 64 * 64
        own = sums
        if get(arguments, COPY_Y):
            own = (sums + size * get(arguments, SUMS) + 63) // 64 * 64
        products = get(arguments, C) * get(arguments, KH) * get(arguments, KW)
        shares, G_, O_ = get(arguments, SHARES), get(arguments, G), get(arguments, O)
        panels = (O_ + width - 1) // width
        way = get(arguments, WAY)
        if way == IN_PLACE:
            units = (get(arguments, N) * get(arguments, OH) * get(arguments, OW) + most - 1) // most
        elif way == STRIPS:
            units = (get(arguments, OH) + get(arguments, HIGH) - 1) // get(arguments, HIGH)
            units *= (get(arguments, OW) + get(arguments, WIDE) - 1) // get(arguments, WIDE) * get(arguments, N)
        else:
            units = (get(arguments, N) + get(arguments, IMAGES) - 1) // get(arguments, IMAGES)
        tasks = G_ * shares * units
        # Sums that are copied to y: of a panel at a time, where panels are the outer loop. So are panels packed.
        copy_y, raw, at_once = get(arguments, COPY_Y), get(arguments, RAW), (panels + shares - 1) // shares
        if raw or (copy_y and get(arguments, INSIDE) == 0):
            at_once = 1
        pitch = at_once * width
        held, count, x = -1, 0, 0  # the unit whose pixels are listed
        while True:
            task = take(arguments)
            if task >= tasks:
                break
            g, unit, share = task // (shares * units), task // shares % units, task % shares
            o0, o1 = share * panels // shares, (share + 1) * panels // shares
            if held != task // shares:
                held = task // shares
                count, x = listed(arguments, unit, g, px, py, targets, counts, lists, copied, pitch, buffer)
            y = get(arguments, Y) + g * get(arguments, SYG)
            weights = get(arguments, WEIGHTS) + size * g * panels * width * products
            packed, step = weights, size * width * products
            if raw:
                weights, step = get(arguments, WEIGHTS) + g * get(arguments, SKG), width * get(arguments, SKO)
            for o in range(o0, o1, at_once):
                end = min(o + at_once, o1)
                # What this thread is likely to have next: where shares are panels, other threads take one each.
                after = o + threads if end == o1 and shares == panels else end
                ahead = weights + after * step if after < (panels if shares == panels else o1) else 0
                if raw:
                    source = weights + o * step
                    pack(own, source, get(arguments, PLACES), get(arguments, SKO), O_ - o * width, 0, products)
                    packed = own - size * o * width * products
                place = sums - size * o * width if copy_y else y
                multiply(arguments, g, packed, o, end, ahead, count, x, place, px, py, counts, lists)
                if copy_y:
                    present = min(O_, end * width) - o * width
                    target = y + o * width * get(arguments, SYO)
                    written(arguments, target, targets, sums, pitch, present, count, buffer)

    return work
