"""Instructions that Numba lacks, as functions for kernels; in Numba's simulator each is a few lines of Python.

Sections are those of NVIDIA's "Parallel Thread Execution ISA", version 8.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from gpuconv.backends.numba_cuda import convert

# The widest access of one thread, in bytes. Its address has to be a multiple of it.
VECTOR_BYTES = 16


def shared_alignment() -> int | None:
    """The third argument of ``cuda.shared.array`` where vectors are read; the simulator takes none."""
    return None if convert.simulated() else VECTOR_BYTES


@lru_cache(maxsize=8)
def load_vector(lanes: int) -> Callable[..., None]:
    """``load(values, first, array, at)``: ``values[first:first + lanes] = array[at:at + lanes]`` in one access.

    ``ld.v4.f32`` and ``ld.v2.f64``, section "ld". ``values`` is the thread's own, in registers; ``lanes`` elements are
    16 bytes, and the address of ``array[at]`` is a multiple of 16.
    """
    if convert.simulated():

        def simulated(values: Any, first: Any, array: Any, at: Any) -> None:
            _check_aligned(array, at)
            for lane in range(lanes):
                values[first + lane] = array[at + lane]

        return simulated

    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic  # type: ignore[untyped-decorator]
    def load(context: Any, values: Any, first: Any, array: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            own, vector = _addresses(context, builder, signature, arguments, lanes)
            value = builder.load(vector, align=VECTOR_BYTES)
            for lane in range(lanes):
                place = ir.Constant(ir.IntType(32), lane)
                builder.store(builder.extract_element(value, place), builder.gep(own, [place]))

        return types.void(values, types.int64, array, types.int64), codegen

    return load  # type: ignore[no-any-return]


@lru_cache(maxsize=8)
def store_vector(lanes: int) -> Callable[..., None]:
    """``store(values, first, array, at)``: ``array[at:at + lanes] = values[first:first + lanes]`` in one access.

    ``st.v4.f32`` and ``st.v2.f64``, section "st"; alignment as for ``load_vector``.
    """
    if convert.simulated():

        def simulated(values: Any, first: Any, array: Any, at: Any) -> None:
            _check_aligned(array, at)
            for lane in range(lanes):
                array[at + lane] = values[first + lane]

        return simulated

    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic  # type: ignore[untyped-decorator]
    def store(context: Any, values: Any, first: Any, array: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            own, vector = _addresses(context, builder, signature, arguments, lanes)
            value = ir.Constant(vector.type.pointee, ir.Undefined)
            for lane in range(lanes):
                place = ir.Constant(ir.IntType(32), lane)
                value = builder.insert_element(value, builder.load(builder.gep(own, [place])), place)
            builder.store(value, vector, align=VECTOR_BYTES)

        return types.void(values, types.int64, array, types.int64), codegen

    return store  # type: ignore[no-any-return]


def _addresses(context: Any, builder: Any, signature: Any, arguments: Any, lanes: int) -> tuple[Any, Any]:
    """Where the thread's own values begin, and the vector in memory, of (values, first, array, at)."""
    from llvmlite import ir

    values_type, _, array_type, _ = signature.args
    values = context.make_array(values_type)(context, builder, arguments[0])
    array = context.make_array(array_type)(context, builder, arguments[2])
    vector = ir.VectorType(context.get_data_type(array_type.dtype), lanes)
    place = builder.gep(array.data, [arguments[3]])
    return builder.gep(values.data, [arguments[1]]), builder.bitcast(place, ir.PointerType(vector))


def _check_aligned(array: Any, at: Any) -> None:
    """What the hardware checks; NumPy's own memory, which the simulator uses, begins at a multiple of 16."""
    address = getattr(array, "_item", array).ctypes.data + int(at) * array.dtype.itemsize
    if address % VECTOR_BYTES:
        raise ValueError(f"a vector of {VECTOR_BYTES} bytes at the address {address:#x}")
