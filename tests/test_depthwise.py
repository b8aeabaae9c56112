"""``numba_cuda.depthwise`` without a GPU: who may choose it, its kernel in Numba's simulator, and its machine code.

The general bodies (``test_implementations`` and the others) run it in the simulator too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import ARCHITECTURES, SIMULATED

if SIMULATED:
    pytest.skip("this process is the simulator", allow_module_level=True)

import gpuconv
from bench import kernels, machine_code
from gpuconv import dispatch, dtypes
from gpuconv.backends.numba_cuda import depthwise, depthwise_shape
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.depthwise"
needs_ptxas = pytest.mark.skipif(
    machine_code.ptxas() is None, reason="NVIDIA's assembler is not installed (nvidia-cuda-nvcc)"
)
QUICK = "vectors or tiles_one_less or rows_of_a_thread or several_launches or sixteen_bits"


@pytest.mark.parametrize(
    ("part", "at_least"), [(QUICK, 24), pytest.param(f"not ({QUICK})", 90, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_in_the_simulator(part, at_least):
    file = str(Path(__file__).with_name("test_depthwise_simulated.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file, "-k", part]
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None and int(passed[1]) >= at_least, child.stdout[-2000:]


def test_it_runs_only_when_its_name_is_given(monkeypatch):
    monkeypatch.setattr(depthwise, "unavailable", lambda: None)
    monkeypatch.setattr(dispatch.implementation("numba_cuda.direct"), "unavailable", lambda: "gone")
    problem = Conv2dProblem.parse("n1c8h6w6_o8kh3kw3_g8_f32")
    for backend in (None, "numba_cuda"):
        with pytest.raises(gpuconv.NoBackendError, match=r"depthwise: experimental: .* asks for it"):
            dispatch.choose.__wrapped__("test", problem, Target("cuda", 0), backend, 1 << 28)
    assert dispatch.choose.__wrapped__("test", problem, Target("cuda", 0), NAME, 1 << 28).name == NAME


@needs_ptxas
@pytest.mark.parametrize(
    ("dtype", "line", "load"),
    [
        pytest.param(
            dtype, line, load, id=f"{dtype}-{line}{load}",
            marks=() if dtype == "float32" and "kh3kw3_p1" in line else pytest.mark.full,
        )
        for dtype in depthwise.DTYPES
        for line, load in kernels.FILTERS
    ],
)  # fmt: skip
def test_machine_code(dtype, line, load):
    configuration = kernels.depthwise(line + dtypes.CODES[dtype], load)
    library = machine_code.lowered(configuration.body, configuration.arguments)
    for cc in ARCHITECTURES:
        found = machine_code.assembled(library, cc, configuration.registers)
        assert found.stack == 0 and found.spills == 0, (cc, found)
        assert found.registers <= depthwise_shape.REGISTERS, (cc, found)
        assert found.shared + configuration.dynamic <= 48 << 10, (cc, found)
        if load != "by_element":
            assert found.instructions.get("LDG.128", 0), (cc, found)


@pytest.mark.parametrize("dtype", depthwise.DTYPES)
def test_a_block_fits_every_gpu(dtype):
    """Whatever registers the compiler gives a thread: at most 255, of 65,536, in shares of 256 for a warp."""
    more = ("n64c64h56w56_o256kh3kw3_p1g64_", "n1c1h9w9_o32kh9kw9_", "n1c5h7w79_o1kh1kw70_")
    for line in (*(line for line, _ in kernels.FILTERS), *more):
        problem = Conv2dProblem.parse(line + dtypes.CODES[dtype])
        for side in (1, depthwise_shape.SIDE):
            block = depthwise_shape.block(problem, side)
            if block is not None:
                assert -(-block.threads // 32) * -(-255 * 32 // 256) * 256 <= 65536, (line, side)
                assert block.shared_bytes <= 48 << 10, (line, side)


@needs_ptxas
@pytest.mark.parametrize(
    ("dtype", "load"),
    [
        pytest.param(dtype, load, marks=pytest.mark.full)
        for dtype in depthwise.DTYPES
        for load in ("across_groups_in_vectors", "by_element")
    ],
)
def test_four_outputs_of_each_channel_as_machine_code(dtype, load):
    """The most sums of a thread."""
    configuration = kernels.depthwise("n64c64h56w56_o256kh3kw3_p1g64_" + dtypes.CODES[dtype], load)
    assert configuration.threads <= 256
    library = machine_code.lowered(configuration.body, configuration.arguments)
    for cc in ((7, 5), *ARCHITECTURES):
        found = machine_code.assembled(library, cc, configuration.registers)
        assert found.clean, (cc, found)
        assert found.registers <= depthwise_shape.REGISTERS, (cc, found)
        assert found.shared + configuration.dynamic <= 48 << 10, (cc, found)
