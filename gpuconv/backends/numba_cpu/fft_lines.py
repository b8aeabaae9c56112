"""Convolution along rows by Fourier transforms, within the promise of the highest precision: long filters of signals.

    Y[n,g,o,i] = Σ_c X[n,g,c,i] · conj(K[g,o,c])        transforms of segments of rows of x and y, and of the kernels

The rows of y are cut in segments (overlap-save), which are transformed twice as many at once as a register has lanes:
in each lane a segment, and another as its imaginary part. Everything else is as in ``fft``: float64, and segments of
which it is not certain beforehand that they keep the promise are summed product by product.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import axes, dense, fft_bound, fft_certain, fft_lines_kernel, fft_stages, runtime, strip
from gpuconv.backends.numba_cpu import fft_lines_table as table
from gpuconv.backends.numba_cpu.vectors import Lanes
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.fft_lines"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

# Nanoseconds, of one thread with AVX2: a complex number's share of a stage of radix 2; what else it takes on the way in
# and out, and for a product of two transforms.
_STAGE, _IN, _OUT, _PRODUCT = 0.125, 2.0, 2.0, 0.4
# What a number of a kernel's transform takes.
_KERNEL = 10.0
# A packet that stays in the first-level cache, of this many bytes, takes that long; one in a quarter of the
# second-level one, in all of it, and a larger one: so many times as long.
_FIRST, _SLOWER = 16 << 10, (1.25, 2.0, 3.5)
# Lengths of segments, and the longest kernel.
_LENGTHS = tuple(1 << digits for digits in range(6, 17))
_TAPS = 1 << 15


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = fft_bound.unsupported(problem, target)
    if problem.KH != 1 or problem.KW < fft_certain.LEAST:
        reasons.append(f"it is for kernels of one row and at least {fft_certain.LEAST} columns")
    if problem.KW > _TAPS:
        reasons.append(f"it is for kernels of at most {_TAPS} columns")
    if not reasons and fft_bound.is_whole(problem):
        for part in dense.parts(problem):
            reasons += fft_bound.too_large(part, target, _length(part, _lanes(target)))
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the segments."""
    return dense.plan(_plan, problem, target, limit)


