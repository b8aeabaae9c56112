"""Winograd convolution on the CPU: its promise on errors, memory around its arrays, the same bits whatever the call.

Problems that every implementation must solve are elsewhere; here are those that its tiles and strips make awkward.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dispatch, request
from gpuconv.backends import numpy_reference
from gpuconv.backends.numba_cpu import winograd
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

LIMIT = 256 << 20
HIGH = 2e-5  # of the norm of |x| * |k|: what precision="high" promises

pytestmark = pytest.mark.skipif(winograd.unavailable() is not None, reason=str(winograd.unavailable()))

# (N, C, H, W, O), and the padding: planes smaller than a tile, one more than a tile, odd channels, several strips.
SHAPES = (
    ((1, 1, 3, 3, 1), 0),
    ((1, 1, 1, 1, 1), 1),
    ((2, 3, 5, 6, 4), ((0, 3), (2, 1))),
    ((1, 7, 6, 6, 9), 0),
    ((3, 5, 13, 29, 11), 1),
    ((1, 33, 9, 70, 17), 2),
    ((2, 2, 40, 23, 3), 5),
    ((1, 300, 7, 7, 5), 1),
)
both = pytest.mark.parametrize("layout", ("NCHW", "NHWC"))


def problem_of(sizes: tuple[int, ...], padding: Any = 1, **kwargs: Any) -> Conv2dProblem:
    N, C, H, W, O = sizes
    precision = kwargs.pop("precision", "high")
    groups = kwargs.get("groups", 1)
    x_shape = (N, H, W, C) if kwargs.get("layout") == "NHWC" else (N, C, H, W)
    return Conv2dProblem.of(x_shape, (O, C // groups, 3, 3), padding=padding, precision=precision, **kwargs)


def target(threads: int = 2, bits: int | None = None) -> Target:
    return Target("cpu", None, threads, bits)


def guarded(shape: tuple[int, ...], rng: np.random.Generator | None, positive: bool = False) -> Any:
    """An array in the middle of NaN, and the whole."""
    size = int(np.prod(shape))
    whole = np.full(size + 256, np.nan, np.float32)
    inside = whole[129 : 129 + size].reshape(shape)  # not at the start of a cache line
    if rng is not None:
        inside[...] = rng.standard_normal(shape)
        if positive:
            np.abs(inside, out=inside)
    return inside, whole


def held(problem: Conv2dProblem, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (N, C, H, W) of images in the order of the problem's layout."""
    N, C, H, W = shape
    return (N, H, W, C) if problem.layout == "NHWC" else shape


def arrays(problem: Conv2dProblem, positive: bool = False) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(len(str(problem)))
    first, second = problem.operand_shapes
    x, _ = guarded(held(problem, first), rng, positive)
    k, _ = guarded(second, rng, positive)
    bias = guarded((problem.result_channels,), rng)[0] if problem.bias else None
    return x, k, bias


def computed(problem: Conv2dProblem, x: Any, k: Any, bias: Any, where: Target, packed: bool = False) -> Any:
    """The result of one plan, in guarded memory that must stay as it was."""
    y, whole = guarded(held(problem, problem.result_shape), None)
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, k), bias)
    assert winograd.unsupported(problem, where) == []
    plan = winograd.plan(problem, where, LIMIT)
    if packed:
        operands.packed = winograd.pack(plan, operands)
        operands.k = operands.k[..., :0]  # not to be looked at any more
    winograd.run(plan, operands, request.view(problem, 2, y))
    assert np.isnan(whole[:129]).all() and np.isnan(whole[129 + y.size :]).all()
    return y


def reference(problem: Conv2dProblem, x: Any, k: Any, bias: Any) -> Any:
    wide = replace(problem, x_dtype="float64", k_dtype="float64", y_dtype="float64")
    out = np.empty(held(problem, problem.result_shape))
    operands = Operands(
        request.view(problem, 0, x.astype(np.float64)), request.view(problem, 1, k.astype(np.float64)),
        None if bias is None else bias.astype(np.float64),
    )  # fmt: skip
    where = target()
    numpy_reference.run(numpy_reference.plan(wide, where, LIMIT), operands, request.view(wide, 2, out))
    return out


