"""The direct convolution on a GPU: serves every valid problem, with no scratch but the index tables.

The kernel is in ``direct_kernel``; here are its tile shapes, the choice among them, and its launch.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from gpuconv import dtypes, schedule
from gpuconv.backends import phases
from gpuconv.backends.numba_cuda import launch, uploads
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import NO_PADS, Conv2dProblem

NAME = "numba_cuda.direct"
DEVICE = "cuda"
ARRAYS = "any"
OPS = frozenset(("forward", "input_grad", "weight_grad"))

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
    """Choose the tiles; the only scratch are index tables, and the bias and zero points as the kernel reads them."""
    lowered = parts(problem)
    tiles = tuple(choose_tile(part.problem) for part in lowered)
    scratch = sum(part.problem.table_bytes() for part in lowered)
    scratch += 2 * problem.result_channels * dtypes.itemsize(problem.sum_dtype)
    if scratch > limit:
        raise schedule.shortage(f"{NAME} on {problem}", scratch, limit)
    detail = f"tile {tiles[0]}, a rule of thumb, not measured" if tiles else "nothing to compute"
    detail += f", {len(tiles)} launches" if len(tiles) > 1 else ""
    return Plan(problem, scratch, problem.sum_dtype, detail, {"parts": lowered, "tiles": tiles})


@dataclass(frozen=True)
class Part:
    """One launch: a forward convolution, and how its operands are views of the problem's."""

    problem: Conv2dProblem
    conjugate: str | None = None  # "x" or "k", as the kernel calls them
    phase: phases.Phase | None = None  # of an input gradient


def parts(problem: Conv2dProblem) -> tuple[Part, ...]:
    """The launches that ``problem`` takes.

    A weight gradient is one forward convolution in which images and channels have changed places: the channels of x
    are its images, the images of x its channels, dy its kernel, and stride and dilation each other:

        dk[o,c,p,q] = Σ_nij x[n,c, p·d + i·s - pad, q·d + j·s - pad] · dy[n,o,i,j]
    """
    if problem.op == "forward":
        return (Part(problem),)
    if problem.op == "weight_grad":
        pads = tuple(
            (low, (k - 1) * d + (outputs - 1) * s + 1 - n - low)
            for (low, _), n, k, outputs, s, d in zip(
                problem.padding, (problem.H, problem.W), (problem.KH, problem.KW), (problem.OH, problem.OW),
                problem.stride, problem.dilation, strict=True,
            )
        )  # fmt: skip
        swapped = replace(
            problem, op="forward", N=problem.C // problem.groups, C=problem.N * problem.groups, KH=problem.OH,
            KW=problem.OW, stride=problem.dilation, dilation=problem.stride, padding=(pads[0], pads[1]),
        )  # fmt: skip
        return (Part(swapped, "x" if problem.conjugate else None),)
    found = phases.phases(problem)
    launches = tuple(Part(phase.problem, "k" if problem.conjugate else None, phase) for phase in found)
    if phases.complete(problem, found):
        return launches
    # First the bias everywhere, as a convolution of no channels: some elements are in no phase.
    bias = replace(problem, op="forward", C=0, O=problem.C, KH=1, KW=1, stride=(1, 1), padding=NO_PADS, dilation=(1, 1))
    return (Part(bias), *launches)


