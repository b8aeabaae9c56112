"""Profiles: what is marked ``full`` runs only when -m asks for it; what is marked ``gpu`` needs a usable GPU.

``GPUCONV_TEST_EXAMPLES`` is how many examples each property test of the long profile tries.
"""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}
settings.register_profile("quick", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("simulator", max_examples=8, derandomize=True, **_COMMON)
_EXAMPLES = int(os.environ.get("GPUCONV_TEST_EXAMPLES", "500"))
settings.register_profile("deep", max_examples=_EXAMPLES, print_blob=True, **_COMMON)


def _asks_for_full(config: pytest.Config) -> bool:
    return "full" in config.getoption("-m")


def pytest_configure(config: pytest.Config) -> None:
    # Numba's CUDA simulator takes a second for what a GPU does in a microsecond.
    simulated = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
    quick = "simulator" if simulated else "quick"
    if simulated:
        _share_once()
    settings.load_profile("deep" if _asks_for_full(config) else quick)
    if _asks_for_full(config):
        os.environ["GPUCONV_TEST_LONG"] = "1"  # the children's too


def _share_once() -> None:
    """Have the simulator's threads share their arrays: it looks one up, and makes it, with no lock."""
    from numba.cuda.simulator import kernelapi

    initialise = kernelapi.FakeCUDAShared.__init__

    def initialised(self, size):
        initialise(self, size)
        self._allocations = _Allocations()

    kernelapi.FakeCUDAShared.__init__ = initialised


class _Allocations(dict):
    """Between ``get``, which finds nothing, and the item that follows, no other thread finds nothing."""

    def __init__(self):
        super().__init__()
        self._making = threading.Lock()

    def get(self, place):
        self._making.acquire()
        found = super().get(place)
        if found is not None:
            self._making.release()
        return found

    def __setitem__(self, place, array):
        super().__setitem__(place, array)
        self._making.release()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _asks_for_full(config):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        from gpuconv import dispatch

        reason = dispatch.implementation("cupy.gemm").unavailable()
        if os.environ.get("GPUCONV_TEST_FAKE_CUPY") == "1":
            reason = "a stand-in for CuPy is no GPU"
        if reason is not None:
            pytest.skip(reason)
