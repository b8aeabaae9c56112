"""Depthwise convolution of small planes: channels in the lanes of the vectors.

    y[n,c,i,j] = b[c] + Σ_pq x[n,c, i·s+p·d-pad, j·s+q·d-pad] · k[c,p,q]

A plane of few columns has no long rows to make vectors of, but there are many planes. As many channels as a register
has lanes are turned, by transposes in registers, into one padded plane of vectors; there every product of a pixel and a
tap is one aligned load and one multiplication, at any stride and dilation. The sums are turned back on their way out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.strip import ALONE
from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, get, routine
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.geometry import source_index, window
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.lanes"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

# Pixels that are summed at once, by the bits of a register.
_PIXELS = {512: 14, 256: 7, 128: 7}
# Sums that wait to be turned back.
_WAITING = 512
# Elements of the largest padded plane: beyond, rows are long enough to be vectors themselves.
_LARGEST = 1 << 15
# Pixels from output to output across: beyond the last output of a row, a few more are read.
_STRIDE = 1 << 10

# The table of arguments.
X, WEIGHTS, Y, SCRATCH, FINISH, FILL = range(runtime.ARRAYS)
(
    SXN, SXC, SXH, SXW, SYN, SYC, SYH, SYW, SKC,  # steps in bytes
    N, C, H, W, OH, OW, TAPS,
    PITCH, PLACES, STRIDE_DOWN, STRIDE_ACROSS,  # of the padded plane: a row's vectors, all, and steps of an output
    X_PLACES, TAP_PLACES, OFFSETS,  # tables
    HIGH, PER_THREAD, NEAR_X, NEAR_Y, FINISHED,
) = range(runtime.ARRAYS, runtime.ARRAYS + 28)  # fmt: skip


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why this cannot run ``problem``."""
    reasons = dense.unsupported(problem, target)
    if not problem.C == problem.O == problem.groups:
        reasons.append("it is for one input and one output channel per group")
    if problem.layout != "NCHW":
        reasons.append("it is for layout NCHW")
    if problem.padding_mode != "constant":
        reasons.append(f"it pads with a constant, not in mode {problem.padding_mode!r}")
    if problem.KH * problem.KW > BLOCK:
        reasons.append(f"it has one sum for all products, of which there are to be at most {BLOCK}")
    made, read = (problem.OH, problem.OW), (problem.H, problem.W)
    if problem.op == "input_grad":
        made, read = read, made
    rows_, columns = (
        max(n, (outputs - 1) * (stride if problem.op == "forward" else 1) + window(k, d))
        for n, outputs, k, stride, d in zip(
            read, made, (problem.KH, problem.KW), problem.stride, problem.dilation, strict=True
        )
    )
    if rows_ * columns > _LARGEST:
        reasons.append(f"it is for small planes: {rows_} × {columns} pixels are more than {_LARGEST}")
    if problem.op == "forward" and problem.stride[1] > _STRIDE:
        reasons.append(f"it is for strides of at most {_STRIDE} pixels across; got {problem.stride[1]}")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Lay out the planes."""
    return dense.plan(_plan, problem, target, limit)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = dense.lanes_of(problem, target)
    n, taps = lanes.count, problem.KH * problem.KW
    (top, _), (left, _) = problem.padding
    down, across = problem.stride
    pixels = _PIXELS[lanes.bits]
    high = (problem.OH - 1) * down + window(problem.KH, problem.dilation[0])
    pitch = (problem.OW - 1) * across + window(problem.KW, problem.dilation[1])
    # Beyond the plane: a place for what is not read, and what the last pixels of a row read beyond it.
    beyond = high * pitch
    places = beyond + pixels * across + 1
    size = problem.H * problem.W

    at_row, at_column = (
        _places(source_index(np.arange(extent) - before, n_, "constant"), n_)
        for extent, before, n_ in ((high, top, problem.H), (pitch, left, problem.W))
    )
    x_places = np.full(size + n, beyond, np.int64)
    inside = np.where(
        (at_row[:, None] >= 0) & (at_column[None, :] >= 0), at_row[:, None] * pitch + at_column[None, :], beyond
    )
    x_places[:size] = inside.ravel()
    kept = {
        "x": x_places * n,
        "taps": np.minimum(np.arange(taps + n), taps) * n,
        "offsets": np.array(
            [
                (p * problem.dilation[0] * pitch + q * problem.dilation[1]) * n
                for p in range(problem.KH)
                for q in range(problem.KW)
            ],
            np.int64,
        ),
    }
    made = max(1, min(problem.OH, _WAITING // max(problem.OW, 1)))

    # With what it takes to begin at a cache line: no two threads may touch the same bytes.
    beside = max(size, made * problem.OW)
    per_thread = (places + taps + 1 + made * problem.OW + pixels + n + beside) * n + 64 // lanes.size

    def scratch(threads: int) -> int:
        return threads * per_thread * lanes.size + sum(table.nbytes for table in kept.values()) + 4096

    blocks = problem.N * -(-problem.C // n)
    threads = 1 if problem.result_size * problem.products < ALONE else min(target.threads, max(blocks, 1))
    (threads,) = schedule.fit((threads,), scratch, limit, f"{NAME} on {problem}")
    table = np.zeros(runtime.TABLE, np.int64)
    for index, value in {
        N: problem.N, C: problem.C, H: problem.H, W: problem.W, OH: problem.OH, OW: problem.OW, TAPS: taps,
        PITCH: pitch, PLACES: places, STRIDE_DOWN: down, STRIDE_ACROSS: across, X_PLACES: kept["x"].ctypes.data,
        TAP_PLACES: kept["taps"].ctypes.data, OFFSETS: kept["offsets"].ctypes.data, HIGH: made, PER_THREAD: per_thread,
        FINISHED: problem.bias or problem.activation is not None,
    }.items():  # fmt: skip
        table[index] = value
    detail = f"{n} channels at a time, padded planes of {high}×{pitch}, {lanes}"
    config = {"lanes": lanes, "table": table, "kept": kept, "threads": threads,
              "scratch": threads * per_thread}  # fmt: skip
    return Plan(problem, scratch(threads), lanes.dtype, detail, config)


def _places(source: Any, n: int) -> Any:
    """Where each of n elements stands, -1 for nowhere; the inverse of ``source``."""
    places = np.full(n, -1, np.int64)
    there = source >= 0
    places[source[there]] = np.nonzero(there)[0]
    return places


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    return kernel_of(plan.problem, plan.config["lanes"])[0]


def pack_key(plan: Plan) -> Any:
    """What the kept weights depend on besides the weights."""
    return "one channel", plan.sums_in


def pack(plan: Plan, operands: Operands) -> Any:
    """The weights in the type of the sums; they are turned as they are read."""
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
        problem, config, self.plan = plan.problem, plan.config, plan
        self.lanes, self.scratch = config["lanes"], config["scratch"]
        lanes = self.lanes
        self.alone = problem.result_size * problem.products < ALONE
        steps = problem.KW * lanes.size, lanes.size
        # Weights are read in rows of their taps; what is not like that is copied on every call, as this view of it:
        # a repeated call has the caller's own array, whose axes may be in another order.
        self.copied = None
        if k is not None and (
            k.dtype != lanes.dtype or not k.dtype.isnative or k.strides[3:] != steps or k.strides[0] % lanes.size != 0
        ):
            self.copied = k.shape, k.strides
        table = config["table"].copy()
        table[[SXN, SXC, SXH, SXW]] = x.strides[0], x.strides[1], *x.strides[3:]
        table[[SYN, SYC, SYH, SYW]] = out.strides[0], out.strides[1], *out.strides[3:]
        table[SKC] = problem.KH * problem.KW * lanes.size if k is None or self.copied else k.strides[0]
        table[NEAR_X] = problem.x_dtype == lanes.dtype and _whole(x, lanes.size)
        table[NEAR_Y] = problem.y_dtype == lanes.dtype and _whole(out, lanes.size)
        name, make = kernel_of(problem, lanes)
        self.task = runtime.Task(runtime.kernel(name, make), table[runtime.ARRAYS :], config["threads"], plan)
        self.fill = dense.constant(problem, lanes)
        self.padded = -(-problem.C // lanes.count) * lanes.count
        self.finish = self._finish(None)

    def _finish(self, bias: Any | None) -> Any:
        values = np.zeros(2 + self.padded, self.lanes.dtype)
        values[:2] = dense.finishing(self.plan.problem, None, 1, 0, self.lanes)[:2]
        if bias is not None:
            with np.errstate(all="ignore"):
                values[2 : 2 + self.plan.problem.C] = bias.astype(self.lanes.dtype)
        return values

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if packed is None:
            packed = k
            if self.copied is not None:
                packed = dense.converted(np.lib.stride_tricks.as_strided(k, *self.copied), self.lanes.dtype)
        finish = self.finish if bias is None else self._finish(bias)
        self.task(x, packed, out, np.empty(self.scratch, self.lanes.dtype), finish, self.fill)


def _whole(array: Any, size: int) -> bool:
    """Whether the planes of a view lie in one piece each, whole elements apart."""
    _, _, _, high, wide = array.shape
    return bool(
        (wide == 1 or array.strides[4] == size)
        and (high == 1 or array.strides[3] == wide * size)
        and array.strides[1] % size == 0
    )


def kernel_of(problem: Conv2dProblem, lanes: Lanes) -> tuple[str, Callable[[], Callable[..., None]]]:
    """Name and maker of the kernel that serves ``problem``."""
    x, y = problem.x_dtype, problem.y_dtype
    return f"lanes_{lanes}_{x}_{y}", lambda: _kernel(lanes, x, y)


def _inward(e: Emitter, to: Value, source: Value, ld: Value, count: Value, places: Value, present: Value) -> None:
    """to[places[p] + c] = source[c·ld + p] for all p < count; the last channel also stands for those that are not
    present.
    """
    builder, n = e.builder, e.lanes.count

    def channel(c: int) -> Value:
        last = builder.sub(present, I64(1))
        return e.times(builder.select(builder.icmp_signed("<", I64(c), present), I64(c), last), ld)

    starts = [e.at(source, channel(c)) for c in range(n)]

    def put(p: Value, vectors: list[Value]) -> None:
        for i, vector in enumerate(e.transposed(vectors)):
            e.store(vector, e.at(to, builder.load(e.at(places, p, i))))

    p = e.loop(0, count, n, lambda p: put(p, [e.load(e.at(start, p)) for start in starts]))
    rest = builder.sub(count, p)
    with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
        mask = e.mask(rest)
        put(p, [e.masked_load(e.at(start, p), mask) for start in starts])


def _outward(e: Emitter, to: Value, source: Value, ld: Value, count: Value, present: Value) -> None:
    """to[c·ld + p] = source[p·lanes + c] for all p < count and c < present."""
    builder, n = e.builder, e.lanes.count

    def put(p: Value) -> None:
        left = builder.sub(count, p)
        vectors = e.transposed([e.load(e.at(source, e.times(p, n), i * n)) for i in range(n)])
        for c, vector in enumerate(vectors):
            there = builder.select(builder.icmp_signed("<", I64(c), present), left, I64(0))
            if e.lanes.bits == 512:
                e.masked_store(vector, e.at(to, e.times(ld, c), p), e.mask(there))
            else:
                e.store_first(vector, e.at(to, e.times(ld, c), p), there)

    e.loop(0, builder.add(count, I64(n - 1)), n, put)


def _pixels(e: Emitter, to: Value, x: Value, off: Value, weights: Value, K: Value, step: Value, finish: Value,
            bias: Value, floor: Value, pixels: int) -> None:  # fmt: skip
    """to[i] = Σ_k weights[k]·x[off[k] + i·step], in vectors, then the bias and the least value where ``finish``."""
    builder, n = e.builder, e.lanes.count
    entry, loop, after = builder.block, e.block("loop"), e.block("after")
    # The address of every pixel once; a tap adds its offset.
    starts = [e.at(x, e.times(step, i)) for i in range(pixels)]
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(I64)
    k.add_incoming(I64(0), entry)
    (sums,) = e.sums(1, pixels, [(entry, None)])
    weight, offset = e.load(e.at(weights, e.times(k, n))), builder.load(e.at(off, k))
    new = [e.fma(weight, e.load(e.at(start, offset)), total) for start, total in zip(starts, sums, strict=True)]
    following = builder.add(k, I64(1))
    k.add_incoming(following, loop)
    for total, value in zip(sums, new, strict=True):
        total.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, K), loop, after)
    builder.position_at_end(after)
    apart, done = e.block("apart"), e.block("done")
    builder.cbranch(builder.icmp_signed("!=", finish, I64(0)), apart, done)
    builder.position_at_end(apart)
    offsets, least = e.load(bias), e.splat(builder.load(floor))
    changed = [builder.fadd(value, offsets) for value in new]
    changed = [builder.select(builder.fcmp_ordered("<", value, least), least, value) for value in changed]
    builder.branch(done)
    builder.position_at_end(done)
    (totals,) = e.sums(1, pixels, [(after, [new]), (apart, [changed])])
    for i, total in enumerate(totals):
        e.store(total, e.at(to, i * n))


def _kernel(lanes: Lanes, x_dtype: str, y_dtype: str) -> Callable[..., None]:
    size, n, most = lanes.size, lanes.count, _PIXELS[lanes.bits]
    half = most // 2 if most > 7 else most
    inward = routine(f"inward_{lanes}", lanes, "eeiiti", _inward)
    outward = routine(f"outward_{lanes}", lanes, "eeiii", _outward)
    many, some = (
        routine(f"lanes_{lanes}_{count}", lanes, "eeteiiiee", functools.partial(_pixels, pixels=count))
        for count in (most, half)
    )
    read, _, fill = rows(lanes, x_dtype)
    _, write, _ = rows(lanes, y_dtype)

    @compiled
    def enter(arguments, to, source, present, beside):
        """The planes of ``present`` channels at ``source``, into the padded plane."""
        high, wide = get(arguments, H), get(arguments, W)
        step = get(arguments, SXC)
        if get(arguments, NEAR_X) == 0:
            for c in range(present):
                for i in range(high):
                    read(
                        beside + size * (c * high + i) * wide, source + c * step + i * get(arguments, SXH), wide,
                        get(arguments, SXW),
                    )  # fmt: skip
            source, step = beside, high * wide * size
        inward((to, source, step // size, high * wide, get(arguments, X_PLACES), present))

    @compiled
    def leave(arguments, sums, target, i0, high, present, beside):
        """The sums of rows i0 to i0 + high, to the planes at ``target``."""
        wide = get(arguments, OW)
        count = high * wide
        step, near = get(arguments, SYC), get(arguments, NEAR_Y) != 0
        to = target + i0 * wide * size if near else beside
        outward((to, sums, step // size if near else count, count, present))
        if not near:
            for c in range(present):
                for i in range(high):
                    write(
                        target + c * step + (i0 + i) * get(arguments, SYH), beside + size * (c * high + i) * wide, wide,
                        get(arguments, SYW),
                    )  # fmt: skip

    def convolve(arguments, thread, threads):
        C_, OH_, OW_, taps = get(arguments, C), get(arguments, OH), get(arguments, OW), get(arguments, TAPS)
        across, most_high = get(arguments, STRIDE_ACROSS), get(arguments, HIGH)
        vector = n * size
        plane = (get(arguments, SCRATCH) + size * thread * get(arguments, PER_THREAD) + 63) // 64 * 64
        weights = plane + vector * get(arguments, PLACES)
        sums = weights + vector * (taps + 1)
        beside = sums + vector * (most_high * OW_ + most + n)
        # The border stays; every plane writes what lies inside it.
        fill(plane, get(arguments, FILL), get(arguments, PLACES) * n)
        fill(sums, get(arguments, FILL), (most_high * OW_ + most + n) * n)
        blocks = (C_ + n - 1) // n
        tasks = get(arguments, N) * blocks
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            image, c = task // blocks, task % blocks * n
            present = min(n, C_ - c)
            source = get(arguments, WEIGHTS) + c * get(arguments, SKC)
            inward((weights, source, get(arguments, SKC) // size, taps, get(arguments, TAP_PLACES), present))
            source = get(arguments, X) + image * get(arguments, SXN) + c * get(arguments, SXC)
            enter(arguments, plane, source, present, beside)
            target = get(arguments, Y) + image * get(arguments, SYN) + c * get(arguments, SYC)
            for i0 in range(0, OH_, most_high):
                high = min(most_high, OH_ - i0)
                for i in range(high):
                    line = plane + vector * (i0 + i) * get(arguments, STRIDE_DOWN) * get(arguments, PITCH)
                    j = 0
                    while j < OW_:
                        given = (
                            sums + vector * (i * OW_ + j), line + vector * j * across, get(arguments, OFFSETS), weights,
                            taps, across * n, get(arguments, FINISHED), get(arguments, FINISH) + size * (2 + c),
                            get(arguments, FINISH) + size,
                        )  # fmt: skip
                        if OW_ - j > half:
                            many(given)
                            j += most
                        else:
                            some(given)
                            j += half
                leave(arguments, sums, target, i0, high, present, beside)

    return convolve
