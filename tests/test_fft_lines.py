"""Fourier transforms along rows: long filters of signals, as ``test_fft_highest`` has it for images."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_fft_highest import LIMIT, UNIT, bound, kept, posed, target
from test_separable import MODES, guarded, reference

import gpuconv
from gpuconv import dispatch, request
from gpuconv.backends.numba_cpu import fft_certain, fft_lines, fft_stages, runtime
from gpuconv.backends.protocol import Operands
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

# One segment and many, of one row and of several, kernels longer than the row, channels and groups.
SHAPES = [
    ((1, 1, 1, 5000), (1, 1, 1, 101), ((0, 0), (50, 50)), {}),
    ((2, 4, 3, 700), (6, 2, 1, 9), ((1, 0), (4, 3)), {"groups": 2, "activation": "relu"}),
    ((1, 3, 7, 150), (2, 3, 1, 64), ((0, 0), (9, 30)), {"padding_value": -2}),
    ((1, 1, 2, 20), (1, 1, 1, 91), ((0, 0), (70, 20)), {}),
    ((2, 5, 3, 131), (3, 5, 1, 18), 0, {"layout": "NHWC"}),
    ((1, 2, 1, 8), (2, 2, 1, 8), 0, {}),
]


def computed(problem: Conv2dProblem, x: Any, k: Any, bias: Any = None, threads: int = 2, packed: bool = False,
             bits: int | None = None) -> Any:  # fmt: skip
    """The result of one plan, in guarded memory that must stay as it was."""
    y, whole = guarded(problem.y_shape)
    last = problem.layout == "NHWC"
    if last:
        x, y = np.ascontiguousarray(x.transpose(0, 2, 3, 1)), y.reshape([problem.N, problem.OH, problem.OW, problem.O])
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, k), bias)
    assert fft_lines.unsupported(problem, target(threads, bits)) == []
    plan = fft_lines.plan(problem, target(threads, bits), LIMIT)
    if packed:
        operands.packed = fft_lines.pack(plan, operands)
        operands.k = None
    fft_lines.run(plan, operands, request.view(problem, 2, y))
    assert np.isnan(whole[:129]).all() and np.isnan(whole[129 + y.size :]).all()
    return y.transpose(0, 3, 1, 2) if last else y


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("x_shape", "k_shape", "padding", "kwargs"), SHAPES)
def test_the_promise_with_guard_bands(x_shape, k_shape, padding, kwargs, mode):
    kwargs = kwargs | {"padding_mode": mode}
    if mode != "constant":
        kwargs.pop("padding_value", None)
    problem, x, k, bias = posed(x_shape, k_shape, padding=padding, **kwargs)
    assert kept(problem, computed(problem, x, k, bias), x, k, bias)


@pytest.mark.parametrize("bits", (128, 512))
def test_other_registers(bits):
    x_shape, k_shape, padding, kwargs = SHAPES[1]
    problem, x, k, bias = posed(x_shape, k_shape, padding=padding, **kwargs)
    assert kept(problem, computed(problem, x, k, bias, bits=bits), x, k, bias)


@pytest.mark.parametrize("length", (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048))
def test_the_order_of_a_transform(length):
    """That of decimation in frequency, worked out number by number."""
    numbers = {0: 0}
    part = 1
    stages = []
    rest = length
    while rest > 1:
        stages.append(4 if rest >= 4 else 2)
        rest //= stages[-1]
    for radix in reversed(stages):
        numbers = {m * part + at: radix * frequency + m for at, frequency in numbers.items() for m in range(radix)}
        part *= radix
    assert np.array_equal(fft_stages.order(length), [numbers[place] for place in range(length)])


@pytest.mark.parametrize("C", (1, 3))
def test_results_are_mostly_the_exact_ones_rounded_once(C):
    problem, x, k, bias = posed((1, C, 1, 9000), (2, C, 1, 300), True, padding=(0, 150))
    wanted = reference(problem, x, k, bias).astype(np.float32)
    assert (computed(problem, x, k, bias) == wanted).mean() > 0.999


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_what_is_not_finite_stays_where_it_belongs(value):
    x, k = np.random.default_rng(1).standard_normal((2, 3, 4000)), np.random.default_rng(2).standard_normal((2, 3, 40))
    x[1, 2, 1700] = value
    x, k = x.astype(np.float32), k.astype(np.float32)
    y = gpuconv.conv1d(x, k, padding=20, backend=fft_lines.NAME)
    wanted = gpuconv.conv1d(x, k, padding=20, backend="numpy.reference")
    assert np.array_equal(np.isfinite(y), np.isfinite(wanted)) and np.array_equal(np.isnan(y), np.isnan(wanted))
    assert (~np.isfinite(y)).sum() == 2 * 40


@pytest.mark.parametrize("bright", (1e4, 1e15, 1e30))
def test_silence_beside_a_bang(bright, monkeypatch):
    x = np.random.default_rng(1).uniform(0.5, 1, (1, 1, 1, 3000)).astype(np.float32)
    x[..., 1000] = bright
    k = np.random.default_rng(2).standard_normal((1, 1, 1, 50)).astype(np.float32)
    problem = Conv2dProblem.of(x.shape, k.shape)
    assert kept(problem, computed(problem, x, k), x, k)
    if bright > 1e10:  # which is not for nothing
        monkeypatch.setattr(fft_certain, "allowed", lambda products: 1e30)
        assert not kept(problem, computed(problem, x, k), x, k)


def test_zeros_and_integers_are_exact():
    rng = np.random.default_rng(3)
    x = rng.integers(-32, 33, (1, 2, 3, 2100)).astype(np.float32)
    x[..., 300:900] = 0
    x[..., 1200:1500] = 7
    k = rng.integers(-32, 33, (2, 2, 1, 33)).astype(np.float32)
    k[0] -= k[0][..., ::-1]
    problem = Conv2dProblem.of(x.shape, k.shape, padding=(0, 16), padding_mode="symmetric")
    wanted = reference(problem, x, k)
    assert (wanted == 0).sum() > 1000
    assert np.array_equal(computed(problem, x, k), wanted)


def test_integers():
    rng = np.random.default_rng(9)
    x, k = rng.integers(0, 256, (2, 3, 2000)).astype(np.uint8), rng.integers(-(2**20), 2**20, (2, 3, 90))
    bias = np.array([-(1 << 30), 5])
    y = gpuconv.conv1d(x, k, bias, padding=40, backend=fft_lines.NAME)
    assert y.dtype == np.int64
    assert np.array_equal(y, gpuconv.conv1d(x, k, bias, padding=40, backend="numpy.reference"))
    with pytest.raises(gpuconv.NoBackendError, match="not certain to come out exactly"):
        gpuconv.conv1d(x, k << 12, backend=fft_lines.NAME)


def test_threads_batches_preparation_and_memory_change_no_bit():
    problem, x, k, bias = posed((3, 4, 5, 330), (6, 2, 1, 12), groups=2, padding=(0, 5), padding_mode="wrap")
    y = computed(problem, x, k, bias)
    assert np.array_equal(y, computed(problem, x, k, bias, packed=True))
    for threads in (1, 3, 8):
        assert np.array_equal(y, computed(problem, x, k, bias, threads))
    for n in range(3):
        assert np.array_equal(y[n : n + 1], computed(replace(problem, N=1), x[n : n + 1], k, bias))
    apart = np.full((3, 4, 10, 990), np.nan, np.float32)[:, :, ::2, ::3]
    apart[...] = x
    mirrored = np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    for image in (apart, mirrored, np.asfortranarray(x)):
        assert np.array_equal(y, computed(problem, image, k[..., ::-1].copy()[..., ::-1], bias))


def test_scratch_is_within_what_is_announced():
    problem, x, k, bias = posed((2, 2, 10, 900), (5, 2, 1, 70), padding=(0, 9), padding_mode="reflect")
    plan = fft_lines.plan(problem, target(), LIMIT)
    x5, k5, out = request.view(problem, 0, x), request.view(problem, 1, k), np.empty(problem.y_shape, np.float32)
    for packed in (False, True):
        operands = Operands(x5, k5, bias)
        fft_lines.run(plan, operands, request.view(problem, 2, out))
        tracemalloc.start()
        try:
            operands.packed = fft_lines.pack(plan, operands) if packed else None
            fft_lines.run(plan, operands, request.view(problem, 2, out))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= plan.workspace
    with pytest.raises(MemoryError, match=r"numba_cpu\.fft_lines .* needs at least"):
        fft_lines.plan(problem, target(), 10_000)


def test_the_input_gradient():
    rng = np.random.default_rng(7)
    dy, k = rng.standard_normal((2, 4, 1, 900), dtype=np.float32), rng.standard_normal((4, 2, 1, 40), dtype=np.float32)
    options: dict[str, Any] = {"padding": (0, 7), "groups": 2}
    size = 2, 4, 1, 925

    def gradient(dy: Any, k: Any, **kwargs: Any) -> Any:
        return gpuconv.grad.conv2d_input(size, k, dy, **options, **kwargs)

    most = gradient(abs(dy).astype(np.float64), abs(k).astype(np.float64))
    wide = gradient(dy.astype(np.float64), k.astype(np.float64))
    assert np.all(abs(gradient(dy, k, backend=fft_lines.NAME) - wide) <= 2 * 40 * UNIT * most)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    (
        ({"stride": (1, 2)}, "without stride"),
        ({"dilation": (1, 2)}, "without stride"),
        ({"x_dtype": "float64", "k_dtype": "float64"}, "sums in float32"),
        ({"k": (4, 2, 2, 9)}, "one row"),
        ({"k": (4, 2, 1, 7)}, "at least 8 columns"),
        ({"k": (4, 2, 1, 40000)}, "at most 32768 columns"),
    ),
)
def test_what_it_refuses(kwargs, reason):
    kwargs = dict(kwargs)
    problem = Conv2dProblem.of((1, 2, 19, 50_000), kwargs.pop("k", (4, 2, 1, 9)), **kwargs)
    assert [text for text in fft_lines.unsupported(problem, target()) if reason in text]


@pytest.mark.parametrize(
    ("x_shape", "k_shape", "worth"),
    (
        ((1, 1, 1, 1_000_000), (1, 1, 1, 256), True),
        ((1, 1, 1, 20_000), (1, 1, 1, 2048), True),
        ((1, 1, 1, 1_000_000), (1, 1, 1, 64), False),
        ((1, 1, 1, 20_000), (1, 1, 1, 256), False),
        ((1, 1, 1, 2_000), (1, 1, 1, 64), False),
        ((1, 1, 2048, 2048), (1, 1, 1, 127), False),
        ((1, 16, 1, 16_000), (16, 16, 1, 64), True),
        ((1, 64, 1, 16_000), (64, 64, 1, 64), False),
    ),
)
def test_what_it_is_worth(x_shape, k_shape, worth):
    problem = Conv2dProblem.of(x_shape, k_shape, padding="same")
    names, rules = dispatch.preferred(problem, "cpu")
    assert (names[0] == fft_lines.NAME) is worth
    assert not worth or "Fourier" in rules[names[0]]


def test_through_the_public_call():
    rng = np.random.default_rng(5)
    x, k = rng.standard_normal((2, 3, 20_000), dtype=np.float32), rng.standard_normal((4, 3, 300), dtype=np.float32)
    y = gpuconv.conv1d(x, k, padding=4, backend=fft_lines.NAME)
    problem = Conv2dProblem.of((2, 3, 1, 20_000), (4, 3, 1, 300), padding=(0, 4))
    wanted = reference(problem, x[:, :, None], k[:, :, None])[:, :, 0]
    assert np.all(abs(y - wanted) <= 900 * UNIT * bound(problem, x[:, :, None], k[:, :, None])[:, :, 0])
    for _ in range(2):
        assert np.array_equal(gpuconv.conv1d(x, k, padding=4), y)
    assert np.array_equal(gpuconv.conv1d(x, k[..., ::-1].copy(), padding=4, flip=True), y)
    last = np.ascontiguousarray(x.transpose(0, 2, 1))
    assert np.array_equal(gpuconv.conv1d(last, k, padding=4, layout="NLC").transpose(0, 2, 1), y)
