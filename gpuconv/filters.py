"""Kernels for pictures: the ones the command line knows by name, and those it reads from files.

Signs are those of cross-correlation, as everywhere in this library: ``vertical-edges`` is positive where the left is
brighter than the right, ``sobel-x`` where the right is.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NamedKernel:
    """Integer ``rows`` over one ``divisor``: exact, and printable as a textbook writes it."""

    name: str
    rows: tuple[tuple[int, ...], ...]
    about: str
    divisor: int = 1

    @property
    def weights(self) -> Weights:
        """The kernel as float64 of shape (KH, KW)."""
        return np.array(self.rows, dtype=np.float64) / self.divisor


def _binomial(size: int) -> tuple[tuple[int, ...], ...]:
    """The outer square of Pascal's row: the integer Gaussian of ``size`` taps."""
    row = [1]
    for _ in range(size - 1):
        row = [a + b for a, b in zip([0, *row], [*row, 0], strict=True)]
    return tuple(tuple(a * b for b in row) for a in row)


def _box(size: int) -> tuple[tuple[int, ...], ...]:
    return ((1,) * size,) * size


def _derivative(side: int, centre: int) -> tuple[tuple[int, ...], ...]:
    """A horizontal central difference, smoothed down the columns by (side, centre, side)."""
    return tuple((-weight, 0, weight) for weight in (side, centre, side))


def _turned(rows: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(zip(*rows, strict=True))


_ALL = (
    NamedKernel("identity", ((0, 0, 0), (0, 1, 0), (0, 0, 0)), "leaves the picture as it is"),
    NamedKernel("vertical-edges", ((1, 0, -1),) * 3, "left brighter than right: positive"),
    NamedKernel("horizontal-edges", ((1, 1, 1), (0, 0, 0), (-1, -1, -1)), "top brighter than bottom: positive"),
    NamedKernel("diagonal-edges-down", ((0, 1, 1), (-1, 0, 1), (-1, -1, 0)), "edges that run down to the right"),
    NamedKernel("diagonal-edges-up", ((1, 1, 0), (1, 0, -1), (0, -1, -1)), "edges that run up to the right"),
    NamedKernel("sobel-x", _derivative(1, 2), "horizontal gradient, smoothed 1-2-1"),
    NamedKernel("sobel-y", _turned(_derivative(1, 2)), "vertical gradient, smoothed 1-2-1"),
    NamedKernel("scharr-x", _derivative(3, 10), "horizontal gradient, nearly isotropic"),
    NamedKernel("scharr-y", _turned(_derivative(3, 10)), "vertical gradient, nearly isotropic"),
    NamedKernel("prewitt-x", _derivative(1, 1), "horizontal gradient, plain mean"),
    NamedKernel("prewitt-y", _turned(_derivative(1, 1)), "vertical gradient, plain mean"),
    NamedKernel("laplacian", ((0, 1, 0), (1, -4, 1), (0, 1, 0)), "second derivative, 4 neighbours"),
    NamedKernel("laplacian-8", ((1, 1, 1), (1, -8, 1), (1, 1, 1)), "second derivative, 8 neighbours"),
    NamedKernel("box-3", _box(3), "mean of 3×3 pixels", 9),
    NamedKernel("box-5", _box(5), "mean of 5×5 pixels", 25),
    NamedKernel("box-7", _box(7), "mean of 7×7 pixels", 49),
    NamedKernel("gaussian-3", _binomial(3), "blur, standard deviation 0.7 pixels", 16),
    NamedKernel("gaussian-5", _binomial(5), "blur, standard deviation 1 pixel", 256),
    NamedKernel("gaussian-7", _binomial(7), "blur, standard deviation 1.2 pixels", 4096),
    NamedKernel("sharpen", ((0, -1, 0), (-1, 5, -1), (0, -1, 0)), "the picture minus its Laplacian"),
    NamedKernel("emboss", ((-2, -1, 0), (-1, 1, 1), (0, 1, 2)), "relief lit from the upper left"),
)

KERNELS: dict[str, NamedKernel] = {kernel.name: kernel for kernel in _ALL}


def is_zero_sum(weights: Weights) -> bool:
    """Whether the weights cancel, up to the rounding of their decimal form: a flat picture gives 0."""
    return bool(abs(weights.sum()) <= 1e-6 * np.abs(weights).sum())


def kernel_from(text: str) -> Weights:
    """The kernel called ``text``, or the one in the file of that name.

    Parameters
    ----------
    text : str
        A name in ``KERNELS``, or the path of a ``.npy``, ``.txt``, ``.csv`` or ``.json`` file.

    Returns
    -------
    numpy.ndarray
        float64 of shape (KH, KW), all finite in float32.

    Raises
    ------
    ValueError
        In one line: no such name (near ones are suggested), or what is wrong with the file.
    """
    if text in KERNELS:
        return KERNELS[text].weights
    path = Path(text)
    # A word that is neither a file nor looks like one was meant as a name.
    if not (path.suffix or path.name != text or path.is_file()):
        near = difflib.get_close_matches(text.lower().replace("_", "-"), KERNELS, n=3, cutoff=0.5)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"no kernel is called {text!r}{meant}; the names are {', '.join(KERNELS)}")
    return _from_file(path)


