"""Convolution without im2col: a padded strip of x in the cache, read in place through a table of offsets.

    y[n,o,i,j] = b[o] + Σ_cpq x[n,c, i·s+p·d-pad, j·s+q·d-pad] · k[o,c,p,q]

A strip is what some output rows read of some channels: rows one after the other, padded, and split by their position
modulo the stride, so that neighbouring outputs read neighbouring elements. The outputs of a strip are then one long
row of pixels, and each product (c, p, q) of all of them reads that row from one offset on. Between two rows of outputs
lie columns that belong to none; they are computed along, and dropped.

Any stride, dilation, padding and padding mode is a matter of how the strip is filled and which offsets it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends import phases
from gpuconv.backends.numba_cpu import axes, dense, runtime, weights
from gpuconv.backends.numba_cpu.copies import compiled, rows
from gpuconv.backends.numba_cpu.microkernel import BLOCK, TILES, tile
from gpuconv.backends.numba_cpu.vectors import SIZE, Lanes, get
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.strip"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable
unsupported = dense.unsupported

# Bytes of the sums of a strip, of its inputs, and of one block of weights, that stay in a core's second-level cache.
_SUMS, _INPUTS = 512 << 10, 512 << 10
_OUTPUTS = 256

# The table of arguments.
(
    X, WEIGHTS, Y, SCRATCH, FINISH, FILL,  # addresses that differ from call to call
    SXN, SXG, SXC, SXH, SXW, SYN, SYG, SYO, SYH, SYW,  # steps in bytes
    N, G, C, O, OH, OW, TAPS, KC,
    HIGH, WIDE, OUTPUTS,  # a strip's output rows and columns, and the output channels at once
    PLACES, PITCH, CHANNEL, LDC, PER_THREAD, SUMS,  # sizes in elements; PLACES in rows
    ROW_PHASES, COLUMN_PHASES, ROW_SOURCE, COLUMN_SOURCE, INSIDE, ROW_EXTENT, COLUMN_EXTENT, STRIDE, OFFSETS,
    MERGED,
) = range(43)  # fmt: skip


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the strips."""
    if problem.op == "input_grad":
        return phases.plan(lambda part: _plan(part, target, limit), problem)
    return _plan(problem, target, limit)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = dense.lanes_of(problem, target)
    MR, NV = TILES[lanes.bits]
    threads = target.threads
    groups, channels, outputs = problem.groups, problem.C // problem.groups, problem.O // problem.groups
    kc = dense.channels_at_once(problem)
    down, across = (
        axes.axis(n, k, made, pads[0], stride, dilation, problem.padding_mode)
        for n, k, made, pads, stride, dilation in zip(
            (problem.H, problem.W), (problem.KH, problem.KW), (problem.OH, problem.OW), problem.padding, problem.stride,
            problem.dilation, strict=True,
        )
    )  # fmt: skip
    padded = -(-outputs // MR) * MR
    packed = weights.size(groups, outputs, channels * problem.KH * problem.KW, MR) * lanes.size
    tables = 8 * (down.source.size + across.source.size + kc * problem.KH * problem.KW)

    def shape(high: int, wide: int, ob: int) -> dict[str, int]:
        """Sizes in elements of a strip of high × wide outputs of ob channels."""
        shared = across.shared if wide == problem.OW else 0
        pitch = wide + across.reach - shared
        places = high + down.reach
        channel = _odd_lines(down.phases * across.phases * places * pitch + shared + lanes.count, lanes)
        ldc = _odd_lines(high * pitch, lanes)
        inputs = kc * channel + (NV + 1) * lanes.count + across.reach
        return {"pitch": pitch, "places": places, "channel": channel, "ldc": ldc, "inputs": inputs,
                "sums": -(-ob // MR) * MR * ldc + NV * lanes.count}  # fmt: skip

    def scratch(ob: int, high: int, wide: int) -> int:
        sizes = shape(high, wide, ob)
        each = (sizes["inputs"] + sizes["sums"]) * lanes.size + 192
        return threads * each + 2 * packed + tables + groups * padded * lanes.size + 4096

    ob = padded
    while ob > _OUTPUTS and ob % (2 * MR) == 0:
        ob //= 2
    ob = min(ob, _OUTPUTS // MR * MR) if ob > _OUTPUTS else ob
    images = problem.N * groups
    least = schedule.fit((ob, problem.OH, problem.OW), scratch, limit, f"{NAME} on {problem}")
    ob = min(ob, max(MR, least[0] // MR * MR))
    high, wide = _strip(problem, least[1:], lambda h, w: shape(h, w, ob), ob, lanes)
    if images % threads and problem.OH * problem.OW < 1000 and padded % (MR * threads) == 0 and padded // threads <= ob:
        ob = padded // threads  # one plane is too small to be cut in strips: each thread makes some of its channels
    elif images % threads:
        strips = -(-problem.OH // high)
        strips = -(-strips // threads) * threads
        high = max(1, -(-problem.OH // strips))
    sizes = shape(high, wide, ob)
    offsets = [
        c * sizes["channel"]
        + (down.phase[p] * across.phases + across.phase[q]) * sizes["places"] * sizes["pitch"]
        + down.shift[p] * sizes["pitch"]
        + across.shift[q]
        for c in range(kc)
        for p in range(problem.KH)
        for q in range(problem.KW)
    ]
    tables_kept = {
        "rows": down.source,
        "columns": across.source,
        "inside": np.array(across.inside, np.int64),
        "offsets": np.array(offsets, np.int64),
    }
    table = np.zeros(43, np.int64)
    table[N:] = [
        problem.N, groups, channels, outputs, problem.OH, problem.OW, problem.KH * problem.KW, kc, high, wide, ob,
        sizes["places"], sizes["pitch"], sizes["channel"], sizes["ldc"],
        sizes["inputs"] + sizes["sums"] + 2 * 64 // lanes.size, sizes["sums"], down.phases, across.phases,
        *(tables_kept[name].ctypes.data for name in ("rows", "columns", "inside")), down.extent, across.extent,
        across.stride, tables_kept["offsets"].ctypes.data, 0,
    ]  # fmt: skip
    detail = f"strips of {high}×{wide} pixels, {ob} output and {kc} input channels at a time, {lanes}"
    config = {"lanes": lanes, "table": table, "kept": tables_kept, "threads": threads, "kc": kc, "padded": padded}
    return Plan(problem, scratch(ob, high, wide), lanes.dtype, detail, config)


def _odd_lines(count: int, lanes: Lanes) -> int:
    """``count`` rounded up to an odd number of cache lines: rows that far apart do not share the same few places of a
    cache.
    """
    line = 64 // lanes.size
    lines = -(-count // line)
    return (lines + 1 - lines % 2) * line


def _strip(
    problem: Conv2dProblem, most: tuple[int, ...], shape: Callable[[int, int], dict[str, int]], ob: int, lanes: Lanes
) -> tuple[int, int]:
    """Output rows and columns of a strip: as many as the caches hold, at most ``most``, in equal shares."""

    def fits(high: int, wide: int) -> bool:
        sizes = shape(high, wide)
        return sizes["sums"] * lanes.size <= _SUMS and sizes["inputs"] * lanes.size <= _INPUTS

    high, wide = most
    wide = schedule.halved(wide, lambda w: fits(1, w), at_least=64)
    wide = -(-problem.OW // -(-problem.OW // max(wide, 1)))
    high = 1 if wide < problem.OW else schedule.halved(high, lambda h: fits(h, wide) and h * wide <= 2048)
    return -(-problem.OH // -(-problem.OH // max(high, 1))), wide


def pack_key(plan: Plan) -> Any:
    """What the packed weights depend on besides the weights."""
    return "dense", str(plan.config["lanes"]), plan.config["kc"]


def pack(plan: Plan, operands: Operands) -> Any:
    """The weights in panels."""
    lanes = plan.config["lanes"]
    return weights.pack(operands.k, lanes, TILES[lanes.bits][0], plan.config["kc"], plan.config["threads"])


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    if plan.problem.op == "input_grad":
        phases.run(_run, plan, operands, out)
    else:
        _run(plan, operands, out)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    problem, lanes, threads = plan.problem, plan.config["lanes"], plan.config["threads"]
    MR = TILES[lanes.bits][0]
    packed = operands.packed if operands.packed is not None else pack(plan, operands)
    x = dense.native(operands)
    finish = dense.finishing(problem, operands.bias, plan.config["padded"], MR, lanes)
    fill = dense.constant(problem, lanes)
    table = plan.config["table"].copy()
    scratch = runtime.aligned(threads * int(table[PER_THREAD]), lanes)
    table[:N] = [
        x.ctypes.data, packed.ctypes.data, out.ctypes.data, scratch.ctypes.data, finish.ctypes.data, fill.ctypes.data,
        *x.strides, *out.strides,
    ]  # fmt: skip
    name, make = kernel_of(problem, lanes)
    runtime.run(runtime.kernel(name, make), table, threads)


def kernel_of(problem: Conv2dProblem, lanes: Lanes) -> tuple[str, Callable[[], Callable[..., None]]]:
    """Name and maker of the kernel that serves ``problem``."""
    x, y = problem.x_dtype, problem.y_dtype
    return f"strip_{lanes}_{x}_{y}", lambda: _kernel(lanes, x, y)


def filler(lanes: Lanes, stored: str) -> Any:
    """A function that copies what a strip reads of some channels: fill(arguments, to, image, channels, i0, high, j0,
    wide), the image at an address.
    """
    wide_size = lanes.size
    read, _, fill_row = rows(lanes, stored)

    @compiled
    def row(arguments, to, source, phase, j0, wide):
        """One row of one phase of the columns; no source gives the constant."""
        constant = get(arguments, FILL)
        if source == 0:
            fill_row(to, constant, wide)
            return
        inside = get(arguments, INSIDE) + 24 * phase
        first, last = get(inside, 0), get(inside, 1)
        start = min(max(first - j0, 0), wide)
        stop = min(max(last - j0, start), wide)
        step = get(arguments, SXW)
        stride = get(arguments, STRIDE)
        columns = get(arguments, COLUMN_SOURCE) + 8 * (phase * get(arguments, COLUMN_EXTENT) + j0)
        for side in range(2):
            u = 0 if side == 0 else stop
            end = start if side == 0 else wide
            while u < end:
                column = get(columns, u)
                if column < 0:
                    run = u + 1
                    while run < end and get(columns, run) < 0:
                        run += 1
                    fill_row(to + wide_size * u, constant, run - u)
                    u = run
                else:
                    read(to + wide_size * u, source + column * step, 1, step)
                    u += 1
        if start < stop:
            column = get(inside, 2) + (j0 + start - first) * stride
            read(to + wide_size * start, source + column * step, stop - start, stride * step)

    @compiled
    def fill(arguments, to, image, channels, i0, high, j0, wide):
        pitch, places = get(arguments, PITCH), get(arguments, PLACES)
        row_phases, column_phases = get(arguments, ROW_PHASES), get(arguments, COLUMN_PHASES)
        sources, extent = get(arguments, ROW_SOURCE), get(arguments, ROW_EXTENT)
        step = get(arguments, SXH)
        for c in range(channels):
            plane = image + c * get(arguments, SXC)
            for a in range(row_phases):
                for b in range(column_phases):
                    base = to + wide_size * (c * get(arguments, CHANNEL) + (a * column_phases + b) * places * pitch)
                    for t in range(high):
                        line = get(sources, a * extent + i0 + t)
                        source = plane + line * step if line >= 0 else 0
                        row(arguments, base + wide_size * t * pitch, source, b, j0, wide)

    return fill


def _kernel(lanes: Lanes, x_dtype: str, y_dtype: str) -> Callable[..., None]:
    wide_size = lanes.size
    MR, NV = TILES[lanes.bits]
    width = NV * lanes.count
    tiles = [tile(lanes, MR, count + 1, 1) for count in range(NV)]
    full, one, two = tiles[-1], tiles[0], tiles[min(1, NV - 1)]
    fill = filler(lanes, x_dtype)
    _, write, _ = rows(lanes, y_dtype)
    lane_count = lanes.count

    @compiled
    def part(a, b, offsets, c, K, stored, pixels, ldc, panels, accumulate, bias, bias_step, floor):
        """All panels of weights with all pixels of a strip, for K of the ``stored`` products of a panel."""
        for j in range(0, pixels, width):
            left = pixels - j
            last = lane_count if left >= width else (left - 1) % lane_count + 1
            for o in range(panels):
                weight = a + wide_size * o * stored * MR
                sums = c + wide_size * (o * MR * ldc + j)
                following = b + wide_size * (j + width + lane_count * (o % NV))
                more = bias + o * bias_step
                if left > width - lane_count:
                    full((weight, b + wide_size * j, offsets, sums, K, ldc, accumulate, last, following, more, floor))
                elif left > lane_count:
                    two((weight, b + wide_size * j, offsets, sums, K, ldc, accumulate, last, following, more, floor))
                else:
                    one((weight, b + wide_size * j, offsets, sums, K, ldc, accumulate, last, following, more, floor))

    @compiled
    def multiply(a, b, offsets, c, K, pixels, ldc, panels, accumulate, finish, bias):
        """All products of a block of channels, in sums of at most BLOCK; the last adds the bias, if there is one."""
        sums = (K + BLOCK - 1) // BLOCK
        each = (K + sums - 1) // sums
        for k in range(0, K, each):
            more = accumulate or k > 0
            count = min(each, K - k)
            at, here = offsets + 8 * k, a + wide_size * k * MR
            if bias != 0 and k + count == K:
                part(here, b, at, c, count, K, pixels, ldc, panels, more, bias, wide_size * MR, finish + wide_size)
            else:
                part(here, b, at, c, count, K, pixels, ldc, panels, more, finish + 2 * wide_size, 0, finish)

    def strip(arguments, thread, threads):
        high, wide, ob = get(arguments, HIGH), get(arguments, WIDE), get(arguments, OUTPUTS)
        G_, O_, C_, OH_, OW_ = (
            get(arguments, G), get(arguments, O), get(arguments, C), get(arguments, OH), get(arguments, OW),
        )  # fmt: skip
        taps, kc, pitch, ldc = get(arguments, TAPS), get(arguments, KC), get(arguments, PITCH), get(arguments, LDC)
        padded = (O_ + MR - 1) // MR * MR
        images = get(arguments, N) * G_
        down, across, outputs = (OH_ + high - 1) // high, (OW_ + wide - 1) // wide, (O_ + ob - 1) // ob
        sums = get(arguments, SCRATCH) + wide_size * thread * get(arguments, PER_THREAD)
        sums = (sums + 63) // 64 * 64
        inputs = (sums + wide_size * get(arguments, SUMS) + 63) // 64 * 64
        finish = get(arguments, FINISH)
        tasks = images * outputs * down * across
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
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
            reach_down, reach_across = get(arguments, PLACES) - high, get(arguments, COLUMN_EXTENT) - OW_
            c0 = 0
            while c0 < C_:
                channels = min(kc, C_ - c0)
                K = channels * taps
                fill(
                    arguments, inputs, source + c0 * get(arguments, SXC), channels, i0, i1 - i0 + reach_down, j0,
                    j1 - j0 + reach_across,
                )  # fmt: skip
                a = weight + wide_size * (c0 * padded + o0 * channels) * taps
                bias = finish + wide_size * (2 + MR + g * padded + o0) if c0 + channels == C_ else 0
                multiply(a, inputs, get(arguments, OFFSETS), sums, K, pixels, ldc, panels, c0 > 0, finish, bias)
                c0 += channels
            target = get(arguments, Y) + n * get(arguments, SYN) + g * get(arguments, SYG) + i0 * get(arguments, SYH)
            target += j0 * get(arguments, SYW)
            for o in range(o0, o1):
                for i in range(i1 - i0):
                    write(
                        target + o * get(arguments, SYO) + i * get(arguments, SYH),
                        sums + wide_size * ((o - o0) * ldc + i * pitch), j1 - j0, get(arguments, SYW),
                    )  # fmt: skip

    return strip
