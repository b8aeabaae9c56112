"""Vector code for Numba: routines written as LLVM IR through ``Emitter``, called from compiled Python.

Compiled Python is good at loops over rows and blocks, and knows nothing of vector registers; a micro-kernel is nothing
but vector registers. A *routine* is the bridge: ``routine(name, kinds, emit)`` gives a function for compiled Python
that takes one tuple of integers, addresses in bytes and sizes in elements, and calls an LLVM function that ``emit``
writes once per module. Nothing here allows reassociation: sums keep the order in which they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core import types as numba_types
from numba.extending import intrinsic

types: Any = numba_types  # its stubs leave out half of it

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
VOID = ir.VoidType()
REAL = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
UNSIGNED = {"bool": I8, "uint8": I8, "uint16": I16, "uint32": I32}
INTEGERS = {**UNSIGNED, "int8": I8, "int16": I16, "int32": I32, "int64": I64}
STORED = {**REAL, "float16": ir.HalfType(), "bfloat16": I16, **INTEGERS}  # as in memory
# Masked, 16-bit floats move as integers: processors without 16-bit arithmetic would move them one by one.
_MASKED = {**STORED, "float16": I16}
SIZE: dict[str, int] = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2} | {
    name: kind.width // 8 for name, kind in INTEGERS.items()
}

Value = Any  # llvmlite has no types


@dataclass(frozen=True)
class Lanes:
    """A vector register of the machine: how many elements of which type."""

    dtype: str
    count: int

    @classmethod
    def of(cls, dtype: str, bits: int) -> Lanes:
        """As many elements of ``dtype`` as ``bits`` hold."""
        return cls(dtype, bits // 8 // SIZE[dtype])

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return SIZE[self.dtype]

    @property
    def bits(self) -> int:
        """Bits of the register."""
        return self.count * self.size * 8

    def __str__(self) -> str:
        return f"{self.dtype}x{self.count}"


class Emitter:
    """An LLVM function under construction: a builder, and vectors of one kind."""

    def __init__(self, function: ir.Function, lanes: Lanes) -> None:
        self.function, self.lanes = function, lanes
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.element = REAL[lanes.dtype]
        self.vector = ir.VectorType(self.element, lanes.count)
        self.zero = ir.Constant(self.vector, [0.0] * lanes.count)

    # ---- addresses and integers

    def at(self, pointer: Value, *offsets: Value | int) -> Value:
        """``pointer`` moved by the sum of ``offsets`` elements."""
        for offset in offsets:
            pointer = self.builder.gep(pointer, [self.i64(offset)])
        return pointer

    def i64(self, value: Value | int) -> Value:
        """An integer constant, or the value that it is already."""
        return I64(value) if isinstance(value, int) else value

    def times(self, a: Value, b: Value | int) -> Value:
        """Product of two integers."""
        return I64(0) if isinstance(b, int) and b == 0 else self.builder.mul(a, self.i64(b))

    # ---- memory

    def load(self, pointer: Value, stored: str | None = None) -> Value:
        """A vector from memory of any alignment, converted from ``stored`` where that is another type."""
        stored = stored or self.lanes.dtype
        kind = ir.VectorType(STORED[stored], self.lanes.count)
        value = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        value.align = SIZE[stored]
        return self.widened(value, stored)

    def store(self, value: Value, pointer: Value, stored: str | None = None) -> None:
        """A vector to memory of any alignment, rounded to ``stored`` where that is another type."""
        stored = stored or self.lanes.dtype
        kind = ir.VectorType(STORED[stored], self.lanes.count)
        target = self.builder.bitcast(pointer, kind.as_pointer())
        self.builder.store(self.narrowed(value, stored), target).align = SIZE[stored]

    def stream(self, value: Value, pointer: Value) -> None:
        """A vector past the caches to memory, at a multiple of its size; ``runtime.settle`` has it seen by others."""
        store = self.builder.store(value, self.builder.bitcast(pointer, self.vector.as_pointer()))
        store.align = self.lanes.bits // 8
        store.set_metadata("nontemporal", self.function.module.add_metadata([I32(1)]))

    def mask(self, count: Value) -> Value:
        """True in the first ``count`` lanes; any integer will do."""
        lanes = ir.VectorType(I64, self.lanes.count)
        return self.builder.icmp_signed(
            "<", ir.Constant(lanes, list(range(self.lanes.count))), self.splat_of(lanes, self.i64(count))
        )

    def masked_load(self, pointer: Value, mask: Value, stored: str | None = None) -> Value:
        """The lanes that ``mask`` has, zero elsewhere; no other memory is touched."""
        stored = stored or self.lanes.dtype
        kind = ir.VectorType(_MASKED[stored], self.lanes.count)
        zero = ir.Constant(kind, [0.0 if stored in REAL else 0] * self.lanes.count)
        name = f"llvm.masked.load.v{self.lanes.count}{_suffix(stored)}.p0"
        signature = ir.FunctionType(kind, [kind.as_pointer(), I32, mask.type, kind])
        load = cgutils.get_or_insert_function(self.function.module, signature, name)
        source = self.builder.bitcast(pointer, kind.as_pointer())
        value = self.builder.call(load, [source, I32(SIZE[stored]), mask, zero])
        return self.widened(self.builder.bitcast(value, ir.VectorType(STORED[stored], self.lanes.count)), stored)

    def load_even(self, pointer: Value, stored: str | None = None) -> Value:
        """Every second element from ``pointer`` on. The second half is read from one element earlier, so as not to end
        beyond the last one needed.
        """
        n = self.lanes.count
        order = [2 * lane if lane < n // 2 else n + 1 + 2 * (lane - n // 2) for lane in range(n)]
        first, second = self.load(pointer, stored), self.load(self.at(pointer, n - 1), stored)
        return self.shuffle(first, second, order if n > 1 else [0])

    def masked_load_even(self, pointer: Value, count: Value, stored: str | None = None) -> Value:
        """The first ``count`` of every second element from ``pointer`` on; nothing after the last of them is read."""
        n, builder = self.lanes.count, self.builder
        spanned = builder.sub(builder.mul(count, I64(2)), I64(1))
        first = self.masked_load(pointer, self.mask(spanned), stored)
        second = self.masked_load(self.at(pointer, n), self.mask(builder.sub(spanned, I64(n))), stored)
        return self.shuffle(first, second, [2 * lane for lane in range(n)])

    def masked_store(self, value: Value, pointer: Value, mask: Value, stored: str | None = None) -> None:
        """Write the lanes that ``mask`` has; no other memory is touched."""
        stored = stored or self.lanes.dtype
        kind = ir.VectorType(_MASKED[stored], self.lanes.count)
        name = f"llvm.masked.store.v{self.lanes.count}{_suffix(stored)}.p0"
        signature = ir.FunctionType(VOID, [kind, kind.as_pointer(), I32, mask.type])
        store = cgutils.get_or_insert_function(self.function.module, signature, name)
        target = self.builder.bitcast(pointer, kind.as_pointer())
        bits = self.builder.bitcast(self.narrowed(value, stored), kind)
        self.builder.call(store, [bits, target, I32(SIZE[stored]), mask])

    def store_first(self, value: Value, pointer: Value, count: Value) -> None:
        """Write the first ``count`` lanes, any integer, and touch no other memory: in pieces of half the lanes, a
        quarter and so on, for processors whose masked stores are slow.
        """
        builder, n = self.builder, self.lanes.count
        every = builder.icmp_signed(">=", count, I64(n))
        left = builder.select(builder.icmp_signed("<", count, I64(0)), I64(0), count)
        with builder.if_else(every) as (whole, pieces):
            with whole:
                self.store(value, pointer)
            with pieces:
                size = n // 2
                while size:
                    before = builder.block
                    with builder.if_then(builder.icmp_signed("!=", builder.and_(left, I64(size)), I64(0))):
                        piece = self.shuffle(value, value, range(size))
                        target = builder.bitcast(pointer, piece.type.as_pointer())
                        builder.store(piece, target).align = self.lanes.size
                        rest = self.shuffle(value, value, [(lane + size) % n for lane in range(n)])
                        further, inside = self.at(pointer, size), builder.block
                    value, pointer = self._either(before, (value, pointer), inside, (rest, further))
                    size //= 2

    def _either(self, one: Value, ones: Sequence[Value], other: Value, others: Sequence[Value]) -> list[Value]:
        """Values that come from one of two blocks."""
        phis = [self.builder.phi(value.type) for value in ones]
        for phi, here, there in zip(phis, ones, others, strict=True):
            phi.add_incoming(here, one)
            phi.add_incoming(there, other)
        return phis

    def prefetch(self, pointer: Value, level: int = 3) -> None:
        """Ask for the cache line at ``pointer``, which may lie anywhere; 3 is the first-level cache, 2 the second."""
        signature = ir.FunctionType(VOID, [I8.as_pointer(), I32, I32, I32])
        fetch = cgutils.get_or_insert_function(self.function.module, signature, "llvm.prefetch.p0")
        self.builder.call(fetch, [self.builder.bitcast(pointer, I8.as_pointer()), I32(0), I32(level), I32(1)])

    # ---- conversions: other types than the lanes' live in memory only

    def widened(self, value: Value, stored: str) -> Value:
        """``value`` as loaded from ``stored``, in the type of the lanes: exact where that has the digits, as a float32
        has for integers of 16 bits, else rounded to the nearest.
        """
        if stored == self.lanes.dtype:
            return value
        if stored == "int64" and self.lanes == Lanes("float64", 4):
            return self._of_int64(value)
        if stored in INTEGERS:
            convert = self.builder.uitofp if stored in UNSIGNED else self.builder.sitofp
            return convert(value, self.vector)
        if stored == "bfloat16":
            wide = ir.VectorType(I32, self.lanes.count)
            shift = ir.Constant(wide, [16] * self.lanes.count)
            value = self.builder.bitcast(
                self.builder.shl(self.builder.zext(value, wide), shift), ir.VectorType(REAL["float32"], wide.count)
            )
            stored = "float32"
        return value if stored == self.lanes.dtype else self.builder.fpext(value, self.vector)

    def narrowed(self, value: Value, stored: str) -> Value:
        """``value`` rounded to the nearest of ``stored``, ties to even; for an integer it is one already."""
        if stored == self.lanes.dtype:
            return value
        if stored == "int64" and self.lanes == Lanes("float64", 4):
            return self._to_int64(value)
        if stored == "int64" and self.lanes.dtype == "float32":  # which has integers up to 2^24, and so has int32
            value = self.builder.fptosi(value, ir.VectorType(I32, self.lanes.count))
            return self.builder.sext(value, ir.VectorType(I64, self.lanes.count))
        if stored in INTEGERS:
            convert = self.builder.fptoui if stored in UNSIGNED else self.builder.fptosi
            return convert(value, ir.VectorType(STORED[stored], self.lanes.count))
        builder, wide = self.builder, ir.VectorType(I32, self.lanes.count)
        if self.lanes.dtype == "float64":
            # To 16 bits in two steps: LLVM's own conversion from float64 to float16 calls a function that is in no
            # library.
            value = builder.fptrunc(value, ir.VectorType(REAL["float32"], wide.count))
        if stored == "float32":
            return value
        if stored == "float16":
            return builder.fptrunc(value, ir.VectorType(STORED[stored], wide.count))

        def every(number: int) -> Value:
            return ir.Constant(wide, [number] * self.lanes.count)

        bits = builder.bitcast(value, wide)
        odd = builder.and_(builder.lshr(bits, every(16)), every(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, every(0x7FFF))), every(16))
        # Rounding could carry a NaN's last bits into infinity: keep it a quiet NaN.
        quiet = builder.or_(builder.lshr(bits, every(16)), every(0x40))
        nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(nan, quiet, rounded), ir.VectorType(I16, self.lanes.count))

    # AVX2 has no conversion between float64 and int64; LLVM would take one number after the other. The digits of a
    # float64 of 2^52 to 2^53 are an integer.

    def _of_int64(self, value: Value) -> Value:
        """float64 of int64, rounded to the nearest once: 32 bits and 32 bits, as digits of 2^52 and of 2^84."""
        builder = self.builder
        low = builder.or_(builder.and_(value, self._int64(0xFFFFFFFF)), self._int64(0x4330 << 48))
        high = builder.xor(builder.lshr(value, self._int64(32)), self._int64((0x4530 << 48) + (1 << 31)))
        high = builder.fsub(builder.bitcast(high, self.vector), self.constant(2.0**84 + 2.0**63 + 2.0**52))
        return builder.fadd(high, builder.bitcast(low, self.vector))

    def _to_int64(self, value: Value) -> Value:
        """int64 of a float64 that is an integer of at most 2^53: multiples of 2^32, and what is left."""
        builder, kind, digits = self.builder, ir.VectorType(I64, self.lanes.count), self.constant(1.5 * 2.0**52)
        high = self.fma(value, self.constant(2.0**-32), digits)
        low = builder.fadd(self.fma(builder.fsub(high, digits), self.constant(-(2.0**32)), value), digits)
        both = builder.add(builder.shl(builder.bitcast(high, kind), self._int64(32)), builder.bitcast(low, kind))
        return builder.sub(both, self._int64(0x4338 << 48))

    def _int64(self, number: int) -> Value:
        """An integer in every lane."""
        return ir.Constant(ir.VectorType(I64, self.lanes.count), [number] * self.lanes.count)

    # ---- arithmetic

    def splat(self, scalar: Value) -> Value:
        """A scalar in every lane."""
        return self.splat_of(self.vector, scalar)

    def constant(self, number: float) -> Value:
        """A number in every lane."""
        return ir.Constant(self.vector, [float(number)] * self.lanes.count)

    def splat_of(self, kind: Value, scalar: Value) -> Value:
        """A scalar in every lane of a vector of ``kind``."""
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, I32(0))
        return self.builder.shuffle_vector(
            first, undefined, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
        )

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a·b + c, rounded once."""
        name = f"llvm.fma.v{self.lanes.count}{_suffix(self.lanes.dtype)}"
        signature = ir.FunctionType(self.vector, [self.vector] * 3)
        return self.builder.call(cgutils.get_or_insert_function(self.function.module, signature, name), [a, b, c])

    def rectified(self, value: Value) -> Value:
        """max(value, 0); NaN passes through."""
        return self.builder.select(self.builder.fcmp_ordered("<", value, self.zero), self.zero, value)

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """The given lanes of a followed by b."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def transposed(self, vectors: list[Value]) -> list[Value]:
        """A square of vectors, transposed: one stage for each binary digit of its side, each for pairs of vectors that
        differ in that digit. Shuffles within and of 128 bits run twice as fast as those of single elements across them.
        """
        n = self.lanes.count
        inner = min(n, 16 // self.lanes.size)
        stages = []
        bit = inner // 2
        while bit:  # the elements of each 128 bits of a and of b, in turn
            low = [i - i % inner + i % inner // 2 + n * (i % 2) for i in range(n)]
            stages.append((bit, low, [i + inner // 2 for i in low]))
            bit //= 2
        bit = inner
        while bit < n:  # every other 128 bits, of a and then of b
            even = [2 * i - i % inner for i in range(n)]
            stages.append((bit, even, [i + inner for i in even]))
            bit *= 2
        vectors = list(vectors)
        for bit, first, second in stages:
            for i in range(n):
                if not i & bit:
                    a, b = vectors[i], vectors[i | bit]
                    vectors[i], vectors[i | bit] = self.shuffle(a, b, first), self.shuffle(a, b, second)
        return vectors

    # ---- control

    def block(self, name: str = "") -> Value:
        """A new basic block."""
        return self.function.append_basic_block(name)

    def loop(self, start: Value | int, end: Value, step: int, body: Callable[[Value], None]) -> Value:
        """``for i in range(start, end - step + 1, step): body(i)``; the first i that is not reached comes back."""
        builder = self.builder
        before, head, inside, after = builder.block, self.block("head"), self.block("body"), self.block("after")
        builder.branch(head)
        builder.position_at_end(head)
        i = builder.phi(I64)
        i.add_incoming(self.i64(start), before)
        following = builder.add(i, I64(step))
        builder.cbranch(builder.icmp_signed("<=", following, end), inside, after)
        builder.position_at_end(inside)
        body(i)
        i.add_incoming(following, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return i

    def sums(self, rows: int, columns: int, blocks: Sequence[tuple[Value, Any]]) -> list[list[Value]]:
        """Accumulators as phi nodes: rows × columns of them, with their values (or zero for None) per origin block."""
        phis = [[self.builder.phi(self.vector) for _ in range(columns)] for _ in range(rows)]
        for origin, values in blocks:
            for i in range(rows):
                for j in range(columns):
                    phis[i][j].add_incoming(self.zero if values is None else values[i][j], origin)
        return phis


def _suffix(dtype: str) -> str:
    return {"float32": "f32", "float64": "f64"}.get(dtype) or f"i{8 * SIZE[dtype]}"


def routine(name: str, lanes: Lanes, kinds: str, emit: Callable[..., None]) -> Any:
    """A function for compiled Python: it takes one tuple, and calls the LLVM function ``name`` that ``emit`` writes.

    ``kinds`` has a letter for each item of the tuple: ``i`` an integer; an address of ``e`` elements of the lanes'
    type, ``t`` 64-bit integers (a table), ``h`` float16, ``s`` float32, ``d`` float64, or of what fills ``1``, ``2``
    or ``4`` bytes. Memory behind addresses must not overlap. ``emit(emitter, *arguments)`` writes the body; the return
    is added.
    """
    letters = {
        "i": I64, "e": REAL[lanes.dtype].as_pointer(), "t": I64.as_pointer(), "h": STORED["float16"].as_pointer(),
        "s": REAL["float32"].as_pointer(), "d": REAL["float64"].as_pointer(),
        "1": I8.as_pointer(), "2": I16.as_pointer(), "4": I32.as_pointer(),
    }  # fmt: skip
    argument_types = [letters[kind] for kind in kinds]

    def written(module: ir.Module) -> ir.Function:
        if name in module.globals:
            return module.globals[name]
        function = ir.Function(module, ir.FunctionType(VOID, argument_types), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        function.attributes.add("nounwind")
        for argument, kind in zip(function.args, kinds, strict=True):
            if kind != "i":
                argument.add_attribute("noalias")
        emitter = Emitter(function, lanes)
        emit(emitter, *function.args)
        emitter.builder.ret_void()
        return function

    @intrinsic
    def call(typing: Any, arguments: Any) -> Any:
        if not isinstance(arguments, types.BaseTuple) or len(arguments) != len(kinds):
            raise TypeError(f"{name} takes a tuple of {len(kinds)}")

        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            given = cgutils.unpack_tuple(builder, values[0])
            passed = []
            for value, kind, numba_type, llvm_type in zip(given, kinds, arguments, argument_types, strict=True):
                integer = context.cast(builder, value, numba_type, types.intp)
                passed.append(integer if kind == "i" else builder.inttoptr(integer, llvm_type))
            builder.call(written(builder.module), passed)
            return context.get_dummy_value()

        return types.void(arguments), lower

    return call


@intrinsic
def get(typing: Any, address: Any, index: Any) -> Any:
    """The 64-bit integer number ``index`` at ``address``."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        base, at = (context.cast(builder, v, t, types.intp) for v, t in zip(values, signature.args, strict=True))
        return builder.load(builder.gep(builder.inttoptr(base, I64.as_pointer()), [at]))

    return types.intp(address, index), lower