def check(problem: Conv2dProblem, where: Target, positive: bool = False, tolerance: float = HIGH) -> Any:
    x, k, bias = arrays(problem, positive)
    y = computed(problem, x, k, bias, where)
    plain = replace(problem, activation=None, bias=False, padding_value=abs(problem.padding_value))
    most = np.linalg.norm(reference(plain, abs(x), abs(k), None))
    error = np.linalg.norm(y - reference(problem, x, k, bias))
    assert error <= tolerance * most
    return y


@both
@pytest.mark.parametrize("bits", (128, 256, 512))
@pytest.mark.parametrize(("sizes", "padding"), SHAPES)
def test_every_width_of_register(sizes, padding, bits, layout):
    native = winograd.runtime.vector_bits()
    if bits > native:
        pytest.skip(f"the registers of this machine have {native} bits")
    check(problem_of(sizes, padding, bias=True, layout=layout), target(2, bits))


@both
@pytest.mark.parametrize("positive", (False, True), ids=("normal", "positive"))
@pytest.mark.parametrize("channels", (1, 16, 100, 257, 512))
def test_the_promise_of_precision_high(channels, positive, layout):
    # A tenth of what is promised: the promise is for weights and images worse than these.
    check(problem_of((1, channels, 14, 14, 13), layout=layout), target(), positive, HIGH / 10)


@pytest.mark.parametrize(("sizes", "padding"), SHAPES)
def test_channels_last_or_first_gives_the_same_bits(sizes, padding):
    first = problem_of(sizes, padding, bias=True)
    last = problem_of(sizes, padding, bias=True, layout="NHWC")
    x, k, bias = arrays(first)
    y = computed(first, x, k, bias, target())
    turned = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    for packed in (False, True):
        assert np.array_equal(y, computed(last, turned, k, bias, target(), packed).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("scale", (1e-6, 1e6))
def test_a_bright_padding_and_an_offset_keep_the_promise(scale):
    problem = problem_of((1, 20, 11, 10, 6), 2, padding_value=3 * scale)
    x, k, _ = arrays(problem)
    x = (x * 0.01 + 1).astype(np.float32) * np.float32(scale)
    y = computed(problem, x, k, None, target())
    most = np.linalg.norm(reference(problem, abs(x), abs(k), None))
    assert np.linalg.norm(y - reference(problem, x, k, None)) <= HIGH * most


@both
@pytest.mark.parametrize("activation", (None, "relu"))
@pytest.mark.parametrize("value", (0, -2))
def test_bias_activation_and_padding_value(activation, value, layout):
    options: dict[str, Any] = {"activation": activation, "padding_value": value, "bias": True, "layout": layout}
    y = check(problem_of((2, 6, 9, 7, 10), 1, **options), target())
    assert (y.min() == 0) == (activation == "relu")


@both
@pytest.mark.parametrize("groups", (2, 3))
def test_groups(groups, layout):
    check(problem_of((2, 6 * groups, 9, 10, 5 * groups), groups=groups, bias=True, layout=layout), target())


@both
@pytest.mark.parametrize("padding", (0, 1, 2, 3, ((0, 1), (4, 0))))
def test_input_gradient(padding, layout):
    # A padding beyond 2 is a crop of the gradient's forward convolution.
    check(problem_of((2, 7, 9, 11, 6), padding, op="input_grad", layout=layout), target())


@both
def test_weights_prepared_or_not_many_strips_or_few_give_the_same_bits(layout):
    for sizes in ((1, 5, 9, 9, 11), (1, 130, 20, 33, 72), (5, 64, 17, 18, 24), (1, 700, 6, 6, 40), (2, 8, 60, 62, 9)):
        problem = problem_of(sizes, bias=True, layout=layout)
        x, k, bias = arrays(problem)
        y = computed(problem, x, k, bias, target())
        assert np.array_equal(y, computed(problem, x, k, bias, target(), packed=True))
        for threads in (1, 3):
            assert np.array_equal(y, computed(problem, x, k, bias, target(threads)))
        alone = replace(problem, N=1)
        assert np.array_equal(y[:1], computed(alone, x[:1], k, bias, target()))


@both
def test_the_memory_layout_changes_no_bit(layout):
    problem = problem_of((2, 9, 13, 21, 10), layout=layout)
    x, k, _ = arrays(problem)
    y = computed(problem, x, k, None, target())
    apart = np.full((*x.shape[:2], 2 * x.shape[2], 3 * x.shape[3]), np.nan, np.float32)[:, :, ::2, ::3]
    apart[...] = x
    mirrored = np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    other = np.ascontiguousarray(k.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    for image, kernel in itertools.product((x, apart, mirrored, np.asfortranarray(x)), (k, other)):
        assert np.array_equal(y, computed(problem, image, kernel, None, target()))
    into = np.full((*y.shape[:2], 2 * y.shape[2], 2 * y.shape[3]), np.nan, np.float32)
    strided = into[:, :, ::2, 1::2]
    plan = winograd.plan(problem, target(), LIMIT)
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, k))
    winograd.run(plan, operands, request.view(problem, 2, strided))
    assert np.array_equal(strided, y)
    strided[...] = np.nan
    assert np.isnan(into).all()


