"""Conv2d, prepared once: the same bits as conv2d, for any input, and a snapshot of what it was given."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cases
import numpy as np
import pytest
import units
from calls import affordable
from cases import BY_NAME, CASES, Case
from running import LONG, SERVE_EVERYTHING, SIMULATOR_MARKS, home, share, skip_unless_usable
from test_family import every_implementation_of

import gpuconv
from gpuconv import Conv2d, conv2d, dispatch, explain

pytestmark = SIMULATOR_MARKS


def given(case: Case, dtype: str, kind: str = "normal") -> tuple[Any, ...]:
    return units.posed(case, dtype, kind)[:3]


def is_quick(case: Case, dtype: str) -> bool:
    return dtype == ("float32" if "float32" in case.only else case.only[0]) or (case.smoke and dtype == "int8")


SAME = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}", marks=() if is_quick(case, dtype) else pytest.mark.full)
    for case, dtype in itertools.product(CASES, cases.DTYPES)
    if case.accepts(dtype)
]


@pytest.mark.parametrize(("case", "dtype"), SAME)
def test_same_bits_as_conv2d(case, dtype):
    x, k, bias = given(case, dtype)
    chosen = affordable(x.dtype.name, k.dtype.name)
    layer = Conv2d(k, bias, **case.kwargs, **chosen)
    wanted = conv2d(x, k, bias, **case.kwargs, **chosen)
    for _ in range(2):
        found = layer(x)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert found.tobytes() == wanted.tobytes()


@every_implementation_of("conv1d")
def test_on_every_implementation(name, call):
    """The operands on the GPU, where there is one."""
    skip_unless_usable(name)
    xp, served = home(name), 0
    found = ("tail", "grouped_everything", "nhwc_hwio_strided", "depthwise", "bias_relu", "one_by_one", "zero_points")
    for case in share(name, (BY_NAME[found] for found in found), 2):
        dtype = "float32" if "float32" in case.only else case.only[0]
        x, k, bias = (None if array is None else xp.asarray(array) for array in given(case, dtype))
        try:
            wanted = conv2d(x, k, bias, backend=name, **case.kwargs)
        except gpuconv.NoBackendError:
            with pytest.raises(gpuconv.NoBackendError):
                Conv2d(k, bias, backend=name, **case.kwargs)(x)
            continue
        layer = Conv2d(k, bias, backend=name, **case.kwargs)
        assert units.to_host(layer(x)).tobytes() == units.to_host(wanted).tobytes()
        # weights on the host serve an input on the GPU as well
        host = [None if array is None else units.to_host(array) for array in (k, bias)]
        result = Conv2d(*host, backend=name, **case.kwargs)(x)
        assert type(result) is type(wanted)
        assert units.to_host(result).tobytes() == units.to_host(wanted).tobytes()
        served += 1
    assert served or name not in SERVE_EVERYTHING


# ---- any input


@pytest.mark.parametrize(
    "case",
    [
        Case("padded", (1, 3, 8, 9), (4, 3, 3, 2), {"padding": 1, "stride": 2}, bias=True),
        Case("same", (1, 4, 8, 9), (4, 2, 3, 3), {"padding": "same", "stride": 2, "groups": 2, "activation": "relu"}),
        Case("reflect", (1, 2, 8, 9), (3, 2, 3, 3), {"padding": 1, "padding_mode": "reflect", "flip": True}),
        Case("last", (1, 8, 9, 2), (3, 2, 2, 3), {"layout": "NHWC", "kernel_layout": "HWIO", "dilation": 2}, bias=True),
        Case("one_by_one", (1, 3, 8, 9), (4, 3, 1, 1)),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_any_size_and_dtype(case):
    """One object, sizes that come back, and ranks and types between them."""
    _, k, bias = given(case, "float32")
    layer, rng = Conv2d(k, bias, **case.kwargs), np.random.default_rng(1)
    last = case.kwargs.get("layout") == "NHWC"
    C = case.x_shape[-1 if last else 1]
    sizes = [(1, 8, 9), (3, 6, 5), (1, 8, 9), (0, 7, 7), (2, 31, 4), (3, 6, 5)]
    between = ("float64", "int8", "float16") if LONG else ("float64", "int8")[: 1 + (case.name == "padded")]
    for (N, H, W), dtype in itertools.product(sizes, ("float32", *between, "float32")):
        x = (rng.standard_normal((N, H, W, C) if last else (N, C, H, W)) * 9).astype(dtype)
        for image in (x, *x[:1]):  # the batch, and one picture of it without its axis
            wanted = conv2d(image, k, bias, **case.kwargs)
            found = layer(image)
            assert found.dtype == wanted.dtype and found.shape == wanted.shape
            assert found.tobytes() == wanted.tobytes(), f"{image.shape} {dtype}"


def test_two_dimensional_images():
    ramp = np.arange(10.0, 251.0, 10.0).reshape(5, 5)
    assert Conv2d([[1, 0, -1]] * 3)(ramp).tolist() == [[-60] * 3] * 3
    assert Conv2d([[[1]], [[2]]], layout="NHWC", kernel_layout="OHWI")(ramp).shape == (5, 5, 2)
    assert Conv2d([[1, 0, -1]] * 3)(ramp.tolist()).tolist() == [[-60] * 3] * 3
    edge = Conv2d([[1, 0, -1]] * 3, padding="same")
    assert edge(ramp[:2, :2]).shape == (2, 2)
    assert edge(ramp).shape == (5, 5)


def test_out():
    case = BY_NAME["rank_3"]
    x, k, bias = given(case, "float32", "narrow")
    layer, (*_, answer) = Conv2d(k, bias, **case.kwargs), units.posed(case, "float32", "narrow")
    for text, *form in units.forms(3):
        out, _ = units.arranged(units.unwritten(answer).array, *form)
        assert layer(x, out=out) is out
        units.assert_exact(out, answer, text)
    out = np.full(answer.y.shape, np.nan, np.float32)
    assert layer(x, out) is out
    units.assert_exact(out, answer)
    for wrong, error in ((np.empty(answer.y.shape), TypeError), (np.empty((1, 1), np.float32), ValueError)):
        with pytest.raises(error, match="out"):
            layer(x, out=wrong)
    room = np.zeros(x.size + answer.y.size, np.float32)
    with pytest.raises(ValueError, match="overlap"):
        layer(room[: x.size].reshape(x.shape), out=room[x.size - 5 : -5].reshape(answer.y.shape))


def test_memory_forms_of_weights():
    case = Case("forms", (1, 4, 4, 5), (4, 2, 2, 3), {"groups": 2, "padding": 1}, bias=True)
    x, k, bias = given(case, "float32", "narrow")
    *_, answer = units.posed(case, "float32", "narrow")
    for text, *form in units.forms():
        view, _ = units.arranged(k, *form)
        units.assert_exact(Conv2d(view, bias[::-1].copy()[::-1], **case.kwargs)(x), answer, text)
    ones = np.broadcast_to(np.float32(1), k.shape)
    assert np.array_equal(Conv2d(ones, **case.kwargs)(x), conv2d(x, ones, **case.kwargs))


# ---- a snapshot


@pytest.mark.parametrize("backend", [None, *(name for name in dispatch.TABLE if not name.endswith("patches"))])
@pytest.mark.parametrize("called_before", [False, True])
def test_weights_may_change_afterwards(backend, called_before):
    if backend is not None:
        skip_unless_usable(backend)
    xp = home(backend) if backend else np
    case = BY_NAME["grouped_everything"]
    x, k, bias = (xp.asarray(array.copy()) for array in given(case, "float32"))
    layer = Conv2d(k, bias, backend=backend, **case.kwargs)
    if backend not in (None, *SERVE_EVERYTHING) and explain(x, k, bias, backend=backend, **case.kwargs).plan is None:
        pytest.skip(f"{backend} does not serve it")
    wanted = units.to_host(conv2d(x, k, bias, backend=backend, **case.kwargs)).tobytes()
    if called_before:
        assert units.to_host(layer(x)).tobytes() == wanted
    k[...], bias[...] = np.nan, np.nan
    assert units.to_host(layer(x)).tobytes() == wanted
    assert units.to_host(layer(x[:1])).tobytes() == wanted[: len(wanted) // 2]


def test_lists_and_zero_points_may_change_afterwards():
    k, bias, stride, padding = [[[[1, 2], [3, 4]]]], [5], [1, 1], [[1, 0], [0, 1]]
    layer = Conv2d(k, bias, stride, padding)
    x = np.arange(12).reshape(1, 1, 3, 4)
    wanted = layer(x).tolist()
    k[0][0][0][0], bias[0], stride[0], padding[0][0] = 100, 100, 2, 5
    assert layer(x).tolist() == wanted
    case = BY_NAME["zero_point_per_channel"]
    x, k, _ = given(case, "uint8")
    points = np.array(case.kwargs["k_zero_point"], np.uint8)
    options = dict(case.kwargs) | {"k_zero_point": points}
    wanted, layer = conv2d(x, k, **options).tolist(), Conv2d(k, **options)
    points[...] = 77
    assert layer(x).tolist() == wanted


def test_a_zero_point_in_an_array_may_change_afterwards():
    case = BY_NAME["zero_point_per_channel"]
    x, k, _ = given(case, "uint8")
    point = np.array(7, np.uint8)
    options = dict(case.kwargs) | {"x_zero_point": point}
    wanted, layer = conv2d(x, k, **options).tolist(), Conv2d(k, **options)
    point[...] = 9
    assert layer(x).tolist() == wanted


def test_inputs_are_not_kept():
    """The second call sees the second image, also in the same memory."""
    layer, x = Conv2d(np.ones((1, 1, 2, 2), np.float32)), np.ones((1, 1, 3, 3), np.float32)
    assert np.all(layer(x) == 4)
    first = layer(x)
    x[...] = 2
    assert np.all(layer(x) == 8)
    assert np.all(first == 4), "a later call wrote into an earlier result"


def test_copies():
    """By pickle and by copy: the same results, from weights of its own."""
    case = BY_NAME["grouped_everything"]
    x, k, bias = (array.copy() for array in given(case, "float32"))
    layer = Conv2d(k, bias, dtype=np.float64, **case.kwargs)
    wanted = layer(x).tobytes()
    for other in (pickle.loads(pickle.dumps(layer)), copy.copy(layer), copy.deepcopy(layer)):
        k[...], bias[...] = np.nan, np.nan
        assert other(x).tobytes() == wanted
        assert repr(other) == repr(layer)


# ---- options


def test_signature():
    """conv2d's without what belongs to a call; nothing renamed, reordered or with another default."""
    ours = dict(inspect.signature(Conv2d).parameters)
    theirs = {
        name: parameter
        for name, parameter in inspect.signature(conv2d).parameters.items()
        if name not in ("x", "out", "stream")
    }
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    call = list(inspect.signature(Conv2d.__call__).parameters.values())[1:]
    assert [parameter.name for parameter in call] == ["x", "out", "stream"]
    assert [parameter.default for parameter in call[1:]] == [None, None]


