"""im2col + GEMM, written once over an array namespace.

    columns[c·KH·KW + p·KW + q, i·OW + j] = x[n,c, row(i,p), column(j,q)]      y[n] = K (O × C·KH·KW) @ columns

What differs between NumPy and CuPy is four primitives, passed in as ``library``:

- ``index_tables(problem)``: the index tables, in memory that im2col reads
- ``im2col(problem, tables, x, i, j, out)``: gather the windows of output rows ``i`` and columns ``j``
- ``gemm(a, b, out)``: a (g, M, K) times b (n, g, K, P) into out (n, g, M, P), or added to it, any strides
- ``epilogue(problem, sums, bias, out)``: bias, activation and the rounding into the result

Columns are made for a chunk at a time and never for the whole problem. A 1×1 convolution of stride 1 without padding
needs none: its matrix is a view of x. For NHWC the columns keep the channels fastest, as x has them, and the images of
a chunk make one product.
"""

from __future__ import annotations

from typing import Any, Protocol

from gpuconv import dtypes, schedule
from gpuconv.backends.protocol import Operands, Plan
from gpuconv.geometry import IndexTable
from gpuconv.problem import NO_PADS, Conv2dProblem

# BLAS takes its dimensions as 32-bit integers.
BLAS_LIMIT = 2**31 - 1

Tables = tuple[IndexTable, IndexTable]


class Library(Protocol):
    """An array namespace and its four primitives."""

    xp: Any

    def index_tables(self, problem: Conv2dProblem) -> Tables:
        """The index tables of rows and columns, in memory that im2col reads."""

    def im2col(self, problem: Conv2dProblem, tables: Tables, x: Any, i: slice, j: slice, out: Any) -> None:
        """Gather windows: x (n, g, C, H, W) into out (n, g, C, KH, KW, rows, columns)."""

    def gemm(self, problem: Conv2dProblem, a: Any, b: Any, out: Any, accumulate: bool = False) -> None:
        """Multiply a (g, M, K) by b (n, g, K, P) into out (n, g, M, P), or add the product to it."""

    def epilogue(self, problem: Conv2dProblem, sums: Any, bias: Any | None, out: Any) -> None:
        """Finish sums (n, g, O, rows, columns) into out of the same shape; bias is (g, O, 1, 1)."""


def is_pointwise(problem: Conv2dProblem) -> bool:
    """Whether every output reads exactly the pixel at its own position."""
    return (problem.KH, problem.KW, problem.stride, problem.padding) == (1, 1, (1, 1), NO_PADS)


