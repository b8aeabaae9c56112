"""Depthwise convolution of images whose few channels lie side by side (NHWC): a photograph, filtered colour by colour.

    y[n,i,j,c] = b[c] + Σ_pq x[n, i·s+p-pad, j+q·d-pad, c] · k[c,p,q]

A row of pixels is one long row of numbers, and a tap is as many numbers further as a pixel has, times q·d. So this is
the convolution of one plane, whose weights change from column to column and come again after the channels: a vector
register holds those of neighbouring columns, of which there are few kinds (of three channels three, whatever its
width). The lines that a block of outputs reads are copied first, converted and padded; the tiles are those of
``planes``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import geometry, schedule
from gpuconv.backends.numba_cpu import dense, runtime
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.planes_kernel import ANYWHERE, INSIDE, band
from gpuconv.backends.numba_cpu.runtime import take
from gpuconv.backends.numba_cpu.strip import ALONE
from gpuconv.backends.numba_cpu.vectors import SIZE, Lanes, get
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.interleaved"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

# Kernel rows whose weights have registers of their own beside the sums, and registers.
_ROWS, _REGISTERS = 7, 16
# Channels of a result, whose weights are to stay in the first-level cache beside what they are multiplied with.
_CHANNELS = 64
# Pixels that an output reaches.
_REACH = 1 << 12
# Bytes of a line, of which a tile's stay in a core's second-level cache. Long ones: bytes of 2048² pixels of three
# channels, 3×3, AVX2, 256 pixels of a line 9.2 ms, 512 7.3, 1024 6.8, all 6.0; of several tiles' rows the same.
_LINE = 32 << 10

# The table of arguments.
X, WEIGHTS, Y, SCRATCH, FINISH, FILL = range(runtime.ARRAYS)
(
    SXN, SXC, SXH, SXW, SYN, SYC, SYH, SYW,  # steps in bytes
    N, C, OH, OW, KW, STEP, KINDS,  # KINDS of vectors, by their weights
    WIDE, PITCH, PER_THREAD,  # pixels of a block, and elements of a line that it reads
    LINE_SOURCE, SOURCE, INSIDE_FIRST, INSIDE_LAST, LEFT,  # which row and pixel of x stands at each place, -1 for none
    NEAR_X, NEAR_Y, FINISHED,
) = range(runtime.ARRAYS, runtime.ARRAYS + 26)  # fmt: skip


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = dense.unsupported(problem, target)
    if problem.layout != "NHWC":
        reasons.append("it is for channels that lie side by side; pass layout='NHWC' with such arrays")
    if not problem.C == problem.O == problem.groups:
        reasons.append("it is for one input and one output channel per group")
    if problem.groups > _CHANNELS:
        reasons.append(f"it is for up to {_CHANNELS} channels")
    if problem.KH > _ROWS:
        reasons.append(f"it has registers for the weights of {_ROWS} kernel rows, not {problem.KH}")
    if problem.KH * problem.KW > BLOCK:
        reasons.append(f"it has one sum for all products, of which there are to be at most {BLOCK}")
    if problem.KH > 1 and problem.dilation[0] > 1:
        reasons.append("it has no dilation of the kernel's rows: outputs below each other would share no line")
    if (problem.KW - 1) * problem.dilation[1] > _REACH:
        reasons.append(
            f"an output reaches {(problem.KW - 1) * problem.dilation[1]} pixels, and it copies up to {_REACH}"
        )
    if problem.op == "forward" and (problem.stride[0] > 2 or problem.stride[1] > 1):
        reasons.append("it is for a stride of 1, or of 2 between rows")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the tile and the blocks."""
    return dense.plan(_plan, problem, target, limit)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes, channels = dense.lanes_of(problem, target), problem.O
    down, reach = problem.stride[0], (problem.KW - 1) * problem.dilation[1]
    height = tile_of(problem, lanes)
    whole = math.lcm(lanes.count, channels) // channels  # pixels after which the same weights come again
    kinds = whole * channels // lanes.count

    def pitch(units: int) -> int:
        return units * whole * channels + reach * channels + lanes.count

    def each(units: int) -> int:
        lines = (height - 1) * down + problem.KH
        return lines * pitch(units) + height * units * whole * channels + 64 // lanes.size

    def scratch(units: int) -> int:
        packed = kinds * lanes.count * (2 * problem.KH * problem.KW + 2) * lanes.size
        tables = 16 * ((problem.OH - 1) * down + problem.KH + problem.OW + reach)
        return target.threads * each(units) * lanes.size + packed + tables + 4096

    (units,) = schedule.fit((-(-problem.OW // whole),), scratch, limit, f"{NAME} on {problem}")
    units = schedule.halved(units, lambda u: pitch(u) * lanes.size <= _LINE)
    # Enough blocks for every thread.
    bands = max(problem.N, 1) * -(-problem.OH // height)
    units = schedule.halved(units, lambda u: bands * -(-problem.OW // (u * whole)) >= 4 * target.threads)
    threads = 1 if problem.result_size * problem.products < ALONE else target.threads
    config = {
        "lanes": lanes, "threads": threads, "each": each(units), "kinds": kinds, "height": height,
        "wide": units * whole, "pitch": pitch(units),
    }  # fmt: skip
    detail = f"blocks of {height} rows × {units * whole} pixels, {lanes}"
    return Plan(problem, scratch(units), lanes.dtype, detail, config)


def tile_of(problem: Conv2dProblem, lanes: Lanes) -> int:
    """Rows of a tile, one vector wide: the same for every image, since a kernel is compiled for each number of them."""
    return 14 if lanes.bits == 512 else max(7, min(10, _REGISTERS - 3 - problem.KH))


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    problem = plan.problem
    tile = f"{plan.config['height']}_{problem.KH}_{problem.stride[0]}"
    return f"interleaved_{plan.config['lanes']}_{problem.x_dtype}_{problem.y_dtype}_{tile}"


def pack_key(plan: Plan) -> Any:
    """What the packed weights depend on besides the weights."""
    return "interleaved", str(plan.config["lanes"])


def pack(plan: Plan, operands: Operands) -> Any:
    """The weights as packed[kind of vector][q][p][lane]."""
    return _packed(plan, operands.k)


def _packed(plan: Plan, k: Any) -> np.ndarray[Any, Any]:
    lanes, problem = plan.config["lanes"], plan.problem
    weights = dense.converted(k, lanes.dtype).reshape(problem.O, problem.KH, problem.KW)
    return np.ascontiguousarray(weights[_channel_of_lane(plan)].transpose(0, 3, 2, 1))


def _channel_of_lane(plan: Plan) -> np.ndarray[Any, Any]:
    """(kinds of vectors, lanes): the channel of each."""
    lanes, kinds = plan.config["lanes"], plan.config["kinds"]
    columns: np.ndarray[Any, Any] = np.arange(kinds * lanes.count) % plan.problem.O
    return columns.reshape(kinds, lanes.count)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    if out.size:
        dense.once(Bound, plan, operands, out)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, ``out``, and the weights ``k`` where they are not packed already."""
        problem, config, self.plan = plan.problem, plan.config, plan
        self.lanes = lanes = config["lanes"]
        self.alone = problem.result_size * problem.products < ALONE
        self.form = None if k is None else (k.shape, k.strides)
        channels = problem.C
        (top, _), (left, _) = problem.padding
        places = problem.OW + (problem.KW - 1) * problem.dilation[1]
        sources = tuple(
            np.ascontiguousarray(geometry.source_index(np.arange(count) - before, extent, problem.padding_mode))
            for count, before, extent in (
                ((problem.OH - 1) * problem.stride[0] + problem.KH, top, problem.H), (places, left, problem.W),
            )
        )  # fmt: skip
        first = min(max(left, 0), places)
        last = min(max(left + problem.W, first), places)
        sxn, sxc, _, sxh, sxw = x.strides
        syn, syc, _, syh, syw = out.strides
        steps = syn, syh, syw, syc
        near = out.dtype == lanes.dtype and syc == lanes.size and syw == channels * lanes.size
        entries = [
            sxn, sxc, sxh, sxw, syn, syc, syh, syw, problem.N, channels, problem.OH, problem.OW,
            problem.KW, problem.dilation[1], config["kinds"], config["wide"], config["pitch"],
            config["each"], *(table.ctypes.data for table in sources), first, last, left,
            sxc == x.itemsize and sxw == channels * x.itemsize,
            near and all(step % lanes.size == 0 for step in steps), problem.bias or problem.activation is not None,
        ]  # fmt: skip
        height, KH = config["height"], problem.KH
        kernel = runtime.kernel(
            kernel_name(plan), lambda: _kernel(lanes, problem.x_dtype, problem.y_dtype, height, KH, problem.stride[0])
        )
        self.task = runtime.Task(kernel, entries, config["threads"], sources)
        self.fill = dense.constant(problem, lanes)
        self.finish = self._finishing(None)

    def _finishing(self, bias: Any | None) -> np.ndarray[Any, Any]:
        """The least value of a result, and a bias for each lane of each kind of vector."""
        values = np.zeros(1 + self.plan.config["kinds"] * self.lanes.count, self.lanes.dtype)
        values[0] = 0.0 if self.plan.problem.activation == "relu" else -np.inf
        if bias is not None:
            with np.errstate(all="ignore"):
                values[1:] = bias.astype(self.lanes.dtype)[_channel_of_lane(self.plan).ravel()]
        return values

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if packed is None and self.form is not None:
            packed = _packed(self.plan, np.lib.stride_tricks.as_strided(k, *self.form))
        scratch = np.empty(self.plan.config["threads"] * self.plan.config["each"], self.lanes.dtype)
        self.task(x, packed, out, scratch, self.finish if bias is None else self._finishing(bias), self.fill)


def _kernel(lanes: Lanes, x_dtype: str, y_dtype: str, height: int, KH: int, down: int) -> Callable[..., None]:
    size, lane_count, y_size = lanes.size, lanes.count, SIZE[y_dtype]
    anywhere, inside = (band(lanes, height, 1, KH, (down, 1), kind, True) for kind in (ANYWHERE, INSIDE))
    read, _, fill = rows(lanes, x_dtype)
    _, write, _ = rows(lanes, y_dtype)

    @compiled
    def places(arguments, to, source, first, end):
        """Places ``first`` to ``end`` of a padded row of x, pixel by pixel."""
        sxw, channels = get(arguments, SXW), get(arguments, C)
        for u in range(first, end):
            column = get(get(arguments, SOURCE), u)
            if column < 0:
                fill(to, get(arguments, FILL), channels)
            else:
                read(to, source + column * sxw, channels, get(arguments, SXC))
            to += size * channels

    @compiled
    def line(arguments, to, source, first, end):
        """Places ``first`` to ``end`` of a padded row of x: what steps through the row at once, if it is near."""
        channels = get(arguments, C)
        inner = min(max(get(arguments, INSIDE_FIRST), first), end)
        outer = max(min(get(arguments, INSIDE_LAST), end), inner)
        if get(arguments, NEAR_X) == 0 or inner == outer:
            places(arguments, to, source, first, end)
        else:
            near = source + (inner - get(arguments, LEFT)) * get(arguments, SXW)
            places(arguments, to, source, first, inner)
            read(to + size * (inner - first) * channels, near, (outer - inner) * channels, get(arguments, SXC))
            places(arguments, to + size * (outer - first) * channels, source, outer, end)

    @compiled
    def tiles(arguments, x, y, ldy, width, high):
        """The outputs of ``high`` rows, no more than a tile's, and ``width`` columns, from lines in memory."""
        channels, KW_, pitch = get(arguments, C), get(arguments, KW), get(arguments, PITCH)
        kinds, count = get(arguments, KINDS), width // lane_count
        weights = KW_ * KH * lane_count
        for kind in range(min(kinds, count + 1)):
            # Tiles with the same weights, and where the last vector of a row is cut, that one.
            same, last = (count - kind + kinds - 1) // kinds, 0
            if count % kinds == kind:
                last = width - count * lane_count
            bias, k = (
                get(arguments, FINISH) + size * (1 + kind * lane_count),
                get(arguments, WEIGHTS) + size * kind * weights,
            )
            for part in range(2):
                some, column, columns = same, kind * lane_count, lane_count
                if part == 1:
                    some, column, columns = min(last, 1), count * lane_count, last
                given = (
                    some, k, 0, x + size * column, kinds * lane_count, y + size * column, kinds * lane_count, bias, 0,
                    KW_, lane_count, KH * lane_count, pitch, get(arguments, STEP) * channels, ldy, 0,
                    (high - 1) * down + KH, 0, 1 << 40, high, columns, get(arguments, FINISHED), get(arguments, FINISH),
                )  # fmt: skip
                if part == 0 and high == height:
                    inside(given)
                else:
                    anywhere(given)

    @compiled
    def block(arguments, n, i0, i1, j0, j1, memory):
        """The outputs of rows i0 to i1, no more than a tile's, and pixels j0 to j1 of image n."""
        channels, pitch = get(arguments, C), get(arguments, PITCH)
        x = get(arguments, X) + n * get(arguments, SXN)
        end = j1 + (get(arguments, KW) - 1) * get(arguments, STEP)
        lines = (i1 - i0 - 1) * down + KH
        for l in range(lines):
            row, to = get(get(arguments, LINE_SOURCE), i0 * down + l), memory + size * l * pitch
            if row < 0:
                fill(to, get(arguments, FILL), (end - j0) * channels)
            else:
                line(arguments, to, x + row * get(arguments, SXH), j0, end)
        syh, syw, syc = get(arguments, SYH), get(arguments, SYW), get(arguments, SYC)
        width, beside = (j1 - j0) * channels, memory + size * lines * pitch
        high, y = i1 - i0, get(arguments, Y) + n * get(arguments, SYN) + i0 * syh + j0 * syw
        if get(arguments, NEAR_Y):
            tiles(arguments, memory, y, syh // size, width, high)
            return
        tiles(arguments, memory, beside, width, width, high)
        for t in range(high):
            if syc == y_size and syw == channels * y_size:
                write(y + t * syh, beside + size * t * width, width, syc)
            else:
                for j in range(j1 - j0):
                    write(y + t * syh + j * syw, beside + size * (t * width + j * channels), channels, syc)

    def convolve(arguments, thread, threads):
        OH_, OW_, wide = get(arguments, OH), get(arguments, OW), get(arguments, WIDE)
        bands, across = (OH_ + height - 1) // height, (OW_ + wide - 1) // wide
        memory = (get(arguments, SCRATCH) + size * thread * get(arguments, PER_THREAD) + 63) // 64 * 64
        while True:
            task = take(arguments)
            if task >= get(arguments, N) * bands * across:
                break
            n, place = task // (bands * across), task % (bands * across)
            i, j = place // across * height, place % across * wide
            block(arguments, n, i, min(i + height, OH_), j, min(j + wide, OW_), memory)

    return convolve
