"""``gpuconv warmup`` compiles what later processes then find."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("click", reason="the command line needs click")

SCRIPT = """
import numpy as np, gpuconv
from gpuconv.backends.numba_cpu import runtime
x, k = np.ones((2, 20, 9, 9), np.float32), np.ones((18, 20, 3, 3), np.float32)
for layout in ("NCHW", "NHWC"):
    for precision in ("highest", "high"):
        own = x if layout == "NCHW" else np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        gpuconv.conv2d(own, k, padding=1, layout=layout, precision=precision)
        gpuconv.conv2d(own, k[:, :, :1, :1], layout=layout)
        gpuconv.conv2d(own, k[:1].transpose(1, 0, 2, 3), padding=1, groups=20, layout=layout)
        gpuconv.Conv2d(k, padding=1, layout=layout, precision=precision)(own)
print(runtime.compiled)
"""


@pytest.mark.full
def test_nothing_is_left_to_compile(tmp_path):
    environment = os.environ | {"GPUCONV_CACHE_DIR": str(tmp_path / "kernels")}
    done = subprocess.run([sys.executable, "-m", "gpuconv", "warmup"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels compiled in" in done.stdout and str(tmp_path) in done.stdout
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_a_dtype_that_has_no_kernels_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "gpuconv", "warmup", "--dtype", "int8"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "int8" in done.stderr
