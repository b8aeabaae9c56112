"""Convolutions of dask arrays: lazy in, lazy out, block by block.

Every block of the result is one task. Its input is a window of x, put together from the blocks that the window meets:
whole ones as they are, of neighbours only the strips that are read, cut where they lie. ``halo`` says which, by the
geometry of the whole array, so that every padding, stride and border is that of the whole. The kernel is one key of
the graph, which a worker is sent once. Only this module knows dask, and imports it when it is given an array of it.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes, halo, layouts, request
from gpuconv.arrays import Array, Operand
from gpuconv.geometry import Pair
from gpuconv.halo import Part, Reach
from gpuconv.prepared import Conv2d
from gpuconv.problem import Conv2dProblem
from gpuconv.transpose import conv_transpose2d


def stand_in(call: str, name: str, value: Any) -> Operand:
    """``value`` as an operand; for a dask array one of its shape and dtype that takes a few bytes, to check by."""
    if not arrays.is_dask(value):
        return arrays.operand(call, name, value)
    from dask.array.core import Array as DaskArray

    if not isinstance(value, DaskArray):
        raise TypeError(
            f"{call}: {name} is a dask array with query planning, which gpuconv does not know yet; set dask's "
            "configuration array.query-planning to False before dask.array is imported"
        )
    if any(math.isnan(extent) for extent in value.shape):
        raise ValueError(
            f"{call}: {name} has blocks of unknown size (shape {value.shape}), and where windows begin depends on "
            f"them; {name}.compute_chunk_sizes() finds them"
        )
    kind = arrays.operand(call, name, value._meta)
    one = np.zeros((), dtypes.numpy_dtype(kind.dtype))
    return Operand(np.broadcast_to(one, value.shape), kind.library, None, kind.dtype)


def stand_ins(call: str, x: Any, k: Any, bias: Any) -> tuple[Operand, Operand, Operand | None]:
    """The operands of a call, of which x is a dask array and the others may be."""
    offset = bias if arrays.is_dask(bias) or bias is None else request.as_bias(call, bias)
    return stand_in(call, "x", x), stand_in(call, "k", k), None if bias is None else stand_in(call, "bias", offset)


@dataclass(frozen=True)
class Plan:
    """How a problem on a dask array is cut: for each axis, by its letter, the parts of x that each block reads."""

    x_axes: str
    y_axes: str
    x_chunks: tuple[tuple[int, ...], ...]  # of x as it is read
    y_chunks: tuple[tuple[int, ...], ...]
    parts: dict[str, list[tuple[Part, ...]]]
    runs: list[Pair]  # of groups, one for each block of channels
    rows: list[Reach]
    columns: list[Reach]

    @property
    def blocks(self) -> int:
        """Blocks of the result."""
        return math.prod(map(len, self.y_chunks))


def plan(problem: Conv2dProblem, x: Any, rank: int) -> Plan:
    """Cut ``problem``, whose result has ``rank`` axes, along the blocks of ``x``."""
    x_axes, y_axes = _axes(problem.layout, x.ndim), _axes(problem.layout, rank)
    chunks = {axis: tuple(map(int, extents)) for axis, extents in zip(x_axes, x.chunks, strict=True)}
    reaches: dict[str, list[Reach]] = {}
    geometry = zip(
        "HW", (problem.KH, problem.KW), problem.padding, problem.stride, problem.dilation, problem.result_shape[2:],
        strict=True,
    )  # fmt: skip
    for axis, k, pads, stride, dilation, outputs in geometry:
        if problem.op == "forward":
            found = halo.forward(chunks[axis], k, outputs, pads, stride, dilation, problem.padding_mode)
        else:
            found = halo.transposed(chunks[axis], k, outputs, pads[0], stride, dilation)
        chunks[axis], reaches[axis] = found
    # A transposed convolution takes all channels at once.
    count = problem.groups if problem.op == "forward" else 1
    channels, runs = halo.groups(chunks.get("C", (1,)), count, problem.operand_shapes[0][1] // count)
    chunks["C"] = channels
    per_run = problem.result_channels // count
    y_chunks = {axis: tuple(reach.outputs for reach in found) for axis, found in reaches.items()}
    y_chunks["C"] = tuple((stop - first) * per_run for (first, stop), _ in runs)
    y_chunks["N"] = chunks.get("N", (1,))
    parts = {axis: [reach.parts for reach in found] for axis, found in reaches.items()}
    parts["C"] = [found for _, found in runs]
    parts["N"] = [((block, 0, extent),) for block, extent in enumerate(y_chunks["N"])]
    return Plan(
        x_axes, y_axes, tuple(chunks[axis] for axis in x_axes), tuple(y_chunks[axis] for axis in y_axes), parts,
        [run for run, _ in runs], reaches["H"], reaches["W"],
    )  # fmt: skip


def _axes(layout: str, rank: int) -> str:
    """The letters of an image's axes."""
    return (layout[-rank:] if layout == "NCHW" or rank == 4 else "HWC")[:rank]


