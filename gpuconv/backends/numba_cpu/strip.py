"""Convolution without im2col: a padded strip of x in the cache, read in place through a table of offsets.

    y[n,o,i,j] = b[o] + Σ_cpq x[n,c, i·s+p·d-pad, j·s+q·d-pad] · k[o,c,p,q]

A strip is what some output rows read of some channels: rows one after the other, padded, and split by their position
modulo the stride, so that neighbouring outputs read neighbouring elements. The outputs of a strip are then one long
row of pixels, and each product (c, p, q) of all of them reads that row from one offset on. Between two rows of outputs
lie columns that belong to none; they are computed along, and dropped.

Any stride, dilation, padding and padding mode is a matter of how the strip is filled and which offsets it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import axes, dense, runtime, strip_products, weights
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.microkernel import BLOCK, TILES
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.runtime import take
from gpuconv.backends.numba_cpu.vectors import SIZE, Lanes, get
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.strip"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable
unsupported = dense.unsupported

# Bytes of the sums of a strip and of its inputs, and output channels of one block of weights, that stay in a core's
# second-level cache of 1 MB; of less where that is smaller.
_SUMS, _INPUTS = 512 << 10, 512 << 10
_OUTPUTS = 256
# Strips for which a thread packs the same weights again.
REPACKED = 4
# Products below which starting threads costs more than it gives.
ALONE = 1 << 19

# The table of arguments.
X, WEIGHTS, Y, SCRATCH, FINISH, FILL = range(runtime.ARRAYS)
(
    SXN, SXG, SXC, SXH, SXW, SYN, SYG, SYO, SYH, SYW,  # steps in bytes
    RAW, SKG, SKO, SKC, SKP, SKQ,  # whether the weights are still to be packed, and their steps in bytes
    N, G, C, O, OH, OW, KH, KW, KC,
    HIGH, WIDE, OUTPUTS,  # a strip's output rows and columns, and the output channels at once
    PLACES, PITCH, CHANNEL, LDC, PER_THREAD, SUMS,  # sizes in elements; PLACES in rows
    ROW_PHASES, COLUMN_PHASES, ROW_SOURCE, COLUMN_SOURCE, INSIDE, ROW_EXTENT, COLUMN_EXTENT, STRIDE, OFFSETS, BORDER,
) = range(runtime.ARRAYS, runtime.ARRAYS + 44)  # fmt: skip
END = runtime.ARRAYS + 44
# Whether tiles are written straight to y; of complex arrays, whose parts are channels of their own, the steps from the
# real part to the imaginary one in bytes. The real parts of a block's input channels come before the imaginary ones;
# those of output channels take turns.
DIRECT, PART_X, PART_Y = range(END, END + 3)


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the strips."""
    return dense.plan(_plan, problem, target, limit)


@dataclass(frozen=True)
class Shape:
    """Sizes, in elements, of a strip of ``high`` × ``wide`` outputs of ``outputs`` channels."""

    high: int
    wide: int
    outputs: int
    panels: int  # of output channels
    places: int
    pitch: int
    channel: int
    ldc: int
    inputs: int
    sums: int
    weights: int  # a thread's own block of packed weights
    line: int

    @property
    def each(self) -> int:
        """Scratch of a thread, with what it takes to begin each part at a cache line."""
        return self.inputs + self.sums + self.weights + 4 * self.line


