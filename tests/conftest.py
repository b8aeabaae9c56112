"""Profiles: what is marked ``full`` runs only when -m asks for it; what is marked ``gpu`` needs a usable GPU.

``GPUCONV_TEST_EXAMPLES`` is how many examples each property test of the long profile tries.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import simulator
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}
settings.register_profile("quick", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("simulator", max_examples=8, derandomize=True, **_COMMON)
_EXAMPLES = int(os.environ.get("GPUCONV_TEST_EXAMPLES", "500"))
settings.register_profile("deep", max_examples=_EXAMPLES, print_blob=True, **_COMMON)


# The quick profile's tests of half a minute come first, so that no worker is left alone with one at the end.
LONGEST = ("test_implementation_tests_on_the_stand_in", "test_kernels_in_the_simulator", "test_in_the_simulator")


def _asks_for_full(config: pytest.Config) -> bool:
    return "full" in config.getoption("-m")


def pytest_configure(config: pytest.Config) -> None:
    # Numba's CUDA simulator takes a second for what a GPU does in a microsecond.
    simulated = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
    quick = "simulator" if simulated else "quick"
    if simulated:
        simulator.install()
    settings.load_profile("deep" if _asks_for_full(config) else quick)
    if _asks_for_full(config):
        os.environ["GPUCONV_TEST_LONG"] = "1"  # the children's too
    if "GPUCONV_TEST_OBJECTS" not in os.environ:  # where all processes of this run keep what fake_cupy.py compiles
        os.environ["GPUCONV_TEST_OBJECTS"] = tempfile.mkdtemp(prefix="gpuconv-tests-")
        config.add_cleanup(_forget_objects)


def _forget_objects() -> None:
    shutil.rmtree(os.environ.pop("GPUCONV_TEST_OBJECTS"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _asks_for_full(config):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        from gpuconv import dispatch

        reason = dispatch.implementation("cupy.gemm").unavailable()
        if os.environ.get("GPUCONV_TEST_FAKE_CUPY") == "1":
            reason = "a stand-in for CuPy is no GPU"
        if reason is not None:
            pytest.skip(reason)