def too_large(problem: Conv2dProblem, blas: str) -> list[str]:
    """Why ``blas`` cannot take the matrices of ``problem``, whatever the chunk."""
    inner = problem.O if problem.op == "input_grad" else problem.C
    if max(inner // problem.groups * problem.KH * problem.KW, problem.result_channels // problem.groups) > BLAS_LIMIT:
        return [f"a matrix dimension of 2**31 or more, which {blas} cannot take"]
    return []


def plan_forward(
    name: str,
    problem: Conv2dProblem,
    limit: int,
    columns_in: str,
    sums_in: str,
    raw_bytes: int = 0,
    patch: bool = False,
    ample: int | None = None,
    products: int = 0,
) -> Plan:
    """Choose the chunk; ``raw_bytes`` per column element, and a padded patch, are what im2col needs.

    With ``ample``, a chunk has no more scratch than that many bytes, or than ``products`` products take; and where x
    and the result are matrices as they lie, they are not cut at all.
    """
    K, C, O = problem.products, problem.C // problem.groups, problem.O // problem.groups
    element = dtypes.itemsize(columns_in)
    # Scratch for sums is needed when the result is of another dtype or its strides are none that BLAS takes, and once
    # more where a long sum is made of short ones; integer sums are converted on their way out.
    sums = 2 * dtypes.itemsize(sums_in) + (8 if dtypes.is_integer(problem.y_dtype) else 0)
    weights = 2 * problem.O * K * element  # cast, and freed of its zero point

    def scratch(n: int, g: int, rows: int, columns: int) -> int:
        if rows * columns > BLAS_LIMIT or n * g > BLAS_LIMIT:
            return limit + 1
        pixels = n * g * rows * columns * (K * (element + raw_bytes) + O * sums)
        spans = problem.table_spans(rows, columns)
        patches = 2 * n * g * spans[0] * spans[1] * C * dtypes.itemsize(problem.x_dtype) if patch else 0
        return pixels + patches + weights + problem.table_bytes()

    if ample is not None:
        ample = max(ample, -(-products // max(O * K, 1)) * K * (element + raw_bytes))
    goal = limit if ample is None else min(limit, scratch(1, 1, 1, 1) + ample)
    extents = (problem.N, problem.groups, problem.OH, problem.OW)
    block = schedule.fit(extents, scratch, goal, f"{name} on {problem}")
    pointwise = is_pointwise(problem) and columns_in == problem.x_dtype and problem.x_zero_point == 0
    detail = "1x1: GEMM on views of x" if pointwise else f"im2col of {columns_in} in chunks of {_chunk(block)}"
    config = {"block": block, "pointwise": pointwise, "columns_in": columns_in, "whole": ample is not None}
    return Plan(problem, scratch(*block), sums_in, detail, config)


def _chunk(block: tuple[int, ...]) -> str:
    n, g, rows, columns = block
    return f"{n} image(s) × {g} group(s) × {rows}×{columns} pixels"


def run_forward(library: Library, plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution of the library's own arrays into ``out``."""
    problem, xp = plan.problem, library.xp
    groups = problem.groups
    channels_last = channels_together(problem)
    sums_dtype = dtypes.numpy_dtype(plan.sums_in)
    matrix = pack(library, plan, operands) if operands.packed is None else operands.packed
    x = operands.x
    bias = grouped_bias(plan, operands)
    tables = None if plan.config["pointwise"] else library.index_tables(problem)
    in_place = plan.sums_in == problem.y_dtype
    extents = (problem.N, groups, problem.OH, problem.OW)
    whole = plan.config["whole"] and in_place and _are_matrices(plan, x, out)
    for n, g, i, j in schedule.blocks(extents, extents if whole else plan.config["block"]):
        target = out[n, g, :, i, j]
        b = _matrices(x[n, g, :, i, j]) if plan.config["pointwise"] and x.dtype.isnative else None
        if b is None:
            tables = tables or library.index_tables(problem)
            b = _columns(library, plan, tables, x[n, g], i, j, channels_last)
        c = _matrices(target) if in_place else None
        sums = target
        if c is None:
            sums = _empty_sums(xp, target.shape, sums_dtype, channels_last)
            c = _matrices(sums)
        b, c = _merged(b, c)
        library.gemm(problem, matrix[g], b, c)
        if sums is not target or bias is not None or problem.activation is not None:
            library.epilogue(problem, sums, None if bias is None else bias[g], target)


def _are_matrices(plan: Plan, x: Any, out: Any) -> bool:
    """Whether all of x and of the result can be given to BLAS as they lie, which takes no scratch."""
    N, groups, _, rows, columns = out.shape
    small = max(rows * columns, N, groups) <= BLAS_LIMIT
    found = plan.config["pointwise"] and x.dtype.isnative and small
    return found and _matrices(x) is not None and _matrices(out) is not None


def channels_together(problem: Conv2dProblem) -> bool:
    """Whether columns, and so the matrix of a kernel, keep the channels together; runs of few are not worth it."""
    return problem.layout == "NHWC" and problem.C // problem.groups >= 8


def grouped_bias(plan: Plan, operands: Operands) -> Any | None:
    """The bias as (groups, channels, 1, 1), in the dtype of the sums."""
    if operands.bias is None:
        return None
    wanted = "int64" if dtypes.is_integer(plan.problem.y_dtype) else plan.sums_in
    return operands.bias.astype(dtypes.numpy_dtype(wanted)).reshape((plan.problem.groups, -1, 1, 1))


def pack_key(plan: Plan) -> Any:
    """What the packed kernel depends on besides the kernel."""
    return plan.config["columns_in"], channels_together(plan.problem)


def pack(library: Library, plan: Plan, operands: Operands) -> Any:
    """The kernel as matrices (g, O, K), K in the order of the columns, minus its zero point."""
    problem = plan.problem
    k = operands.k.transpose(0, 1, 3, 4, 2) if channels_together(problem) else operands.k
    matrix = k.reshape((problem.groups, problem.O // problem.groups, problem.products))
    matrix = matrix.astype(dtypes.numpy_dtype(plan.config["columns_in"]), copy=False)
    if operands.k_zero_point is not None:
        matrix = matrix - operands.k_zero_point.astype(matrix.dtype).reshape((problem.groups, -1, 1))
    if problem.conjugate:
        matrix = matrix.conj()
    return matrix if has_blas_layout(matrix) else library.xp.ascontiguousarray(matrix)


def _columns(library: Library, plan: Plan, tables: Tables, x: Any, i: slice, j: slice, channels_last: bool) -> Any:
    """The windows of one chunk as matrices (n, g, K, P)."""
    problem = plan.problem
    n, g, C = x.shape[:3]
    taps, pixels = (problem.KH, problem.KW), (i.stop - i.start, j.stop - j.start)
    dtype = dtypes.numpy_dtype(plan.config["columns_in"])
    K, P = problem.products, pixels[0] * pixels[1]
    if channels_last:
        storage = library.xp.empty((g, n, *pixels, *taps, C), dtype)
        out, matrix = storage.transpose(1, 0, 6, 4, 5, 2, 3), storage.reshape((g, n, P, K)).transpose(1, 0, 3, 2)
    else:
        out = library.xp.empty((n, g, C, *taps, *pixels), dtype)
        matrix = out.reshape((n, g, K, P))
    library.im2col(problem, tables, x, i, j, out)
    if problem.x_zero_point:
        out -= problem.x_zero_point
    return matrix


def _empty_sums(xp: Any, shape: tuple[int, ...], dtype: Any, channels_last: bool) -> Any:
    """Uninitialised (n, g, O, rows, columns), in memory in the order of the result, but group by group."""
    if not channels_last:
        return xp.empty(shape, dtype)
    n, g, O, rows, columns = shape
    return xp.empty((g, n, rows, columns, O), dtype).transpose(1, 0, 4, 2, 3)


def _matrices(array: Any) -> Any | None:
    """A view of (n, g, C, rows, columns) as (n, g, C, pixels) that BLAS can take, or None where there is none."""
    rows, columns = array.shape[3:]
    row_step, column_step = array.strides[3:]
    if columns == 1:
        flat = array[..., 0]
    elif rows == 1:
        flat = array[..., 0, :]
    elif row_step == columns * column_step:
        flat = array.reshape((*array.shape[:3], rows * columns))
    else:
        return None
    return flat if has_blas_layout(flat) else None


def _merged(b: Any, c: Any) -> tuple[Any, Any]:
    """The matrices of all images as one, where both allow it."""
    wide_b, wide_c = _merge_images(b), _merge_images(c)
    return (b, c) if wide_b is None or wide_c is None else (wide_b, wide_c)


def _merge_images(matrices: Any) -> Any | None:
    """A view of (n, g, C, P) as (1, g, C, n·P), which NHWC allows: one GEMM for the whole batch."""
    n, g, C, P = matrices.shape
    if n == 1 or matrices.strides[0] != P * matrices.strides[3] or n * P > BLAS_LIMIT:
        return None
    merged = matrices.transpose(1, 2, 0, 3).reshape((g, C, n * P))[None]
    return merged if has_blas_layout(merged) else None


def blas_layout(shape: tuple[int, int], strides: tuple[int, int]) -> tuple[bool, int] | None:
    """How BLAS sees a matrix with ``strides`` in elements: (row major?, leading dimension), or None if it cannot.

    An axis of one element has no stride of its own. A leading dimension is at least the contiguous extent.
    """
    rows, columns = shape
    row_step, column_step = strides
    if columns == 1 or column_step == 1:
        step = columns if rows == 1 else row_step
        if columns <= step <= BLAS_LIMIT:
            return True, step
    if rows == 1 or row_step == 1:
        step = rows if columns == 1 else column_step
        if rows <= step <= BLAS_LIMIT:
            return False, step
    return None


def has_blas_layout(matrices: Any) -> bool:
    """Whether BLAS can take the matrices of a stack as they lie: whole elements, no steps backwards."""
    if any(step % matrices.itemsize or step < 0 for step in matrices.strides):
        return False
    steps = [step // matrices.itemsize for step in matrices.strides]
    return blas_layout(matrices.shape[-2:], (steps[-2], steps[-1])) is not None


def plain_epilogue(xp: Any, problem: Conv2dProblem, sums: Any, bias: Any | None, out: Any) -> None:
    """The epilogue in plain array operations: convert integers, add the bias, rectify, round into ``out``."""
    if dtypes.is_integer(problem.y_dtype):
        sums = sums.astype(xp.int64)
    if bias is not None:
        xp.add(sums, bias, out=sums)
    if problem.activation == "relu":
        xp.maximum(sums, 0, out=sums)
    if sums is not out:
        out[...] = sums
