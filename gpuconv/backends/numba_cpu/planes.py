"""Convolution with one input channel per output, in place: depthwise layers and image filters of up to seven rows.

    y[n,g,o,i,j] = b[g,o] + Σ_pq x[n,g, i·s+p-pad, j·r+q·d-pad] · k[g,o,p,q]

Planes are read and written where they lie, a few columns wide and many rows high at a time (``planes_kernel``). Nothing
is padded: what a tile at the border would read outside is left out. Operands with other steps between columns, and
16-bit floats, pass through a copy of the lines that some rows of outputs read.

Where the rows of the kernel are d apart, outputs d rows apart share lines, and others none: every d-th row of outputs
and every d-th line make a convolution of their own, without dilation of rows, on views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.planes_kernel import ANYWHERE, INSIDE, STREAMED, band
from gpuconv.backends.numba_cpu.strip import ALONE
from gpuconv.backends.numba_cpu.vectors import Lanes, get, scalar, settle
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.planes"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

# Kernel rows whose weights have registers of their own beside the sums.
_ROWS = 7
# Registers for sums, weights and what is read, with 512 bits; others may have sixteen in all.
_REGISTERS = 16
# The most that kernel rows are apart, each of which takes a call.
_APART = 16
# Bytes of a line, of which a few together stay in a core's second-level cache.
_LINE = 1 << 16
# Bytes of a result that the last-level cache will not hold beside x. 2048²: 3×3 1.2, 5×5 1.7, 7×7 1.3 times as fast
# past the caches; half of that size stays in the cache, and is written there twice as fast. With AVX2 never: 2048² 1.0,
# 0.5 and 1.0 times as fast, three such planes 0.3, and 6144² 0.3.
_STREAM = 1 << 24
# Vectors of a tile of a single row, as many as hide how long a multiplication takes. 10⁶ pixels, 5 to 256 taps: 6 to
# 11 times as fast as tiles of several rows, which are never filled then (AVX2).
_SIGNAL = 8
# Vectors of a row of outputs from which on it is wide.
_WIDE = 64
# Bytes between the columns of a transposed image, or a multiple, that put them all in few places of the caches; and how
# many are then copied together, so that their lines stay in the first level. 1024² and 2048²: 3 times as fast (AVX2).
_FAR, _ABREAST = 1024, 8
# Bytes from line to line, or a multiple, that put all lines of an image in one place of the first-level cache, and the
# kernel rows beyond which a tile has more lines than fit there. 2048²: 7×7 1.1 times as fast from a copy, 5×5 0.8.
_SAME_PLACE, _ROOM = 4096, 5
# Rows of outputs whose lines are copied together, and the most bytes of them. Against a row of tiles after the other,
# which copies some lines for each again: bytes 1.05 to 1.2 times as fast, other columns 1 to 1.1 times (AVX2).
_COPIED_ROWS, _COPIED = 16, 1 << 18
# Bytes of planes that stay in the first-level cache, and of small planes of sums that are written out together.
_FIRST, _TOGETHER = 24 << 10, 8 << 10

# Of all arrays: beyond, extents may not be numbers of 64 bits.
_BYTES = 1 << 62

# The table of arguments.
X, WEIGHTS, Y, SCRATCH, FINISH, *_ = range(runtime.ARRAYS)
(
    SXN, SXG, SXH, SXW, SYN, SYG, SYO, SYH, SYW, SKG, SKO, SKP, SKQ,  # steps in bytes
    N, G, O, H, W, OH, OW, KW, TOP, LEFT, STEP,
    HIGH, TALL, WIDE, LINES, PITCH, PER_THREAD,  # rows of a tile; outputs of a task; lines and elements of its copy
    NEAR_X, NEAR_Y, STREAM, FINISHED, AT_ONCE,
) = range(runtime.ARRAYS, runtime.ARRAYS + 35)  # fmt: skip


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why this cannot run ``problem``."""
    reasons = dense.unsupported(problem, target)
    inputs = problem.O if problem.op == "input_grad" else problem.C
    if inputs != problem.groups:
        reasons.append(f"it sums over one channel per group, not {inputs // problem.groups}")
    if problem.layout != "NCHW":
        reasons.append("it is for layout NCHW: rows of one channel")
    if problem.padding_mode != "constant" or problem.fill != 0:
        reasons.append("it pads with zeros only")
    if problem.KH > _ROWS:
        reasons.append(f"it has registers for the weights of {_ROWS} kernel rows, not {problem.KH}")
    if problem.KH * problem.KW > BLOCK:
        reasons.append(f"it has one sum for all products, of which there are to be at most {BLOCK}")
    if _dilated(problem) and problem.dilation[0] > _APART:
        reasons.append(f"it is for kernel rows at most {_APART} apart, not {problem.dilation[0]}")
    if _dilated(problem) and problem.op == "forward" and problem.stride[0] > 1:
        reasons.append("it has no dilation of the kernel's rows with a stride of more than 1")
    if problem.bytes >= _BYTES:
        reasons.append(f"its arrays are larger than any memory, {problem.bytes} bytes")
    if problem.op == "forward" and max(problem.stride) > 2:
        reasons.append("it is for strides of 1 and 2")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the tile and the tasks."""
    return dense.plan(_plan, problem, target, limit)


def tile_of(problem: Conv2dProblem, lanes: Lanes) -> tuple[int, int]:
    """Rows and vectors of a tile: one vector where a row of outputs has no more, one row where there are no more."""
    if problem.OH == problem.KH == 1 and problem.OW > _SIGNAL * lanes.count:
        return 1, _SIGNAL // problem.stride[1]
    if lanes.bits == 512:
        return (8, 2) if problem.OW > lanes.count else (14 if problem.OH > 8 else 8, 1)
    across = problem.stride[1]
    # Of wide images, whose lines are often a power of two apart, the first-level cache holds few: eight, of stride 1.
    if problem.OW >= _WIDE * lanes.count:
        return max(4, min((_REGISTERS + 1 - 2 * across - problem.KH) // 2, 9 - problem.KH)), 2
    most = max(7, min(10, _REGISTERS - 2 - problem.KH - across))
    bands = -(-problem.OH // most)
    # Only whole tiles are inside.
    return (problem.OH // bands if problem.OH % max(bands, 1) == 0 < bands - 1 else most), 1


def _streams(problem: Conv2dProblem, lanes: Lanes) -> bool:
    """Whether results go past the caches."""
    return lanes.bits == 512 and problem.result_size * lanes.size >= _STREAM


def _collides(problem: Conv2dProblem, lanes: Lanes, x: Any) -> bool:
    """Whether the lines of a tile push each other out of the first-level cache, which take less to copy."""
    return bool(lanes.bits < 512 and problem.KH > _ROOM and problem.stride[0] == 1 and x.strides[3] % _SAME_PLACE == 0)


def _dilated(problem: Conv2dProblem) -> bool:
    return problem.KH > 1 and problem.dilation[0] > 1


def _apart(problem: Conv2dProblem) -> Iterator[tuple[slice, slice, Conv2dProblem]]:
    """The lines, the rows of outputs and the problem of each convolution that dilated rows are cut into."""
    step, (top, _) = problem.dilation[0], problem.padding[0]
    for first in range(min(step, problem.OH)):
        skipped, line = divmod(first - top, step)
        lines, outputs = slice(line, None, step), slice(first, None, step)
        high, made = len(range(problem.H)[lines]), len(range(problem.OH)[outputs])
        pads = -skipped, made + problem.KH - 1 - high + skipped
        dilation = 1, problem.dilation[1]
        yield lines, outputs, replace(problem, H=high, padding=(pads, problem.padding[1]), dilation=dilation)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    if not _dilated(problem):
        return _plan_lines(problem, target, limit)
    parts = [(lines, outputs, _plan_lines(part, target, limit)) for lines, outputs, part in _apart(problem)]
    if not parts:
        return _plan_lines(replace(problem, dilation=(1, 1)), target, limit)
    plan = parts[0][2]
    detail = f"rows {problem.dilation[0]} apart, {len(parts)} times {plan.detail}"
    workspace = max(part.workspace for _, _, part in parts)
    return Plan(problem, workspace, plan.sums_in, detail, {"lanes": plan.config["lanes"], "apart": parts})


def _plan_lines(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = dense.lanes_of(problem, target)
    (down, across), step = problem.stride, problem.dilation[1]
    height, vectors = tile_of(problem, lanes)
    width = vectors * lanes.count
    reach = (problem.KW - 1) * step + 1
    planes, bands, tiles_across = problem.N * problem.O, -(-problem.OH // height), -(-problem.OW // width)
    apart = 64 // lanes.size  # elements of a cache line, for each thread to begin at one

    def together(tiles: int) -> int:
        """Planes of one tile each whose sums are kept until they are written out."""
        if problem.O != problem.groups or bands > 1 or tiles * width < problem.OW:
            return 1
        return max(1, min(problem.O, _TOGETHER // (height * tiles * width * lanes.size)))

    def each(tiles: int) -> int:
        return together(tiles) * height * tiles * width + apart

    def copied(tall: int, tiles: int) -> tuple[int, int, int]:
        """Lines, elements of each, and all of what a thread copies for ``tall`` by ``tiles`` tiles, and their sums."""
        lines = (tall * height - 1) * down + problem.KH
        # An odd number of cache lines: lines of the image below each other are in different places of the caches.
        pitch = (-(-(tiles * width * across + reach) // apart) | 1) * apart
        return lines, pitch, lines * pitch + height * tiles * width + apart

    def scratch(most: int) -> int:
        weights = problem.O * problem.KH * problem.KW * lanes.size
        return target.threads * most * lanes.size + weights + problem.O * lanes.size + 4096

    def needed(tall: int, tiles: int) -> int:
        return scratch(max(each(tiles), copied(tall, tiles)[2]))

    tall, tiles = schedule.fit((bands, tiles_across), needed, limit, f"{NAME} on {problem}")
    tiles = schedule.halved(tiles, lambda t: (t * width * across + reach) * lanes.size <= _LINE)
    # Enough tasks for every thread, where there are few planes of few rows.
    parts = -(-4 * target.threads // max(planes * bands, 1))
    tiles = min(tiles, max(1, tiles_across // parts))
    # What is copied: much of what two tiles read that lie one below the other is the same.
    tall = schedule.halved(
        min(tall, max(1, _COPIED_ROWS // height)),
        lambda t: (
            copied(t, tiles)[2] * lanes.size <= _COPIED
            and planes * (bands // t) * (tiles_across // tiles) >= 4 * target.threads
        ),
    )
    threads = 1 if problem.result_size * problem.products < ALONE else target.threads
    high = -(-problem.OH // max(bands, 1))
    # Planes of which one tile after the other is made: all, where that is all there is of a plane, else those that stay
    # in the first-level cache together.
    at_once = 1
    if problem.O == problem.groups:
        if bands == 1 and tiles * width >= problem.OW:
            at_once = problem.O
        elif lanes.bits < 512 and planes >= 16 * target.threads:
            at_once = _FIRST // ((problem.H * problem.W + problem.OH * problem.OW) * lanes.size)
    at_once = max(1, min(at_once, problem.O))
    table = np.zeros(runtime.TABLE, np.int64)
    for index, value in {
        N: problem.N, G: problem.groups, O: problem.O // problem.groups, H: problem.H, W: problem.W, OH: problem.OH,
        OW: problem.OW, KW: problem.KW, TOP: problem.padding[0][0], LEFT: problem.padding[1][0], STEP: step,
        HIGH: high, TALL: high, WIDE: tiles * width, LINES: 0, PITCH: 0, PER_THREAD: each(tiles),
        STREAM: _streams(problem, lanes), FINISHED: problem.bias or problem.activation is not None,
    }.items():  # fmt: skip
        table[index] = value
    detail = f"tiles of {height} rows × {width} columns, in place where the columns lie side by side, {lanes}"
    lines, pitch, size = copied(tall, tiles)
    copy = {TALL: tall * high, LINES: lines, PITCH: pitch, PER_THREAD: size}
    config = {"lanes": lanes, "table": table, "copy": copy, "threads": threads, "at_once": at_once,
              "together": together(tiles)}  # fmt: skip
    return Plan(problem, scratch(max(each(tiles), size)), lanes.dtype, detail, config)


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it; where rows are apart, the first."""
    if "apart" in plan.config:
        return kernel_name(plan.config["apart"][0][2])
    return kernel_of(plan.problem, plan.config["lanes"])[0]


