"""One convolution, described without its arrays: validated, frozen, printable.

``Conv2dProblem.of`` is where an argument is found valid or refused; nothing behind it checks again. A problem prints
as one line, which parses back:

    n8c3h224w224_o64kh7kw7_s2p3_f32

It is the name of a test, a row of a benchmark, and the text in an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes, geometry
from gpuconv.geometry import Pads, Pair

LAYOUTS = ("NCHW", "NHWC")
KERNEL_LAYOUTS = ("OIHW", "HWIO", "OHWI")
ACTIVATIONS = (None, "relu")
PRECISIONS = ("highest", "high", "medium")
NO_PADS: Pads = ((0, 0), (0, 0))


@dataclass(frozen=True, slots=True)
class Conv2dProblem:
    """A forward 2-D convolution ``y[n,o,i,j] = b[o] + Σ_cpq x[n,c, i·s+p·d-pad, j·s+q·d-pad] · k[o,c,p,q]``.

    Extents are those of the four-dimensional form (N, C, H, W) whatever the caller's layout; ``C`` counts all
    channels of x, each group of the kernel sees ``C // groups`` of them. ``padding`` is resolved to
    ((top, bottom), (left, right)).
    """

    N: int
    C: int
    H: int
    W: int
    O: int
    KH: int
    KW: int
    stride: Pair = (1, 1)
    padding: Pads = NO_PADS
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: str = "constant"
    padding_value: complex = 0
    flip: bool = False
    layout: str = "NCHW"
    kernel_layout: str = "OIHW"
    activation: str | None = None
    bias: bool = False
    x_dtype: str = "float32"
    k_dtype: str = "float32"
    y_dtype: str = "float32"
    x_zero_point: int = 0
    k_zero_point: bool = False
    precision: str = "highest"

    @property
    def OH(self) -> int:
        """Rows of the result."""
        return geometry.output_extent(self.H, self.KH, self.padding[0], self.stride[0], self.dilation[0])

    @property
    def OW(self) -> int:
        """Columns of the result."""
        return geometry.output_extent(self.W, self.KW, self.padding[1], self.stride[1], self.dilation[1])

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self.N, self.C, self.H, self.W

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        """(O, C // groups, KH, KW)."""
        return self.O, self.C // self.groups, self.KH, self.KW

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """(N, O, OH, OW)."""
        return self.N, self.O, self.OH, self.OW

    @property
    def products(self) -> int:
        """Products summed for one element of the result: C/groups · KH · KW."""
        return self.C // self.groups * self.KH * self.KW

    @property
    def sum_dtype(self) -> str:
        """The type the result's definition sums in; 16-bit floats are summed in float32 and rounded once."""
        return "float32" if self.y_dtype in ("float16", "bfloat16") else self.y_dtype

    @property
    def fill(self) -> complex:
        """The value of a constant padded pixel: with zero points it equals x's, and so contributes nothing."""
        return self.x_zero_point or self.padding_value

    @property
    def y_size(self) -> int:
        """Elements of the result."""
        return self.N * self.O * self.OH * self.OW

    @property
    def flops(self) -> int:
        """Real multiplications and additions of the direct algorithm (a complex product and sum counts eight)."""
        return self.y_size * self.products * (8 if dtypes.is_complex(self.y_dtype) else 2)

    @property
    def bytes(self) -> int:
        """Bytes of x, k, bias and result, each moved once: the least traffic of any algorithm."""
        bias = self.O * dtypes.itemsize(self.y_dtype) if self.bias else 0
        x = self.N * self.C * self.H * self.W * dtypes.itemsize(self.x_dtype)
        k = self.O * self.products * dtypes.itemsize(self.k_dtype)
        return x + k + bias + self.y_size * dtypes.itemsize(self.y_dtype)

    def largest_sum(self, bias: int = 0) -> int:
        """Upper bound on |Σ| for integer operands, zero points and a bias of magnitude ``bias`` included."""
        x_low, x_high = dtypes.RANGES[self.x_dtype]
        k_low, k_high = dtypes.RANGES[self.k_dtype]
        x_top = max(x_high - self.x_zero_point, self.x_zero_point - x_low)
        # A zero point lies in the type's own range, so the difference spans at most the whole range.
        k_top = k_high - k_low if self.k_zero_point else max(k_high, -k_low)
        return self.products * x_top * k_top + bias

    def tables(self) -> tuple[geometry.IndexTable, geometry.IndexTable]:
        """The index tables of the rows and the columns."""
        rows, columns = (
            geometry.index_table(n, k, outputs, pads[0], stride, dilation, self.padding_mode)
            for n, k, outputs, pads, stride, dilation in zip(
                (self.H, self.W),
                (self.KH, self.KW),
                (self.OH, self.OW),
                self.padding,
                self.stride,
                self.dilation,
                strict=True,
            )
        )
        return rows, columns

    def table_spans(self, rows: int, columns: int) -> Pair:
        """Entries of the two index tables that a block of ``rows`` × ``columns`` outputs reads."""
        steps = (
            geometry.table_steps(self.KH, self.OH, self.stride[0], self.dilation[0]),
            geometry.table_steps(self.KW, self.OW, self.stride[1], self.dilation[1]),
        )
        return geometry.span(self.KH, rows, steps[0]), geometry.span(self.KW, columns, steps[1])

    def table_bytes(self) -> int:
        """Bytes of both index tables."""
        return 8 * sum(self.table_spans(self.OH, self.OW))

    def __str__(self) -> str:
        """The problem as one line; defaults are left out."""
        from gpuconv import problem_line

        return problem_line.text(self)

    @classmethod
    def parse(cls, line: str, call: str = "problem") -> Conv2dProblem:
        """The problem that ``line`` prints; a ValueError that names ``call`` when it is not one."""
        from gpuconv import problem_line

        return problem_line.parse(line, call)

    @classmethod
    def of(
        cls,
        x_shape: tuple[int, ...],
        k_shape: tuple[int, ...],
        *,
        call: str = "conv2d",
        x_dtype: str = "float32",
        k_dtype: str = "float32",
        dtype: Any = None,
        bias: bool = False,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
        padding_mode: Any = "constant",
        padding_value: Any = 0,
        flip: Any = False,
        layout: Any = "NCHW",
        kernel_layout: Any = "OIHW",
        activation: Any = None,
        x_zero_point: Any = 0,
        k_zero_point: bool = False,
        precision: Any = "highest",
    ) -> Conv2dProblem:
        """The problem of an input of ``x_shape`` and a kernel of ``k_shape`` in the caller's layouts.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, the value it got and the rule it broke; ``call`` is the function named.
        """
        _choice(call, "layout", layout, LAYOUTS)
        _choice(call, "kernel_layout", kernel_layout, KERNEL_LAYOUTS)
        _choice(call, "activation", activation, ACTIVATIONS)
        _choice(call, "precision", precision, PRECISIONS)
        if not isinstance(flip, (bool, np.bool_)):
            raise TypeError(f"{call}: flip must be True or False; got {flip!r}")
        groups = geometry.as_integer(call, "groups", groups, 1, 2**63)
        (N, C, H, W), (O, I, KH, KW) = _four_dimensional(call, x_shape, k_shape, layout, kernel_layout)
        for name, extent in (("output channels", O), ("rows", KH), ("columns", KW)):
            if extent == 0:
                raise ValueError(f"{call}: k has 0 {name} (shape {k_shape}); a kernel needs at least one")
        _check_channels(call, x_shape, k_shape, C, O, I, groups, kernel_layout)

        strides = geometry.as_pair(call, "stride", stride, 1)
        dilations = geometry.as_pair(call, "dilation", dilation, 1)
        pads = geometry.resolve_padding(call, padding, (H, W), (KH, KW), strides, dilations)
        if any(pad >= geometry.STEP_LIMIT for axis in pads for pad in axis):
            raise ValueError(f"{call}: padding must be below {geometry.STEP_LIMIT}; padding={padding!r} gives {pads}")
        geometry.require_fit(call, (H, W), (KH, KW), pads, dilations)
        mode = geometry.PADDING_MODE_ALIASES.get(padding_mode, padding_mode) if isinstance(padding_mode, str) else None
        if mode not in geometry.PADDING_MODES:
            known = ", ".join((*geometry.PADDING_MODES, *geometry.PADDING_MODE_ALIASES))
            raise ValueError(f"{call}: padding_mode must be one of {known}; got {padding_mode!r}")
        value = _padding_value(call, padding_value, x_dtype)
        if value != 0 and (mode != "constant" or padding_mode == "zeros"):
            raise ValueError(
                f"{call}: padding_value={padding_value!r} has no meaning with padding_mode={padding_mode!r}; "
                "leave it at 0 or use padding_mode='constant'"
            )
        for axis, (extent, pad) in enumerate(zip((H, W), pads, strict=True)):
            if mode != "constant" and extent == 0 and any(pad):
                raise ValueError(
                    f"{call}: padding_mode={padding_mode!r} cannot extend an empty axis; x has shape {x_shape}, "
                    f"spatial axis {axis} is empty"
                )
        if pads == NO_PADS:  # one name for one problem
            mode, value = "constant", 0

        y_dtype, _ = dtypes.result_and_sum(call, x_dtype, k_dtype, dtype)
        if activation is not None and dtypes.is_complex(y_dtype):
            raise ValueError(f"{call}: activation={activation!r} is not defined for complex results ({y_dtype})")
        zero_point = _zero_point(call, "x_zero_point", x_zero_point, x_dtype)
        if k_zero_point:
            check_zero_point(call, "k_zero_point", 0, 1, k_dtype)
        if (zero_point or k_zero_point) and value != 0:
            raise ValueError(
                f"{call}: with zero points a padded pixel equals the zero point; padding_value={padding_value!r} "
                "must be left at 0"
            )
        problem = cls(
            N,
            C,
            H,
            W,
            O,
            KH,
            KW,
            stride=strides,
            padding=pads,
            dilation=dilations,
            groups=groups,
            padding_mode=mode,
            padding_value=value,
            flip=bool(flip),
            layout=layout,
            kernel_layout=kernel_layout,
            activation=activation,
            bias=bias,
            x_dtype=x_dtype,
            k_dtype=k_dtype,
            y_dtype=y_dtype,
            x_zero_point=zero_point,
            k_zero_point=k_zero_point,
            precision=precision,
        )
        problem.check_overflow(call)
        return problem

    def check_overflow(self, call: str, bias: int = 0) -> None:
        """Refuse a 32-bit integer sum that could overflow; 64-bit sums wrap as NumPy's own arithmetic does."""
        if self.y_dtype == "int32" and self.largest_sum(bias) > dtypes.RANGES["int32"][1]:
            raise ValueError(
                f"{call}: {self.products} products of {self.x_dtype} and {self.k_dtype}"
                f"{' and the bias' if bias else ''} could overflow the int32 sum; pass dtype=np.int64"
            )


def _choice(call: str, name: str, value: Any, accepted: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in accepted:
        raise ValueError(f"{call}: {name} must be one of {', '.join(map(repr, accepted))}; got {value!r}")


def _padding_value(call: str, value: Any, x_dtype: str) -> complex:
    """``value`` as a Python number that x's dtype can hold."""
    if isinstance(value, int) and value.bit_length() > 63:  # NumPy would make an object of it
        if dtypes.is_integer(x_dtype) or value.bit_length() > 1023:
            raise ValueError(f"{call}: padding_value is beyond the range of {x_dtype}; got {_shown(value)}")
        value = float(value)
    try:
        scalar = np.asarray(value)
    except ValueError:  # ragged lists
        scalar = np.asarray(None)
    kind = scalar.dtype.kind
    if kind not in "biufc" or scalar.ndim != 0 or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{call}: padding_value must be a number; got {_shown(value)} of type {type(value).__name__}")
    if dtypes.is_integer(x_dtype):
        low, high = dtypes.RANGES[x_dtype]
        if kind in "fc":
            raise TypeError(f"{call}: padding_value must be an integer for x of dtype {x_dtype}; got {value!r}")
        if not low <= int(scalar) <= high:
            raise ValueError(f"{call}: padding_value must lie in {x_dtype}'s range {low} to {high}; got {value!r}")
        return int(scalar)
    if kind == "c" and not dtypes.is_complex(x_dtype):
        raise TypeError(f"{call}: padding_value must be real for x of dtype {x_dtype}; got {value!r}")
    number = complex(scalar)
    largest = _LARGEST.get(x_dtype, np.inf)
    if any(np.isfinite(part) and abs(part) > largest for part in (number.real, number.imag)):
        raise ValueError(f"{call}: padding_value is beyond the range of x's dtype {x_dtype}; got {value!r}")
    if dtypes.is_complex(x_dtype):
        return _one_nan(repr(number)) if number != number else number
    real = number.real
    if real != real:
        return math.nan  # this one object: NaN equals nothing else, and equal problems must be equal
    return int(real) if real.is_integer() and abs(real) < 2**53 else real


def _shown(value: Any) -> str:
    return geometry.shown(value) if isinstance(value, int) else repr(value)


_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LARGEST = {
    "float16": 65504.0,
    "bfloat16": float.fromhex("0x1.fep127"),
    "float32": _FLOAT32_MAX,
    "complex64": _FLOAT32_MAX,
}


@lru_cache(maxsize=64)
def _one_nan(text: str) -> complex:
    """One object for each complex number with a NaN in it, so that equal problems are equal."""
    return complex(text)


def _zero_point(call: str, name: str, value: Any, dtype: str) -> int:
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(())[()]
    integer = geometry.as_integer(call, name, value, -(2**62), 2**62)
    check_zero_point(call, name, integer, integer, dtype)
    return integer


def check_zero_point(call: str, name: str, low: int, high: int, dtype: str) -> None:
    """Refuse zero points (from ``low`` to ``high``) that ``dtype`` cannot hold, or that are not for 8-bit data."""
    if low == high == 0:
        return
    if dtype not in ("int8", "uint8"):
        raise TypeError(f"{call}: {name} is for int8 and uint8 operands; the operand has dtype {dtype}")
    bottom, top = dtypes.RANGES[dtype]
    if low < bottom or high > top:
        raise ValueError(
            f"{call}: {name} must lie in {dtype}'s range {bottom} to {top}; got {low if low < bottom else high}"
        )


_PAIRINGS = """\
    x (H, W)         with k (KH, KW)                  gives (OH, OW)
    x (H, W)         with k (O, KH, KW)               gives (O, OH, OW)
    x (C, H, W)      with k (O, C/groups, KH, KW)     gives (O, OH, OW)
    x (N, C, H, W)   with k (O, C/groups, KH, KW)     gives (N, O, OH, OW)"""

# Axes of the kernel as given, in the order O I H W (or O H W).
_KERNEL_AXES = {
    ("OIHW", 4): (0, 1, 2, 3),
    ("HWIO", 4): (3, 2, 0, 1),
    ("OHWI", 4): (0, 3, 1, 2),
    ("OIHW", 3): (0, 1, 2),
    ("HWIO", 3): (2, 0, 1),
    ("OHWI", 3): (0, 1, 2),
}


def kernel_axes(kernel_layout: str, ndim: int) -> tuple[int, ...]:
    """The permutation that brings a kernel of rank 3 or 4 to the order O (I) H W."""
    return _KERNEL_AXES[kernel_layout, ndim]


def image_axes(layout: str, ndim: int) -> tuple[int, ...]:
    """The permutation that brings x (or the result) to channels first."""
    if layout == "NCHW" or ndim < 3:
        return tuple(range(ndim))
    return (*range(ndim - 3), ndim - 1, ndim - 3, ndim - 2)


def _four_dimensional(
    call: str, x_shape: tuple[int, ...], k_shape: tuple[int, ...], layout: str, kernel_layout: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes as (N, C, H, W) and (O, I, KH, KW), or a ValueError that says which pairings would work."""
    ranks = (len(x_shape), len(k_shape))
    if ranks not in ((2, 2), (2, 3), (3, 4), (4, 4)):
        hint = ""
        if len(x_shape) in (3, 4) and len(k_shape) == 2:
            channels = x_shape[image_axes(layout, len(x_shape))[-3]]
            # A colour image as most libraries load it: channels last, whatever the default layout says.
            last = layout == "NHWC" or (x_shape[-1] in (3, 4) and channels not in (1, 3, 4))
            channels, rest = (x_shape[-1], ', layout="NHWC"') if last else (channels, "")
            hint = (
                f"\nTo filter each of the {channels} channels with the same kernel (depthwise):\n"
                f"    conv2d(x, np.broadcast_to(k, ({channels}, 1, *k.shape)), groups={channels}{rest})"
            )
        raise ValueError(
            f"{call}: x of shape {x_shape} and k of shape {k_shape} do not pair; what works:\n{_PAIRINGS}{hint}"
        )
    x = tuple(x_shape[axis] for axis in image_axes(layout, len(x_shape)))
    x = (1,) * (4 - len(x)) + x
    if len(k_shape) == 2:
        return x, (1, 1, *k_shape)
    k = tuple(k_shape[axis] for axis in kernel_axes(kernel_layout, len(k_shape)))
    return x, (k if len(k) == 4 else (k[0], 1, *k[1:]))


def _check_channels(
    call: str,
    x_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    C: int,
    O: int,
    I: int,
    groups: int,
    kernel_layout: str,
) -> None:
    for name, channels in (("x's channels", C), ("k's output channels", O)):
        if channels % groups:
            raise ValueError(
                f"{call}: groups must divide {name}; got groups={groups} and {channels} channels "
                f"(x {x_shape}, k {k_shape})"
            )
    if I * groups != C:
        axis = kernel_axes(kernel_layout, 4)[1]
        raise ValueError(
            f"{call}: k has {I} input channels per group (shape {k_shape}) but x has {C} channels (shape {x_shape}) "
            f"and groups={groups}; k.shape[{axis}] must be x's channels // groups = {C // groups}"
        )