def compute(
    call: str,
    asked: request.Request,
    x: Any,
    k: Any = None,
    bias: Any = None,
    out: Any = None,
    device: Any = None,
    backend: Any = None,
    workspace_limit: Any = None,
    stream: Any = None,
    layer: Conv2d | None = None,
) -> Any:
    """The dask array of a request whose operands are ``stand_ins`` of x, k and bias, or of ``layer`` on x."""
    import dask.array
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    if out is not None:
        raise TypeError(f"{call}: out cannot be given for a dask array, whose result is lazy; use dask.array.store")
    if stream is not None:
        raise TypeError(f"{call}: stream cannot be given for a dask array; each worker's blocks run on its current one")
    request.workspace(call, workspace_limit)
    request.check_where(call, device, backend)
    problem, where = asked.problem, {"device": device, "backend": backend, "workspace_limit": workspace_limit}
    cut = plan(problem, x, len(asked.shape))
    x = x if x.chunks == cut.x_chunks else x.rechunk(cut.x_chunks)
    kernel: Any = k if arrays.is_dask(k) else _array(asked.second)
    offset: Any = bias if arrays.is_dask(bias) else _array(asked.bias)

    named = [value.name if arrays.is_dask(value) else value for value in (x, kernel, offset)]
    token = tokenize(*named, asked.k_zero_point, problem, where)
    names = name, _, kernels = tuple(f"{call.lower()}{part}-{token}" for part in ("", "-strip", "-kernel"))
    graph: dict[Any, Any] = {}
    sources = [x]
    for run, (first, stop) in enumerate(cut.runs):
        if layer is not None and stop - first == problem.groups:
            graph[kernels, run] = layer
            continue
        shares = _shares(problem, kernel, offset, first, stop)
        later = [array.rechunk(-1) if arrays.is_dask(array) else array for array in shares]
        sources += filter(arrays.is_dask, later)
        graph[kernels, run] = _kernel(problem.op, _options(asked, first, stop) | where, *later)
    _add_blocks(graph, call, names, cut, x, problem)
    layers = HighLevelGraph.from_collections(name, graph, dependencies=sources)
    meta = np.empty_like(x._meta, shape=(0,) * len(asked.shape), dtype=dtypes.numpy_dtype(problem.y_dtype))
    lazy_array: Any = dask.array.Array
    return lazy_array(layers, name, chunks=cut.y_chunks, meta=meta)


def _array(operand: Operand | None) -> Array | None:
    return None if operand is None else operand.array


