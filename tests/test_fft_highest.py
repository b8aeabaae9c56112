"""Fourier transforms at the highest precision: the promise on every output, and what is summed product by product."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_separable import MODES, guarded, reference

import gpuconv
from gpuconv import dispatch, request
from gpuconv.backends.numba_cpu import fft, fft_bound, fft_certain, fft_stages, fft_table, runtime
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

LIMIT = 256 << 20
UNIT = 2.0**-24

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

# One tile, many, an odd number of them, kernels larger than the image, channels and groups, outputs narrower than a
# register.
SHAPES = [
    ((2, 1, 3, 4), (1, 1, 8, 5), ((6, 1), (2, 6)), {}),
    ((1, 4, 40, 300), (6, 2, 8, 7), 3, {"groups": 2, "activation": "relu"}),
    ((1, 3, 131, 97), (2, 3, 15, 9), ((0, 20), (9, 0)), {"padding_value": -2}),
    ((1, 1, 300, 500), (1, 1, 31, 31), 15, {}),
    ((1, 1, 30, 20), (1, 1, 67, 91), ((60, 3), (1, 90)), {}),
    ((2, 5, 19, 31), (3, 5, 18, 2), 0, {"layout": "NHWC"}),
    ((1, 3, 33, 40), (1, 3, 9, 40), 0, {}),
    ((1, 1, 8, 1), (1, 1, 8, 1), 0, {}),
]


def target(threads: int = 2, bits: int | None = None) -> Target:
    return Target("cpu", None, threads, bits)


def posed(x_shape: tuple[int, ...], k_shape: tuple[int, ...], positive: bool = False, **kwargs: Any) -> Any:
    """A problem, guarded operands with channels first, and a bias."""
    rng = np.random.default_rng(x_shape[-1])
    held = [x_shape[axis] for axis in (0, 2, 3, 1)] if kwargs.get("layout") == "NHWC" else x_shape
    problem = Conv2dProblem.of(tuple(held), k_shape, bias=True, **kwargs)
    draw = rng.random if positive else rng.standard_normal
    x, k = (guarded(shape, draw(shape))[0] for shape in (x_shape, k_shape))
    return problem, x, k, rng.standard_normal(k_shape[0]).astype(np.float32)


def computed(problem: Conv2dProblem, x: Any, k: Any, bias: Any = None, where: Target | None = None,
             packed: bool = False) -> Any:  # fmt: skip
    """The result of one plan, in guarded memory that must stay as it was."""
    where = where or target()
    y, whole = guarded(problem.y_shape)
    last = problem.layout == "NHWC"
    if last:
        x, y = np.ascontiguousarray(x.transpose(0, 2, 3, 1)), y.reshape([problem.N, problem.OH, problem.OW, problem.O])
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, k), bias)
    assert fft.unsupported(problem, where) == []
    plan = fft.plan(problem, where, LIMIT)
    if packed:
        operands.packed = fft.pack(plan, operands)
        operands.k = None
    fft.run(plan, operands, request.view(problem, 2, y))
    assert np.isnan(whole[:129]).all() and np.isnan(whole[129 + y.size :]).all()
    return y.transpose(0, 3, 1, 2) if last else y


def bound(problem: Conv2dProblem, x: Any, k: Any, bias: Any = None) -> Any:
    """Σ|x||k| of every output, and the bias."""
    plain = replace(problem, activation=None, padding_value=abs(problem.padding_value), layout="NCHW")
    return reference(plain, abs(x), abs(k), None if bias is None else abs(bias))


def kept(problem: Conv2dProblem, y: Any, x: Any, k: Any, bias: Any = None) -> bool:
    """Whether every output keeps the promise of the highest precision."""
    allowed = (problem.products + problem.bias) * UNIT * bound(problem, x, k, bias)
    return bool(np.all(abs(y - reference(replace(problem, layout="NCHW"), x, k, bias)) <= allowed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("x_shape", "k_shape", "padding", "kwargs"), SHAPES)
def test_the_promise_with_guard_bands(x_shape, k_shape, padding, kwargs, mode):
    kwargs = kwargs | {"padding_mode": mode}
    if mode != "constant":
        kwargs.pop("padding_value", None)
    problem, x, k, bias = posed(x_shape, k_shape, padding=padding, **kwargs)
    assert kept(problem, computed(problem, x, k, bias), x, k, bias)


@pytest.mark.parametrize("bits", (128, 512))
@pytest.mark.parametrize(("x_shape", "k_shape", "padding", "kwargs"), [SHAPES[1], pytest.param(*SHAPES[2],
                         marks=pytest.mark.full)])  # fmt: skip
def test_other_registers(x_shape, k_shape, padding, kwargs, bits):
    problem, x, k, bias = posed(x_shape, k_shape, padding=padding, **kwargs)
    assert kept(problem, computed(problem, x, k, bias, target(2, bits)), x, k, bias)


@pytest.mark.parametrize("C", (1, 3))
def test_results_are_mostly_the_exact_ones_rounded_once(C):
    """Of an ordinary image no tile is summed product by product, whose rounding errors are larger."""
    problem, x, k, bias = posed((1, C, 200, 300), (2, C, 31, 31), True, padding=15)
    wanted = reference(problem, x, k, bias).astype(np.float32)
    assert (computed(problem, x, k, bias) == wanted).mean() > 0.999
    assert (gpuconv.conv2d(x, k, bias, padding=15, backend="numba_cpu.strip") == wanted).mean() < 0.9


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("where", ("x", "k", "bias"))
def test_what_is_not_finite_stays_where_it_belongs(where, value):
    problem, x, k, bias = posed((1, 2, 150, 160), (3, 2, 9, 11), padding=(4, 5), groups=1)
    if where == "x":
        x[0, 1, 70, 80] = value
    elif where == "k":
        k[1, 0, 3, 4] = value
    else:
        bias[2] = value
    y = computed(problem, x, k, bias)
    wanted = gpuconv.conv2d(x, k, bias, padding=(4, 5), backend="numpy.reference")
    assert np.array_equal(np.isnan(y), np.isnan(wanted))
    assert np.array_equal(y[np.isinf(wanted)], wanted[np.isinf(wanted)])
    finite = np.isfinite(wanted)
    assert 0 < finite.sum() < y.size
    assert np.allclose(y[finite], wanted[finite], 1e-4, 1e-3)


def dark_beside_bright(bright: float) -> Any:
    """An image that is dark but for one pixel."""
    x = np.random.default_rng(1).uniform(0.5, 1, (1, 1, 120, 150)).astype(np.float32)
    x[0, 0, 60, 70] = bright
    return x, np.random.default_rng(2).standard_normal((1, 1, 15, 15)).astype(np.float32)


@pytest.mark.parametrize("bright", (1e3, 1e6, 1e9, 1e15, 1e30))
def test_dark_pixels_beside_bright_ones(bright, monkeypatch):
    x, k = dark_beside_bright(bright)
    problem = Conv2dProblem.of(x.shape, k.shape, padding=7)
    assert kept(problem, computed(problem, x, k), x, k)
    if bright >= 1e15:  # which is not for nothing
        monkeypatch.setattr(fft_certain, "allowed", lambda products: 1e30)
        assert not kept(problem, computed(problem, x, k), x, k)


def sparse(kind: str) -> Any:
    rng = np.random.default_rng(4)
    x, k = rng.random((1, 1, 150, 170)), rng.random((1, 1, 12, 9))
    if kind == "points":
        x *= rng.random(x.shape) < 0.003
    elif kind == "mask":
        x[..., :60, :] = x[..., :, 90:] = 0
    elif kind == "columns":
        x[..., ::2] = 0
    elif kind == "ring":
        k[..., 2:-2, 2:-2] = 0
    elif kind == "one_tap":
        k[...] = 0
        k[..., 5, 7] = 3
    elif kind == "no_kernel":
        k[...] = 0
    else:
        x[...] = 0
    return x.astype(np.float32), k.astype(np.float32)


@pytest.mark.parametrize("kind", ("points", "mask", "columns", "ring", "one_tap", "no_kernel", "no_image"))
def test_zeros(kind):
    x, k = sparse(kind)
    problem = Conv2dProblem.of(x.shape, k.shape, padding=(6, 4))
    y = computed(problem, x, k)
    assert kept(problem, y, x, k)
    assert np.array_equal(y == 0, reference(problem, x, k) == 0)
    if kind == "one_tap":
        assert np.array_equal(y, gpuconv.conv2d(x, k, padding=(6, 4), backend="numba_cpu.rows"))


@pytest.mark.parametrize(("largest", "weight"), ((32, 32), (4095, 1)), ids=("narrow", "wide"))
def test_small_integers_are_exact(largest, weight):
    rng = np.random.default_rng(3)
    x = rng.integers(-largest, largest + 1, (1, 2, 137, 161)).astype(np.float32)
    k = rng.integers(-weight, weight + 1, (2, 2, 9, 15)).astype(np.float32)
    k[0] -= k[0][:, ::-1]  # which flat images make zeros of
    x[..., 60:, 90:] = largest
    problem = Conv2dProblem.of(x.shape, k.shape, padding=4, padding_mode="reflect")
    wanted = reference(problem, x, k)
    assert (wanted == 0).sum() > 1000
    assert np.array_equal(computed(problem, x, k), wanted)


def test_threads_batches_preparation_and_memory_change_no_bit():
    problem, x, k, bias = posed((3, 4, 70, 130), (6, 2, 12, 9), groups=2, padding=5, padding_mode="symmetric")
    y = computed(problem, x, k, bias)
    assert np.array_equal(y, computed(problem, x, k, bias, packed=True))
    for threads in (1, 3, 8):
        assert np.array_equal(y, computed(problem, x, k, bias, target(threads)))
    for n in range(3):
        assert np.array_equal(y[n : n + 1], computed(replace(problem, N=1), x[n : n + 1], k, bias))
    apart = np.full((3, 4, 140, 390), np.nan, np.float32)[:, :, ::2, ::3]
    apart[...] = x
    mirrored = np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    upside_down = np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]
    other = np.ascontiguousarray(k.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    for image, kernel in itertools.product((x, apart, mirrored, upside_down, np.asfortranarray(x)), (k, other)):
        assert np.array_equal(y, computed(problem, image, kernel, bias))
    into = np.full((3, 6, 138, 2 * y.shape[-1]), np.nan, np.float32)
    strided = into[:, :, : 2 * y.shape[2] : 2, 1::2]
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, k), bias)
    fft.run(fft.plan(problem, target(), LIMIT), operands, request.view(problem, 2, strided))
    assert np.array_equal(strided, y)
    strided[...] = np.nan
    assert np.isnan(into).all()


@pytest.mark.parametrize("kind", ("float16", "bfloat16", "uint8"))
def test_other_images(kind):
    """Large enough for tiles that are read where they lie."""
    rng = np.random.default_rng(6)
    dtype = gpuconv.dtypes.numpy_dtype(kind)
    x = (rng.integers(0, 256, (1, 1, 200, 260)) / (1 if kind == "uint8" else 256)).astype(dtype)
    k = rng.standard_normal((1, 1, 21, 20)).astype(np.float32 if kind == "uint8" else dtype)
    y = gpuconv.conv2d(x, k, padding="same", backend=fft.NAME)
    problem = Conv2dProblem.of(x.shape, k.shape, padding="same")
    wide, of_k = x.astype(np.float32), k.astype(np.float32)
    wanted = reference(problem, wide, of_k)
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(kind, 0)
    allowed = problem.products * UNIT * bound(problem, wide, of_k) + rounding * abs(wanted)
    assert y.dtype == (np.float32 if kind == "uint8" else dtype)
    assert np.all(abs(y.astype(np.float64) - wanted) <= allowed)


@pytest.mark.parametrize(("x_dtype", "k_dtype"), (("uint8", "uint8"), ("int16", "int8"), ("bool", "int64")))
def test_integers(x_dtype, k_dtype):
    """The largest there are, in one corner of each."""
    rng = np.random.default_rng(9)
    x, k = rng.integers(0, 2, (2, 2, 90, 150)).astype(x_dtype), rng.integers(-1, 2, (4, 1, 17, 30))
    k = (k if k_dtype != "uint8" else abs(k)).astype(k_dtype)
    for array in (x, k):
        info = None if array.dtype == bool else np.iinfo(array.dtype)
        array[..., :40, :25] = 1 if info is None else info.max if array.itemsize < 8 else 1 << 20
        if info is not None and array.itemsize < 8:
            array[..., -40:, -25:] = info.min
    options: dict[str, Any] = {"padding": (8, 30), "groups": 2, "activation": "relu", "padding_mode": "edge"}
    bias = np.array([-(1 << 22), 0, 3, 1 << 22])
    for given in (bias, None):
        y = gpuconv.conv2d(x, k, given, backend=fft.NAME, **options)
        assert np.issubdtype(y.dtype, np.integer)
        assert np.array_equal(y, gpuconv.conv2d(x, k, given, backend="numpy.reference", **options))
    assert y.max() > 2**24 or k_dtype == "uint8"


def test_a_template_of_bytes_is_found():
    rng = np.random.default_rng(10)
    photo = rng.integers(0, 256, (1000, 1200)).astype(np.uint8)
    template = photo[300:340, 500:550].copy()
    assert gpuconv.explain(photo, template).implementation == fft.NAME
    matches = gpuconv.conv2d(photo, template)
    assert matches.dtype == np.int32
    assert matches[300, 500] == (template.astype(np.int64) ** 2).sum()
    assert np.unravel_index(matches.argmax(), matches.shape) == (300, 500)


@pytest.mark.parametrize("groups", (1, 2))
def test_the_input_gradient(groups):
    rng = np.random.default_rng(7)
    dy, k = rng.standard_normal((2, 4, 90, 70), dtype=np.float32), rng.standard_normal((4, 4 // groups, 11, 14),
                                                                                       dtype=np.float32)  # fmt: skip
    options: dict[str, Any] = {"padding": ((3, 9), (5, 9)), "groups": groups}

    def gradient(dy: Any, k: Any, **kwargs: Any) -> Any:
        return gpuconv.grad.conv2d_input((2, 4, 88, 69), k, dy, **options, **kwargs)

    dx = gradient(dy, k, backend=fft.NAME)
    wide = gradient(dy.astype(np.float64), k.astype(np.float64))
    most = gradient(abs(dy).astype(np.float64), abs(k).astype(np.float64))
    assert np.all(abs(dx - wide) <= 4 // groups * 11 * 14 * UNIT * most)
    assert np.array_equal(dx, gradient(dy, k, backend=fft.NAME))


def test_a_least_sum_is_no_larger_than_the_sum():
    """What a kernel's facts say of every output, by NumPy."""
    rng = np.random.default_rng(8)
    for KH, KW, C in ((8, 1, 1), (9, 5, 2), (15, 15, 1), (31, 12, 3), (19, 20, 11)):
        TH, TW = 64, 64
        x, k = np.abs(rng.standard_normal((C, TH, TW))) ** 3, rng.standard_normal((1, 1, C, KH, KW)).astype(np.float32)
        choice = fft_certain.Choice.of(C, KH, KW, TH, TW)
        facts = fft_certain.facts(k, TH, TW, choice)[0]
        cells = np.zeros((C, 2, TH // 4, TW))  # of two tiles, of which this is the first
        cells[:, 0] = x.reshape(C, TH // 4, 4, TW).max(axis=2)
        high, wide = TH - KH + 1, TW - KW + 1
        sums = reference(Conv2dProblem.of((1, *x.shape), k.shape[1:]), x[None], abs(k[0]))[0, 0]
        placed = facts[fft_certain.PLACED : fft_certain.TOTAL].reshape(-1, 2)
        assert facts[fft_certain.TOTAL] == pytest.approx(placed[:, 1].sum()) and placed[:, 1].sum() > 0
        for i, j in itertools.product(range(high), range(wide)):
            at = i // 4 * TW + j
            places = placed[:, 0].copy().view(np.int64)
            found = (cells.ravel()[at + places] * placed[:, 1]).sum()
            assert found <= sums[i, j] * (1 + 1e-6)


def test_scratch_is_within_what_is_announced():
    problem, x, k, bias = posed((2, 2, 100, 190), (5, 2, 20, 30), padding=9, padding_mode="reflect")
    plan = fft.plan(problem, target(), LIMIT)
    x5, k5, out = request.view(problem, 0, x), request.view(problem, 1, k), np.empty(problem.y_shape, np.float32)
    for packed in (False, True):
        operands = Operands(x5, k5, bias)
        fft.run(plan, operands, request.view(problem, 2, out))
        tracemalloc.start()
        try:
            operands.packed = fft.pack(plan, operands) if packed else None
            fft.run(plan, operands, request.view(problem, 2, out))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= plan.workspace
    with pytest.raises(MemoryError, match=r"numba_cpu\.fft .* needs at least"):
        fft.plan(problem, target(), 100_000)
    # The public call takes something else then.
    limited = gpuconv.explain(x, k, padding=9, workspace_limit=100_000)
    assert limited.implementation != fft.NAME


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    (
        ({"stride": 2}, "without stride"),
        ({"dilation": (1, 2)}, "without stride"),
        ({"x_dtype": "float64", "k_dtype": "float64"}, "sums in float32"),
        ({"x_dtype": "uint16", "k_dtype": "uint16"}, "not certain to come out exactly"),
        ({"x_dtype": "complex64", "k_dtype": "complex64"}, "real numbers"),
        ({"k": (4, 2, 7, 9)}, "at least 8 rows"),
        ({"k": (4, 2, 8, 257)}, "at most 256"),
    ),
)
def test_what_it_refuses(kwargs, reason):
    kwargs = dict(kwargs)
    problem = Conv2dProblem.of((1, 2, 19, 300), kwargs.pop("k", (4, 2, 9, 5)), **kwargs)
    assert [text for text in fft.unsupported(problem, target()) if reason in text]


@pytest.mark.parametrize(
    ("x_shape", "k_shape", "worth"),
    (
        ((1, 1, 2048, 2048), (1, 1, 15, 15), True),
        ((1, 1, 512, 512), (1, 1, 31, 31), True),
        ((1, 3, 512, 512), (16, 3, 31, 31), True),
        ((1, 16, 256, 256), (16, 16, 9, 9), True),
        ((1, 1, 2048, 2048), (1, 1, 9, 9), False),
        ((1, 1, 128, 128), (1, 1, 31, 31), False),
        ((1, 64, 128, 128), (64, 64, 31, 31), False),
        ((1, 64, 56, 56), (64, 64, 3, 3), False),
        ((1, 1, 4000, 4000), (1, 1, 7, 200), False),
    ),
)
def test_what_it_is_worth(x_shape, k_shape, worth):
    problem = Conv2dProblem.of(x_shape, k_shape, padding="same")
    names, rules = dispatch.preferred(problem, "cpu")
    assert (names[0] == fft.NAME) is worth
    assert not worth or "Fourier" in rules[names[0]]


def test_through_the_public_calls():
    rng = np.random.default_rng(5)
    x, k = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 3, 260, 250), (4, 3, 20, 20)))
    options: dict[str, Any] = {"padding": 4, "activation": "relu"}
    assert gpuconv.explain(x, k, **options).implementation == fft.NAME
    layer = gpuconv.Conv2d(k, **options)
    y = gpuconv.conv2d(x, k, backend=fft.NAME, **options)
    for _ in range(2):
        assert np.array_equal(layer(x), y)
        assert np.array_equal(gpuconv.conv2d(x, k, **options), y)
    assert np.array_equal(y, gpuconv.conv2d(x, k[..., ::-1, ::-1].copy(), flip=True, **options))
    assert np.array_equal(y, gpuconv.conv2d(x, k.transpose(2, 3, 1, 0).copy(), kernel_layout="HWIO", **options))
    before = k.copy()
    k[...] = 0  # a layer keeps what it was given, a call does not
    assert np.array_equal(layer(x), y) and not gpuconv.conv2d(x, k, **options).any()
    gpuconv.clear()
    assert np.array_equal(gpuconv.conv2d(x, before, **options), y)


