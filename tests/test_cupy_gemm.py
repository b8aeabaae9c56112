"""What ``cupy.gemm`` asks of cuBLAS and of the GPU: how many products, of which memory, in how much scratch.

On the stand-in for CuPy, in a child process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import calls
import fake_cupy
import numpy as np
import pytest

from gpuconv import conv2d, conv_transpose2d, dispatch, explain, grad
from gpuconv.backends import cupy_gemm, gemm_rows
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

TESTS = Path(__file__).parent
in_child = os.environ.get("GPUCONV_TEST_FAKE_CUPY") == "1"
of_the_stand_in = pytest.mark.skipif(not in_child, reason="counts what the stand-in for CuPy is asked for")
MiB = 1 << 20


@pytest.mark.skipif(in_child, reason="this process is the child")
@pytest.mark.skipif(fake_cupy.compiler() is None, reason="no C++ compiler to run the CUDA C++ with")
def test_all_on_the_stand_in():
    environment = os.environ | {
        "GPUCONV_TEST_FAKE_CUPY": "1",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "fake_cupy"]
    command += [__file__, "-k", "not stand_in"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None, child.stdout[-2000:]
    assert int(passed[1]) >= 65, child.stdout[-2000:]


def integers(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


class Asked:
    """The products that cuBLAS was asked for, launches of each kernel, uploads, and the most scratch held at once."""

    def __init__(self, monkeypatch: Any) -> None:
        import cupy
        from cupy_backends.cuda.libs import cublas

        self.products: list[dict[str, int]] = []
        self.launches: list[str] = []
        self.uploads = 0
        self.held = self.most = 0
        names = "trans_a trans_b m n k alpha a a_type lda a_step b b_type ldb b_step beta c c_type ldc c_step batch"

        def product(handle: int, *given: int) -> None:
            self.products.append(dict(zip(names.split(), given, strict=False)))
            fake_cupy.gemm_strided_batched_ex(handle, *given)

        def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(this: Any, *given: Any) -> None:
                self.launches.append(name)
                call(this, *given)

            return counting

        def upload(array: Any, blocking: bool = False) -> np.ndarray:
            self.uploads += 1
            return np.asarray(array)

        empty = cupy.empty

        def allocate(shape: Any, dtype: Any) -> np.ndarray:
            array = empty(shape, dtype)
            self.held += array.nbytes
            self.most = max(self.most, self.held)
            weakref.finalize(array, self._free, array.nbytes)
            return array

        monkeypatch.setattr(cublas, "gemmStridedBatchedEx", product)
        for kernel, name in ((fake_cupy.RawKernel, "im2col"), (fake_cupy.ElementwiseKernel, "epilogue")):
            monkeypatch.setattr(kernel, "__call__", counted(name, kernel.__call__))
        monkeypatch.setattr(cupy, "asarray", upload)
        monkeypatch.setattr(cupy, "empty", allocate)

    def _free(self, size: int) -> None:
        self.held -= size


@pytest.fixture
def asked(monkeypatch) -> Asked:
    return Asked(monkeypatch)


def of_gpu(problem: str, limit: int = 256 * MiB) -> Any:
    return cupy_gemm.plan(Conv2dProblem.parse(problem), Target("cuda", None), limit)


# ---- 1×1


@of_the_stand_in
@pytest.mark.parametrize("limit", [None, 40_000])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_1x1_is_a_product_with_x_as_it_lies(asked, layout, groups, limit):
    """One call (in NCHW one for each group), that reads x and writes the result where they are."""
    x, k = integers((5, 8, 6, 7)), integers((16, 8 // groups, 1, 1))
    if layout == "NHWC":
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    expected = conv2d(x, k, groups=groups, layout=layout, backend="numpy.reference")
    out = np.full(expected.shape, np.nan, np.float32)
    conv2d(x, k, groups=groups, layout=layout, backend="cupy.gemm", out=out, workspace_limit=limit)
    np.testing.assert_array_equal(out, expected)
    assert len(asked.products) == (groups if layout == "NCHW" else 1)
    assert asked.launches == []
    places = {product[name] for product in asked.products for name in "ab"}
    assert any(x.ctypes.data <= place < x.ctypes.data + x.nbytes for place in places)
    batch = 5 if layout == "NCHW" else groups
    assert all(product["batch"] == batch for product in asked.products)
    assert asked.most <= out.nbytes, "the result alone"


@of_the_stand_in
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("groups", [1, 2])
def test_images_with_channels_last_are_one_product(asked, groups, dtype):
    """Planes of 7×7 are too small for a product each."""
    x, k = integers((5, 9, 9, 16), dtype), integers((16, 16 // groups, 3, 3), dtype)
    y = conv2d(x, k, groups=groups, layout="NHWC", backend="cupy.gemm")
    np.testing.assert_array_equal(y, conv2d(x, k, groups=groups, layout="NHWC", backend="numpy.reference"))
    (product,) = asked.products
    assert product["batch"] == groups
    assert {product["m"], product["n"]} == {16 // groups, 5 * 7 * 7}


@of_the_stand_in
def test_a_1x1_with_a_stride_is_not_taken_for_one_without(asked):
    ramp = np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    np.testing.assert_array_equal(
        conv2d(ramp, np.ones((1, 1), np.float32), stride=2, backend="cupy.gemm"), [[1, 3], [7, 9]]
    )


# ---- chunks


def columns_of(plan: Any) -> int:
    n, g, rows, columns = plan.config["block"]
    return n * g * rows * columns * plan.problem.products * 4


def test_chunks_are_of_half_the_cache_or_worth_a_launch():
    wide = of_gpu("n32c512h28w28_o512kh3kw3_p1")
    assert columns_of(wide) <= 26 * MiB
    assert columns_of(wide) >= 12 * MiB
    narrow = of_gpu("n256c64h56w56_o64kh3kw3_p1")
    n, _, rows, columns = narrow.config["block"]
    assert 1e9 <= n * rows * columns * 64 * 576 <= 2.1e9, "enough products to hide the launch"
    assert of_gpu("n32c512h28w28_o512kh3kw3_p1", 24 * MiB).workspace <= 24 * MiB
    gradient = of_gpu("n32c512h28w28_o512kh3kw3_p1_wgrad")
    n, rows, columns, _ = gradient.config["block"]
    assert n * rows * columns * 512 * 9 * 4 <= 26 * MiB


@pytest.mark.parametrize("line", ["n1c1h70000w70000_o1kh3kw3", "n3000000000c1h1w1_o1kh1kw1"])
@pytest.mark.parametrize("limit", [2**22, 2**28, 2**50])
def test_no_dimension_of_a_product_reaches_2_to_the_31(line, limit):
    n, g, rows, columns = of_gpu(line, limit).config["block"]
    assert max(rows * columns, n * g) < 2**31


RUNS = {
    "forward": lambda x, k, dy, **o: conv2d(x, k, stride=2, padding=1, **o),
    "transpose": lambda x, k, dy, **o: conv_transpose2d(dy, k, stride=2, padding=1, output_padding=1, **o),
    "weight": lambda x, k, dy, **o: grad.conv2d_weight(x, k.shape, dy, stride=2, padding=1, **o),
}


@of_the_stand_in
@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64", "uint8"])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_many_small_chunks_give_the_answer(asked, monkeypatch, run, dtype):
    """In scratch that stays within what is announced, with the tables uploaded once."""
    monkeypatch.setattr(cupy_gemm, "_PRODUCTS", 1)
    monkeypatch.setattr(cupy_gemm, "_half_cache", lambda ordinal: 2000)
    x, k = integers((3, 4, 12, 10)), integers((6, 4, 3, 3))
    dy = integers((3, 6, 6, 5))
    x, k, dy = (np.abs(array).astype(dtype) for array in (x, k, dy))
    expected = run(x, k, dy, backend="numpy.reference")
    dispatch.choose.cache_clear()
    result = run(x, k, dy, backend="cupy.gemm")
    dispatch.choose.cache_clear()
    np.testing.assert_array_equal(result, expected)
    chunks = asked.launches.count("im2col")
    assert chunks > 4
    parts = 4 if run is RUNS["transpose"] else 1
    assert asked.uploads <= 4 + 2 * parts


@of_the_stand_in
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("fraction", [1, 2, 5])
def test_scratch_is_at_most_what_was_announced(asked, dtype, layout, groups, fraction):
    x, k = integers((9, 16, 10, 10), dtype), integers((8, 16 // groups, 3, 3), dtype)
    x = np.moveaxis(x, 1, -1) if layout == "NHWC" else x
    bias = integers((8,), dtype)
    options = {"groups": groups, "padding": 1, "activation": "relu", "layout": layout}
    limit = explain(x, k, bias, backend="cupy.gemm", **options).workspace // fraction
    report = explain(x, k, bias, backend="cupy.gemm", workspace_limit=limit, **options)
    expected = conv2d(x, k, bias, backend="numpy.reference", **options)
    asked.held = asked.most = 0
    y = conv2d(x, k, bias, backend="cupy.gemm", workspace_limit=limit, **options)
    np.testing.assert_array_equal(y, expected)
    assert 0 < asked.most - y.nbytes <= report.workspace


@of_the_stand_in
def test_chunks_shrink_when_the_pool_is_too_small(asked):
    """The next call is right too, and where not even the smallest chunk has room the error says how many bytes."""
    x, k = integers((2, 8, 40, 40)), integers((8, 8, 5, 5))
    expected = conv2d(x, k, backend="numpy.reference")
    try:
        for limit in (200_000, 90_000):
            fake_cupy.POOL.set_limit(limit)
            before = len(asked.products)
            np.testing.assert_array_equal(conv2d(x, k, device="cuda", backend="cupy.gemm"), expected)
            assert len(asked.products) > before + 2
        fake_cupy.POOL.set_limit(100)
        with pytest.raises(MemoryError, match=r"\d+ bytes"):
            conv2d(x, k, device="cuda", backend="cupy.gemm")
    finally:
        fake_cupy.POOL.set_limit(0)
    np.testing.assert_array_equal(conv2d(x, k, device="cuda", backend="cupy.gemm"), expected)


TO_DIRECT = """
import fake_cupy, numpy as np
from gpuconv import conv2d, dispatch
rng = np.random.default_rng(0)
x, k = (rng.integers(-3, 4, shape).astype("f") for shape in ((1, 64, 3, 3), (8, 64, 3, 3)))
expected = conv2d(x, k, backend="numpy.reference")
ran = []
direct = dispatch.implementation("numba_cuda.direct")
real = direct.run
direct.run = lambda *given: ran.append("direct") or real(*given)
for limit in (0, 500, 0):  # one pixel's column takes 2304 bytes
    fake_cupy.POOL.set_limit(limit)
    assert np.array_equal(conv2d(x, k, device="cuda"), expected)
    ran.append("right")
