"""Convolution with output channels in the lanes and an address per pixel, for channels that lie side by side (NHWC).

    y[n,o,i,j] = b[o] + Σ_pqc x[n,c, i·s+p·d-pad, j·s+q·d-pad] · k[o,c,p,q]

Three ways to read x, by the sizes of one image alone:

in place  1×1 kernels: the pixels of all images are one list; nothing is copied.
strips    A padded copy of what some rows of outputs read. A kernel row lies side by side in it, and is one run of
          KW·C products.
taps      Small planes of many channels: one tap after the other, for the pixels in whose window it hits the image. No
          padding exists, so nothing is multiplied with it.

Arrays that the micro-kernel cannot read or write where they lie, because of their strides or 16-bit numbers, are copied
a unit of work at a time; planes of pixels (NCHW) are turned over on the way, in square blocks of registers. Weights
that fit the second-level cache are gone through for each tile of pixels; larger ones once for all pixels of a unit,
while the next panel of them is fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends import phases
from gpuconv.backends.numba_cpu import dense, pixels_kernel, pixels_work, runtime, strip
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.pixels_kernel import PIXELS, vectors_of
from gpuconv.backends.numba_cpu.pixels_work import IN_PLACE, STRIPS, TAPS
from gpuconv.backends.numba_cpu.turns import BUFFER
from gpuconv.backends.numba_cpu.vectors import Lanes
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.geometry import window
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.pixels"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

_WAYS = ("in place", "strips", "tap by tap")

# Bytes of weights that are gone through for each tile of pixels, in place and by strips: what the caches hold, of
# machines with AVX-512 and of others.
_CACHED = {512: (1 << 16, 1 << 20), 256: (5 << 16, 1 << 18), 128: (5 << 16, 1 << 18)}
_LIGHT = 1 << 20  # bytes of weights that every thread may go through
_INPUTS = 800 << 10  # bytes of a strip's copy of x, in a second-level cache of 1 MB; of less where that is smaller
_PRODUCTS = 1024  # of a panel of weights at once, where they do not stay in the cache
_PIXELS = 1024  # of a unit
# Bytes of the copies of a unit. Weights as they are are packed panel by panel where there is one unit: without AVX-512
# that is worth more than a copy that stays in the cache.
_COPIED = {512: 640 << 10, 256: 1 << 20, 128: 1 << 20}
_LEAST_OUTPUTS = 8  # per group
_WINDOW = 1 << 22  # elements of a window that is copied
_PLANE = 1024  # pixels of an image that is gone through tap by tap
_TASKS, _FEWEST = 4, 192  # units for a thread where work is shared out finely, and pixels that are worth a strip
_HEIGHTS = 100  # of strips that are compared
_COPY = 24  # products that take as long as to copy a number
_ALONE = 1 << 19  # products below which starting threads costs more than it gives


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = dense.unsupported(problem, target)
    if reasons:
        return reasons  # such as more taps than are gone through below
    if problem.padding_mode != "constant":
        reasons.append(f"it pads with constants only, not {problem.padding_mode!r}")
    for part in dense.parts(problem):
        high, wide = (window(k, d) for k, d in zip((part.KH, part.KW), part.dilation, strict=True))
        if high * wide * part.C // part.groups > _WINDOW and _way(part)[0] == STRIPS:
            reasons.append(f"it copies whole windows, of {high}×{wide} pixels; numba_cpu.strip copies what taps read")
            break
    if problem.result_channels // problem.groups < _LEAST_OUTPUTS and problem.groups > 1:
        reasons.append(f"it wants at least {_LEAST_OUTPUTS} output channels per group, which fill its vectors")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the way, the units of work and the order of the sums."""
    return dense.plan(_plan, problem, target, limit)


