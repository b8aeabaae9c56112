"""The arithmetic of ``numba_cuda.implicit_gemm_mma``: one slice of products into the sums of a warp, on tensor cores.

    sums[o, p] += Σ_d weights[o, d] · window[p, d]

Both operands lie in shared memory as rows of 16 words, a row per output channel or pixel, the products along it; two
steps of ``mma`` take 8 words each. A warp has ``ROWS`` × ``COLUMNS`` instructions' tiles of 16 × 8 in registers.

Four ways to make a product: ``float16`` and ``bfloat16`` exactly; ``tf32`` from both operands rounded to TF32's 11
bits; ``3xtf32`` from each as the sum of two TF32 numbers, less the product of the small ones, which is below float32's
own rounding.

The order of things is written once, in ``add_slice``; what it is done with is inline assembly (``ptx.TensorCore``), or
in the tests the same instructions in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from gpuconv.backends.numba_cuda import ptx
from gpuconv.backends.numba_cuda.tensor_shape import COLUMNS, PARKING_PITCH, PITCH, ROWS, STEP, SUMS, WORDS


def add_slice(way: str, left: Any, right: Any, sums: list[Any]) -> None:
    """Add a slice to the thread's ``sums``; ``left`` and ``right`` give the instructions on weights and window."""
    kind = way if way in ptx.TensorCore.SHAPES else "float32"
    for step in range(0, WORDS, STEP):
        a = [left.ldmatrix(16 * row * PITCH + step) for row in range(ROWS)]
        b = []
        for pair in range(COLUMNS // 2):
            words = right.ldmatrix(16 * pair * PITCH + step)
            b += [words[:2], words[2:]]
        for a_term, b_term in terms(way, left, a, b):
            for row in range(ROWS):
                for column in range(COLUMNS):
                    at = 4 * (row * COLUMNS + column)
                    sums[at : at + 4] = left.mma(kind, a_term[row], b_term[column], sums[at : at + 4])


def terms(way: str, core: Any, a: list[Any], b: list[Any]) -> list[tuple[list[Any], list[Any]]]:
    """The pairs of operands whose products add up to those of ``a`` and ``b``, the small ones first."""
    if way in ptx.TensorCore.SHAPES:
        return [(a, b)]
    a_large, b_large = ([[core.tf32(word) for word in words] for words in tiles] for tiles in (a, b))
    if way == "tf32":
        return [(a_large, b_large)]
    a_small, b_small = (
        [[core.rest(*pair) for pair in zip(*words, strict=True)] for words in zip(tiles, large, strict=True)]
        for tiles, large in ((a, a_large), (b, b_large))
    )
    return [(a_small, b_large), (a_large, b_small), (a_large, b_large)]


@lru_cache(maxsize=8)
def multiply_slice(way: str) -> Callable[..., None]:
    """``multiply(sums, memory, at_o, at_p)`` for kernels, on one slice in shared memory, an array of 32-bit words.

    ``at_o`` and ``at_p`` are the thread's: where ``ldmatrix`` reads the first tiles of the warp's outputs and pixels.
    """
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(context: Any, sums: Any, memory: Any, at_o: Any, at_p: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            left, right = (
                ptx.TensorCore(builder, ptx.shared_address(context, builder, kinds[1], arguments[1], at))
                for at in arguments[2:]
            )
            own = context.make_array(kinds[0])(context, builder, arguments[0]).data
            places = [builder.gep(own, [ir.Constant(ir.IntType(64), index)]) for index in range(SUMS)]
            totals = [builder.load(place) for place in places]
            add_slice(way, left, right, totals)
            for place, total in zip(places, totals, strict=True):
                builder.store(total, place)

        return types.void(sums, memory, types.int64, types.int64), codegen

    return multiply  # type: ignore[no-any-return]


def parking(row: int, column: int, element: int) -> int:
    """Where ``element`` of a thread's four of tile (row, column) is parked, from where its first one is."""
    return (16 * row + element // 2 * 8) * PARKING_PITCH + 8 * column + element % 2


@lru_cache(maxsize=1)
def park_sums() -> Callable[..., None]:
    """``park(sums, memory, at)`` for kernels: the warp's sums into shared memory, whole rows of pixels.

    Straight-line code, for the same reason as above; ``at`` is the place of the thread's first sum.
    """
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic  # type: ignore[untyped-decorator]
    def park(context: Any, sums: Any, memory: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            own, shared = (
                context.make_array(kind)(context, builder, array).data
                for kind, array in zip(signature.args[:2], arguments[:2], strict=True)
            )
            for index in range(SUMS):
                tile, element = divmod(index, 4)
                place = ir.Constant(ir.IntType(64), parking(*divmod(tile, COLUMNS), element))
                value = builder.load(builder.gep(own, [ir.Constant(ir.IntType(64), index)]))
                builder.store(value, builder.gep(shared, [builder.add(arguments[2], place)]))

        return types.void(sums, memory, types.int64), codegen

    return park  # type: ignore[no-any-return]
