"""The arithmetic of ``numba_cuda.depthwise``: one row of the image into the sums of a thread, in registers.

    sums[o, a, b] += Σ_q image[row, b·s + q] · weights[o, row - a·s, q]      q = 0 … taps - 1, in this order

for each of the thread's output rows a that reads the row. Emitted as LLVM's straight-line code, as in
``register_tile``: a window of the row is read once, for all outputs, rows and columns of the thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.backends.numba_cuda import convert
from gpuconv.backends.numba_cuda.depthwise_shape import Shape
from gpuconv.backends.numba_cuda.register_tile import elements


@lru_cache(maxsize=64)
def multiply_row(shape: Shape, taps: int) -> Callable[..., None]:
    """``multiply(sums, shared, at_x, column_step, tap_step, at_k, plane, pitch, step, count)`` for kernels.

    ``at_x`` is where the thread's window of the row begins in ``shared``, ``at_k`` the weight (0, 0, q) of its first
    tap; weights are ``plane`` elements apart from output to output and ``pitch`` from row to row. The row is the
    thread's ``step``-th, and there are weights for ``count`` of them. ``column_step`` and ``tap_step`` are elements of
    the window from column to column and tap to tap, used where the shape has no stride of its own.
    """
    side, near = shape.side, shape.stride is not None
    down, across = shape.stride or (0, 0)

    def entry(b: int, q: int) -> int:
        return shape.placed(b * across + q) * side

    if convert.simulated():

        def simulated(
            sums: Any, shared: Any, at_x: Any, column_step: Any, tap_step: Any, at_k: Any, plane: Any, pitch: Any,
            step: Any, count: Any,
        ) -> None:  # fmt: skip
            own, memory = elements(sums).reshape(shape.outputs, shape.rows, shape.columns), elements(shared)
            kind = memory.dtype.type
            places = [
                [at_x + (entry(b, q) if near else b * column_step + q * tap_step) for q in range(taps)]
                for b in range(shape.columns)
            ]
            window = memory[np.array(places)]
            with np.errstate(all="ignore"):  # a GPU's numbers become NaN without a word
                for a in range(shape.rows):
                    p = step - a * down
                    if not 0 <= p < count:
                        continue
                    for o in range(shape.outputs):
                        weights = memory[at_k + o * plane + p * pitch + np.arange(taps) * side]
                        total = np.zeros(shape.columns, kind) if shape.by_row else own[o, a].copy()
                        for q in range(taps):
                            total += window[:, q] * weights[q]
                        own[o, a] = own[o, a] + total if shape.by_row else total

        return simulated

    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(
        context: Any, sums: Any, shared: Any, at_x: Any, column_step: Any, tap_step: Any, at_k: Any, plane: Any,
        pitch: Any, step: Any, count: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, _, x, column, tap, k, plane, pitch, step, count = arguments
            own, memory = (
                context.make_array(signature.args[index])(context, builder, arguments[index]).data for index in (0, 1)
            )
            i32 = ir.IntType(32)

            def load(*offsets: Any) -> Any:
                place = offsets[0]
                for offset in offsets[1:]:
                    place = builder.add(place, offset)
                return builder.load(builder.gep(memory, [place]))

            def times(value: Any, factor: int) -> Any:
                return builder.mul(value, i32(factor))

            window: dict[tuple[int, int], Any] = {}
            read: dict[int, Any] = {}
            for b in range(shape.columns):
                for q in range(taps):
                    if near:
                        place = entry(b, q)
                        if place not in read:
                            read[place] = load(x, i32(place))
                        window[b, q] = read[place]
                    else:
                        window[b, q] = load(x, times(column, b), times(tap, q))
            for a in range(shape.rows):
                p = builder.sub(step, i32(a * down))
                with builder.if_then(builder.icmp_unsigned("<", p, count)):
                    row = builder.add(k, builder.mul(p, pitch))
                    for o in range(shape.outputs):
                        weights = [load(row, times(plane, o), i32(q * side)) for q in range(taps)]
                        for b in range(shape.columns):
                            place = builder.gep(own, [i32((o * shape.rows + a) * shape.columns + b)])
                            before = builder.load(place)
                            if shape.by_row:
                                total = builder.fmul(window[b, 0], weights[0])
                            else:
                                total = builder.fma(window[b, 0], weights[0], before)
                            for q in range(1, taps):
                                total = builder.fma(window[b, q], weights[q], total)
                            builder.store(builder.fadd(before, total) if shape.by_row else total, place)

        narrow = types.int32
        return types.void(sums, shared, *[narrow] * 8), codegen

    return multiply  # type: ignore[no-any-return]
