"""The launches of ``numba_cuda.implicit_gemm``: which specialisation reads and writes what, and its arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import gathers, implicit_gemm_kernel, launch, panels, partials, ptx, uploads
from gpuconv.backends.numba_cuda.implicit_gemm import Launch
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.backends.numba_cuda.replay import Step
from gpuconv.backends.numba_cuda.tiles import Tile
from gpuconv.problem import Conv2dProblem

# Of the kernels that pack and add, whose threads each take several elements, a stride of the grid apart.
THREADS, ELEMENTS = 128, 4

# The kernel's types of what it is handed.
_narrow, _wide = np.int32, np.int64


@lru_cache(maxsize=128)
def kernel(tile: Tile, dtype: str, gather: str, scatter: str) -> Any:
    """The compiled-on-demand kernel of one specialisation."""
    return launch.jit(implicit_gemm_kernel.build(tile, dtype, gather, scatter), tile.registers)


@lru_cache(maxsize=32)
def packer(
    dtype: str, outputs: int, depth: int, by_tap: bool, along_slots: bool = False, together: bool = False
) -> Any:
    """The kernel that packs weights."""
    return launch.jit(panels.build(dtype, outputs, depth, by_tap, along_slots, together))


@lru_cache(maxsize=8)
def adder(dtype: str, y_dtype: str) -> Any:
    """The kernel that adds up parts."""
    return launch.jit(partials.build(dtype, y_dtype))


def steps(cut: Launch, x: Flat, k: Any, y: Flat, bias: Any, has_bias: bool, like: Any, stream: Any) -> list[Step]:
    """The launches that make y of x and k, a Flat or its panels."""
    problem = cut.part.problem
    dtype = dtypes.numpy_dtype(problem.sum_dtype)
    weights = launch.scratch(like, dtype, cut.parts_packed * cut.panel_size) if isinstance(k, Flat) else k
    partial = launch.scratch(like, dtype, cut.partial_size(cut.images)) if cut.parts > 1 else None
    indices = tables(problem, x, like, stream)
    made: list[Step] = []
    # Both loops go round once where the scratch has room for all images and parts.
    for image in range(0, problem.N, cut.images):
        images = min(cut.images, problem.N - image)
        of_x, of_y = x.start(0, image), y.start(0, image)
        for part in range(0, cut.parts, cut.parts_packed):
            parts = min(cut.parts_packed, cut.parts - part)
            if isinstance(k, Flat) and (image == 0 or parts < cut.parts):
                made += _pack(cut, k, weights, part, parts)
            if partial is None:
                scatter = scatter_of(cut, of_y)
                made.append(_multiply(cut, of_x, weights, of_y, scatter, bias, has_bias, indices, images, part, parts))
            else:
                # Planes of whole vectors: what the last one holds beyond the pixels is never read.
                left = left_of(problem, partial, part, cut.plane(images))
                way = "along_pixels"
                made.append(_multiply(cut, of_x, weights, left, way, bias, False, indices, images, part, parts))
        if partial is not None:
            made.append(add(problem, partial, cut.parts, cut.plane(images), of_y, bias, has_bias, images))
    return made


def packed(cut: Launch, k: Flat, like: Any, stream: Any) -> Any:
    """The panels of all parts."""
    dtype = dtypes.numpy_dtype(cut.part.problem.sum_dtype)
    weights = launch.scratch(like, dtype, cut.parts * cut.panel_size)
    for step in _pack(cut, k, weights, 0, cut.parts):
        step.run(stream)
    return weights


def left_of(problem: Conv2dProblem, partial: Any, part: int, plane: int) -> Flat:
    """What the parts from ``part`` on leave, seen as y: (parts, groups, O, plane), all images in one plane."""
    strides = (problem.OH * problem.OW, problem.O // problem.groups * plane, plane, problem.OW, 1)
    return Flat(partial, part * problem.O * plane, strides)


def tables(problem: Conv2dProblem, x: Flat, like: Any, stream: Any) -> list[Any]:
    """The rows and columns that the windows read, as offsets in x: for each axis a vector and its two steps."""
    found: list[Any] = []
    for axis, stride in enumerate(x.strides[3:]):
        vector = uploads.KEPT.get(like, stream, _offsets, uploads.axis_key(problem, axis), stride)
        found += [vector, *map(_narrow, uploads.steps(problem, axis))]
    return found


def _offsets(key: tuple[Any, ...], stride: int) -> np.ndarray[Any, Any]:
    """The index table of ``uploads.axis_key`` as offsets of elements."""
    indices = uploads.index(key)
    return np.where(indices >= 0, indices * stride, gathers.OUTSIDE)


def gather_of(cut: Launch, x: Flat) -> str:
    """How the kernel reads x: in vectors where channels are contiguous, and everything else is whole vectors."""
    if not cut.by_tap:
        return "mixed"
    problem = cut.part.problem
    others = (*x.strides[:2], problem.C // problem.groups, *x.strides[3:])
    whole = x.strides[2] == 1 and x.in_vectors(problem.sum_dtype, others)
    return "along_channels" if whole else "across_pixels"


def scatter_of(cut: Launch, y: Flat) -> str:
    """How the kernel writes y: in vectors where pixels or channels are contiguous, and all else is whole vectors."""
    problem = cut.part.problem
    n, group, o, row, column = y.strides
    plane, outputs = problem.OH * problem.OW, problem.O // problem.groups
    whole = plane % (ptx.VECTOR_BYTES // dtypes.itemsize(problem.sum_dtype)) == 0
    if column == 1 and row == problem.OW and whole and y.in_vectors(problem.sum_dtype, (n, group, o)):
        return "along_pixels"
    if o == 1 and y.in_vectors(problem.sum_dtype, (n, group, outputs, row, column)):
        return "along_outputs"
    return "one_by_one"


def _pack(cut: Launch, k: Flat, weights: Any, part: int, parts: int) -> list[Step]:
    """The launch that makes panels of ``parts`` parts from ``part`` on, in ``weights``; none of a sum of nothing."""
    problem, tile = cut.part.problem, cut.tile
    slots = cut.part_slices * tile.depth
    if cut.panel_size == 0:
        return []
    function = packer(problem.sum_dtype, tile.outputs, tile.depth, cut.by_tap)
    sizes = (problem.C // problem.groups, problem.O // problem.groups, problem.KH, problem.KW, problem.groups)
    arguments = (*k.arguments(), weights, part * slots, parts * slots, *sizes, 1, 0)
    return [Step(function, blocks(parts * cut.panel_size), THREADS, arguments)]


def _multiply(
    cut: Launch,
    x: Flat,
    weights: Any,
    y: Flat,
    scatter: str,
    bias: Any,
    has_bias: bool,
    tables: list[Any],
    images: int,
    part: int,
    parts: int,
) -> Step:
    """The sums of ``parts`` parts from ``part`` on, into y."""
    problem, tile = cut.part.problem, cut.tile
    grid = cut.blocks(images, parts)
    function = kernel(tile, problem.sum_dtype, gather_of(cut, x), scatter)
    n, group, channel, _, _ = x.strides
    arguments = (
        x.vector,
        *map(_wide, (x.offset, n, group, channel)),
        *tables,
        weights,
        bias,
        has_bias,
        cut.parts == 1 and problem.activation == "relu",
        y.vector,
        *map(_wide, (y.offset, problem.O * cut.plane(images), *y.strides)),
        _wide(images),
        *map(_narrow, (problem.C // problem.groups, problem.O // problem.groups, problem.KH, problem.KW)),
        *map(_wide, (problem.OH, problem.OW)),
        _narrow(problem.groups),
        dtypes.numpy_dtype(problem.sum_dtype).type(problem.fill),
        *map(_narrow, (cut.slices, part, parts, cut.part_slices)),
    )
    return Step(function, grid, tile.threads, arguments)


def add(
    problem: Conv2dProblem, partial: Any, parts: int, plane: int, y: Flat, bias: Any, has_bias: bool, images: int
) -> Step:
    """What the parts left, (parts, O, plane), added up into y."""
    elements = images * problem.O * problem.OH * problem.OW
    arguments = (
        partial,
        problem.O * plane,
        plane,
        bias,
        has_bias,
        problem.activation == "relu",
        *y.arguments(),
        parts,
        images,
        problem.O // problem.groups,
        problem.OH,
        problem.OW,
        problem.groups,
    )
    return Step(adder(problem.sum_dtype, problem.y_dtype), blocks(elements), THREADS, arguments)


def blocks(elements: int) -> int:
    """Blocks of a kernel that packs or adds."""
    return min(-(-elements // (THREADS * ELEMENTS)), launch.MAX_GRID_X)
