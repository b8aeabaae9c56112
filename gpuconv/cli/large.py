"""`gpuconv filter` for images of numbers, larger than memory if need be: Zarr, .npy and TIFF, by ``conv2d_tiled``.

The numbers are kept as they are. Integers stay integers of the same type, rounded to the nearest and clipped to its
range, which is what one wants of a smoothed micrograph; what was clipped is counted and said, because of an edge filter
half would be. ``--dtype float32`` keeps every response.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np

import gpuconv
from gpuconv import dtypes
from gpuconv.cli.base import Failure, say
from gpuconv.tiling import storage
from gpuconv.tiling.storage import Storage

_TIFF = (".tif", ".tiff")
_KINDS = ".zarr, .npy or .tif"
_LARGE = 64 << 20  # bytes of a TIFF file that is no photo any more
_CHUNK = 1024  # rows and columns of a chunk of a new Zarr array

_DTYPES = ("float32", "float64", "uint8", "int8", "uint16", "int16", "uint32", "int32")
_Command = TypeVar("_Command", bound=Callable[..., Any])


def _bytes(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """``512MiB``, ``2G`` (all of them powers of 1024) or a number of bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15})\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size such as 512MiB")
    return int(match[1]) << 10 * " kmgt".index(match[2] or " ")


def options(command: _Command) -> _Command:
    """Add ``--dtype``, ``--workspace-limit`` and ``--resume``."""
    for option in (
        click.option(
            "--resume", is_flag=True, help="Of numbers: go on where a killed run stopped; keep what this one finishes."
        ),
        click.option(
            "--workspace-limit", callback=_bytes, metavar="SIZE", help="Of numbers: memory to take.  [default: 256MiB]"
        ),
        click.option(
            "--dtype", type=click.Choice(_DTYPES), help="Of numbers: what to store.  [default: as in the image]"
        ),
    ):
        command = option(command)
    return command


def takes(photo: Path, output: Path, asked: bool) -> bool:
    """Whether numbers are filtered, not a picture; ``asked`` is whether one of the options here was given."""
    if _is_zarr(photo) or photo.suffix.lower() == ".npy" or output.suffix.lower() in (".zarr", ".npy"):
        return True
    tiff = photo.suffix.lower() in _TIFF and output.suffix.lower() in _TIFF
    if asked and not tiff:
        raise click.UsageError(f"--dtype, --workspace-limit and --resume are for {_KINDS}, from one to the other")
    return tiff and (asked or (photo.is_file() and photo.stat().st_size > _LARGE))


