"""The input gradient of stride 2 with one output channel per group: of depthwise layers, and of images made larger.

    dx[n,g,c, h, w] = b[c] + Σ_pq dy[n,g, (h + pad - p·d) / s, (w + pad - q·e) / 2] · k[g,c,p,q]     where both divide

Even and odd columns of dx are sums over taps of their own (``phases``), and lie between each other in memory. So a tile
makes both, in registers, and weaves them into whole vectors; written one after the other, every second element each,
they take several times as long. dy, which has a quarter of the pixels, goes through a padded copy of some of its lines
in the first-level cache, where all that a tap reads for a vector of columns lies side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime
from gpuconv.backends.numba_cpu.copies import lines, rows
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.strip import ALONE
from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, get, routine
from gpuconv.backends.phases import AxisPhase, axis_phases
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.spread"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("input_grad",))

unavailable = runtime.unavailable

# Rows of a tile, whose sums for even and for odd columns stand in registers: of most planes', and of small ones'.
_HIGH, _LOW = 7, 4
# Bytes of the lines of dy that are copied together: with what is written, they stay in the first-level cache.
_LINES = 1 << 14

# The table of arguments.
X, WEIGHTS, Y, SCRATCH, FINISH, FILL = range(runtime.ARRAYS)
(
    SXN, SXG, SXH, SXW, SYN, SYG, SYC, SYH, SYW, SKG, SKC,  # steps in bytes
    N, G, C, LINES_IN, COLUMNS_IN, W,
    HIGH, STRIPS, LINES, PITCH, FIRST_LINE, FIRST_COLUMN,  # rows of a phase in a strip; the copy: its size, and where
    PHASES, TABLE_OF_PHASES, STRIDE, PER_THREAD, NEAR_X, NEAR_Y, ROW, FINISHED,
) = range(runtime.ARRAYS, runtime.ARRAYS + 31)  # fmt: skip
# The table of a phase of rows: its first row, how many there are, and the taps of even and odd columns.
_FIRST, _COUNT, _EVEN, _EVEN_TAPS, _ODD, _ODD_TAPS, _ENTRIES = range(7)


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why this cannot run ``problem``."""
    if problem.op != "input_grad":
        return ["it is for input gradients"]
    reasons = dense.unsupported(problem, target)
    if problem.O != problem.groups:
        reasons.append(f"it sums over one channel per group, not {problem.O // problem.groups}")
    if problem.layout != "NCHW":
        reasons.append("it is for layout NCHW: rows of one channel")
    if problem.KH * problem.KW > BLOCK:
        reasons.append(f"it has one sum for all products, of which there are to be at most {BLOCK}")
    step, dilation = problem.stride[1], problem.dilation[1]
    if step != 2 or dilation % 2 == 0:
        reasons.append(f"it is for a stride of 2 and an odd dilation of columns, not {step} and {dilation}")
    elif min(problem.KW, problem.W) < 2:
        reasons.append("it is for two columns of the kernel and of the result, or more")
    if reasons:
        return reasons  # such as more taps than are gone through below
    if sum(_rows(problem, phase) for phase in _of_rows(problem)) != problem.H or problem.H == 0:
        reasons.append("it is for results of which every row has a tap")
    return reasons


def _rows(problem: Conv2dProblem, phase: AxisPhase) -> int:
    """How many rows of the result are of a phase."""
    return len(range(problem.H)[phase.outputs])


def _of_rows(problem: Conv2dProblem) -> list[AxisPhase]:
    return axis_phases(problem.H, problem.KH, problem.OH, problem.padding[0][0], problem.stride[0], problem.dilation[0])


