"""1×1 convolutions of channels-first images: a matrix product with x itself, panel by panel.

    y[n,o,q] = b[o] + Σ_c x[n,c,q] · k[o,c]          q: a pixel, at any stride

The pixels of a plane lie far from those of the next: read in place, a product over the channels would touch a page of
memory per channel. So the channels of a few registers' width of pixels are first gathered in a panel, which all output
channels then read from the cache; meanwhile the micro-kernel fetches the next panel's pixels. Results go straight to y.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime, strip, weights
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.microkernel import TILES, tile
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.runtime import take
from gpuconv.backends.numba_cpu.vectors import Emitter, Lanes, Value, get, routine
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import NO_PADS, Conv2dProblem

NAME = "numba_cpu.pointwise"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

X, WEIGHTS, Y, SCRATCH, FINISH, OFFSETS = range(runtime.ARRAYS)
(
    SXN, SXG, SXC, SXH, SXW, SYN, SYG, SYO,  # steps in bytes
    N, G, C, O, OW, PIXELS, KC, OUTPUTS, AT_ONCE, FLAT, SH, SW, PER_THREAD,
    RAW, SKG, SKO, SKC,  # whether the weights are still to be packed, and their steps in bytes
) = range(runtime.ARRAYS, runtime.ARRAYS + 25)  # fmt: skip

# Bytes of a block of weights, which stays in a core's second-level cache of 1 MB or more.
_WEIGHTS = 1 << 20
# Weights that every thread packs for itself, at most: to pack them together takes a start of all threads more.
_OWN = 1 << 16
_TASKS = 16  # for a thread


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = dense.unsupported(problem, target)
    if (problem.KH, problem.KW) != (1, 1):
        reasons.append(f"it is for 1×1 kernels; this one is {problem.KH}×{problem.KW}")
    elif any(part.padding != NO_PADS for part in dense.parts(problem)):
        reasons.append("it is for images without padding")
    if problem.y_dtype != dense.sums_in(problem, target):
        reasons.append(f"it writes its sums as they are; {problem.y_dtype} is made by numba_cpu.strip")
    if problem.layout != "NCHW":
        reasons.append("it is for channels-first images")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the blocks."""
    return dense.plan(_plan, problem, target, limit)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = dense.lanes_of(problem, target)
    MR, NV = TILES[lanes.bits]
    threads, width = target.threads, NV * lanes.count
    groups, channels, outputs = problem.groups, problem.C // problem.groups, problem.O // problem.groups
    pixels = problem.OH * problem.OW
    kc = dense.channels_at_once(problem)
    padded = -(-outputs // MR) * MR
    ob, at_once, images = padded, pixels, problem.N * groups
    # Without AVX-512 in small tasks, so that neither thread waits long for the other; not measured with it.
    parts = threads if images % threads else 1
    if lanes.bits < 512 and images:
        parts = max(parts, _TASKS * threads // images)
    if images % threads and padded and padded % (MR * threads) == 0 and pixels < 400:
        # One image is split over its outputs where the weights are larger than the pixels.
        ob = padded // threads
    elif parts > 1:
        share = -(-pixels // parts)
        at_once = -(-share // width) * width
    ob = schedule.halved(ob // MR, lambda panels: panels * MR * kc * lanes.size <= _WEIGHTS) * MR
    if problem.result_size * problem.products < strip.ALONE:
        threads = 1
    panel = kc * width + (MR + 2) * width
    count = weights.size(groups, outputs, channels, MR)
    own = count if lanes.bits < 512 and count <= _OWN else 0  # not measured with AVX-512
    packed = count * lanes.size
    workspace = threads * ((panel + own) * lanes.size + 64) + 2 * packed + 16 * kc + groups * padded * lanes.size + 4096
    workspace = max(workspace, strip.plan(problem, target, limit).workspace)  # which serves results with gaps
    if workspace > limit:
        raise schedule.shortage(f"{NAME} on {problem}", workspace, limit)
    detail = f"panels of {width} pixels, {ob} output and {kc} input channels at a time, {lanes}"
    config = {"lanes": lanes, "kc": kc, "padded": padded, "threads": threads, "ob": ob, "at_once": at_once,
              "per_thread": panel + 64 // lanes.size, "own": own, "target": target, "limit": limit}  # fmt: skip
    return Plan(problem, workspace, lanes.dtype, detail, config)


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    return f"pointwise_{plan.config['lanes']}_{plan.problem.x_dtype}"


pack_key = strip.pack_key
pack = strip.pack


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
        lanes = self.lanes = config["lanes"]
        self.alone = problem.result_size * problem.products < strip.ALONE
        self.elsewhere = None
        steps = out.strides
        if steps[4] != lanes.size or steps[3] != problem.OW * lanes.size or steps[2] % lanes.size:
            # The micro-kernel writes whole planes of pixels, elements apart: a result with gaps, or with planes that
            # begin between elements (a field of a structured array), is for the strips, which sum alike.
            self.elsewhere = strip.Bound(strip.plan(problem, config["target"], config["limit"]), x, k, out)
            return
        self.plan, self.rows = plan, TILES[lanes.bits][0]
        raw, per_thread = (False, 0, 0, 0), config["per_thread"]
        if k is not None and config["own"] and k.dtype == lanes.dtype and k.dtype.isnative:
            raw, per_thread = (True, *k.strides[:3]), per_thread + config["own"]
        self.packing = None if k is None or raw[0] else strip.packing(plan, k)
        self.scratch = config["threads"] * per_thread
        width = TILES[lanes.bits][1] * lanes.count
        places = np.arange(config["kc"])
        self.offsets = np.concatenate([places * width, places * (x.strides[2] // lanes.size)]).astype(np.int64)
        flat = problem.stride == (1, 1) and x.strides[3] == problem.W * x.strides[4]
        entries = [
            *x.strides, *steps[:3], problem.N, problem.groups, problem.C // problem.groups,
            problem.O // problem.groups, problem.OW, problem.OH * problem.OW, config["kc"], config["ob"],
            config["at_once"], flat, *problem.stride, per_thread, *raw,
        ]  # fmt: skip
        kernel = runtime.kernel(kernel_name(plan), lambda: _kernel(lanes, problem.x_dtype))
        self.task = runtime.Task(kernel, entries, config["threads"], plan)
        self.finish = dense.finishing(problem, None, config["padded"], self.rows, lanes)

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if self.elsewhere is not None:
            self.elsewhere(x, k, packed, bias, out)
            return
        if packed is None:
            packed = k if self.packing is None else self.packing(k)
        finish = self.finish
        if bias is not None:
            finish = dense.finishing(self.plan.problem, bias, self.plan.config["padded"], self.rows, self.lanes)
        self.task(x, packed, out, np.empty(self.scratch, self.lanes.dtype), finish, self.offsets)


@functools.lru_cache(maxsize=64)
def _copied(lanes: Lanes, vectors: int) -> Any:
    """A function of (to, source, ld, count): to[k·width + i] = source[k·ld + i] for k < count and i < width, which is
    that of ``vectors``.
    """

    def emit(e: Emitter, to: Value, source: Value, ld: Value, count: Value) -> None:
        width = vectors * lanes.count

        def row(k: Value) -> None:
            place, at = e.at(to, e.times(k, width)), e.at(source, e.times(ld, k))
            for j in range(0, width, lanes.count):
                e.store(e.load(e.at(at, j)), e.at(place, j))

        e.loop(0, count, 1, row)

    return routine(f"copied_{lanes}_{vectors}", lanes, "eeii", emit)


@functools.lru_cache(maxsize=64)
def _fetched(lanes: Lanes, vectors: int) -> Any:
    """A function of (source, ld, count) that fetches what ``_copied`` would read into the second-level cache."""

    def emit(e: Emitter, source: Value, ld: Value, count: Value) -> None:
        line, width = 64 // lanes.size, vectors * lanes.count

        def row(k: Value) -> None:
            at = e.at(source, e.times(ld, k))
            for j in (*range(0, width, line), width - 1):
                e.prefetch(e.at(at, j), 2)

        e.loop(0, count, 1, row)

    return routine(f"fetched_{lanes}_{vectors}", lanes, "eii", emit)


def _kernel(lanes: Lanes, x_dtype: str) -> Callable[..., None]:
    size = lanes.size
    MR, NV = TILES[lanes.bits]
    width, lane_count = NV * lanes.count, lanes.count
    # With a first-level cache of 48 KB the micro-kernel itself fetches the next panel there; a smaller one is filled by
    # this panel and the weights.
    apart = lanes.bits < 512
    tiles = [tile(lanes, MR, count + 1, 0 if apart else 2) for count in range(NV)]
    full, one, two = tiles[-1], tiles[0], tiles[min(1, NV - 1)]
    as_it_is = apart and x_dtype == lanes.dtype
    copied, fetched = _copied(lanes, NV), _fetched(lanes, NV)
    read, write, _ = rows(lanes, lanes.dtype)
    gather, _, _ = rows(lanes, x_dtype)

    @compiled
    def panel(arguments, to, source, channels, first, count):
        """The pixels ``first`` to ``first`` + ``count`` of some channels, a row for each."""
        step, line = get(arguments, SXC), get(arguments, SXW) * get(arguments, SW)
        if get(arguments, FLAT):
            if as_it_is and line == size and count == width and step % size == 0:
                copied((to, source + first * line, step // size, channels))
                return
            for c in range(channels):
                gather(to + size * width * c, source + c * step + first * line, count, line)
            return
        OW_ = get(arguments, OW)
        done = 0
        while done < count:
            i, j = (first + done) // OW_, (first + done) % OW_
            run = min(count - done, OW_ - j)
            at = source + i * get(arguments, SH) * get(arguments, SXH) + j * line
            for c in range(channels):
                gather(to + size * (width * c + done), at + c * step, run, line)
            done += run

    pack_block = weights.block(lanes, MR)

    @compiled
    def pack_all(arguments, to):
        """All weights, in the order of ``weights``."""
        C_, O_, kc = get(arguments, C), get(arguments, O), get(arguments, KC)
        sko, skc = get(arguments, SKO), get(arguments, SKC)
        for g in range(get(arguments, G)):
            source = get(arguments, WEIGHTS) + g * get(arguments, SKG)
            for c in range(0, C_, kc):
                for o in range(0, O_, MR):
                    channels = min(kc, C_ - c)
                    pack_block(to, source + o * sko + c * skc, min(MR, O_ - o), channels, 1, 1, sko, skc, 0, 0)
                    to += size * MR * channels

    def pointwise(arguments, thread, threads):
        G_, C_, O_, pixels = get(arguments, G), get(arguments, C), get(arguments, O), get(arguments, PIXELS)
        kc, ob, at_once = get(arguments, KC), get(arguments, OUTPUTS), get(arguments, AT_ONCE)
        images = get(arguments, N) * G_
        padded = (O_ + MR - 1) // MR * MR
        step = get(arguments, SYO)
        ldc = step // size
        offsets, finish = get(arguments, OFFSETS), get(arguments, FINISH)
        parts, outputs = (pixels + at_once - 1) // at_once, (O_ + ob - 1) // ob
        pixel = get(arguments, SXW) * get(arguments, SW)
        x_step = get(arguments, SXC)
        to = (get(arguments, SCRATCH) + size * thread * get(arguments, PER_THREAD) + 63) // 64 * 64
        beside = to + size * kc * width
        own, raw = beside + size * (MR + 2) * width, get(arguments, RAW)
        weights_at = own if raw else get(arguments, WEIGHTS)
        tasks = images * parts * outputs
        while True:
            task = take(arguments)
            if task >= tasks:
                break
            if raw:
                pack_all(arguments, own)
                raw = 0
            o0, rest = task // (images * parts) * ob, task % (images * parts)
            image, first = rest // parts, rest % parts * at_once
            n, g = image // G_, image % G_
            o1, end = min(O_, o0 + ob), min(pixels, first + at_once)
            whole, panels = (o1 - o0) // MR, (o1 - o0 + MR - 1) // MR
            plane = get(arguments, X) + n * get(arguments, SXN) + g * get(arguments, SXG)
            target = get(arguments, Y) + n * get(arguments, SYN) + g * get(arguments, SYG) + o0 * step
            weight = weights_at + size * g * padded * C_
            c0 = 0
            while c0 < C_:
                channels = min(kc, C_ - c0)
                source = plane + c0 * get(arguments, SXC)
                a = weight + size * (c0 * padded + o0 * channels)
                more = c0 > 0
                bias, bias_step, floor = 0, 0, 0
                if c0 + channels == C_:
                    bias, bias_step, floor = finish + size * (2 + MR + g * padded + o0), size * MR, finish + size
                for j in range(first, end, width):
                    count = min(width, end - j)
                    last = (count - 1) % lane_count + 1
                    panel(arguments, to, source, channels, j, count)
                    flat_ahead = apart and get(arguments, FLAT) and j + width < end and x_step % size == 0
                    for o in range(whole):
                        A, c = a + size * o * channels * MR, target + o * MR * step + size * j
                        # Where the plane is flat, the cache lines of the next panel.
                        ahead = source + (j + width + lane_count * (o % NV)) * pixel
                        b = bias + o * bias_step
                        if flat_ahead:
                            row = channels * o // whole
                            fetched((
                                source + (j + width) * pixel + row * x_step, x_step // size,
                                channels * (o + 1) // whole - row,
                            ))  # fmt: skip
                        if count > width - lane_count:
                            full((A, to, offsets, c, channels, ldc, more, last, ahead, b, floor))
                        elif count > lane_count:
                            two((A, to, offsets, c, channels, ldc, more, last, ahead, b, floor))
                        else:
                            one((A, to, offsets, c, channels, ldc, more, last, ahead, b, floor))
                    if whole < panels:  # the last panel has channels that y has not
                        left = o1 - o0 - whole * MR
                        c = target + whole * MR * step + size * j
                        if more:
                            for i in range(left):
                                read(beside + size * width * i, c + i * step, count, size)
                        A, b = a + size * whole * channels * MR, bias + whole * bias_step
                        full((A, to, offsets, beside, channels, width, more, lane_count, source, b, floor))
                        for i in range(left):
                            write(c + i * step, beside + size * width * i, count, size)
                c0 += channels

    return pointwise
