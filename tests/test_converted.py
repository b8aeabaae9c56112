"""The compiled CPU kernels on operands of other types than their sums: converted as they are read, integers exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dispatch, request
from gpuconv.backends.numba_cpu import dense, runtime
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

INTEGERS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")
SHAPES = {  # x, k and what else, for each kernel that an image may meet
    "rows": ((2, 1, 9, 21), (3, 1, 3, 5), {"padding": 1}),
    "lanes": ((1, 20, 9, 9), (20, 1, 3, 3), {"padding": 1, "groups": 20}),
    "channels": ((1, 9, 7, 20), (20, 1, 3, 3), {"padding": 1, "groups": 20, "layout": "NHWC"}),
    "strip": ((1, 5, 9, 11), (7, 5, 3, 3), {"stride": 2, "padding": ((1, 2), (0, 3)), "padding_mode": "reflect"}),
}


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if dtype in ("float32", "float64"):
        return rng.integers(-9, 10, shape).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return rng.integers(max(low, -(1 << 15)), min(high, 1 << 15), shape, dtype, endpoint=True)


def some(cases: Iterable[tuple[str, ...]], quick: Callable[..., bool]) -> list[Any]:
    """Parameters, those that are not ``quick`` for the long profile: each compiles a kernel of its own."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.full) for case in cases]


@pytest.mark.parametrize(
    ("name", "image", "kernel"),
    some(
        itertools.product(SHAPES, (*INTEGERS, "float32"), ("float32", "float64")),
        lambda name, image, kernel: (
            (image, kernel) in {("uint8", "float32"), ("int16", "float64")}
            or (name == "rows" and kernel == "float32" and image in ("bool", "int32", "uint32", "int64"))
        ),
    ),
)
def test_an_image_is_converted_as_it_is_read(name, image, kernel):
    x_shape, k_shape, options = SHAPES[name]
    x, k = numbers(x_shape, image), numbers(k_shape, kernel, 1)
    y = gpuconv.conv2d(x, k, **options, backend="numba_cpu")
    assert y.dtype == kernel
    assert np.array_equal(y, gpuconv.conv2d(x.astype(kernel), k, **options, backend="numpy.reference"))


@pytest.mark.parametrize(
    ("name", "image", "kernel"),
    some(
        itertools.product(("rows", "strip"), ("bool", "uint8", "int16"), INTEGERS),
        lambda name, image, kernel: name == "rows" and image != "bool",
    ),
)
def test_integers_are_exact(name, image, kernel):
    x_shape, k_shape, options = SHAPES[name]
    x, k = numbers(x_shape, image), numbers(k_shape, kernel, 1)
    y = gpuconv.conv2d(x, k, **options, backend="numba_cpu")
    wanted = gpuconv.conv2d(x, k, **options, backend="numpy.reference")
    assert y.dtype == wanted.dtype
    assert np.array_equal(y, wanted)


@pytest.mark.parametrize(
    "bits",  # this machine's own in the long profile: other tests are on it
    [pytest.param(b, marks=pytest.mark.full if b == runtime.vector_bits() else ()) for b in (128, 256, 512)],
)
def test_integers_in_registers_of_any_width(bits):
    problem = Conv2dProblem.of((2, 1, 9, 37), (2, 1, 3, 3), x_dtype="uint8", k_dtype="int8", padding=1, bias=True)
    x, k = numbers(problem.x_shape, "uint8"), numbers(problem.k_shape, "int8", 1)
    bias, y = np.array([-(1 << 30), 1 << 30], np.int32), np.zeros(problem.y_shape, np.int32)
    implementation = dispatch.implementation("numba_cpu.rows")
    plan = implementation.plan(problem, Target("cpu", None, 2, bits), 1 << 28)
    assert plan.sums_in == "float64"  # for the bias
    implementation.run(plan, Operands(*(request.view(problem, i, a) for i, a in enumerate((x, k))), bias),
                       request.view(problem, 2, y))  # fmt: skip
    assert np.array_equal(y, gpuconv.conv2d(x, k, bias, padding=1, backend="numpy.reference"))


@pytest.mark.parametrize(("weight", "sums"), [(255, "float32"), (256, "float64")])
def test_sums_are_in_the_narrowest_type_that_has_them_all(weight, sums):
    """float32 has every integer up to 2²⁴, and 2²⁴ + 1 no more; weights are told apart by their number of digits."""
    x, k = np.full((1, 1, 4, 64), -(1 << 15), np.int16), np.array([[weight], [weight]])
    report = gpuconv.explain(x, k[None, None])
    assert report.implementation.startswith("numba_cpu.") and report.plan.sums_in == sums
    y = gpuconv.conv2d(x, k[None, None])
    assert y.dtype == np.int64
    assert np.all(y == -(weight << 16))


def test_the_largest_sums_are_exact():
    problem = Conv2dProblem.of((1, 1, 1, 9), (1, 1, 1, 1), x_dtype="int32", k_dtype="int64")
    for digits, sums in ((22, "float64"), (23, None)):
        assert dense.sums_in(problem, Target("cpu", k_digits=digits)) == sums
    x = np.array([[-(2**31), 2**31 - 1]], np.int32)
    for weight in ((1 << 22) - 1, (1 << 23) - 1, -(1 << 30)):
        assert gpuconv.conv2d(x, [[weight]]).tolist() == [[-(2**31) * weight, (2**31 - 1) * weight]]


def test_large_weights_wrap_as_numpy_does():
    x, k = np.full((3, 3), 255, np.uint8), np.array([[2**62 + 1]])
    assert gpuconv.explain(x, k).implementation.startswith("numpy.")
    with np.errstate(over="ignore"):
        assert np.array_equal(gpuconv.conv2d(x, k), x * k)


def test_a_call_like_the_last_one_looks_at_its_own_weights():
    x = np.full((3, 3), 255, np.uint8)
    for weight in (1, 2**62 + 1, 3, -(2**63)):
        with np.errstate(over="ignore"):
            assert np.array_equal(gpuconv.conv2d(x, np.array([[weight]])), x * np.array([[weight]])), weight


def test_a_prepared_kernel_of_integers():
    kernel = np.array([[1, 0, -1]] * 3)
    layer = gpuconv.Conv2d(kernel, padding="same")
    for dtype in ("uint8", "int16", "float32", "int64"):
        x = numbers((9, 11), dtype)
        for _ in range(2):
            assert np.array_equal(layer(x), gpuconv.conv2d(x, kernel, padding="same", backend="numpy.reference"))


def test_a_photograph_and_a_kernel_as_they_come():
    """The usual call of image processing runs compiled: bytes and a list of integers, or a mean in float64."""
    photo = numbers((64, 80), "uint8")
    for kernel in ([[1, 0, -1]] * 3, np.ones((5, 5)) / 25, np.ones((5, 5), np.float32) / 25):
        assert gpuconv.explain(photo, kernel, padding="same").implementation == "numba_cpu.planes"
        assert gpuconv.explain(photo.astype(np.float32), kernel, padding="same").implementation == "numba_cpu.planes"


def test_a_refusal_of_integers_says_what_helps():
    reasons = dispatch.implementation("numba_cpu.strip").unsupported(
        Conv2dProblem.of((1, 9, 9, 9), (4, 9, 3, 3), x_dtype="int32", k_dtype="int64"), Target("cpu")
    )
    assert len(reasons) == 1 and reasons[0].endswith("where the values of both are seen to rule that out, it can")