def _of_columns(problem: Conv2dProblem) -> list[AxisPhase]:
    """The phases of even and of odd columns."""
    found = axis_phases(
        problem.W, problem.KW, problem.OW, problem.padding[1][0], problem.stride[1], problem.dilation[1]
    )
    return sorted(found, key=lambda phase: int(phase.outputs.start))


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the strips, and lay out the copy of dy."""
    lanes = dense.lanes_of(problem, target)
    n, size = lanes.count, lanes.size
    of_rows, of_columns = _of_rows(problem), _of_columns(problem)
    down, across = _Reach.of(of_rows), _Reach.of(of_columns)
    # The last vector of a row overlaps the one before; only a row shorter than one is longer here.
    pitch = across.extent(max(-(-problem.W // 2), n))
    row = -(-max(problem.W, 2 * n) // n) * n  # of results, beside the array
    most = max(_rows(problem, phase) for phase in of_rows)

    def each(high: int) -> int:
        """Elements: the copy with what tiles read beyond it, a tile, rows of results, and up to whole cache lines."""
        return (down.extent(high) + _HIGH) * pitch + n + _HIGH * (2 * n + row) + 64 // size

    tables = 8 * len(of_rows) * (_ENTRIES + 4 * problem.KH * problem.KW)

    def scratch(high: int) -> int:
        return target.threads * each(high) * size + tables + problem.C * (problem.KH * problem.KW + 1) * size + 4096

    (high,) = schedule.fit((most,), scratch, limit, f"{NAME} on {problem}")
    high = schedule.halved(high, lambda h: down.extent(h) * pitch * size <= _LINES, _HIGH)
    planes = problem.N * problem.groups
    threads = 1 if problem.result_size * problem.products < ALONE else target.threads
    if planes < 4 * threads:  # few planes: strips for all threads
        high = min(high, max(_HIGH, most * planes // (4 * threads)))
    if _HIGH < high < most:
        high -= high % _HIGH
    detail = f"even and odd columns together, strips of {high} rows of each of {len(of_rows)} phases, {lanes}"
    config = {"lanes": lanes, "high": high, "strips": -(-most // high), "threads": threads, "each": each(high),
              "pitch": pitch, "row": row, "down": down, "across": across}  # fmt: skip
    return Plan(problem, scratch(high), lanes.dtype, detail, config)


class _Reach:
    """What the phases of an axis read of dy around the outputs that they make."""

    def __init__(self, before: int, after: int) -> None:
        self.before, self.after = before, after

    @classmethod
    def of(cls, found: list[AxisPhase]) -> _Reach:
        """Of all phases together."""
        return cls(
            max(phase.pads[0] for phase in found),
            max((phase.k - 1) * phase.dilation - phase.pads[0] for phase in found),
        )

    def extent(self, outputs: int) -> int:
        """Lines, or columns, that so many consecutive outputs of every phase read."""
        return outputs + self.before + self.after


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    return f"spread_{plan.config['lanes']}_{plan.problem.x_dtype}_{plan.problem.y_dtype}"


def pack_key(plan: Plan) -> Any:
    """What the kept weights depend on besides the weights."""
    return "one channel", plan.sums_in


def pack(plan: Plan, operands: Operands) -> Any:
    """The weights in the type of the sums, as they are."""
    return dense.converted(operands.k, plan.sums_in)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the input gradient of NumPy operands into ``out``, (N, G, C/G, H, W)."""
    dense.once(Bound, plan, operands, out)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, which is dy, ``out``, and the weights ``k`` where they are not packed already."""
        problem, config, self.plan = plan.problem, plan.config, plan
        self.lanes = lanes = config["lanes"]
        self.alone = config["threads"] == 1
        # Weights that cannot be read in place are copied on every call, as this view of them: a repeated call has the
        # caller's own array, whose axes may be in another order.
        self.copied = None
        if k is not None and not dense.is_readable(k, lanes):
            self.copied = k.shape, k.strides
        form = problem.groups, 1, problem.C // problem.groups, problem.KH, problem.KW
        like = np.empty(form, lanes.dtype) if k is None or self.copied else k
        phases, kept = self._phases(like.strides)
        down, across = config["down"], config["across"]
        table: Any = np.zeros(runtime.TABLE, np.int64)
        for index, value in {
            SXN: x.strides[0], SXG: x.strides[1], SXH: x.strides[3], SXW: x.strides[4], SYN: out.strides[0],
            SYG: out.strides[1], SYC: out.strides[2], SYH: out.strides[3], SYW: out.strides[4], SKG: like.strides[0],
            SKC: like.strides[2], N: problem.N, G: problem.groups, C: problem.C // problem.groups,
            LINES_IN: problem.OH, COLUMNS_IN: problem.OW, W: problem.W, HIGH: config["high"],
            STRIPS: config["strips"], LINES: down.extent(config["high"]), PITCH: config["pitch"],
            FIRST_LINE: -down.before, FIRST_COLUMN: -across.before, PHASES: len(phases),
            TABLE_OF_PHASES: phases.ctypes.data, STRIDE: problem.stride[0], PER_THREAD: config["each"],
            NEAR_X: dense.is_near(x, lanes), NEAR_Y: dense.is_near(out, lanes), ROW: config["row"],
            FINISHED: problem.bias or problem.activation is not None,
        }.items():  # fmt: skip
            table[index] = value
        kernel = runtime.kernel(kernel_name(plan), lambda: _kernel(lanes, problem.x_dtype, problem.y_dtype))
        self.task = runtime.Task(kernel, table[runtime.ARRAYS :], config["threads"], (phases, kept))
        self.scratch = config["threads"] * config["each"] + 64 // lanes.size
        self.fill = np.zeros(1, lanes.dtype)
        self.finish = dense.finishing(problem, None, problem.C // problem.groups, 0, lanes)

    def _phases(self, steps: tuple[int, ...]) -> tuple[Any, list[Any]]:
        """The table of the phases of rows, and what it points to: of every tap, in elements, where it reads in the
        copy of dy for the first output, and its weight.
        """
        problem, config, size = self.plan.problem, self.plan.config, self.lanes.size
        down, across, pitch = config["down"], config["across"], config["pitch"]
        of_rows, kept = _of_rows(problem), []
        table = np.zeros((len(of_rows), _ENTRIES), np.int64)
        for entries, row in zip(table, of_rows, strict=True):
            entries[_FIRST], entries[_COUNT] = row.outputs.start, _rows(problem, row)
            for place, column in zip((_EVEN, _ODD), _of_columns(problem), strict=True):
                taps = np.array(
                    [
                        (
                            (down.before - row.pads[0] + t * row.dilation) * pitch
                            + across.before - column.pads[0] + u * column.dilation,
                            (p * steps[3] + q * steps[4]) // size,
                        )
                        for t, p in enumerate(range(problem.KH)[row.taps])
                        for u, q in enumerate(range(problem.KW)[column.taps])
                    ],
                    np.int64,
                )  # fmt: skip
                entries[place], entries[place + 1] = taps.ctypes.data, len(taps)
                kept.append(taps)
        return table, kept

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Write the gradient into ``out``."""
        problem = self.plan.problem
        if packed is None:
            packed = k
            if self.copied is not None:
                packed = dense.converted(np.lib.stride_tricks.as_strided(k, *self.copied), self.lanes.dtype)
        finish = self.finish
        if bias is not None:
            finish = dense.finishing(problem, bias, problem.C // problem.groups, 0, self.lanes)
        self.task(x, packed, out, np.empty(self.scratch, self.lanes.dtype), finish, self.fill)


@functools.lru_cache(maxsize=64)
def woven(lanes: Lanes, rows_: int) -> Any:
    """The micro-kernel: a function of (x, k, even, even taps, odd, odd taps, pitch, y, ldy, high, W, tile, finish,
    bias, floor) that makes the first ``high`` of ``rows_`` rows of W results.

    Column 2j + 1 of row i is Σ_t x[i·pitch + j + odd[t][0]] · k[odd[t][1]], and column 2j the same of ``even``. A tile
    that is cut off goes through ``tile``. The number at ``bias`` is added where ``finish``, and the one at ``floor``
    is the least result.
    """
    n = lanes.count

    def emit(e: Emitter, x: Value, k: Value, even: Value, even_taps: Value, odd: Value, odd_taps: Value, pitch: Value,
             y: Value, ldy: Value, high: Value, W: Value, tile: Value, finish: Value, bias: Value,
             floor: Value) -> None:  # fmt: skip
        builder = e.builder
        offset, least = e.splat(builder.load(bias)), e.splat(builder.load(floor))
        pairs = builder.lshr(builder.add(W, I64(1)), I64(1))
        # The last column of pairs that a vector begins with.
        last = builder.sub(pairs, I64(n))
        last = builder.select(builder.icmp_signed("<", last, I64(0)), I64(0), last)

        def summed(here: Value, table: Value, taps: Value) -> list[Value]:
            before, loop, after = builder.block, e.block("taps"), e.block("summed")
            builder.branch(loop)
            builder.position_at_end(loop)
            t = builder.phi(I64)
            t.add_incoming(I64(0), before)
            (sums,) = e.sums(1, rows_, [(before, None)])
            tap = e.at(table, builder.shl(t, I64(1)))
            place, weight = e.at(here, builder.load(tap)), e.splat(builder.load(e.at(k, builder.load(e.at(tap, 1)))))
            new = [e.fma(e.load(e.at(place, e.times(pitch, i))), weight, total) for i, total in enumerate(sums)]
            following = builder.add(t, I64(1))
            t.add_incoming(following, loop)
            for total, value in zip(sums, new, strict=True):
                total.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, taps), loop, after)
            builder.position_at_end(after)
            return new

        def finished(values: list[Value]) -> list[Value]:
            before, apart, after = builder.block, e.block("apart"), e.block("finished")
            builder.cbranch(builder.icmp_signed("!=", finish, I64(0)), apart, after)
            builder.position_at_end(apart)
            changed = [builder.fadd(value, offset) for value in values]
            changed = [builder.select(builder.fcmp_ordered("<", value, least), least, value) for value in changed]
            builder.branch(after)
            builder.position_at_end(after)
            (found,) = e.sums(1, rows_, [(before, [values]), (apart, [changed])])
            return found

        def columns(start: Value) -> None:
            j = builder.select(builder.icmp_signed("<", start, last), start, last)
            here, left = e.at(x, j), builder.sub(W, builder.shl(j, I64(1)))
            sums = [finished(summed(here, *given)) for given in ((even, even_taps), (odd, odd_taps))]
            target = e.at(y, builder.shl(j, I64(1)))
            whole = builder.and_(
                builder.icmp_signed(">=", left, I64(2 * n)), builder.icmp_signed(">=", high, I64(rows_))
            )
            to, step = builder.select(whole, target, tile), builder.select(whole, ldy, I64(2 * n))
            for i, (a, b) in enumerate(zip(*sums, strict=True)):
                for half in range(2):
                    lanes_of = [lane // 2 + lane % 2 * n + half * n // 2 for lane in range(n)]
                    e.store(e.shuffle(a, b, lanes_of), e.at(to, e.times(step, i), half * n))
            with builder.if_then(builder.not_(whole)):

                def row(i: Value) -> None:
                    for half in range(2):
                        value = e.load(e.at(tile, e.times(i, 2 * n), half * n))
                        place = e.at(target, e.times(ldy, i), half * n)
                        rest = builder.sub(left, I64(half * n))
                        if lanes.bits == 512:
                            e.masked_store(value, place, e.mask(rest))
                        else:
                            e.store_first(value, place, rest)

                e.loop(0, high, 1, row)

        e.loop(0, builder.add(pairs, I64(n - 1)), n, columns)

    return routine(f"spread_{lanes}_{rows_}", lanes, "eetitiieiiieiee", emit)


def _kernel(lanes: Lanes, x_dtype: str, y_dtype: str) -> Callable[..., None]:
    size, n = lanes.size, lanes.count
    copy, many, some = lines(lanes, 1), woven(lanes, _HIGH), woven(lanes, _LOW)
    read, _, fill = rows(lanes, x_dtype)
    _, write, _ = rows(lanes, y_dtype)

    @compiled
    def enter(arguments, to, source, first):
        """The lines from ``first`` on that a strip reads, into the copy; ``source`` is a plane."""
        high, pitch, line = get(arguments, LINES), get(arguments, PITCH), get(arguments, SXH)
        begin = min(max(-first, 0), high)
        end = max(min(get(arguments, LINES_IN) - first, high), begin)
        left = max(get(arguments, FIRST_COLUMN), 0)
        at = left - get(arguments, FIRST_COLUMN)
        count = min(get(arguments, COLUMNS_IN) - left, pitch - at)
        fill(to, get(arguments, FILL), begin * pitch)
        if count > 0:
            source += (first + begin) * line + left * get(arguments, SXW)
            if get(arguments, NEAR_X) != 0:
                copy((to + size * (begin * pitch + at), source, end - begin, count, pitch, line // size))
            else:
                for i in range(end - begin):
                    read(to + size * ((begin + i) * pitch + at), source + i * line, count, get(arguments, SXW))
        fill(to + size * end * pitch, get(arguments, FILL), (high - end) * pitch)

    @compiled
    def phase(arguments, entries, dy, k, target, m0, tile, bias):
        """The rows of one phase of rows in a strip, of one plane of the result."""
        step, row = get(arguments, STRIDE) * get(arguments, SYH), get(arguments, ROW)
        end = min(get(entries, _COUNT) - m0, get(arguments, HIGH))
        direct, beside = get(arguments, NEAR_Y), tile + size * _HIGH * 2 * n
        for i in range(0, end, _HIGH):
            to = target + get(entries, _FIRST) * get(arguments, SYH) + (m0 + i) * step
            y, ldy, high = beside, row, min(end - i, _HIGH)
            if direct:
                y, ldy = to, step // size
            given = (
                dy + size * i * get(arguments, PITCH), k, get(entries, _EVEN), get(entries, _EVEN_TAPS),
                get(entries, _ODD), get(entries, _ODD_TAPS), get(arguments, PITCH), y, ldy, high, get(arguments, W),
                tile, get(arguments, FINISHED), bias, get(arguments, FINISH) + size,
            )  # fmt: skip
            if high > _LOW:
                many(given)
            else:
                some(given)
            if not direct:
                for t in range(high):
                    write(to + t * step, beside + size * t * row, get(arguments, W), get(arguments, SYW))

    def work(arguments, thread, threads):
        G_, C_, strips = get(arguments, G), get(arguments, C), get(arguments, STRIPS)
        memory = (get(arguments, SCRATCH) + size * thread * get(arguments, PER_THREAD) + 63) // 64 * 64
        copied = (get(arguments, LINES) + _HIGH) * get(arguments, PITCH) + n
        tile = memory + size * copied
        # Borders stay zero.
        fill(memory, get(arguments, FILL), copied)
        tasks = get(arguments, N) * G_ * strips
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            plane, m0 = task // strips, task % strips * get(arguments, HIGH)
            image, g = plane // G_, plane % G_
            source = get(arguments, X) + image * get(arguments, SXN) + g * get(arguments, SXG)
            enter(arguments, memory, source, m0 + get(arguments, FIRST_LINE))
            for c in range(C_):
                k = get(arguments, WEIGHTS) + g * get(arguments, SKG) + c * get(arguments, SKC)
                target = get(arguments, Y) + image * get(arguments, SYN) + g * get(arguments, SYG)
                target += c * get(arguments, SYC)
                entries = get(arguments, TABLE_OF_PHASES)
                for _ in range(get(arguments, PHASES)):
                    bias = get(arguments, FINISH) + size * (2 + g * C_ + c)
                    phase(arguments, entries, memory, k, target, m0, tile, bias)
                    entries += 8 * _ENTRIES

    return work