def _options(asked: request.Request, first: int, stop: int) -> dict[str, Any]:
    """What is fixed for all blocks of a run of groups, in the words of the public call."""
    p = asked.problem
    shared = {
        "stride": p.stride, "dilation": p.dilation, "layout": p.layout, "activation": p.activation,
        "dtype": dtypes.numpy_dtype(p.y_dtype), "precision": p.precision,
    }  # fmt: skip
    if p.op != "forward":
        return shared | {"groups": p.groups}
    points: Any = 0 if asked.k_zero_point is None else asked.k_zero_point
    if np.size(points) > 1:
        points = points[slice(first * p.O // p.groups, stop * p.O // p.groups)]
    return shared | {
        "padding": p.padding, "groups": stop - first, "padding_mode": p.padding_mode, "padding_value": p.padding_value,
        "flip": p.flip, "kernel_layout": p.kernel_layout, "x_zero_point": p.x_zero_point, "k_zero_point": points,
    }  # fmt: skip


def _shares(problem: Conv2dProblem, kernel: Any, bias: Any, first: int, stop: int) -> tuple[Any, Any]:
    """The kernel and the bias of a run of groups."""
    if stop - first == problem.groups or problem.op != "forward":
        return kernel, bias
    per_group = problem.O // problem.groups
    outputs = slice(first * per_group, stop * per_group)
    axis = layouts.kernel_axes(problem.kernel_layout, kernel.ndim)[0]
    return kernel[(slice(None),) * axis + (outputs,)], None if bias is None else bias[outputs]


def _kernel(op: str, options: dict[str, Any], kernel: Any, bias: Any) -> Any:
    """What convolves the blocks, with copies of the kernel and the bias; the task that makes it, where they are dask
    arrays of one block.
    """
    make = partial(_prepared if op == "forward" else _transposed, options)
    arguments = [
        (array.name, *(0,) * array.ndim) if arrays.is_dask(array) else None if array is None else array.copy()
        for array in (kernel, bias)
    ]
    return (make, *arguments) if arrays.is_dask(kernel) or arrays.is_dask(bias) else make(*arguments)


def _prepared(options: dict[str, Any], kernel: Array, bias: Array | None) -> Conv2d:
    return Conv2d(kernel, bias, **options)


def _transposed(options: dict[str, Any], kernel: Array, bias: Array | None) -> Callable[..., Array]:
    return partial(conv_transpose2d, k=kernel, bias=bias, **options)


def _add_blocks(
    graph: dict[Any, Any], call: str, names: tuple[str, ...], cut: Plan, x: Any, problem: Conv2dProblem
) -> None:
    """Add the tasks: the blocks of the result, and the strips of ``x`` that they read; ``names`` are those of blocks,
    strips and kernels.
    """
    name, strips, kernels = names
    pieces: dict[tuple[Part, ...], Any] = {}

    def piece(parts: tuple[Part, ...]) -> Any:
        key = pieces.get(parts)
        if key is None:
            source = (x.name, *(block for block, _, _ in parts))
            whole = all(
                (start, stop) == (0, extents[block])
                for (block, start, stop), extents in zip(parts, x.chunks, strict=True)
            )
            key = source if whole else (strips, len(pieces))
            if not whole:
                graph[key] = (_strip, source, tuple(slice(start, stop) for _, start, stop in parts))
            pieces[parts] = key
        return key

    spatial = cut.x_axes.index("H"), cut.x_axes.index("W")
    where = [range(len(cut.parts[axis])) for axis in "CHW"]
    for c, i, j in itertools.product(*where):
        at = {"C": c, "H": i, "W": j, "N": 0}
        counts = tuple(len(cut.parts[axis][at[axis]]) for axis in cut.x_axes)
        block = Block(call, problem.op, cut.rows[i], cut.columns[j], spatial, counts, problem.fill, cut.blocks)
        for n in range(len(cut.parts["N"])):
            at["N"] = n
            read = itertools.product(*(cut.parts[axis][at[axis]] for axis in cut.x_axes))
            key = (name, *(at[axis] for axis in cut.y_axes))
            graph[key] = (block, (kernels, c), [piece(parts) for parts in read])


def _strip(block: Array, part: tuple[slice, ...]) -> Array:
    """What is read of a block: a small part as a copy, so that it does not hold the block in memory."""
    strip = block[part]
    return strip.copy() if 2 * strip.size < block.size else strip


@dataclass(frozen=True)
class Block:
    """The task that makes one block of the result of a kernel and the pieces of a window."""

    call: str
    op: str
    rows: Reach
    columns: Reach
    spatial: Pair  # x's axes of rows and columns
    counts: tuple[int, ...]  # pieces along each axis of x
    fill: complex
    blocks: int  # of the whole result

    def __call__(self, kernel: Any, pieces: Sequence[Array]) -> Array:
        """The block."""
        window = _joined(pieces, self.counts)
        for axis, reach in zip(self.spatial, (self.rows, self.columns), strict=True):
            if reach.table is not None:
                window = _gathered(window, axis, reach, self.fill)
        padding = self.rows.padding, self.columns.padding
        with _threads(self.blocks):
            if self.op != "forward":
                extra = self.rows.output_padding, self.columns.output_padding
                return kernel(window, padding=padding, output_padding=extra)
            stride, dilation = (self.rows.stride, self.columns.stride), (self.rows.dilation, self.columns.dilation)
            return kernel.on_window(self.call, window, stride, padding, dilation)


def _joined(pieces: Sequence[Array], counts: tuple[int, ...]) -> Array:
    """A grid of pieces, ``counts`` along each axis and the last one fastest, as one array."""
    if len(pieces) == 1:
        return pieces[0]
    grid = dict(zip(np.ndindex(counts), pieces, strict=True))
    edges = []
    for axis, count in enumerate(counts):
        line = [tuple(place if other == axis else 0 for other in range(len(counts))) for place in range(count)]
        edges.append([0, *itertools.accumulate(grid[at].shape[axis] for at in line)])
    window = np.empty_like(pieces[0], shape=tuple(ends[-1] for ends in edges), order="C")
    for at, piece in grid.items():
        window[tuple(slice(*ends[place : place + 2]) for place, ends in zip(at, edges, strict=True))] = piece
    return window


def _gathered(window: Array, axis: int, reach: Reach, fill: complex) -> Array:
    """The elements of ``window`` that the table of ``reach`` names along ``axis``, and ``fill`` where it names none."""
    index = reach.gathered()
    before: tuple[Any, ...] = (slice(None),) * axis
    inside = np.flatnonzero(index >= 0)
    if inside.size == index.size:
        return window[(*before, np.asarray(index, like=window))]
    shape = (*window.shape[:axis], index.size, *window.shape[axis + 1 :])
    gathered = np.full_like(window, fill, shape=shape, order="C")
    if inside.size:
        gathered[(*before, np.asarray(inside, like=window))] = window[(*before, np.asarray(index[inside], like=window))]
    return gathered


def _threads(blocks: int) -> AbstractContextManager[None]:
    """Share the threads of the compiled kernels among the blocks that run at once: as many as there are, for all that
    can be known here. A block that runs alone, on the synchronous scheduler, has them all, and ``GPUCONV_NUM_THREADS``
    has the last word.
    """
    alone = threading.current_thread() is threading.main_thread() and multiprocessing.parent_process() is None
    if alone or os.environ.get("GPUCONV_NUM_THREADS"):
        return nullcontext()
    try:
        from gpuconv.backends.numba_cpu import runtime
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        return nullcontext()
    return runtime.share_of_threads(blocks)


def typical(problem: Conv2dProblem, x: Any, rank: int) -> tuple[Conv2dProblem, str]:
    """The problem of the largest block of ``problem`` on the dask array ``x``, and what to say about the others."""
    cut = plan(problem, x, rank)
    # Of blocks of one size one that has no border.
    rows, columns = (
        max(found, key=lambda reach: (reach.outputs, reach.table is None, reach.padding == (0, 0)))
        for found in (cut.rows, cut.columns)
    )
    if problem.op == "forward":
        read = [reach.gathered().size if reach.table is not None else _extent(reach.parts) for reach in (rows, columns)]
        first, stop = max(cut.runs, key=lambda run: run[1] - run[0])
        groups = stop - first
        share: dict[str, Any] = {
            "C": problem.C // problem.groups * groups, "O": problem.O // problem.groups * groups, "groups": groups,
            "H": read[0], "W": read[1], "padding": (rows.padding, columns.padding),
            "stride": (rows.stride, columns.stride), "dilation": (rows.dilation, columns.dilation),
        }  # fmt: skip
        if rows.padding == columns.padding == (0, 0):
            share |= {"padding_mode": "constant", "padding_value": 0}
    else:
        read = [_extent(reach.parts) for reach in (rows, columns)]
        pads = [
            (low, high - reach.output_padding if reach.output_padding >= stride else high)
            for reach, (low, high), stride in zip(
                (rows, columns), (rows.padding, columns.padding), problem.stride, strict=True
            )
        ]
        share = {"H": rows.outputs, "W": columns.outputs, "padding": tuple(pads)}
    N = max(cut.y_chunks[0]) if rank == 4 else 1
    note = (
        f"x is a dask array: the result has {cut.blocks} blocks, each a task of its own. The above is the largest, "
        f"{rows.outputs}×{columns.outputs} pixels that read {read[0]}×{read[1]}; others may run otherwise, unless "
        "backend says what runs, and a worker may have other hardware than this machine."
    )
    return replace(problem, N=N, **share), note


def _extent(parts: tuple[Part, ...]) -> int:
    return sum(stop - start for _, start, stop in parts)
