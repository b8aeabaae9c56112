"""``numba_cuda.implicit_gemm_mma`` without a GPU: what it serves, its machine code, and its proof in the simulator."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import SIMULATED

if SIMULATED:
    pytest.skip("this process is the simulator", allow_module_level=True)

import gpuconv
from bench import kernels, machine_code
from gpuconv.backends.numba_cuda import channels_last, implicit_gemm_mma, tensor_shape, tensor_tile, tiles
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.implicit_gemm_mma"
GPU = Target("cuda", 0)
needs_ptxas = pytest.mark.skipif(
    machine_code.ptxas() is None, reason="NVIDIA's assembler is not installed (nvidia-cuda-nvcc)"
)


# ---- what it serves


def test_highest_precision_of_float32_never_meets_a_tensor_core():
    problem = Conv2dProblem.parse("n1c8h6w6_o8kh3kw3_f32")
    (reason,) = implicit_gemm_mma.unsupported(problem, GPU)
    assert "precision='highest' forbids; pass precision='high' or 'medium'" in reason
    assert implicit_gemm_mma.way(replace(problem, precision="high")) == "3xtf32"
    assert implicit_gemm_mma.way(replace(problem, precision="medium")) == "tf32"
    for dtype in ("float16", "bfloat16"):
        for precision in ("highest", "high", "medium"):
            given_types = {"x_dtype": dtype, "k_dtype": dtype, "y_dtype": dtype, "precision": precision}
            assert implicit_gemm_mma.unsupported(replace(problem, **given_types), GPU) == []
            assert implicit_gemm_mma.way(replace(problem, **given_types)) == dtype


def test_it_refuses_with_every_reason(monkeypatch):
    monkeypatch.setattr(implicit_gemm_mma, "_capability", lambda ordinal: (7, 5))
    reasons = implicit_gemm_mma.unsupported(Conv2dProblem(1, 2**28, 2, 2, 1, 1, 1, y_dtype="float64"), GPU)
    assert [re.split(r"[;,]", reason)[-1].strip() for reason in reasons] == [
        "convert them",
        "use backend='numba_cuda.direct'",
        "use 'numba_cuda.direct'",
    ]


def test_explain_says_that_it_is_experimental():
    told = str(gpuconv.explain((1, 8, 6, 6), (8, 8, 3, 3), input_dtype="float16"))
    assert re.search(rf"{NAME} +cuda  experimental: no hardware has run it yet; backend='{NAME}' asks for it", told)


@given(
    st.integers(1, 30), st.integers(1, 3), st.integers(1, 200), st.integers(1, 200), st.sampled_from([1, 3, 5]),
    st.sampled_from(["forward", "input_grad"]), st.sampled_from([2**18, 2**22, 2**28]),
)  # fmt: skip
def test_a_plan_covers_the_sum_within_its_limit(N, groups, C, O, K, op, limit):
    kinds = {"x_dtype": "float16", "k_dtype": "float16", "y_dtype": "float16"}
    problem = Conv2dProblem(N, C * groups, 9, 8, O * groups, K, K, stride=(2, 2), groups=groups, op=op, **kinds)
    try:
        made = implicit_gemm_mma.plan(problem, GPU, limit)
    except MemoryError as error:
        needed = int(re.search(r"needs (\d+) bytes", str(error))[1])
        assert needed > limit
        assert implicit_gemm_mma.plan(problem, GPU, needed).workspace <= needed
        return
    assert made.workspace <= limit
    alone = implicit_gemm_mma.plan(replace(problem, N=1), GPU, 2**30)
    for cut, single in zip(made.config["launches"], alone.config["launches"], strict=True):
        forward = cut.part.problem
        assert cut.slices * cut.depth >= forward.C // groups * forward.KH * forward.KW
        # A launch of no products at all is one that writes the bias.
        assert (cut.parts - 1) * cut.part_slices < max(cut.slices, 1)
        assert cut.slices <= cut.parts * cut.part_slices
        assert (cut.slices, cut.parts, cut.part_slices) == (single.slices, single.parts, single.part_slices)


# ---- shapes


def test_rows_of_shared_memory_meet_no_bank_twice():
    """Eight rows that ldmatrix reads, and the 32 pairs of sums that a warp parks, in banks of 4 bytes."""
    banks = [(row * tensor_shape.PITCH + word) % 32 for row in range(8) for word in range(4)]
    assert len(set(banks)) == 32
    # Two words per thread go out in two halves of the warp.
    for half in range(2):
        parked = [
            g * tensor_shape.PARKING_PITCH + 2 * q + word for g in range(4) for q in range(4) for word in range(2)
        ]
        assert len({(at + half * 4 * tensor_shape.PARKING_PITCH) % 32 for at in parked}) == 32
    assert tensor_shape.OUTPUTS * tensor_shape.PARKING_PITCH <= tensor_shape.STAGES * tensor_shape.STAGE


def test_every_sum_is_parked_once():
    places = set()
    for warp in range(tensor_shape.WARPS_O * tensor_shape.WARPS_P):
        row = warp // tensor_shape.WARPS_P * tensor_shape.WARP_OUTPUTS
        column = warp % tensor_shape.WARPS_P * tensor_shape.WARP_PIXELS
        for lane in range(32):
            first = (row + lane // 4) * tensor_shape.PARKING_PITCH + column + lane % 4 * 2
            for tile in range(tensor_shape.SUMS // 4):
                for element in range(4):
                    places.add(first + tensor_tile.parking(*divmod(tile, tensor_shape.COLUMNS), element))
    wanted = {
        o * tensor_shape.PARKING_PITCH + p for o in range(tensor_shape.OUTPUTS) for p in range(tensor_shape.PIXELS)
    }
    assert places == wanted


# ---- the proofs


@pytest.mark.parametrize(
    ("part", "at_least"),
    [("value or float32 or in_place or missing or nan or side_by_side", 10),
     pytest.param("edges or parts or gradient or prepared or views or reflect or grouped", 9, marks=pytest.mark.full)],
    ids=["quick", "long"],
)  # fmt: skip
def test_in_the_simulator(part, at_least):
    file = str(Path(__file__).with_name("test_implicit_gemm_mma_simulated.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file, "-k", part]
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None and int(passed[1]) >= at_least, child.stdout[-2000:]


MADE = [
    (way, dtype, y) for dtype, ways in kernels.WAYS.items() for way in ways for y in dict.fromkeys((dtype, "float32"))
]


@needs_ptxas
@pytest.mark.parametrize(("way", "dtype", "y_dtype"), MADE)
def test_machine_code(way, dtype, y_dtype):
    configuration = kernels.implicit_gemm_mma(way, dtype, y_dtype)
    library = machine_code.lowered(configuration.body, configuration.arguments)
    for cc in kernels.ARCHITECTURES:
        figures = machine_code.assembled(library, cc, configuration.registers)
        assert figures.clean, (cc, figures)
        assert figures.registers <= 168, "three blocks on a multiprocessor"
        assert figures.shared <= tiles.STATIC_SHARED_BYTES
        found = figures.instructions
        steps = tensor_shape.WORDS // tensor_shape.STEP
        products = {"3xtf32": 3}.get(way, 1)
        assert found["HMMA"] == steps * tensor_shape.ROWS * tensor_shape.COLUMNS * products
        assert found["LDSM"] == steps * (tensor_shape.ROWS + tensor_shape.COLUMNS // 2)
        # Rows of weights, and rows of the window once from x and once from the border.
        rows = tensor_shape.THREADS * 16 // tensor_shape.SLICE_BYTES
        assert found["LDGSTS"] == (tensor_shape.OUTPUTS + 2 * tensor_shape.PIXELS) // rows
        assert found["FFMA"] == found["LDL"] == found["STL"] == 0


@needs_ptxas
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_the_copy_becomes_machine_code(dtype):
    from numba.cuda import types

    vector, i64 = types.Array(getattr(types, dtype), 1, "C"), types.int64
    library = machine_code.lowered(channels_last.build(dtype), (vector, *[i64] * 6, vector, *[i64] * 6))
    for cc in kernels.ARCHITECTURES:
        figures = machine_code.assembled(library, cc)
        assert figures.clean
        assert figures.registers <= 128