# ---- what a hostile reader found


@pytest.mark.parametrize("rows", (slice(None), slice(1, 8)))
def test_infinite_weights_give_infinity(rows):
    x = np.random.default_rng(1).uniform(1, 2, (1, 1, 100, 100)).astype(np.float32)
    k = np.ones((1, 1, 9, 9), np.float32)
    k[..., rows, 3] = np.inf
    assert np.isposinf(gpuconv.conv2d(x, k, backend=fft.NAME)).all()


@pytest.mark.parametrize("K", (8, 9, 12, 13, 20, 33))
def test_few_products(K):
    """A sum that nearly cancels, beside a pixel so bright that it may be taken for noise."""
    x = np.zeros(100, np.float32)
    x[0::8], x[4::8] = 1, -(1 - 29 * UNIT)
    k = np.ones((1, 1, K, 1), np.float32)
    k[..., 0, 0] = 0
    for bright in np.geomspace(1e5, 1e8, 40):
        image = np.repeat(x[:, None], 4, axis=1)[None, None].copy()
        image[..., -1, 0] = bright
        problem = Conv2dProblem.of(image.shape, k.shape)
        assert kept(problem, computed(problem, image, k), image, k)


def test_a_cropped_gradient_does_not_depend_on_how_it_lies_in_memory():
    rng = np.random.default_rng(0)
    k, dy = rng.standard_normal((1, 1, 9, 9)).astype(np.float32), rng.standard_normal((1, 1, 172, 172))
    dy[..., 145:155, :] *= 1e9
    dy = dy.astype(np.float32)
    apart = np.full((1, 1, 172, 344), np.nan, np.float32)[..., ::2]
    apart[...] = dy
    one, other = (
        gpuconv.grad.conv2d_input((1, 1, 100, 100), k, given, padding=40, backend=fft.NAME) for given in (dy, apart)
    )
    assert np.array_equal(one, other)


def test_factors_of_another_thread_are_not_pointed_to(monkeypatch):
    monkeypatch.setattr(fft_bound, "factors", fft_stages.twiddles)  # as if none were kept
    plan = fft.plan(Conv2dProblem.of((1, 1, 90, 90), (1, 1, 9, 9)), target(), LIMIT)
    arguments, arrays = fft._tables(plan)
    held = {array.ctypes.data for array in arrays}
    assert {arguments[fft_table.DOWN], arguments[fft_table.ACROSS]} <= held


def test_what_it_cannot_run_hinders_no_other():
    for k_shape, kwargs in (((1, 1, 300, 9), {}), ((1, 1, 63, 63), {"x_dtype": "float64", "k_dtype": "float64"})):
        problem = Conv2dProblem.of((1, 1, 1024, 1024), k_shape, precision="high", **kwargs)
        assert fft.NAME not in dispatch.preferred(problem, "cpu")[1]
