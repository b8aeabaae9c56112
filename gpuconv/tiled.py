"""``conv2d_tiled``: the convolution of images larger than memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv import arrays, dispatch, dtypes, request
from gpuconv.arrays import Operand
from gpuconv.problem import Conv2dProblem
from gpuconv.tiling import storage
from gpuconv.tiling.job import Job
from gpuconv.tiling.storage import Storage

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
    k : array_like
        The kernel, as for ``conv2d``; it is in memory.
    out : array
        Where the result goes: any of the same kinds, of the result's shape and dtype, apart from ``source``. Tiles
        are whole chunks of it (of Zarr shards, whole shards), so that none is written twice.
    bias, stride, padding, dilation, groups, padding_mode, padding_value, flip, layout, kernel_layout, activation, \
dtype, precision, device, backend
        As for ``conv2d``.
    workspace_limit : int, optional
        Bytes of memory that the call may take besides k and the bias, default 256 MiB. A quarter is for ``conv2d``'s
        scratch. In the rest lie two windows and two results of tiles, and what reading and writing copy on the way:
        chunks that are decoded or encoded, pages of a memory map.
    resume : bool or path, default False
        Keep a record of finished tiles in this file, or for True in one beside out's (``<name>.tiles.json``). A call
        that finds the record of the same call, killed or failed, goes on where that stopped; it is removed when all
        is done. Each tile is then flushed to the disk before it is recorded. One run at a time may use a record.
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
    One implementation computes all tiles: the one that ``conv2d`` would run on the whole image, where it can within the
    limit. Integers come out exactly as from ``conv2d``; floating-point results keep the promise of ``precision``, and
    at ``"highest"`` that implementation, if it is one of ``numba_cpu``, gives the same bits as in one call, but for
    ``numba_cpu.fft`` and ``numba_cpu.fft_lines``, whose results are the exact ones rounded once, bar one in some
    millions.

    A file whose writer was killed is as safe as its format. Memory maps and local Zarr stores lose nothing that was
    recorded; HDF5 gives no such promise for a file that was open.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(48.0).reshape(6, 8)  # in earnest np.load("large.npy", mmap_mode="r"), or a Zarr array
    >>> smooth = np.empty((6, 8))
    >>> _ = conv2d_tiled(image, np.full((3, 3), 1 / 9), smooth, padding="same", padding_mode="reflect")
    >>> smooth[0].round(2)
    array([ 6.  ,  6.33,  7.33,  8.33,  9.33, 10.33, 11.33, 11.67])
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
    target, _ = request.told_by_values(problem, target, backend, arrays.operand(_CALL, "k", kernel))
    with _bar(progress) as bar:
        if problem.result_size:
            Job(_CALL, problem, image, kernel, offset, result, target, backend, limit, path).run(bar)
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
