"""Warp-wide instructions and asynchronous copies in Numba's CUDA simulator, which has neither.

The simulator gives every CUDA thread a thread of Python. Here the 32 of a warp meet at a barrier, each with its own
operands; one of them computes for all, by the fragment layouts of the PTX ISA, and each takes its part away. A copy
lands when its thread waits for it, and its place is NaN until then: a wait that is missing, or one too few, shows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from gpuconv.backends.numba_cuda import ptx, tensor_tile
from gpuconv.backends.numba_cuda.tensor_shape import TensorTile

_lock = threading.Lock()
_warps: dict[Any, Warp] = {}
_copies = threading.local()


class Warp:
    """Where 32 threads meet."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(32, timeout=60)
        self.given: list[Any] = [None] * 32
        self.made: list[Any] = []

    def together(self, lane: int, operands: Any, compute: Callable[[list[Any]], list[Any]]) -> Any:
        self.given[lane] = operands
        if self.barrier.wait() == 0:
            self.made = compute(self.given)
        self.barrier.wait()
        made = self.made[lane]
        self.barrier.wait()  # nobody hands in the next operands before all have taken their parts
        return made


def _place() -> tuple[int, Warp]:
    """This thread's lane and warp."""
    thread = threading.current_thread()
    with _lock:
        warp = _warps.setdefault((id(thread._manager), thread.thread_id // 32), Warp())
    return thread.thread_id % 32, warp


def _words(array: Any) -> np.ndarray:
    return np.asarray(getattr(array, "_item", array)).reshape(-1).view(np.uint32)


def numbers(words: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers in 32-bit words: one of TF32, of which the low 13 bits are not looked at, or two of 16 bits."""
    if dtype == "float32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    return words.view(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)


LANE = np.arange(32)
G, Q = LANE // 4, LANE % 4


class Core:
    """``ptx.TensorCore`` for the 32 threads of a warp at once: every word is an array of theirs."""

    def __init__(self, memory: Any, at: np.ndarray) -> None:
        self.memory, self.at = _words(memory), at

    def ldmatrix(self, words: int) -> list[np.ndarray]:
        """Lane l gives row l % 8 of matrix l // 8, and gets word l % 4 of row l // 4 of each."""
        at = self.at + words
        assert not (at % 4).any(), "a row begins at a multiple of 16 bytes"
        matrices = self.memory[at[:, None] + np.arange(4)].reshape(4, 8, 4)
        return [matrix[G, Q] for matrix in matrices]

    def mma(self, dtype: str, a: list[Any], b: list[Any], c: list[Any]) -> list[np.ndarray]:
        """a0…a3 are the quarters (0, 0), (8, 0), (0, 4), (8, 4) of 16 rows × 8 words, b0 and b1 the halves of b."""
        left, right, total = np.zeros((16, 8), np.uint32), np.zeros((8, 8), np.uint32), np.zeros((16, 8))
        for quarter, words in enumerate(a):
            left[G + quarter % 2 * 8, Q + quarter // 2 * 4] = words
        for half, words in enumerate(b):
            right[G, Q + half * 4] = words
        places = [(G + element // 2 * 8, 2 * Q + element % 2) for element in range(4)]
        for place, values in zip(places, c, strict=True):
            total[place] = values
        with np.errstate(all="ignore"):
            products = numbers(left, dtype).astype(np.float64) @ numbers(right, dtype).astype(np.float64).T
            exact = products + total
            made = exact.astype(np.float32)
            # Towards zero, as tensor cores were seen to round what they add up.
            beyond = np.isfinite(made) & (np.abs(made) > np.abs(exact))
            made = np.where(beyond, np.nextafter(made, np.float32(0)), made)
        return [made[place] for place in places]

    @staticmethod
    def tf32(word: np.ndarray) -> np.ndarray:
        """To nearest, ties away from zero; infinities and NaN as they are."""
        special = word & np.uint32(0x7F800000) == 0x7F800000
        return np.where(special, word, (word + np.uint32(0x1000)) & np.uint32(0xFFFFE000))

    def rest(self, word: np.ndarray, rounded: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return self.tf32((word.view(np.float32) - rounded.view(np.float32)).view(np.uint32))


def async_copies(pending: int) -> tuple[Callable[..., None], Callable[[], None], Callable[[], None]]:
    def groups() -> list[list[Any]]:
        if not hasattr(_copies, "groups"):
            _copies.groups = [[]]
        return _copies.groups

    def copy(shared: Any, at: Any, source: Any, first: Any, size: Any) -> None:
        to, whole = _words(shared), np.asarray(getattr(source, "_item", source)).reshape(-1)
        assert at % 4 == 0 and (whole.ctypes.data + first * whole.itemsize) % 16 == 0, "16 bytes begin at a multiple"
        lanes = 16 // whole.itemsize
        assert 0 <= first and first + lanes <= whole.size, "16 bytes of the source's own memory"
        read = np.zeros(lanes, whole.dtype)
        read[: size // whole.itemsize] = whole[first:][: size // whole.itemsize]
        to[at : at + 4] = 0xFFFFFFFF  # NaN in every type
        groups()[-1].append((to, at, read.view(np.uint32)))

    def commit() -> None:
        groups().append([])

    def wait() -> None:
        while len(groups()) - 1 > pending:
            for to, at, read in groups().pop(0):
                to[at : at + 4] = read

    return copy, commit, wait


def multiply_slice(tile: TensorTile, way: str) -> Callable[..., None]:
    def multiply(sums: Any, memory: Any, at_o: Any, at_p: Any) -> None:
        def compute(given: list[Any]) -> list[Any]:
            own, of_o, of_p = (np.array(part) for part in zip(*given, strict=True))
            totals = list(own.T)
            tensor_tile.add_slice(tile, way, Core(memory, of_o), Core(memory, of_p), totals)
            return list(np.array(totals).T)

        lane, warp = _place()
        sums[:] = warp.together(lane, (sums.copy(), int(at_o), int(at_p)), compute)

    return multiply


def promote_sums(tile: TensorTile) -> Callable[..., None]:
    def promote(sums: Any, totals: Any) -> None:
        totals[:] += sums[:]
        sums[:] = 0

    return promote


def park_sums(tile: TensorTile) -> Callable[..., None]:
    def park(sums: Any, memory: Any, at: Any) -> None:
        for index in range(tile.sums):
            number, element = divmod(index, 4)
            memory[at + tensor_tile.parking(tile, *divmod(number, tile.columns), element)] = sums[index]

    return park


def only_the_last_block(monkeypatch: Any) -> None:
    """Of grids that no machine has the time for, one of Python least of all, run the block with the largest number."""
    from numba.cuda.simulator import kernel

    class Numpy:
        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        def ndindex(self, *shape: int) -> Any:
            large = math.prod(shape) > 1 << 20
            return [tuple(extent - 1 for extent in shape)] if large else np.ndindex(*shape)

    monkeypatch.setattr(kernel, "np", Numpy())


def install(monkeypatch: Any) -> None:
    """Put these where kernels look for the real ones."""
    monkeypatch.setattr(ptx, "async_copies", async_copies)
    monkeypatch.setattr(tensor_tile, "multiply_slice", multiply_slice)
    monkeypatch.setattr(tensor_tile, "promote_sums", promote_sums)
    monkeypatch.setattr(tensor_tile, "park_sums", park_sums)
