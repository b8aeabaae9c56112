"""2-D convolution for NumPy and CuPy arrays, on the GPU or the CPU.

``conv2d`` computes, ``explain`` says what would run and why, ``info`` what this machine can do. Importing gpuconv
loads neither Numba nor CuPy.
"""

from gpuconv._version import __version__
from gpuconv.api import conv2d
from gpuconv.errors import DeviceFallbackWarning, NoBackendError
from gpuconv.explain import Explanation, explain
from gpuconv.geometry import output_size, parameter_count, receptive_field
from gpuconv.machine import clear, info
from gpuconv.problem import Conv2dProblem
from gpuconv.trace import Trace, trace

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