@dataclass(frozen=True)
class Geometry:
    """What the strips of a problem are made from."""

    problem: Conv2dProblem
    lanes: Lanes
    down: axes.Axis
    across: axes.Axis
    kc: int
    padded: int  # output channels of a group, in whole panels

    def shape(self, high: int, wide: int, outputs: int, ldc: int = 0) -> Shape:
        """The sizes of a strip; ``ldc`` where the sums are not in the order of the strip."""
        problem, lanes = self.problem, self.lanes
        MR, NV = TILES[lanes.bits]
        shared = self.across.shared if wide == problem.OW else 0
        pitch, places = wide + self.across.reach - shared, high + self.down.reach
        channel = odd_lines(self.down.phases * self.across.phases * places * pitch + shared + lanes.count, lanes)
        # Where padding is wider than what an output reaches, pitch < wide: the last row ends beyond its pitch.
        ldc = ldc or odd_lines((high - 1) * pitch + max(wide, pitch), lanes)
        panels = -(-outputs // MR)
        inputs = self.kc * channel + (NV + 1) * lanes.count + self.across.reach
        taps = problem.KH * problem.KW
        return Shape(
            high, wide, outputs, panels, places, pitch, channel, ldc, inputs, panels * MR * ldc + NV * lanes.count,
            panels * MR * self.kc * taps, 64 // lanes.size,
        )  # fmt: skip

    def workspace(self, shape: Shape, threads: int, extra: int = 0) -> int:
        """Bytes of scratch; ``extra`` elements for each thread."""
        problem, size = self.problem, self.lanes.size
        packed = problem.groups * self.padded * (problem.C // problem.groups) * problem.KH * problem.KW
        tables = self.down.phases * self.down.extent + self.across.phases * self.across.extent
        tables += self.kc * problem.KH * problem.KW + 4 * self.across.phases
        return (threads * (shape.each + extra) + 2 * packed + problem.groups * self.padded) * size + 8 * tables + 4096

    def tables(self, shape: Shape) -> tuple[np.ndarray[Any, Any], ...]:
        """Sources of the rows and of the columns, insides of the column phases, and the offset of each product."""
        down, across = self.down, self.across
        phase = np.array(down.phase)[:, None] * across.phases + np.array(across.phase)
        shift = np.array(down.shift)[:, None] * shape.pitch + np.array(across.shift)
        taps = phase * (shape.places * shape.pitch) + shift
        offsets = np.arange(self.kc)[:, None, None] * shape.channel + taps
        return down.source(), across.source(), np.array(across.inside, np.int64), offsets.astype(np.int64)


def geometry_of(problem: Conv2dProblem, lanes: Lanes, parts: int = 1) -> Geometry:
    """The axes and blocks of a problem, of whose channels ``parts`` stay together."""
    down, across = (
        axes.axis(n, k, made, pads[0], stride, dilation, problem.padding_mode)
        for n, k, made, pads, stride, dilation in zip(
            (problem.H, problem.W), (problem.KH, problem.KW), (problem.OH, problem.OW), problem.padding, problem.stride,
            problem.dilation, strict=True,
        )
    )  # fmt: skip
    MR = TILES[lanes.bits][0]
    padded = -(-(problem.O // problem.groups) // MR) * MR
    return Geometry(problem, lanes, down, across, dense.channels_at_once(problem, parts), padded)


def plan_of_parts(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """The plan of a real problem whose channels are the real and imaginary parts of complex ones."""
    return _plan(problem, target, limit, 2)


def _plan(problem: Conv2dProblem, target: Target, limit: int, parts: int = 1) -> Plan:
    lanes, threads = dense.lanes_of(problem, target), target.threads
    geometry = geometry_of(problem, lanes, parts)
    MR, padded = TILES[lanes.bits][0], geometry.padded
    images = problem.N * problem.groups
    ob = outputs_at_once(padded, MR)

    def scratch(outputs: int, high: int, wide: int) -> int:
        return geometry.workspace(geometry.shape(high, wide, outputs), threads)

    most = schedule.fit((ob, problem.OH, problem.OW), scratch, limit, f"{NAME} on {problem}")
    ob = min(ob, max(MR, most[0] // MR * MR))
    high, wide = _strip(geometry, most[1:], ob)
    if images % threads:
        if padded and problem.OH * problem.OW < 1000 and padded % (MR * threads) == 0 and padded // threads <= ob:
            ob = padded // threads  # a plane too small to be cut in strips: each thread makes some of its channels
        else:
            strips = max(-(-problem.OH // high), 1)
            high = max(1, -(-problem.OH // (-(-strips // threads) * threads)))
    shape = geometry.shape(high, wide, ob)
    blocks = -(-(problem.O // problem.groups) // ob)
    tasks = images * -(-problem.OH // high) * -(-problem.OW // wide) * blocks
    if problem.result_size * problem.products < ALONE:
        threads = 1
    detail = f"strips of {high}×{wide} pixels, {ob} output and {geometry.kc} input channels at a time, {lanes}"
    plan = made(geometry, shape, threads, tasks <= REPACKED * threads * blocks * problem.groups, detail)
    plan.config["together"] = parts
    return plan


def made(geometry: Geometry, shape: Shape, threads: int, raw: bool, detail: str, extra: int = 0) -> Plan:
    """The plan of a kernel over strips; ``extra`` elements of scratch for each thread.

    With ``raw`` each thread packs weights as it needs them, so that they stay in the cache; where many strips need the
    same, they are packed once, ahead.
    """
    problem, lanes = geometry.problem, geometry.lanes
    config = {
        "lanes": lanes, "kc": geometry.kc, "padded": geometry.padded, "threads": threads, "raw": raw,
        "geometry": geometry, "shape": shape, "scratch": threads * (shape.each + extra), "extra": extra,
    }  # fmt: skip
    return Plan(problem, geometry.workspace(shape, threads, extra), lanes.dtype, detail, config)


def outputs_at_once(padded: int, rows: int) -> int:
    """Output channels of a block of weights: at most _OUTPUTS, in equal shares of whole panels."""
    most = max(_OUTPUTS * min(runtime.l2_bytes(), 1 << 20) >> 20, 1)
    blocks = max(-(-padded // most), 1)
    return max(-(-padded // rows // blocks), 1) * rows


def odd_lines(count: int, lanes: Lanes) -> int:
    """``count`` rounded up to an odd number of cache lines: rows that far apart do not share the same few places of a
    cache.
    """
    line = 64 // lanes.size
    lines = -(-count // line)
    return (lines + 1 - lines % 2) * line


def _strip(geometry: Geometry, most: tuple[int, ...], ob: int) -> tuple[int, int]:
    """Output rows and columns of a strip: as many as the caches hold, at most ``most``, in equal shares."""
    problem, size = geometry.problem, geometry.lanes.size
    share = min(runtime.l2_bytes(), 1 << 20)
    sums, inputs = (most * share >> 20 for most in (_SUMS, _INPUTS))

    def fits(high: int, wide: int) -> bool:
        shape = geometry.shape(high, wide, ob)
        return shape.sums * size <= sums and shape.inputs * size <= inputs

    high, wide = most
    wide = schedule.halved(wide, lambda w: fits(1, w), at_least=64)
    wide = -(-problem.OW // -(-problem.OW // max(wide, 1)))
    high = 1 if wide < problem.OW else schedule.halved(high, lambda h: fits(h, wide) and h * wide <= 2048)
    return -(-problem.OH // -(-problem.OH // max(high, 1))), wide


@functools.lru_cache(maxsize=64)
def tables_of(geometry: Geometry, shape: Shape) -> tuple[np.ndarray[Any, Any], ...]:
    """``geometry.tables``, made once."""
    return geometry.tables(shape)


def table_of(plan: Plan, x: Any, k: Any | None, out: Any) -> tuple[list[int], Any]:
    """The entries of the table of arguments, and the arrays that they point to; ``k`` where it is to be packed by the
    kernel.
    """
    problem, config = plan.problem, plan.config
    geometry, shape = config["geometry"], config["shape"]
    kept = tables_of(geometry, shape)
    rows, columns, inside, offsets = (table.ctypes.data for table in kept)
    steps = (0,) * 5 if k is None else k.strides
    entries = [
        *x.strides, *out.strides, k is not None, *steps, problem.N, problem.groups, problem.C // problem.groups,
        problem.O // problem.groups, problem.OH, problem.OW, problem.KH, problem.KW, geometry.kc, shape.high,
        shape.wide, shape.outputs, shape.places, shape.pitch, shape.channel, shape.ldc, shape.each + config["extra"],
        shape.sums, geometry.down.phases, geometry.across.phases, rows, columns, inside, geometry.down.extent,
        geometry.across.extent, geometry.across.stride, offsets, problem.padding_mode == "constant",
    ]  # fmt: skip
    return entries, kept


def _direct(plan: Plan, out: Any) -> bool:
    """Whether tiles can be written straight to ``out``: one block has all the products, and little of the registers
    that a row of outputs takes is left empty.
    """
    problem, lanes = plan.problem, plan.config["lanes"]
    wide, products = plan.config["shape"].wide, problem.C // problem.groups * problem.KH * problem.KW
    held, width = -(-wide // lanes.count) * lanes.count, TILES[lanes.bits][1] * lanes.count
    return bool(
        lanes.bits < 512  # not measured there
        and products <= BLOCK
        and width <= wide
        and 16 * held <= 17 * wide
        and out.dtype == lanes.dtype  # integers are as wide, too
        and out.strides[4] == lanes.size
        and out.strides[2] % lanes.size == 0
    )


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    parts = "" if plan.config["together"] == 1 else "_parts"
    return f"strip_{plan.config['lanes']}_{plan.problem.x_dtype}_{plan.problem.y_dtype}{parts}"


def pack_key(plan: Plan) -> Any:
    """What the packed weights depend on besides the weights."""
    return "dense", str(plan.config["lanes"]), plan.config["kc"]


def pack(plan: Plan, operands: Operands) -> Any:
    """The weights in panels."""
    return packing(plan, operands.k)(operands.k)


def packing(plan: Plan, k: Any) -> weights.Packing:
    """What packs weights like ``k``."""
    lanes = plan.config["lanes"]
    return weights.Packing(k, lanes, TILES[lanes.bits][0], plan.config["kc"], plan.config["threads"])


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    dense.once(Bound, plan, operands, out)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, ``out``, and the weights ``k`` where they are not packed already."""
        problem, config = plan.problem, plan.config
        self.plan, self.lanes, self.scratch = plan, config["lanes"], config["scratch"]
        raw = k is not None and config["raw"] and k.dtype == plan.sums_in and k.dtype.isnative
        self.packing = None if k is None or raw else packing(plan, k)
        self.alone = problem.result_size * problem.products < ALONE
        entries, kept = table_of(plan, x, k if raw else None, out)
        kernel, more, also = self._kernel(out)
        self.task = runtime.Task(kernel, [*entries, *more], config["threads"], (kept, also))
        self.fill = dense.constant(problem, self.lanes)
        self.finish = self._finishing(None)

    def _kernel(self, out: Any) -> tuple[int, list[int], Any]:
        """The kernel, further entries of its table, and what they point to."""
        x, y = self.plan.problem.x_dtype, self.plan.problem.y_dtype
        kernel = runtime.kernel(kernel_name(self.plan), lambda: _kernel(self.lanes, x, y, self.plan.config["together"]))
        return kernel, [_direct(self.plan, out), SIZE[x], SIZE[y]], None

    def _finishing(self, bias: Any | None) -> Any:
        return dense.finishing(
            self.plan.problem, bias, self.plan.config["padded"], TILES[self.lanes.bits][0], self.lanes
        )

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if packed is None:
            packed = k if self.packing is None else self.packing(k)
        finish = self.finish if bias is None else self._finishing(bias)
        self.task(x, packed, out, np.empty(self.scratch, self.lanes.dtype), finish, self.fill)


def filler(lanes: Lanes, stored: str) -> Any:
    """A function that copies what a strip reads of some channels: fill(arguments, to, image, channels, i0, high, j0,
    wide, again), the image at an address. ``again``: ``to`` holds other channels, or another image's or group's, of the
    same place, and so its border.
    """
    wide_size = lanes.size
    read, _, fill_row = rows(lanes, stored)

    @compiled
    def side(arguments, to, source, columns, first, end):
        """Places ``first`` to ``end`` of a row one by one, which reach back into x or are the constant."""
        step = get(arguments, SXW)
        for u in range(first, end):
            column = get(columns, u)
            if column < 0:
                fill_row(to + wide_size * u, get(arguments, FILL), 1)
            else:
                read(to + wide_size * u, source + column * step, 1, step)

    @compiled
    def fill(arguments, to, image, channels, i0, high, j0, wide, again):
        pitch, places, channel = get(arguments, PITCH), get(arguments, PLACES), get(arguments, CHANNEL)
        row_phases, column_phases = get(arguments, ROW_PHASES), get(arguments, COLUMN_PHASES)
        sources, extent = get(arguments, ROW_SOURCE), get(arguments, ROW_EXTENT)
        constant, border = get(arguments, FILL), get(arguments, BORDER)
        sxc, sxh, sxw = get(arguments, SXC), get(arguments, SXH), get(arguments, SXW)
        stride = get(arguments, STRIDE)
        for b in range(column_phases):
            inside = get(arguments, INSIDE) + 24 * b
            first, last = get(inside, 0), get(inside, 1)
            start = min(max(first - j0, 0), wide)
            stop = min(max(last - j0, start), wide)
            at = (get(inside, 2) + (j0 + start - first) * stride) * sxw
            columns = get(arguments, COLUMN_SOURCE) + 8 * (b * get(arguments, COLUMN_EXTENT) + j0)
            for a in range(row_phases):
                base = to + wide_size * (a * column_phases + b) * places * pitch
                for c in range(channels):
                    for t in range(high):
                        line = get(sources, a * extent + i0 + t)
                        place = base + wide_size * (c * channel + t * pitch)
                        if line < 0:
                            if not again:
                                fill_row(place, constant, wide)
                            continue
                        source = image + c * sxc + line * sxh
                        if not border:
                            side(arguments, place, source, columns, 0, start)
                            side(arguments, place, source, columns, stop, wide)
                        elif not again:
                            if start > 0:
                                fill_row(place, constant, start)
                            if stop < wide:
                                fill_row(place + wide_size * stop, constant, wide - stop)
                        if start < stop:
                            read(place + wide_size * start, source + at, stop - start, stride * sxw)

    return fill


def _kernel(lanes: Lanes, x_dtype: str, y_dtype: str, parts: int) -> Callable[..., None]:
    wide_size = lanes.size
    MR, _ = TILES[lanes.bits]
    fill = filler(lanes, x_dtype)
    pack_block = weights.block(lanes, MR)
    multiply, straight = strip_products.summed(lanes), strip_products.written(lanes)
    hand_over = strip_products.handed_over(lanes, y_dtype, parts)
    shift = parts - 1

    def strip(arguments, thread, threads):
        high, wide, ob = get(arguments, HIGH), get(arguments, WIDE), get(arguments, OUTPUTS)
        G_, O_, C_, OH_, OW_ = (
            get(arguments, G), get(arguments, O), get(arguments, C), get(arguments, OH), get(arguments, OW),
        )  # fmt: skip
        KH_, KW_ = get(arguments, KH), get(arguments, KW)
        taps = KH_ * KW_
        kc, pitch, ldc = get(arguments, KC), get(arguments, PITCH), get(arguments, LDC)
        raw, sko, skc = get(arguments, RAW), get(arguments, SKO), get(arguments, SKC)
        padded = (O_ + MR - 1) // MR * MR
        images = get(arguments, N) * G_
        down, across, outputs = (OH_ + high - 1) // high, (OW_ + wide - 1) // wide, (O_ + ob - 1) // ob
        mine = get(arguments, SCRATCH) + wide_size * thread * get(arguments, PER_THREAD)
        sums = (mine + 63) // 64 * 64
        inputs = (sums + wide_size * get(arguments, SUMS) + 63) // 64 * 64
        own = mine + wide_size * (get(arguments, PER_THREAD) - (ob + MR - 1) // MR * MR * kc * taps)
        finish = get(arguments, FINISH)
        direct = get(arguments, DIRECT)
        tasks = images * outputs * down * across
        filled = -1  # the place whose border the inputs have
        while True:
            task = take(arguments)
            if task >= tasks:
                break
            # One image: a thread keeps its weights. Several groups: it goes through them one by one.
            if G_ == 1:
                o0, rest = task // (images * down * across) * ob, task % (images * down * across)
                image, place = rest // (down * across), rest % (down * across)
            else:
                image, rest = task // (outputs * down * across), task % (outputs * down * across)
                o0, place = rest // (down * across) * ob, rest % (down * across)
            n, g = image // G_, image % G_
            i0, j0 = place // across * high, place % across * wide
            o1, i1, j1 = min(O_, o0 + ob), min(OH_, i0 + high), min(OW_, j0 + wide)
            panels = (o1 - o0 + MR - 1) // MR
            pixels = (i1 - i0) * pitch - (pitch - (j1 - j0))
            source = get(arguments, X) + n * get(arguments, SXN) + g * get(arguments, SXG)
            weight = get(arguments, WEIGHTS) + wide_size * g * padded * C_ * taps
            target = get(arguments, Y) + n * get(arguments, SYN) + g * get(arguments, SYG)
            target += (o0 >> shift) * get(arguments, SYO)
            target += i0 * get(arguments, SYH) + j0 * get(arguments, SYW)
            reach_down, reach_across = get(arguments, PLACES) - high, get(arguments, COLUMN_EXTENT) - OW_
            c0 = 0
            while c0 < C_:
                channels = min(kc, C_ - c0)
                K = channels * taps
                for part in range(parts):
                    fill(
                        arguments, inputs + part * (channels >> shift) * get(arguments, CHANNEL) * wide_size,
                        source + (c0 >> shift) * get(arguments, SXC) + part * get(arguments, PART_X), channels >> shift,
                        i0, i1 - i0 + reach_down, j0, j1 - j0 + reach_across, filled == place,
                    )  # fmt: skip
                filled = place
                a = weight + wide_size * (c0 * padded + o0 * channels) * taps
                if raw:
                    a = own
                    at = get(arguments, WEIGHTS) + g * get(arguments, SKG) + o0 * sko + c0 * skc
                    for o in range(panels):
                        pack_block(
                            own + wide_size * o * K * MR, at + o * MR * sko, min(MR, o1 - o0 - o * MR), channels, KH_,
                            KW_, sko, skc, get(arguments, SKP), get(arguments, SKQ),
                        )  # fmt: skip
                bias = finish + wide_size * (2 + MR + g * padded + o0) if c0 + channels == C_ else 0
                if direct:
                    straight(
                        a, inputs, get(arguments, OFFSETS), target, K, i1 - i0, j1 - j0, pitch, get(arguments, SYH),
                        get(arguments, SYO), o1 - o0, finish + wide_size, bias, sums,
                    )  # fmt: skip
                else:
                    multiply(a, inputs, get(arguments, OFFSETS), sums, K, pixels, ldc, panels, c0 > 0, finish, bias)
                c0 += channels
            if direct == 0:
                hand_over(
                    target, sums, o1 - o0, i1 - i0, j1 - j0, ldc, pitch, get(arguments, SYO), get(arguments, SYH),
                    get(arguments, SYW), get(arguments, PART_Y),
                )  # fmt: skip

    return strip
