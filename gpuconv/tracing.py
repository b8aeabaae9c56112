"""The steps of one small convolution, as one would work them out by hand: to print, or as a page to step through."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuconv import arrays, dtypes, geometry, notation
from gpuconv.geometry import Pads, Pair

Array = npt.NDArray[Any]

# What is worth reading ends long before these; they stop a photograph from becoming millions of little arrays.
WINDOW_LIMIT = 10_000
PRODUCT_LIMIT = 1_000_000

_CALL = "trace"
_NOTEBOOK_ROWS = 40
_X_FORMS = {2: "two axes, (H, W)", 3: "three, (C, H, W)"}
_PLANE_FORMS = {2: "two axes, (KH, KW)"}
_FILTER_FORMS = {3: "three axes, (C, KH, KW)", 4: "four, (1, C, KH, KW)"}


@dataclass(frozen=True, eq=False)
class Step:
    """One position of the window.

    Attributes
    ----------
    position : (int, int)
        Row and column of the output.
    rows, columns : tuple of int
        Row and column of the input that each row and column of the patch is read from; -1 is a padding of zeros.
    patch, kernel, products : numpy.ndarray, shape (KH, KW) or (C, KH, KW), read-only
        What the window covers, the weights, and ``patch * kernel``.
    running : numpy.ndarray, shape of products, read-only
        The sum of the products up to this one, and this one: channel by channel, row by row.
    sum : int, float or complex
        The last of ``running``: the output at ``position``.
    """

    position: Pair
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    patch: Array
    kernel: Array
    products: Array
    running: Array
    sum: Any

    @property
    def calculation(self) -> str:
        """The sum in signs: a bracket per kernel row, without the taps whose weight is zero."""
        texts = self.channel_calculations
        return texts[0] if len(texts) == 1 else " + ".join(f"[{text}]" for text in texts)

    @property
    def channel_calculations(self) -> tuple[str, ...]:
        """``calculation`` of each channel."""
        operands = map(_planes, (self.patch, self.kernel, self.products))
        return tuple(notation.weighted_sum(*channel) for channel in zip(*operands, strict=True))

    @property
    def channel_sums(self) -> Array:
        """The sum of each channel's products, shape (C,); of an input without channels, (1,)."""
        products = _planes(self.products)
        with np.errstate(all="ignore"):
            return np.add.accumulate(products.reshape(len(products), -1), axis=1)[:, -1]

    def __str__(self) -> str:
        """Patch, kernel and products side by side, and their sum; of several channels, one after the other."""
        i, j = self.position
        patches, kernels, products = map(_planes, (self.patch, self.kernel, self.products))
        lines = [f"Position ({i},{j})"]
        for c, (operands, total) in enumerate(
            zip(zip(patches, kernels, products, strict=True), self.channel_sums.tolist(), strict=True)
        ):
            if len(patches) > 1:
                lines.append(f"Channel {c}")
            lines += _side_by_side(operands)
            terms = " + ".join(notation.bracketed(value) for value in operands[2].ravel().tolist())
            lines.append(f"Sum = {terms} = {notation.number(total)}")
        total = notation.number(self.sum)
        if len(patches) > 1:
            partial = " + ".join(map(notation.bracketed, self.channel_sums.tolist()))
            lines.append(f"Sum of channels = {partial} = {total}")
        lines.append(f"Output[{i},{j}] = {total}")
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        """The position and the sum on one line."""
        return f"Step(position={self.position}, sum={self.sum!r})"