def test_options_beyond_the_cases(monkeypatch):
    x, k = np.ones((1, 2, 5, 5), np.float32), np.ones((3, 2, 3, 3), np.float32)
    assert Conv2d(k, dtype=np.float64)(x).dtype == np.float64
    assert np.array_equal(Conv2d(k, None, 2, 1, 1, 1)(x), conv2d(x, k, None, 2, 1, 1, 1))
    assert np.array_equal(Conv2d(k, precision="medium")(x), conv2d(x, k))
    with pytest.raises(MemoryError, match="workspace_limit"):
        Conv2d(k, backend="numpy", workspace_limit=1)(np.ones((1, 2, 50, 50), np.float32))
    with pytest.raises(ValueError, match="contradicts"):
        Conv2d(k, backend="numpy", device="cuda")(x)
    if all(dispatch.implementation(name).unavailable() for name in dispatch.candidates("cupy") or ()):
        with pytest.raises(gpuconv.NoBackendError, match="cupy"):
            Conv2d(k, backend="cupy")(x)
    if dispatch.gpu_missing():
        monkeypatch.setenv("GPUCONV_FALLBACK", "error")
        with pytest.raises(gpuconv.NoBackendError):
            Conv2d(k, device="cuda")(x)
        monkeypatch.setenv("GPUCONV_FALLBACK", "silent")
        assert np.array_equal(Conv2d(k, device="cuda")(x), conv2d(x, k))
        monkeypatch.delenv("GPUCONV_FALLBACK")
        with pytest.warns(gpuconv.DeviceFallbackWarning) as warned:
            Conv2d(k, device="cuda")(x)
        assert all(warning.filename == __file__ for warning in warned)