print(*ran)
"""


def test_where_no_column_has_room_the_direct_kernel_runs():
    """And cupy.gemm again when there is room: on the stand-in, and Numba's simulator."""
    found = calls.child(TO_DIRECT, GPUCONV_TEST_FAKE_CUPY="1", NUMBA_ENABLE_CUDASIM="1")
    assert found.split() == ["right", "direct", "right", "right"]


# ---- the epilogue


@of_the_stand_in
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_one_pass_finishes_the_result(asked, dtype, biased, activation):
    x, k = integers((2, 8, 6, 6), dtype), integers((8, 8, 3, 3), dtype)
    bias = integers((8,), dtype, 1) if biased else None
    y = conv2d(x, k, bias, activation=activation, backend="cupy.gemm")
    np.testing.assert_array_equal(y, conv2d(x, k, bias, activation=activation, backend="numpy.reference"))
    needed = biased or activation is not None or dtype != "float32"
    assert asked.launches.count("epilogue") == len(asked.products) * needed


@of_the_stand_in
def test_the_pass_lets_nan_through_and_rectifies_the_rest():
    x = np.array([[np.nan, -np.inf, np.inf, -1.0, 0.0, 2.0]], np.float32)
    for dtype in ("float32", "float16"):
        y = conv2d(x.astype(dtype), np.ones((1, 1), dtype), activation="relu", backend="cupy.gemm")
        np.testing.assert_array_equal(y, np.array([[np.nan, 0, np.inf, 0, 0, 2]], dtype))