def pack_key(plan: Plan) -> Any:
    """What the kept weights depend on besides the weights."""
    return "one channel", plan.sums_in


def pack(plan: Plan, operands: Operands) -> Any:
    """The weights in the type of the sums, as they are."""
    return dense.converted(operands.k, plan.sums_in)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    dense.once(Bound, plan, operands, out)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, ``out``, and the weights ``k`` where they are not packed already."""
        problem, config, self.plan = plan.problem, plan.config, plan
        self.lanes = lanes = config["lanes"]
        self.alone = problem.result_size * problem.products < ALONE
        self.apart = [
            (Bound(part, x[..., lines, :], k, out[..., outputs, :]), lines, outputs)
            for lines, outputs, part in config.get("apart", ())
        ]
        if self.apart:
            self.alone = all(bound.alone for bound, _, _ in self.apart)
            return
        # Weights that cannot be read in place are copied on every call, as this view of them: a repeated call has the
        # caller's own array, whose axes may be in another order.
        self.copied = None
        if k is not None and not dense.is_readable(k, lanes):
            self.copied = k.shape, k.strides
        form = problem.groups, problem.O // problem.groups, 1, problem.KH, problem.KW
        like = np.empty(form, lanes.dtype) if k is None or self.copied else k
        table = config["table"].copy()
        table[[SXN, SXG, SXH, SXW]] = *x.strides[:2], *x.strides[3:]
        table[[SYN, SYG, SYO, SYH, SYW]] = out.strides
        table[[SKG, SKO, SKP, SKQ]] = *like.strides[:2], *like.strides[3:]
        table[NEAR_X] = dense.is_near(x, lanes) and not _collides(problem, lanes, x)
        table[NEAR_Y] = dense.is_near(out, lanes)
        if table[NEAR_X]:
            table[AT_ONCE] = config["at_once" if table[NEAR_Y] else "together"]
        else:
            table[AT_ONCE] = 1
            for index, value in config["copy"].items():
                table[index] = value
        self.scratch = 1 if table[NEAR_X] and table[NEAR_Y] else config["threads"] * int(table[PER_THREAD])
        name, make = kernel_of(problem, lanes)
        self.task = runtime.Task(runtime.kernel(name, make), table[runtime.ARRAYS :], config["threads"], plan)
        self.finish = dense.finishing(problem, None, problem.O // problem.groups, 0, lanes)

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if self.apart:
            for bound, lines, outputs in self.apart:
                bound(x[..., lines, :], k, packed, bias, out[..., outputs, :])
            return
        problem = self.plan.problem
        if packed is None:
            packed = k
            if self.copied is not None:
                packed = dense.converted(np.lib.stride_tricks.as_strided(k, *self.copied), self.lanes.dtype)
        finish = self.finish
        if bias is not None:
            finish = dense.finishing(problem, bias, problem.O // problem.groups, 0, self.lanes)
        self.task(x, packed, out, np.empty(self.scratch, self.lanes.dtype), finish)


def kernel_of(problem: Conv2dProblem, lanes: Lanes) -> tuple[str, Callable[[], Callable[..., None]]]:
    """Name and maker of the kernel that serves ``problem``."""
    x, y, KH, stride = problem.x_dtype, problem.y_dtype, problem.KH, problem.stride
    tile = tile_of(problem, lanes)
    name = f"planes_{lanes}_{x}_{y}_{tile[0]}x{tile[1]}_{KH}_{stride[0]}{stride[1]}"
    return name, lambda: _kernel(lanes, x, y, tile, KH, stride)


def _kernel(
    lanes: Lanes, x_dtype: str, y_dtype: str, tile: tuple[int, int], KH: int, stride: tuple[int, int]
) -> Callable[..., None]:
    size, lane_count, (height, vectors), (down, across) = lanes.size, lanes.count, tile, stride
    width, overlapping = vectors * lane_count, lanes.bits < 512
    anywhere, inside = (band(lanes, *tile, KH, stride, kind) for kind in (ANYWHERE, INSIDE))
    streamed = band(lanes, *tile, KH, stride, STREAMED) if lanes.bits == 512 else inside
    one = band(lanes, height, 1, KH, stride, ANYWHERE)
    read, _, _ = rows(lanes, x_dtype)
    _, write, _ = rows(lanes, y_dtype)
    load, _ = scalar(lanes.dtype)
    _, store = scalar(y_dtype, lanes.dtype)

    @compiled
    def copy(arguments, to, source, first, end, column, wide):
        """Lines [first, end) from ``source`` on, the columns of [column, column + wide) that exist."""
        start, pitch = max(column, 0), get(arguments, PITCH)
        count = min(column + wide, get(arguments, W)) - start
        if count > 0:
            to += size * (start - column)
            sxh, sxw = get(arguments, SXH), get(arguments, SXW)
            source += start * sxw
            part = count
            if abs(sxh) < abs(sxw) and sxw % _FAR == 0:
                part = _ABREAST
            for at in range(0, count, part):
                for line in range(first, end):
                    read(to + size * (line * pitch + at), source + line * sxh + at * sxw, min(part, count - at), sxw)

    @compiled
    def leave(to, source, count, step):
        """A row of sums, to where its elements lie apart: half of an input gradient's, of stride 2."""
        if count > lane_count:
            write(to, source, count, step)
            return
        for j in range(count):
            store(to + j * step, load(source + j * size))

    @compiled
    def tiles(arguments, planes, k, x, line, target, i0, i1, j0, j1, bias, beside, stream):
        """The outputs of rows i0 to i1, no more than a tile's, and columns j0 to j1 of consecutive planes."""
        W_, KW_, step = get(arguments, W), get(arguments, KW), get(arguments, STEP)
        reach, syh = (KW_ - 1) * step, get(arguments, SYH)
        top, lines = i0 * down - get(arguments, TOP), (height - 1) * down + KH
        # The lines that exist, counted from the one where the first output begins.
        first = min(max(-top, 0), lines)
        end = max(min((i1 - i0 - 1) * down + KH, get(arguments, H) - top), first)
        direct = get(arguments, NEAR_Y)
        ldy = syh // size if direct else get(arguments, WIDE)
        whole = i1 - i0 == height and first == 0 and end == lines
        j = j0
        while j < j1:
            # The tile; where masked stores are slow, the last one overlaps its neighbour and writes the same there.
            narrow = j1 - j <= lane_count
            wide = lane_count if narrow else width
            if overlapping and j1 - j < wide <= j1 - j0:
                j = j1 - wide
            at, last = j * across - get(arguments, LEFT), j1 - j
            y = target + j * size if direct else beside + (j - j0) * size
            edge = at < 0 or at + width * across + reach > W_ or last < width
            count, k_next, x_next = planes, get(arguments, SKG), get(arguments, SXG)
            y_next, bias_next = get(arguments, SYG) if direct else height * ldy * size, 1
            if planes == 1 and not (narrow or edge):
                # As many tiles side by side as are inside.
                count, k_next, bias_next = min(last // width, (W_ - reach - at) // (width * across)), 0, 0
                x_next, y_next, wide = width * across * size, width * size, count * width
            given = (
                count, k, k_next // size, x + size * (j - j0) * across, x_next // size, y, y_next // size, bias,
                bias_next, KW_, get(arguments, SKP) // size, get(arguments, SKQ) // size, line, step, ldy, first, end,
                at, W_, i1 - i0, last, get(arguments, FINISHED), get(arguments, FINISH) + size,
            )  # fmt: skip
            if narrow:
                one(given)
            elif edge or not whole:
                anywhere(given)
            elif stream and direct:
                streamed(given)
            else:
                inside(given)
            j += wide
        if not direct:
            for plane in range(planes):
                for t in range(i1 - i0):
                    leave(
                        target + plane * get(arguments, SYG) + t * syh + j0 * get(arguments, SYW),
                        beside + size * (plane * height + t) * ldy, j1 - j0, get(arguments, SYW),
                    )  # fmt: skip

    @compiled
    def block(arguments, planes, k, image, target, i0, i1, j0, j1, bias, memory, stream):
        """The outputs of rows i0 to i1 and columns j0 to j1 of consecutive planes: of one, where lines are copied."""
        high, left, lines = get(arguments, HIGH), j0 * across - get(arguments, LEFT), get(arguments, LINES)
        top, beside = i0 * down - get(arguments, TOP), memory + size * lines * get(arguments, PITCH)
        x, line = image + top * get(arguments, SXH) + left * size, get(arguments, SXH) // size
        if get(arguments, NEAR_X) == 0:
            first, end = min(max(-top, 0), lines), min((i1 - i0 - 1) * down + KH, get(arguments, H) - top)
            wide = (j1 - j0 + width - 1) // width * width * across + (get(arguments, KW) - 1) * get(arguments, STEP)
            copy(arguments, memory, image + top * get(arguments, SXH), first, end, left, wide)
            x, line = memory, get(arguments, PITCH)
        for i in range(i0, i1, high):
            tiles(
                arguments, planes, k, x + size * (i - i0) * down * line, line, target + i * get(arguments, SYH),
                i, min(i + high, i1), j0, j1, bias, beside, stream,
            )  # fmt: skip

    def convolve(arguments, thread, threads):
        G_, O_, OH_, OW_ = get(arguments, G), get(arguments, O), get(arguments, OH), get(arguments, OW)
        tall, wide = get(arguments, TALL), get(arguments, WIDE)
        down_, across_ = (OH_ + tall - 1) // tall, (OW_ + wide - 1) // wide
        memory = (get(arguments, SCRATCH) + size * thread * get(arguments, PER_THREAD) + 63) // 64 * 64
        steps = get(arguments, SYN) | get(arguments, SYG) | get(arguments, SYO) | get(arguments, SYH)
        stream = get(arguments, STREAM) and (get(arguments, Y) | steps) % 64 == 0
        channels, strips = G_ * O_, down_ * across_
        at_once, each = get(arguments, AT_ONCE), 1
        if at_once == 1:
            each = strips
        tasks = get(arguments, N) * channels * each
        task, end = thread * tasks // threads, (thread + 1) * tasks // threads
        plane, strip = task // max(each, 1), task % max(each, 1)
        while task < end:
            # Divisions take longer than some lines of a small plane.
            n, channel = 0, plane
            if plane >= channels:
                n, channel = plane // channels, plane % channels
            g, o = channel, 0
            if O_ > 1:
                g, o = channel // O_, channel % O_
            planes = min(at_once, end - task, channels - channel)
            for place in range(strip, strip + strips // each):
                i, j = place, 0
                if across_ > 1:
                    i, j = place // across_, place % across_
                block(
                    arguments, planes, get(arguments, WEIGHTS) + g * get(arguments, SKG) + o * get(arguments, SKO),
                    get(arguments, X) + n * get(arguments, SXN) + g * get(arguments, SXG),
                    get(arguments, Y) + n * get(arguments, SYN) + g * get(arguments, SYG) + o * get(arguments, SYO),
                    i * tall, min(i * tall + tall, OH_), j * wide, min(j * wide + wide, OW_),
                    get(arguments, FINISH) + size * (2 + channel), memory, stream,
                )  # fmt: skip
            task += planes
            strip += 1
            if strip == each:
                plane, strip = plane + planes, 0
        if stream:
            settle()

    return convolve
