"""``conv2d_tiled``: the convolution of images larger than memory."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv import arrays, dispatch, dtypes, layouts, request
from gpuconv._version import __version__
from gpuconv.arrays import Operand
from gpuconv.backends.protocol import Target
from gpuconv.errors import NoBackendError
from gpuconv.prepared import Conv2d
from gpuconv.problem import Conv2dProblem
from gpuconv.tiling import pipeline, storage, tiles, windows
from gpuconv.tiling.record import Record, checksum
from gpuconv.tiling.storage import Storage
from gpuconv.tiling.tiles import Block, Tile

Array = np.ndarray[Any, Any]

_CALL = "conv2d_tiled"


def conv2d_tiled(
    source: Any,
    k: Any,
    out: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    padding_mode: str = "constant",
    padding_value: complex = 0,
    flip: bool = False,
    layout: str = "NCHW",
    kernel_layout: str = "OIHW",
    activation: str | None = None,
    dtype: Any = None,
    precision: str = "highest",
    device: str | None = None,
    backend: str | None = None,
    workspace_limit: int | None = None,
    resume: bool | str | os.PathLike[str] = False,
    progress: bool = False,
) -> Any:
    """Convolve images that need not fit in memory, from one array on a disk to another.

    What ``conv2d(source, k, ...)`` gives is written to ``out``, tile by tile: one tile is read while another is
    computed and a third is written. Padding of every mode, ``"same"`` and the steps of the stride are those of the
    whole image.

    Parameters
    ----------
    source : array
        The images, in the shapes that ``conv2d`` takes: a ``numpy.memmap``, a Zarr array, an HDF5 dataset, a NumPy
        array, or anything else with ``shape`` and ``dtype`` that is read by slices.
    k, bias, stride, padding, dilation, groups, padding_mode, padding_value, flip, layout, kernel_layout, activation, \
