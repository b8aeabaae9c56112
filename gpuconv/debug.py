"""``GPUCONV_DEBUG=1``: a GPU's errors surface at the launch that caused them.

A GPU is asked for work and does it later, so an error in a kernel is raised by whatever waits for the GPU next, which
may be anywhere. With ``GPUCONV_DEBUG=1`` every launch is waited for, which makes all of it slow.
"""

from __future__ import annotations

import os
import sys


def launched(what: str, problem: object) -> None:
    """Wait for the launch just asked for, if asked to; a RuntimeError that names it where it failed.

    ``problem`` is printed only then.
    """
    if os.environ.get("GPUCONV_DEBUG", "0") in ("", "0"):
        return
    try:
        if "cupy" in sys.modules:
            import cupy

            cupy.cuda.get_current_stream().synchronize()
        else:
            from numba import cuda

            cuda.synchronize()
    except Exception as error:  # CuPy's or Numba's own, and each has several
        raise RuntimeError(f"{what} of {problem} failed on the GPU: {error}") from error
