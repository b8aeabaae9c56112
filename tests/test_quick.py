"""A repeated call goes straight to its kernel, and means exactly what it would have meant the first time."""

from __future__ import annotations

import numpy as np
import pytest

import gpuconv
from gpuconv import conv2d, quick
from gpuconv.backends.numba_cpu import runtime

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason="no compiled kernels on this machine")

X = np.random.default_rng(0).standard_normal((2, 5, 9, 8)).astype(np.float32)
K = np.random.default_rng(1).standard_normal((6, 5, 3, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def forgotten():
    gpuconv.clear()


def test_a_call_is_remembered_by_what_it_depends_on():
    conv2d(X, K)
    assert len(quick._ready) == 1
    conv2d(X, K)
    conv2d(X.copy(), K.copy())
    assert len(quick._ready) == 1
    for other in (X[:1], X[..., ::2], X.astype(np.float64)):
        conv2d(other, K)
    assert len(quick._ready) == 3  # float64 beside a float32 kernel converts, and is not remembered


@pytest.mark.parametrize(
    ("kwargs", "wrong"),
    [
        ({"stride": 1}, {"stride": 1.0}),
        ({"stride": 1}, {"stride": True}),
        ({"stride": (1, 1)}, {"stride": (1.0, 1)}),
        ({"padding": 1}, {"padding": True}),
        ({"groups": 1}, {"groups": 1.0}),
        ({"flip": False}, {"flip": 0}),
        ({"dilation": (1, 1)}, {"dilation": (True, 1)}),
    ],
)
def test_what_is_refused_is_refused_after_its_equal_was_served(kwargs, wrong):
    conv2d(X, K, **kwargs)
    with pytest.raises(TypeError):
        conv2d(X, K, **wrong)


def test_values_of_arguments_matter():
    for value in (0, 1.5, -1.5, 0):
        y = conv2d(X, K, padding=2, padding_value=value)
        wanted = conv2d(X, K, padding=2, padding_value=value, backend="numpy.reference")
        assert np.allclose(y, wanted, rtol=1e-5, atol=1e-5)
    for bias in (np.zeros(6, np.float32), np.arange(6, dtype=np.float32)):
        for _ in range(2):
            assert np.allclose(conv2d(X, K, bias), conv2d(X, K) + bias[:, None, None], atol=1e-5)


def test_what_cannot_be_hashed_is_served():
    for _ in range(2):
        assert conv2d(X, K, stride=[1, 2]).shape == (2, 6, 7, 3)


def test_a_subclass_and_a_foreign_byte_order_take_the_long_way():
    class Own(np.ndarray):
        pass

    conv2d(X.view(Own), K)
    conv2d(X.astype(X.dtype.newbyteorder()), K)
    assert not quick._ready


def test_memory_of_one_call_is_not_another_s():
    first = conv2d(X, K)
    kept = first.copy()
    second = conv2d(X + 1, K)
    assert np.array_equal(first, kept) and not np.shares_memory(first, second)


def test_an_out_of_the_caller_s_is_written():
    layer, wanted = gpuconv.Conv2d(K), conv2d(X, K).tobytes()
    for call in (lambda out: conv2d(X, K, out=out), lambda out: layer(X, out=out)):
        for _ in range(3):
            out = np.full((2, 6, 7, 6), np.nan, np.float32)
            assert call(out) is out and out.tobytes() == wanted
            apart = np.full((2, 6, 7, 12), np.nan, np.float32)  # of other strides
            assert call(apart[..., ::2]).tobytes() == wanted and np.isnan(apart[..., 1::2]).all()
    assert len(quick._ready) == 3 and len(layer._ready) == 2


@pytest.mark.parametrize("of", ["conv2d", "Conv2d"])
def test_an_out_that_may_not_be_written_is_refused_each_time(of):
    memory = np.zeros(X.size + 504, np.float32)
    x = memory[: X.size].reshape(X.shape)
    x[...] = X
    layer = gpuconv.Conv2d(K)
    call = (lambda out: conv2d(x, K, out=out)) if of == "conv2d" else (lambda out: layer(x, out=out))
    beside = memory[X.size :].reshape(2, 6, 7, 6)
    frozen = np.zeros((2, 6, 7, 6), np.float32)
    frozen.flags.writeable = False
    for _ in range(2):
        call(beside)
        with pytest.raises(ValueError, match="out and x overlap in memory"):
            call(memory[X.size - 1 : X.size + 503].reshape(2, 6, 7, 6))
        with pytest.raises(ValueError, match="out is read-only"):
            call(frozen)
        with pytest.raises(ValueError, match="out has shape"):
            call(np.zeros((2, 6, 7, 7), np.float32))
        with pytest.raises(TypeError, match="out has dtype float64"):
            call(np.zeros((2, 6, 7, 6)))
    if of == "conv2d":
        with pytest.raises(ValueError, match="out and k overlap in memory"):
            conv2d(X, K, out=np.lib.stride_tricks.as_strided(K, (2, 6, 7, 6), beside.strides))


def test_the_number_of_threads_may_change(monkeypatch):
    x, k = np.ones((1, 32, 40, 40), np.float32), np.ones((32, 32, 3, 3), np.float32)
    wanted = conv2d(x, k).tobytes()
    monkeypatch.setenv("GPUCONV_NUM_THREADS", "1")
    assert conv2d(x, k).tobytes() == wanted
    monkeypatch.delenv("GPUCONV_NUM_THREADS")
    assert conv2d(x, k).tobytes() == wanted


@pytest.mark.parametrize("number", ["0", "-1", "2.5", "all"])
def test_a_number_of_threads_that_is_none(monkeypatch, number):
    monkeypatch.setenv("GPUCONV_NUM_THREADS", number)
    with pytest.raises(ValueError, match=f"GPUCONV_NUM_THREADS must be a positive integer; got '{number}'"):
        conv2d(np.ones((1, 4, 30, 30), np.float32), np.ones((4, 4, 3, 3), np.float32))


def test_it_is_bounded():
    for extent in range(3, 3 + quick._MOST + 5):
        conv2d(np.ones((3, extent), np.float32), np.ones((3, 3), np.float32))
    assert len(quick._ready) <= quick._MOST


def test_a_prepared_convolution_repeats_too():
    layer = gpuconv.Conv2d(K, padding=1)
    first = layer(X).tobytes()
    assert layer(X).tobytes() == first
    gpuconv.clear()
    assert layer(X).tobytes() == first


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_transposed_convolution_repeats_too(layout, activation):
    """Also where the copies of the kernel leave rows and columns between them, which get the bias alone."""
    x = X if layout == "NCHW" else np.ascontiguousarray(X.transpose(0, 2, 3, 1))
    k, bias = np.ascontiguousarray(K[:5, :, :2, :2]), np.linspace(-1, 1, 5, dtype=np.float32)

    def call(x, k, bias, out=None, **more):
        return gpuconv.conv_transpose2d(x, k, bias, stride=3, layout=layout, activation=activation, out=out, **more)

    for given in (bias, None):
        first = call(x, k, given)
        remembered = len(quick._ready)
        for other in (x, 2 * x, x):  # values are not remembered
            again = call(other, k, given)
            assert again is not first and (again.tobytes() == first.tobytes()) == (other is x)
        assert len(quick._ready) == remembered
        if given is not None:
            assert np.allclose(first, call(x, k, given, backend="numpy.reference"), atol=1e-5)
            assert not np.array_equal(call(x, k, given + 1), first)
        out = np.full_like(first, np.nan)
        for _ in range(2):
            assert call(x, k, given, out) is out and out.tobytes() == first.tobytes()
    assert len(quick._ready) == 4
    with pytest.raises(TypeError):
        gpuconv.conv_transpose2d(x, k, bias, stride=3.0, layout=layout)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        call(x, k, bias, out)


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
def test_a_signal_repeats_too(layout):
    x = np.random.default_rng(1).standard_normal((2, 4, 50)).astype(np.float32)
    k, bias = np.random.default_rng(2).standard_normal((6, 2, 5)).astype(np.float32), np.arange(6, dtype=np.float32)
    x = x if layout == "NCL" else np.ascontiguousarray(x.transpose(0, 2, 1))

    def call(x, k, bias, out=None, **more):
        return gpuconv.conv1d(x, k, bias, padding=2, groups=2, layout=layout, out=out, **more)

    first = call(x, k, bias)
    remembered = len(quick._ready)
    for other in (x, 2 * x, x):
        assert (call(other, k, bias).tobytes() == first.tobytes()) == (other is x)
    assert len(quick._ready) == remembered > 0
    assert np.allclose(first, call(x, k, bias, backend="numpy.reference"), atol=1e-5)
    assert not np.array_equal(call(x, k, bias + 1), first)
    out = np.full_like(first, np.nan)
    for _ in range(2):
        assert call(x, k, bias, out) is out and out.tobytes() == first.tobytes()
    with pytest.raises(ValueError, match="padding_mode"):
        call(x, k, bias, padding_mode="mirror")
    for dtype in (np.float32, np.complex64, np.int64):
        signal = np.arange(5).astype(dtype)
        for _ in range(2):
            assert np.array_equal(gpuconv.conv1d(signal, signal[1:3]), [2, 5, 8, 11])
