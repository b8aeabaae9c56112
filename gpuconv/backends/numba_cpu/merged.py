"""Convolution of several small images at once: their pixels side by side in panels, so that no lane is left empty.

A plane of 7×7 pixels fills one register and a sixteenth of four, and reads all weights for 49 pixels. Here the planes
of some images are padded as strips are, and the pixels that each product reads are gathered from them:

    panel[k, q] = strip of image n(q) [off[k] + pixel(q)]          q: pixels of all the images, without gaps

The products are summed in the same order as by the strips, so that an image gets the same bits in any company.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime, strip, weights
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.microkernel import BLOCK, TILES, tile
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.runtime import take
from gpuconv.backends.numba_cpu.strip import (
    COLUMN_EXTENT,
    FINISH,
    KC,
    KH,
    KW,
    LDC,
    OFFSETS,
    OH,
    OUTPUTS,
    OW,
    PER_THREAD,
    PITCH,
    PLACES,
    RAW,
    SCRATCH,
    SKC,
    SKG,
    SKO,
    SKP,
    SKQ,
    SUMS,
    SXC,
    SXG,
    SXN,
    SYG,
    SYH,
    SYN,
    SYO,
    SYW,
    WEIGHTS,
    C,
    G,
    N,
    O,
    X,
    Y,
)  # fmt: skip
from gpuconv.backends.numba_cpu.vectors import Emitter, Lanes, Value, get, routine
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.merged"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

IMAGES, PANEL_OFFSETS, INPUTS = range(strip.END, strip.END + 3)

# Pixels that are merged, at most: five planes of 7×7.
_PIXELS = 245


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = dense.unsupported(problem, target)
    largest = max((part.OH * part.OW for part in dense.parts(problem)), default=0)
    if largest > _PIXELS:
        reasons.append(f"it is for planes of at most {_PIXELS} pixels; these have {largest}")
    if problem.KH * problem.KW > BLOCK:
        reasons.append(f"it is for kernels of at most {BLOCK} taps")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose how many images are merged."""
    return dense.plan(_plan, problem, target, limit)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes, threads = dense.lanes_of(problem, target), target.threads
    geometry = strip.geometry_of(problem, lanes)
    MR, NV = TILES[lanes.bits]
    width, pixels = NV * lanes.count, problem.OH * problem.OW
    ob = strip.outputs_at_once(geometry.padded, MR)
    images = max(1, min(problem.N, _PIXELS // max(pixels, 1)))
    while True:
        company = -(-problem.N // images) * problem.groups
        if geometry.padded and company % threads and geometry.padded % (MR * threads) == 0:
            ob = min(ob, geometry.padded // threads)
        held = -(-images * pixels // width) * width
        shape = geometry.shape(problem.OH, problem.OW, ob, strip.odd_lines(held, lanes))
        extra = held * geometry.kc * problem.KH * problem.KW + 64 // lanes.size
        workspace = geometry.workspace(shape, threads, extra) + 8 * geometry.kc * problem.KH * problem.KW
        if workspace <= limit:
            break
        if images == 1 and ob == MR:
            raise schedule.shortage(f"{NAME} on {problem}", workspace, limit)
        images, ob = -(-images // 2) if images > 1 else 1, max(MR, ob // MR // 2 * MR)
    blocks = -(-(problem.O // problem.groups) // ob)
    if problem.result_size * problem.products < strip.ALONE:
        threads = 1
    detail = f"{images} images merged, {ob} output and {geometry.kc} input channels at a time, {lanes}"
    raw = company * blocks <= strip.REPACKED * threads * blocks
    made = strip.made(geometry, shape, threads, raw, detail, extra)
    made.config["images"] = images
    return made


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    return f"merged_{plan.config['lanes']}_{plan.problem.x_dtype}_{plan.problem.y_dtype}"


pack_key = strip.pack_key
pack = strip.pack


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    dense.once(Bound, plan, operands, out)


class Bound(strip.Bound):
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def _kernel(self, out: Any) -> tuple[int, list[int], Any]:
        lanes, config, problem = self.lanes, self.plan.config, self.plan.problem
        x, y = problem.x_dtype, problem.y_dtype
        width = TILES[lanes.bits][1] * lanes.count
        places = np.arange(config["kc"] * problem.KH * problem.KW) * width
        more = [config["images"], places.ctypes.data, config["shape"].inputs]
        return runtime.kernel(kernel_name(self.plan), lambda: _kernel(lanes, x, y)), more, places


@functools.lru_cache(maxsize=64)
def gather(lanes: Lanes) -> Any:
    """A function of (to, source, offsets, K, count, width): to[k·width + i] = source[offsets[k] + i] for i < count,
    which is at most a register's.
    """

    def emit(e: Emitter, to: Value, source: Value, offsets: Value, K: Value, count: Value, width: Value) -> None:
        mask = e.mask(count)

        def body(k: Value) -> None:
            value = e.masked_load(e.at(source, e.builder.load(e.at(offsets, k))), mask)
            e.masked_store(value, e.at(to, e.times(width, k)), mask)

        e.loop(0, K, 1, body)

    return routine(f"gather_{lanes}", lanes, "eetiii", emit)


def _kernel(lanes: Lanes, x_dtype: str, y_dtype: str) -> Callable[..., None]:
    size, lane_count = lanes.size, lanes.count
    MR, NV = TILES[lanes.bits]
    width = NV * lanes.count
    tiles = [tile(lanes, MR, count + 1, 0) for count in range(NV)]
    full, one, two = tiles[-1], tiles[0], tiles[min(1, NV - 1)]
    fill = strip.filler(lanes, x_dtype)
    _, write, _ = rows(lanes, y_dtype)
    pack_block = weights.block(lanes, MR)
    collect = gather(lanes)

    @compiled
    def place(panels, inputs, offsets, K, first, OH, OW, pitch):
        """The pixels of one image, from lane ``first`` on, into the panels."""
        for i in range(OH):
            j = 0
            while j < OW:
                lane = first % width
                run = min(min(lane_count, width - lane), OW - j)
                to = panels + size * (first // width * width * K + lane)
                collect((to, inputs + size * (i * pitch + j), offsets, K, run, width))
                first += run
                j += run

    def merged(arguments, thread, threads):
        G_, O_, C_, OH_, OW_ = (
            get(arguments, G), get(arguments, O), get(arguments, C), get(arguments, OH), get(arguments, OW),
        )  # fmt: skip
        N_, KH_, KW_, kc, ob = (
            get(arguments, N), get(arguments, KH), get(arguments, KW), get(arguments, KC), get(arguments, OUTPUTS),
        )  # fmt: skip
        taps, pixels, ldc = KH_ * KW_, OH_ * OW_, get(arguments, LDC)
        together, high, wide = get(arguments, IMAGES), get(arguments, PLACES), get(arguments, COLUMN_EXTENT)
        sko, skc = get(arguments, SKO), get(arguments, SKC)
        padded = (O_ + MR - 1) // MR * MR
        mine = get(arguments, SCRATCH) + size * thread * get(arguments, PER_THREAD)
        sums = (mine + 63) // 64 * 64
        inputs = (sums + size * get(arguments, SUMS) + 63) // 64 * 64
        panels = (inputs + size * get(arguments, INPUTS) + 63) // 64 * 64
        own = mine + size * (get(arguments, PER_THREAD) - (ob + MR - 1) // MR * MR * kc * taps)
        finish, panel_offsets = get(arguments, FINISH), get(arguments, PANEL_OFFSETS)
        companies, outputs = (N_ + together - 1) // together, (O_ + ob - 1) // ob
        tasks = G_ * outputs * companies
        filled = False  # whether the inputs have the border
        while True:
            task = take(arguments)
            if task >= tasks:
                break
            g, rest = task // (outputs * companies), task % (outputs * companies)
            o0, n0 = rest // companies * ob, rest % companies * together
            o1, n1 = min(O_, o0 + ob), min(N_, n0 + together)
            count, whole = (n1 - n0) * pixels, (o1 - o0 + MR - 1) // MR
            c0 = 0
            while c0 < C_:
                channels = min(kc, C_ - c0)
                K = channels * taps
                for n in range(n0, n1):
                    source = (
                        get(arguments, X) + n * get(arguments, SXN) + g * get(arguments, SXG) + c0 * get(arguments, SXC)
                    )
                    fill(arguments, inputs, source, channels, 0, high, 0, wide, filled)
                    filled = True
                    place(
                        panels, inputs, get(arguments, OFFSETS), K, (n - n0) * pixels, OH_, OW_, get(arguments, PITCH)
                    )
                a = get(arguments, WEIGHTS) + size * (g * padded * C_ + c0 * padded + o0 * channels) * taps
                if get(arguments, RAW):
                    a = own
                    at = get(arguments, WEIGHTS) + g * get(arguments, SKG) + o0 * sko + c0 * skc
                    for o in range(whole):
                        pack_block(
                            own + size * o * K * MR, at + o * MR * sko, min(MR, o1 - o0 - o * MR), channels, KH_, KW_,
                            sko, skc, get(arguments, SKP), get(arguments, SKQ),
                        )  # fmt: skip
                more = c0 > 0
                bias, step, floor = 0, 0, 0
                if c0 + channels == C_:
                    bias, step, floor = finish + size * (2 + MR + g * padded + o0), size * MR, finish + size
                for q in range(0, count, width):
                    left = count - q
                    b, c = panels + size * q * K, sums + size * q
                    for o in range(whole):
                        A, to, add = a + size * o * K * MR, c + size * o * MR * ldc, bias + o * step
                        if left > width - lane_count:
                            full((A, b, panel_offsets, to, K, ldc, more, lane_count, b, add, floor))
                        elif left > lane_count:
                            two((A, b, panel_offsets, to, K, ldc, more, lane_count, b, add, floor))
                        else:
                            one((A, b, panel_offsets, to, K, ldc, more, lane_count, b, add, floor))
                c0 += channels
            for n in range(n0, n1):
                target = get(arguments, Y) + n * get(arguments, SYN) + g * get(arguments, SYG)
                for o in range(o0, o1):
                    at, source = target + o * get(arguments, SYO), sums + size * ((o - o0) * ldc + (n - n0) * pixels)
                    if get(arguments, SYH) == OW_ * get(arguments, SYW):
                        write(at, source, pixels, get(arguments, SYW))
                        continue
                    for i in range(OH_):
                        write(at + i * get(arguments, SYH), source + size * i * OW_, OW_, get(arguments, SYW))

    return merged
