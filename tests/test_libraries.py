"""gpuconv without the libraries that it can do without: missing, broken, or not loaded because nothing asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gpuconv import dispatch

without_gpu = pytest.mark.skipif(not dispatch.gpu_missing(), reason="a GPU, or a simulated one, is usable here")
without_cupy = pytest.mark.skipif(
    dispatch.implementation("cupy.gemm").unavailable() is None, reason="CuPy is usable here"
)

BLOCK = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {blocked!r}:
            raise {error}
sys.meta_path.insert(0, Missing())
import warnings
warnings.simplefilter("ignore")
import numpy as np, gpuconv
x, k = np.ones((4, 4)), np.ones((2, 2))
assert gpuconv.conv2d(x, k)[0, 0] == 4
"""
USES = "gpuconv.info(); gpuconv.explain(x, k); assert gpuconv.conv2d(x, k, device='cuda')[0, 0] == 4"


def python(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@without_gpu
@pytest.mark.parametrize("library", ["cupy", "numba", "numba.cuda"])
def test_a_library_that_is_not_installed_is_a_reason(library):
    error = f'ModuleNotFoundError("No module named {library}", name={library!r})'
    name = "cupy.gemm" if library == "cupy" else "numba_cuda.direct"
    script = BLOCK.format(blocked=library, error=error) + USES
    assert "not installed" in python(f"{script}; print(gpuconv.info().implementations[{name!r}])")


@without_cupy
@pytest.mark.parametrize(
    ("error", "use"),
    [
        pytest.param(error, use, marks=pytest.mark.full if number and error[0] == "M" else ())
        for error in ('ImportError("broken")', 'ModuleNotFoundError("broken", name="fastrlock")')
        for number, use in enumerate(USES.split("; "))
    ],
)
def test_a_library_that_is_broken_is_a_reason_with_its_own_error(error, use):
    """Not an exception of every call: the CPU, or Numba's CUDA, can do without it."""
    script = BLOCK.format(blocked="cupy", error=error) + use
    reason = python(f"{script}; print(gpuconv.info().implementations['cupy.gemm'])")
    assert "CuPy is installed and cannot be imported" in reason
    assert "broken" in reason


def test_importing_gpuconv_is_cheap(tmp_path):
    script = """
import numpy, sys, time
start = time.perf_counter()
import gpuconv
print(time.perf_counter() - start)
loaded = {"numba", "cupy", "torch", "click", "rich", "PIL", "ml_dtypes", "scipy", "llvmlite"} & sys.modules.keys()
assert not loaded, loaded
"""
    convolve = """
gpuconv.conv2d(numpy.ones((5, 5)), numpy.ones((3, 3)))
assert "cupy" not in sys.modules, "a convolution on the CPU loaded CuPy"
"""
    # Compiled modules are cached, as they are for a user, whatever this process was told; the first run fills the
    # cache. The least of several: anything else that runs here only ever adds.
    cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    python(script + convolve, **cached)
    assert min(float(python(script, **cached)) for _ in range(5)) <= 0.05
