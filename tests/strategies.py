"""Hypothesis strategies over the arguments of ``conv2d``: shapes, steps, paddings, types, values and memory.

A drawn call is plain text and numbers, so that a failure prints as something to paste; ``Call.operands`` makes its
arrays. Every call is valid by construction, and small: at most some sixty windows, each of at most 64 products.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import cases
import numpy as np
import oracle
import units
from hypothesis import strategies as st

NAMES = ("valid", "same", "same_upper", "same_lower", "full")
MODES = ("constant", "reflect", "symmetric", "edge", "wrap", "zeros", "replicate", "circular")
MIXED_MODES = (*MODES, "constant", "constant", "constant")
LAYOUTS = ("NCHW", "NHWC")
KERNEL_LAYOUTS = ("OIHW", "HWIO", "OHWI")
RANKS = ((4, 4), (4, 4), (4, 4), (3, 4), (2, 3), (2, 2))
RESULTS = ("int32", "int64", *cases.FLOATS, *cases.COMPLEX)
BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "complex64": 24, "float64": 53, "complex128": 53}
LARGEST = 6  # outputs along an axis

MEMORY = ("plain", "plain", "arranged", "arranged", "arranged", "broadcast", "foreign", "Fortran", "read-only", "list")


def kind_of(dtype: Any) -> int:
    return 2 if oracle.is_complex(dtype) else 0 if oracle.is_integer(dtype) else 1


def bits_of(dtype: str) -> int:
    """How wide the integers are that ``dtype`` holds."""
    return BITS.get(dtype) or 8 * np.dtype(dtype).itemsize


@dataclass(frozen=True)
class Form:
    """How an array lies in memory."""

    kind: str = "plain"
    order: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    offset: int = 0
    held: tuple[bool, ...] = ()  # axes with a step of zero

    def values(self, values: np.ndarray) -> np.ndarray:
        """``values`` as this form can hold them: equal along a broadcast axis."""
        if self.kind == "broadcast":
            first = tuple(slice(0, 1) if held else slice(None) for held in self.held)
            return np.broadcast_to(values[first], values.shape).copy() if values.size else values
        return values

    def lay(self, values: np.ndarray, xp: Any = np) -> tuple[Any, Any]:
        """``values`` in memory, and all the memory there is."""
        if self.kind == "arranged":
            return units.arranged(values, self.order, self.steps, self.offset, xp)
        if self.kind == "broadcast" and values.size:
            memory = xp.asarray(values[tuple(slice(0, 1) if held else slice(None) for held in self.held)].copy())
            return xp.broadcast_to(memory, values.shape), memory
        if self.kind == "list" and values.size and values.dtype.name in ("bool", "int64", "float64", "complex128"):
            return values.tolist(), values
        if self.kind == "foreign" and xp is np and values.dtype != oracle.BFLOAT16:
            memory = values.astype(values.dtype.newbyteorder())
        else:
            memory = xp.asarray(np.array(values, order="F" if self.kind == "Fortran" else "C"))
        if self.kind == "read-only" and xp is np:
            memory.flags.writeable = False
        return memory, memory


@functools.cache
def _choices(ndim: int) -> tuple[st.SearchStrategy[tuple], ...]:
    """Orders, steps and broadcast axes of an array: one draw each."""
    every = itertools.permutations(range(ndim)), itertools.product((1, -1, 2, -2, 3), repeat=ndim)
    return tuple(st.sampled_from(list(items)) for items in (*every, itertools.product((False, True), repeat=ndim)))


@st.composite
def forms(draw: st.DrawFn, ndim: int, kinds: tuple[str, ...] = MEMORY) -> Form:
    kind = draw(st.sampled_from(kinds))
    orders, steps, held = _choices(ndim)
    if kind == "arranged":
        return Form(kind, draw(orders), draw(steps), draw(st.integers(0, 2)))
    if kind == "broadcast":
        return Form(kind, held=draw(held))
    return Form(kind)


@dataclass(frozen=True)
class Call:
    """One valid call of ``conv2d``."""

    x_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    x_dtype: str
    k_dtype: str
    bias_dtype: str | None
    fill: str
    seed: int
    kwargs: dict[str, Any]  # what the result depends on
    options: dict[str, Any]  # how it is computed
    x_form: Form = Form()
    k_form: Form = Form()
    bias_form: Form = Form()
    out_form: Form | None = None
    at_home: bool = False
    special: bool = False  # a NaN or an Inf in x

    @property
    def out_channels(self) -> int:
        layout = self.kwargs.get("kernel_layout", "OIHW")
        return oracle.kernel_to_oihw(np.empty(self.k_shape, np.int8), layout).shape[0]

    def operands(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        rng = np.random.default_rng(self.seed)
        pair = (self.x_dtype, self.k_dtype)
        summed = self.kwargs.get("dtype") or oracle.result_dtype(*map(cases.numpy_dtype, pair)).name
        x = self.x_form.values(_values(rng, self.x_shape, self.x_dtype, self.fill, summed))
        k = self.k_form.values(_values(rng, self.k_shape, self.k_dtype, self.fill, summed))
        if self.special and x.size:
            x = x.copy()
            x.flat[rng.integers(x.size)] = rng.choice([np.nan, np.inf, -np.inf])
            x = self.x_form.values(x)
        if self.bias_dtype is None:
            return x, k, None
        # exact in every type, so that the order of its conversions does not matter
        bias = rng.integers(-8, 9, self.out_channels) / (4 if kind_of(self.bias_dtype) else 1)
        if kind_of(self.bias_dtype) == 2:
            bias = bias + 1j * rng.integers(-8, 9, self.out_channels)
        if self.bias_dtype in ("bool", "uint8", "uint16", "uint32"):
            bias = np.abs(bias)
        return x, k, self.bias_form.values(bias.astype(cases.numpy_dtype(self.bias_dtype)))

    def slack(self, result: np.dtype) -> int:
        """Roundings beyond those of the sum: of operands that the type which is summed in does not hold."""
        if oracle.is_integer(result):
            return 0
        held = bits_of(units.sum_dtype(result).name)
        # one by the implementation, and for an integer one by the oracle
        return sum(2 for dtype in (self.x_dtype, self.k_dtype) if bits_of(dtype) > held)


TINY = {"float16": -7, "bfloat16": -66, "float32": -70, "complex64": -70, "float64": -530, "complex128": -530}


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, fill: str, summed: str) -> np.ndarray:
    numpy_type = cases.numpy_dtype(dtype)
    if oracle.is_integer(numpy_type):
        if dtype == "bool":
            return rng.integers(0, 2, shape).astype(bool)
        low, high = int(np.iinfo(numpy_type).min), int(np.iinfo(numpy_type).max)
        if not oracle.is_integer(cases.numpy_dtype(summed)):
            most = {"float16": 8, "bfloat16": 8, "float32": 2**28, "complex64": 2**28}.get(summed, 2**60)
            low, high = max(low, -most), min(high, most)
        if fill == "integers":
            low, high = max(low, -3), min(high, 3)
        return rng.integers(low, high, shape, numpy_type, endpoint=True)

    def part() -> np.ndarray:
        if fill == "integers":
            return rng.integers(-3, 4, shape).astype(np.float64)
        if fill == "positive":
            return rng.random(shape)
        values = rng.standard_normal(shape)
        return np.ldexp(values, TINY[dtype]) if fill == "tiny" else values

    values = part() + 1j * part() if oracle.is_complex(numpy_type) else part()
    return values.astype(numpy_type)


# ---- the parts of a call

small_pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


def spelled(draw: st.DrawFn, rows: int, columns: int) -> Any:
    """A pair of integers in one of the forms that mean the same."""
    forms: list[Any] = [(rows, columns), [rows, columns], np.array([rows, columns])]
    forms.append((np.int64(rows), np.int32(columns)))
    if rows == columns:
        forms += [rows, np.int64(rows), rows]
    return draw(st.sampled_from(forms))


def nested(draw: st.DrawFn, pads: tuple[tuple[int, int], tuple[int, int]]) -> Any:
    """Explicit padding in one of the forms that mean the same."""
    (top, bottom), (left, right) = pads
    forms: list[Any] = [pads, [list(pad) for pad in pads], np.array(pads)]
    if top == bottom and left == right:
        forms += [(top, left), [top, left], np.array([top, left])]
        if top == left:
            forms += [top, np.uint8(top)]
    return draw(st.sampled_from(forms))


@st.composite
def geometries(
    draw: st.DrawFn, modes: tuple[str, ...] = MIXED_MODES
) -> tuple[tuple[int, int], tuple[int, int], dict[str, Any]]:
    """(H, W), (KH, KW) and the keyword arguments that say how the one moves over the other."""
    kernel = draw(small_pairs)
    dilation = tuple(draw(st.sampled_from((1, 1, 2, 3))) if k > 1 else draw(st.sampled_from((1, 2, cases.HUGE)))
                     for k in kernel)  # fmt: skip
    stride = [draw(st.sampled_from((1, 1, 2, 3, 5, cases.HUGE))) for _ in range(2)]
    mode = draw(st.sampled_from(modes))
    padding: Any = draw(st.sampled_from((*NAMES, "none", "none", "both", "pairs", "sides", "sides")))
    if padding not in NAMES:
        side = st.integers(0, 9 if draw(st.booleans()) else 2)
        top, bottom, left, right = (draw(side) if padding != "none" else 0 for _ in range(4))
        if padding == "both":
            bottom = left = right = top
        elif padding == "pairs":
            bottom, right = top, left
        padding = ((top, bottom), (left, right))
    explicit = padding if not isinstance(padding, str) else ((0, 0), (0, 0))
    if padding == "full":
        explicit = tuple((d * (k - 1), d * (k - 1)) for k, d in zip(kernel, dilation, strict=True))
    extents = []
    for axis, (k, d, pad) in enumerate(zip(kernel, dilation, explicit, strict=True)):
        # An empty axis is padded by the constant alone, and "same" leaves it empty.
        empty = mode in ("constant", "zeros") and not isinstance(padding, str)
        least = max(0 if empty else 1, d * (k - 1) + 1 - sum(pad))
        if padding in ("same", "same_upper", "same_lower"):
            least = 1
        n = draw(st.integers(least, least + 5))
        outputs = -(-n // stride[axis]) if str(padding).startswith("same") else None
        while (outputs or (n + sum(pad) - d * (k - 1) - 1) // stride[axis] + 1) > LARGEST:
            stride[axis] += 1
            outputs = -(-n // stride[axis]) if outputs else None
        extents.append(n)
    kwargs = {
        "stride": spelled(draw, *stride),
        "dilation": spelled(draw, *dilation),
        "padding": padding if isinstance(padding, str) else nested(draw, padding),
        "padding_mode": mode,
    }
    return (extents[0], extents[1]), kernel, kwargs


def padding_values(x_dtype: str, result: np.dtype) -> st.SearchStrategy[Any]:
    if x_dtype == "bool":
        return st.sampled_from([0, 1, True])
    if oracle.is_integer(cases.numpy_dtype(x_dtype)):
        info = np.iinfo(x_dtype)
        extremes = [] if result in oracle.SIXTEEN_BIT else [int(info.min), int(info.max)]
        return st.sampled_from([0, 1, 3, np.int64(2), *extremes])
    values: list[Any] = [0, 1, -3, 0.5, 0.1, np.float32(1.1), -0.0]
    if oracle.is_complex(x_dtype):
        return st.sampled_from([*values, 0.1 + 2j, -1j])
    if oracle.is_complex(result):  # where the parts of a product with an Inf have no one answer
        return st.sampled_from(values)
    return st.sampled_from([*values, float("inf"), float("-inf"), float("nan")])


def results_of(x_dtype: str, k_dtype: str) -> list[str]:
    """The names that ``dtype=`` may have, short of an int32 that could overflow."""
    default = oracle.result_dtype(*map(cases.numpy_dtype, (x_dtype, k_dtype)))
    allowed = [name for name in RESULTS if kind_of(name if name != "bfloat16" else oracle.BFLOAT16) >= kind_of(default)]
    return [name for name in allowed if name != "int32" or default == np.int32]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    x_rank, k_rank = draw(st.sampled_from(RANKS))
    (H, W), (KH, KW), kwargs = draw(geometries())
    layout, kernel_layout = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(KERNEL_LAYOUTS))
    N, groups = draw(st.sampled_from((1, 1, 2, 3, 0))), draw(st.sampled_from((1, 1, 1, 2, 3)))
    I, per_group = draw(st.sampled_from((1, 2, 3, 4, 0))), draw(st.integers(1, 3))
    if x_rank == 2:
        groups = I = 1
    if k_rank == 2:
        per_group = 1
    C, O = groups * I, groups * per_group
    x_shape: tuple[int, ...] = (N, C, H, W) if layout == "NCHW" else (N, H, W, C)
    x_shape = (H, W) if x_rank == 2 else x_shape[4 - x_rank :]
    k_shape: tuple[int, ...] = {"OIHW": (O, I, KH, KW), "HWIO": (KH, KW, I, O), "OHWI": (O, KH, KW, I)}[kernel_layout]
    if k_rank == 3:
        k_shape = (KH, KW, O) if kernel_layout == "HWIO" else (O, KH, KW)
    elif k_rank == 2:
        k_shape = (KH, KW)

    x_dtype = draw(st.sampled_from(cases.DTYPES))
    k_dtype = x_dtype if draw(st.booleans()) else draw(st.sampled_from(cases.DTYPES))
    asked = draw(st.sampled_from((None, None, *results_of(x_dtype, k_dtype))))
    result = cases.numpy_dtype(asked) if asked else oracle.result_dtype(*map(cases.numpy_dtype, (x_dtype, k_dtype)))
    kwargs |= {"groups": groups, "flip": draw(st.booleans()), "layout": layout, "kernel_layout": kernel_layout}
    if asked:
        kwargs["dtype"] = asked
    if not oracle.is_complex(result):
        kwargs["activation"] = draw(st.sampled_from((None, None, "relu")))
    constant = kwargs["padding_mode"] == "constant"
    zero_points = draw(st.booleans()) and {x_dtype, k_dtype} & set(cases.BYTES)
    points = {"int8": (-128, 127), "uint8": (0, 255)}
    if result in oracle.SIXTEEN_BIT:  # float16 ends below 255 · 255 · 2
        points = dict.fromkeys(cases.BYTES, (0, 9))
    if zero_points and x_dtype in cases.BYTES:
        kwargs["x_zero_point"] = draw(st.integers(*points[x_dtype]))
    if zero_points and k_dtype in cases.BYTES:
        point = st.integers(*points[k_dtype])
        kwargs["k_zero_point"] = draw(point | st.lists(point, min_size=O, max_size=O))
    if constant and not zero_points:
        kwargs["padding_value"] = draw(padding_values(x_dtype, result))

    biases = [name for name in (*cases.DTYPES,) if kind_of(cases.numpy_dtype(name)) <= kind_of(result)]
    fill = draw(st.sampled_from(("normal", "normal", "positive", "integers", "tiny")))
    # an Inf times a weight that underflows in the type of the sum is NaN, and right
    if fill == "tiny" and not np.isfinite(kwargs.get("padding_value", 0)):
        kwargs["padding_value"] = 1
    special = fill != "tiny" and kind_of(result) == kind_of(cases.numpy_dtype(x_dtype)) == 1
    options: dict[str, Any] = {"precision": draw(st.sampled_from(("highest", "highest", "high", "medium")))}
    if draw(st.integers(0, 4)) == 0:
        options["workspace_limit"] = draw(st.sampled_from((0, 300, 1000, 3000, 10_000, 10**6, 2**70)))
    y_rank = max(x_rank, 3) if k_rank > 2 else 2
    out = draw(forms(y_rank, ("plain", "arranged", "arranged", "Fortran"))) if draw(st.booleans()) else None
    return Call(
        x_shape, k_shape, x_dtype, k_dtype, draw(st.none() | st.sampled_from(biases)), fill,
        draw(st.integers(0, 2**16)), kwargs, options, draw(forms(len(x_shape))), draw(forms(len(k_shape))),
        draw(forms(1)), out, draw(st.booleans()), special and draw(st.integers(0, 5)) == 0,
    )  # fmt: skip


# ---- arguments of every kind

INTEGERS = st.integers(-2, 9) | st.sampled_from([2**31 - 1, 2**31, 2**32 + 1, 2**55, 2**62, 2**63, 2**64, -(2**63)])
ODD = [True, False, None, 1.0, 0.0, -1.5, float("nan"), float("inf"), 1j, "", "same", "SAME", "relu", b"1", {}, (), [],
       np.float32(1), np.int8(3), np.bool_(True), np.uint64(2**63), np.zeros(0), np.ones(()), object, "NHWC", "OIHW",
       np.array([1, 1]), np.array([[1, 1], [1, 1]]), np.array([1.0, 1.0]), np.array("a"), range(2), "valid", "wrap",
       np.datetime64(0, "s"), "float64", "float16", "int32", "q", "cpu", "cuda", "numpy", "numpy.gemm",
       "cupy"]  # fmt: skip
LEAVES = INTEGERS | st.sampled_from(ODD)
PAIRS = st.tuples(INTEGERS, LEAVES)
ANYTHING = st.one_of(INTEGERS, LEAVES, PAIRS, PAIRS.map(list), st.tuples(PAIRS, PAIRS), st.lists(LEAVES, max_size=5))
SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)
ARRAY_DTYPES = [*cases.DTYPES, "uint64", "longdouble", "object", "U2", "S2", "M8[s]", "f4,i2", ">f4"]
ARRAYS = st.builds(
    lambda shape, dtype: np.zeros(shape, cases.numpy_dtype(dtype)), SHAPES, st.sampled_from(ARRAY_DTYPES)
)