def test_repr():
    k, bias = np.ones((4, 3, 5, 2), np.float32), np.zeros(4, np.float32)
    text = repr(Conv2d(k, bias, 2, 3, (1, 2), activation="relu"))
    assert text.startswith("Conv2d(") or text.startswith("<"), text
    for part in ("Conv2d", "o4kh5kw2", "s2", "d1x2", "p3", "bias", "relu", "f32"):
        assert part in text, f"{part} is not in {text}"
    text = repr(Conv2d(k.transpose(2, 3, 1, 0), kernel_layout="HWIO", layout="NHWC", flip=True))
    for part in ("o4kh5kw2", "nhwc", "hwio", "flip"):
        assert part in text, f"{part} is not in {text}"
    assert len(repr(Conv2d(np.ones((64, 64, 7, 7), np.float32)))) < 300, "the weights are not printed"


REFUSED = [
    (TypeError, "k", {"k": "abc"}),
    (TypeError, "k", {"k": None}),
    (ValueError, "(4, 3, 0, 3)", {"k": np.ones((4, 3, 0, 3), np.float32)}),
    (ValueError, "bias", {"bias": np.ones(3, np.float32)}),
    (TypeError, "bias", {"bias": 2}),
    (ValueError, "stride", {"stride": 0}),
    (TypeError, "stride", {"stride": 1.5}),
    (ValueError, "dilation", {"dilation": 2**31}),
    (ValueError, "padding", {"padding": (1, 1, 1, 1)}),
    (ValueError, "padding", {"padding": "SAME"}),
    (ValueError, "groups", {"groups": 3}),
    (ValueError, "groups", {"groups": 0}),
    (ValueError, "layout", {"layout": "CHWN"}),
    (ValueError, "layout", {"layout": np.array([1, 2])}),
    (ValueError, "kernel_layout", {"kernel_layout": "IOHW"}),
    (TypeError, "flip", {"flip": 1}),
    (ValueError, "activation", {"activation": "gelu"}),
    (ValueError, "precision", {"precision": "low"}),
    (ValueError, "padding_mode", {"padding_mode": "mean"}),
    (TypeError, "dtype", {"dtype": "O"}),
    (ValueError, "backend", {"backend": "gpu"}),
    (ValueError, "device", {"device": "gpu"}),
    (ValueError, "workspace_limit", {"workspace_limit": -1}),
    (TypeError, "padding_value", {"padding_value": "0"}),
    (ValueError, "padding_value", {"padding_value": 10**400}),
    (ValueError, "padding_value", {"padding_value": 1, "padding_mode": "reflect"}),
    (TypeError, "x_zero_point", {"x_zero_point": 1.0}),
    (ValueError, "255; got 300", {"x_zero_point": 300}),
    (ValueError, "-128 to 127; got -129", {"x_zero_point": -129}),
]


