"""The arithmetic of ``numba_cuda.implicit_gemm``: one slice of products into the sums of a thread, in registers.

    sums[a, b] += Σ_d weights[d, row a] · window[d, column b]       d = 0 … depth - 1, in this order

Numba would leave the loop over d as a loop, and index ``sums`` in memory. Emitted here as LLVM's straight-line code,
the sums stay in registers, and the assembler reads the next product's vectors while this one's are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert, ptx
from gpuconv.backends.numba_cuda.tiles import Tile


@lru_cache(maxsize=32)
def multiply_slice(tile: Tile, dtype: str) -> Callable[..., None]:
    """``multiply(sums, weights, at_o, window, at_p)`` for kernels, on one slice in shared memory.

    ``at_o`` and ``at_p`` are where the thread's first vectors begin, of the slice's first product. Its other vectors
    are ``tile.row_step`` and ``tile.column_step`` on, the other products ``tile.outputs`` and ``tile.pitch``.
    """
    lanes = ptx.VECTOR_BYTES // dtypes.itemsize(dtype)
    pitch = tile.pitch(lanes)
    rows = [a // lanes * tile.row_step(lanes) + a % lanes for a in range(tile.rows)]
    columns = [b // lanes * tile.column_step(lanes) + b % lanes for b in range(tile.columns)]
    if convert.simulated():

        def simulated(sums: Any, weights: Any, at_o: Any, window: Any, at_p: Any) -> None:
            own = sums.reshape(tile.rows, tile.columns)
            o, p = at_o + np.array(rows), at_p + np.array(columns)
            with np.errstate(all="ignore"):  # a GPU's numbers become NaN without a word
                for d in range(tile.depth):
                    row, column = elements(weights)[d * tile.outputs + o], elements(window)[d * pitch + p]
                    own += np.multiply.outer(row, column)

        return simulated

    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(context: Any, sums: Any, weights: Any, at_o: Any, window: Any, at_p: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            own, left, right = (
                context.make_array(signature.args[index])(context, builder, arguments[index]).data
                for index in (0, 1, 3)
            )
            element = context.get_data_type(sums.dtype)
            vector = ir.PointerType(ir.VectorType(element, lanes))

            def constant(value: int) -> Any:
                return ir.Constant(ir.IntType(64), value)

            def read(base: Any, first: Any, offsets: list[int]) -> list[Any]:
                found = []
                for offset in offsets[::lanes]:
                    place = builder.gep(base, [builder.add(first, constant(offset))])
                    value = builder.load(builder.bitcast(place, vector), align=ptx.VECTOR_BYTES)
                    found += [builder.extract_element(value, constant(lane)) for lane in range(lanes)]
                return found

            places = [builder.gep(own, [constant(index)]) for index in range(len(rows) * len(columns))]
            totals = [builder.load(place) for place in places]
            for d in range(tile.depth):
                of_k = read(left, arguments[2], [d * tile.outputs + row for row in rows])
                of_x = read(right, arguments[4], [d * pitch + column for column in columns])
                for index, total in enumerate(totals):
                    a, b = divmod(index, len(columns))
                    totals[index] = builder.fma(of_k[a], of_x[b], total)
            for place, total in zip(places, totals, strict=True):
                builder.store(total, place)

        return types.void(sums, weights, types.int64, window, types.int64), codegen

    return multiply  # type: ignore[no-any-return]


def elements(array: Any) -> Any:
    """The NumPy array that the simulator's own array, of a kernel's shared memory, stands for."""
    return getattr(array, "_item", array)