def _length(problem: Conv2dProblem, lanes: Lanes) -> int:
    """The length of segments of least work: a matter of the image's own sizes, and of the registers, alone."""
    C, O = problem.C // problem.groups, problem.O // problem.groups
    lengths = [length for length in _LENGTHS if length >= problem.KW]
    enough = next((length for length in lengths if length >= problem.OW + problem.KW - 1), lengths[-1])

    def work(length: int) -> float:
        made = min(length - problem.KW + 1, problem.OW)
        packets = -(-problem.OH * -(-problem.OW // made) // (2 * lanes.count))
        packets += packets % 2  # two threads end together, or more
        stages = _STAGE * math.log2(length)
        size, second = 16 * length * lanes.count, runtime.l2_bytes()
        rooms = (_FIRST, second // 4, second)
        slower = (1.0, *_SLOWER)[sum(size > room for room in rooms)]
        each = C * (stages + _IN) + O * (stages + _OUT) + C * O * _PRODUCT
        # Packets are full of segments, however few there are of these.
        return length * (2 * lanes.count * packets * slower * each / 2 + C * O * _KERNEL)

    return min((length for length in lengths if length <= enough), key=lambda length: (work(length), length))


def _lanes(target: Target) -> Lanes:
    return Lanes.of("float64", target.vector_bits or runtime.vector_bits())


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = _lanes(target)
    # Not a matter of the limit: other segments, other roundings.
    length = _length(problem, lanes)
    sizes = table.Sizes.of(problem, length, lanes)
    C, K = problem.C // problem.groups, problem.KW
    kernels = problem.O * C
    tables = 2 * (problem.OH + problem.OW + 2 * K) + 2 * runtime.TABLE + 4 * length + 3 * C * K
    # Transforms of the kernels by halves, until they are in order; their magnitudes, and the least of each cell.
    packing = kernels * (2 * length + 4 * K)
    scratch = 8 * (sizes.packed + packing + target.threads * sizes.each + tables) + 65536
    if scratch > limit:
        raise schedule.shortage(f"{NAME} on {problem}", scratch, limit)
    tasks = problem.N * problem.groups * sizes.packets
    threads = min(target.threads, max(1, tasks))
    detail = f"segments of {length} pixels for {sizes.made} outputs, {2 * lanes.count} at once, {lanes}"
    config = {
        "lanes": lanes, "length": length, "sizes": sizes, "threads": threads, "alone": tasks <= 1,
        "choice": fft_certain.Choice.of(C, K, 1, length, lanes.count),
    }  # fmt: skip
    return Plan(problem, scratch, "float64", detail, config)


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    problem = plan.problem
    return f"fft_lines_{plan.config['lanes']}_{problem.x_dtype}_{problem.y_dtype}"


def pack_key(plan: Plan) -> Any:
    """What the kept kernels depend on besides the kernels."""
    return "fft lines", plan.config["length"], plan.config["lanes"].count


def pack(plan: Plan, operands: Operands) -> Any:
    """The conjugate transforms of the kernels, their facts, and their weights."""
    config, sizes, length = plan.config, plan.config["sizes"], plan.config["length"]
    k = dense.converted(operands.k, "float32")
    packed = runtime.aligned(sizes.packed, "float64")
    G, O, C, _, K = k.shape
    with np.errstate(all="ignore"):
        # Of a real line one half of the frequencies is the conjugate of the other. Lengths are powers of two.
        half = np.fft.rfft(k.reshape(G, O, C, K) * np.float64(1 / length), length)
        spectra = packed[: sizes.facts].view(np.complex128).reshape(G, O, C, length)
        places, signs = halves(length)
        np.take(half, places, axis=3, out=spectra, mode="clip")
        spectra.imag *= signs
        packed[sizes.facts : sizes.weights] = 0  # of integers it is certain by their types
        if not fft_bound.is_whole(plan.problem):
            facts = fft_certain.facts(k.reshape(G, O, C, K, 1), length, config["lanes"].count, config["choice"])
            packed[sizes.facts : sizes.weights] = facts.ravel()
        packed[sizes.weights :].view(np.float32)[: k.size] = k.ravel()
    return packed


@functools.lru_cache(maxsize=16)
def halves(length: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where each number of a real line's transform is, in the order of ``fft_stages``, among the frequencies of the
    first half, and the sign of the imaginary part of its conjugate.
    """
    frequency = fft_stages.order(length)
    first = 2 * frequency <= length
    return np.where(first, frequency, length - frequency), np.where(first, -1.0, 1.0)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    dense.once(Bound, plan, operands, out)


def _tables(plan: Plan) -> tuple[Any, Any]:
    """The table of arguments, but for strides, and the arrays that it points to."""
    problem, config, sizes = plan.problem, plan.config, plan.config["sizes"]
    down, across = (
        axes.axis(n, taps, made, pads[0], 1, 1, problem.padding_mode)
        for n, taps, made, pads in zip(
            (problem.H, problem.W), (1, problem.KW), (problem.OH, problem.OW), problem.padding, strict=True
        )
    )
    kept = (
        down.source(), across.source(), np.array(across.inside, np.int64), np.arange(problem.KW, dtype=np.int64),
        fft_bound.factors(config["length"]),
    )  # fmt: skip
    rows, columns, inside, ramp, factors = (array.ctypes.data for array in kept)
    arguments = np.zeros(runtime.TABLE, np.int64)
    entries = {
        strip.N: problem.N, strip.G: problem.groups, strip.C: problem.C // problem.groups,
        strip.O: problem.O // problem.groups, strip.OH: problem.OH, strip.OW: problem.OW, strip.KW: problem.KW,
        strip.WIDE: sizes.made, strip.PITCH: table.RUN, strip.ROW_PHASES: 1, strip.COLUMN_PHASES: 1,
        strip.ROW_SOURCE: rows, strip.COLUMN_SOURCE: columns, strip.INSIDE: inside, strip.ROW_EXTENT: down.extent,
        strip.COLUMN_EXTENT: across.extent, strip.STRIDE: 1, strip.BORDER: problem.padding_mode == "constant",
        strip.PER_THREAD: sizes.each, table.LENGTH: config["length"], table.FACTORS: factors, table.RAMP: ramp,
        table.Z: sizes.z, table.CELLS: sizes.cells, table.FACTS_AT: sizes.facts, table.WEIGHTS_AT: sizes.weights,
        table.FINISHED: problem.bias or problem.activation is not None, table.PACKETS: sizes.packets,
    }  # fmt: skip
    arguments[list(entries)] = list(entries.values())
    return arguments, kept


class Bound(fft_bound.Bound):
    """A plan for arrays of certain strides."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, ``out``, and the kernels ``k`` where they are not packed already."""
        if "tables" not in plan.config:
            plan.config["tables"] = _tables(plan)
        problem, lanes = plan.problem, plan.config["lanes"]
        kernel = runtime.kernel(
            kernel_name(plan), lambda: fft_lines_kernel.kernel(lanes, problem.x_dtype, problem.y_dtype)
        )
        arguments, kept = plan.config["tables"]
        super().__init__(plan, x, k, out, arguments, kept, kernel, pack)
