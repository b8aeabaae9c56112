"""Nothing grows from call to call, and nothing is kept alive: operands, results, exceptions, caches."""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import calls
import numpy as np
import pytest

import gpuconv
from gpuconv import explain

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc and limits the address space")
pytestmark = pytest.mark.skipif(
    any(os.environ.get(name) == "1" for name in ("NUMBA_ENABLE_CUDASIM", "GPUCONV_TEST_FAKE_CUPY")),
    reason="this process is a child itself",
)

# ---- no growth

GROWTH = """
import gc, itertools, json, resource, tracemalloc
import numpy as np
import calls, gpuconv
from gpuconv import dispatch

# One of each kind: what the first calls have not compiled would be compiled later, and stay.
DTYPES = "float32", "uint8", "complex64"

def varied(first, count):
    "Runs ``count`` calls, of problems no two alike: every operator and implementation; one in five is refused."
    names = [name for name in calls.usable("cpu") if not name.startswith("numba_cpu") or name == "numba_cpu.strip"]
    done = 0
    for seed in itertools.count(first):
        rng = np.random.default_rng(seed)
        pick = lambda low, high: int(rng.integers(low, high, endpoint=True))
        g = calls.Geometry(
            pick(1, 3), pick(1, 3), pick(1, 4), pick(1, 4), pick(5, 12), pick(5, 12), pick(1, 3), pick(1, 3),
            (pick(1, 3), pick(1, 3)), (pick(0, 2), pick(0, 2)), (pick(1, 2), pick(1, 2)),
        )
        wrong = {0: {"workspace_limit": -1}, 1: {"workspace_limit": 1}}.get(seed % 10, {})
        for call in calls.make(g, DTYPES[seed % len(DTYPES)], exact=False, seed=seed):
            # What gpuconv chooses, in the long run alone: of most sizes it has a kernel that others do not run.
            for options in [{"backend": name} for name in calls.serving(call, names)] + [{}] * (COUNT >= 10_000):
                try:
                    call.run(**options | wrong)
                except (ValueError, MemoryError, gpuconv.NoBackendError):
                    pass
                done += 1
        if done >= count:
            return seed + 1

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

figures, seed = [], 0
varied(0, 400 + COUNT)  # the same before, and some more: compiled kernels, and what Numba remembers of them, stay
tracemalloc.start()
for count in (200, COUNT // 2, COUNT - COUNT // 2):
    seed = varied(seed, count)
    plans = dispatch.choose.cache_info()
    assert plans.currsize <= plans.maxsize
    gpuconv.clear()
    gc.collect()
    figures.append((tracemalloc.get_traced_memory()[0], resident()))
print(json.dumps(figures))
"""


@linux
@pytest.mark.parametrize("count", [700, pytest.param(10_000, marks=pytest.mark.full)])
def test_varied_calls_leave_nothing_behind(count, record_property):
    """After a warm-up of 200 calls; cached plans are bounded (``test_dispatch``) and released before each figure."""
    script = GROWTH.replace("COUNT", str(count))
    traced, resident = zip(*json.loads(calls.child(script, limit=600, OPENBLAS_NUM_THREADS="1")), strict=True)
    record_property("traced", traced)
    record_property("resident", resident)
    assert traced[-1] - traced[0] <= 50_000, traced
    assert resident[-1] - resident[0] <= 8 * 2**20, resident


def test_every_cache_is_bounded():
    modules = [gpuconv]
    for module in pkgutil.walk_packages(gpuconv.__path__, "gpuconv."):
        if module.name != "gpuconv.__main__":
            modules.append(importlib.import_module(module.name))
    caches = {
        f"{module.__name__}.{name}": value.cache_info().maxsize
        for module in modules
        for name, value in vars(module).items()
        if hasattr(value, "cache_info")
    }
    assert caches["gpuconv.dispatch.choose"], caches
    assert all(size is not None and size <= 4096 for size in caches.values()), caches


# ---- nothing is kept alive


class Watched:
    """An array library whose ``asarray`` copies, and remembers the copies weakly."""

    def __init__(self) -> None:
        self.arrays: list[weakref.ref[np.ndarray]] = []

    def asarray(self, array: np.ndarray) -> np.ndarray:
        copy = array.copy()
        self.arrays.append(weakref.ref(copy))
        return copy

    def alive(self) -> int:
        return sum(array() is not None for array in self.arrays)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """An array that only the cycle collector would free stays."""
    explain((3, 5, 5), (2, 3, 3, 3))  # imports Numba, which leaves cycles of its own around the caller's frames
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def run_and_drop(watched: Watched, attempt: Callable[[calls.Call, str], Any]) -> int:
    """``attempt`` every call on every implementation; how many there were."""
    attempts = 0
    for dtype in ("float32", "float16", "int8"):
        for call in calls.make(calls.GEOMETRIES[1], dtype, xp=watched):
            for name in calls.serving(call, calls.usable("cpu")):
                attempt(call, name)
                attempts += 1
    return attempts


def test_results_and_operands_die_with_their_last_name(no_collector):
    watched = Watched()

    def attempt(call: calls.Call, name: str) -> None:
        result = call.run(backend=name)
        watched.arrays.append(weakref.ref(result))
        into = np.empty_like(result)
        watched.arrays.append(weakref.ref(into))
        assert call.run(backend=name, out=into) is into
        if call.op == "forward":
            explain(np.ones((3, 5, 5)), np.ones((2, 3, 3, 3)), backend=name)

    assert run_and_drop(watched, attempt) >= 6
    assert watched.alive() == 0


REFUSED = {
    "a bad backend": {"backend": "numpy.nothing"},
    "a bad device": {"device": "cuda:x"},
    "a bad limit": {"workspace_limit": -1},
    "a bad stream": {"stream": "7"},
    "a bad out": {"out": np.empty((1, 1))},
    "no backend": {"backend": "numba_cuda"},
    "no memory": {"workspace_limit": 1},
}


@pytest.mark.parametrize("why", REFUSED)
def test_an_exception_keeps_nothing_alive_once_it_is_gone(why, no_collector):
    if why == "no backend" and "numba_cuda.direct" in calls.usable():
        pytest.skip("numba_cuda can run here")
    watched, raised = Watched(), []

    def attempt(call: calls.Call, name: str) -> None:
        try:
            call.run(**{"backend": name} | REFUSED[why])
            if why == "no memory" and call.op == "fold":
                raised.append(type(None))  # it may add up in the result itself, and need no scratch
        except (ValueError, TypeError, MemoryError, gpuconv.NoBackendError) as error:
            raised.append(type(error))

    gpuconv.clear()
    attempts = run_and_drop(watched, attempt)
    assert len(raised) == attempts, f"{why} was let through"
    assert watched.alive() == 0