dtype, precision, device, backend
        As for ``conv2d``.
    out : array
        Where the result goes: any of the same kinds, of the result's shape and dtype, apart from ``source``. Tiles
        are whole chunks of it (of Zarr shards, whole shards), so that none is written twice.
    workspace_limit : int, optional
        Bytes of memory that the call may take besides k and the bias, default 256 MiB. A quarter is for ``conv2d``'s
        scratch. In the rest lie two windows and two results of tiles, and what reading and writing copy on the way:
        chunks that are decoded or encoded, pages of a memory map.
    resume : bool or path, default False
        Keep a record of finished tiles in this file, or for True in one beside out's (``<name>.tiles.json``). A call
        that finds the record of the same call, killed or failed, goes on where that stopped; it is removed when all
        is done. Only then is each tile flushed to the disk.
    progress : bool, default False
        Show a bar on stderr; needs rich.

    Returns
    -------
    array
        ``out``.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or value, or a record of another call, before anything is computed.
    MemoryError
        When the smallest tile, which writes whole chunks of ``out``, does not fit ``workspace_limit``.
    NoBackendError
        When a forced backend cannot run, with every reason.
    OSError, or what the array's library raises
        When reading or writing fails. A note on the error names the tile. The tiles before it are in ``out``.

    Notes
    -----
    One implementation computes all tiles: the one that ``conv2d`` would run on the whole image, where it can. Integers
    come out exactly as from ``conv2d``; floating-point results keep the promise of ``precision``.

    A file whose writer was killed is as safe as its format. Memory maps and local Zarr stores lose nothing that was
    recorded; HDF5 gives no such promise for a file that was open.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(48.0).reshape(6, 8)  # in earnest np.load("large.npy", mmap_mode="r"), or a Zarr array
    >>> smooth = np.empty((6, 8))
    >>> _ = conv2d_tiled(image, np.full((3, 3), 1 / 9), smooth, padding="same", padding_mode="reflect")
    >>> smooth[0].round(2)
    array([5.67, 6.33, 7.33, 8.33, 9.33, 10.33, 11.33, 12.  ])
    """
    image, result = storage.of(_CALL, "source", source), storage.of(_CALL, "out", out)
    kernel = arrays.native(_host(arrays.operand(_CALL, "k", k)))
    offset = None if bias is None else arrays.native(_host(request.as_bias(_CALL, bias)))
    asked = request.of_operands(
        _CALL, Operand(np.broadcast_to(np.zeros((), dtypes.numpy_dtype(image.dtype)), image.shape), "numpy", None,
        image.dtype), arrays.operand(_CALL, "k", kernel),
        None if offset is None else arrays.operand(_CALL, "bias", offset), np.asarray(0), stride=stride,
        padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode, padding_value=padding_value,
        flip=flip, layout=layout, kernel_layout=kernel_layout, activation=activation, dtype=dtype, precision=precision,
        names=("source", "k"),
    )  # fmt: skip
    problem = asked.problem
    _check_out(result, image, asked.shape, problem)
    limit = request.workspace(_CALL, workspace_limit)
    path = _record_path(resume, result)
    target = dispatch.resolve(_CALL, device, backend, None)
    if dispatch.values_matter(problem, target, backend):
        target = replace(target, separable=request.is_separable(problem, arrays.operand(_CALL, "k", kernel)))
    with _bar(progress) as bar:
        if problem.result_size:
            _Run(image, result, kernel, offset, problem, target, backend, limit, path).run(bar)
    return out


def _host(operand: Operand) -> Array:
    with arrays.on_stream(operand.device, operand.stream):
        return arrays.to_host(operand.array)


def _check_out(result: Storage, image: Storage, shape: tuple[int, ...], problem: Conv2dProblem) -> None:
    """Refuse an ``out`` of another shape or dtype, that cannot be written, or that shares data with the source."""
    if result.shape != shape:
        raise ValueError(f"{_CALL}: out has shape {result.shape}; the result has shape {shape}")
    if not result.takes(problem.y_dtype):
        raise TypeError(f"{_CALL}: out has dtype {result.dtype}; the result has dtype {problem.y_dtype}")
    if (reason := result.refusal()) is not None:
        raise ValueError(f"{_CALL}: out {reason}")
    if result.meets(image):
        raise ValueError(f"{_CALL}: out and source are the same data; pass an out of its own")


def _record_path(resume: Any, result: Storage) -> Path | None:
    """Where the record lies, or None where there is to be none."""
    if resume is False or resume is None:
        return None
    if resume is not True and not isinstance(resume, (str, os.PathLike)):
        raise TypeError(f"{_CALL}: resume must be True, False or the path of a file; got {resume!r}")
    if not result.lasting:
        raise ValueError(f"{_CALL}: resume={resume!r} has no use for an out in memory, which is gone with the process")
    if resume is not True:
        path = Path(resume)
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"{_CALL}: resume must be the path of a file in a folder that exists; got {str(path)!r}")
        return path
    beside = result.where()
    if beside is None:
        raise ValueError(f"{_CALL}: resume=True keeps its record beside the file of out, which has none; pass a path")
    return beside.with_name(f"{beside.name}.tiles.json")


class _Run:
    """One call whose arguments are valid."""

    def __init__(
        self,
        image: Storage,
        result: Storage,
        kernel: Array,
        bias: Array | None,
        problem: Conv2dProblem,
        target: Target,
        backend: str | None,
        limit: int,
        path: Path | None,
    ) -> None:
        self.image, self.result, self.kernel, self.bias, self.problem = image, result, kernel, bias, problem
        self.target, self.path = target, path
        self.scratch, self.piece = limit // 4, tiles.piece_bytes(limit)
        self.rows, self.columns = tiles.axes(problem)
        self.layers: dict[tuple[int, int], Conv2d] = {}
        record = None if path is None else Record(_CALL, path)
        found = None if record is None else record.load()
        self.block = self._choose(limit, None if found is None else found["of"].get("tile"))
        self.backend = self._pin(backend)
        self.count = tiles.count(problem, self.block)
        self.record = record
        if record is not None:
            record.describe(self._description())
            if found is not None:
                record.resume(found)

    def _choose(self, limit: int, recorded: Any) -> Block:
        """The extents of a tile; those of an unfinished run, where they fit."""
        layout, problem = self.problem.layout, self.problem
        source, out = self.image.reading(layout), self.result.writing(layout)
        costs = tiles.Costs(problem, source, out, self.scratch, self.piece)
        if (
            isinstance(recorded, list)
            and len(recorded) == 4
            and all(type(size) is int and size > 0 for size in recorded)
        ):
            block: Block = tuple(recorded)
            least = tiles.granule(problem, out.chunks)
            if all(size % unit == 0 for size, unit in zip(block, least, strict=True)) and costs.total(block) <= limit:
                return block
        return tiles.choose(_CALL, costs, limit)

    def _pin(self, backend: str | None) -> str:
        """The one implementation for all tiles: the first of the whole problem's order that can make each."""
        parts = [tiles.part(self.problem, block) for block in tiles.shapes(self.problem, self.block)]
        names = dispatch.preferred(self.problem, self.target.device)[0]
        named = [name for name in names if name in (dispatch.candidates(backend) or ())]
        # What the whole image is too large for may still make its tiles.
        named.sort(key=lambda name: bool(dispatch.reasons(name, self.problem, self.target)))
        refused: Exception | None = None
        for name in named:
            try:
                for part in parts:
                    plan, found = dispatch.attempt(name, part, self.target, self.scratch, backend)
                    if plan is None:
                        raise NoBackendError(f"{_CALL}: {name} cannot make tiles {part}: {'; '.join(found)}")
            except (NoBackendError, MemoryError) as error:
                refused = refused or error
                continue
            return name
        for part in parts:
            dispatch.choose(_CALL, part, self.target, backend, self.scratch)  # its errors say everything
        raise refused or NoBackendError(f"{_CALL}: {backend} has no implementation of {self.problem}")

    def _description(self) -> dict[str, Any]:
        """Everything that determines the result and the tiles."""
        source, out = self.image.where(), self.result.where()
        # where writing changes the source's file too
        shared = source is not None and out is not None and os.path.samefile(source, out)
        return {
            "problem": str(self.problem),
            "kernel": _digest(self.kernel),
            "bias": None if self.bias is None else _digest(self.bias),
            "source": self.image.identity(),
            "source_state": [] if shared else self.image.state(),
            "out": self.result.identity(),
            "implementation": self.backend,
            "version": __version__,
            "tile": list(self.block),
        }

    def run(self, bar: Callable[[int, int], None]) -> None:
        """Make every tile that is not finished yet; ``bar`` is told how many of how many are."""
        every = tiles.tiles(self.problem, self.block)
        record = self.record
        if record is not None:
            self._verify(record.done)
            record.save()  # where it cannot be written, nothing is computed
        self.result.reserve()
        done = 0 if record is None else record.done
        bar(done, self.count)
        x_bytes, y_bytes = (
            max(sizes) for sizes in zip(*(map(self._bytes, tiles.shapes(self.problem, self.block))), strict=True)
        )

        def write(tile: Tile, memory: Array) -> None:
            values = self.result.converted(self._result(tile, memory))
            self._store(tile, values)
            if record is not None:
                self.result.flush(self._place(tile))
                record.add(values)
            bar(tile.number + 1, self.count)

        work = pipeline.Pipeline(self._read, self._compute, write, self._named)
        pair = range(min(2, self.count - done))
        rest = (tile for tile in every if tile.number >= done)
        work.run(
            rest, [arrays.empty((x_bytes,), np.uint8) for _ in pair], [arrays.empty((y_bytes,), np.uint8) for _ in pair]
        )
        if record is not None:
            record.remove()

    def _bytes(self, block: Block) -> tuple[int, int]:
        part = tiles.part(self.problem, block)
        x, y = np.prod(part.x_shape, dtype=object), part.result_size
        return int(x) * dtypes.itemsize(part.x_dtype), y * dtypes.itemsize(part.y_dtype)

    def _view(self, memory: Array, nchw: tuple[int, ...], ndim: int, dtype: str) -> Array:
        """The first bytes of ``memory`` as a dense array in the caller's layout and rank."""
        shape = tiles.placed(self.problem.layout, ndim, nchw)
        size = int(np.prod(shape, dtype=object)) * dtypes.itemsize(dtype)
        view: Array = memory[:size].view(dtypes.numpy_dtype(dtype)).reshape(shape)
        return view

    def _window(self, tile: Tile, memory: Array) -> Array:
        part = tiles.part(self.problem, tile.block)
        return self._view(memory, part.x_shape, len(self.image.shape), part.x_dtype)

    def _result(self, tile: Tile, memory: Array) -> Array:
        part = tiles.part(self.problem, tile.block)
        return self._view(memory, part.y_shape, len(self.result.shape), part.y_dtype)

    def _place(self, tile: Tile) -> tuple[slice, ...]:
        """The tile in ``out``."""
        return self._in_result(tile.of_result(self.problem))

    def _in_result(self, nchw: tuple[slice, ...]) -> tuple[slice, ...]:
        """Slices in the order N O OH OW as those of ``out``."""
        return tiles.placed(self.problem.layout, len(self.result.shape), nchw)

    def _read(self, tile: Tile, memory: Array) -> None:
        p, window = self.problem, self._window(tile, memory)
        rows = self.rows.source(tile.rows.start, tile.rows.stop)
        columns = self.columns.source(tile.columns.start, tile.columns.stop)
        windows.fill(window, p.layout, self.image, tile.of_image(p), rows, columns, p.fill, self.piece)

    def _store(self, tile: Tile, values: Array) -> None:
        """Write ``values`` piece by piece, each of whole chunks."""
        p, whole = self.problem, tile.of_result(self.problem)
        medium = self.result.writing(p.layout)
        piece = medium.piece(p.layout, tiles.part(p, tile.block).y_shape, values.itemsize, self.piece)
        parts = [
            list(tiles.cut(where.start, where.stop, chunk, size))
            for where, chunk, size in zip(whole, medium.chunks, piece, strict=True)
        ]
        for at in itertools.product(*parts):
            to = tuple(slice(*interval) for interval in at)
            of = tuple(slice(a - where.start, b - where.start) for (a, b), where in zip(at, whole, strict=True))
            self.result.write(self._in_result(to), values[self._in_result(of)])
            self.result.release()

    def _compute(self, tile: Tile, window: Array, result: Array) -> None:
        self._layer(tile)(self._window(tile, window), out=self._result(tile, result))

    def _layer(self, tile: Tile) -> Conv2d:
        """The convolution of the tile's groups, prepared."""
        key = tile.groups.start, tile.groups.stop
        if key not in self.layers:
            p, kernel, bias = self.problem, self.kernel, self.bias
            channels = tile.of_result(p)[1]
            if kernel.ndim > 2:
                axis = layouts.kernel_axes(p.kernel_layout, kernel.ndim)[0]
                kernel = kernel[(*[slice(None)] * axis, channels)]
            part = tiles.part(p, tile.block)
            self.layers[key] = Conv2d(
                kernel, None if bias is None else bias[channels], stride=part.stride, dilation=part.dilation,
                groups=part.groups, flip=p.flip, layout=p.layout, kernel_layout=p.kernel_layout,
                activation=p.activation, dtype=p.y_dtype, precision=p.precision, device=str(self.target),
                backend=self.backend, workspace_limit=self.scratch,
            )  # fmt: skip
        return self.layers[key]

    def _verify(self, done: int) -> None:
        """Refuse an ``out`` that no longer holds the tiles that are recorded as finished."""
        record, found = self.record, 0
        assert record is not None
        for tile in tiles.tiles(self.problem, self.block):
            if tile.number >= done:
                break
            try:
                found = checksum(arrays.native(self.result.read(self._place(tile))), found)
            except Exception as error:
                error.add_note(self._named("reading again what was written of", tile))
                raise
            self.result.release()
        if found != record.checksum:
            raise ValueError(
                f"{_CALL}: {record.path} records {done} finished tiles, and out holds something else there; was it "
                "made anew, or is its compression lossy? Open it without erasing it (mode 'r+') to go on, or delete "
                "the record to begin anew"
            )

    def _named(self, stage: str, tile: Tile) -> str:
        """A tile in words, for an error."""
        where = ", ".join(f"{part.start}:{part.stop}" for part in self._place(tile))
        text = f"{_CALL}: while {stage} tile {tile.number + 1} of {self.count}, out[{where}]"
        if self.record is None:
            return text
        return f"{text}; tiles that are finished are recorded in {self.record.path}, the same call goes on from there"


def _digest(array: Array) -> str:
    content = hashlib.sha256(str((array.shape, array.dtype.name)).encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return content.hexdigest()


@contextmanager
def _bar(progress: Any) -> Iterator[Callable[[int, int], None]]:
    """What to tell how many tiles of how many are finished: a bar on stderr, or nothing."""
    if not isinstance(progress, (bool, np.bool_)):
        raise TypeError(f"{_CALL}: progress must be True or False; got {progress!r}")
    if not progress:
        yield lambda done, count: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{_CALL}: progress=True needs rich ({error.name} is missing); pip install "gpuconv[zarr]"', name=error.name
        ) from error
    columns = TextColumn("tiles"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, count: shown.update(task, completed=done, total=count)
