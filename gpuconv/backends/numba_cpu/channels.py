"""Depthwise convolution of images whose channels lie side by side (NHWC): channels in the lanes, nothing copied.

    y[n,i,j,c] = b[c] + Σ_pq x[n, i·s+p·d-pad, j·s+q·d-pad, c] · k[c,p,q]

A tile is some neighbouring outputs of a row; it goes through all channels, a vector at a time. Rows of the kernel that
lie outside the image shorten its loop, and columns outside are left out: for common kernels by tiles of their own, for
the rest pixel by pixel. A sum has the same order in every tile, the kernel's rows one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime
from gpuconv.backends.numba_cpu.copies import LETTERS
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.pixels_kernel import Packing
from gpuconv.backends.numba_cpu.vectors import I64, SIZE, Emitter, Lanes, Value, get, routine
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.channels"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad"))

unavailable = runtime.unavailable

_TILE = 7  # outputs of a row at once
_SPECIAL = (3, 5, 7)  # widths of kernels that have tiles of their own, for strides 1 and 2
_ALONE = 1 << 15  # products below which starting threads costs more than it gives

# The table of arguments.
X, WEIGHTS, Y, FINISH, *_ = range(runtime.ARRAYS)
(
    SXN, SXH, SXW, SYN, SYH, SYW,  # steps in bytes
    N, C, H, W, OH, OW, KH, KW, TOP, LEFT, DOWN, ACROSS, STEP_DOWN, STEP_ACROSS,
    SHARES, ROWS,  # parts of the channels; rows of the kernel in one sum
) = range(runtime.ARRAYS, runtime.ARRAYS + 22)  # fmt: skip


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why it cannot run ``problem``."""
    reasons = dense.unsupported(problem, target)
    if problem.layout != "NHWC":
        reasons.append("it is for channels that lie side by side; pass layout='NHWC' with such arrays")
    if not problem.C == problem.groups == problem.O:
        reasons.append("it is for depthwise convolutions: as many groups as input and as output channels")
    if problem.padding_mode != "constant" or problem.fill != 0:
        reasons.append("it pads with zeros only")
    if problem.KH * problem.KW > BLOCK and problem.y_dtype != dense.sums_in(problem, target):
        reasons.append(f"it sums more than {BLOCK} products in the result, which {problem.y_dtype} is no place for")
    return reasons


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the shares of the work."""
    return dense.plan(_plan, problem, target, limit)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    lanes = dense.lanes_of(problem, target)
    threads = target.threads if problem.result_size * problem.products >= _ALONE else 1
    padded = -(-problem.C // lanes.count) * lanes.count
    x_size, y_size = SIZE[problem.x_dtype], SIZE[problem.y_dtype]
    image = problem.C * (problem.H * problem.W * x_size + problem.OH * problem.OW * y_size)

    def scratch(images: int) -> int:
        """Arrays whose channels do not lie side by side are copied, some images at a time."""
        return images * image + 2 * padded * (2 + problem.KH * problem.KW) * lanes.size + 4096

    (images,) = schedule.fit((max(problem.N, 1),), scratch, limit, f"{NAME} on {problem}")
    images = min(images, threads)
    shares = threads if problem.N * problem.OH % threads and problem.C >= 2 * threads * lanes.count else 1
    special = problem.KW in _SPECIAL and problem.stride[1] in (1, 2) and problem.dilation[1] == 1
    entries = [
        problem.C, problem.H, problem.W, problem.OH, problem.OW, problem.KH, problem.KW, problem.padding[0][0],
        problem.padding[1][0], *problem.stride, *problem.dilation, shares, max(1, BLOCK // problem.KW),
    ]  # fmt: skip
    detail = f"rows of {_TILE} pixels through all channels, {lanes}"
    config = {"lanes": lanes, "entries": entries, "threads": threads, "images": images, "padded": padded,
              "special": (problem.KW, problem.stride[1]) if special else (0, 0)}  # fmt: skip
    return Plan(problem, scratch(images), lanes.dtype, detail, config)


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    return kernel_of(plan.problem, plan.config["lanes"], plan.config["special"])[0]


def pack_key(plan: Plan) -> Any:
    """What the packed weights depend on besides the weights."""
    return "channels", str(plan.config["lanes"])


def pack(plan: Plan, operands: Operands) -> Any:
    """The weights as packed[c // lanes][p][q][c % lanes], zero beyond the last channel."""
    return _packing(plan, operands.k)(operands.k.swapaxes(0, 1))


def _packing(plan: Plan, k: Any) -> Packing:
    """What turns weights like ``k`` (C, 1, 1, KH, KW) over: that of one group whose outputs are the channels."""
    return Packing(k.swapaxes(0, 1), plan.config["lanes"], 1, plan.config["threads"])


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or the input gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _is_direct(array: Any) -> bool:
    """Whether the kernel can read or write the array where it lies."""
    size = array.dtype.itemsize
    return (array.strides[1] == size or array.shape[1] == 1) and all(step % size == 0 for step in array.strides)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    if out.size == 0:
        return
    x = operands.x
    packed = operands.packed if operands.packed is not None else pack(plan, operands)
    Bound(plan, x, None, out)(x, None, packed, operands.bias, out)


def _copied(plan: Plan, x: Any, packed: Any, bias: Any | None, out: Any) -> None:
    """Convolve arrays whose channels do not lie side by side, a few images at a time."""
    for start in range(0, x.shape[0], plan.config["images"]):
        part = slice(start, start + plan.config["images"])
        source, target = (view[part] if _is_direct(view) else _last(view[part]) for view in (x, out))
        if not _is_direct(x):
            source[...] = x[part]
        Bound(plan, source, None, target)(source, None, packed, bias, target)
        if not _is_direct(out):
            out[part] = target


def _last(array: Any) -> np.ndarray[Any, Any]:
    """Memory for an array of this shape, channels side by side."""
    images, channels, one, high, wide = array.shape
    return np.empty((images, high, wide, channels, one), array.dtype).transpose(0, 3, 4, 1, 2)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, ``out``, and the weights ``k`` where they are not packed already."""
        problem, config = plan.problem, plan.config
        self.plan, self.lanes = plan, config["lanes"]
        self.alone = problem.result_size * problem.products < _ALONE
        self.packing = None if k is None else _packing(plan, k)
        steps = [view.strides[axis] for view in (x, out) for axis in (0, 3, 4)]
        name, make = kernel_of(problem, self.lanes, config["special"])
        entries = [*steps, x.shape[0], *config["entries"]]
        self.task = runtime.Task(runtime.kernel(name, make), entries, config["threads"], plan)
        self.finish = self._finishing(None)
        self.views = None if _is_direct(x) and _is_direct(out) else (x.shape, x.strides, out.shape, out.strides)

    def _finishing(self, bias: Any | None) -> np.ndarray[Any, Any]:
        """Zeros and no least value for sums that go on, the bias and the least value of a result for those that end."""
        padded = self.plan.config["padded"]
        values = np.zeros((2, padded + 1), self.lanes.dtype)
        values[:, padded] = -np.inf, (0.0 if self.plan.problem.activation == "relu" else -np.inf)
        if bias is not None:
            with np.errstate(all="ignore"):
                values[1, : len(bias)] = bias
        return values

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Convolve ``x`` into ``out``."""
        if packed is None and self.packing is not None:
            packed = self.packing(k)
        if self.views is not None:
            views = self.views
            x = np.lib.stride_tricks.as_strided(x, *views[:2])
            _copied(self.plan, x, packed, bias, np.lib.stride_tricks.as_strided(out, *views[2:]))
            return
        self.task(x, packed, out, self.finish if bias is None else self._finishing(bias))


def kernel_of(
    problem: Conv2dProblem, lanes: Lanes, special: tuple[int, int]
) -> tuple[str, Callable[[], Callable[..., None]]]:
    """Name and maker of the kernel that serves ``problem``."""
    x, y = problem.x_dtype, problem.y_dtype
    return f"channels_{lanes}_{special[0]}_{special[1]}_{x}_{y}", lambda: _kernel(lanes, special, x, y)


@functools.lru_cache(maxsize=64)
def tile(lanes: Lanes, x: str, y: str, pixels: int, special: tuple[int, int, int, int] | None) -> Any:
    """A tile of a row: a function of (x, w, y, rows, channels, taps, steps…, accumulate, bias, floor).

    The steps, in elements, are those of x from row to row, output to output and tap to tap, of w from row to row and
    from vector to vector of channels, and of y. ``special`` is (KW, stride, left, right): taps are then unrolled, and
    the first ``left`` and last ``right`` columns that the tile reads do not exist.
    """

    def emit(e: Emitter, source: Value, w: Value, target: Value, nr: Value, channels: Value, taps: Value,
             x_row: Value, x_pixel: Value, x_tap: Value, w_row: Value, w_vector: Value, y_pixel: Value,
             accumulate: Value, bias: Value, floor: Value) -> None:  # fmt: skip
        builder = e.builder
        least = e.splat(builder.load(floor))

        def vector(c: Value, masked: bool) -> None:
            mask = e.mask(builder.sub(channels, c)) if masked else None

            def load(place: Value, stored: str) -> Value:
                return e.load(place, stored) if mask is None else e.masked_load(place, mask, stored)

            first_weight = e.at(w, builder.mul(builder.sdiv(c, I64(e.lanes.count)), w_vector))
            before, head, inside, after = builder.block, e.block("rows"), e.block("row"), e.block("end")
            builder.branch(head)
            builder.position_at_end(head)
            r = builder.phi(I64)
            r.add_incoming(I64(0), before)
            sums = e.sums(1, pixels, [(before, None)])
            builder.cbranch(builder.icmp_signed("<", r, nr), inside, after)
            builder.position_at_end(inside)
            line, weights = e.at(source, c, builder.mul(r, x_row)), e.at(first_weight, builder.mul(r, w_row))
            if special is not None:
                new = unrolled(line, weights, list(sums[0]), load)
            else:
                new = looped(line, weights, sums[0], load)
            r.add_incoming(builder.add(r, I64(1)), builder.block)
            for phi, value in zip(sums[0], new, strict=True):
                phi.add_incoming(value, builder.block)
            builder.branch(head)

            builder.position_at_end(after)
            add, finish = e.block("add"), e.block("finish")
            builder.cbranch(builder.icmp_signed("!=", accumulate, I64(0)), add, finish)
            builder.position_at_end(add)
            added = [builder.fadd(load(e.at(target, c, e.times(y_pixel, j)), y), sums[0][j]) for j in range(pixels)]
            builder.branch(finish)
            builder.position_at_end(finish)
            totals = e.sums(1, pixels, [(after, sums), (add, [added])])[0]
            b = load(e.at(bias, c), e.lanes.dtype)
            for j in range(pixels):
                value = builder.fadd(totals[j], b)
                value = builder.select(builder.fcmp_ordered("<", value, least), least, value)
                place = e.at(target, c, e.times(y_pixel, j))
                if mask is None:
                    e.store(value, place, y)
                else:
                    e.masked_store(value, place, mask, y)

        def unrolled(line: Value, weights: Value, sums: list[Value], load: Any) -> list[Value]:
            KW_, stride, left, right = special or (0, 0, 0, 0)
            w_taps = [e.load(e.at(weights, q * e.lanes.count)) for q in range(KW_)]
            columns = (pixels - 1) * stride + KW_
            for column in range(left, columns - right):
                value = load(e.at(line, e.times(x_tap, column)), x)
                for q in range(KW_):
                    j, rest = divmod(column - q, stride)
                    if rest == 0 and 0 <= j < pixels:
                        sums[j] = e.fma(value, w_taps[q], sums[j])
            return sums

        def looped(line: Value, weights: Value, begun: list[Value], load: Any) -> list[Value]:
            before, head, inside, after = builder.block, e.block("taps"), e.block("tap"), e.block("tapped")
            builder.branch(head)
            builder.position_at_end(head)
            q = builder.phi(I64)
            q.add_incoming(I64(0), before)
            sums = e.sums(1, pixels, [(before, [begun])])
            builder.cbranch(builder.icmp_signed("<", q, taps), inside, after)
            builder.position_at_end(inside)
            weight = e.load(e.at(weights, builder.mul(q, I64(e.lanes.count))))
            here = e.at(line, builder.mul(q, x_tap))
            new = [e.fma(load(e.at(here, e.times(x_pixel, j)), x), weight, sums[0][j]) for j in range(pixels)]
            q.add_incoming(builder.add(q, I64(1)), builder.block)
            for phi, value in zip(sums[0], new, strict=True):
                phi.add_incoming(value, builder.block)
            builder.branch(head)
            builder.position_at_end(after)
            return sums[0]

        c = e.loop(0, channels, e.lanes.count, lambda c: vector(c, False))
        with builder.if_then(builder.icmp_signed("<", c, channels)):
            vector(c, True)

    name = "_".join(str(part) for part in ("channels", lanes, x, y, pixels, *(special or ("any",))))
    return routine(name, lanes, f"{LETTERS[x]}e{LETTERS[y]}iiiiiiiiiiee", emit)


def _kernel(lanes: Lanes, special: tuple[int, int], x_dtype: str, y_dtype: str) -> Callable[..., None]:
    size, x_size, y_size, count, pixels = lanes.size, SIZE[x_dtype], SIZE[y_dtype], lanes.count, _TILE
    one, many = (tile(lanes, x_dtype, y_dtype, n, None) for n in (1, _TILE))
    KW_, stride_ = special

    def variant(left: int, right: int) -> Any:
        if KW_ == 0 or max(left, right) > KW_ // 2:
            return many  # never called so
        return tile(lanes, x_dtype, y_dtype, _TILE, (KW_, stride_, left, right))

    most = KW_ // 2 if KW_ else -1  # columns outside that there are tiles for
    inner, left1, left2, left3 = (variant(n, 0) for n in range(4))
    right1, right2, right3 = (variant(0, n) for n in range(1, 4))
    both1, both2, both3 = (variant(n, n) for n in range(1, 4))

    @compiled
    def row(arguments, x, y, j0, j1, w, rows, channels, accumulate, bias, floor):
        """Outputs [j0, j1) of a row from ``rows`` rows of x; ``x`` and ``y`` are the rows' first columns."""
        W_, left, stride, step = (
            get(arguments, W),
            get(arguments, LEFT),
            get(arguments, ACROSS),
            get(arguments, STEP_ACROSS),
        )
        taps = get(arguments, KW)
        reach = (taps - 1) * step + 1
        x_w, y_w = get(arguments, SXW), get(arguments, SYW)
        x_row, x_pixel, x_tap = (
            get(arguments, STEP_DOWN) * get(arguments, SXH) // x_size,
            stride * x_w // x_size,
            step * x_w // x_size,
        )
        w_row, w_vector, y_pixel = taps * count, get(arguments, KH) * taps * count, y_w // y_size
        j = j0
        while j < j1:
            wide = pixels
            if j + wide > j1 and j1 - wide >= j0 and get(arguments, KH) <= get(arguments, ROWS):
                j = j1 - wide  # the last tile overlaps its neighbour, and writes the same there
            first = j * stride - left
            l, r = max(0, -first), max(0, first + (wide - 1) * stride + reach - W_)
            source, target = x + first * x_w, y + j * y_w
            if j + wide > j1 or max(l, r) > max(most, 0) or (l > 0 and r > 0 and l != r):
                # Pixel by pixel, the taps outside left out.
                wide = min(wide, j1 - j)
                for i in range(wide):
                    at = first + i * stride
                    q0 = min(max((step - 1 - at) // step, 0), taps)
                    q1 = max(min((W_ - at + step - 1) // step, taps), q0)
                    one((x + (at + q0 * step) * x_w, w + size * q0 * count, target + i * y_w, rows, channels, q1 - q0,
                         x_row, x_pixel, x_tap, w_row, w_vector, y_pixel, accumulate, bias, floor))  # fmt: skip
            else:
                given = (source, w, target, rows, channels, taps, x_row, x_pixel, x_tap, w_row, w_vector, y_pixel,
                         accumulate, bias, floor)  # fmt: skip
                if most < 0:
                    many(given)
                elif l == 0 and r == 0:
                    inner(given)
                elif r == 0:
                    if l == 1:
                        left1(given)
                    elif l == 2:
                        left2(given)
                    else:
                        left3(given)
                elif l == 0:
                    if r == 1:
                        right1(given)
                    elif r == 2:
                        right2(given)
                    else:
                        right3(given)
                elif l == 1:
                    both1(given)
                elif l == 2:
                    both2(given)
                else:
                    both3(given)
            j += wide

    def work(arguments, thread, threads):
        C_, H_, OH_, KH_ = get(arguments, C), get(arguments, H), get(arguments, OH), get(arguments, KH)
        down, step, shares = get(arguments, DOWN), get(arguments, STEP_DOWN), get(arguments, SHARES)
        vectors = (C_ + count - 1) // count
        finish = get(arguments, FINISH)
        ending = finish + size * (vectors * count + 1)
        tasks = get(arguments, N) * OH_ * shares
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            share, line = task % shares, task // shares
            c0, c1 = share * vectors // shares * count, min((share + 1) * vectors // shares * count, C_)
            n, i = line // OH_, line % OH_
            first = i * down - get(arguments, TOP)
            x = get(arguments, X) + n * get(arguments, SXN) + c0 * x_size
            y = get(arguments, Y) + n * get(arguments, SYN) + i * get(arguments, SYH) + c0 * y_size
            w = get(arguments, WEIGHTS) + size * c0 * KH_ * get(arguments, KW)
            p = 0
            while p < KH_:
                end = min(p + get(arguments, ROWS), KH_)
                p0 = min(max((step - 1 - first) // step, p), end)
                p1 = max(min((H_ - first + step - 1) // step, end), p0)
                closing = ending if end == KH_ else finish
                row(
                    arguments, x + (first + p0 * step) * get(arguments, SXH), y, 0, get(arguments, OW),
                    w + size * p0 * get(arguments, KW) * count, p1 - p0, c1 - c0, 1 if p > 0 else 0,
                    closing + size * c0, closing + size * vectors * count,
                )  # fmt: skip
                p = end

    return work