@intrinsic
def settle(typing: Any) -> Any:
    """Wait until what was streamed past the caches is in memory for every thread to see."""

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), lower


def scalar(dtype: str, wide: str | None = None) -> tuple[Any, Any]:
    """(load, store) of single numbers of ``dtype`` at an address, as ``wide``: where it is not given, float64 for
    float64 and else float32.
    """
    wide = wide or ("float64" if dtype == "float64" else "float32")
    number = types.float64 if wide == "float64" else types.float32

    def emitter_of(builder: Any) -> Emitter:
        emitter = Emitter.__new__(Emitter)
        emitter.builder, emitter.lanes = builder, Lanes(wide, 1)
        emitter.vector = ir.VectorType(REAL[wide], 1)
        return emitter

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            emitter = emitter_of(builder)
            place = builder.inttoptr(context.cast(builder, values[0], signature.args[0], types.intp), I8.as_pointer())
            return builder.extract_element(emitter.load(place, dtype), I32(0))

        return number(address), lower

    @intrinsic
    def store(typing: Any, address: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            emitter = emitter_of(builder)
            place = builder.inttoptr(context.cast(builder, values[0], signature.args[0], types.intp), I8.as_pointer())
            value = context.cast(builder, values[1], signature.args[1], number)
            one = builder.insert_element(ir.Constant(emitter.vector, ir.Undefined), value, I32(0))
            emitter.store(one, place, dtype)
            return context.get_dummy_value()

        return types.void(address, value), lower

    return load, store
