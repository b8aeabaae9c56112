"""``cupy.gemm`` without a GPU: its own code on a stand-in for CuPy, cuBLAS calls and CUDA C++ included."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuconv.backends import cupy_gemm, gemm
from gpuconv.problem import Conv2dProblem

TESTS = Path(__file__).parent
FAKE = os.environ | {
    "GPUCONV_TEST_FAKE_CUPY": "1",
    "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
}
FAMILY = ("test_family.py", "test_gradients.py", "test_patches.py", "test_conv1d.py", "test_prepared.py")
KNOWN_BUGS = ("test_known_bugs.py", "test_known_bugs_family.py", "test_large_extents.py")
PROPERTIES = ("test_properties.py", "test_properties_family.py")
in_child = os.environ.get("GPUCONV_TEST_FAKE_CUPY") == "1"
needs_compiler = pytest.mark.skipif(fake_cupy.compiler() is None, reason="no C++ compiler to run the CUDA C++ with")


@needs_compiler
@pytest.mark.skipif(in_child, reason="this process is the child")
@pytest.mark.parametrize(
    ("files", "part", "tf32", "at_least"),
    [
        pytest.param(["test_implementations.py"], "cupy.gemm", "0", 230, id="conv2d"),
        pytest.param(FAMILY, "cupy", "0", 850, id="family"),
        pytest.param(["test_implementations.py", "test_family.py"], "cupy.gemm and unit_b", "1", 20, id="tf32"),
        pytest.param(KNOWN_BUGS, "cupy.gemm or pool", "0", 50, id="known_bugs", marks=pytest.mark.full),
        pytest.param(PROPERTIES, "not arguments", "0", 8, id="properties"),
    ],
)
def test_implementation_tests_on_the_stand_in(files, part, tf32, at_least):
    """The one body of all implementations, on the stand-in; also with the variable that turns CuPy's TF32 on."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "fake_cupy"]
    command += [*(str(TESTS / file) for file in files), "-k", part]
    child = subprocess.run(
        command, env=FAKE | {"CUPY_TF32": tf32}, capture_output=True, text=True, check=False, cwd=TESTS.parent
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None, child.stdout[-2000:]
    assert int(passed[1]) >= at_least, child.stdout[-2000:]


@needs_compiler
@pytest.mark.parametrize(("precision", "expected"), [("highest", {69}), ("high", {69}), ("medium", {77})])
def test_compute_type_follows_the_precision_alone(precision, expected):
    """69 is pedantic float32, 77 TF32: the call says which, so no environment variable has a say."""
    script = (
        "import fake_cupy, gpuconv, numpy as np\n"
        "x, k = np.ones((2, 4, 5, 5), 'f'), np.ones((8, 4, 3, 3), 'f')\n"
        f"gpuconv.conv2d(x, k, precision={precision!r}, backend='cupy')\n"
        "print(sorted(set(fake_cupy.COMPUTE_TYPES)))"
    )
    environment = FAKE | {"CUPY_TF32": "1", "NVIDIA_TF32_OVERRIDE": "1"}
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == str(sorted(expected))


def test_dtypes_of_columns_and_sums():
    for line, expected in {
        "n1c4h5w5_o8kh3kw3_f16": ("float16", "float32"),
        "n1c4h5w5_o8kh3kw3_bf16": ("bfloat16", "float32"),
        "n1c4h5w5_o8kh3kw3_f16-f32": ("float16", "float32"),
        "n1c4h5w5_o8kh3kw3_f16-f64": ("float64", "float64"),
        "n1c4h5w5_o8kh3kw3_f16*bf16": ("float32", "float32"),
        "n1c4h5w5_o8kh3kw3_u8*i8": ("float64", "float64"),
        "n1c4h5w5_o8kh3kw3_c64": ("complex64", "complex64"),
    }.items():
        assert cupy_gemm.columns_and_sums(Conv2dProblem.parse(line)) == expected, line


ORDERS = st.sampled_from(["rows", "columns"])


def stack(rng: np.random.Generator, shape: tuple[int, ...], order: str, gap: int, dtype: str) -> np.ndarray:
    """Matrices of random integers, row- or column-major, ``gap`` elements between the rows (or columns)."""
    *outer, rows, columns = shape
    inner = (rows, columns) if order == "rows" else (columns, rows)
    memory = np.full((*outer, inner[0], inner[1] + gap), 99, dtype)
    memory[..., : inner[1]] = rng.integers(-4, 5, (*outer, *inner))
    view = memory[..., : inner[1]]
    return view if order == "rows" else view.swapaxes(-1, -2)


@given(
    st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 6)] * 3),
    st.tuples(ORDERS, ORDERS, ORDERS),
    st.tuples(*[st.integers(0, 3)] * 3),
    st.sampled_from(["float32", "float64", "complex64", "complex128"]),
    st.integers(0, 2**32 - 1),
)
def test_gemm_calls_multiply(sizes, orders, gaps, dtype, seed):
    """Every mixture of row- and column-major operands, padded rows and batches gives a·b, and nothing beside it."""
    n, g, M, K, P = sizes
    rng = np.random.default_rng(seed)
    a = stack(rng, (g, M, K), orders[0], gaps[0], dtype)
    b = stack(rng, (n, g, K, P), orders[1], gaps[1], dtype)
    out = stack(rng, (n, g, M, P), orders[2], gaps[2], dtype)
    root = out
    while root.base is not None:
        root = root.base
    expected = a @ b
    untouched = (root == 99).sum() if gaps[2] else 0
    out[...] = np.nan
    for arguments in cupy_gemm.gemm_calls("highest", a, b, out):
        fake_cupy.gemm_strided_batched_ex(0, *arguments)
    np.testing.assert_array_equal(out, expected)
    if gaps[2]:
        assert (root[..., -gaps[2] :] == 99).all() and untouched


def test_blas_layouts():
    assert gemm.blas_layout((3, 4), (4, 1)) == (True, 4)
    assert gemm.blas_layout((3, 4), (6, 1)) == (True, 6)
    assert gemm.blas_layout((3, 4), (1, 3)) == (False, 3)
    assert gemm.blas_layout((3, 4), (1, 5)) == (False, 5)
    assert gemm.blas_layout((1, 4), (-7, 1)) == (True, 4), "an axis of one element has no stride"
    assert gemm.blas_layout((3, 1), (1, 99)) is not None
    for strides in [(8, 2), (-4, 1), (0, 1), (4, -1), (1, 0), (1, 2)]:
        assert gemm.blas_layout((3, 4), strides) is None, strides
