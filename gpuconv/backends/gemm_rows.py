"""Convolution of stride 1 as one matrix product per row of the kernel, without im2col, over an array namespace.

In a padded copy of NHWC images, the taps (p, 0) … (p, KW-1) of a window are KW·C neighbours, and those of the window
one pixel on begin C elements further. So every KW-th window together are a matrix as they lie, of rows that meet, and
all windows are a batch of KW such matrices, of which each begins a pixel after the one before:

    copy     │a│b│c│d│e│f│g│h│…      each letter the C channels of a pixel
    batch 0  └──┬──┘└──┬──┘          windows abc, def, …            sums[0], sums[3], …
    batch 1     └──┬──┘└──┬──┘       windows bcd, efg, …            sums[1], sums[4], …
    batch 2        └──┬──┘└──┬──┘    windows cde, fgh, …            sums[2], sums[5], …

The products of the kernel's rows, whose windows begin at other rows of the copy, are added up in ``sums``, by BLAS,
in the type of the sums. Runs go on from row to row and from image to image: what they make between the rows of the
result is garbage, which the epilogue leaves behind. A dilated kernel has one such product per tap, of single pixels.

Where this is better than columns is estimated, by traffic, and not measured: see ``better``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpuconv import dtypes, schedule
from gpuconv.backends import gemm
from gpuconv.backends.gemm import BLAS_LIMIT, Library, Tables
from gpuconv.backends.protocol import Operands, Plan
from gpuconv.problem import Conv2dProblem

# What the estimate has to promise.
_GAIN = 1.5
# Output channels for which a product reads its windows once: a usual tile of cuBLAS.
_TILE = 128
# A call of cuBLAS, or a launch, takes Python 20 µs or so, in which the cache of an H100 moves so many bytes: half of
# 64 bytes per clock for each of 132 multiprocessors at 1.83 GHz.
_LAUNCH = int(20e-6 * 32 * 132 * 1.83e9)
# What loads and stores of whole vectors need, in bytes.
_ALIGNMENT = 16
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def serves(problem: Conv2dProblem, columns_in: str, sums_in: str) -> bool:
    """Whether ``problem`` is a forward convolution of this kind, of floating-point channels in whole vectors."""
    return (
        problem.op == "forward"
        and gemm.channels_together(problem)  # the order of the kernel's matrix
        and problem.stride == (1, 1)
        and problem.groups == 1
        and problem.KH * problem.KW > 1
        and min(problem.N, problem.OH, problem.OW) > 0
        and columns_in == problem.x_dtype
        and columns_in in _DTYPES
        and problem.C * dtypes.itemsize(columns_in) % _ALIGNMENT == 0
        and problem.O * dtypes.itemsize(sums_in) % _ALIGNMENT == 0
    )


def _taps_at_once(problem: Conv2dProblem) -> int:
    """Taps of a kernel's row that one product takes, and matrices of its batch."""
    return problem.KW if problem.dilation[1] == 1 else 1


def _padded(problem: Conv2dProblem) -> Conv2dProblem:
    """The padded copy as the im2col of a 1×1 kernel."""
    return replace(problem, KH=1, KW=1, dilation=(1, 1))


