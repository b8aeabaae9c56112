"""The CUDA kernels run without a GPU: in Numba's simulator, in a process of its own.

Numba decides on import whether CUDA is simulated, so the tests of the implementations run once more in a child.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent
SIMULATOR = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("this process is the simulator", allow_module_level=True)


FAMILY = ("test_gradients.py", "test_patches.py", "test_conv1d.py", "test_prepared.py")
KNOWN_BUGS = ("test_known_bugs.py", "test_known_bugs_family.py", "test_large_extents.py")
PROPERTIES = ("test_properties.py", "test_properties_family.py")


# In parts, so that the processes of a parallel run share them.
@pytest.mark.parametrize(
    ("files", "part", "at_least"),
    [
        pytest.param(["test_implementations.py"], "numba_cuda and test_agrees", 110, id="agreement"),
        pytest.param(["test_implementations.py"], "numba_cuda and not test_agrees", 40, id="more"),
        pytest.param(
            ["test_family.py"], "numba_cuda and test_agrees", 100, id="family_agreement", marks=pytest.mark.full
        ),
        pytest.param(
            ["test_family.py"], "numba_cuda and not test_agrees", 60, id="family_more", marks=pytest.mark.full
        ),
        pytest.param(FAMILY, "numba_cuda", 75, id="relatives", marks=pytest.mark.full),
        pytest.param(KNOWN_BUGS, "numba_cuda", 43, id="known_bugs", marks=pytest.mark.full),
        pytest.param(PROPERTIES, "not arguments", 8, id="properties"),
    ],
)
def test_kernels_in_the_simulator(files, part, at_least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [*(str(TESTS / file) for file in files), "-k", part]
    child = subprocess.run(command, env=SIMULATOR, capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None, child.stdout[-2000:]
    assert int(passed[1]) >= at_least, child.stdout[-2000:]


def test_numpy_arrays_through_the_public_call():
    script = """
import numpy as np, gpuconv
ramp = np.arange(10.0, 251.0, 10.0).reshape(5, 5)
for request in ({"backend": "numba_cuda"}, {"backend": "numba_cuda.direct"}, {"device": "cuda"}, {"device": "cuda:0"}):
    print(gpuconv.conv2d(ramp, [[1, 0, -1]] * 3, **request).tolist())
print(gpuconv.explain(ramp, [[1, 0, -1]] * 3, device="cuda").implementation)
print(gpuconv.explain(ramp, [[1, 0, -1]] * 3, device="auto").implementation)
try:
    gpuconv.conv2d(ramp, [[1]], device="cuda:7")
except ValueError as error:
    print(error)
"""
    child = subprocess.run([sys.executable, "-c", script], env=SIMULATOR, capture_output=True, text=True, check=True)
    lines = child.stdout.splitlines()
    assert lines[:4] == [str(np.full((3, 3), -60.0).tolist())] * 4
    assert lines[4:6] == ["numba_cuda.direct", "numba_cpu.planes"], "the simulator is no GPU for device='auto'"
    assert "cuda:7" in lines[6]
