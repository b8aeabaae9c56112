"""``gemm_rows``, one product per row of the kernel, on NumPy: exactly, in any chunks, and where it is chosen.

``test_cupy_gemm.py`` has what it asks of cuBLAS.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import units
from cases import Case

import gpuconv
from gpuconv import dispatch
from gpuconv.backends import cupy_gemm, gemm_gradients, gemm_rows, products
from gpuconv.backends.protocol import Plan, Target
from gpuconv.problem import Conv2dProblem


@pytest.fixture
def rows(monkeypatch):
    """numpy.gemm works by rows wherever they serve; their plans."""
    plans: list[Plan] = []
    by_columns = gemm_gradients.plan_forward

    def plan(name: str, problem: Conv2dProblem, limit: int, columns_in: str, sums_in: str, *rest: Any) -> Plan:
        found = None
        if gemm_rows.serves(problem, columns_in, sums_in):
            found = gemm_rows.plan(name, problem, limit, columns_in, sums_in, None, 0)
        if found is None:
            return by_columns(name, problem, limit, columns_in, sums_in, *rest)
        plans.append(found)
        return found

    monkeypatch.setattr(gemm_gradients, "plan_forward", plan)
    dispatch.choose.cache_clear()
    yield plans
    dispatch.choose.cache_clear()


def run(x: np.ndarray, k: np.ndarray, bias: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
    return gpuconv.conv2d(x, k, bias, backend="numpy.gemm", **kwargs)


CASES = [
    Case("3x3", (3, 7, 9, 16), (8, 16, 3, 3), {"padding": 1}, bias=True),
    Case("2x4", (2, 6, 5, 8), (4, 8, 2, 4), {"padding": ((0, 3), (2, 1)), "activation": "relu"}),
    Case("valid", (2, 5, 7, 8), (12, 8, 3, 3)),
    Case("row", (2, 4, 9, 12), (4, 12, 1, 5), {"padding": (0, 2)}),
    Case("column", (2, 9, 4, 12), (4, 12, 5, 1), {"padding": (2, 0)}),
    Case("dilated", (2, 8, 9, 8), (4, 8, 3, 2), {"dilation": (2, 3), "padding": 4}, bias=True),
    Case("dilated rows", (2, 8, 9, 8), (4, 8, 3, 3), {"dilation": (3, 1), "padding": (3, 1)}),
    Case("whole", (3, 4, 5, 8), (4, 8, 4, 5)),
    Case("padded with 3", (1, 3, 3, 8), (4, 8, 3, 3), {"padding": 4, "padding_value": 3}),
    Case("reflected", (2, 5, 6, 8), (4, 8, 3, 3), {"padding": 2, "padding_mode": "reflect"}),
    Case("flipped", (1, 5, 6, 8), (4, 8, 3, 2), {"flip": True}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact(rows, case, dtype):
    case = replace(case, kwargs={**case.kwargs, "layout": "NHWC"})
    units.check(run, case, dtype, "wide", into=True)
    units.check(run, case, dtype, "normal")
    assert rows


def test_special_values_reach_the_windows_that_read_them(rows):
    """And nothing of the memory between and behind the rows, which begins as NaN."""
    case = Case("specials", (2, 6, 7, 8), (4, 8, 3, 3), {"padding": 1, "layout": "NHWC"})
    for value in (np.nan, np.inf, -np.inf):
        units.check_specials(run, case, "float32", value)
    assert rows


def test_any_chunks(rows, monkeypatch):
    """From one row of one image on; below that columns are made."""
    rng = np.random.default_rng(1)
    x, k = rng.integers(-3, 4, (5, 9, 8, 8)).astype("f"), rng.integers(-3, 4, (4, 8, 3, 3)).astype("f")
    wanted = gpuconv.conv2d(x, k, padding=1, layout="NHWC", backend="numpy.reference")
    blocks = set()
    for limit in (4_600, 8_000, 14_000, 20_000, 30_000, 60_000, 1 << 20):
        found = run(x, k, padding=1, layout="NHWC", workspace_limit=limit)
        np.testing.assert_array_equal(found, wanted)
        blocks |= {plan.config["rows"] for plan in rows if plan.workspace <= limit}
    assert {n for n, _ in blocks} >= {1, 2, 5} and {i for _, i in blocks} >= {1, 9}
    before = len(rows)
    np.testing.assert_array_equal(run(x, k, padding=1, layout="NHWC", workspace_limit=4_400), wanted)
    assert len(rows) == before


def test_input_gradients(rows):
    """Of stride 2 they are four convolutions, of which two with more than one tap each way."""
    rng = np.random.default_rng(2)
    for stride in (1, 2):
        k = rng.integers(-3, 4, (8, 4, 3, 3)).astype("f")
        size = (2, 9, 7, 4)
        shape = gpuconv.conv2d(np.zeros(size, "f"), k, stride=stride, padding=1, layout="NHWC").shape
        dy = rng.integers(-3, 4, shape).astype("f")
        options = {"stride": stride, "padding": 1, "layout": "NHWC"}
        found = gpuconv.grad.conv2d_input(size, k, dy, **options, backend="numpy.gemm")
        np.testing.assert_array_equal(
            found, gpuconv.grad.conv2d_input(size, k, dy, **options, backend="numpy.reference")
        )
    assert len(rows) == 1 + 3


def test_a_prepared_kernel_serves_both_ways(rows):
    rng = np.random.default_rng(3)
    k, x = rng.standard_normal((4, 8, 3, 3)).astype("f"), rng.standard_normal((2, 6, 7, 8)).astype("f")
    layer = gpuconv.Conv2d(k, padding=1, layout="NHWC", backend="numpy.gemm")
    np.testing.assert_array_equal(layer(x), run(x, k, padding=1, layout="NHWC"))
    layer = gpuconv.Conv2d(k, padding=1, layout="NHWC", backend="numpy.gemm", workspace_limit=4_400)
    np.testing.assert_allclose(layer(x), run(x, k, padding=1, layout="NHWC"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("line", [
    "n1c8h5w5_o4kh3kw3_p1_f32", "n1c8h5w5_o4kh3kw3_s2p1_nhwc_f32", "n1c8h5w5_o4kh3kw3_p1g2_nhwc_f32",
    "n1c8h5w5_o4kh1kw1_nhwc_f32", "n1c6h5w5_o4kh3kw3_p1_nhwc_f32", "n1c8h5w5_o3kh3kw3_p1_nhwc_f32",
    "n1c8h5w5_o4kh3kw3_p1_nhwc_c64", "n1c16h5w5_o4kh3kw3_p1_nhwc_u8*i8", "n0c8h5w5_o4kh3kw3_p1_nhwc_f32",
    "n1c8h5w5_o4kh3kw3_p1_nhwc_f32*f64", "n1c4h5w5_o4kh3kw3_p1_nhwc_f64",
])  # fmt: skip
def test_what_it_is_not_for(line):
    problem = Conv2dProblem.parse(line)
    assert not gemm_rows.serves(problem, *cupy_gemm.columns_and_sums(problem))


def planned(line: str) -> Plan:
    return cupy_gemm.plan(Conv2dProblem.parse(line), Target("cuda", None), 256 << 20)


@pytest.mark.parametrize(("line", "by_rows"), [
    ("n32c128h56w56_o32kh3kw3_p1_nhwc_f32", True),
    ("n8c256h100w100_o36kh3kw3_p1_nhwc_f32", True),
    ("n8c64h512w512_o8kh9kw9_p4_nhwc_f16", True),
    ("n32c36h100w100_o256kh3kw3_p1_nhwc_f32_dgrad", True),
    ("n32c256h56w56_o128kh3kw3_p1_nhwc_f32", False),  # arithmetic is what takes the time
    ("n32c128h56w56_o128kh3kw3_p1_nhwc_f16", False),  # sums twice as wide as columns
    ("n1c128h56w56_o32kh3kw3_p1_nhwc_f32", False),  # too small for the launches
    ("n32c128h56w56_o32kh3kw3_p1_f32", False),
    ("n32c256h56w56_o36kh3kw3_d12p12_nhwc_f32", False),  # 9 products, and much garbage
])  # fmt: skip
def test_where_it_is_chosen(line, by_rows):
    plan = planned(line)
    assert ("no im2col" in plan.detail) == by_rows
    assert plan.workspace <= 256 << 20


def test_the_estimate_is_that_of_the_docstring(monkeypatch):
    """Whose figures are of an H100."""
    problem = Conv2dProblem.parse("n32c128h56w56_o32kh3kw3_p1_nhwc_f32")
    gains = []
    for cache in (1 << 40, 25 << 20):
        plans = [
            cupy_gemm.plan(problem, Target("cuda", None), 256 << 20),
            gemm_gradients.plan_forward("", problem, 256 << 20, "float32", "float32", 0, False, 25 << 20, 2 * 10**9),
        ]
        low, high = 0.0, 16.0
        for _ in range(40):
            middle = (low + high) / 2
            monkeypatch.setattr(gemm_rows, "_GAIN", middle)
            low, high = (middle, high) if gemm_rows.better(plans[1], plans[0], cache, 8) else (low, middle)
            monkeypatch.undo()
        gains.append(low)
    columns = 2 * 9 * 128 * 4 + max(9 * 128 * 4 + 4 * 32, 2 * 9 * 128 * 32 / 8)
    waste = 58 * 58 / 56**2
    rows = waste * (2 * 128 * 4 + max(9 * 128 * 4 + 5 * 4 * 32, 2 * 9 * 128 * 32 / 8)) + 8 * 32
    assert gains[0] == pytest.approx(columns / rows)
    assert gains[1] > gains[0], "columns larger than the cache"


@pytest.mark.parametrize("shape", [(3, 0, 4), (3, 5, 4), (1, 1500, 4), (2, 2000, 1)])
def test_products_are_added(shape):
    """Also long sums, which are made of short ones."""
    rng = np.random.default_rng(4)
    M, K, P = shape
    a, b = rng.integers(-4, 5, (2, M, K)).astype("f"), rng.integers(-4, 5, (2, K, P)).astype("f")
    out = rng.integers(-4, 5, (2, M, P)).astype("f")
    wanted = out + a @ b
    products.matmul(a, b, out, accumulate=True)
    np.testing.assert_array_equal(out, wanted)
    products.matmul(a, b, out)
    np.testing.assert_array_equal(out, a @ b)
