"""Convolution with one input channel per output, for arrays of rows: depthwise layers and image filters.

    y[n,g,o,i,j] = b[g,o] + Σ_pq x[n,g, i·s+p-pad, j·s+q·d-pad] · k[g,o,p,q]

With nothing to sum over but the kernel, a matrix product has too few products per load. Here the outputs of several
rows stand in registers and share the lines of the image that they read (``rows_kernel``).

The inside of a large image is read where it lies and written where it belongs. Near the borders, and for strides,
small images and 16-bit floats, a *window* of the image is copied first, padded and split by position modulo the stride.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import axes, dense, runtime, strip
from gpuconv.backends.numba_cpu.axes import Axis
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.rows_kernel import row_tile
from gpuconv.backends.numba_cpu.vectors import Lanes, get, scalar
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.rows"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

# The table of arguments is that of ``strip``, whose windows these are.
X, WEIGHTS, Y, SCRATCH, FINISH = strip.X, strip.WEIGHTS, strip.Y, strip.SCRATCH, strip.FINISH
SXN, SXG, SXH = strip.SXN, strip.SXG, strip.SXH
SYN, SYG, SYO, SYH, SYW = strip.SYN, strip.SYG, strip.SYO, strip.SYH, strip.SYW
SKG, SKO, SKP, SKQ = strip.SKG, strip.SKO, strip.SKP, strip.SKQ
N, G, O, OH, OW, KW = strip.N, strip.G, strip.O, strip.OH, strip.OW, strip.KW
HIGH, WIDE, PLACES, PITCH, PER_THREAD = strip.HIGH, strip.WIDE, strip.PLACES, strip.PITCH, strip.PER_THREAD
ROW_PHASES, COLUMN_PHASES = strip.ROW_PHASES, strip.COLUMN_PHASES

# (rows, vectors) of a tile by the bits of a register, for kernels of few rows and of many. With AVX2, of 12 sums, 4 × 3
# over 6 × 2: 9×9 1.16, 15×15 1.08, 31×31 1.11; there are fewer loads.
_LOW = {512: (4, 6), 256: (4, 2), 128: (4, 2)}
_TALL = {512: (6, 4), 256: (4, 3), 128: (6, 2)}
_MANY = 6
# Vectors of a tile of a single row, of a kernel of one row: as many as hide how long a multiplication takes.
_SIGNAL = 8

# Outputs in a row from which on the inside of an image is read in place.
_IN_PLACE = 257
# Bytes of a window, which stay in a core's first-level cache or not far from it.
_WINDOW = 32 << 10

# In place of the table of offsets, the table of arguments has the address of one of more facts.
FACTS = strip.OFFSETS
(
    H, W, TOP, LEFT, TAPS, REACH_DOWN, REACH_ACROSS,
    PASSES, PASS_COUNT, ORDER, COLUMNS, NEAR_COLUMNS, IN_PLACE_X, IN_PLACE_Y, FINISHED, CUT, FACT_COUNT,
) = range(17)  # fmt: skip

# What the table of passes has for each: the products of some taps with all outputs of a tile.
ROW_PHASE, SHIFT, FIRST, COUNT, ROWS, WEIGHT, PASS = range(7)


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why this cannot run ``problem``."""
    reasons = dense.unsupported(problem, target)
    inputs = problem.O if problem.op == "input_grad" else problem.C
    if inputs != problem.groups:
        reasons.append(f"it sums over one channel per group, not {inputs // problem.groups}")
    if problem.layout != "NCHW":
        reasons.append("it is for layout NCHW: rows of one channel")
    if problem.KH > 1 and problem.dilation[0] > 1:
        reasons.append("it has no dilation of the kernel's rows: outputs below each other would share no line")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose tiles, windows and strips."""
    return dense.plan(_plan, problem, target, limit)


def passes_of(down: Axis, KH: int, KW: int) -> list[tuple[int, int, int, int, int, list[int]]]:
    """(phase of the rows, first line, first column, columns, kernel rows, which these are) of each pass: at most BLOCK
    products that one sum takes, of kernel rows that read one line after the other.
    """
    columns = -(-KW // -(-KW // BLOCK))
    most = max(1, BLOCK // columns)
    found = []
    for phase in range(down.phases):
        taps = [p for p in range(KH) if down.phase[p] == phase]
        each = -(-len(taps) // -(-len(taps) // most))
        for first in range(0, len(taps), each):
            here = taps[first : first + each]
            for q in range(0, KW, columns):
                found.append((phase, down.shift[here[0]], q, min(columns, KW - q), len(here), here))
    return found


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = dense.lanes_of(problem, target)
    groups, outputs, KH, KW_ = problem.groups, problem.O // problem.groups, problem.KH, problem.KW
    down, across = (
        axes.axis(n, k, made, pads[0], stride, dilation, problem.padding_mode)
        for n, k, made, pads, stride, dilation in zip(
            (problem.H, problem.W), (KH, KW_), (problem.OH, problem.OW), problem.padding, problem.stride,
            problem.dilation, strict=True,
        )
    )  # fmt: skip
    passes = passes_of(down, KH, KW_)
    height, vectors = tile_of(problem, lanes, passes)
    width = vectors * lanes.count
    large = problem.OW >= _IN_PLACE and problem.stride == (1, 1) and down.phases == across.phases == 1

    def shape(tiles: int, columns: int) -> tuple[int, int, int]:
        """Places, pitch and elements of a window of ``tiles`` tiles × ``columns`` vectors of outputs."""
        places = tiles * height + down.reach
        pitch = (columns + 1 + -(-across.reach // lanes.count)) * lanes.count
        return places, pitch, down.phases * across.phases * places * pitch + width

    tables = down.phases * down.extent + across.phases * across.extent + 3 * across.phases + len(passes) * PASS
    tables += KH * KW_ + 2 * KW_ + 2 * runtime.TABLE

    def elements(tiles: int, columns: int) -> int:
        return shape(tiles, columns)[2] + KH * KW_ + height * width + 4 * (64 // lanes.size)

    def scratch(tiles: int, columns: int) -> int:
        weights = groups * outputs * (KH * KW_ + 1) * lanes.size
        return target.threads * elements(tiles, columns) * lanes.size + weights + 8 * tables + 4096

    tiles_down, vectors_across = -(-problem.OH // height), -(-problem.OW // lanes.count)
    tiles, columns = schedule.fit((tiles_down, vectors_across), scratch, limit, f"{NAME} on {problem}")
    columns = min(columns, vectors if large else max(vectors, 512 // lanes.count))
    columns = max(1, columns // vectors * vectors) if columns < vectors_across and columns >= vectors else columns
    tiles = schedule.halved(tiles, lambda t: shape(t, columns)[2] * lanes.size <= _WINDOW, at_least=2)
    if problem.N * groups * outputs % target.threads:  # the same number of strips for every thread
        strips = -(-tiles_down // tiles)
        strips = -(-strips // target.threads) * target.threads
        tiles = max(1, -(-tiles_down // strips))
    places, pitch, _ = shape(tiles, columns)

    threads = 1 if problem.result_size * problem.products < strip.ALONE else target.threads
    # A row is cut in parts, of whole tiles, where there are fewer strips than threads.
    strips = problem.N * groups * outputs * -(-tiles_down // tiles)
    parts = -(-4 * threads // max(strips, 1)) if strips < threads else 1
    cut = -(-problem.OW // (width * parts)) * width
    detail = f"tiles of {height} rows × {width} columns, windows of {tiles * height}×{columns * lanes.count}, {lanes}"
    config = {
        "lanes": lanes, "down": down, "across": across, "passes": passes, "high": tiles * height,
        "wide": columns * lanes.count, "places": places, "pitch": pitch, "each": elements(tiles, columns),
        "threads": threads, "large": large, "cut": max(cut, 1),
    }  # fmt: skip
    return Plan(problem, scratch(tiles, columns), lanes.dtype, detail, config)


def _tables(plan: Plan) -> tuple[Any, Any, Any]:
    """The table of arguments and the facts, but for strides, and the arrays that they point to."""
    problem, config = plan.problem, plan.config
    down, across, passes, places, pitch = (config[name] for name in ("down", "across", "passes", "places", "pitch"))
    rows_of_passes: list[list[int]] = []
    order: list[int] = []
    for phase, shift, first, count, n, taps in passes:
        rows_of_passes.append([phase, shift, first, count, n, len(order)])
        order += [p * problem.KW + q for q in range(first, first + count) for p in reversed(taps)]
    phase_size = places * pitch
    kept = {
        "rows": down.source(),
        "columns": across.source(),
        "inside": np.array(across.inside, np.int64),
        "passes": np.array(rows_of_passes, np.int64),
        "order": np.array(order, np.int64),
        "places": np.array([f * phase_size + t for f, t in zip(across.phase, across.shift, strict=True)], np.int64),
        "near": np.arange(problem.KW, dtype=np.int64) * problem.dilation[1],
    }
    address = {name: array.ctypes.data for name, array in kept.items()}
    table, facts = np.zeros(runtime.TABLE, np.int64), np.zeros(FACT_COUNT, np.int64)
    for index, value in {
        N: problem.N, G: problem.groups, O: problem.O // problem.groups, OH: problem.OH, OW: problem.OW, KW: problem.KW,
        HIGH: config["high"], WIDE: config["wide"], PLACES: places, PITCH: pitch, PER_THREAD: config["each"],
        ROW_PHASES: down.phases, COLUMN_PHASES: across.phases, strip.ROW_SOURCE: address["rows"],
        strip.COLUMN_SOURCE: address["columns"], strip.INSIDE: address["inside"], strip.ROW_EXTENT: down.extent,
        strip.COLUMN_EXTENT: across.extent, strip.STRIDE: across.stride,
        strip.BORDER: problem.padding_mode == "constant",
    }.items():  # fmt: skip
        table[index] = value
    for index, value in {
        H: problem.H, W: problem.W, TOP: problem.padding[0][0], LEFT: problem.padding[1][0],
        TAPS: problem.KH * problem.KW, REACH_DOWN: down.reach, REACH_ACROSS: across.reach, PASSES: address["passes"],
        PASS_COUNT: len(passes), ORDER: address["order"], COLUMNS: address["places"], NEAR_COLUMNS: address["near"],
        FINISHED: problem.bias or problem.activation is not None, CUT: config["cut"],
    }.items():  # fmt: skip
        facts[index] = value
    return table, facts, kept


def tile_of(problem: Conv2dProblem, lanes: Lanes, passes: list[Any]) -> tuple[int, int]:
    """Rows and vectors of a tile."""
    if problem.OH == problem.KH == 1:
        return 1, _SIGNAL
    return (_TALL if max(entry[4] for entry in passes) >= _MANY else _LOW)[lanes.bits]


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    return kernel_of(plan.problem, plan.config["lanes"], plan.config["passes"])[0]


def pack_key(plan: Plan) -> Any:
    """What the kept weights depend on besides the weights."""
    return "one channel", _first(plan).config["lanes"].dtype if _first(plan) else ""


def _first(plan: Plan) -> Any:
    if plan.problem.op != "input_grad":
        return plan
    return plan.config["parts"][0][1] if plan.config["parts"] else None


def pack(plan: Plan, operands: Operands) -> Any:
    """The weights in the type of the sums; each thread puts those of a channel in order as it comes to it."""
    return dense.converted(operands.k, plan.sums_in)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    dense.once(Bound, plan, operands, out)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, ``out``, and the weights ``k`` where they are not packed already."""
        problem, self.plan = plan.problem, plan
        config = plan.config
        self.lanes, self.scratch = config["lanes"], config["threads"] * config["each"]
        lanes = self.lanes
        self.alone = problem.result_size * problem.products < strip.ALONE
        self.converted = k is not None and (k.dtype != lanes.dtype or not k.dtype.isnative)
        form = (problem.groups, problem.O // problem.groups, 1, problem.KH, problem.KW)
        like = np.empty(form, lanes.dtype) if k is None or self.converted else k
        if "tables" not in config:
            config["tables"] = _tables(plan)
        tables = config["tables"]
        table, facts = tables[0].copy(), tables[1].copy()
        table[strip.SXN : strip.SXN + 10] = *x.strides, *out.strides
        table[[SKG, SKO, SKP, SKQ]] = *like.strides[:2], *like.strides[3:]
        same = problem.x_dtype == lanes.dtype and x.strides[4] == lanes.size and x.strides[3] % lanes.size == 0
        facts[IN_PLACE_X] = config["large"] and same
        facts[IN_PLACE_Y] = (
            problem.y_dtype == lanes.dtype and out.strides[4] == lanes.size and out.strides[3] % lanes.size == 0
        )
        table[FACTS] = facts.ctypes.data
        name, make = kernel_of(problem, lanes, config["passes"])
        entries = table[runtime.ARRAYS :]
        self.task = runtime.Task(runtime.kernel(name, make), entries, config["threads"], (tables, facts))
        self.fill = dense.constant(problem, lanes)
        self.finish = dense.finishing(problem, None, problem.O // problem.groups, 0, lanes)

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if packed is None:
            packed = dense.converted(k, self.lanes.dtype) if self.converted else k
        finish = self.finish
        if bias is not None:
            problem = self.plan.problem
            finish = dense.finishing(problem, bias, problem.O // problem.groups, 0, self.lanes)
        self.task(x, packed, out, np.empty(self.scratch, self.lanes.dtype), finish, self.fill)


def kernel_of(problem: Conv2dProblem, lanes: Lanes, passes: list[Any]) -> tuple[str, Callable[[], Callable[..., None]]]:
    """Name and maker of the kernel that serves ``problem``."""
    x, y = problem.x_dtype, problem.y_dtype
    height, vectors = tile_of(problem, lanes, passes)
    # A tile with fewer kernel rows than rows of its own, or hardly more, is written for that number.
    kinds = tuple(sorted({n if n < _MANY else 0 for *_, n, _ in passes}, reverse=True))
    name = f"rows_{lanes}_{x}_{y}_{height}x{vectors}_{'_'.join(map(str, kinds))}"
    return name, lambda: _kernel(lanes, x, y, height, vectors, kinds)


def _kernel(
    lanes: Lanes, x_dtype: str, y_dtype: str, height: int, vectors: int, kinds: tuple[int, ...]
) -> Callable[..., None]:
    size, lane_count = lanes.size, lanes.count
    width, half = vectors * lane_count, max(1, vectors // 2) * lane_count
    full, some, one = (row_tile(lanes, height, count, kinds) for count in (vectors, max(1, vectors // 2), 1))
    fill = strip.filler(lanes, x_dtype)
    _, write, repeat = rows(lanes, y_dtype)
    load, store = scalar(lanes.dtype)
    strip_fill = strip.FILL

    @compiled
    def tile(arguments, a, x, line, phase, columns, target, high, left, bias, beside):
        """Up to ``height`` × ``width`` outputs at ``target``; how many columns it were comes back. ``x`` is the address
        that the first reads first, ``phase`` the elements from a phase of the rows to the next.
        """
        facts = get(arguments, FACTS)
        direct = get(facts, IN_PLACE_Y) != 0 and high == height
        c = target if direct else beside
        ldc = get(arguments, SYH) // size if direct else width
        made = width if left > width - lane_count else (half if left > half - lane_count else lane_count)
        last = lane_count if left >= made else (left - 1) % lane_count + 1
        count = get(facts, PASS_COUNT)
        floor = get(arguments, FINISH) + size
        for index in range(count):
            entry = get(facts, PASSES) + 8 * PASS * index
            finish = get(facts, FINISHED) if index == count - 1 else 0
            given = (
                a + size * get(entry, WEIGHT), x + size * (get(entry, ROW_PHASE) * phase + get(entry, SHIFT) * line),
                columns + 8 * get(entry, FIRST), c, get(entry, ROWS), get(entry, COUNT), line, ldc, index, finish, last,
                bias, floor,
            )  # fmt: skip
            if made == width:
                full(given)
            elif made == half:
                some(given)
            else:
                one(given)
        made = min(made, left)
        if not direct:
            for t in range(high):
                write(target + t * get(arguments, SYH), beside + size * t * width, made, get(arguments, SYW))
        return made

    @compiled
    def block(arguments, a, image, target, near, i0, i1, j0, j1, bias, beside, memory):
        """The outputs of rows i0 to i1 and columns j0 to j1, from the image itself where ``near``, else copied."""
        facts = get(arguments, FACTS)
        pitch, columns = get(arguments, PITCH), get(facts, COLUMNS)
        phase = get(arguments, COLUMN_PHASES) * get(arguments, PLACES) * pitch
        step, across = get(arguments, SYH), get(arguments, SYW)
        most_high, most_wide = get(arguments, HIGH), get(arguments, WIDE)
        if near:
            pitch, columns, phase = get(arguments, SXH) // size, get(facts, NEAR_COLUMNS), 0
            most_high, most_wide = height, j1 - j0
        for i in range(i0, i1, most_high):
            high = min(i1 - i, most_high)
            for j in range(j0, j1, most_wide):
                wide = min(j1 - j, most_wide)
                x = memory
                if near:
                    x = image + size * ((i - get(facts, TOP)) * pitch + j - get(facts, LEFT))
                else:
                    fill(
                        arguments, memory, image, 1, i, high + get(facts, REACH_DOWN), j,
                        wide + get(facts, REACH_ACROSS), False,
                    )  # fmt: skip
                for t in range(0, high, height):
                    u = 0
                    while u < wide:
                        u += tile(
                            arguments, a, x + size * (t * pitch + u), pitch, phase, columns,
                            target + (i + t) * step + (j + u) * across, min(height, high - t), wide - u, bias, beside,
                        )  # fmt: skip

    @compiled
    def part(arguments, a, image, target, i0, i1, j0, j1, bias, beside, memory):
        """The outputs of rows i0 to i1 and columns j0 to j1: the inside in place, and what is around it."""
        facts = get(arguments, FACTS)
        # Tiles that read nothing but the image: rows ia to ib and columns ja to jb.
        ia, ib, ja, jb = i1, i1, j1, j1
        if get(facts, IN_PLACE_X) != 0:
            top, left = get(facts, TOP), get(facts, LEFT)
            ia = i0 + max(0, (top - i0 + height - 1) // height) * height
            below = min(i1, get(facts, H) - get(facts, REACH_DOWN) + top)
            ib = ia + max(0, (below - ia) // height) * height
            ja = j0 + max(0, (left - j0 + width - 1) // width) * width
            right = min(j1, get(facts, W) - get(facts, REACH_ACROSS) + left)
            jb = ja + max(0, (right - ja) // width) * width
            if ia >= ib or ja >= jb:
                ia, ib = i1, i1
        for region in range(5):
            near, u0, u1, v0, v1 = 0, ia, ib, j0, j1
            if region == 0:
                u0, u1 = i0, ia
            elif region == 1:
                v1 = ja
            elif region == 2:
                near, v0, v1 = 1, ja, jb
            elif region == 3:
                v0 = jb
            else:
                u0, u1 = ib, i1
            if u0 < u1 and v0 < v1:
                block(arguments, a, image, target, near, u0, u1, v0, v1, bias, beside, memory)

    def convolve(arguments, thread, threads):
        facts, high = get(arguments, FACTS), get(arguments, HIGH)
        G_, O_, OH_, taps = get(arguments, G), get(arguments, O), get(arguments, OH), get(facts, TAPS)
        strips = (OH_ + high - 1) // high
        memory = get(arguments, SCRATCH) + size * thread * get(arguments, PER_THREAD)
        memory = (memory + 63) // 64 * 64
        beside = memory + size * (
            get(arguments, PLACES) * get(arguments, PITCH) * get(arguments, ROW_PHASES) * get(arguments, COLUMN_PHASES)
            + width
        )
        a = beside + size * height * width
        # What is computed beyond the ends of rows is dropped, but it must not be numbers too small to be quick.
        repeat(memory, get(arguments, strip_fill), (beside - memory) // size)
        cut, wide = get(facts, CUT), get(arguments, OW)
        parts = (wide + cut - 1) // cut
        tasks = get(arguments, N) * G_ * strips * O_ * parts
        held = -1
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            j0, rest = task % parts * cut, task // parts
            image, rest = rest // (strips * O_), rest % (strips * O_)
            n, g, o = image // G_, image % G_, rest % O_
            i0 = rest // O_ * high
            if held != g * O_ + o:
                held = g * O_ + o
                weights = get(arguments, WEIGHTS) + g * get(arguments, SKG) + o * get(arguments, SKO)
                order, across = get(facts, ORDER), get(arguments, KW)
                for index in range(taps):
                    tap = get(order, index)
                    p, q = tap // across, tap % across
                    store(a + size * index, load(weights + p * get(arguments, SKP) + q * get(arguments, SKQ)))
            source = get(arguments, X) + n * get(arguments, SXN) + g * get(arguments, SXG)
            target = get(arguments, Y) + n * get(arguments, SYN) + g * get(arguments, SYG) + o * get(arguments, SYO)
            bias = get(arguments, FINISH) + size * (2 + g * O_ + o)
            part(
                arguments, a, source, target, i0, min(OH_, i0 + high), j0, min(wide, j0 + cut), bias, beside, memory
            )  # fmt: skip

    return convolve