def test_broadcast_operands():
    problem = problem_of((2, 3, 8, 9, 4))
    x = np.broadcast_to(np.arange(9, dtype=np.float32), (2, 3, 8, 9))
    k = np.broadcast_to(np.float32(0.5), (4, 3, 3, 3))
    y = computed(problem, x, k, None, target())
    assert np.array_equal(y, computed(problem, x.copy(), k.copy(), None, target()))


@both
def test_a_strip_is_as_small_as_the_limit_asks(layout):
    problem = problem_of((1, 64, 50, 200, 16), layout=layout)
    x, k, _ = arrays(problem)
    y = computed(problem, x, k, None, target())
    least = winograd.plan(problem, target(), LIMIT).workspace
    plan = winograd.plan(problem, target(), least // 2)
    assert plan.workspace <= least // 2
    out = np.empty_like(y)
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, k))
    winograd.run(plan, operands, request.view(problem, 2, out))
    assert np.array_equal(out, y)
    with pytest.raises(MemoryError, match=r"numba_cpu\.winograd .* needs at least"):
        winograd.plan(problem, target(), 1000)


@both
@pytest.mark.parametrize(("sizes", "padding"), SHAPES)
def test_scratch_is_written_before_it_is_read_and_large_enough(sizes, padding, layout, monkeypatch):
    given = []

    def poisoned(count: int, dtype: Any) -> Any:
        given.append(np.full(count + 512, np.nan, dtype))
        return given[-1][256:-256]

    monkeypatch.setattr(winograd.runtime, "aligned", poisoned)
    problem = problem_of(sizes, padding, layout=layout)
    x, k, _ = arrays(problem)
    for packed in (False, True):
        assert np.isfinite(computed(problem, x, k, None, target(), packed)).all()
    assert all(np.isnan(whole[:256]).all() and np.isnan(whole[-256:]).all() for whole in given)


@pytest.mark.parametrize(
    ("sizes", "worth"),
    (
        ((1, 64, 56, 56, 64), True),
        ((4, 256, 14, 14, 256), True),
        ((1, 16, 56, 56, 64), True),
        ((1, 512, 7, 7, 512), False),
        ((1, 3, 224, 224, 64), False),
        ((1, 64, 1, 500, 64), False),
    ),
)
def test_what_it_is_worth(sizes, worth):
    for op, layout in itertools.product(("forward", "input_grad"), ("NCHW", "NHWC")):
        first = dispatch.preferred(problem_of(sizes, op=op, layout=layout), "cpu")[0][0]
        assert (first == "numba_cpu.winograd") is worth


