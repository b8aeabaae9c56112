"""One valid call of ``conv2d_tiled``, carried out."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv import arrays, dispatch, dtypes, layouts
from gpuconv._version import __version__
from gpuconv.backends.protocol import Target
from gpuconv.errors import NoBackendError
from gpuconv.prepared import Conv2d
from gpuconv.problem import Conv2dProblem
from gpuconv.tiling import pipeline, tiles, windows
from gpuconv.tiling.record import Record, checksum
from gpuconv.tiling.storage import Storage
from gpuconv.tiling.tiles import Block, Tile

Array = np.ndarray[Any, Any]


class Job:
    """The convolution ``problem`` of ``source`` with ``kernel`` and ``bias``, to be written to ``out``.

    When it is made, the tiles and the implementation are chosen and the record of an unfinished run is read; nothing
    is written yet. Memory in all is ``limit`` bytes; ``path`` is where the record lies, if there is to be one.
    """

    def __init__(
        self,
        call: str,
        problem: Conv2dProblem,
        source: Storage,
        kernel: Array,
        bias: Array | None,
        out: Storage,
        target: Target,
        backend: str | None,
        limit: int,
        path: Path | None,
    ) -> None:
        self.call, self.problem, self.target = call, problem, target
        self.source, self.kernel, self.bias, self.out = source, kernel, bias, out
        self.scratch, self.piece = limit // 4, tiles.piece_bytes(limit)
        self.rows, self.columns = tiles.axes(problem)
        self.layers: dict[tuple[int, int], Conv2d] = {}
        self.unreadable = False
        self.record = None if path is None else Record(call, path)
        found = None if self.record is None else self.record.load()
        self.block = self._choose(limit, None if found is None else found["of"].get("tile"))
        self.count = tiles.count(problem, self.block)
        self.backend = self._pinned(backend)
        if self.record is not None:
            self.record.describe(self._description())
            if found is not None:
                self.record.resume(found)

    def _choose(self, limit: int, recorded: Any) -> Block:
        """The extents of a tile; those of an unfinished run, where they fit."""
        layout, problem = self.problem.layout, self.problem
        source, out = self.source.reading(layout), self.out.writing(layout)
        costs = tiles.Costs(problem, source, out, self.scratch, self.piece)
        sizes = recorded if isinstance(recorded, list) and len(recorded) == 4 else []
        if sizes and all(type(size) is int and size > 0 for size in sizes):
            block = sizes[0], sizes[1], sizes[2], sizes[3]
            if tiles.whole(problem, block, out.chunks) and costs.total(block) <= limit:
                return block
        return tiles.choose(self.call, costs, limit)

    def _pinned(self, backend: str | None) -> str:
        """The one implementation for all tiles: the first, in the order for the whole problem, that can make each."""
        parts = [tiles.part(self.problem, block) for block in tiles.shapes(self.problem, self.block)]
        named = dispatch.candidates(backend) or ()
        names = [name for name in dispatch.preferred(self.problem, self.target.device)[0] if name in named]
        # What the whole image is too large for may still make its tiles.
        names.sort(key=lambda name: bool(dispatch.reasons(name, self.problem, self.target)))
        for name in names:
            try:
                if all(dispatch.attempt(name, part, self.target, self.scratch, backend)[0] for part in parts):
                    return name
            except MemoryError:
                continue
        for part in parts:
            dispatch.choose(self.call, part, self.target, backend, self.scratch)  # says why it cannot
        raise NoBackendError(f"{self.call}: no one implementation can make every tile of {self.problem}")

    def _description(self) -> dict[str, Any]:
        """Everything that determines the result and the tiles."""
        source, out = self.source.where(), self.out.where()
        # where writing changes the source's file too
        shared = source is not None and out is not None and os.path.samefile(source, out)
        return {
            "problem": str(self.problem),
            "kernel": _digest(self.kernel),
            "bias": None if self.bias is None else _digest(self.bias),
            "source": self.source.identity(),
            "source_state": [] if shared else self.source.state(),
            "out": self.out.identity(),
            "implementation": self.backend,
            "version": __version__,
            "tile": list(self.block),
        }

    def run(self, told: Callable[[int, int], None]) -> None:
        """Make every tile that is not finished yet; ``told`` is called with how many of how many are."""
        record, done = self.record, 0
        self.out.prepare()
        if record is not None:
            done = record.done
            self._verify(record)
            record.save()  # where it cannot be written, nothing is computed
        told(done, self.count)

        def write(tile: Tile, memory: Array) -> None:
            self._write(tile, memory)
            told(tile.number + 1, self.count)

        pairs = min(2, self.count - done)
        windows, results = (
            [arrays.empty((max(sizes),), np.uint8) for _ in range(pairs)]
            for sizes in zip(*(self._bytes(block) for block in tiles.shapes(self.problem, self.block)), strict=True)
        )
        rest = itertools.islice(tiles.tiles(self.problem, self.block), done, None)
        try:
            pipeline.Pipeline(self._read, self._compute, write, self._named).run(rest, windows, results)
        except BaseException:
            if record is not None and self.unreadable:
                record.expect_repair()
            raise
        if record is not None:
            record.remove()

    def _read(self, tile: Tile, memory: Array) -> None:
        p, window = self.problem, self._window(tile, memory)
        rows = self.rows.source(tile.rows.start, tile.rows.stop)
        columns = self.columns.source(tile.columns.start, tile.columns.stop)
        try:
            windows.fill(window, p.layout, self.source, tile.of_image(p), rows, columns, p.fill, self.piece)
        except Exception:
            self.unreadable = True
            raise

    def _compute(self, tile: Tile, window: Array, result: Array) -> None:
        self._layer(tile)(self._window(tile, window), out=self._result(tile, result))

    def _write(self, tile: Tile, memory: Array) -> None:
        values = self.out.converted(self._result(tile, memory))
        self._store(tile, values)
        if self.record is not None:
            self.out.flush(self._place(tile))
            self.record.add(values)

    def _store(self, tile: Tile, values: Array) -> None:
        """Write ``values`` piece by piece, each of whole chunks."""
        p, whole = self.problem, tile.of_result(self.problem)
        medium = self.out.writing(p.layout)
        piece = medium.piece(p.layout, tiles.part(p, tile.block).y_shape, values.itemsize, self.piece)
        parts = [
            list(tiles.cut(where.start, where.stop, chunk, size))
            for where, chunk, size in zip(whole, medium.chunks, piece, strict=True)
        ]
        for at in itertools.product(*parts):
            to = tuple(slice(*interval) for interval in at)
            of = tuple(slice(a - where.start, b - where.start) for (a, b), where in zip(at, whole, strict=True))
            self.out.write(self._in_out(to), values[self._in_out(of)])
            self.out.release()

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

    def _bytes(self, block: Block) -> tuple[int, int]:
        """Bytes of the window and of the result of a tile of ``block``."""
        part = tiles.part(self.problem, block)
        return (
            math.prod(part.x_shape) * dtypes.itemsize(part.x_dtype),
            math.prod(part.y_shape) * dtypes.itemsize(part.y_dtype),
        )

    def _window(self, tile: Tile, memory: Array) -> Array:
        part = tiles.part(self.problem, tile.block)
        return _dense(memory, tiles.placed(part.layout, len(self.source.shape), part.x_shape), part.x_dtype)

    def _result(self, tile: Tile, memory: Array) -> Array:
        part = tiles.part(self.problem, tile.block)
        return _dense(memory, tiles.placed(part.layout, len(self.out.shape), part.y_shape), part.y_dtype)

    def _place(self, tile: Tile) -> tuple[slice, ...]:
        """The tile in ``out``."""
        return self._in_out(tile.of_result(self.problem))

    def _in_out(self, nchw: tuple[slice, ...]) -> tuple[slice, ...]:
        """Slices in the order N O OH OW as those of ``out``."""
        return tiles.placed(self.problem.layout, len(self.out.shape), nchw)

    def _verify(self, record: Record) -> None:
        """Refuse an ``out`` that no longer holds the tiles that are recorded as finished."""
        found = 0
        for tile in itertools.islice(tiles.tiles(self.problem, self.block), record.done):
            try:
                found = checksum(arrays.native(self.out.read(self._place(tile))), found)
            except Exception as error:
                error.add_note(self._named("reading again what was written of", tile))
                raise
            self.out.release()
        if found != record.checksum:
            raise ValueError(
                f"{self.call}: {record.path} records {record.done} finished tiles, and out holds something else there; "
                "was it made anew, or is its compression lossy? Open it without erasing it (mode 'r+') to go on, or "
                "delete the record to begin anew"
            )

    def _named(self, stage: str, tile: Tile) -> str:
        """A tile in words, for an error."""
        where = ", ".join(f"{part.start}:{part.stop}" for part in self._place(tile))
        text = f"{self.call}: while {stage} tile {tile.number + 1} of {self.count}, out[{where}]"
        if self.record is None:
            return text
        return f"{text}; tiles that are finished are recorded in {self.record.path}, the same call goes on from there"


def _dense(memory: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """The first bytes of ``memory`` as a dense array."""
    size = math.prod(shape) * dtypes.itemsize(dtype)
    view: Array = memory[:size].view(dtypes.numpy_dtype(dtype)).reshape(shape)
    return view


def _digest(array: Array) -> str:
    content = hashlib.sha256(str((array.shape, array.dtype.name)).encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return content.hexdigest()
