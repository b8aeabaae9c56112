"""Convolution by Fourier transforms: its promise on errors, its tiles, its threads, its memory, and what it refuses."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from test_separable import HIGH, LIMIT, MODES, error, guarded, reference

import gpuconv
from gpuconv import dispatch, request
from gpuconv.backends import numpy_fft
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

# One tile, many, kernels larger than the image, channels and groups.
SHAPES = [
    ((2, 1, 3, 4), (1, 1, 5, 5), ((3, 1), (2, 6)), {}),
    ((1, 4, 40, 300), (6, 2, 4, 7), 3, {"groups": 2, "activation": "relu"}),
    ((1, 3, 131, 97), (2, 3, 15, 9), ((0, 20), (9, 0)), {"padding_value": -2}),
    ((1, 1, 300, 500), (1, 1, 3, 2), 1, {}),
    ((1, 1, 30, 20), (1, 1, 67, 91), ((60, 3), (1, 90)), {}),
    ((2, 20, 9, 31), (3, 9, 8, 2), 0, {"layout": "NHWC"}),
    ((1, 1, 1, 1), (1, 1, 1, 1), 0, {}),
]


def target(threads: int = 2) -> Target:
    return Target("cpu", None, threads)


def posed(x_shape: tuple[int, ...], k_shape: tuple[int, ...], **kwargs: Any) -> Any:
    rng = np.random.default_rng(x_shape[-1])
    if kwargs.get("layout") == "NHWC":
        k_shape = (k_shape[0], x_shape[-1], *k_shape[2:])
    problem = Conv2dProblem.of(x_shape, k_shape, bias=True, precision="high", **kwargs)
    x, k = (guarded(shape, rng.standard_normal(shape))[0] for shape in (x_shape, k_shape))
    return problem, x, k, rng.standard_normal(k_shape[0]).astype(np.float32)


def computed(problem: Conv2dProblem, x: Any, k: Any, bias: Any, threads: int = 2, packed: bool = False,
             limit: int = LIMIT) -> Any:  # fmt: skip
    assert numpy_fft.unsupported(problem, target(threads)) == []
    y, whole = guarded(problem.y_shape)
    if problem.layout == "NHWC":
        y = y.reshape([problem.N, problem.OH, problem.OW, problem.O])
    plan = numpy_fft.plan(problem, target(threads), limit)
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, k), bias)
    if packed:
        operands.packed = numpy_fft.pack(plan, operands)
    numpy_fft.run(plan, operands, request.view(problem, 2, y))
    assert np.isnan(whole[:129]).all() and np.isnan(whole[129 + y.size :]).all()
    return y if problem.layout == "NCHW" else y.transpose(0, 3, 1, 2)


def wrong_by(problem: Conv2dProblem, y: Any, x: Any, k: Any, bias: Any) -> float:
    if problem.layout == "NCHW":
        return error(problem, y, x, k, bias)
    first = Conv2dProblem.of((problem.N, problem.C, problem.H, problem.W), problem.k_shape, bias=True)
    return error(first, y, x.transpose(0, 3, 1, 2), k, bias)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("x_shape", "k_shape", "padding", "kwargs"), SHAPES)
def test_the_promise(x_shape, k_shape, padding, kwargs, mode):
    kwargs = kwargs | {"padding_mode": mode}
    if mode != "constant":
        kwargs.pop("padding_value", None)
    problem, x, k, bias = posed(x_shape, k_shape, padding=padding, **kwargs)
    # In float64 it is the rounding of the result alone.
    assert wrong_by(problem, computed(problem, x, k, bias), x, k, bias) <= 1e-7


def test_a_bright_pixel_that_only_a_small_weight_meets():
    """The promise is relative to |x| * |k|, not to what else is in the tile."""
    x, k = np.full((1, 1, 100, 100), 1e-3, np.float32), np.full((1, 1, 31, 31), 1, np.float32)
    x[0, 0, 0, 0], k[0, 0, 0, 0] = 1e5, 1e-8
    problem = Conv2dProblem.of(x.shape, k.shape, precision="high")
    assert error(problem, computed(problem, x, k, None), x, k) <= HIGH / 20


def test_finite_images_stay_finite():
    k = np.full((1, 1, 31, 31), 1 / 961, np.float32)
    for scale in (3e38, 1e-38):
        x = (np.random.default_rng(1).uniform(-1, 1, (1, 1, 90, 80)) * scale).astype(np.float32)
        problem = Conv2dProblem.of(x.shape, k.shape, precision="high")
        y = computed(problem, x, k, None)
        assert np.isfinite(y).all()
        assert np.abs(y - reference(problem, x, k)).max() <= 1e-7 * scale


def test_threads_batches_and_preparation_change_no_bit():
    problem, x, k, bias = posed((3, 4, 70, 130), (6, 2, 12, 9), groups=2, padding=5, padding_mode="symmetric")
    y = computed(problem, x, k, bias)
    assert np.array_equal(y, computed(problem, x, k, bias, packed=True))
    for threads in (1, 3, 8):
        assert np.array_equal(y, computed(problem, x, k, bias, threads))
    one = Conv2dProblem.of((1, 4, 70, 130), k.shape, bias=True, groups=2, padding=5, padding_mode="symmetric",
                           precision="high")  # fmt: skip
    for n in range(3):
        assert np.array_equal(y[n : n + 1], computed(one, x[n : n + 1], k, bias))
    apart = np.full((3, 4, 140, 390), np.nan, np.float32)[:, :, ::2, ::3]
    apart[...] = x
    for image in (apart, np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]):
        assert np.array_equal(y, computed(problem, image, k[..., ::-1][..., ::-1], bias))


@pytest.mark.parametrize("mode", ("constant", "reflect"))
def test_scratch_is_within_what_is_announced(mode):
    problem, x, k, bias = posed((2, 2, 100, 90), (5, 2, 20, 30), padding=9, padding_mode=mode)
    limits = (LIMIT, 3 << 20, 1 << 20)
    plans = [numpy_fft.plan(problem, target(), limit) for limit in limits]
    assert len({plan.config["block"] for plan in plans}) > 1, "kernels a few at a time"
    assert len({plan.config["tile"] for plan in plans}) > 1, "and smaller tiles"
    x5, k5, out = request.view(problem, 0, x), request.view(problem, 1, k), np.empty(problem.y_shape, np.float32)
    for plan, limit in zip(plans, limits, strict=True):
        assert plan.workspace <= limit
        for packed in (False, True):
            operands = Operands(x5, k5, bias)
            operands.packed = numpy_fft.pack(plan, operands) if packed else None
            tracemalloc.start()
            try:
                numpy_fft.run(plan, operands, request.view(problem, 2, out))
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak <= plan.workspace + 192 * 1024
            assert error(problem, out, x, k, bias) <= 1e-7
    with pytest.raises(MemoryError, match=r"numpy\.fft .* needs at least"):
        numpy_fft.plan(problem, target(), 100_000)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    (
        ({"precision": "highest"}, "rounding errors"),
        ({"stride": 2}, "without stride"),
        ({"dilation": (1, 2)}, "without stride"),
        ({"x_dtype": "float64"}, "float32"),
        ({"x_dtype": "int8", "k_dtype": "int8"}, "float32"),
        ({"x_dtype": "complex64"}, "float32"),
        ({"k_dtype": "float16"}, "float32"),
    ),
)
def test_what_it_refuses(kwargs, reason):
    problem = Conv2dProblem.of((1, 2, 19, 19), (4, 2, 5, 5), **{"precision": "high"} | kwargs)
    assert [text for text in numpy_fft.unsupported(problem, target()) if reason in text]


@pytest.mark.parametrize(
    ("x_shape", "k_shape", "worth"),
    (
        ((1, 1, 2048, 2048), (1, 1, 63, 63), True),
        ((1, 1, 512, 512), (1, 1, 127, 127), True),
        ((1, 3, 512, 512), (16, 3, 31, 31), True),
        ((1, 1, 2048, 2048), (1, 1, 31, 31), False),
        ((1, 1, 256, 256), (1, 1, 63, 63), False),
        ((1, 64, 128, 128), (64, 64, 31, 31), False),
        ((1, 64, 56, 56), (64, 64, 3, 3), False),
    ),
)
def test_what_it_is_worth(x_shape, k_shape, worth):
    for precision, expected in (("high", worth), ("medium", worth), ("highest", False)):
        problem = Conv2dProblem.of(x_shape, k_shape, padding="same", precision=precision)
        names, rules = dispatch.preferred(problem, "cpu")
        names = [name for name in names if name not in ("numba_cpu.separable", "numba_cpu.fft")]
        assert (names[0] == numpy_fft.NAME) is expected
        assert not expected or "Fourier" in rules[names[0]]


def test_through_the_public_calls():
    rng = np.random.default_rng(5)
    x, k = rng.standard_normal((2, 3, 60, 50), dtype=np.float32), rng.standard_normal((4, 3, 20, 20), dtype=np.float32)
    options: dict[str, Any] = {"padding": 4, "precision": "high", "activation": "relu", "backend": numpy_fft.NAME}
    layer = gpuconv.Conv2d(k, **options)
    y = gpuconv.conv2d(x, k, **options)
    for _ in range(2):
        assert np.array_equal(layer(x), y)
        assert np.array_equal(gpuconv.conv2d(x, k, **options), y)
    assert np.array_equal(y, gpuconv.conv2d(x, k[..., ::-1, ::-1].copy(), flip=True, **options))
    swapped = x.astype(x.dtype.newbyteorder())
    assert np.array_equal(y, gpuconv.conv2d(swapped, k, **options))
    with pytest.raises(gpuconv.NoBackendError, match="highest"):
        gpuconv.conv2d(x, k, backend=numpy_fft.NAME)