def filter_numbers(
    photo: Path,
    weights: Any,
    output: Path,
    padding_mode: str,
    gain: float,
    device: str | None,
    backend: str | None,
    dtype: str | None,
    workspace_limit: int | None,
    resume: bool,
) -> dict[str, Any]:
    """Filter every plane or channel of the image in ``photo``; what was done, for a line or as JSON."""
    kind = output.suffix.lower()
    if kind not in (".zarr", ".npy", *_TIFF):
        raise ValueError(f"cannot write {output}: an image of numbers goes to {_KINDS}")
    if output.is_dir():
        raise ValueError(f"cannot write {output}: it exists and is a folder; delete it or choose another name")
    target = Path(os.path.realpath(output))  # through a link: what it points to is replaced, not the link
    work = target.with_name(f"{target.name}.partial")
    if work.is_symlink():  # whose it is, we cannot know, nor what it points to
        raise ValueError(f"cannot write {output}: {work} is a link; delete it")
    with ExitStack() as files:
        image, axes, tags = _opened(photo, files)
        summed, stored = _types(image.dtype, dtype)
        k = (weights * gain).astype(summed)
        arguments: dict[str, Any] = {"padding": "same", "padding_mode": padding_mode, "dtype": summed}
        if image.array.ndim > 2:
            last = axes == "last"
            channels = image.shape[-1 if last else -3]
            k = np.broadcast_to(k, (channels, 1, *k.shape))
            arguments |= {"groups": channels, "layout": "NHWC" if last else "NCHW"}
        start = time.perf_counter()
        with _kept(output, work, target, resume):
            record = work.with_name(f"{work.name}.tiles.json")
            made = _output(work, kind, image, stored, axes, tags, resume and record.exists())
            out = storage.of("filter", "out", made)
            out.rounding = dtypes.is_integer(stored)
            gpuconv.conv2d_tiled(
                image, k, out, **arguments, device=device, backend=backend, workspace_limit=workspace_limit,
                resume=resume, progress=sys.stderr.isatty(),
            )  # fmt: skip
            if hasattr(made, "flush"):
                made.flush()
            clipped = out.clipped
            del made, out  # Windows renames no file that is mapped
    if clipped:
        share = 100 * clipped / max(np.prod(image.shape, dtype=object), 1)
        say(
            f"warning: {output}: {clipped} responses ({share:.2g} %) lay beyond {stored}'s range and were clipped; "
            "--dtype float32 keeps them"
        )
    return {
        "photo": str(photo), "output": str(output), "shape": list(image.shape), "dtype": stored,
        "kernel_size": list(weights.shape), "clipped": clipped, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def as_line(facts: dict[str, Any]) -> str:
    """What was done, in a line."""
    shape, taps = (" × ".join(map(str, facts[key])) for key in ("shape", "kernel_size"))
    return f"{shape} {facts['dtype']} with a {taps} kernel in {facts['seconds']:.1f} s → {facts['output']}"


def _is_zarr(path: Path) -> bool:
    """A Zarr array, or one inside a Zarr group: ``image.zarr/0``."""
    return any(part.lower().endswith(".zarr") for part in path.parts)


def _types(given: str, dtype: str | None) -> tuple[str, str]:
    """What an image of dtype ``given`` is summed in, and what is stored."""
    if given in ("complex64", "complex128"):
        if dtype is not None:
            raise ValueError(f"the image holds {given}, which --dtype {dtype} cannot")
        return given, given
    wide = "float64" in (given, dtype) or any("int32" in str(name) or "int64" in str(name) for name in (given, dtype))
    summed = "float64" if wide else "float32"
    if dtype is not None:
        return (summed, dtype) if dtypes.is_integer(dtype) else (dtype, dtype)
    return summed, given if dtypes.is_integer(given) and given not in ("bool", "int64") else summed


class _Pages(storage.Zarr):
    """A compressed or tiled TIFF, which tifffile shows as a Zarr array; its file tells whether it has changed."""

    path: Path

    def where(self) -> Path | None:
        """The TIFF file."""
        return self.path

    def state(self) -> list[int]:
        """Of the file."""
        return Storage.state(self)


def _opened(photo: Path, files: ExitStack) -> tuple[Storage, str, dict[str, Any]]:
    """The image, whether its channels come "last" or its planes "first", and what a TIFF says of its pixels' size."""
    tags: dict[str, Any] = {}
    try:
        if _is_zarr(photo):
            array: Any = _zarr_array(photo)
        elif photo.suffix.lower() == ".npy":
            array = np.load(photo, mmap_mode="r", allow_pickle=False)
        elif photo.suffix.lower() in _TIFF:
            return _tiff(photo, files)
        else:
            raise ValueError(f"an image of numbers is read from {_KINDS}")
        image = storage.of("filter", "the image", array)
        few = [axis for axis in (-1, -3) if len(image.shape) > 2 and image.shape[axis] <= 4]
        axes = "last" if few and few[0] == -1 else "first"
        _check_rank(image)
    except ModuleNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot read {photo}: {error.strerror or error}") from error
    except Exception as error:  # a damaged header raises nearly anything
        raise ValueError(f"cannot read {photo}: {error or type(error).__name__}") from error
    return image, axes, tags


def _check_rank(image: Storage) -> None:
    if not 2 <= len(image.shape) <= 4:
        raise ValueError(
            f"has shape {image.shape}; an image is (H, W), (H, W, C) with up to 4 channels, (planes, H, W), or "
            "several of one of the last two"
        )


def _zarr_array(photo: Path) -> Any:
    zarr = _library("zarr")
    if not photo.exists():
        raise ValueError("No such file or directory")
    found = zarr.open(photo, mode="r")
    if isinstance(found, zarr.Group):
        names = ", ".join(f"{photo / name}" for name, _ in sorted(found.arrays())) or "none"
        raise ValueError(f"it is a group; the arrays in it: {names}")
    return found


def _tiff(photo: Path, files: ExitStack) -> tuple[Storage, str, dict[str, Any]]:
    tifffile = _library("tifffile")
    tiff = files.enter_context(tifffile.TiffFile(photo))
    series, page = tiff.series[0], tiff.pages.first
    axes = series.axes
    # RGB: S is a sample of a pixel. Everything else that is not Y or X counts planes.
    if not axes.endswith(("YX", "YXS")):
        raise ValueError(f"its axes are {axes}; they must end with YX or YXS")
    tags = {"resolution": page.resolution, "resolutionunit": page.resolutionunit}
    if series.dataoffset is not None and not page.is_tiled and series.dtype.isnative:
        image = storage.of("filter", "the image", tifffile.memmap(photo, mode="r"))
    else:
        pages = _Pages(_library("zarr").open_array(series.aszarr(level=0), mode="r"))
        pages.path = Path(os.path.realpath(photo))
        image = pages
        dtypes.name_of("filter", "the image has dtype", image.array.dtype)
    _check_rank(image)
    return image, "last" if axes.endswith("S") else "first", tags


def _library(name: str) -> Any:
    try:
        if name == "zarr":
            import zarr

            return zarr
        import tifffile

        return tifffile
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name:
            raise
        raise Failure(f'this file takes {name}, which is not installed; pip install "gpuconv[zarr]"') from None


def _output(work: Path, kind: str, image: Storage, dtype: str, axes: str, tags: dict[str, Any], resumed: bool) -> Any:
    """The file or folder to write to; the one of an unfinished run where it is ``resumed``."""
    shape = image.shape
    if kind == ".npy":
        if resumed:
            return np.load(work, mmap_mode="r+", allow_pickle=False)
        return np.lib.format.open_memmap(work, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if kind == ".zarr":
        zarr = _library("zarr")
        if resumed:
            return zarr.open_array(work, mode="r+")
        if work.exists():
            shutil.rmtree(work)
        chunks, shards = image.read_chunks, None
        if isinstance(image, storage.Zarr):
            shards = image.write_chunks if image.write_chunks != chunks else None
        else:
            pixels = 2 if axes == "first" else 3
            whole = (1,) * (len(shape) - pixels) + shape[-pixels:]
            chunks = tuple(min(extent, _CHUNK) for extent in whole)
        return zarr.create_array(work, shape=shape, chunks=chunks, shards=shards, dtype=dtype)
    tifffile = _library("tifffile")
    if resumed:
        return tifffile.memmap(work, mode="r+")
    size = int(np.prod(shape, dtype=object)) * dtypes.itemsize(dtype)
    colour = axes == "last" and shape[-1] in (3, 4)
    form = {"photometric": "rgb" if colour else "minisblack", "bigtiff": size > 3_900_000_000}
    if axes == "last":
        form["planarconfig"] = "contig"
    return tifffile.memmap(work, shape=shape, dtype=dtype, **form, **tags)


@contextmanager
def _kept(output: Path, work: Path, target: Path, resume: bool) -> Iterator[None]:
    """Write to ``work``, which becomes ``target``, the place of ``output``, when all is done; what failed is deleted
    unless it is to be resumed.
    """
    try:
        yield
        os.replace(work, target)
    except BaseException as error:
        if not resume:
            _delete(work)
        if isinstance(error, KeyboardInterrupt) and resume:
            say(f"what is finished is kept in {work}; the same command goes on from there")
        notes = getattr(error, "__notes__", ())
        if not isinstance(error, Exception) or not (notes or isinstance(error, OSError)):
            raise
        told = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise ValueError(". ".join([told, *notes]) if notes else f"cannot write {output}: {told}") from error


def _delete(work: Path) -> None:
    if work.is_dir():
        shutil.rmtree(work, ignore_errors=True)
    else:
        with suppress(OSError):  # the error that led here says more
            work.unlink(missing_ok=True)
