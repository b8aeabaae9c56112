"""Numbers in and out of kernels: loads widen to the type that is summed in, stores round once.

bfloat16 is not a type of Numba's: it travels as its 16 bits, and two functions here make floats of them and back.
On a GPU they are a few integer instructions; in Numba's simulator, which runs kernels as Python, they are NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes

# What a kernel sees instead of the array's own dtype.
BITS = {"bfloat16": "uint16", "bool": "uint8"}


def simulated() -> bool:
    """Whether Numba's CUDA simulator stands in for a GPU in this process."""
    from numba import config

    return bool(config.ENABLE_CUDASIM)


def numba_type(name: str) -> Any:
    """The Numba type of an array element called ``name``."""
    from numba import types

    return getattr(types, BITS.get(name, name))


def loader(name: str, sum_dtype: str) -> Callable[[Any], Any]:
    """A function, for kernels, from a loaded element to a number; bfloat16 becomes float32."""
    return _bfloat16()[0] if name == "bfloat16" else dtypes.numpy_dtype(sum_dtype).type


def storer(name: str) -> Callable[[Any], Any]:
    """A function, for kernels, from a finished sum to an element of the result."""
    return _bfloat16()[1] if name == "bfloat16" else dtypes.numpy_dtype(name).type


@lru_cache(maxsize=1)
def _bfloat16() -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """(widen, narrow): 16 bits to float32, and float32 to 16 bits, to nearest with ties to even."""
    if simulated():
        kind = dtypes.numpy_dtype("bfloat16")
        return (
            lambda bits: np.float32(np.uint16(bits).view(kind)),
            lambda value: np.float32(value).astype(kind).view(np.uint16),
        )

    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic  # type: ignore[untyped-decorator]
    def widen(context: Any, bits: Any) -> Any:
        """A bfloat16 is the upper half of a float32."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(word, ir.FloatType())

        return types.float32(types.uint16), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def narrow(context: Any, value: Any) -> Any:
        """Add half a unit in the last place kept, less one when the kept part is even; a NaN keeps its quiet bit."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            i32 = ir.IntType(32)
            word = builder.bitcast(arguments[0], i32)
            odd = builder.and_(builder.lshr(word, ir.Constant(i32, 16)), ir.Constant(i32, 1))
            rounded = builder.lshr(builder.add(word, builder.add(odd, ir.Constant(i32, 0x7FFF))), ir.Constant(i32, 16))
            quiet = builder.or_(builder.lshr(word, ir.Constant(i32, 16)), ir.Constant(i32, 0x40))
            nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
            return builder.trunc(builder.select(nan, quiet, rounded), ir.IntType(16))

        return types.uint16(types.float32), codegen

    return widen, narrow
