"""A process that convolves from file to file and kills itself on the way: python tiled_child.py FOLDER KIND WHEN.

WHEN is ``read:7`` (at the seventh read of the source), ``record:3`` (when tile 3 is in its file and not in the record
yet), ``replace:3`` (when its new record is written and has not taken the old one's place) or ``never``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

import gpuconv
from gpuconv.tiling import record

SHAPE, LIMIT = (120, 128), 60_000
OPTIONS: dict[str, Any] = {"padding": "same", "padding_mode": "reflect", "backend": "numpy.reference"}


def image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def kernel() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)


class Source:
    """An image that notes what is read of it, and kills the process at one of the reads."""

    def __init__(self, deadly: int | None = None) -> None:
        self.array, self.deadly = image(), deadly
        self.shape, self.dtype = self.array.shape, self.array.dtype
        self.reads: list[tuple[slice, ...]] = []

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        self.reads.append(at)
        if len(self.reads) == self.deadly:
            die()
        return self.array[at]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def output(folder: Path, kind: str) -> Any:
    """The output, made where there is none yet."""
    path = folder / f"y.{kind}"
    if kind == "npy":
        if path.exists():
            return np.load(path, mmap_mode="r+")
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=SHAPE)
    if kind == "h5":
        import h5py

        return h5py.File(path, "a").require_dataset("y", SHAPE, "float32")
    import zarr

    if path.exists():
        return zarr.open_array(path, mode="r+")
    return zarr.create_array(path, shape=SHAPE, chunks=(16, 64), dtype="float32")


def convolve(source: Any, out: Any, **options: Any) -> None:
    gpuconv.conv2d_tiled(source, kernel(), out, **(OPTIONS | {"workspace_limit": LIMIT, "resume": True} | options))


def deadly(function: Any, at: int) -> Any:
    """``function``, before the call ``at`` of which the process dies."""
    calls = iter(range(1, 10**6))

    def called(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            die()
        return function(*arguments, **options)

    return called


if __name__ == "__main__":
    where, kind, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    what, _, number = when.partition(":")
    if what == "record":
        record.Record.add = deadly(record.Record.add, int(number))
    if what == "replace":
        record.os.replace = deadly(os.replace, 1 + int(number))  # the first is the record of no tiles
    convolve(Source(int(number) if what == "read" else None), output(where, kind))
