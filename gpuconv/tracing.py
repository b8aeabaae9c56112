"""The steps of one small convolution, printed as one would work them out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuconv import dtypes, geometry
from gpuconv.geometry import Pads, Pair

Array = npt.NDArray[Any]

# What is worth reading ends long before these; they stop a photograph from becoming millions of little arrays.
WINDOW_LIMIT = 10_000
PRODUCT_LIMIT = 1_000_000

_CALL = "trace"
_MINUS = "−"


@dataclass(frozen=True, eq=False)
class Step:
    """One position of the window.

    Attributes
    ----------
    position : (int, int)
        Row and column of the output.
    rows, columns : tuple of int
        Row and column of the input that each row and column of the patch is read from; -1 is the padding.
    patch, kernel, products : numpy.ndarray, shape (KH, KW), read-only
        What the window covers (0 on the padding), the weights, and ``patch * kernel``.
    sum : int, float or complex
        The sum of ``products``: the output at ``position``.
    """

    position: Pair
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    patch: Array
    kernel: Array
    products: Array
    sum: Any

    @property
    def calculation(self) -> str:
        """The sum in signs: a bracket per kernel row, without the taps whose weight is zero."""
        plain = bool(np.isin(self.kernel, (-1, 0, 1)).all())
        plus = "+" if plain else " + "
        brackets = []
        for values, weights, products in zip(self.patch, self.kernel, self.products, strict=True):
            # Only zero·inf and zero·nan leave a zero weight something to say.
            said = (weights != 0) | (products != 0)
            taps = enumerate(zip(values[said].tolist(), weights[said].tolist(), strict=True))
            terms = [_signed(value, weight, plain, at == 0) for at, (value, weight) in taps]
            if terms:
                brackets.append((len(terms), _chain(terms, plain)))
        if len(brackets) <= 1:
            return brackets[0][1] if brackets else "0"
        return plus.join(
            f"({text})" if terms > 1 or (i > 0 and text.startswith(_MINUS)) else text
            for i, (terms, text) in enumerate(brackets)
        )

    def __str__(self) -> str:
        """Patch, kernel and products side by side, and their sum."""
        i, j = self.position
        grids = [_grid(array) for array in (self.patch, self.kernel, self.products)]
        titles = ("Patch:", "Kernel:", "Product:")
        widths = [max(len(title), len(grid[0])) for title, grid in zip(titles, grids, strict=True)]
        middle = (len(self.rows) - 1) // 2
        lines = [f"Position ({i},{j})", (" " * 5).join(map(str.ljust, titles, widths))]
        for row, cells in enumerate(zip(*grids, strict=True)):
            patch, kernel, product = map(str.ljust, cells, widths)
            times, equals = ("  ×  ", "  =  ") if row == middle else (" " * 5, " " * 5)
            lines.append(patch + times + kernel + equals + product)
        products = " + ".join(_bracketed(value) for value in self.products.ravel().tolist())
        lines += [f"Sum = {products} = {_number(self.sum)}", f"Output[{i},{j}] = {_number(self.sum)}"]
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        """The position and the sum on one line."""
        return f"Step(position={self.position}, sum={self.sum!r})"


@dataclass(frozen=True, eq=False)
class Trace:
    """Every step of one convolution; made by :func:`trace`.

    ``print`` shows it as a table, ``len`` counts the steps, iteration goes through them row by row.

    Attributes
    ----------
    x, k : numpy.ndarray
        The operands, in the type that the products are summed in; read-only.
    stride : (int, int)
        Step of the window, per axis.
    padding : ((top, bottom), (left, right))
        The padding, resolved.
    dilation : (int, int)
        Spacing of the kernel's taps, per axis.
    output : numpy.ndarray, shape (OH, OW)
        The result; read-only.
    steps : tuple of Step
        One per output, row by row.
    """

    x: Array
    k: Array
    stride: Pair
    padding: Pads
    dilation: Pair
    output: Array
    steps: tuple[Step, ...]

    @property
    def shape(self) -> Pair:
        """(OH, OW)."""
        rows, columns = self.output.shape
        return rows, columns

    def step(self, i: int, j: int) -> Step:
        """The step that makes output (i, j).

        Parameters
        ----------
        i, j : int
            Row and column of the output.

        Returns
        -------
        Step
            Its patch, products and sum; ``print`` it.

        Raises
        ------
        TypeError, ValueError
            When i or j is no integer, or not a row or column of the output.
        """
        rows, columns = self.shape
        i = geometry.as_integer("Trace.step", "i", i, 0, rows)
        j = geometry.as_integer("Trace.step", "j", j, 0, columns)
        return self.steps[i * columns + j]

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        """The steps, row by row."""
        return iter(self.steps)

    def __repr__(self) -> str:
        """Shapes and settings on one line."""
        shapes = f"x={self.x.shape}, k={self.k.shape}"
        settings = f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        return f"Trace({shapes}, {settings}, output={self.shape})"

    def __str__(self) -> str:
        """A line on the convolution, and the table of its steps."""
        told = np.zeros(self.k.shape[1], dtype=bool)
        for step in self.steps:
            told |= ((step.kernel != 0) | (step.products != 0)).any(axis=0)
        columns = np.flatnonzero(told).tolist()
        labels = ", ".join(f"col {q}" for q in columns)
        rows = [("Position", f"Patch ({labels})" if labels else "Patch", "Calculation", "Output")]
        for step in self.steps:
            i, j = step.position
            patch = ", ".join(f"col{q}=[{','.join(map(_number, step.patch[:, q].tolist()))}]" for q in columns)
            rows.append((f"({i},{j})", patch, step.calculation, _number(step.sum)))
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        table = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        table.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([self._caption(), "", *table])

    def _caption(self) -> str:
        sizes = f"Input {_by(self.x.shape)}, kernel {_by(self.k.shape)}"
        stride, dilation = (f"{a}" if a == b else f"{a}×{b}" for a, b in (self.stride, self.dilation))
        (top, bottom), (left, right) = self.padding
        if top == bottom == left == right:
            padding = f"padding {top}" if top else "no padding"
        else:
            padding = f"padding ({top}, {bottom}) by ({left}, {right})"
        spaced = "" if self.dilation == (1, 1) else f", dilation {dilation}"
        return f"{sizes}, stride {stride}, {padding}{spaced}: output {_by(self.shape)}"


def trace(x: npt.ArrayLike, k: npt.ArrayLike, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Trace:
    """The steps of one small 2-D convolution, to read.

    Parameters
    ----------
    x : array_like, shape (H, W)
        The input.
    k : array_like, shape (KH, KW)
        The kernel.
    stride : int or (rows, columns), default 1
        Step of the window.
    padding : int, (rows, columns), ((top, bottom), (left, right)) or str, default 0
        Zeros around the input, or a name that ``conv2d`` takes.
    dilation : int or (rows, columns), default 1
        Spacing of the kernel's taps.

    Returns
    -------
    Trace
        Its steps, its output, and, as a string, the table of both.

    Raises
    ------
    TypeError
        When an operand is not numeric, or does not live in host memory, or an integer argument is not an integer.
    ValueError
        When the shapes do not make a convolution, or there are more than 10,000 windows or 1,000,000 products.

    Notes
    -----
    ``y[i,j] = Σ_pq x[i·s+p·d-pad, j·s+q·d-pad] · k[p,q]``, at a cost of OH·OW·KH·KW products in time and memory.
    What a window covers is read from the same index tables as in every backend.

    The sums are exact for integers while they fit int64 (booleans count as 0 and 1); other numbers are summed in
    float64 or complex128. So ``output`` has one of these three types, where ``conv2d`` would follow its operands.
    Printed numbers have six significant digits, unless they are whole.

    Examples
    --------
    >>> steps = trace([[10, 20, 30, 40], [60, 70, 80, 90], [110, 120, 130, 140]], [[1, 0, -1]] * 3)
    >>> print(steps)
    Input 3×4, kernel 3×3, stride 1, no padding: output 1×2
    <BLANKLINE>
    | Position | Patch (col 0, col 2)               | Calculation               | Output |
    |----------|------------------------------------|---------------------------|--------|
    | (0,0)    | col0=[10,60,110], col2=[30,80,130] | (10−30)+(60−80)+(110−130) | −60    |
    | (0,1)    | col0=[20,70,120], col2=[40,90,140] | (20−40)+(70−90)+(120−140) | −60    |

    >>> print(steps.step(0, 0))
    Position (0,0)
    Patch:            Kernel:      Product:
     10   20   30     1  0  −1      10  0   −30
     60   70   80  ×  1  0  −1  =   60  0   −80
    110  120  130     1  0  −1     110  0  −130
    Sum = 10 + 0 + (−30) + 60 + 0 + (−80) + 110 + 0 + (−130) = −60
    Output[0,0] = −60
    """
    x_array, k_array = _operand("x", x, "(H, W)"), _operand("k", k, "(KH, KW)")
    strides = geometry.as_pair(_CALL, "stride", stride, 1)
    dilations = geometry.as_pair(_CALL, "dilation", dilation, 1)
    sizes, kernel = _extents(x_array), _extents(k_array)
    if 0 in kernel:
        raise ValueError(f"{_CALL}: k must have at least one element; got shape {kernel}")
    pads = geometry.resolve_padding(_CALL, padding, sizes, kernel, strides, dilations)
    geometry.require_fit(_CALL, sizes, kernel, pads, dilations)
    axes = list(zip(sizes, kernel, pads, strides, dilations, strict=True))
    shape = tuple(geometry.output_extent(*axis) for axis in axes)
    _require_small(shape, kernel)

    summed = _sum_dtype(x_array, k_array)
    x_array, k_array = (_frozen(array.astype(summed)) for array in (x_array, k_array))
    rows, columns = (
        _sources(geometry.index_table(n, taps, outputs, pad[0], step, spacing, "constant"), taps, outputs)
        for (n, taps, pad, step, spacing), outputs in zip(axes, shape, strict=True)
    )
    # One row and one column of zeros at the end, where the -1 of the tables points.
    extended = np.pad(x_array, ((0, 1), (0, 1)))
    output = np.zeros(shape, summed)
    steps = []
    for i, j in np.ndindex(*shape):
        patch = _frozen(extended[np.ix_(rows[i], columns[j])])
        with np.errstate(all="ignore"):  # overflow and zero·inf show in the numbers
            products = _frozen(patch * k_array)
            output[i, j] = products.sum()
        source = tuple(rows[i].tolist()), tuple(columns[j].tolist())
        steps.append(Step((i, j), *source, patch, k_array, products, output[i, j].item()))
    return Trace(x_array, k_array, strides, pads, dilations, _frozen(output), tuple(steps))


def _operand(name: str, value: Any, axes: str) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{_CALL}: {name} is a masked array, whose mask would be ignored; fill it first")
    if not isinstance(value, np.ndarray) and hasattr(value, "__cuda_array_interface__"):
        raise TypeError(f"{_CALL}: {name} is in GPU memory ({type(value).__name__}); copy it to the host first")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{_CALL}: {name} must be an array or nested lists of shape {axes}; {error}") from None
    dtypes.name_of(_CALL, f"{name} has dtype", array.dtype)
    if array.ndim != 2:
        raise ValueError(f"{_CALL}: {name} must have two axes, {axes}; got shape {array.shape}")
    return array


def _extents(array: Array) -> Pair:
    rows, columns = array.shape
    return rows, columns


def _require_small(shape: tuple[int, ...], kernel: Pair) -> None:
    for what, count, limit in (
        ("windows", math.prod(shape), WINDOW_LIMIT),
        ("products", math.prod((*shape, *kernel)), PRODUCT_LIMIT),
    ):
        if count > limit:
            raise ValueError(
                f"{_CALL}: {count} {what} ({_by(shape)} outputs of a {_by(kernel)} kernel) are more than {limit}; "
                "trace is for small examples: crop x, or call conv2d for the result alone"
            )


def _sum_dtype(x: Array, k: Array) -> np.dtype[Any]:
    names = {x.dtype.name, k.dtype.name}
    if any(map(dtypes.is_complex, names)):
        return np.dtype(np.complex128)
    return np.dtype(np.int64 if all(map(dtypes.is_integer, names)) else np.float64)


def _sources(table: geometry.IndexTable, taps: int, outputs: int) -> geometry.IntArray:
    """Source index of each tap, shape (outputs, taps)."""
    return np.stack([table.tap(p, 0, outputs) for p in range(taps)], axis=1)


def _frozen(array: Array) -> Array:
    array.setflags(write=False)
    return array


def _by(extents: tuple[int, ...]) -> str:
    return "×".join(map(str, extents))


def _number(value: Any) -> str:
    if isinstance(value, complex):
        if value.imag == 0:
            return _number(value.real)
        sign = _MINUS if math.copysign(1, value.imag) < 0 else "+"
        return f"{_number(value.real)}{sign}{_number(abs(value.imag))}j"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        value = int(value)
    return (str(value) if isinstance(value, int) else format(value, ".6g")).replace("-", _MINUS)


def _bracketed(value: Any) -> str:
    text = _number(value)
    return f"({text})" if text.startswith(_MINUS) or text.endswith("j") else text


def _signed(value: Any, weight: Any, plain: bool, first: bool) -> tuple[str, str]:
    """One tap as its sign and the rest; weights of 1 and -1 are signs alone where all weights are ``plain``."""
    if plain and weight:
        sign = _MINUS if weight == -1 else ""
        return sign, _number(value) if first and not sign else _bracketed(value)
    sign = _MINUS if not isinstance(weight, complex) and weight < 0 else ""
    return sign, f"{_bracketed(-weight if sign else weight)}·{_bracketed(value)}"


def _chain(terms: list[tuple[str, str]], plain: bool) -> str:
    first, *rest = terms
    space = "" if plain else " "
    return "".join(first) + "".join(f"{space}{sign or '+'}{space}{text}" for sign, text in rest)


def _grid(array: Array) -> list[str]:
    cells = [[_number(value) for value in row] for row in array.tolist()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in cells]
