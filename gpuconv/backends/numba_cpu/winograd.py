"""3×3 convolution in a quarter of the products: Winograd's F(4×4, 3×3), at precisions that allow its rounding errors.

    y = Aᵀ [ Σ_c (G k Gᵀ) ⊙ (Bᵀ x B) ] A

The result is cut in tiles of 4 × 4, and those in strips of some rows of tiles. For each strip the image is transformed
(``winograd_transforms``), at each of the 36 points the channels are summed, which is a matrix product, and the sums are
transformed to the result; all of it stays in a core's own cache, or near. ``winograd_planes`` has the tiles of a strip,
one long row, in the lanes of registers; ``winograd_pixels``, for channels-last images, has channels there.

Values of x are added and subtracted before they are multiplied, so that NaN or infinity in one of them reaches all
outputs of its tiles, and rounding errors are some ten times those of a direct sum, relative to the largest results.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime, winograd_pixels, winograd_planes, winograd_weights
from gpuconv.backends.numba_cpu.microkernel import TILES
from gpuconv.backends.numba_cpu.pixels_kernel import vectors_of
from gpuconv.backends.numba_cpu.strip import ALONE
from gpuconv.backends.numba_cpu.vectors import Lanes
from gpuconv.backends.numba_cpu.winograd_transforms import POINTS, TILE, WINDOW
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.winograd"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

# Products in one running sum.
_SUM = 256
# Weights, before their transform, whose transform stays in a core's second-level cache.
_WEIGHTS = 8192
# Tasks of a thread for which it transforms the same weights again.
_REPEATED = 6
# Bytes of transformed weights that are kept. 38 MB, four times the weights, took 1.9 times as long to read from memory,
# 14², as to make anew in the cache.
_KEPT = 16 << 20
# Elements of a strip's transformed inputs and sums, and the most output channels among these.
_STRIP, _SUMMED = 450_000, 128
# Tiles of a strip with registers of 256 bits, and of channels-last images: what is read from a larger cache is used for
# many. Tiles of an image up to which threads share its output channels there, instead of its strips.
_MANY, _FEW = 56, 128


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
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the strips."""
    return dense.plan(_plan, problem, target, limit)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = dense.lanes_of(problem, target)
    groups, channels, outputs = problem.groups, problem.C // problem.groups, problem.O // problem.groups
    shapes = _Pixels(channels, outputs, lanes) if problem.layout == "NHWC" else _Planes(channels, outputs, lanes)
    unit, threads = shapes.unit, target.threads
    down, across = -(-problem.OH // TILE), -(-problem.OW // TILE)
    kc = -(-channels // -(-channels // _SUM)) if channels else 1
    padded = -(-outputs // unit) * unit
    weight_step = _odd_lines(padded * channels, lanes)
    transformed = groups * POINTS * weight_step * lanes.size
    room = winograd_weights.room(lanes, shapes.rows)

    def per_thread(high: int, wide: int, at_once: int) -> int:
        own_step = _odd_lines(at_once * channels, lanes)
        before, input_step, sum_step, _ = shapes.sizes(high, wide, at_once)
        return _lines(before + POINTS * (input_step + sum_step + own_step) + room, lanes)

    # One image: the threads share its output channels if it is small, else its strips.
    alone = problem.N * groups % threads > 0
    shared = padded > 0 and alone and down * across <= shapes.few and padded % (unit * threads) == 0
    ob = padded // threads if shared else max(padded, unit)
    at_once = min(ob, max(1, _WEIGHTS // max(channels, 1) // unit) * unit)

    def scratch(high: int, wide: int) -> int:
        each = threads * (per_thread(high, wide, at_once) + room)
        converted = problem.O * channels * 9
        return transformed + (each + converted + groups * padded) * lanes.size + shapes.tables(kc).nbytes + 4096

    most = schedule.fit((down, across), scratch, limit, f"{NAME} on {problem}")
    wide, tiles = min(across, most[1], shapes.wide), shapes.tiles(down * across, min(ob, _SUMMED))
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
    before, input_step, sum_step, more = shapes.sizes(high, wide, at_once)
    tables = shapes.tables(kc)
    entries = [
        problem.N, groups, channels, outputs, problem.H, problem.W, problem.OH, problem.OW, problem.padding[0][0],
        problem.padding[1][0], kc, high, wide, ob, at_once, input_step, sum_step, weight_step,
        _odd_lines(at_once * channels, lanes), before, per_thread(high, wide, at_once), *more, tables.ctypes.data,
    ]  # fmt: skip
    detail = f"F(4×4, 3×3), strips of {high}×{wide} tiles, {at_once} output channels at a time, {lanes}"
    config = {
        "lanes": lanes, "entries": entries, "kept": tables, "threads": threads, "padded": padded, "shapes": shapes,
        "scratch": threads * per_thread(high, wide, at_once), "weight_step": weight_step, "raw": raw,
    }  # fmt: skip
    return Plan(problem, scratch(high, wide), lanes.dtype, detail, config)


class _Planes:
    """The sizes of ``winograd_planes``."""

    def __init__(self, channels: int, outputs: int, lanes: Lanes) -> None:
        self.channels, self.lanes = channels, lanes
        self.rows, self.vectors = TILES[lanes.bits]
        self.unit = self.rows
        self.wide = 4 * self.vectors * lanes.count
        self.few = _FEW if lanes.bits == 256 else 240
        self.name = f"winograd_{lanes}"

    def sizes(self, high: int, wide: int, at_once: int) -> tuple[int, int, int, list[int]]:
        """Elements before the transformed inputs, and from point to point of these and of the sums, for a strip of
        high × wide tiles and ``at_once`` output channels in a step; and what the kernel is to know besides.
        """
        lanes, ldc = self.lanes, _rounded(high * wide, self.lanes.count)
        line = _lines(TILE * _rounded(wide, lanes.count) + TILE, lanes)
        plane = _lines((high + 1) * wide + 2 * lanes.count, lanes)
        before = 2 * line + TILE * (WINDOW * plane + TILE * ldc + 64 // lanes.size)
        steps = _odd_lines(self.channels * ldc, lanes), _odd_lines(at_once * ldc, lanes)
        return before, *steps, [line, plane, ldc]

    def tiles(self, all_tiles: int, outputs: int) -> int:
        """Tiles of a strip."""
        width = self.vectors * self.lanes.count
        if self.lanes.bits == 256 or all_tiles <= 2 * width + width // 3:
            return 2 * width + width // 3
        room = _STRIP // (POINTS * (self.channels + outputs)) // width * width
        return min(max(width, room), 3 * width)

    def tables(self, kc: int) -> np.ndarray[Any, Any]:
        """Where the channels of some vectors of tiles begin, for each number of vectors."""
        return np.arange(kc, dtype=np.int64) * self.lanes.count * np.arange(1, self.vectors + 1)[:, None]

    def kernel(self) -> Any:
        """The kernel to be compiled."""
        return winograd_planes.kernel(self.lanes)


class _Pixels:
    """The sizes of ``winograd_pixels``."""

    def __init__(self, channels: int, outputs: int, lanes: Lanes) -> None:
        self.channels, self.lanes = channels, lanes
        self.rows, self.vectors = lanes.count, vectors_of(outputs, lanes)
        self.unit = self.rows * self.vectors
        self.wide, self.few = _MANY, _FEW
        self.name = f"winograd_pixels_{lanes}_{self.vectors}"

    def sizes(self, high: int, wide: int, at_once: int) -> tuple[int, int, int, list[int]]:
        """As of ``_Planes``."""
        lanes = self.lanes
        channels, sums = _odd_lines(self.channels, lanes), _odd_lines(at_once, lanes)
        pixel = _lines(self.channels, lanes)
        copies = max((2 + POINTS) * pixel, TILE * TILE * sums)
        before = _lines(8 * POINTS // lanes.size + copies, lanes)
        steps = _odd_lines(high * wide * channels, lanes), _odd_lines(high * wide * sums, lanes)
        return before, *steps, [channels, sums, pixel]

    def tiles(self, all_tiles: int, outputs: int) -> int:
        """Tiles of a strip."""
        return _MANY

    def tables(self, kc: int) -> np.ndarray[Any, Any]:
        """None."""
        return np.zeros(0, np.int64)

    def kernel(self) -> Any:
        """The kernel to be compiled."""
        return winograd_pixels.kernel(self.lanes, self.vectors)


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


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    return str(plan.config["shapes"].name)


def pack_key(plan: Plan) -> Any:
    """What the packed weights depend on besides the weights."""
    shapes = plan.config["shapes"]
    return "winograd", str(shapes.lanes), shapes.rows, shapes.unit


def pack(plan: Plan, operands: Operands) -> Any:
    """The transformed weights, in panels; None where they are more than it pays to keep."""
    if operands.k.shape[0] * POINTS * plan.config["weight_step"] * plan.config["lanes"].size > _KEPT:
        return None
    return _transform(plan, operands.k)(operands.k)


def _transform(plan: Plan, k: Any) -> winograd_weights.Transform:
    config, shapes = plan.config, plan.config["shapes"]
    panels = config["padded"] // shapes.rows
    return winograd_weights.Transform(k, shapes.lanes, shapes.rows, panels, config["weight_step"], config["threads"])


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
        self.transform = None if k is None or raw else _transform(plan, k)
        self.unit, self.scratch = config["shapes"].unit, config["scratch"]
        kernel = runtime.kernel(kernel_name(plan), config["shapes"].kernel)
        steps = k.strides if raw and k is not None else (0,) * 5
        entries = [*x.strides, *out.strides, raw, *steps, *config["entries"]]
        self.task = runtime.Task(kernel, entries, config["threads"], plan)
        self.fill = dense.constant(problem, lanes)
        self.finish = dense.finishing(problem, None, config["padded"], self.unit, lanes)

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if packed is None:
            packed = k if self.transform is None else self.transform(k)
        finish = self.finish
        if bias is not None:
            finish = dense.finishing(self.plan.problem, bias, self.plan.config["padded"], self.unit, self.lanes)
        self.task(x, packed, out, runtime.aligned(self.scratch, self.lanes.dtype), finish, self.fill)
