"""Wide integers on the compiled CPU kernels: their values prove that floating point has every sum, or they do not."""

from __future__ import annotations

import numpy as np
import pytest

import gpuconv
from gpuconv import magnitudes
from gpuconv.backends.numba_cpu import runtime
from gpuconv.problem import Conv2dProblem

compiled = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

TOP = 1 << 53  # float64 has 2^53, and 2^53 + 1 no more


def reference(x, k, *args, **options):
    return gpuconv.conv2d(x, k, *args, **options, backend="numpy.reference")


def test_the_largest_magnitude_of_any_array():
    rng = np.random.default_rng(0)
    x = rng.integers(-99, 99, (5, 300, 400))
    for place, value in (((0, 0, 0), 1000), ((4, 299, 399), -1001), ((2, 170, 3), -(1 << 63)), ((1, 0, 9), 7)):
        x[place] = value
        for view in (
            x,
            x.T,
            x[::-1, ::7, ::-3],
            x[:, 40:-40, 5:-5],
            x[2, 170],
            np.broadcast_to(x[:1, :, 3:4], (9, 300, 2)),
        ):
            assert magnitudes.largest(view) == max(abs(int(view.min())), abs(int(view.max())))
    assert magnitudes.largest(np.zeros((3, 0), np.int64)) == 0
    assert magnitudes.largest(np.array(-7)) == 7
    assert magnitudes.largest(np.ones((2, 2), bool)) == 1


@pytest.mark.parametrize(("op", "weights"), [("forward", 14), ("input_grad", 10)])
def test_the_weights_of_one_result(op, weights):
    problem = Conv2dProblem.of((1, 3, 9, 9), (2, 3, 1, 1), x_dtype="int64", k_dtype="int64", op=op)
    k = np.array([[-5, 1, 2], [-5, 4, -5]]).reshape(1, 2, 3, 1, 1)
    assert magnitudes.largest_weights(problem, k) == weights
    assert magnitudes.largest_weights(problem, k << 59) is None
    assert magnitudes.largest_weights(problem, k << 56) == weights << 56


@compiled
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_that_float64_has(sign):
    """2^53 is proven exact, more is not: the same answer from another implementation."""
    k = np.array([[0, 0, 0], [1, -1, 2], [0, 0, 0]])
    for extra, library in ((0, "numba_cpu"), (1, "numpy")):
        x = np.full((6, 50), 5)
        x[2, 7] = sign * ((TOP >> 2) + extra)
        assert gpuconv.explain(x, k).implementation.startswith(library + ".")
        assert np.array_equal(gpuconv.conv2d(x, k), reference(x, k))


@compiled
def test_a_bias_and_the_padding_count_too():
    x, k = np.full((1, 6, 40), 3), np.ones((1, 1, 3, 3), np.int64)
    for bias, value, library in (
        (1 << 52, 0, "numba_cpu"), (TOP, 0, "numpy"), (-5, 1 << 49, "numba_cpu"), (1, 1 << 50, "numpy")
    ):  # fmt: skip
        options = {"padding": 1, "padding_value": value, "activation": "relu"}
        b = np.array([bias])
        assert gpuconv.explain(x, k, b, **options).implementation.startswith(library + ".")
        y = gpuconv.conv2d(x, k, b, **options, backend="numba_cpu.strip" if library == "numba_cpu" else None)
        assert np.array_equal(y, reference(x, k, b, **options))


@compiled
def test_sums_beyond_int64_wrap():
    x, k = np.full((5, 70), (1 << 62) + 12345), np.arange(9).reshape(3, 3)
    y = gpuconv.conv2d(x, k)
    assert np.array_equal(y, reference(x, k))
    assert int(y[0, 0]) == (36 * ((1 << 62) + 12345) + (1 << 63)) % (1 << 64) - (1 << 63)


@compiled
def test_a_repeated_call_looks_at_its_own_image():
    k = np.arange(-4, 5).reshape(3, 3)
    layer = gpuconv.Conv2d(k)
    rng = np.random.default_rng(3)
    for top in (100, 1 << 40, 1 << 62, 50, (1 << 63) - 1):
        x = rng.integers(-top, top, (9, 33))
        wanted = reference(x, k)
        assert np.array_equal(gpuconv.conv2d(x, k), wanted), top
        assert np.array_equal(layer(x), wanted), top


@compiled
def test_siblings_look_at_their_images_too():
    x = np.random.default_rng(4).integers(-(1 << 20), 1 << 20, (2, 3, 8, 20))
    k = np.array([3, -(1 << 20), 5, 7]).repeat(6).reshape(4, 3, 1, 2)
    for call, image, kernel in (
        (gpuconv.conv2d, x, k),
        (gpuconv.conv_transpose2d, x, k.swapaxes(0, 1)),
        (gpuconv.conv1d, x[:, :, 0], k[:, :, 0]),
    ):
        y = call(image, kernel, backend="numba_cpu.strip")
        assert y.dtype == np.int64
        assert np.array_equal(y, call(image, kernel, backend="numpy.reference"))


@compiled
@pytest.mark.parametrize(("dtype", "digits"), [("bool", 49), ("int32", 40), ("uint32", 40), ("int64", 40)])
def test_every_wide_type(dtype, digits):
    """What the type allows is too much, what the image holds is not."""
    x, k = np.ones((64, 64), dtype), np.full((3, 3), 1 << digits)
    assert gpuconv.explain(x, k).implementation == "numba_cpu.planes"
    assert gpuconv.explain(x, k << (60 - digits)).implementation.startswith("numpy.")


@compiled
def test_shapes_alone_do_not_tell():
    report = gpuconv.explain((64, 64), (3, 3), input_dtype="int64")
    assert report.implementation.startswith("numpy.")
    assert "where the values of both are seen" in str(report)
    x, k = np.zeros((64, 64), np.int64), np.ones((3, 3), np.int64)
    assert gpuconv.explain(x, k).implementation == "numba_cpu.planes"
    assert gpuconv.explain(x[None], k[None, None], True).implementation.startswith("numpy.")  # a bias not at hand


@compiled
def test_numbers_of_64_bits_are_converted_exactly():
    """float64 of any int64 is rounded once; int64 of what is an integer is that."""
    rng = np.random.default_rng(5)
    x = rng.integers(-(1 << 63), (1 << 63) - 1, (10, 65), np.int64, endpoint=True) >> rng.integers(0, 63, (10, 65))
    x[0, :6] = 0, -1, 1, -(1 << 63), (1 << 63) - 1, (1 << 62) + 257
    k = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    y = gpuconv.conv2d(x, k.astype(np.float64), padding=1, backend="numba_cpu.planes")
    assert np.array_equal(y, x.astype(np.float64))
    assert not np.signbit(y[0, 0])
    small = np.clip(x, -TOP, TOP)
    assert np.array_equal(gpuconv.conv2d(small, k, padding=1, backend="numba_cpu.planes"), small)
