"""The arithmetic of ``numba_cuda.implicit_gemm_mma``: one slice of products into the sums of a warp, on tensor cores.

    sums[o, p] += Σ_d weights[o, d] · window[p, d]

Both operands lie in shared memory as rows of 16 words, a row per output channel or pixel, the products along it; two
steps of ``mma`` take 8 words each. A warp has ``rows`` × ``columns`` instructions' tiles of 16 × 8 in registers.

Four ways to make a product: ``float16`` and ``bfloat16`` exactly; ``tf32`` from both operands rounded to TF32's 11
bits; ``3xtf32`` from each as the sum of two TF32 numbers, less the product of the small ones, which is below float32's
own rounding.

Tensor cores round a sum towards zero (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores",
2021), so that errors of one sign add up: half a unit in the last place per instruction. Of 9,216 positive products in
3xTF32, 3,456 instructions, that is up to 7e-5 of the sum, where ``"high"`` promises 2e-5. There the sums of at most
``PROMOTED`` slices, 256 products, are added to others, which float32's own units round to nearest.

The order of things is written once, in ``add_slice``; what it is done with is inline assembly (``ptx.TensorCore``), or
in the tests the same instructions in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from gpuconv.backends.numba_cuda import ptx
from gpuconv.backends.numba_cuda.tensor_shape import PITCH, STEP, TILES, WORDS, TensorTile

# Slices whose products a tensor core may add up; without an entry all of a part's. A power of two.
PROMOTED = {"3xtf32": 16}


def tiles(way: str) -> tuple[TensorTile, ...]:
    """The tile shapes whose sums fit in registers, where they are kept twice too."""
    return tuple(tile for tile in TILES if tile.sums <= (64 if way in PROMOTED else 128))


def add_slice(tile: TensorTile, way: str, left: Any, right: Any, sums: list[Any]) -> None:
    """Add a slice to the thread's ``sums``; ``left`` and ``right`` give the instructions on weights and window."""
    kind = way if way in ptx.TensorCore.SHAPES else "float32"
    for step in range(0, WORDS, STEP):
        a = [left.ldmatrix(16 * row * PITCH + step) for row in range(tile.rows)]
        b = []
        for pair in range(tile.columns // 2):
            words = right.ldmatrix(16 * pair * PITCH + step)
            b += [words[:2], words[2:]]
        for a_term, b_term in terms(way, left, a, b):
            for row in range(tile.rows):
                for column in range(tile.columns):
                    at = 4 * (row * tile.columns + column)
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


@lru_cache(maxsize=32)
def multiply_slice(tile: TensorTile, way: str) -> Callable[..., None]:
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
            places = [builder.gep(own, [ir.Constant(ir.IntType(64), index)]) for index in range(tile.sums)]
            totals = [builder.load(place) for place in places]
            add_slice(tile, way, left, right, totals)
            for place, total in zip(places, totals, strict=True):
                builder.store(total, place)

        return types.void(sums, memory, types.int64, types.int64), codegen

    return multiply  # type: ignore[no-any-return]


@lru_cache(maxsize=16)
def promote_sums(tile: TensorTile) -> Callable[..., None]:
    """``promote(sums, totals)`` for kernels: ``totals += sums``, rounded to nearest, and ``sums = 0``."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic  # type: ignore[untyped-decorator]
    def promote(context: Any, sums: Any, totals: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            own, whole = (
                context.make_array(kind)(context, builder, array).data
                for kind, array in zip(signature.args, arguments, strict=True)
            )
            for index in range(tile.sums):
                place = [ir.Constant(ir.IntType(64), index)]
                source, to = builder.gep(own, place), builder.gep(whole, place)
                builder.store(builder.fadd(builder.load(to), builder.load(source)), to)
                builder.store(ir.Constant(ir.FloatType(), 0), source)

        return types.void(sums, totals), codegen

    return promote  # type: ignore[no-any-return]


def parking(tile: TensorTile, row: int, column: int, element: int) -> int:
    """Where ``element`` of a thread's four of instruction tile (row, column) is parked, from where its first one is."""
    return (16 * row + element // 2 * 8) * tile.parking_pitch + 8 * column + element % 2


@lru_cache(maxsize=16)
def park_sums(tile: TensorTile) -> Callable[..., None]:
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
            for index in range(tile.sums):
                number, element = divmod(index, 4)
                place = ir.Constant(ir.IntType(64), parking(tile, *divmod(number, tile.columns), element))
                value = builder.load(builder.gep(own, [ir.Constant(ir.IntType(64), index)]))
                builder.store(value, builder.gep(shared, [builder.add(arguments[2], place)]))

        return types.void(sums, memory, types.int64), codegen

    return park  # type: ignore[no-any-return]