def plan(
    name: str, problem: Conv2dProblem, limit: int, columns_in: str, sums_in: str, ample: int | None, products: int
) -> Plan | None:
    """Choose the chunk, of images or of rows of one; None where ``limit`` has no room for one row.

    ``ample`` and ``products`` are those of ``gemm.plan_forward``.
    """
    C, O, element = problem.C, problem.O, dtypes.itemsize(columns_in)
    copy, taps = _padded(problem), _taps_at_once(problem)
    halo = copy.OH - problem.OH
    # The sums, and once more where they are added up by other means than the library's own.
    pixel = C * element + 2 * O * dtypes.itemsize(sums_in)
    fixed = 2 * O * problem.products * element + copy.table_bytes() + taps * C * element

    def scratch(n: int, rows: int) -> int:
        pixels = n * (rows + halo) * copy.OW
        return pixels * pixel + fixed if pixels <= BLAS_LIMIT else limit + 1

    if scratch(1, 1) > limit:
        return None
    count = problem.KH * problem.KW // taps
    if ample is not None:
        # More is asked of Python for a chunk than the two things that columns take.
        ample = max(ample, (2 + count) * products // (2 * O * problem.products) * pixel)
    goal = limit if ample is None else min(limit, scratch(1, 1) + ample)
    block = schedule.fit((problem.N, problem.OH), scratch, goal, f"{name} on {problem}")
    detail = f"{count} products with a padded copy of x, {block[0]} image(s) × {block[1]} rows at a time; no im2col"
    return Plan(problem, scratch(*block), sums_in, detail, {"rows": block, "columns_in": columns_in})


def better(columns: Plan, rows: Plan, cache: int, balance: float) -> bool:
    """Whether ``rows`` should take at most 1/1.5 of the time of ``columns``, plans of one problem.

    Time is counted in bytes between multiprocessors and their level-2 cache, in which a GPU does ``balance`` floating-
    point operations per byte; those of chunks whose scratch is larger than ``cache`` count twice, as they come from
    memory. Per output pixel, with T taps, C to O channels, elements of e bytes, sums of s, results of r, R products:

        columns   gathered and written 2·T·C·e; multiplied max(T·C·e·⌈O/128⌉ + s·O, 2·T·C·O / balance);
                  rounded (s + r)·O, where the result is not of the type of the sums
        rows      copied 2·C·e and multiplied max(T·C·e·⌈O/128⌉ + (2·R - 1)·s·O, 2·T·C·O / balance), with the garbage;
                  finished (s + r)·O

    and, of rows alone, Python's time to ask for 2 + R things per chunk, where that is longer.
    """
    problem = columns.problem
    element, sums, result = map(dtypes.itemsize, (rows.config["columns_in"], rows.sums_in, problem.y_dtype))
    C, O, taps = problem.C, problem.O, problem.KH * problem.KW
    count, copy = taps // _taps_at_once(problem), _padded(problem)
    pixels = problem.N * problem.OH * problem.OW
    read = taps * C * element * -(-O // _TILE)
    arithmetic, finish = 2 * taps * C * O / balance, (sums + result) * O

    n, g, i, j = columns.config["block"]
    slow = 2 if n * g * i * j * taps * C * element > cache else 1
    of_columns = max(slow * (read + sums * O), arithmetic) + slow * 2 * taps * C * element
    of_columns = pixels * (of_columns + (finish if result != sums else 0))

    block = rows.config["rows"]
    images, parts = -(-problem.N // block[0]), -(-problem.OH // block[1])
    made = problem.N * (problem.OH + parts * (copy.OH - problem.OH)) * copy.OW
    slow = 2 if made // (images * parts) * (C * element + O * sums) > cache else 1
    of_rows = made * (2 * C * element + max(slow * (read + (2 * count - 1) * sums * O), arithmetic)) + pixels * finish
    return bool(of_columns >= _GAIN * max(of_rows, (2 + count) * images * parts * _LAUNCH))


def run(library: Library, plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution of the library's own arrays into ``out``."""
    problem = plan.problem
    matrix = gemm.pack(library, plan, operands) if operands.packed is None else operands.packed
    bias = gemm.grouped_bias(plan, operands)
    tables = library.index_tables(_padded(problem))
    for n, i in schedule.blocks((problem.N, problem.OH), plan.config["rows"]):
        library.epilogue(problem, _sums(library, plan, tables, matrix, operands.x[n], i), bias, out[n, :, :, i])


def _sums(library: Library, plan: Plan, tables: Tables, matrix: Any, x: Any, i: slice) -> Any:
    """The sums of the rows ``i`` of some images, (n, 1, O, rows, columns)."""
    problem, xp, copy = plan.problem, library.xp, _padded(plan.problem)
    C, O, taps = problem.C, problem.O, _taps_at_once(problem)
    images, rows, pitch = x.shape[0], i.stop - i.start, copy.OW
    high = rows + copy.OH - problem.OH
    pixels = images * high * pitch
    dtype = dtypes.numpy_dtype(plan.config["columns_in"])
    # The last windows of a batch may reach past the copy, into what need not be written: they are garbage.
    storage = xp.empty((pixels + taps - 1) * C, dtype)
    padded = storage[: pixels * C].reshape((images, 1, high, pitch, C)).transpose(0, 1, 4, 2, 3)
    read = slice(i.start, i.start + high), slice(0, pitch)
    library.im2col(copy, tables, x, *read, padded[:, :, :, None, None])
    # Up to the last pixel of the result, and further to have the matrices of a batch alike.
    each = -(-(((images - 1) * high + rows - 1) * pitch + problem.OW) // taps)
    sums = xp.empty(pixels * O, dtypes.numpy_dtype(plan.sums_in))
    out = sums[: each * taps * O].reshape((each, taps, 1, O)).transpose(1, 2, 3, 0)
    steps = tuple(step * dtype.itemsize for step in (C, 0, 1, taps * C))
    for number in range(problem.KH * problem.KW // taps):
        p, q = divmod(number * taps, problem.KW)
        first = (p * problem.dilation[0] * pitch + q * problem.dilation[1]) * C
        windows = xp.lib.stride_tricks.as_strided(storage[first:], (taps, 1, taps * C, each), steps)
        of_row = matrix[:, :, number * taps * C : (number + 1) * taps * C]
        library.gemm(problem, of_row, windows, out, accumulate=number > 0)
    return sums.reshape((images, 1, high, pitch, O)).transpose(0, 1, 4, 2, 3)[..., :rows, : problem.OW]