@dataclass(frozen=True, eq=False)
class Trace:
    """Every step of one convolution; made by :func:`trace`.

    ``print`` shows it as a table, ``to_html`` makes a page of it to step through, ``len`` counts the steps, iteration
    goes through them row by row.

    Attributes
    ----------
    x, k : numpy.ndarray, shape (H, W) and (KH, KW), or (C, H, W) and (C, KH, KW)
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
    padding_mode : str
        NumPy's name of what the padding holds.
    """

    x: Array
    k: Array
    stride: Pair
    padding: Pads
    dilation: Pair
    output: Array
    steps: tuple[Step, ...]
    padding_mode: str = "constant"

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
        if self.padding_mode != "constant":
            settings += f", padding_mode={self.padding_mode!r}"
        return f"Trace({shapes}, {settings}, output={self.shape})"

    def __str__(self) -> str:
        """A line on the convolution, and the table of its steps."""
        rows = self._rows()
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        table = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        table.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([self.caption, "", *table])

    def to_html(self) -> str:
        """A page that steps through the convolution, in one file: it loads nothing and needs no network.

        Returns
        -------
        str
            HTML; write it as UTF-8.

        Raises
        ------
        ValueError
            Where there would be more to show than one can look at: more than 48 rows or columns of padded input, 4,096
            padded pixels over all channels, 256 weights, or 30,000 products.

        Notes
        -----
        The page holds its own style and script, and a policy (CSP) that lets a browser run no other. Every number in it
        is computed and written by Python, so that the page shows what this object holds.

        Examples
        --------
        >>> from pathlib import Path
        >>> steps = trace([[10, 20, 30, 40], [60, 70, 80, 90], [110, 120, 130, 140]], [[1, 0, -1]] * 3)
        >>> _ = Path("steps.html").write_text(steps.to_html(), encoding="utf-8")
        """
        from gpuconv import trace_page

        return trace_page.page(self)

    def _repr_html_(self) -> str:
        """The page inside a notebook, and the table for where it cannot run; of a large trace the table alone."""
        from gpuconv import notebook, trace_page

        head, *rows = self._rows()
        steps = notebook.table(head, rows[:_NOTEBOOK_ROWS])
        if len(rows) > _NOTEBOOK_ROWS:
            steps += notebook.paragraph(f"… and {len(rows) - _NOTEBOOK_ROWS} more")
        if trace_page.unreadable(self) is not None:
            return notebook.block(notebook.paragraph(self.caption), steps)
        document = trace_page.page(self, embedded=True)
        framed = notebook.page(document, self.caption, trace_page.typical_height(self))
        return notebook.block(framed, notebook.folded("The steps as a table", steps))

    def _rows(self) -> list[tuple[str, ...]]:
        """The table: its head, and a row per step."""
        return self._channel_rows() if self.k.ndim == 3 else self._patch_rows()

    def _patch_rows(self) -> list[tuple[str, ...]]:
        """The table for one channel: what the columns with weights cover, and the sum."""
        told = np.zeros(self.k.shape[1], dtype=bool)
        for step in self.steps:
            told |= ((step.kernel != 0) | (step.products != 0)).any(axis=0)
        columns = np.flatnonzero(told).tolist()
        labels = f" ({', '.join(f'col {q}' for q in columns)})" if columns else ""
        rows: list[tuple[str, ...]] = [("Position", f"Patch{labels}", "Calculation", "Output")]
        for step in self.steps:
            i, j = step.position
            patch = ", ".join(f"col{q}=[{','.join(map(notation.number, step.patch[:, q].tolist()))}]" for q in columns)
            rows.append((f"({i},{j})", patch, step.calculation, notation.number(step.sum)))
        return rows

    def _channel_rows(self) -> list[tuple[str, ...]]:
        """The table for several channels: the partial sum of each, and their sum."""
        rows: list[tuple[str, ...]] = [("Position", *(f"Channel {c}" for c in range(len(self.k))), "Output")]
        for step in self.steps:
            i, j = step.position
            sums = map(notation.number, step.channel_sums.tolist())
            partial = (f"{text} = {total}" for text, total in zip(step.channel_calculations, sums, strict=True))
            rows.append((f"({i},{j})", *partial, notation.number(step.sum)))
        return rows

    @property
    def caption(self) -> str:
        """The convolution in one line."""
        sizes = f"Input {notation.by(self.x.shape)}, kernel {notation.by(self.k.shape)}"
        stride, dilation = (f"{a}" if a == b else f"{a}×{b}" for a, b in (self.stride, self.dilation))
        (top, bottom), (left, right) = self.padding
        if top == bottom == left == right:
            padding = f"padding {top}" if top else "no padding"
        else:
            padding = f"padding ({top}, {bottom}) by ({left}, {right})"
        if self.padding_mode != "constant" and padding != "no padding":
            padding = f"{self.padding_mode} {padding}"
        spaced = "" if self.dilation == (1, 1) else f", dilation {dilation}"
        return f"{sizes}, stride {stride}, {padding}{spaced}: output {notation.by(self.shape)}"