def counts(problem: Conv2dProblem, lowered: tuple[Part, ...]) -> tuple[tuple[str, int], ...]:
    """What kernels of matrix products count, of which a kernel with 32 bits for it has a limit."""
    entries = max((part.problem.table_bytes() // 8 for part in lowered), default=0)
    channels = max((part.problem.O for part in lowered), default=0)
    return ("products per output", problem.products), ("table entries", entries), ("output channels", channels)


def blocks(problem: Conv2dProblem, tile: Any, images: int = 1) -> int:
    """Tiles of the shape ``tile`` that make up so many images of a forward ``problem``'s result."""
    tiles_p: int = -(-images * problem.OH * problem.OW // tile.pixels)
    tiles_o: int = -(-(problem.O // problem.groups) // tile.outputs)
    return tiles_p * tiles_o * problem.groups


@lru_cache(maxsize=64)
def kernel(
    tile: Tile, x_dtype: str, k_dtype: str, y_dtype: str, zero_points: bool, conjugate: str | None = None
) -> Any:
    """The compiled-on-demand kernel of one specialisation."""
    from gpuconv.backends.numba_cuda import direct_kernel

    return launch.jit(direct_kernel.build(tile, x_dtype, k_dtype, y_dtype, zero_points, conjugate))


def pack_key(plan: Plan) -> None:
    """Nothing: the kernel is read as it is."""


def pack(plan: Plan, operands: Operands) -> Any:
    """The kernel in device memory."""
    with launch.on_gpu(operands.ordinal):
        stream = launch.stream(operands.stream, operands.x)
        flat = launch.flat(operands.k, stream)
        launch.packed_on(stream, operands.x)
        return flat


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Launch the kernel on NumPy operands (uploaded and downloaded here) or on CuPy ones, on the given stream."""
    problem = plan.problem
    sum_dtype = dtypes.numpy_dtype(problem.sum_dtype)
    like = operands.x
    with ExitStack() as stack:
        stack.enter_context(launch.on_gpu(operands.ordinal))
        stream = launch.stream(operands.stream, like)
        y = stack.enter_context(launch.output(out, stream))

        def vector(values: Any, dtype: Any, size: int = 1) -> Any:
            return uploads.vector(like, values, dtype, size, stream)

        x = launch.flat(operands.x, stream)
        k = launch.flat(operands.k, stream) if operands.packed is None else operands.packed
        bias = vector(operands.bias, sum_dtype)
        zeros = vector(operands.k_zero_point, sum_dtype, problem.O)
        held = []  # until the stack unwinds: what was uploaded must outlive the kernels
        for part, tile in zip(plan.config["parts"], plan.config["tiles"], strict=True):
            tables = uploads.index_tables(part.problem, like, stream)
            held.append(tables)
            _launch(part, tile, stream, views(problem, part, x, k, y), bias, operands.bias is not None, tables, zeros)


def views(problem: Conv2dProblem, part: Part, x: Flat, k: Flat, y: Flat) -> tuple[Flat, Flat, Flat]:
    """The operands of ``problem`` as the launch ``part`` sees them."""
    if problem.op == "weight_grad":
        return x.transpose(2, 1, 0, 3, 4), k.transpose(1, 2, 0, 3, 4), y.transpose(2, 0, 1, 3, 4)
    if problem.op == "input_grad":
        k = k.transpose(0, 2, 1, 3, 4)
    if part.phase is None:
        return x, k, y
    rows, columns = part.phase.rows, part.phase.columns
    return x, k.stepped(rows.taps, columns.taps), y.stepped(rows.outputs, columns.outputs)


def _launch(
    part: Part,
    tile: Tile,
    stream: Any,
    flats: tuple[Flat, Flat, Flat],
    bias: Any,
    has_bias: bool,
    tables: list[Any],
    zeros: Any,
) -> None:
    problem = part.problem
    x, k, y = flats
    zero_points = bool(problem.x_zero_point) or problem.k_zero_point
    sum_dtype = dtypes.numpy_dtype(problem.sum_dtype)
    function = kernel(tile, problem.x_dtype, problem.k_dtype, problem.y_dtype, zero_points, part.conjugate)
    function[min(blocks(problem, tile, problem.N), launch.MAX_GRID_X), tile.threads, stream](
        *x.arguments(),
        *k.arguments(),
        bias,
        has_bias,
        problem.activation == "relu",
        *y.arguments(),
        *tables,
        problem.N,
        problem.C // problem.groups,
        problem.O // problem.groups,
        problem.KH,
        problem.KW,
        problem.OH,
        problem.OW,
        problem.groups,
        # A padded pixel that equals the zero point contributes nothing.
        sum_dtype.type(0 if zero_points else problem.fill),
        sum_dtype.type(problem.x_zero_point),
        zeros,
    )
