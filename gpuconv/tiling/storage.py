"""The kinds of arrays that tiles are read from and written to, and what each needs besides slicing.

NumPy arrays, memory maps, HDF5 datasets and Zarr arrays are known; anything else that is sliced as they are works too.
None of their libraries is imported: an array that is at hand has brought its own.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes
from gpuconv.tiling.tiles import Medium, four

Array = np.ndarray[Any, Any]
Region = tuple[slice, ...]

_PAGE = 4096  # bytes that a memory map reads at a time
_BLOCK = 1 << 16  # elements that are rounded at a time


def of(call: str, name: str, array: Any) -> Storage:
    """``array`` as a Storage; a TypeError that names ``name`` where it is no array of numbers that can be sliced."""
    if isinstance(array, Storage):
        return array
    if isinstance(array, np.ndarray):
        arrays.operand(call, name, array)  # refuses what holds no numbers, and masked arrays
        return Mapped(array) if _map_of(array) is not None else Storage(array)
    if hasattr(array, "__cuda_array_interface__"):
        raise TypeError(f"{call}: {name} lives on a GPU; conv2d takes it as it is, and .get() brings it to the host")
    shape = getattr(array, "shape", None)
    sliceable = hasattr(array, "__getitem__") and hasattr(array, "dtype") and not isinstance(array, type)
    if not sliceable or not isinstance(shape, tuple) or not all(isinstance(extent, int) for extent in shape):
        raise TypeError(
            f"{call}: {name} must be an array that is read by slices (NumPy, memory map, Zarr, HDF5); "
            f"got {type(array).__name__}"
        )
    dtypes.name_of(call, f"{name} has dtype", array.dtype)
    root = type(array).__module__.partition(".")[0]
    return {"h5py": Hdf5, "zarr": Zarr}.get(root, Other)(array)


class Storage:
    """An array in memory: nothing to release, nothing to flush, nothing that outlives the process."""

    reads = writes = 0  # copies of what is read or written at a time, besides windows and results
    lasting = False  # whether what was written is there when the process is gone
    rounding = False  # whether results are floats, to be stored as the nearest integers of its type
    clipped = 0  # of these, how many lay beyond the type's range, or were NaN

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape: tuple[int, ...] = tuple(array.shape)

    @property
    def dtype(self) -> str:
        """Its name, whatever the byte order."""
        return str(np.dtype(self.array.dtype).name)

    @property
    def read_chunks(self) -> tuple[int, ...]:
        """Extents that are read as a whole, whatever part of them is asked for."""
        return (1,) * len(self.shape)

    @property
    def write_chunks(self) -> tuple[int, ...]:
        """Extents that are written as a whole: a part of them means to read them, change them and write them again."""
        return (1,) * len(self.shape)

    def reading(self, layout: str) -> Medium:
        """How it is read."""
        return Medium(four(layout, self.read_chunks), self.reads)

    def writing(self, layout: str) -> Medium:
        """How it is written."""
        return Medium(four(layout, self.write_chunks), self.writes)

    def read(self, at: Region) -> Array:
        """The elements ``at``."""
        return np.asarray(self.array[at])

    def takes(self, dtype: str) -> bool:
        """Whether results of ``dtype`` may be written to it."""
        if not self.rounding:
            return self.dtype == dtype
        # Both ends of the range must be numbers of the result's type.
        return dtype == "float64" or (dtype == "float32" and dtypes.itemsize(self.dtype) <= 2)

    def converted(self, values: Array) -> Array:
        """``values``, a dense array, as they are to be stored; in their own memory, whose content is lost."""
        if not self.rounding:
            return values
        low, high = dtypes.RANGES[self.dtype]
        flat = values.reshape(-1)
        # No integer is wider than the number it comes from, so that it is written behind what is still to be read.
        stored = flat.view(np.uint8)[: flat.size * dtypes.itemsize(self.dtype)].view(self.dtype)
        for start in range(0, flat.size, _BLOCK):
            block = np.rint(flat[start : start + _BLOCK])
            inside = (block >= low) & (block <= high)
            self.clipped += block.size - int(np.count_nonzero(inside))
            np.clip(block, low, high, out=block)
            block[np.isnan(block)] = 0
            stored[start : start + _BLOCK] = block.astype(self.dtype)
        return stored.reshape(values.shape)

    def write(self, at: Region, values: Array) -> None:
        """Store ``values``, which have been converted, at ``at``."""
        self.array[at] = values

    def release(self) -> None:
        """Give back the memory that reading and writing took, where it is not the caller's."""

    def prepare(self) -> None:
        """Bring its file into a state in which it can be written to, and killed at any time."""

    def flush(self, at: Region) -> None:
        """Bring what was written at ``at`` to the disk."""

    def refusal(self) -> str | None:
        """Why nothing can be written."""
        if isinstance(self.array, np.ndarray) and not self.array.flags.writeable:
            return "is read-only"
        return None

    def where(self) -> Path | None:
        """The file or folder it lies in."""
        return None

    def name(self) -> str:
        """Its name in there."""
        return ""

    def meets(self, other: Storage) -> bool:
        """Whether writing to it may change ``other``."""
        if isinstance(self.array, np.ndarray) and isinstance(other.array, np.ndarray):
            low, high = arrays.byte_bounds(self.array)
            other_low, other_high = arrays.byte_bounds(other.array)
            return low < other_high and other_low < high
        return self.array is other.array

    def identity(self) -> dict[str, Any]:
        """What tells it from other arrays, for a record."""
        path = self.where()
        known: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype}
        return known if path is None else known | {"path": str(path), "name": self.name()}

    def state(self) -> list[int]:
        """What changes when its file does: sizes and times."""
        path = self.where()
        if path is None:
            return []
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]


