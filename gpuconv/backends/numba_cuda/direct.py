"""The direct convolution on a GPU: serves every valid problem, with no scratch but the index tables.

The kernel is in ``direct_kernel``; here are its tile shapes, the choice among them, and its launch.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import launch
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.direct"
DEVICE = "cuda"
ARRAYS = "any"

unavailable = launch.unavailable


@dataclass(frozen=True)
class Tile:
    """Shape of a block: each of ``threads_o × threads_p`` threads sums ``rows × columns`` elements."""

    threads_o: int
    threads_p: int
    rows: int
    columns: int
    depth: int

    @property
    def outputs(self) -> int:
        """Output channels of the tile."""
        return self.threads_o * self.rows

    @property
    def pixels(self) -> int:
        """Output pixels of the tile."""
        return self.threads_p * self.columns

    @property
    def threads(self) -> int:
        """Threads of the block; a multiple of ``pixels`` and of ``depth``, as the loads need."""
        return self.threads_o * self.threads_p

    def __str__(self) -> str:
        return f"{self.outputs} outputs × {self.pixels} pixels × {self.depth} deep"


# Widest first. A thread's sums stay below 16 8-byte or 8 16-byte values so that they fit in registers.
WIDE = Tile(threads_o=16, threads_p=16, rows=4, columns=4, depth=8)
WIDE_COMPLEX128 = Tile(threads_o=16, threads_p=16, rows=2, columns=4, depth=8)
FEW_OUTPUTS = Tile(threads_o=2, threads_p=64, rows=4, columns=2, depth=8)
ONE_OUTPUT = Tile(threads_o=1, threads_p=128, rows=1, columns=1, depth=8)
SMALL = Tile(threads_o=8, threads_p=4, rows=1, columns=2, depth=4)
TILES = (WIDE, FEW_OUTPUTS, ONE_OUTPUT, SMALL)


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Nothing: every valid problem is served."""
    return []


def choose_tile(problem: Conv2dProblem) -> Tile:
    """The tile that pads the problem least, by its output channels per group and its pixels.

    Not measured on a GPU yet: a rule of thumb, in one place.
    """
    outputs = problem.O // problem.groups
    pixels = problem.N * problem.OH * problem.OW
    if outputs == 1 and pixels >= ONE_OUTPUT.pixels:
        return ONE_OUTPUT
    if pixels < 64:
        return SMALL
    if outputs <= FEW_OUTPUTS.outputs:
        return FEW_OUTPUTS
    return WIDE_COMPLEX128 if problem.sum_dtype == "complex128" else WIDE


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the tile; the only scratch are the index tables, and the bias and zero points as the kernel reads them."""
    tile = choose_tile(problem)
    bias = problem.O * dtypes.itemsize(problem.sum_dtype)
    scratch = problem.table_bytes() + 2 * bias
    if scratch > limit:
        raise MemoryError(f"{NAME} on {problem} needs {scratch} bytes of scratch and workspace_limit is {limit}")
    return Plan(problem, scratch, problem.sum_dtype, f"tile {tile}", {"tile": tile})


@lru_cache(maxsize=64)
def kernel(tile: Tile, x_dtype: str, k_dtype: str, y_dtype: str, zero_points: bool) -> Any:
    """The compiled-on-demand kernel of one specialisation."""
    from numba import cuda

    from gpuconv.backends.numba_cuda import direct_kernel

    return cuda.jit(direct_kernel.build(tile, x_dtype, k_dtype, y_dtype, zero_points))


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Launch the kernel on NumPy operands (uploaded and downloaded here) or on CuPy ones, on the given stream."""
    problem: Conv2dProblem = plan.problem
    tile: Tile = plan.config["tile"]
    sum_dtype = dtypes.numpy_dtype(problem.sum_dtype)
    zero_points = bool(problem.x_zero_point) or problem.k_zero_point
    function = kernel(tile, problem.x_dtype, problem.k_dtype, problem.y_dtype, zero_points)

    rows, columns = problem.tables()
    like = operands.x
    tiles = -(-(problem.N * problem.OH * problem.OW) // tile.pixels)
    tiles *= -(-(problem.O // problem.groups) // tile.outputs) * problem.groups
    # A padded pixel that equals the zero point contributes nothing.
    padding = 0 if zero_points else problem.fill
    with ExitStack() as stack:
        stack.enter_context(launch.on_gpu(operands.ordinal))
        stream = launch.stream(operands.stream, like)
        y = stack.enter_context(launch.output(out, stream))

        def vector(values: Any, dtype: Any, size: int = 1) -> Any:
            return launch.vector(like, values, dtype, size, stream)

        # Held until the stack unwinds: what was uploaded must outlive the kernel.
        arguments = (
            *launch.flat(operands.x, stream).arguments(),
            *launch.flat(operands.k, stream).arguments(),
            vector(operands.bias, sum_dtype),
            operands.bias is not None,
            problem.activation == "relu",
            *y.arguments(),
            vector(rows.index, np.dtype(np.int64)),
            rows.outer,
            rows.inner,
            vector(columns.index, np.dtype(np.int64)),
            columns.outer,
            columns.inner,
            problem.N,
            problem.C // problem.groups,
            problem.O // problem.groups,
            problem.KH,
            problem.KW,
            problem.OH,
            problem.OW,
            problem.groups,
            sum_dtype.type(padding),
            sum_dtype.type(problem.x_zero_point),
            vector(operands.k_zero_point, sum_dtype, problem.O),
        )
        function[min(tiles, launch.MAX_GRID_X), tile.threads, stream](*arguments)
