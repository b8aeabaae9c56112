"""One convolution, described without its arrays: validated, frozen, printable.

``Conv2dProblem.of`` is where an argument is found valid or refused; nothing behind it checks again. A problem prints
as one line, which parses back:

    n8c3h224w224_o64kh7kw7_s2p3_f32

It is the name of a test, a row of a benchmark, and the text in an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuconv import dtypes, geometry, layouts
from gpuconv.geometry import Pads, Pair
from gpuconv.padding_value import check_meaning, checked
from gpuconv.zero_points import as_zero_point, check_zero_point

ACTIVATIONS = (None, "relu")
PRECISIONS = ("highest", "high", "medium")
NO_PADS: Pads = ((0, 0), (0, 0))

# What is computed from what. The gradients are the adjoints of the forward convolution; unfold gathers its windows,
# and fold is the adjoint of that.
OPS = ("forward", "input_grad", "weight_grad", "unfold", "fold")


@dataclass(frozen=True, slots=True)
class Conv2dProblem:
    """A 2-D convolution ``y[n,o,i,j] = b[o] + Σ_cpq x[n,c, i·s+p·d-pad, j·s+q·d-pad] · k[o,c,p,q]``, or its adjoint.

    Sizes are those of this forward convolution, whatever is computed:

    =============  ==============  ==============  ======
    ``op``         first operand   second          result
    =============  ==============  ==============  ======
    forward        x               k               y
    input_grad     gradient of y   k               gradient of x
    weight_grad    x               gradient of y   gradient of k
    unfold         x                               the windows of x, as C·KH·KW channels of y
    fold           such windows                    their sums, in the form of x
    =============  ==============  ==============  ======

    It holds no arrays: ``of`` makes one from shapes and options and refuses what makes no sense, ``str`` gives its
    line, ``parse`` reads that again. Equal problems are equal and hash alike.

    Attributes
    ----------
    N, C, H, W : int
        Images, channels, rows and columns of x, whatever the caller's layout. C counts the channels of all groups.
    O, KH, KW : int
        Output channels, and rows and columns of the kernel.
    stride : (int, int)
        Step of the window, rows and columns.
    padding : ((top, bottom), (left, right))
        Pixels around x, names resolved. Negative, a crop, in the parts that an input gradient is made of.
    dilation : (int, int)
        Spacing of the kernel's taps, rows and columns.
    groups : int
        Groups of channels; each sees ``C // groups`` of them.
    padding_mode : str
        ``"constant"``, ``"reflect"``, ``"symmetric"``, ``"edge"`` or ``"wrap"``.
    padding_value : number
        The constant.
    flip : bool
        Whether the kernel is turned by 180°.
    layout, kernel_layout : str
        The order of the axes in the caller's arrays.
    activation : str or None
        ``"relu"`` or None.
    bias : bool
        Whether there is one.
    x_dtype, k_dtype, y_dtype : str
        Of the first operand, the second and the result.
    x_zero_point : int
        Subtracted from x.
    k_zero_point : bool
        Whether the kernel has zero points other than 0.
    precision : str
        ``"highest"``, ``"high"`` or ``"medium"``.
    op : str
        What is computed, see above.
    conjugate : bool
        Whether the operand that is not a gradient is conjugated, as the adjoint of a complex convolution asks.

    Examples
    --------
    >>> problem = Conv2dProblem.of((8, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3)
    >>> print(problem)
    n8c3h224w224_o64kh7kw7_s2p3_f32
    >>> problem.y_shape, problem == Conv2dProblem.parse(str(problem))
    ((8, 64, 112, 112), True)
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
    op: str = "forward"
    conjugate: bool = False

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
    def operand_shapes(self) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int] | None]:
        """Shapes of the first operand and of the second."""
        return {
            "forward": (self.x_shape, self.k_shape),
            "input_grad": (self.y_shape, self.k_shape),
            "weight_grad": (self.x_shape, self.y_shape),
            "unfold": (self.x_shape, None),
            "fold": (self.y_shape, None),
        }[self.op]

    @property
    def result_shape(self) -> tuple[int, int, int, int]:
        """Shape of the result, in the order N C H W, or O I KH KW for a weight gradient."""
        if self.op == "weight_grad":
            return self.k_shape
        return self.x_shape if self.op in ("input_grad", "fold") else self.y_shape

    @property
    def result_channels(self) -> int:
        """Channels of the result, each of which a bias has a number for."""
        return self.C if self.op == "input_grad" else self.O

    @property
    def products(self) -> int:
        """Products summed for one element of the result, at most (of an input gradient near the border, fewer)."""
        if self.op in ("unfold", "fold"):
            return self.KH * self.KW if self.op == "fold" else 1
        if self.op == "weight_grad":
            return self.N * self.OH * self.OW
        return (self.C if self.op == "forward" else self.O) // self.groups * self.KH * self.KW

    @property
    def sum_dtype(self) -> str:
        """The type the result's definition sums in; 16-bit floats are summed in float32 and rounded once."""
        return "float32" if self.y_dtype in ("float16", "bfloat16") else self.y_dtype

    @property
    def fill(self) -> complex:
        """The value of a constant padded pixel, a number of x's dtype: with zero points it equals x's, and so adds
        nothing.
        """
        return self.x_zero_point or dtypes.rounded(self.padding_value, self.x_dtype)

    @property
    def result_size(self) -> int:
        """Elements of the result."""
        return math.prod(self.result_shape)

    @property
    def flops(self) -> int:
        """Real multiplications and additions of the direct algorithm (a complex product and sum counts eight)."""
        outputs = math.prod(self.y_shape)
        if self.op in ("unfold", "fold"):
            return outputs * (2 if dtypes.is_complex(self.y_dtype) else 1) if self.op == "fold" else 0
        return outputs * (self.C // self.groups) * self.KH * self.KW * (8 if dtypes.is_complex(self.y_dtype) else 2)

    @property
    def bytes(self) -> int:
        """Bytes of the operands, bias and result, each moved once: the least traffic of any algorithm."""
        first, second = self.operand_shapes
        total = self.result_channels * dtypes.itemsize(self.y_dtype) if self.bias else 0
        total += math.prod(first) * dtypes.itemsize(self.x_dtype)
        if second is not None:
            total += math.prod(second) * dtypes.itemsize(self.k_dtype)
        return total + self.result_size * dtypes.itemsize(self.y_dtype)

    def largest_sum(self, bias: int = 0, k_digits: int | None = None) -> int:
        """Upper bound on |Σ| for integer operands, zero points and a bias included.

        Parameters
        ----------
        bias : int, default 0
            Magnitude of the largest bias.
        k_digits : int, optional
            Binary digits of the largest weight's magnitude, where that is known.

        Returns
        -------
        int
            The bound, exactly.
        """
        x_low, x_high = dtypes.RANGES[self.x_dtype]
        k_low, k_high = dtypes.RANGES[self.k_dtype] if self.op != "fold" else (1, 1)
        x_top = max(x_high - self.x_zero_point, self.x_zero_point - x_low)
        # A zero point lies in the type's own range, so the difference spans at most the whole range.
        k_top = k_high - k_low if self.k_zero_point else max(k_high, -k_low)
        if k_digits is not None:
            k_top = min(k_top, (1 << k_digits) - 1)
        return self.products * x_top * k_top + bias

    def tables(self) -> tuple[geometry.IndexTable, geometry.IndexTable]:
        """The index tables of the rows and the columns: which pixel each tap of each output reads.

        Returns
        -------
        rows, columns : IndexTable
            Indices into an axis of x, -1 where the padding's constant stands.
        """
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
        """Entries of the two index tables that a block of outputs reads.

        Parameters
        ----------
        rows, columns : int
            Extents of the block.

        Returns
        -------
        (int, int)
            Entries of the table of the rows, and of that of the columns.
        """
        steps = (
            geometry.table_steps(self.KH, self.OH, self.stride[0], self.dilation[0]),
            geometry.table_steps(self.KW, self.OW, self.stride[1], self.dilation[1]),
        )
        return geometry.span(self.KH, rows, steps[0]), geometry.span(self.KW, columns, steps[1])

    def table_bytes(self) -> int:
        """Bytes of both index tables.

        Returns
        -------
        int
            Eight per entry.
        """
        return 8 * sum(self.table_spans(self.OH, self.OW))

    def __str__(self) -> str:
        """The problem as one line; defaults are left out."""
        from gpuconv import problem_line

        return problem_line.text(self)

    @classmethod
    def parse(cls, line: str, call: str = "problem") -> Conv2dProblem:
        """The problem of a line, as ``str`` prints it.

        Parameters
        ----------
        line : str
            Such as ``"n8c3h224w224_o64kh7kw7_s2p3_f32"``.
        call : str, default "problem"
            What an error names as the function that was called.

        Returns
        -------
        Conv2dProblem
            The problem.

        Raises
        ------
        ValueError
            When the line is none, or that of a problem that makes no sense.
        """
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
        op: str = "forward",
        conjugate: bool = False,
        names: tuple[str, str] = ("x", "k"),
        least_padding: int = 0,
    ) -> Conv2dProblem:
        """The problem of an input and a kernel of these shapes, in the caller's layouts.

        Parameters
        ----------
        x_shape, k_shape : tuple of int
            As ``conv2d`` takes them.
        call : str, default "conv2d"
            What an error names as the function that was called.
        x_dtype, k_dtype : str, default "float32"
            Of the two operands.
        dtype : dtype, optional
            Of the result.
        bias : bool, default False
            Whether there is one.
        stride, padding, dilation, groups, padding_mode, padding_value, flip, layout, kernel_layout, activation, \
x_zero_point
            As for ``conv2d``.
        k_zero_point : bool, default False
            Whether the kernel has zero points other than 0.
        precision : {"highest", "high", "medium"}
            As for ``conv2d``.
        op : {"forward", "input_grad", "weight_grad", "unfold", "fold"}
            What is computed.
        conjugate : bool, default False
            Whether a complex gradient conjugates.
        names : (str, str), default ("x", "k")
            What the caller calls the two, for errors.
        least_padding : int, default 0
            The least padding that is not refused.

        Returns
        -------
        Conv2dProblem
            The problem, its padding resolved.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, the value it got and the rule it broke.
        """
        check_choice(call, "layout", layout, layouts.LAYOUTS)
        check_choice(call, "kernel_layout", kernel_layout, layouts.KERNEL_LAYOUTS)
        check_choice(call, "activation", activation, ACTIVATIONS)
        check_choice(call, "precision", precision, PRECISIONS)
        if not isinstance(flip, (bool, np.bool_)):
            raise TypeError(f"{call}: flip must be True or False; got {flip!r}")
        groups = geometry.as_integer(call, "groups", groups, 1, 2**63)
        (N, C, H, W), (O, I, KH, KW) = layouts.four_dimensional(call, names, x_shape, k_shape, layout, kernel_layout)
        for name, extent in (("output channels", O), ("rows", KH), ("columns", KW)):
            if extent == 0:
                raise ValueError(f"{call}: {names[1]} has 0 {name} (shape {k_shape}); a kernel needs at least one")
        axis = layouts.kernel_axes(kernel_layout, 4)[1]
        layouts.check_channels(call, names, x_shape, k_shape, C, O, I, groups, axis, layout)

        strides = geometry.as_pair(call, "stride", stride, 1)
        dilations = geometry.as_pair(call, "dilation", dilation, 1)
        pads = geometry.resolve_padding(call, padding, (H, W), (KH, KW), strides, dilations, least_padding)
        if any(pad >= geometry.STEP_LIMIT for axis in pads for pad in axis):
            raise ValueError(f"{call}: padding must be below {geometry.STEP_LIMIT}; padding={padding!r} gives {pads}")
        order = names if names == ("x", "k") else None
        geometry.require_fit(call, (H, W), (KH, KW), pads, dilations, order)
        mode = geometry.as_padding_mode(call, padding_mode)
        value = checked(call, padding_value, x_dtype)
        check_meaning(call, padding_value, value, padding_mode)
        geometry.require_source(call, mode, x_shape, (H, W), pads)
        if pads == NO_PADS:  # one name for one problem
            mode, value = "constant", 0

        y_dtype = x_dtype if op == "unfold" else dtypes.result_dtype(call, x_dtype, k_dtype, dtype)
        if activation is not None and dtypes.is_complex(y_dtype):
            raise ValueError(f"{call}: activation={activation!r} is not defined for complex results ({y_dtype})")
        zero_point = as_zero_point(call, "x_zero_point", x_zero_point, x_dtype)
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
            op=op,
            conjugate=conjugate and dtypes.is_complex(y_dtype),
        )
        problem.check_overflow(call)
        return problem

    def check_overflow(self, call: str, bias: int = 0) -> None:
        """Refuse a 32-bit integer sum that could overflow; 64-bit sums wrap as NumPy's own arithmetic does.

        Parameters
        ----------
        call : str
            What the error names as the function that was called.
        bias : int, default 0
            Magnitude of the largest bias.

        Raises
        ------
        ValueError
            When it could.
        """
        if self.op != "unfold" and self.y_dtype == "int32" and self.largest_sum(bias) > dtypes.RANGES["int32"][1]:
            both = f"products of {self.x_dtype} and {self.k_dtype}"
            summed = f"numbers of {self.x_dtype}" if self.op == "fold" else both
            raise ValueError(
                f"{call}: {self.products} {summed}"
                f"{' and the bias' if bias else ''} could overflow the int32 sum; pass dtype=np.int64"
            )


def check_choice(call: str, name: str, value: Any, accepted: tuple[str | None, ...]) -> None:
    """Refuse a ``value`` that is none of ``accepted``."""
    if not (value is None or isinstance(value, str)) or value not in accepted:
        known = ", ".join(map(repr, accepted))
        raise ValueError(f"{call}: {name} must be one of {known}; got {value!r}{geometry.meant(value, accepted)}")