class Other(Storage):
    """Anything else that is sliced."""

    reads = writes = 2
    lasting = True  # who asks for a record knows

    @property
    def read_chunks(self) -> tuple[int, ...]:
        """Its ``chunks``, if it has any."""
        chunks = getattr(self.array, "chunks", None)
        if isinstance(chunks, tuple) and all(isinstance(extent, int) and extent > 0 for extent in chunks):
            return chunks if len(chunks) == len(self.shape) else super().read_chunks
        return super().read_chunks

    @property
    def write_chunks(self) -> tuple[int, ...]:
        """Its ``chunks``, if it has any."""
        return self.read_chunks

    def flush(self, at: Region) -> None:
        """By its own ``flush``, if it has one."""
        if hasattr(self.array, "flush"):
            self.array.flush()

    def refusal(self) -> str | None:
        """Whether it takes assignments at all."""
        return None if hasattr(self.array, "__setitem__") else f"of type {type(self.array).__name__} takes no values"


def _map_of(array: Any) -> Any:
    """The ``numpy.memmap`` of a whole map that ``array`` is a view of; None where there is none."""
    while array is not None:
        base = getattr(array, "base", None)
        if isinstance(array, np.memmap) and isinstance(base, mmap.mmap):
            return array
        array = base
    return None


class Mapped(Storage):
    """A ``numpy.memmap`` or a view of one. Pages that were read or written count as the process's memory until they are
    released.
    """

    reads = writes = 1
    lasting = True

    def __init__(self, array: Array) -> None:
        super().__init__(array)
        self.whole = _map_of(array)
        self.map: mmap.mmap = self.whole.base

    @property
    def read_chunks(self) -> tuple[int, ...]:
        """Pages, along the last axis of an array in C order."""
        if self.array.strides[-1] != self.array.itemsize:
            return super().read_chunks
        return (*super().read_chunks[1:], max(_PAGE // self.array.itemsize, 1))

    def release(self) -> None:
        """Unmap its pages, which stay in the system's cache. Changes to a private map would be lost."""
        if hasattr(mmap, "MADV_DONTNEED") and self.whole.mode != "c":
            self.map.madvise(mmap.MADV_DONTNEED)

    def prepare(self) -> None:
        """Give a sparse file its blocks: when the disk is full, writing to a map ends the process."""
        path = self.where()
        if path is None or not hasattr(os, "posix_fallocate"):
            return
        status, (low, high) = path.stat(), self.bounds()
        if status.st_blocks * 512 < status.st_size:
            with path.open("r+b") as file:
                try:
                    os.posix_fallocate(file.fileno(), low, high - low)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
                        raise

    def flush(self, at: Region) -> None:
        """Write the changed pages."""
        self.map.flush()

    def refusal(self) -> str | None:
        """A map may be read-only, or private."""
        if self.whole.mode == "c":
            return "is a memory map of mode 'c', whose changes never reach its file; open it with mode='r+'"
        return "is a read-only memory map; open it with mode='r+'" if not self.array.flags.writeable else None

    def where(self) -> Path | None:
        """The mapped file."""
        return None if self.whole.filename is None else Path(self.whole.filename)

    def name(self) -> str:
        """Where in the file it begins."""
        return str(self.bounds()[0])

    def bounds(self) -> tuple[int, int]:
        """First byte of the file, and the byte after the last, that it reaches."""
        low, high = arrays.byte_bounds(self.array)
        start = int(self.whole.offset) - arrays.address(self.whole)
        return start + low, start + high

    def meets(self, other: Storage) -> bool:
        """Two maps of one file may overlap at different addresses."""
        mine, theirs = self.where(), other.where()
        if not isinstance(other, Mapped) or mine is None or theirs is None or not os.path.samefile(mine, theirs):
            return super().meets(other)
        low, high = self.bounds()
        other_low, other_high = other.bounds()
        return low < other_high and other_low < high


class Hdf5(Storage):
    """An ``h5py.Dataset``."""

    reads = writes = 2  # chunks are decoded, then copied, or the other way
    lasting = True

    @property
    def read_chunks(self) -> tuple[int, ...]:
        """Chunks, where it has any."""
        return tuple(self.array.chunks or (1,) * len(self.shape))

    @property
    def write_chunks(self) -> tuple[int, ...]:
        """Chunks, where it has any."""
        return self.read_chunks

    def prepare(self) -> None:
        """A file that was created and never flushed cannot be opened again."""
        self.flush(())

    def flush(self, at: Region) -> None:
        """The library's buffers, then the system's."""
        self.array.file.flush()
        path = self.where()
        if path is not None:
            sync(path)

    def refusal(self) -> str | None:
        """A file may be read-only."""
        read_only = self.array.file.mode == "r"
        return "lies in an HDF5 file opened for reading; open it with mode 'r+'" if read_only else None

    def where(self) -> Path | None:
        """The file; an HDF5 file may also be in memory."""
        path = Path(os.fsdecode(self.array.file.filename))
        return path if path.is_file() else None

    def name(self) -> str:
        """Its path inside the file."""
        return str(self.array.name)

    def meets(self, other: Storage) -> bool:
        """The same dataset, however it was opened."""
        mine, theirs = self.where(), other.where()
        if not isinstance(other, Hdf5) or mine is None or theirs is None:
            return super().meets(other)
        return os.path.samefile(mine, theirs) and self.name() == other.name()


class Zarr(Storage):
    """A ``zarr.Array``."""

    reads, writes = 3, 2  # encoded chunks, decoded ones, and what is made of them
    lasting = True

    @property
    def read_chunks(self) -> tuple[int, ...]:
        """Chunks."""
        return tuple(self.array.chunks)

    @property
    def write_chunks(self) -> tuple[int, ...]:
        """Shards, files of several chunks each, or chunks."""
        return tuple(getattr(self.array, "shards", None) or self.array.chunks)

    def flush(self, at: Region) -> None:
        """The files of the chunks, and their folders; other stores than local folders write when they return."""
        folder = self.where()
        if folder is None:
            return
        spans = [
            range(part.start // chunk, -(-part.stop // chunk))
            for part, chunk in zip(at, self.write_chunks, strict=True)
        ]
        folders = set()
        for chunk in itertools.product(*spans):
            path = folder / self.array.metadata.encode_chunk_key(chunk)
            if path.exists():  # a chunk of nothing but the fill value has no file
                sync(path)
            folders |= set(itertools.takewhile(lambda parent: parent != folder, path.parents)) | {folder}
        for path in folders:
            if path.exists():
                sync(path)

    def refusal(self) -> str | None:
        """A store may be read-only."""
        read_only = self.array.store.read_only
        return "is a Zarr array opened for reading; open it with mode='r+'" if read_only else None

    def where(self) -> Path | None:
        """Its folder, where it is stored in one."""
        root = getattr(self.array.store, "root", None)
        return root / self.array.path if isinstance(root, Path) else None

    def meets(self, other: Storage) -> bool:
        """The same array, however it was opened."""
        mine, theirs = self.where(), other.where()
        if not isinstance(other, Zarr) or mine is None or theirs is None:
            return super().meets(other)
        return os.path.samefile(mine, theirs)

    def state(self) -> list[int]:
        """Number and bytes of all its files, and the latest change of one."""
        folder = self.where()
        if folder is None:
            return []
        entries = list(_files(folder))
        return [len(entries), sum(size for size, _ in entries), max((time for _, time in entries), default=0)]


def _files(folder: Path) -> Iterator[tuple[int, int]]:
    """Size and time of every file below ``folder``."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(Path(entry.path))
            else:
                status = entry.stat()
                yield status.st_size, status.st_mtime_ns


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
