"""2-D convolution for NumPy and CuPy arrays, on the GPU or the CPU.

``conv2d`` computes, ``conv_transpose2d``, ``conv1d``, ``unfold``, ``fold`` and ``grad`` are its relatives, ``Conv2d``
is one prepared for many images, ``conv2d_tiled`` is for images larger than memory. ``explain`` says what would run and
why, ``info`` what this machine can do, ``autotune`` measures how a GPU runs a convolution fastest. Importing gpuconv
loads neither Numba nor CuPy.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gpuconv._version import __version__
from gpuconv.api import conv2d
from gpuconv.errors import DeviceFallbackWarning, NoBackendError
from gpuconv.geometry import output_size, parameter_count, receptive_field
from gpuconv.problem import Conv2dProblem

if TYPE_CHECKING:
    from gpuconv import grad
    from gpuconv.explaining import explain
    from gpuconv.explanation import Explanation
    from gpuconv.machine import Info, clear, info
    from gpuconv.one_dimension import conv1d
    from gpuconv.patches import fold, unfold
    from gpuconv.prepared import Conv2d
    from gpuconv.tiled import conv2d_tiled
    from gpuconv.tracing import Trace, trace
    from gpuconv.transpose import conv_transpose2d
    from gpuconv.tuning import Tuning, autotune

__all__ = [
    "Conv2d",
    "Conv2dProblem",
    "DeviceFallbackWarning",
    "Explanation",
    "Info",
    "NoBackendError",
    "Trace",
    "Tuning",
    "__version__",
    "autotune",
    "clear",
    "conv1d",
    "conv2d",
    "conv2d_tiled",
    "conv_transpose2d",
    "explain",
    "fold",
    "grad",
    "info",
    "output_size",
    "parameter_count",
    "receptive_field",
    "trace",
    "unfold",
]

# What conv2d does not need is loaded when first asked for; each name and the module that has it.
_LATER = {
    "Conv2d": "prepared",
    "conv1d": "one_dimension",
    "conv2d_tiled": "tiled",
    "conv_transpose2d": "transpose",
    "fold": "patches",
    "unfold": "patches",
    "Explanation": "explanation",
    "explain": "explaining",
    "clear": "machine",
    "Info": "machine",
    "info": "machine",
    "Trace": "tracing",
    "trace": "tracing",
    "Tuning": "tuning",
    "autotune": "tuning",
}


def __getattr__(name: str) -> Any:
    if name == "grad":
        return importlib.import_module("gpuconv.grad")
    if name not in _LATER:
        raise AttributeError(f"module 'gpuconv' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gpuconv.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
