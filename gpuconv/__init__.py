"""2-D convolution for NumPy and CuPy arrays, on the GPU or the CPU.

``conv2d`` computes, ``explain`` says what would run and why, ``info`` what this machine can do. Importing gpuconv
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
    from gpuconv.explanation import Explanation, explain
    from gpuconv.machine import clear, info
    from gpuconv.tracing import Trace, trace

__all__ = [
    "Conv2dProblem",
    "DeviceFallbackWarning",
    "Explanation",
    "NoBackendError",
    "Trace",
    "__version__",
    "clear",
    "conv2d",
    "explain",
    "info",
    "output_size",
    "parameter_count",
    "receptive_field",
    "trace",
]

# What conv2d does not need is loaded when first asked for; each name and the module that has it.
_LATER = {
    "Explanation": "explanation",
    "explain": "explanation",
    "clear": "machine",
    "info": "machine",
    "Trace": "tracing",
    "trace": "tracing",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'gpuconv' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gpuconv.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