def numbers_from(path: Path, what: str = "file") -> npt.NDArray[Any]:
    """The numbers in a file; ValueError, in one line that calls it ``what``, where it cannot be read."""
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{what} {path}: the extension must be one of {', '.join(_READERS)}")
    try:
        return _READERS[path.suffix.lower()](path)
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror or error}") from error
    # A damaged file can trip a reader in any of these ways (a .npy header may claim any size).
    except (ValueError, EOFError, MemoryError, OverflowError, RecursionError) as error:
        raise ValueError(f"{what} {path}: {error or type(error).__name__}") from error


def _from_file(path: Path) -> Weights:
    values = numbers_from(path, "kernel file")
    if values.dtype.kind not in "iuf":
        raise ValueError(f"kernel file {path}: holds values of type {values.dtype}, not real numbers")
    if values.ndim != 2:
        raise ValueError(f"kernel file {path}: a kernel has rows and columns, but the array has shape {values.shape}")
    if values.size == 0:
        raise ValueError(f"kernel file {path}: holds no numbers")
    weights = values.astype(np.float64)
    # Pictures are filtered in float32, where a larger weight would be infinite.
    if not np.all(np.abs(weights) <= np.finfo(np.float32).max):
        raise ValueError(f"kernel file {path}: holds NaN, infinity or a number too large for float32")
    return weights


def _read_npy(path: Path) -> npt.NDArray[Any]:
    with path.open("rb") as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _read_text(path: Path) -> npt.NDArray[Any]:
    """Rows of numbers; commas, semicolons and blanks separate, ``#`` begins a comment."""
    rows: list[list[float]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").replace(";", " ").split()
        row = []
        for word in words:
            try:
                row.append(float(word))
            except ValueError:
                raise ValueError(f"line {number}: {word[:40]!r} is not a number") from None
        if rows and row and len(row) != len(rows[0]):
            raise ValueError(f"line {number}: has {len(row)} numbers where the first row has {len(rows[0])}")
        if row:
            rows.append(row)
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 0)


def _read_json(path: Path) -> npt.NDArray[Any]:
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    if not (isinstance(data, list) and data and all(isinstance(row, list) for row in data)):
        raise ValueError("must be a list of rows, each a list of numbers")
    for row in data:
        if len(row) != len(data[0]):
            raise ValueError(f"a row has {len(row)} numbers where the first has {len(data[0])}")
        for item in row:
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                raise ValueError(f"{json.dumps(item)[:40]} is not a number")
    return np.array([[float(item) for item in row] for row in data], dtype=np.float64)


_READERS: dict[str, Callable[[Path], npt.NDArray[Any]]] = {
    ".npy": _read_npy,
    ".txt": _read_text,
    ".csv": _read_text,
    ".json": _read_json,
}
