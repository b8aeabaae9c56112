"""Instructions that Numba lacks, as functions for kernels; in Numba's simulator each is a few lines of Python.

Sections are those of NVIDIA's "Parallel Thread Execution ISA", version 8.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

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

    i32 = ir.IntType(32)

    @intrinsic  # type: ignore[untyped-decorator]
    def load(context: Any, values: Any, first: Any, array: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            own, vector = _addresses(context, builder, signature, arguments, lanes)
            value = builder.load(vector, align=VECTOR_BYTES)
            found = [builder.extract_element(value, i32(index)) for index in range(vector.type.pointee.count)]
            if len(found) < lanes:
                element = context.get_data_type(values.dtype)
                words = [(word, builder.lshr(word, i32(16))) for word in found]
                found = [builder.bitcast(builder.trunc(half, ir.IntType(16)), element) for w in words for half in w]
            for lane, number in enumerate(found):
                builder.store(number, builder.gep(own, [i32(lane)]))

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

    i32 = ir.IntType(32)

    @intrinsic  # type: ignore[untyped-decorator]
    def store(context: Any, values: Any, first: Any, array: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            own, vector = _addresses(context, builder, signature, arguments, lanes)
            numbers = [builder.load(builder.gep(own, [i32(lane)])) for lane in range(lanes)]
            if vector.type.pointee.count < lanes:
                halves = [builder.zext(builder.bitcast(number, ir.IntType(16)), i32) for number in numbers]
                pairs = zip(halves[::2], halves[1::2], strict=True)
                numbers = [builder.or_(low, builder.shl(high, i32(16))) for low, high in pairs]
            value = ir.Constant(vector.type.pointee, ir.Undefined)
            for index, number in enumerate(numbers):
                value = builder.insert_element(value, number, i32(index))
            builder.store(value, vector, align=VECTOR_BYTES)

        return types.void(values, types.int64, array, types.int64), codegen

    return store  # type: ignore[no-any-return]


def _addresses(context: Any, builder: Any, signature: Any, arguments: Any, lanes: int) -> tuple[Any, Any]:
    """Where the thread's own values begin, and the vector in memory, of (values, first, array, at).

    Eight 16-bit numbers are four words: LLVM would move them in two halves.
    """
    from llvmlite import ir

    values_type, _, array_type, _ = signature.args
    values = context.make_array(values_type)(context, builder, arguments[0])
    array = context.make_array(array_type)(context, builder, arguments[2])
    vector = ir.VectorType(context.get_data_type(array_type.dtype), lanes)
    if lanes > 4:
        vector = ir.VectorType(ir.IntType(32), 4)
    place = builder.gep(array.data, [arguments[3]])
    return builder.gep(values.data, [arguments[1]]), builder.bitcast(place, ir.PointerType(vector))


@lru_cache(maxsize=4)
def async_copies(pending: int) -> tuple[Callable[..., None], Callable[[], None], Callable[[], None]]:
    """(copy, commit, wait) for kernels: 16 bytes from global to shared memory, past the registers; sm_80 and later.

    ``copy(shared, at, source, first, size)`` copies ``source[first:]`` to ``shared[at:]``: the first ``size`` of 16
    bytes, zeros for the rest. ``commit()`` closes a group of copies, and ``wait()`` returns when all of this thread's
    groups but the last ``pending`` have landed: until then their places must not be read, and the block has to meet
    before those of other threads' copies are. ``cp.async.cg``, ``cp.async.commit_group`` and ``cp.async.wait_group``,
    sections "cp.async" to "cp.async.wait_group".
    """
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    void, i32, i64 = ir.VoidType(), ir.IntType(32), ir.IntType(64)

    def assembly(builder: Any, text: str, constraints: str, arguments: list[Any]) -> None:
        kind = ir.FunctionType(void, [argument.type for argument in arguments])
        builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), arguments)

    @intrinsic  # type: ignore[untyped-decorator]
    def copy(context: Any, shared: Any, at: Any, source: Any, first: Any, size: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            to = shared_address(context, builder, signature.args[0], arguments[0], arguments[1])
            array = context.make_array(signature.args[2])(context, builder, arguments[2])
            read = builder.ptrtoint(builder.gep(array.data, [arguments[3]]), i64)
            kept = builder.trunc(arguments[4], i32)
            text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
            assembly(builder, text, "r,l,r,~{memory}", [to, read, kept])

        return types.void(shared, types.int64, source, types.int64, types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def commit(context: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            assembly(builder, "cp.async.commit_group;", "~{memory}", [])

        return types.void(), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def wait(context: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            assembly(builder, f"cp.async.wait_group {pending};", "~{memory}", [])

        return types.void(), codegen

    return copy, commit, wait


def shared_address(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """The 32-bit address in the window of shared memory of an array's element, as such instructions take it."""
    from llvmlite import ir

    data = context.make_array(kind)(context, builder, array).data
    generic = builder.ptrtoint(builder.gep(data, [at]), ir.IntType(64))
    into = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
    text = "{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }"
    return builder.call(ir.InlineAsm(into, text, "=r,l", side_effect=False), [generic])


