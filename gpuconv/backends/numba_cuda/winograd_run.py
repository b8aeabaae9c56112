"""The launches of ``numba_cuda.winograd``: which specialisation reads and writes what, and its arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.backends.numba_cuda import depthwise_shape, launch, uploads, winograd_kernels, winograd_multiply
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.backends.numba_cuda.replay import Step
from gpuconv.backends.numba_cuda.tiles import Tile
from gpuconv.backends.numba_cuda.winograd import TILE, Launch
from gpuconv.problem import Conv2dProblem

# The kernel's types of what it is handed.
_narrow, _wide = np.int32, np.int64
_float: Any = np.dtype("float32")


@lru_cache(maxsize=1)
def weights_kernel() -> Any:
    """The compiled-on-demand kernel that transforms weights."""
    return launch.jit(winograd_kernels.build_weights())


@lru_cache(maxsize=4)
def image_kernel(reader: str, channels_last: bool) -> Any:
    """That of the image."""
    return launch.jit(winograd_kernels.build_image(reader, channels_last))


@lru_cache(maxsize=4)
def result_kernel(channels_last: bool, vectors: bool) -> Any:
    """That of the result."""
    return launch.jit(winograd_kernels.build_result(channels_last, vectors))


@lru_cache(maxsize=8)
def multiply_kernel(tile: Tile) -> Any:
    """That of the matrix products."""
    return launch.jit(winograd_multiply.build(tile), tile.registers)


def steps(cut: Launch, x: Flat, k: Any, y: Flat, bias: Any, has_bias: bool, like: Any, stream: Any) -> list[Step]:
    """The launches that make y of x and k, a Flat or its transform."""
    made: list[Step] = []
    U = launch.scratch(like, _float, cut.weights_size) if isinstance(k, Flat) else k
    V, M = (launch.scratch(like, _float, size) for size in (cut.image_size, cut.parts * cut.part_size))
    reads = _reads(cut.problem, like, stream)
    for block, group, output in cut.blocks():
        of_x, of_y = x.start(1, group), y.start(1, group).start(2, output)
        of_bias = bias[group * cut.problem.O // cut.problem.groups + output :] if has_bias and not cut.whole else bias
        if isinstance(k, Flat):
            made.append(_weights(block, k.start(0, group).start(1, output), U))
        for first in range(0, cut.tiles, cut.chunk):
            count = min(cut.chunk, cut.tiles - first)
            if output == 0 or cut.chunk < cut.tiles:  # else it is there
                made.append(_image(block, of_x, V, first, count, reads))
            made += [
                _multiply(block, U, V, M, count),
                _result(block, M, of_y, of_bias, has_bias, first, count),
            ]
    return made


def transformed(cut: Launch, k: Flat, like: Any, stream: Any) -> Any:
    """The transformed weights."""
    U = launch.scratch(like, _float, cut.weights_size)
    _weights(cut, k, U).run(stream)
    return U


def _blocks(cut: Launch, across: int, channels: int) -> int:
    """Blocks of a kernel that transforms, so many tiles or weights of so many channels."""
    return -(-across // winograd_kernels.SIDE) * -(-channels // winograd_kernels.CHANNELS) * cut.groups


def _weights(cut: Launch, k: Flat, U: Any) -> Step:
    sizes = cut.pitch, cut.inputs, cut.outputs, cut.groups
    arguments = (*k.wide(), U, *map(_wide, sizes))
    return Step(weights_kernel(), _blocks(cut, cut.outputs, cut.inputs), winograd_kernels.threads(), arguments)


def _image(cut: Launch, x: Flat, V: Any, first: int, count: int, reads: tuple[Any, ...]) -> Step:
    problem = cut.problem
    reader = "inside" if depthwise_shape.arithmetic(problem) else "tabled"
    sizes = first, count, cut.inputs, cut.groups, problem.H, problem.W, problem.OH, problem.OW
    arguments = (*x.wide(), V, _wide(cut.chunk), *map(_narrow, sizes), *reads, _float.type(problem.fill))
    function = image_kernel(reader, _channels_last(x))
    return Step(function, _blocks(cut, count, cut.inputs), winograd_kernels.threads(), arguments)


def _multiply(cut: Launch, U: Any, V: Any, M: Any, count: int) -> Step:
    tile = cut.tile
    sizes = cut.inputs, cut.outputs, count, cut.products, cut.slices, cut.part_slices
    arguments = (U, _narrow(cut.pitch), V, _narrow(cut.chunk), M, *map(_narrow, sizes))
    grid = -(-cut.outputs // tile.outputs) * -(-count // tile.pixels) * cut.products * cut.parts
    return Step(multiply_kernel(tile), grid, tile.threads, arguments)


def _result(cut: Launch, M: Any, y: Flat, bias: Any, has_bias: bool, first: int, count: int) -> Step:
    problem = cut.problem
    last = _channels_last(y)
    function = result_kernel(last, not last and in_vectors(problem, y))
    arguments = (
        M, _wide(cut.chunk), _narrow(cut.parts), _wide(cut.part_size), _narrow(first), _narrow(count),
        bias, has_bias, problem.activation == "relu", *y.wide(),
        *map(_narrow, (cut.outputs, cut.groups, problem.OH, problem.OW)),
    )  # fmt: skip
    return Step(function, _blocks(cut, count, cut.outputs), winograd_kernels.threads(), arguments)


def _channels_last(flat: Flat) -> bool:
    """Whether channels are nearer to each other in memory than columns."""
    return 0 < abs(flat.strides[2]) < abs(flat.strides[4])


def in_vectors(problem: Conv2dProblem, y: Flat) -> bool:
    """Whether rows of tiles may be written 16 bytes at a time: rows are contiguous, and all else is whole vectors."""
    return y.strides[4] == 1 and problem.OW % TILE == 0 and y.in_vectors("float32", y.strides[:4])


def _reads(problem: Conv2dProblem, like: Any, stream: Any) -> tuple[Any, ...]:
    """The table of rows and then columns, or a number where none is read; and of each axis its first and last entry."""
    if depthwise_shape.arithmetic(problem):
        (top, _), (left, _) = problem.padding
        return (_narrow(0), *map(_narrow, (-top, 0, -left, 0)))
    rows, columns = problem.OH + 2, problem.OW + 2
    tables = uploads.joined_tables(problem, like, stream)
    return (tables, *map(_narrow, (0, rows - 1, rows, rows + columns - 1)))