@of_the_stand_in
def test_a_16_bit_result_is_rounded_once():
    """1 + 2^-11 + 2^-22 in float32 is just above the middle between two float16 numbers."""
    x, k = np.float16([[1, 2.0**-11, 2.0**-11]]), np.float16([[1, 1, 2.0**-11]])
    y = conv2d(x, k, backend="cupy.gemm")
    assert y.dtype == np.float16
    assert y[0, 0] == np.float16(1 + 2.0**-10)


# ---- one product per row of the kernel


@pytest.fixture
def rows(monkeypatch):
    """Wherever rows can, they serve."""
    monkeypatch.setattr(gemm_rows, "better", lambda *facts: True)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


@of_the_stand_in
@pytest.mark.parametrize(("dilation", "fraction"), [(1, 1), (1, 5), ((2, 3), 2)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_rows_are_added_up_in_the_sums(asked, rows, dtype, dilation, fraction):
    """Of windows in one copy, the first product written, the others added; within the scratch that is announced."""
    x, k, bias = integers((9, 10, 11, 16), dtype), integers((8, 16, 3, 3), dtype), integers((8,), dtype)
    options = {"padding": 2, "dilation": dilation, "activation": "relu", "layout": "NHWC"}
    limit = explain(x, k, bias, backend="cupy.gemm", **options).workspace // fraction
    report = explain(x, k, bias, backend="cupy.gemm", workspace_limit=limit, **options)
    expected = conv2d(x, k, bias, backend="numpy.reference", **options)
    asked.held = asked.most = 0
    y = conv2d(x, k, bias, backend="cupy.gemm", workspace_limit=limit, **options)
    np.testing.assert_array_equal(y, expected)
    assert 0 < asked.most - y.nbytes <= report.workspace
    count, batch = (3, 3) if dilation == 1 else (9, 1)
    chunks = asked.launches.count("im2col")
    assert (chunks == 1) == (fraction == 1)
    assert asked.launches == ["im2col", "epilogue"] * chunks
    assert len(asked.products) == count * chunks
    assert asked.uploads <= 5
    for number, product in enumerate(asked.products):
        assert (product["m"], product["k"], product["batch"]) == (8, 16 * batch, batch)
        assert (product["alpha"] == product["beta"]) == (number % count > 0)
        assert product["c_type"] == {"float64": 1}.get(dtype, 0)
        assert product["lda"] % 8 == product["ldb"] % 8 == product["ldc"] % 8 == 0, "whole vectors"


@of_the_stand_in
def test_one_nan_is_in_the_windows_that_read_it(rows):
    x, k = integers((2, 6, 7, 8), "float16"), np.abs(integers((4, 8, 3, 3), "float16")) + np.float16(1)
    x[1, 2, 3, 4] = np.nan
    y = conv2d(x, k, padding=1, layout="NHWC", backend="cupy.gemm")
    reads = np.zeros((2, 6, 7), bool)
    reads[1, 1:4, 2:5] = True
    np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(reads[..., None], y.shape))


@of_the_stand_in
def test_the_balance_is_that_of_the_gpu(monkeypatch):
    import cupy

    balance = cupy_gemm._balance.__wrapped__
    found = []
    for capability in ("75", "80", "90", "120"):
        monkeypatch.setattr(cupy.cuda, "Device", lambda ordinal, c=capability: SimpleNamespace(compute_capability=c))
        found.append(balance(0, "float16"))
    assert found == [16, 64, 128, 16]
    assert balance(0, "complex64") is None
