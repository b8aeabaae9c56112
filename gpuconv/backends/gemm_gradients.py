"""im2col + GEMM for the gradients, written once over an array namespace; ``plan`` and ``run`` serve every op.

The input gradient is cut into forward convolutions by ``phases``. The gradient of the kernel is a product of its own:

    columns[c·KH·KW + p·KW + q, n·OH·OW + i·OW + j] = x[n,c, row(i,p), column(j,q)]
    dK (O × C·KH·KW) = dY (O × N·OH·OW) @ columnsᵀ

The columns are those of the forward convolution, with the images of a chunk side by side, so that one product sums over
images and pixels together; the products of chunks are added up in float64 for float32, and rounded once at the end.
"""

from __future__ import annotations

from typing import Any

from gpuconv import dtypes, schedule
from gpuconv.backends import gemm_rows, phases
from gpuconv.backends.gemm import Library, plan_forward, run_forward
from gpuconv.backends.protocol import Operands, Plan
from gpuconv.problem import Conv2dProblem


def plan(
    name: str,
    problem: Conv2dProblem,
    limit: int,
    columns_in: str,
    sums_in: str,
    raw_bytes: int,
    patch: bool,
    longest_sum: int,
    ample: int | None = None,
    products: int = 0,
    balance: float | None = None,
) -> Plan:
    """Choose the chunks; ``raw_bytes`` per column element, and a padded patch, are what im2col needs. A product of a
    weight gradient sums over at most ``longest_sum`` pixels. With ``ample``, a chunk has no more scratch than that many
    bytes, or than ``products`` products take. With ``balance``, as ``gemm_rows`` has it, a forward convolution is one
    product per row of the kernel where that should be better.
    """

    def forward(part: Conv2dProblem) -> Plan:
        columns = plan_forward(name, part, limit, columns_in, sums_in, raw_bytes, patch, ample, products)
        if ample is None or balance is None or not gemm_rows.serves(part, columns_in, sums_in):
            return columns
        rows = gemm_rows.plan(name, part, limit, columns_in, sums_in, ample, products)
        return rows if rows is not None and gemm_rows.better(columns, rows, ample, balance) else columns

    if problem.op == "input_grad":
        return phases.plan(forward, problem)
    if problem.op == "weight_grad":
        return plan_weight_grad(
            name, problem, limit, columns_in, sums_in, raw_bytes, patch, longest_sum, ample, products
        )
    return forward(problem)


def run(library: Library, plan: Plan, operands: Operands, out: Any) -> None:
    """Write the result of the library's own arrays into ``out``."""

    def forward(part: Plan, given: Operands, result: Any) -> None:
        (gemm_rows.run if "rows" in part.config else run_forward)(library, part, given, result)

    if plan.problem.op == "input_grad":
        phases.run(forward, plan, operands, out)
    elif plan.problem.op == "weight_grad":
        run_weight_grad(library, plan, operands, out)
    else:
        forward(plan, operands, out)


# What the products of chunks are added up in.
_TOTALS = {"float32": "float64", "complex64": "complex128"}


def plan_weight_grad(
    name: str,
    problem: Conv2dProblem,
    limit: int,
    columns_in: str,
    sums_in: str,
    raw_bytes: int,
    patch: bool,
    longest_sum: int,
    ample: int | None,
    products: int,
) -> Plan:
    """Choose the chunk, as ``plan`` says."""
    C, O = problem.C // problem.groups, problem.O // problem.groups
    K = C * problem.KH * problem.KW
    element = dtypes.itemsize(columns_in)
    total = dtypes.itemsize(_TOTALS.get(sums_in, sums_in))

    def scratch(n: int, rows: int, columns: int, g: int) -> int:
        if n * rows * columns > longest_sum:
            return limit + 1
        # columns, and dy as a matrix
        chunk = n * g * rows * columns * (K * (element + raw_bytes) + 2 * O * element)
        spans = problem.table_spans(rows, columns)
        patches = 2 * n * g * spans[0] * spans[1] * C * dtypes.itemsize(problem.x_dtype) if patch else 0
        # the running total, a chunk's product, one more where a long sum is made of short ones, and integers on their
        # way out
        sums = g * O * K * (total + 2 * dtypes.itemsize(sums_in) + (8 if dtypes.is_integer(problem.y_dtype) else 0))
        return chunk + patches + sums + problem.table_bytes()

    if ample is not None:
        ample = max(ample, -(-products // max(O * K, 1)) * (K * (element + raw_bytes) + 2 * O * element))
    goal = limit if ample is None else min(limit, scratch(1, 1, 1, 1) + ample)
    extents = (problem.N, problem.OH, problem.OW, problem.groups)
    block = schedule.fit(extents, scratch, goal, f"{name} on {problem}")
    n, rows, columns, g = block
    detail = f"im2col of {columns_in} in chunks of {n} image(s) × {g} group(s) × {rows}×{columns} pixels, times dy"
    return Plan(problem, scratch(*block), sums_in, detail, {"block": block, "columns_in": columns_in})


def run_weight_grad(library: Library, plan: Plan, operands: Operands, out: Any) -> None:
    """Write the weight gradient of the library's own arrays into ``out``, (G, O/G, I, KH, KW)."""
    problem, xp = plan.problem, library.xp
    x, dy = operands.x, operands.k
    tables = library.index_tables(problem)
    sums_dtype = dtypes.numpy_dtype(plan.sums_in)
    total_dtype = dtypes.numpy_dtype(_TOTALS.get(plan.sums_in, plan.sums_in))
    K = problem.C // problem.groups * problem.KH * problem.KW
    images, rows, columns, groups = plan.config["block"]
    for (g,) in schedule.blocks((problem.groups,), (groups,)):
        shape = (1, g.stop - g.start, problem.O // problem.groups, K)
        total, product = xp.zeros(shape, total_dtype), xp.empty(shape, sums_dtype)
        for n, i, j in schedule.blocks((problem.N, problem.OH, problem.OW), (images, rows, columns)):
            a = _gradients(library, plan, dy[n, g, :, i, j])
            b = _columns(library, plan, tables, x[n, g], i, j)
            library.gemm(problem, a, b, product)
            total += product
            del a, b  # before the next chunk's are made
        target = out[g][None]
        library.epilogue(problem, total.reshape(target.shape), None, target)


def _gradients(library: Library, plan: Plan, dy: Any) -> Any:
    """dy (n, g, O, rows, columns) as matrices (g, O, pixels of all images)."""
    n, g, O, rows, columns = dy.shape
    dense = library.xp.empty((g, O, n, rows, columns), dtypes.numpy_dtype(plan.config["columns_in"]))
    dense[...] = dy.transpose(1, 2, 0, 3, 4)
    return dense.reshape((g, O, n * rows * columns))


def _columns(library: Library, plan: Plan, tables: Any, x: Any, i: slice, j: slice) -> Any:
    """The windows of one chunk as matrices (1, g, pixels of all images, K)."""
    problem = plan.problem
    n, g, C = x.shape[:3]
    rows, columns = i.stop - i.start, j.stop - j.start
    dtype = dtypes.numpy_dtype(plan.config["columns_in"])
    storage = library.xp.empty((g, C, problem.KH, problem.KW, n, rows, columns), dtype)
    library.im2col(problem, tables, x, i, j, storage.transpose(4, 0, 1, 2, 3, 5, 6))
    if problem.conjugate:
        library.xp.conjugate(storage, out=storage)
    return storage.reshape((g, C * problem.KH * problem.KW, n * rows * columns)).swapaxes(1, 2)[None]
