"""3×3 convolution in a quarter of the products: Winograd's F(4×4, 3×3), at precisions that allow its rounding errors.

    y = Aᵀ [ Σ_c (G k Gᵀ) ⊙ (Bᵀ x B) ] A

The result is cut in tiles of 4 × 4, and those in strips of some rows of tiles. For each strip the image is transformed
(``winograd_transforms``), at each of the 36 points the channels are summed, which is a matrix product, and the sums are
transformed to the result; all of it stays in a core's own cache, or near. The tiles of a strip are one long row.

Values of x are added and subtracted before they are multiplied, so that NaN or infinity in one of them reaches all
outputs of its tiles, and rounding errors are some ten times those of a direct sum, relative to the largest results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime, weights, winograd_transforms
from gpuconv.backends.numba_cpu.copies import compiled, rows
from gpuconv.backends.numba_cpu.microkernel import TILES, tile
from gpuconv.backends.numba_cpu.strip import ALONE
from gpuconv.backends.numba_cpu.vectors import Lanes, get
from gpuconv.backends.numba_cpu.winograd_transforms import POINTS, TILE, WINDOW
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.winograd"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

# The table of arguments of the kernel that transforms weights.
K, TRANSFORMED, ROOM = range(3)
WG, WO, WC, WSG, WSO, WSC, WSP, WSQ, WSTEP = range(runtime.ARRAYS, runtime.ARRAYS + 9)

# That of the convolution.
X, WEIGHTS, Y, SCRATCH, FINISH, FILL = range(runtime.ARRAYS)
(
    SXN, SXG, SXC, SXH, SXW, SYN, SYG, SYO, SYH, SYW,  # steps in bytes
    RAW, SKG, SKO, SKC, SKP, SKQ,  # whether the weights are still to be transformed, and their steps in bytes
    N, G, C, O, H, W, OH, OW, TOP, LEFT, KC,
    HIGH, WIDE, OUTPUTS, AT_ONCE,  # a strip's rows and columns of tiles, output channels of a task and of a step of it
    LINE, PLANE, LDC, INPUT_STEP, SUM_STEP, WEIGHT_STEP, OWN_STEP, PER_THREAD,  # sizes in elements
    OFFSETS,
) = range(runtime.ARRAYS, runtime.ARRAYS + 40)  # fmt: skip

# Output channels and vectors of tiles that are summed in registers together, where it is not what other kernels do: the
# weights of six output channels, at each point, would be transformed by registers of six lanes.
_TILES = TILES | {256: (4, 3)}
# Products in one running sum.
_SUM = 256
# Channels of which a thread packs the weights before it transforms them.
_PACKED = 32
# Weights, before their transform, whose transform stays in a core's second-level cache.
_WEIGHTS = 8192
# Tasks of a thread for which it transforms the same weights again.
_REPEATED = 6
# Bytes of transformed weights that are kept. 38 MB, four times the weights, took 1.9 times as long to read from memory,
# 14², as to make anew in the cache.
_KEPT = 16 << 20
# Elements of a strip's transformed inputs and sums, and the most output channels among these.
_STRIP, _SUMMED = 450_000, 128


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = dense.unsupported(problem, target)
    if (problem.KH, problem.KW) != (3, 3) or problem.stride != (1, 1) or problem.dilation != (1, 1):
        reasons.append("it is for 3×3 kernels without stride and dilation")
    if {problem.x_dtype, problem.k_dtype, problem.y_dtype} != {"float32"}:
        reasons.append("it is for float32")
    if problem.precision == "highest":
        reasons.append("its rounding errors are larger than precision='highest' allows")
    if problem.padding_mode != "constant":
        reasons.append("it is for constant padding")
    if problem.layout != "NCHW":
        reasons.append("it is for channels-first images")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the strips."""
    return dense.plan(_plan, problem, target, limit)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = dense.lanes_of(problem, target)
    MR, NV = _TILES[lanes.bits]
    threads, width = target.threads, NV * lanes.count
    groups, channels, outputs = problem.groups, problem.C // problem.groups, problem.O // problem.groups
    down, across = -(-problem.OH // TILE), -(-problem.OW // TILE)
    kc = -(-channels // -(-channels // _SUM)) if channels else 1
    padded = -(-outputs // MR) * MR
    weight_step = _odd_lines(padded * channels, lanes)
    transformed = groups * POINTS * weight_step * lanes.size

    def shape(high: int, wide: int, at_once: int) -> dict[str, int]:
        """Sizes in elements for a strip of high × wide tiles, and ``at_once`` output channels in a step."""
        ldc = _rounded(high * wide, lanes.count)
        sizes = {
            "line": _lines(TILE * _rounded(wide, lanes.count) + TILE, lanes),
            "plane": _lines((high + 1) * wide + 2 * lanes.count, lanes),
            "ldc": ldc,
            "input_step": _odd_lines(channels * ldc, lanes),
            "sum_step": _odd_lines(at_once * ldc, lanes),
            "own_step": _odd_lines(at_once * channels, lanes),
        }
        each = 2 * sizes["line"] + TILE * (WINDOW * sizes["plane"] + TILE * ldc + 64 // lanes.size)
        each += POINTS * (sizes["input_step"] + sizes["sum_step"] + sizes["own_step"]) + _room(lanes)
        return sizes | {"per_thread": _lines(each, lanes)}

    # One image: the threads share its output channels if it is small, else its strips.
    alone = problem.N * groups % threads > 0
    shared = padded > 0 and alone and down * across <= (128 if lanes.bits == 256 else 240) and padded % (MR * threads) == 0
    ob = padded // threads if shared else max(padded, MR)
    at_once = min(ob, max(1, _WEIGHTS // max(channels, 1) // MR) * MR)

    def scratch(high: int, wide: int) -> int:
        each = threads * (shape(high, wide, at_once)["per_thread"] + _room(lanes))
        converted = problem.O * channels * 9
        return transformed + (each + converted + groups * padded) * lanes.size + 8 * kc + 4096

    most = schedule.fit((down, across), scratch, limit, f"{NAME} on {problem}")
    room = _STRIP // (POINTS * (channels + min(ob, _SUMMED))) // width * width
    tiles = min(max(width, room), 3 * width)
    if lanes.bits == 256 or down * across <= 2 * width + width // 3:
        tiles = 2 * width + width // 3
    wide = min(across, most[1], 4 * width)
    wide = -(-across // -(-across // wide))
    high = max(1, min(tiles // wide, most[0]))
    if alone and not shared:
        while high > 1 and -(-down // high) * -(-across // wide) % threads:
            high -= 1
    if problem.result_size * problem.products < ALONE:
        threads = 1
    # Transformed by each thread as it needs them, weights stay in its cache; for many strips once, ahead.
    tasks = problem.N * groups * -(-down // high) * -(-across // wide) * -(-outputs // ob)
    raw = at_once == ob or tasks <= _REPEATED * threads
    sizes = shape(high, wide, at_once)
    offsets = np.arange(kc, dtype=np.int64) * lanes.count * np.arange(1, NV + 1)[:, None]
    entries = [
        problem.N, groups, channels, outputs, problem.H, problem.W, problem.OH, problem.OW, problem.padding[0][0],
        problem.padding[1][0], kc, high, wide, ob, at_once,
        *(sizes[name] for name in ("line", "plane", "ldc", "input_step", "sum_step")), weight_step,
        sizes["own_step"], sizes["per_thread"], offsets.ctypes.data,
    ]  # fmt: skip
    detail = f"F(4×4, 3×3), strips of {high}×{wide} tiles, {at_once} output channels at a time, {lanes}"
    config = {"lanes": lanes, "entries": entries, "kept": offsets, "threads": threads, "padded": padded,
              "scratch": threads * sizes["per_thread"], "weight_step": weight_step, "raw": raw}  # fmt: skip
    return Plan(problem, scratch(high, wide), lanes.dtype, detail, config)


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _lines(count: int, lanes: Lanes) -> int:
    """``count`` rounded up to whole cache lines, and to whole registers."""
    return _rounded(count, max(lanes.count, 64 // lanes.size))


def _odd_lines(count: int, lanes: Lanes) -> int:
    """``count`` rounded up to an odd number of cache lines: 36 points that far apart do not share a cache's few places
    for one address.
    """
    line = 64 // lanes.size
    lines = -(-count // line)
    return (lines + 1 - lines % 2) * line


def _room(lanes: Lanes) -> int:
    """Elements that a thread needs to transform weights."""
    return _lines(9 * _TILES[lanes.bits][0] * (_PACKED + 1) + 2 * lanes.count, lanes)


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    return f"winograd_{plan.config['lanes']}"


def pack_key(plan: Plan) -> Any:
    """What the packed weights depend on besides the weights."""
    return "winograd", str(plan.config["lanes"])


def pack(plan: Plan, operands: Operands) -> Any:
    """The transformed weights, in panels; None where they are more than it pays to keep."""
    if operands.k.shape[0] * POINTS * plan.config["weight_step"] * plan.config["lanes"].size > _KEPT:
        return None
    return Transform(plan, operands.k)(operands.k)


class Transform:
    """The transform of weights of one shape and strides: point by point, panels as the micro-kernel reads them.

    transformed[g][point][panel][c][i] = (G k Gᵀ)[point] of k[g, panel·MR + i, c]
    """

    def __init__(self, plan: Plan, k: Any) -> None:
        """For views like ``k`` (G, O, C, 3, 3), of any strides."""
        lanes = self.lanes = plan.config["lanes"]
        step = plan.config["weight_step"]
        groups, outputs, channels = k.shape[:3]
        self.converted = not k.dtype.isnative
        strides = np.empty_like(k, lanes.dtype).strides if self.converted else k.strides
        # Starting threads costs more than transforming little.
        threads = plan.config["threads"] if k.size >= 1 << 13 else 1
        self.count, self.room = groups * POINTS * step, threads * _room(lanes)
        kernel = runtime.kernel(f"winograd_weights_{lanes}", lambda: _transformer(lanes))
        self.task = runtime.Task(kernel, [groups, outputs, channels, *strides, step], threads)

    def __call__(self, k: Any) -> np.ndarray[Any, Any]:
        """The transform of ``k``."""
        if self.converted:
            k = k.astype(self.lanes.dtype)
        transformed = runtime.aligned(self.count, self.lanes.dtype)
        self.task(k, transformed, runtime.aligned(self.room, self.lanes.dtype))
        return transformed


def _transformer(lanes: Lanes) -> Callable[..., None]:
    size, (MR, _) = lanes.size, _TILES[lanes.bits]
    room = _room(lanes)
    panel = _panel(lanes)

    def transform_weights(arguments, thread, threads):
        O_, C_, step = get(arguments, WO), get(arguments, WC), get(arguments, WSTEP)
        so, sc, sp, sq = get(arguments, WSO), get(arguments, WSC), get(arguments, WSP), get(arguments, WSQ)
        own = get(arguments, ROOM) + size * thread * room
        panels = (O_ + MR - 1) // MR
        tasks = get(arguments, WG) * panels
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            g, o = task // panels, task % panels
            to = get(arguments, TRANSFORMED) + size * (g * POINTS * step + o * C_ * MR)
            source = get(arguments, K) + g * get(arguments, WSG) + o * MR * so
            panel(to, own, source, min(MR, O_ - o * MR), C_, so, sc, sp, sq, step)

    return transform_weights


@functools.lru_cache(maxsize=64)
def _panel(lanes: Lanes) -> Any:
    """A function that transforms the weights of a panel at ``source``, of which the first ``present`` exist."""
    size, (MR, _) = lanes.size, _TILES[lanes.bits]
    pack_block = weights.block(lanes, MR)
    transform = winograd_transforms.kernel(lanes, MR)

    @compiled
    def panel(to, own, source, present, channels, so, sc, sp, sq, step):
        for c in range(0, channels, _PACKED):
            count = min(_PACKED, channels - c)
            pack_block(own, source + c * sc, present, count, 3, 3, so, sc, sp, sq)
            transform((to + size * c * MR, own, step, count))

    return panel


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    dense.once(Bound, plan, operands, out)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, ``out``, and the weights ``k`` where they are not transformed already."""
        problem, config, self.plan = plan.problem, plan.config, plan
        lanes = self.lanes = config["lanes"]
        self.alone = problem.result_size * problem.products < ALONE
        # Weights that are to be collected one by one are transformed once.
        raw = k is not None and config["raw"] and k.dtype.isnative and k.strides[2:] == (36, 12, 4)
        self.transform = None if k is None or raw else Transform(plan, k)
        self.rows, self.scratch = _TILES[lanes.bits][0], config["scratch"]
        kernel = runtime.kernel(kernel_name(plan), lambda: _kernel(lanes))
        steps = k.strides if raw and k is not None else (0,) * 5
        entries = [*x.strides, *out.strides, raw, *steps, *config["entries"]]
        self.task = runtime.Task(kernel, entries, config["threads"], plan)
        self.fill = dense.constant(problem, lanes)
        self.finish = dense.finishing(problem, None, config["padded"], self.rows, lanes)

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if packed is None:
            packed = k if self.transform is None else self.transform(k)
        finish = self.finish
        if bias is not None:
            finish = dense.finishing(self.plan.problem, bias, self.plan.config["padded"], self.rows, self.lanes)
        self.task(x, packed, out, runtime.aligned(self.scratch, self.lanes.dtype), finish, self.fill)


def _kernel(lanes: Lanes) -> Callable[..., None]:
    size, count = lanes.size, lanes.count
    MR, NV = _TILES[lanes.bits]
    width = NV * count
    tiles = [tile(lanes, MR, vectors + 1) for vectors in range(NV)]
    full, one, two = tiles[-1], tiles[0], tiles[min(1, NV - 1)]
    read, write, fill = rows(lanes, "float32")
    split = winograd_transforms.split(lanes)
    panel = _panel(lanes)
    image, result = winograd_transforms.image(lanes), winograd_transforms.result(lanes)

    @compiled
    def together(left):
        """Tiles to be multiplied together, where some are left: four registers of them are two and two."""
        return 2 * count if left == width + count else min(left, width)

    @compiled
    def transform(arguments, mine, inputs, source, i0, high, j0, wide, tiles):
        """All channels of a strip's part of the image at ``source``, transformed."""
        line, plane, zero = get(arguments, LINE), get(arguments, PLANE), get(arguments, FINISH) + 2 * size
        W_, top, left = get(arguments, W), TILE * i0 - get(arguments, TOP), TILE * j0 - get(arguments, LEFT)
        constant = get(arguments, FILL)
        # A row of the strip: the constant, pixels, the constant, and zeros where no output reads.
        end = min(get(arguments, OW) - TILE * j0, TILE * wide) + WINDOW - TILE
        first = min(max(-left, 0), end)
        last = min(max(W_ - left, first), end)
        row, border, planes = mine, mine + size * line, mine + 2 * size * line
        fill(mine, zero, 2 * line + TILE * WINDOW * plane)
        fill(row, constant, end)
        fill(border, constant, end)
        pixels = source + (left + first) * get(arguments, SXW)
        for c in range(get(arguments, C)):
            for i in range(TILE * high + WINDOW - TILE):
                to = planes + size * (i % TILE * WINDOW * plane + i // TILE * wide)
                if i + TILE * i0 >= get(arguments, OH) + WINDOW - TILE:
                    for j in range(WINDOW):
                        fill(to + size * j * plane, zero, wide)
                elif top + i < 0 or top + i >= get(arguments, H):
                    split((to, border, plane, wide))
                else:
                    at = pixels + c * get(arguments, SXC) + (top + i) * get(arguments, SXH)
                    read(row + size * first, at, last - first, get(arguments, SXW))
                    split((to, row, plane, wide))
            j = 0
            while j < tiles:
                here = together(tiles - j)
                to = inputs + size * (j * get(arguments, C) + c * here)
                image((to, planes + size * j, plane, wide, get(arguments, INPUT_STEP), here))
                j += here

    @compiled
    def multiply(arguments, sums, weight, step, inputs, panels, tiles):
        """The sums over the channels at every point, of some panels of output channels."""
        C_, kc, ldc = get(arguments, C), get(arguments, KC), get(arguments, LDC)
        offsets = get(arguments, OFFSETS)
        for point in range(POINTS):
            for c in range(0, C_, kc):
                K_, more = min(kc, C_ - c), c > 0
                a, j = weight + size * (point * step + c * MR), 0
                while j < tiles:
                    here = together(tiles - j)
                    b = inputs + size * (point * get(arguments, INPUT_STEP) + j * C_ + c * here)
                    to = sums + size * (point * get(arguments, SUM_STEP) + j)
                    off = offsets + 8 * kc * (here // count - 1)
                    for o in range(panels):
                        A, s = a + size * o * C_ * MR, to + size * o * MR * ldc
                        if here > 2 * count:
                            full((A, b, off, s, K_, ldc, more, count, b, 0, 0))
                        elif here > count:
                            two((A, b, off, s, K_, ldc, more, count, b, 0, 0))
                        else:
                            one((A, b, off, s, K_, ldc, more, count, b, 0, 0))
                    j += here

    def winograd(arguments, thread, threads):
        high, wide = get(arguments, HIGH), get(arguments, WIDE)
        ob, at_once = get(arguments, OUTPUTS), get(arguments, AT_ONCE)
        C_, O_, G_, OH_, OW_ = (
            get(arguments, C), get(arguments, O), get(arguments, G), get(arguments, OH), get(arguments, OW),
        )  # fmt: skip
        tiles_down, tiles_across = (OH_ + TILE - 1) // TILE, (OW_ + TILE - 1) // TILE
        down, across = (tiles_down + high - 1) // high, (tiles_across + wide - 1) // wide
        outputs, ldc = (O_ + ob - 1) // ob, get(arguments, LDC)
        padded = (O_ + MR - 1) // MR * MR
        finish, step, sum_step = get(arguments, FINISH), get(arguments, WEIGHT_STEP), get(arguments, SUM_STEP)
        raw, sko, own_step = get(arguments, RAW), get(arguments, SKO), get(arguments, OWN_STEP)
        mine = get(arguments, SCRATCH) + size * thread * get(arguments, PER_THREAD)
        made = mine + size * (2 * get(arguments, LINE) + TILE * WINDOW * get(arguments, PLANE))
        line = TILE * ldc + 64 // size
        inputs = made + size * TILE * line
        sums = inputs + size * POINTS * get(arguments, INPUT_STEP)
        own = sums + size * POINTS * sum_step
        beside = own + size * POINTS * own_step
        syo, syh, syw = get(arguments, SYO), get(arguments, SYH), get(arguments, SYW)
        before, kept = -1, -1
        strips = get(arguments, N) * G_ * down * across
        tasks = strips * outputs
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            strip, o0 = task % strips, task // strips * ob
            i0, j0 = strip // across % down * tiles_down // down, strip % across * tiles_across // across
            n, g = strip // (across * down) // G_, strip // (across * down) % G_
            i1, j1 = (strip // across % down + 1) * tiles_down // down, (strip % across + 1) * tiles_across // across
            tiles = ((i1 - i0) * (j1 - j0) + count - 1) // count * count
            if strip != before:
                before = strip
                source = get(arguments, X) + n * get(arguments, SXN) + g * get(arguments, SXG)
                transform(arguments, mine, inputs, source, i0, i1 - i0, j0, j1 - j0, tiles)
            target = get(arguments, Y) + n * get(arguments, SYN) + g * get(arguments, SYG) + TILE * j0 * syw
            end = min(O_, o0 + ob)
            for o1 in range(o0, end, at_once):
                here = min(at_once, end - o1)
                panels = (here + MR - 1) // MR
                if not raw:
                    weight = get(arguments, WEIGHTS) + size * (g * POINTS * step + o1 * C_)
                    multiply(arguments, sums, weight, step, inputs, panels, tiles)
                else:
                    if kept != g * O_ + o1:
                        kept = g * O_ + o1
                        at = get(arguments, WEIGHTS) + g * get(arguments, SKG) + o1 * sko
                        for o in range(panels):
                            panel(
                                own + size * o * MR * C_, beside, at + o * MR * sko, min(MR, here - o * MR), C_, sko,
                                get(arguments, SKC), get(arguments, SKP), get(arguments, SKQ), own_step,
                            )  # fmt: skip
                    multiply(arguments, sums, own, own_step, inputs, panels, tiles)
                for o in range(here):
                    bias = finish + size * (2 + MR + g * padded + o1 + o)
                    result((made, sums + size * o * ldc, sum_step, line, tiles, bias, finish + size))
                    for i in range(TILE * i0, min(TILE * i1, OH_)):
                        write(
                            target + (o1 + o) * syo + i * syh,
                            made + size * (i % TILE * line + TILE * (i // TILE - i0) * (j1 - j0)),
                            min(TILE * (j1 - j0), OW_ - TILE * j0), syw,
                        )  # fmt: skip

    return winograd