def _reached(extent: int, outputs: int, before: int, stride: int, tap: int) -> tuple[int, int]:
    """The outputs [from, to) whose window has the tap at distance ``tap`` inside the axis."""
    first = min(max(-(-(before - tap) // stride), 0), outputs)
    return first, min(max(-(-(extent + before - tap) // stride), first), outputs)


def _way(problem: Conv2dProblem) -> tuple[int, list[tuple[int, int]]]:
    """How x is read, and the order of the taps: the last of TAPS reaches every pixel."""
    (top, _), (left, _) = problem.padding
    sizes = (problem.H, problem.OH, top, problem.stride[0]), (problem.W, problem.OW, left, problem.stride[1])
    steps = problem.dilation
    taps = [(p, q) for p in range(problem.KH) for q in range(problem.KW)]
    whole = [
        tap for tap in taps
        if all(_reached(*size, at * step) == (0, size[1]) for size, at, step in zip(sizes, tap, steps, strict=True))
    ]  # fmt: skip
    if not whole:
        return STRIPS, taps
    if len(taps) == 1:
        return IN_PLACE, taps
    small = problem.OW <= 14 and problem.OH * problem.OW <= 256 and problem.H * problem.W <= _PLANE
    zeros = problem.fill == 0 or len(whole) == len(taps)  # what taps leave out
    if small and zeros and problem.C // problem.groups >= 128:
        taps.remove(whole[-1])
        return TAPS, [*taps, whole[-1]]
    return STRIPS, taps


def _runs(way: int, channels: int, taps: list[tuple[int, int]], problem: Conv2dProblem, pitch: int,
          inside: bool) -> tuple[list[tuple[int, int, int]], list[tuple[int, ...]]]:  # fmt: skip
    """The runs (offset, products, whether the sum ends with it) and the stages that go through the weights
    (first run, runs, products, first product, list of pixels). How sums are split depends on the sizes of an image.
    """
    step_down, step_across = problem.dilation
    if way == STRIPS and step_across == 1:
        starts = [(p * step_down * pitch, p * problem.KW, problem.KW * channels) for p in range(problem.KH)]
    elif way == STRIPS:
        starts = [
            (p * step_down * pitch + q * step_across * channels, p * problem.KW + q, channels) for p, q in taps
        ]  # fmt: skip
    else:
        starts = [(0, p * problem.KW + q, channels) for p, q in taps]
    runs: list[tuple[int, int, int]] = []
    stages: list[tuple[int, ...]] = []
    summed = 0
    for index, (offset, tap, length) in enumerate(starts if channels else ()):
        each = -(-length // -(-length // BLOCK))
        for at in range(0, length, each):
            count = min(each, length - at)
            full = not inside and way != TAPS and bool(stages) and stages[-1][2] + count > _PRODUCTS
            if not stages or full or (way == TAPS and at == 0):
                stages.append((len(runs), 0, 0, tap * channels + at, index if way == TAPS else 0))
                summed = 0
            elif summed + count <= BLOCK:
                runs[-1] = (*runs[-1][:2], 0)
            else:
                summed = 0
            summed += count
            runs.append((offset + at, count, 1))
            here, number, products, *rest = stages[-1]
            stages[-1] = (here, number + 1, products + count, *rest)
    return runs, stages


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = dense.lanes_of(problem, target)
    groups, channels, outputs = problem.groups, problem.C // problem.groups, problem.O // problem.groups
    threads = target.threads if problem.result_size * problem.products >= _ALONE else 1
    vectors = vectors_of(outputs, lanes)
    MP, width = PIXELS[lanes.bits][vectors], vectors * lanes.count
    panels = -(-outputs // width)
    way, taps = _way(problem)
    products = channels * len(taps)
    packed = pixels_kernel.packed_size(groups, outputs, products, width) * lanes.size
    weights = products * panels * width * lanes.size
    inside = way != TAPS and weights < _CACHED[lanes.bits][way]
    plane = problem.OH * problem.OW
    total = problem.N * plane
    few = total < 100 if weights < _LIGHT and way == IN_PLACE else total <= (200 if way == TAPS else 400)
    if way == TAPS and problem.N % threads:
        few = True
    shares = threads if few and way != STRIPS and panels % threads == 0 else 1
    finer = lanes.bits < 512  # so that a core that is slowed down holds nobody up; not measured with AVX-512
    if finer and few and way != STRIPS and not inside and (panels % threads == 0 or panels >= 4 * threads):
        shares = panels
    lists = len(taps) if way == TAPS else 1
    summed = panels * width if inside else width  # outputs that a copy of y has at once
    # A kernel row of a strip lies side by side; copied pixels of many channels otherwise must not share cache places.
    pixel = channels if way == STRIPS else strip.odd_lines(channels, lanes)

    def sizes(images: int, high: int, wide: int) -> tuple[int, int, int, int]:
        """Pixels of a unit, elements of a row of its copy of x, of the copy, of the sums."""
        if way == STRIPS:
            pitch = ((wide - 1) * problem.stride[1] + (problem.KW - 1) * problem.dilation[1] + 1) * channels
            spanned = (high - 1) * problem.stride[0] + (problem.KH - 1) * problem.dilation[0] + 1
            return high * wide, pitch, pitch * spanned, high * wide * summed
        if way == TAPS:
            held = images * problem.H * problem.W * pixel
            return images * plane, problem.W * pixel, held, images * plane * summed
        # Short rows may be copied with some pixels more than they have.
        return wide, pixel, (wide + (lanes.count - 1) * finer) * pixel, wide * summed

    def per_thread(*unit: int) -> int:
        count, _, inputs, sums = sizes(*unit)
        return (inputs + sums) * lanes.size + 8 * (count * (2 * lists + 3) + lists) + BUFFER + 4 * 64

    panel = products * width * lanes.size + 64  # a thread's own, packed when it is needed
    runs_most = len(taps) * (1 + channels // BLOCK) * (1 + problem.KW)

    def scratch(*unit: int) -> int:
        return threads * (per_thread(*unit) + panel) + 2 * packed + 8 * 8 * runs_most + (8 + packed // 4) + 4096

    what = f"{NAME} on {problem}"
    if way == IN_PLACE:
        held = _PIXELS
        if problem.layout == "NCHW":  # pixels are copied, and so are their sums
            held = max(_COPIED[lanes.bits] // ((channels + summed) * lanes.size), 2 * MP)
        _, _, most = schedule.fit((1, 1, min(total, held)), scratch, limit, what)
        units = -(-total // max(most, 1))
        if finer and shares == 1:
            units = max(units, min(_TASKS * threads, total // (_FEWEST // 2)))
        units = -(-units // threads) * threads if shares == 1 else units
        even = -(-total // max(units, 1))
        unit = (1, 1, max(min(-(-even // MP) * MP, most), 1))
        units = -(-total // unit[2])
    elif way == TAPS:
        wanted = max(1, min(problem.N, 400 // plane))
        if shares == 1:  # as many units for each thread
            units = -(-problem.N // wanted)
            wanted = max(1, -(-problem.N // (-(-units // threads) * threads)))
        images, _, _ = schedule.fit((wanted, problem.OH, problem.OW), scratch, limit, what)
        unit, units = (images, problem.OH, problem.OW), -(-problem.N // images)
    else:
        unit = (1, *_strip(problem, schedule.fit((1, problem.OH, problem.OW), scratch, limit, what)[1:],
                           lambda *unit: sizes(1, *unit)[2] * lanes.size, threads, finer))  # fmt: skip
        units = problem.N * -(-problem.OH // unit[1]) * -(-problem.OW // unit[2])
    count, pitch, inputs, sums = sizes(*unit)
    runs, stages = _runs(way, channels, taps, problem, pitch, inside)
    kept = {"runs": np.array(runs, np.int64), "stages": np.array(_with_taps(stages, taps), np.int64)}
    entries = [
        problem.N, groups, channels, outputs, problem.H, problem.W, problem.OH, problem.OW, problem.KH, problem.KW,
        problem.padding[0][0], problem.padding[1][0], *problem.stride, *problem.dilation, way, *unit, count, shares,
        inside, len(stages), kept["stages"].ctypes.data, kept["runs"].ctypes.data, pixel, pitch, inputs, sums, lists,
        problem.bias or problem.activation is not None,
    ]  # fmt: skip
    detail = f"{_WAYS[way]}, {count} pixels at a time, tiles of {MP} pixels × {width} channels, {lanes}"
    config = {"lanes": lanes, "vectors": vectors, "entries": entries, "kept": kept, "threads": threads,
              "padded": panels * width, "way": way, "tables": 8 * (count * (2 * lists + 3) + lists) + BUFFER,
              "inputs": inputs * lanes.size, "sums": sums * lanes.size,
              # Each panel of weights is used once: a thread packs it just before, in its own cache.
              "own": panel if units == 1 and not inside else 0}  # fmt: skip
    return Plan(problem, scratch(*unit), lanes.dtype, detail, config)


def _with_taps(stages: list[tuple[int, ...]], taps: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """The stages, each with its tap, which matters tap by tap."""
    return [(*stage, *taps[stage[4]]) for stage in stages] or [(0,) * 7]


def _strip(
    problem: Conv2dProblem, most: tuple[int, ...], size: Callable[[int, int], int], threads: int, finer: bool
) -> tuple[int, int]:
    """Output rows and columns of a strip: as many as the cache holds, at most ``most``, in equal shares."""
    high, wide = most
    held = _INPUTS * min(runtime.l2_bytes(), 1 << 20) >> 20
    wide = schedule.halved(wide, lambda w: size(1, w) <= held, at_least=32)
    wide = -(-problem.OW // -(-problem.OW // max(wide, 1)))
    high = 1 if wide < problem.OW else schedule.halved(high, lambda h: size(h, wide) <= held)
    strips = -(-problem.OH // max(high, 1))
    if finer:
        strips = max(strips, min(_TASKS * threads // max(problem.N, 1), problem.OH * problem.OW // _FEWEST))
    if problem.N * problem.groups % threads:
        strips = -(-strips // threads) * threads
    high, wide = max(1, -(-problem.OH // max(strips, 1))), max(wide, 1)
    if finer and wide >= problem.OW:  # fewer rows, if all threads have as many then
        high = min(range(high, max(high // 3, high - _HEIGHTS), -1), key=lambda h: _longest(problem, h, threads))
    return high, wide


def _longest(problem: Conv2dProblem, high: int, threads: int) -> int:
    """How much the thread that ends last has to do, in products, for strips of ``high`` rows of outputs."""

    def work(rows: int) -> int:
        spans = [
            (count - 1) * stride + window(k, dilation)
            for count, stride, k, dilation in zip(
                (rows, problem.OW), problem.stride, (problem.KH, problem.KW), problem.dilation, strict=True
            )
        ]
        products = problem.O // problem.groups * problem.KH * problem.KW
        return rows * problem.OW * products + _COPY * spans[0] * spans[1]

    images, (whole, rest) = problem.N * problem.groups, divmod(problem.OH, high)
    total = -(-images * whole // threads) * work(high)
    if rest:  # what is left of each image, on the threads that are free first
        idle = -images * whole % threads
        total += -(-max(images - idle, 0) // threads) * work(rest)
    return total


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    return kernel_of(plan.problem, plan.config["lanes"], plan.config["vectors"])[0]


def pack_key(plan: Plan) -> Any:
    """What the packed weights depend on besides the weights."""
    return "pixels", str(plan.config["lanes"]), plan.config["vectors"]


def pack(plan: Plan, operands: Operands) -> Any:
    """The weights in panels."""
    return _packing(plan, operands.k)(operands.k)


def _packing(plan: Plan, k: Any) -> pixels_kernel.Packing:
    return pixels_kernel.Packing(k, plan.config["lanes"], plan.config["vectors"], plan.config["threads"])


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _is_direct(array: Any, lanes: Lanes) -> bool:
    """Whether the micro-kernel can read or write the array where it lies."""
    size = lanes.size
    return bool(
        array.dtype == lanes.dtype
        and (array.strides[2] == size or array.shape[2] == 1)
        and all(step % size == 0 for step in array.strides)
    )


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    if out.size == 0 or plan.problem.C == 0:
        phases.fill_with_bias(plan.problem, operands.bias, out)
        return
    dense.once(Bound, plan, operands, out)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, ``out``, and the weights ``k`` where they are not packed already."""
        problem, config, self.plan = plan.problem, plan.config, plan
        self.packing, places = None, None
        if k is not None and config["own"] and k.dtype == config["lanes"].dtype and k.dtype.isnative:
            places = pixels_kernel.places_of(k, config["lanes"])
        if k is not None and places is None:
            self.packing = _packing(plan, k)
        self.alone = problem.result_size * problem.products < _ALONE
        self.lanes = config["lanes"]
        self.width = config["vectors"] * self.lanes.count
        copy_x = config["way"] == STRIPS or not _is_direct(x, self.lanes)
        copy_y = not _is_direct(out, self.lanes)
        each = config["tables"] + copy_x * (config["inputs"] + 64) + copy_y * (config["sums"] + 64)
        raw = (False, 0, 0, 0)
        if k is not None and places is not None:
            raw = (True, places.ctypes.data, *k.strides[:2])
            each += config["own"]
        each = (each + 127) // 64 * 64
        self.scratch = config["threads"] * each + 64
        name, make = kernel_of(problem, self.lanes, config["vectors"])
        entries = [*x.strides, *out.strides, copy_x, copy_y, *raw, *config["entries"], each]
        self.task = runtime.Task(runtime.kernel(name, make), entries, config["threads"], (plan, places))
        self.fill = dense.constant(problem, self.lanes)
        self.finish = dense.finishing(problem, None, config["padded"], self.width, self.lanes)

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if packed is None:
            packed = k if self.packing is None else self.packing(k)
        finish = self.finish
        if bias is not None:
            finish = dense.finishing(self.plan.problem, bias, self.plan.config["padded"], self.width, self.lanes)
        self.task(x, packed, out, np.empty(self.scratch, np.uint8), finish, self.fill)


def kernel_of(problem: Conv2dProblem, lanes: Lanes, vectors: int) -> tuple[str, Callable[[], Callable[..., None]]]:
    """Name and maker of the kernel that serves ``problem``."""
    x, y = problem.x_dtype, problem.y_dtype
    return f"pixels_{lanes}_{vectors}_{x}_{y}", lambda: pixels_work.kernel(lanes, vectors, x, y)
