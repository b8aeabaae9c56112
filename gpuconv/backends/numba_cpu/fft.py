"""Convolution by Fourier transforms within the promise of the highest precision, for large kernels.

    Y[n,g,o] = Σ_c X[n,g,c] · conj(K[g,o,c])        X, K, Y: transforms of tiles of x, of the kernels and of y

The result is cut in tiles (overlap-save): TH × TW pixels of the padded x give TH-KH+1 rows and TW-KW+1 columns of y,
whatever the kernel's values. Two tiles of an image are transformed as one of complex numbers. All of it is in float64,
so that a result is mostly the exact one rounded once; ``fft_certain`` finds out where that is not certain, and there
the products are summed one by one, as ``rows`` does. NaN and infinity stay where they belong.

The channels are summed before the transform back, so that C images and O results take C + O transforms a tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import axes, dense, fft_bound, fft_certain, fft_kernel, runtime, strip
from gpuconv.backends.numba_cpu import fft_table as table
from gpuconv.backends.numba_cpu.vectors import Lanes
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.fft"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

# Nanoseconds, of one thread with AVX2: a complex number's share of a stage of radix 2; what else its tile takes, on the
# way in, on the way out and for a product of two transforms.
_STAGE, _IN, _OUT, _PRODUCT = 0.125, 0.8, 0.8, 0.3
# The same where a tile is larger than half of the second-level cache.
_SLOWER = 1.5
# Rows and columns of a tile, powers of two.
_SIZES = (32, 64, 128, 256, 512)
_TAPS = 256


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = fft_bound.unsupported(problem, target)
    if problem.KH < fft_certain.LEAST:
        reasons.append(f"it is for kernels of at least {fft_certain.LEAST} rows")
    if max(problem.KH, problem.KW) > _TAPS:
        reasons.append(f"it is for kernels of at most {_TAPS} rows and columns")
    if not reasons and fft_bound.is_whole(problem):
        for part in dense.parts(problem):
            tile = _tile(part)
            reasons += fft_bound.too_large(part, target, tile.TH * tile.TW)
    return reasons


class Tile(NamedTuple):
    """The pixels that are transformed at once."""

    TH: int
    TW: int
    high: int  # rows and columns of y that they give
    wide: int

    def pairs(self, problem: Conv2dProblem) -> int:
        """Pairs of tiles of an image."""
        return (-(-problem.OH // self.high) * -(-problem.OW // self.wide) + 1) // 2


def _tile(problem: Conv2dProblem) -> Tile:
    """The tile of least work: a matter of the image's own sizes alone."""
    C, O = problem.C // problem.groups, problem.O // problem.groups

    def sizes(outputs: int, taps: int) -> list[int]:
        found = [size for size in _SIZES if size >= taps]
        enough = next((size for size in found if size >= outputs + taps - 1), found[-1])
        return [size for size in found if size <= enough]

    def work(tile: Tile) -> float:
        numbers = tile.TH * tile.TW
        stages = _STAGE * math.log2(numbers)
        each = C * (stages + _IN) + O * (stages + _OUT) + C * O * _PRODUCT
        slower = _SLOWER if 32 * numbers > runtime.l2_bytes() else 1.0
        pairs = tile.pairs(problem)
        pairs += pairs % 2  # two threads end together, or more
        return numbers * (pairs * each * slower + C * O * (stages + _IN))

    found = [
        Tile(TH, TW, TH - problem.KH + 1, TW - problem.KW + 1)
        for TH in sizes(problem.OH, problem.KH)
        for TW in sizes(problem.OW, problem.KW)
    ]
    return min(found, key=lambda tile: (work(tile), tile))


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the tile."""
    return dense.plan(_plan, problem, target, limit)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = Lanes.of("float64", target.vector_bits or runtime.vector_bits())
    # Not a matter of the limit: other tiles, other roundings.
    tile = _tile(problem)
    sizes = table.Sizes.of(problem, tile.TH, tile.TW, lanes)
    C, taps = problem.C // problem.groups, problem.KH * problem.KW
    # Facts are found of the kernels' magnitudes in float64 and of what they are least in each cell.
    facts = 4 * problem.O * C * taps
    tables = 2 * (problem.OH + problem.OW + problem.KH + 2 * problem.KW) + 4 * runtime.TABLE + (2 + C) * taps
    scratch = 8 * (sizes.packed + target.threads * sizes.each + tables + facts) + 65536
    if scratch > limit:
        raise schedule.shortage(f"{NAME} on {problem}", scratch, limit)
    tasks = problem.N * problem.groups * tile.pairs(problem)
    threads = min(target.threads, max(1, tasks))
    detail = f"tiles of {tile.TH}×{tile.TW} pixels for {tile.high}×{tile.wide} outputs, {lanes}"
    passes, order = table.order_of(problem.KH, problem.KW)
    config = {
        "lanes": lanes, "tile": tile, "sizes": sizes, "passes": passes, "order": order, "threads": threads,
        "alone": tasks <= 1, "choice": fft_certain.Choice.of(C, problem.KH, problem.KW, tile.TH, tile.TW),
    }  # fmt: skip
    return Plan(problem, scratch, "float64", detail, config)


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    problem = plan.problem
    return f"fft_{plan.config['lanes']}_{problem.x_dtype}_{problem.y_dtype}"


def pack_key(plan: Plan) -> Any:
    """What the kept kernels depend on besides the kernels."""
    tile = plan.config["tile"]
    return "fft in float64", tile.TH, tile.TW, plan.config["lanes"].count


def pack(plan: Plan, operands: Operands) -> Any:
    """The conjugate transforms of the kernels, their facts, and their weights in the order in which they are summed."""
    config, sizes = plan.config, plan.config["sizes"]
    tile = config["tile"]
    k = dense.converted(operands.k, "float32")
    packed = runtime.aligned(sizes.packed, "float64")
    G, O, C, KH, KW = k.shape
    with np.errstate(all="ignore"):
        # Of integers it is certain by their types.
        whole = fft_bound.is_whole(plan.problem)
        facts = 0 if whole else fft_certain.facts(k, tile.TH, tile.TW, config["choice"]).ravel()
        packed[sizes.facts : sizes.weights] = facts
        weights = packed[sizes.weights :].view(np.float32)[: k.size].reshape(G, O, C, KH * KW)
        np.take(k.reshape(G, O, C, KH * KW), config["order"], axis=3, out=weights, mode="clip")
    stages = fft_bound.factors(tile.TH), fft_bound.factors(tile.TW)
    scale = np.array([1 / (tile.TH * tile.TW)])
    entries = {
        table.KERNELS: G * O * C, strip.KH: KH, strip.KW: KW, table.DOWN: stages[0].ctypes.data,
        table.ACROSS: stages[1].ctypes.data, table.SCALE: scale.ctypes.data, **table.shape(sizes),
    }  # fmt: skip
    arguments = np.zeros(runtime.TABLE, np.int64)
    arguments[list(entries)] = list(entries.values())
    threads = min(config["threads"], G * O * C)
    task = runtime.Task(_kernel(plan), arguments[runtime.ARRAYS :].tolist(), threads, (stages, scale))
    task(k, packed, packed, runtime.aligned(threads * sizes.each, "float64"))
    return packed


def _kernel(plan: Plan) -> int:
    problem, lanes = plan.problem, plan.config["lanes"]
    return runtime.kernel(kernel_name(plan), lambda: fft_kernel.kernel(lanes, problem.x_dtype, problem.y_dtype))


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    dense.once(Bound, plan, operands, out)


def _tables(plan: Plan) -> tuple[Any, Any]:
    """The table of arguments, but for strides, and the arrays that it points to."""
    problem, config, sizes = plan.problem, plan.config, plan.config["sizes"]
    tile = config["tile"]
    down, across = (
        axes.axis(n, taps, made, pads[0], 1, 1, problem.padding_mode)
        for n, taps, made, pads in zip(
            (problem.H, problem.W), (problem.KH, problem.KW), (problem.OH, problem.OW), problem.padding, strict=True
        )
    )
    ramp = np.arange(problem.KW, dtype=np.int64)
    # Asked for once: threads that ask at the same time may each get factors of their own.
    stages = fft_bound.factors(tile.TH), fft_bound.factors(tile.TW)
    kept = down.source(), across.source(), np.array(across.inside, np.int64), ramp, config["passes"], *stages
    rows, columns, inside, ramp_at, passes, *factors = (array.ctypes.data for array in kept)
    arguments = np.zeros(runtime.TABLE, np.int64)
    entries = {
        strip.N: problem.N, strip.G: problem.groups, strip.C: problem.C // problem.groups,
        strip.O: problem.O // problem.groups, strip.OH: problem.OH, strip.OW: problem.OW, strip.KH: problem.KH,
        strip.KW: problem.KW, strip.HIGH: tile.high, strip.WIDE: tile.wide, strip.PITCH: tile.TW,
        strip.ROW_PHASES: 1, strip.COLUMN_PHASES: 1, strip.ROW_SOURCE: rows, strip.COLUMN_SOURCE: columns,
        strip.INSIDE: inside, strip.ROW_EXTENT: down.extent, strip.COLUMN_EXTENT: across.extent, strip.STRIDE: 1,
        strip.BORDER: problem.padding_mode == "constant", table.RAMP: ramp_at, table.PASSES: passes,
        table.PASS_COUNT: len(config["passes"]), table.DOWN: factors[0],
        table.ACROSS: factors[1], table.TOP: problem.padding[0][0], table.LEFT: problem.padding[1][0],
        # Pixels that are cropped are nobody's, wherever they lie.
        table.H: min(problem.H, problem.OH + problem.KH - 1 - problem.padding[0][0]),
        table.W: min(problem.W, problem.OW + problem.KW - 1 - problem.padding[1][0]),
        table.FINISHED: problem.bias or problem.activation is not None, **table.shape(sizes),
    }  # fmt: skip
    arguments[list(entries)] = list(entries.values())
    return arguments, kept


class Bound(fft_bound.Bound):
    """A plan for arrays of certain strides."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, ``out``, and the kernels ``k`` where they are not packed already."""
        if "tables" not in plan.config:
            plan.config["tables"] = _tables(plan)
        arguments, kept = plan.config["tables"]
        arguments = arguments.copy()
        for entry, array in ((table.IN_PLACE_X, x), (table.IN_PLACE_Y, out)):
            arguments[entry] = array.strides[4] == array.itemsize and array.strides[3] % array.itemsize == 0
        super().__init__(plan, x, k, out, arguments, kept, _kernel(plan), pack)