@pytest.mark.parametrize(
    ("error", "says", "arguments"), REFUSED, ids=[f"{i}-{next(iter(call[2]))}" for i, call in enumerate(REFUSED)]
)
def test_bad_arguments_are_refused_when_prepared(error, says, arguments):
    """Not when an image comes: what the weights and the options alone say is wrong."""
    options = {"k": np.ones((4, 3, 3, 3), np.float32)} | arguments
    with pytest.raises(error) as raised:
        Conv2d(**options)
    assert str(raised.value).startswith("Conv2d: "), str(raised.value)
    assert says in str(raised.value), str(raised.value)


def test_what_one_image_refuses_and_another_takes_is_left_to_the_call():
    """A padding that float64 holds and float32 does not, and a zero point of uint8 that int8 has not."""
    k = np.ones((1, 1), np.float32)
    bright, quantised = Conv2d(k, padding=1, padding_value=1e40), Conv2d(k, x_zero_point=np.array([200]))
    assert bright(np.zeros((1, 1)))[0, 0] == 1e40
    assert quantised(np.full((1, 1), 201, np.uint8)) == 1
    for layer, x in ((bright, np.zeros((1, 1), np.float32)), (quantised, np.zeros((1, 1), np.int8))):
        with pytest.raises(ValueError, match="padding_value" if layer is bright else "x_zero_point"):
            layer(x)