class TensorCore:
    """Warp-wide instructions, as LLVM's inline assembly; every thread of the warp takes part.

    ``ldmatrix`` reads four matrices of 8 rows of 16 bytes. Thread ``lane`` gives the address of row ``lane % 8`` of
    matrix ``lane // 8``, and gets word ``lane % 4`` of row ``lane // 4`` of each: section "ldmatrix".

    ``mma`` is ``d[16, 8] = a[16, K] · b[K, 8] + c[16, 8]`` with float32 c and d. With g = lane // 4 and q = lane % 4 a
    thread holds, of words of 32 bits (one TF32 number, or two neighbouring 16-bit ones):

                  words 0…3   words 4…7              words 0…3   words 4…7            columns 2q, 2q + 1
        a  row g      a0          a2      b  column g    b0          b1      c  row g      c0, c1
           row g + 8  a1          a3                                           row g + 8  c2, c3

    m16n8k8 for TF32 and m16n8k16 for float16 and bfloat16: sections "Matrix Fragments for mma.m16n8k8" and
    "… mma.m16n8k16". Rows of a and columns of b lie in memory with K contiguous, so that ``ldmatrix`` gives both.
    """

    SHAPES: ClassVar[dict[str, str]] = {
        "float16": "m16n8k16.row.col.f32.f16.f16.f32",
        "bfloat16": "m16n8k16.row.col.f32.bf16.bf16.f32",
        "float32": "m16n8k8.row.col.f32.tf32.tf32.f32",
    }

    def __init__(self, builder: Any, base: Any) -> None:
        self.builder = builder
        self.base = base  # 32-bit address of the memory that ldmatrix reads

    def _call(self, results: list[Any], text: str, constraints: str, arguments: list[Any], side: bool) -> list[Any]:
        from llvmlite import ir

        kind = ir.FunctionType(ir.LiteralStructType(results), [argument.type for argument in arguments])
        # Convergent: no thread may be sent on a path of its own around a warp's instruction.
        made = self.builder.call(ir.InlineAsm(kind, text, constraints, side), arguments, attrs=("convergent",))
        return [self.builder.extract_value(made, index) for index in range(len(results))]

    def ldmatrix(self, words: int) -> list[Any]:
        """The four words at this thread's address plus ``words`` of 4 bytes."""
        from llvmlite import ir

        text = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0,$1,$2,$3}}, [$4+{4 * words}];"
        return self._call([ir.IntType(32)] * 4, text, "=r,=r,=r,=r,r,~{memory}", [self.base], True)

    def mma(self, dtype: str, a: list[Any], b: list[Any], c: list[Any]) -> list[Any]:
        """The thread's four elements of ``a · b + c``."""
        from llvmlite import ir

        text = (
            f"mma.sync.aligned.{self.SHAPES[dtype]} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
        )
        constraints = "=f,=f,=f,=f," + "r," * 6 + "f,f,f,f"
        return self._call([ir.FloatType()] * 4, text, constraints, [*a, *b, *c], False)

    def tf32(self, word: Any) -> Any:
        """A float32's bits rounded to TF32's 10 bits of fraction, ties away from zero: section "cvt"."""
        from llvmlite import ir

        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
        return self.builder.call(ir.InlineAsm(kind, "cvt.rna.tf32.f32 $0, $1;", "=r,r", False), [word])

    def rest(self, word: Any, rounded: Any) -> Any:
        """What rounding left, as a TF32 number: exact but for its own rounding, some 2^-22 of the whole."""
        from llvmlite import ir

        whole, part = (self.builder.bitcast(bits, ir.FloatType()) for bits in (word, rounded))
        return self.tf32(self.builder.bitcast(self.builder.fsub(whole, part), ir.IntType(32)))


def _check_aligned(array: Any, at: Any) -> None:
    """What the hardware checks; NumPy's own memory, which the simulator uses, begins at a multiple of 16."""
    address = getattr(array, "_item", array).ctypes.data + int(at) * array.dtype.itemsize
    if address % VECTOR_BYTES:
        raise ValueError(f"a vector of {VECTOR_BYTES} bytes at the address {address:#x}")