def trace(
    x: npt.ArrayLike,
    k: npt.ArrayLike,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    padding_mode: str = "constant",
) -> Trace:
    """The steps of one small 2-D convolution, to read.

    Parameters
    ----------
    x : array_like, shape (H, W) or (C, H, W)
        The input.
    k : array_like, shape (KH, KW), or (C, KH, KW) or (1, C, KH, KW)
        The kernel: one filter.
    stride : int or (rows, columns), default 1
        Step of the window.
    padding : int, (rows, columns), ((top, bottom), (left, right)) or str, default 0
        Rows and columns around the input, or a name that ``conv2d`` takes.
    dilation : int or (rows, columns), default 1
        Spacing of the kernel's taps.
    padding_mode : str, default "constant"
        What they hold, zeros by default; the names are those of ``conv2d``.

    Returns
    -------
    Trace
        Its steps and its output; as a string, the table of both; by ``to_html``, a page that steps through them.

    Raises
    ------
    TypeError
        When an operand is not numeric, or does not live in host memory, or an integer argument is not an integer.
    ValueError
        When the shapes do not make a convolution, or there are more than 10,000 windows or 1,000,000 products.

    Notes
    -----
    ``y[i,j] = Σ_cpq x[c, i·s+p·d-pad, j·s+q·d-pad] · k[c,p,q]``, at a cost of OH·OW·C·KH·KW products in time and
    memory. What a window covers is read from the same index tables as in every backend.

    The sums are exact for integers while they fit int64 (booleans count as 0 and 1); other numbers are summed in
    float64 or complex128, one after the other. So ``output`` has one of these three types, where ``conv2d`` would
    follow its operands.
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
    x_array = _operand("x", x, _X_FORMS)
    k_array = _kernel_of(x_array, k)
    mode = geometry.as_padding_mode(_CALL, padding_mode)
    strides = geometry.as_pair(_CALL, "stride", stride, 1)
    dilations = geometry.as_pair(_CALL, "dilation", dilation, 1)
    sizes, kernel = _extents(x_array), _extents(k_array)
    if 0 in kernel:
        raise ValueError(f"{_CALL}: k must have at least one element; got shape {kernel}")
    pads = geometry.resolve_padding(_CALL, padding, sizes, kernel, strides, dilations)
    geometry.require_fit(_CALL, sizes, kernel, pads, dilations, ("x", "k"))
    geometry.require_source(_CALL, mode, x_array.shape, sizes, pads)
    axes = list(zip(sizes, kernel, pads, strides, dilations, strict=True))
    shape = tuple(geometry.output_extent(*axis) for axis in axes)
    _require_small(shape, k_array.shape)

    summed = _sum_dtype(x_array, k_array)
    x_array, k_array = (_frozen(array.astype(summed)) for array in (x_array, k_array))
    rows, columns = (
        _sources(geometry.index_table(n, taps, outputs, pad[0], step, spacing, mode), taps, outputs)
        for (n, taps, pad, step, spacing), outputs in zip(axes, shape, strict=True)
    )
    # One row and one column of zeros at the end, where the -1 of the tables points.
    extended = np.pad(x_array, [(0, 0)] * (x_array.ndim - 2) + [(0, 1), (0, 1)])
    output = np.zeros(shape, summed)
    steps = []
    for i, j in np.ndindex(*shape):
        patch = _frozen(extended[..., rows[i][:, None], columns[j]])
        with np.errstate(all="ignore"):  # overflow and zero·inf show in the numbers
            products = _frozen(patch * k_array)
            running = _frozen(np.add.accumulate(products.ravel()).reshape(products.shape))
        output[i, j] = running.ravel()[-1]
        source = tuple(rows[i].tolist()), tuple(columns[j].tolist())
        steps.append(Step((i, j), *source, patch, k_array, products, running, output[i, j].item()))
    return Trace(x_array, k_array, strides, pads, dilations, _frozen(output), tuple(steps), mode)


def _operand(name: str, value: Any, forms: dict[int, str]) -> Array:
    shapes = ", or ".join(forms.values())
    if not isinstance(value, np.ndarray) and hasattr(value, "__cuda_array_interface__"):
        raise TypeError(f"{_CALL}: {name} is in GPU memory ({type(value).__name__}); copy it to the host first")
    try:
        array: Array = arrays.operand(_CALL, name, value).array
    except ValueError as error:
        said = str(error).removeprefix(f"{_CALL}: ")
        raise ValueError(f"{_CALL}: {name} must be an array or nested lists with {shapes}; {said}") from None
    if array.ndim not in forms:
        raise ValueError(f"{_CALL}: {name} must have {shapes}; got shape {array.shape}")
    return array


def _kernel_of(x: Array, value: Any) -> Array:
    """The one filter that goes with ``x``."""
    if x.ndim == 2:
        return _operand("k", value, _PLANE_FORMS)
    k = _operand("k", value, _FILTER_FORMS)
    if k.ndim == 4 and len(k) != 1:
        raise ValueError(f"{_CALL}: k has {len(k)} filters (shape {k.shape}); trace shows one: pass k[0], say")
    k = k[0] if k.ndim == 4 else k
    if len(k) != len(x) or not len(k):
        raise ValueError(
            f"{_CALL}: k has {len(k)} channels (shape {k.shape}) but x has {len(x)} (shape {x.shape}); "
            "they must be as many, and at least one"
        )
    return k


def _extents(array: Array) -> Pair:
    rows, columns = array.shape[-2:]
    return rows, columns


def _planes(array: Array) -> Array:
    """``array`` as (C, rows, columns)."""
    return array.reshape(-1, *array.shape[-2:])


def _side_by_side(operands: tuple[Array, ...]) -> list[str]:
    """Patch × kernel = product, as matrices."""
    grids = [notation.grid(array) for array in operands]
    titles = ("Patch:", "Kernel:", "Product:")
    widths = [max(len(title), len(grid[0])) for title, grid in zip(titles, grids, strict=True)]
    middle = (len(grids[0]) - 1) // 2
    lines = [(" " * 5).join(map(str.ljust, titles, widths))]
    for row, cells in enumerate(zip(*grids, strict=True)):
        patch, kernel, product = map(str.ljust, cells, widths)
        times, equals = ("  ×  ", "  =  ") if row == middle else (" " * 5, " " * 5)
        lines.append(patch + times + kernel + equals + product)
    return lines


def _require_small(shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    for what, count, limit in (
        ("windows", math.prod(shape), WINDOW_LIMIT),
        ("products", math.prod((*shape, *kernel)), PRODUCT_LIMIT),
    ):
        if count > limit:
            raise ValueError(
                f"{_CALL}: {count} {what} ({notation.by(shape)} outputs of a {notation.by(kernel)} kernel) are more "
                f"than {limit}; trace is for small examples: crop x, or call conv2d for the result alone"
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