@both
def test_pixels_that_no_output_reads_do_not_matter(layout):
    problem = replace(problem_of((1, 2, 12, 12, 3), 0, layout=layout), padding=((-2, -1), (-3, -1)))
    x, k, _ = arrays(problem)
    read = (..., slice(2, -1), slice(3, -1)) if layout == "NCHW" else (0, slice(2, -1), slice(3, -1))
    inner = x[read].copy()
    x[...] = np.nan
    x[read] = inner
    assert np.isfinite(computed(problem, x, k, None, target())).all()


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    (
        ({"precision": "highest"}, "rounding errors"),
        ({"stride": 2}, "without stride"),
        ({"dilation": (1, 2)}, "without stride"),
        ({"x_dtype": "float64"}, "float32"),
        ({"x_dtype": "float16", "k_dtype": "float16"}, "float32"),
        ({"padding_mode": "edge"}, "constant padding"),
    ),
)
def test_what_it_refuses(kwargs, reason):
    found = winograd.unsupported(problem_of((1, 4, 9, 9, 4), **kwargs), target())
    assert [text for text in found if reason in text]


@both
def test_through_the_public_calls(layout):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 16, 15, 17) if layout == "NCHW" else (2, 15, 17, 16), dtype=np.float32)
    k, b = rng.standard_normal((8, 16, 3, 3), dtype=np.float32), rng.standard_normal(8, dtype=np.float32)
    options: dict[str, Any] = {
        "padding": 1, "precision": "high", "activation": "relu", "layout": layout, "backend": winograd.NAME,
    }  # fmt: skip
    layer = gpuconv.Conv2d(k, b, **options)
    for _ in range(3):  # checked, planned, repeated
        y = gpuconv.conv2d(x, k, b, **options)
        assert np.array_equal(y, layer(x))
    flipped = gpuconv.conv2d(x, np.ascontiguousarray(k[..., ::-1, ::-1]), b, flip=True, **options)
    assert np.array_equal(y, flipped)
    with pytest.raises(gpuconv.NoBackendError, match="highest"):
        gpuconv.conv2d(x, k, layout=layout, backend=winograd.NAME)


def test_foreign_byte_order_goes_elsewhere():
    """The kernel reads memory as it is: taken for the machine's own order, such numbers would be other numbers."""
    x, k = np.full((1, 32, 16, 16), 3, np.dtype("f4").newbyteorder()), np.ones((32, 32, 3, 3), np.float32)
    limit = 2 * x.nbytes - 1  # no room for a copy in the machine's own
    report = gpuconv.explain(x, k, padding=1, precision="high", workspace_limit=limit)
    assert report.implementation != "numba_cpu.winograd"
    assert gpuconv.conv2d(x, k, precision="high", workspace_limit=limit)[0, 0, 0, 0] == 3 * 32 * 9
    with pytest.raises(gpuconv.NoBackendError, match="byte order"):
        gpuconv.conv2d(x, k, precision="high", backend="numba_cpu.winograd", workspace_limit=limit)


def test_large_weights_are_transformed_anew_by_a_layer(monkeypatch):
    """What is too large to be kept is not; a layer called again and again gives what ``conv2d`` gives."""
    monkeypatch.setattr(winograd, "_KEPT", 1000)
    rng = np.random.default_rng(2)
    x, k = rng.standard_normal((1, 32, 16, 16), np.float32), rng.standard_normal((32, 32, 3, 3), np.float32)
    for order in ("OIHW", "HWIO"):
        kernel = k if order == "OIHW" else np.ascontiguousarray(k.transpose(2, 3, 1, 0))
        options = {"padding": 1, "precision": "high", "backend": winograd.NAME, "kernel_layout": order}
        layer = gpuconv.Conv2d(kernel, **options)
        for _ in range(3):
            assert np.array_equal(layer(x), gpuconv.conv2d(x, kernel, **options))
