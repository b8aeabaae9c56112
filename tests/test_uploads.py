"""What the CUDA implementations keep in a GPU's memory from call to call: for every stream, bounded, by device.

On a stand-in for Numba's streams and memory. ``test_replay_simulated.py`` has the calls that use it.
"""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from running import SIMULATED

if SIMULATED:
    pytest.skip("this process is the simulator", allow_module_level=True)

from gpuconv.backends.numba_cuda import launch, uploads
from gpuconv.problem import Conv2dProblem


class Stream:
    """Copies when it is waited for."""

    def __init__(self, ptr: int = 0) -> None:
        self.ptr, self.asked, self.waits = ptr, [], 0

    def synchronize(self) -> None:
        self.waits += 1
        while self.asked:
            self.asked.pop(0)()


class Vector:
    def __init__(self, size: int, dtype: Any) -> None:
        self.found = np.full(size, -1, dtype)

    def copy_to_device(self, values: np.ndarray, stream: Stream) -> None:
        stream.asked.append(lambda: np.copyto(self.found, values))


@pytest.fixture
def gpu(monkeypatch):
    """The streams that were made, plain and non-blocking, and the current device."""
    cuda = pytest.importorskip("numba.cuda", reason="numba-cuda is not installed")
    facts = SimpleNamespace(device=0, plain=[], own=[], uploads=0)

    def plain() -> Stream:
        facts.plain.append(Stream())
        return facts.plain[-1]

    def own(non_blocking: bool) -> SimpleNamespace:
        assert non_blocking, "else it waits for what others asked of the default stream"
        facts.own.append(Stream(0x1000 + len(facts.own)))
        return facts.own[-1]

    def vector(shape: tuple[int], dtype: Any) -> Vector:
        facts.uploads += 1
        return Vector(shape[0], dtype)

    monkeypatch.setattr(cuda, "stream", plain)
    monkeypatch.setattr(cuda, "external_stream", lambda ptr: next(s for s in facts.own if s.ptr == ptr))
    monkeypatch.setattr(cuda, "device_array", vector)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Stream=own)))
    monkeypatch.setattr(uploads, "_device", lambda: facts.device)
    monkeypatch.setattr(launch, "resident", lambda array: array == "on the GPU")
    return facts


@pytest.mark.parametrize("like", ["on the GPU", "in host memory"])
def test_a_table_is_there_before_any_stream_reads_it(gpu, like):
    """It is asked for on stream A, whose earlier work is not waited for, and used on stream B without a wait."""
    kept, a, b = uploads.Uploads(), Stream(), Stream()
    first = kept.get(like, a, np.arange, 5)
    assert first.found.tolist() == [0, 1, 2, 3, 4]
    assert kept.get(like, b, np.arange, 5) is first
    assert (a.waits, b.waits, gpu.uploads) == (0, 0, 1)
    assert [len(gpu.own), len(gpu.plain)] == ([1, 0] if like == "on the GPU" else [0, 1])


def test_devices_have_their_own(gpu):
    kept = uploads.Uploads()
    found = []
    for gpu.device in (0, 1, 0, 1):
        found.append(kept.get("on the GPU", 0, np.arange, 5))
    assert found[0] is found[2] is not found[1] and found[1] is found[3]
    assert gpu.uploads == 2


def test_what_is_kept_is_bounded(gpu, monkeypatch):
    """In number and in bytes, the least recently used dropped first; one too large is uploaded on the call's stream."""
    kept = uploads.Uploads()
    first = kept.get("on the GPU", 0, np.arange, 1)
    for size in range(2, uploads._COUNT + 40):
        kept.get("on the GPU", 0, np.arange, size)
        assert kept.get("on the GPU", 0, np.arange, 1) is first, "just used"
    assert len(kept._found) == uploads._COUNT
    before = gpu.uploads
    kept.get("on the GPU", 0, np.arange, 2)
    assert gpu.uploads == before + 1
    for more in range(20):
        kept.get("on the GPU", 0, np.arange, uploads._LARGEST // 8 - more)
    assert kept._bytes == sum(size for _, size in kept._found.values()) <= uploads._BYTES
    asked = []
    monkeypatch.setattr(launch, "vector", lambda *given: asked.append(given) or "for this call")
    assert kept.get("on the GPU", "its stream", np.arange, uploads._LARGEST // 8 + 1) == "for this call"
    ((_, values, _, on),) = asked
    assert (len(values), on) == (uploads._LARGEST // 8 + 1, "its stream")
    kept.cache_clear()
    assert (len(kept._found), kept._bytes) == (0, 0)


def test_threads_that_ask_at_once_get_the_same_values(gpu):
    kept, barrier = uploads.Uploads(), threading.Barrier(8)

    def make(size: int) -> np.ndarray:
        barrier.wait()  # all have missed it
        return np.arange(size)

    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(kept.get("on the GPU", 0, make, 9))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [vector.found.tolist() for vector in found] == [list(range(9))] * 8
    assert (len(kept._found), kept._bytes) == (1, 9 * 8)


@pytest.mark.parametrize("line", [
    "n1c1h9w7_o1kh3kw2_p1_f32", "n1c1h9w7_o1kh3kw2_s2x3d2p4x0_f32", "n1c1h5w5_o1kh3kw3_d100p100_f32",
    "n1c1h9w7_o1kh3kw2_p3_reflect_f32",
])  # fmt: skip
def test_the_tables_are_those_of_the_problem(gpu, line):
    """The steps too, which are known without the table."""
    problem = Conv2dProblem.parse(line)
    uploads.KEPT.cache_clear()
    rows, row_outer, row_inner, columns, column_outer, column_inner = uploads.index_tables(problem, "on the GPU", 0)
    uploads.KEPT.cache_clear()
    wanted = problem.tables()
    assert rows.found.tolist() == wanted[0].index.tolist()
    assert columns.found.tolist() == wanted[1].index.tolist()
    assert (row_outer, row_inner) == (wanted[0].outer, wanted[0].inner)
    assert (column_outer, column_inner) == (wanted[1].outer, wanted[1].inner)
    assert (len(rows.found), len(columns.found)) == problem.table_spans(problem.OH, problem.OW)


def test_a_gpu_without_memory_is_a_memory_error(monkeypatch):
    """With the number of bytes; other errors of the driver go through."""
    cuda = pytest.importorskip("numba.cuda", reason="numba-cuda is not installed")
    error = launch.driver_error()
    codes = [2]

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise error(codes[0], "Call to cuMemAlloc results in an error")

    for name in ("device_array", "to_device"):
        monkeypatch.setattr(cuda, name, refuse)
    host = np.zeros((2, 3), np.float32)
    tries = (
        lambda: launch.flat(host),
        lambda: launch.scratch(host, np.dtype("float64"), 3),
        lambda: launch.output(host).__enter__(),
    )
    for attempt in tries:
        with pytest.raises(MemoryError, match=r"a GPU has no 24 bytes free .*cuMemAlloc"):
            attempt()
    codes[0] = 999
    for attempt in tries:
        with pytest.raises(error):
            attempt()
