"""How the tests run an implementation: by its name, skipped with its own sentence where this machine has not got it."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import oracle
import pytest
import units
from calls import LONG, is_costly

import gpuconv
from gpuconv import dispatch

# These serve every valid problem; the others may refuse one, with reasons.
SERVE_EVERYTHING = ("numba_cuda.direct", "numpy.reference")
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
STAND_IN = os.environ.get("GPUCONV_TEST_FAKE_CUPY") == "1"
# What CUDA kernels are compiled for. 8.6 and 8.9 differ from 8.0 in how much fits a multiprocessor.
ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0)) if LONG else ((8, 0), (9, 0))
# More than two seconds each in the simulator, which gives every CUDA thread a thread of Python.
SLOW_IN_SIMULATOR = (
    "long_sum", "channels_17_to_33", "channels_33_to_5", "channels_3_to_65", "one_more_than_a_tile", "grouped",
    "grouped_everything", "wrap_grouped_strided", "depthwise_stride_flip",
)  # fmt: skip
# A module's pytestmark. Kernels run as Python in the simulator: NumPy warns where a GPU's numbers wrap or become NaN
# without a word.
SIMULATOR_MARKS = [pytest.mark.filterwarnings("ignore:.*encountered in scalar:RuntimeWarning")] if SIMULATED else []


def result_dtype(x: Any, k: Any) -> Any:
    """Of what their convolution gives, where both have a dtype of their own."""
    both = hasattr(x, "dtype") and hasattr(k, "dtype")
    return oracle.result_dtype(x.dtype, k.dtype) if both else None


def skip_costly(name: str, array: Any, asked: Any = None) -> None:
    dtype = getattr(getattr(array, "dtype", None), "name", "float32")
    if is_costly(name, dtype, None if asked is None else np.dtype(asked).name):
        pytest.skip("specialised CPU kernels for other dtypes than float32 are compiled in the long profile")


FORWARD = dispatch.serving("forward")
every_implementation = pytest.mark.parametrize("name", FORWARD)


def device_of(name: str) -> str:
    return dispatch.DEVICES[dispatch.library_of(name)]


def is_usable(name: str) -> bool:
    return dispatch.implementation(name).unavailable() is None


def skip_unless_usable(name: str) -> None:
    reason = dispatch.implementation(name).unavailable()
    if reason is not None:
        pytest.skip(reason)


def usable(op: str = "forward") -> list[str]:
    """What can compute ``op`` on this machine; of a child that stands for a GPU only what is there for the GPU's sake:
    its parent's own tests have the others.
    """
    names = [name for name in dispatch.serving(op) if is_usable(name)]
    return [name for name in names if device_of(name) == "cuda"] if SIMULATED or STAND_IN else names


def simulated(name: str) -> bool:
    return SIMULATED and name.startswith("numba_cuda")


def skip_in_simulator(name: str) -> None:
    if simulated(name):
        pytest.skip("too much work for the CUDA simulator")


def share(name: str, items: Any, step: int) -> list[Any]:
    """All of ``items``; in the simulator every ``step``-th, of cases those that are not slow there."""
    if not simulated(name):
        return list(items)
    return [item for item in items if getattr(item, "name", "") not in SLOW_IN_SIMULATOR][::step]


def runner(name: str) -> units.Run:
    """``conv2d`` on one implementation; a refusal by one that need not serve everything skips the test."""
    skip_unless_usable(name)

    def run(*operands: Any, **kwargs: Any) -> Any:
        x, k, *_ = *operands, kwargs.get("x"), kwargs.get("k")
        asked = kwargs.get("dtype")
        skip_costly(name, x, result_dtype(x, k) if asked is None else asked)
        try:
            return gpuconv.conv2d(*operands, backend=name, **kwargs)
        except gpuconv.NoBackendError as refusal:
            if name in SERVE_EVERYTHING:
                raise
            # without the line of the problem, so that pytest folds equal reasons
            pytest.skip(str(refusal).partition("\n")[2].strip())

    return run


@functools.cache
def gpu_arrays() -> Any:
    """CuPy where it is usable, else None."""
    if dispatch.implementation("cupy.gemm").unavailable() is not None:
        return None
    import cupy

    return cupy


def home(name: str, dtype: str = "float32") -> Any:
    """The array library of the device that ``name`` runs on; bfloat16 arrays stay on the host."""
    on_gpu = device_of(name) == "cuda" and not SIMULATED and dtype != "bfloat16"
    return gpu_arrays() or np if on_gpu else np
