"""Image filters that are an outer product of a column and a row, in KH + KW products instead of KH·KW.

    t[n,g,o,i,v] = Σ_p x[n,g, i+p-pad, v] · u[g,o,p]      y[n,g,o,i,j] = b[g,o] + Σ_q t[n,g,o,i, j+q-pad] · v[g,o,q]

Whether a kernel is one is found by ``separability`` before implementations are asked. A few rows of t are made at a
time, on the columns of one block, and used up at once, so that they stay in a core's first-level cache. Both sums are
those of ``rows_kernel``: of a kernel with one column, and of one with one row.

Inside an image x is read where it lies. Where rows of the padding take part, and beside the first and last columns, a
*window* is copied first, as ``strip`` does.

Relative to ``|x| ∗ |k|`` the error of each result is at most ``separability.TOLERANCE``, which is what the two factors
may differ from k by, and 2⁻²⁴ for each product of a running sum, for each running sum, and for both of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import schedule, separability
from gpuconv.backends.numba_cpu import axes, dense, runtime, strip
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.rows_kernel import row_tile
from gpuconv.backends.numba_cpu.vectors import Lanes, get
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.separable"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward",))

unavailable = runtime.unavailable

# The table of arguments is that of ``strip``, whose windows these are, and more.
X, WEIGHTS, Y, SCRATCH, FINISH, FILL = strip.X, strip.WEIGHTS, strip.Y, strip.SCRATCH, strip.FINISH, strip.FILL
SXN, SXG, SXH = strip.SXN, strip.SXG, strip.SXH
SYN, SYG, SYO, SYH, SYW = strip.SYN, strip.SYG, strip.SYO, strip.SYH, strip.SYW
N, G, O, OH, OW, KH, KW = strip.N, strip.G, strip.O, strip.OH, strip.OW, strip.KH, strip.KW
HIGH, WIDE, PLACES, PITCH, PER_THREAD = strip.HIGH, strip.WIDE, strip.PLACES, strip.PITCH, strip.PER_THREAD
H, W, TOP, LEFT, IN_PLACE_X, IN_PLACE_Y, FINISHED, DOWN, ACROSS, RAMP = range(strip.END, strip.END + 10)

# Rows, and vectors of columns, of a tile of t by the bits of a register; vectors of a tile of y, which is one row.
_TILE = {512: (4, 6), 256: (4, 2), 128: (4, 2)}
_LONG = {512: 12, 256: 8, 128: 8}
# The least rows and columns of a kernel: a tile's rows, as ``row_tile`` has it.
_LEAST = 4
# Products in one running sum, at most.
_SUM = 64
# Bytes of a window, in a core's second-level cache or near; rows of outputs, and the columns that are not cut further.
_WINDOW, _HIGH, _WIDE = 1 << 20, 64, 256


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = dense.unsupported(problem, target)
    if problem.C != problem.groups:
        reasons.append(f"it sums over one channel per group, not {problem.C // problem.groups}")
    if min(problem.KH, problem.KW) < _LEAST:
        reasons.append(f"it is for kernels of at least {_LEAST}×{_LEAST}")
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        reasons.append("it is for kernels without stride and dilation")
    if {problem.x_dtype, problem.k_dtype, problem.y_dtype} != {"float32"}:
        reasons.append("it is for float32")
    if problem.precision == "highest":
        reasons.append("its rounding errors are larger than precision='highest' allows")
    if problem.layout != "NCHW":
        reasons.append("it is for layout NCHW: rows of one channel")
    if not target.separable:
        reasons.append("k is no outer product of a column and a row, or only its shape is known")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the strips."""
    lanes = dense.lanes_of(problem, target)
    height, vectors = _TILE[lanes.bits]
    width = vectors * lanes.count
    filters = problem.O
    tables = 2 * (problem.OH + problem.OW + problem.KH + 2 * problem.KW) + 2 * runtime.TABLE

    def shape(tiles: int, wide: int) -> tuple[int, int, int]:
        """Places and pitch of a window of ``tiles`` × ``wide`` outputs; elements with the rows of t and one of y."""
        places = tiles * height + problem.KH - 1
        pitch = strip.odd_lines(wide + problem.KW - 1, lanes)
        return places, pitch, (places + height + 1) * pitch + width + 2 * (64 // lanes.size)

    def scratch(tiles: int, wide: int) -> int:
        weights = filters * (problem.KH * problem.KW + 3 * (problem.KH + problem.KW) + 1)
        elements = target.threads * shape(tiles, wide)[2] + weights
        return elements * lanes.size + separability.scratch(problem.KH, problem.KW) + 8 * tables + 4096

    tiles_down = -(-problem.OH // height)
    tiles, wide = schedule.fit((tiles_down, problem.OW), scratch, limit, f"{NAME} on {problem}")
    tiles = min(tiles, _HIGH // height)
    wide = schedule.halved(wide, lambda w: shape(tiles, w)[2] * lanes.size <= _WINDOW, at_least=_WIDE)
    if problem.N * filters % target.threads:  # the same number of strips for every thread
        strips = -(-tiles_down // tiles)
        strips = -(-strips // target.threads) * target.threads
        tiles = max(1, -(-tiles_down // strips))
    wide = -(-problem.OW // -(-problem.OW // max(wide, 1)))
    places, pitch, each = shape(tiles, wide)
    threads = 1 if problem.result_size * (problem.KH + problem.KW) < strip.ALONE else target.threads
    detail = f"a column, then a row; strips of {tiles * height}×{wide} pixels, {lanes}"
    config = {
        "lanes": lanes, "high": tiles * height, "wide": wide, "places": places, "pitch": pitch, "each": each,
        "threads": threads,
    }  # fmt: skip
    return Plan(problem, scratch(tiles, wide), lanes.dtype, detail, config)


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    return f"separable_{plan.config['lanes']}"


def pack_key(plan: Plan) -> Any:
    """What the kept weights depend on besides the weights."""
    return "separable"


def pack(plan: Plan, operands: Operands) -> Any:
    """Each filter's column, the rows of each running sum backwards, and its row."""
    found = separability.factors(operands.k)
    if found is None:
        raise ValueError(f"{NAME}: k is no outer product of a column and a row")
    columns, rows = found
    taps, sums = plan.problem.KH, _sums(plan.problem.KH)
    parts = [columns[..., s * taps // sums : (s + 1) * taps // sums][..., ::-1] for s in range(sums)]
    return np.concatenate([*parts, rows], axis=-1)


def _sums(taps: int) -> int:
    """Running sums, which have even shares of the taps: none has fewer than a tile has rows."""
    return -(-taps // _SUM)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution of NumPy operands into ``out``."""
    problem, config, x = plan.problem, plan.config, operands.x
    lanes = config["lanes"]
    packed = pack(plan, operands) if operands.packed is None else operands.packed
    down, across = (
        axes.axis(n, k, made, pads[0], 1, 1, problem.padding_mode)
        for n, k, made, pads in zip(
            (problem.H, problem.W), (problem.KH, problem.KW), (problem.OH, problem.OW), problem.padding, strict=True
        )
    )
    tables = (down.source(), across.source(), np.array(across.inside, np.int64), np.arange(problem.KW, dtype=np.int64))
    table, address = np.zeros(runtime.TABLE, np.int64), [kept.ctypes.data for kept in tables]
    table[strip.SXN : strip.SXN + 10] = *x.strides, *out.strides
    for index, value in {
        N: problem.N, G: problem.groups, O: problem.O // problem.groups, OH: problem.OH, OW: problem.OW, KH: problem.KH,
        KW: problem.KW, HIGH: config["high"], WIDE: config["wide"], PLACES: config["places"], PITCH: config["pitch"],
        PER_THREAD: config["each"], strip.ROW_PHASES: 1, strip.COLUMN_PHASES: 1, strip.ROW_SOURCE: address[0],
        strip.COLUMN_SOURCE: address[1], strip.INSIDE: address[2], strip.ROW_EXTENT: down.extent,
        strip.COLUMN_EXTENT: across.extent, strip.STRIDE: 1, strip.BORDER: problem.padding_mode == "constant",
        H: problem.H, W: problem.W, TOP: problem.padding[0][0], LEFT: problem.padding[1][0],
        IN_PLACE_X: x.strides[4] == lanes.size and x.strides[3] % lanes.size == 0,
        IN_PLACE_Y: out.strides[4] == lanes.size, FINISHED: problem.bias or problem.activation is not None,
        DOWN: _sums(problem.KH), ACROSS: _sums(problem.KW), RAMP: address[3],
    }.items():  # fmt: skip
        table[index] = value
    kernel = runtime.kernel(kernel_name(plan), lambda: _kernel(lanes))
    task = runtime.Task(kernel, table[runtime.ARRAYS :].tolist(), config["threads"], tables)
    finish = dense.finishing(problem, operands.bias, problem.O // problem.groups, 0, lanes)
    scratch = runtime.aligned(config["threads"] * config["each"], lanes.dtype)
    task(x, packed, out, scratch, finish, dense.constant(problem, lanes))


def _kernel(lanes: Lanes) -> Callable[..., None]:
    size, lane_count = lanes.size, lanes.count
    height, vectors = _TILE[lanes.bits]
    some = max(1, vectors // 2)
    width, half, long = vectors * lane_count, some * lane_count, _LONG[lanes.bits] * lane_count
    whole_tile, some_tile, one_tile = (row_tile(lanes, height, count, (0,)) for count in (vectors, some, 1))
    long_row, short_row = (row_tile(lanes, 1, count, (1,)) for count in (_LONG[lanes.bits], 1))
    some_row = row_tile(lanes, 1, some, (1,))
    fill = strip.filler(lanes, "float32")
    _, write, repeat = rows(lanes, "float32")

    @compiled
    def columns_of(arguments, u, x, line, to, first, end):
        """Places ``first`` to ``end`` of a tile's rows of t at ``to``, from the lines at ``x``, and some beyond."""
        pitch, taps, sums = get(arguments, PITCH), get(arguments, KH), get(arguments, DOWN)
        ramp = get(arguments, RAMP)
        for s in range(sums):
            p = s * taps // sums
            a, at, n = u + size * p, x + size * p * line, (s + 1) * taps // sums - p
            j = first
            while j < end:
                given = (a, at + size * j, ramp, to + size * j, n, 1, line, pitch, p, 0, lane_count, a, a)
                if end - j > width - lane_count:
                    whole_tile(given)
                    j += width
                elif end - j > half - lane_count:
                    some_tile(given)
                    j += half
                else:
                    one_tile(given)
                    j += lane_count

    @compiled
    def row_of(arguments, v, t, to, wide, bias):
        """A row of y at ``to``, from a row of t."""
        taps, sums = get(arguments, KW), get(arguments, ACROSS)
        ramp, floor = get(arguments, RAMP), get(arguments, FINISH) + size
        for s in range(sums):
            q = s * taps // sums
            n = (s + 1) * taps // sums - q
            finish = get(arguments, FINISHED) if q + n == taps else 0
            j = 0
            while j < wide:
                left = wide - j
                a, at, c = v + size * q, t + size * (q + j), to + size * j
                if left > long - lane_count:
                    last = min(lane_count, left - long + lane_count)
                    long_row((a, at, ramp, c, 1, n, 0, 0, q, finish, last, bias, floor))
                    j += long
                elif left > half - lane_count:
                    last = min(lane_count, left - half + lane_count)
                    some_row((a, at, ramp, c, 1, n, 0, 0, q, finish, last, bias, floor))
                    j += half
                else:
                    short_row((a, at, ramp, c, 1, n, 0, 0, q, finish, min(lane_count, left), bias, floor))
                    j += lane_count

    @compiled
    def block(arguments, u, image, target, i0, i1, j0, j1, bias, window, t, beside):
        """The outputs of rows i0 to i1 and columns j0 to j1."""
        pitch, taps = get(arguments, PITCH), get(arguments, KH)
        top, left = get(arguments, TOP), get(arguments, LEFT)
        lines = (i1 - i0 + height - 1) // height * height + taps - 1
        columns = j1 - j0 + get(arguments, KW) - 1
        # Columns a to b are read where they lie, in whole vectors; what is around them from a copy.
        a = b = 0
        if get(arguments, IN_PLACE_X) != 0 and i0 >= top and i0 - top + lines <= get(arguments, H):
            a = min(max(0, left - j0), columns)
            b = min(columns, get(arguments, W) + left - j0)
            b = max(a, a + (b - a) // lane_count * lane_count)
        copied = min(lines, get(arguments, OH) + taps - 1 - i0)
        if a > 0:
            fill(arguments, window, image, 1, i0, copied, j0, a, False)
        if b < columns:
            fill(arguments, window + size * b, image, 1, i0, copied, j0 + b, columns - b, False)
        line = get(arguments, SXH) // size
        near = image + size * ((i0 - top) * line + j0 - left)
        step, across = get(arguments, SYH), get(arguments, SYW)
        for i in range(i0, i1, height):
            far = window + size * (i - i0) * pitch
            columns_of(arguments, u, far, pitch, t, 0, a)
            columns_of(arguments, u, near + size * (i - i0) * line, line, t, a, b)
            columns_of(arguments, u, far, pitch, t, b, columns)
            for r in range(min(height, i1 - i)):
                to, source = target + (i + r) * step + j0 * across, t + size * r * pitch
                if get(arguments, IN_PLACE_Y) != 0:
                    row_of(arguments, u + size * taps, source, to, j1 - j0, bias)
                else:
                    row_of(arguments, u + size * taps, source, beside, j1 - j0, bias)
                    write(to, beside, j1 - j0, across)

    def convolve(arguments, thread, threads):
        high, wide = get(arguments, HIGH), get(arguments, WIDE)
        G_, O_, OH_, OW_ = get(arguments, G), get(arguments, O), get(arguments, OH), get(arguments, OW)
        down, across = (OH_ + high - 1) // high, (OW_ + wide - 1) // wide
        window = (get(arguments, SCRATCH) + size * thread * get(arguments, PER_THREAD) + 63) // 64 * 64
        t = window + size * get(arguments, PLACES) * get(arguments, PITCH)
        beside = t + size * (height * get(arguments, PITCH) + width)
        # What is computed beyond the ends of rows is dropped, but it must not be numbers too small to be quick.
        repeat(window, get(arguments, FILL), (beside - window) // size)
        tasks = get(arguments, N) * G_ * O_ * down * across
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            plane, place = task // (down * across), task % (down * across)
            n, g, o = plane // (G_ * O_), plane // O_ % G_, plane % O_
            i0, j0 = place % down * high, place // down * wide
            u = get(arguments, WEIGHTS) + size * (g * O_ + o) * (get(arguments, KH) + get(arguments, KW))
            source = get(arguments, X) + n * get(arguments, SXN) + g * get(arguments, SXG)
            target = get(arguments, Y) + n * get(arguments, SYN) + g * get(arguments, SYG) + o * get(arguments, SYO)
            block(
                arguments, u, source, target, i0, min(OH_, i0 + high), j0, min(OW_, j0 + wide),
                get(arguments, FINISH) + size * (2 + g * O_ + o), window, t, beside,
            )  # fmt: skip

    return convolve