def test_bad_images_are_refused_when_called():
    layer = Conv2d(np.ones((4, 3, 3, 3), np.float32))
    for x, error, says in (
        (np.ones((1, 2, 5, 5), np.float32), ValueError, "2 channels"),
        (np.ones((5, 5), np.float32), ValueError, "(5, 5)"),
        (np.ones((1, 3, 2, 5), np.float32), ValueError, "(2×5)"),
        (np.ones((1, 3, 5, 5), object), TypeError, "object"),
        (None, TypeError, "None"),
    ):
        with pytest.raises(error) as raised:
            layer(x)
        assert str(raised.value).startswith("Conv2d: ") and says in str(raised.value), str(raised.value)
    with pytest.raises(ValueError, match="activation"):
        Conv2d(np.ones((1, 1), np.float32), activation="relu")(np.ones((2, 2), np.complex64))
    with pytest.raises(TypeError):
        layer(np.ones((1, 3, 5, 5), np.float32), stride=2)


# ---- threads and memory


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.full)])
def test_threads_share_one_object(rounds):
    """Eight at once on an object that was never called, with images of several sizes and types."""
    case = BY_NAME["grouped_everything"]
    _, k, bias = given(case, "float32")
    rng = np.random.default_rng(3)
    images = [
        rng.standard_normal((2, 6, 8 + size, 7 + 2 * size)).astype(dtype)
        for size, dtype in itertools.product(range(4), ("float32", "float64"))
    ]
    wanted = [conv2d(x, k, bias, **case.kwargs).tobytes() for x in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(rounds):
            layer, barrier = Conv2d(k, bias, **case.kwargs), threading.Barrier(8, timeout=60)

            def work(first: int, layer: Conv2d = layer, barrier: threading.Barrier = barrier) -> list[bytes]:
                barrier.wait()
                order = [(first + i) % len(images) for i in range(len(images))]
                found = {i: layer(images[i]).tobytes() for i in order}
                return [found[i] for i in range(len(images))]

            for found in pool.map(work, range(8)):
                assert found == wanted


@pytest.mark.full
def test_memory_of_many_sizes_stays_bounded():
    layer, rng = Conv2d(np.ones((2, 1, 3, 3), np.float32), padding=1), np.random.default_rng(4)
    sizes = [tuple(int(n) for n in rng.integers(3, 40, 2)) for _ in range(10_000)]

    def run(part: list[tuple[int, ...]]) -> None:
        for H, W in part:
            layer(np.ones((1, H, W), np.float32))

    run(sizes[:5000])
    tracemalloc.start()
    try:
        run(sizes[5000:6000])
        before = tracemalloc.get_traced_memory()[0]
        run(sizes[6000:])
        assert tracemalloc.get_traced_memory()[0] - before < 2**20
    finally:
        tracemalloc.stop()
