"""The relatives of conv2d through conv2d itself: what is claimed of each is an equation, so no second oracle is needed.

    input gradient   a convolution, at stride 1, of the gradient spread by the stride, with the kernel turned around
    weight gradient  a convolution of the input with the gradient for a kernel, stride and dilation exchanged
    transpose        the input gradient, not conjugated, plus a bias
    unfold, fold     conv2d is a matrix product with unfold; fold is its adjoint
    conv1d           images of one row

Small integers make every sum exact in every dtype, whatever the order; real numbers are held to the bound.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import oracle
import pytest
import units
from calls import affordable, is_costly
from hypothesis import event, given
from hypothesis import strategies as st
from oracle import Answer
from running import SERVE_EVERYTHING, SIMULATOR_MARKS, usable
from strategies import ANYTHING, ARRAYS, Form, bits_of, kind_of, small_pairs
from strategies_family import Forward, across, backwards, forwards, reference, values, wide

import gpuconv
from gpuconv import conv2d, dispatch

pytestmark = SIMULATOR_MARKS

shares = pytest.mark.parametrize("share", ["quick", *(pytest.param(f"long_{n}", marks=pytest.mark.full) for n in "12")])


def judged(
    op: str, problem: Forward, call: Callable[..., Any], operands: tuple, laid_as: tuple[Form, ...], wanted: Any,
    magnitude: Any, products: int, bias: bool = False,
) -> None:  # fmt: skip
    """``call(*operands, …)`` on everything that can compute ``op``: exact, or within the bound; operands untouched."""
    dtype = oracle.result_dtype(operands[0].dtype, operands[-1].dtype)
    answer = Answer(np.asarray(wanted), np.asarray(magnitude), max(products, 1), bias, dtype)
    laid = [form.lay(array) for form, array in zip(laid_as, operands, strict=True)]
    images = [memory.tobytes() for _, memory in laid]
    for name in usable(op):
        if is_costly(name, operands[0].dtype.name, dtype.name):
            continue
        options: dict[str, Any] = {"backend": name}
        if problem.into:
            options["out"] = units.unwritten(answer).array
        try:
            y = call(*(array for array, _ in laid), **options)
        except gpuconv.NoBackendError as refusal:
            assert name not in SERVE_EVERYTHING and name in str(refusal)
            continue
        except MemoryError as shortage:
            assert problem.limit is not None and "bytes" in str(shortage)
            continue
        event(name)
        assert [memory.tobytes() for _, memory in laid] == images, f"{name} wrote to an operand"
        assert y is options["out"] if problem.into else y.flags.c_contiguous
        if problem.exact:
            units.assert_exact(y, answer, name)
        else:
            held = bits_of(units.sum_dtype(dtype).name)
            extra = 2 * sum(bits_of(array.dtype.name) > held for array in operands)
            slack = Answer(answer.y, answer.magnitude, answer.products + extra, bias, dtype)
            units.assert_close(y, slack, name)


@shares
@given(problem=forwards())
def test_input_gradient(share, problem):
    rng = np.random.default_rng(problem.seed)
    g = problem.image_forms[0].values(problem.image(values(rng, problem.outputs, problem.dtypes[0], problem.exact)))
    k = problem.kernel_form.values(problem.weights(values(rng, problem.kernel, problem.dtypes[1], problem.exact)))
    canonical = oracle.kernel_to_oihw(k, problem.kernel_layout)
    canonical = wide(canonical[..., ::-1, ::-1] if problem.flip else canonical)
    gradient = wide(oracle.image_to_nchw(g, problem.layout))
    size = problem.image(np.broadcast_to(0, problem.sizes)).shape

    def call(g: Any, k: Any, **options: Any) -> Any:
        return gpuconv.grad.conv2d_input(size, k, g, **problem.asked, **options)

    wanted = problem.image(backwards(problem, canonical.conj(), gradient))
    magnitude = problem.image(backwards(problem, np.abs(canonical), np.abs(gradient)))
    O, _, KH, KW = problem.kernel
    laid_as = problem.image_forms[0], problem.kernel_form
    judged("input_grad", problem, call, (g, k), laid_as, wanted, magnitude, O // problem.groups * KH * KW)


@shares
@given(problem=forwards())
def test_weight_gradient(share, problem):
    rng = np.random.default_rng(problem.seed)
    x = problem.image_forms[0].values(problem.image(values(rng, problem.sizes, problem.dtypes[0], problem.exact)))
    g = problem.image_forms[1].values(problem.image(values(rng, problem.outputs, problem.dtypes[1], problem.exact)))
    image, gradient = (wide(oracle.image_to_nchw(array, problem.layout)) for array in (x, g))
    size = problem.weights(np.broadcast_to(0, problem.kernel)).shape

    def call(x: Any, g: Any, **options: Any) -> Any:
        return gpuconv.grad.conv2d_weight(x, size, g, **problem.asked, **options)

    wanted = problem.weights(across(problem, image.conj(), gradient))
    magnitude = problem.weights(across(problem, np.abs(image), np.abs(gradient)))
    N, _, OH, OW = problem.outputs
    judged("weight_grad", problem, call, (x, g), problem.image_forms, wanted, magnitude, N * OH * OW)


@shares
@given(problem=forwards(), vector=st.integers(0, 2**16))
def test_gradients_are_adjoints(share, problem, vector):
    """⟨conv2d(x, k), g⟩ = ⟨x, input_grad(k, g)⟩ = ⟨k, weight_grad(x, g)⟩ (conjugated), and the bias's beside it."""
    rng, dtype = np.random.default_rng(vector), "complex128" if problem.seed % 2 else "int64"
    x, k = (
        problem.image(values(rng, problem.sizes, dtype, True)),
        problem.weights(values(rng, problem.kernel, dtype, True)),
    )
    options = problem.asked | {"workspace_limit": None} | affordable(dtype)
    y = conv2d(x, k, **options)
    g = values(rng, y.shape, dtype, True)
    inner = np.vdot(g, y)
    assert np.vdot(gpuconv.grad.conv2d_input(x.shape, k, g, **options), x) == inner
    assert np.vdot(gpuconv.grad.conv2d_weight(x, k.shape, g, **options), k) == inner
    if problem.rank > 2:
        b = values(rng, (problem.kernel[0],), dtype, True)
        shift = conv2d(x, k, b, **options) - y
        assert np.vdot(gpuconv.grad.conv2d_bias(g, layout=problem.layout), b) == np.vdot(g, shift)


@shares
@given(
    problem=forwards(), extra=st.tuples(st.integers(0, 4), st.integers(0, 4)), bias=st.booleans(), relu=st.booleans()
)
def test_transpose(share, problem, extra, bias, relu):
    """The input gradient of the size that output_padding picks, which may reach beyond every window."""
    (N, C, _, _), (O, I, KH, KW), (_, _, OH, OW) = problem.sizes, problem.kernel, problem.outputs
    extra = tuple(min(e, max(s, d) - 1) for e, s, d in zip(extra, problem.stride, problem.dilation, strict=True))
    steps = zip((OH, OW), (KH, KW), problem.stride, problem.dilation, problem.pads, extra, strict=True)
    H, W = ((n - 1) * s - sum(pad) + d * (k - 1) + 1 + e for n, k, s, d, pad, e in steps)
    rng = np.random.default_rng(problem.seed)
    x = problem.image_forms[0].values(problem.image(values(rng, problem.outputs, problem.dtypes[0], problem.exact)))
    k = values(rng, problem.kernel, problem.dtypes[1], problem.exact)
    k = problem.kernel_form.values(k if problem.rank > 2 else k[0, 0])
    dtype = oracle.result_dtype(x.dtype, k.dtype)
    relu = relu and kind_of(dtype) < 2
    b = values(rng, (C,), "int8", True) if bias and C else None
    asked = {name: problem.kwargs[name] for name in ("stride", "dilation", "groups")}
    asked |= {"padding": problem.pads, "output_padding": extra, "layout": problem.layout}
    asked |= {"activation": "relu"} if relu else {}
    asked |= {} if problem.limit is None else {"workspace_limit": problem.limit}

    def call(x: Any, k: Any, **options: Any) -> Any:
        return gpuconv.conv_transpose2d(x, k, b, **asked, **options)

    if H < 1 or W < 1 or I == 0:
        with pytest.raises(ValueError, match=r"^conv_transpose2d: "):
            call(x, k)
        return
    sized = Forward(**vars(problem) | {"sizes": (N, C, H, W), "kwargs": problem.kwargs | {"padding": problem.pads}})
    operands = wide(oracle.kernel_to_oihw(k, "OIHW")), wide(oracle.image_to_nchw(x, problem.layout))
    wanted, magnitude = (backwards(sized, *parts) for parts in (operands, [np.abs(part) for part in operands]))
    if b is not None:
        wanted, magnitude = wanted + b.astype(float)[:, None, None], magnitude + np.abs(b.astype(float))[:, None, None]
    wanted = np.maximum(wanted, 0) if relu else wanted
    judged(
        "input_grad", problem, call, (x, k), (problem.image_forms[0], problem.kernel_form), problem.image(wanted),
        problem.image(magnitude), O // problem.groups * KH * KW, b is not None,
    )  # fmt: skip


@shares
@given(problem=forwards())
def test_unfold_and_fold(share, problem):
    """unfold moves windows, conv2d is its product with the kernel, and fold adds the columns back: its adjoint."""
    (N, C, H, W), (_, _, KH, KW), (_, _, OH, OW) = problem.sizes, problem.kernel, problem.outputs
    rng = np.random.default_rng(problem.seed)
    window = {name: problem.kwargs[name] for name in ("dilation", "stride")} | {"padding": problem.pads}
    window |= {} if problem.limit is None else {"workspace_limit": problem.limit}
    x = values(rng, problem.sizes, problem.dtypes[0], problem.exact)
    x = x if problem.rank == 4 else x[0]
    if 0 in (C, H, W):
        return
    taps = np.eye(KH * KW).reshape(KH * KW, 1, KH, KW)
    every = np.concatenate([taps] * C)  # a filter for each element of a window, which picks it
    options = {name: window[name] for name in ("dilation", "stride", "padding")}
    batch = oracle.image_to_nchw(x, "NCHW")
    shape = (N, C * KH * KW, OH * OW) if x.ndim == 4 else (C * KH * KW, OH * OW)
    form = problem.image_forms[0] if x.ndim == problem.rank else Form()
    x = form.values(x)
    picked = reference(wide(oracle.image_to_nchw(x, "NCHW")), every, groups=C, **options).reshape(shape)
    view = form.lay(x)[0]
    for name in usable("unfold"):
        try:
            columns = gpuconv.unfold(view, (KH, KW), backend=name, **window)
        except MemoryError:
            assert problem.limit is not None
            continue
        assert columns.dtype == x.dtype and columns.shape == shape
        assert np.array_equal(wide(columns), picked)
    columns = values(rng, shape, problem.dtypes[1], problem.exact)
    sums = Forward(**vars(problem) | {
        "sizes": (len(batch), C, H, W), "kernel": (C * KH * KW, 1, KH, KW),
        "kwargs": problem.kwargs | {"groups": C, "padding": problem.pads},
    })  # fmt: skip
    stacked = wide(columns).reshape(len(batch), C * KH * KW, OH, OW)
    folded, magnitude = (backwards(sums, every, part) for part in (stacked, np.abs(stacked)))
    back = (lambda array: array) if x.ndim == 4 else (lambda array: array[0])

    def call(columns: Any, **arguments: Any) -> Any:
        return gpuconv.fold(columns, (H, W), (KH, KW), **window, **arguments)

    judged("fold", problem, call, (columns,), (Form("Fortran"),), back(folded), back(magnitude), KH * KW)


@shares
@given(problem=forwards(), mode=st.sampled_from(("constant", "reflect", "edge", "wrap")), length=small_pairs)
def test_conv1d_is_conv2d_of_one_row(share, problem, mode, length):
    (N, C, _, W), (O, I, _, KW) = problem.sizes, problem.kernel
    if W == 0:
        return
    rng = np.random.default_rng(problem.seed)
    x = values(rng, (N, C, W), problem.dtypes[0], problem.exact)
    k = values(rng, (O, I, KW), problem.dtypes[1], problem.exact)
    b = values(rng, (O,), "int8", True)
    padding = problem.kwargs["padding"] if isinstance(problem.kwargs["padding"], str) else problem.pads[1]
    steps = {"stride": problem.stride[1], "dilation": problem.dilation[1]}
    shared = {"groups": problem.groups, "flip": problem.flip, "padding_mode": mode}
    pads = padding if isinstance(padding, str) else ((0, 0), padding)
    pairs = {name: (1, value) for name, value in steps.items()}
    chosen = affordable(*problem.dtypes)
    wanted = conv2d(x[:, :, None], k[:, :, None], b, padding=pads, **pairs, **shared, **chosen)[:, :, 0]
    layout = {"NCHW": "NCL", "NHWC": "NLC"}[problem.layout]
    kernel_layout, order = {"OIHW": ("OIK", (0, 1, 2)), "HWIO": ("KIO", (2, 1, 0)), "OHWI": ("OKI", (0, 2, 1))}[
        problem.kernel_layout
    ]
    given = x.swapaxes(1, 2) if layout == "NLC" else x
    options = {**steps, **shared, "padding": padding, "layout": layout, "kernel_layout": kernel_layout}
    y = gpuconv.conv1d(given, k.transpose(order), b, **options, **chosen)
    back = y.swapaxes(1, 2) if layout == "NLC" else y
    assert (back.shape, back.dtype) == (wanted.shape, wanted.dtype)
    if problem.exact:
        assert np.array_equal(back, wanted)
        for name in usable():
            if is_costly(name, given.dtype.name, y.dtype.name):
                continue
            try:
                assert np.array_equal(gpuconv.conv1d(given, k.transpose(order), b, backend=name, **options), y)
            except gpuconv.NoBackendError:
                assert name not in SERVE_EVERYTHING
    if N:
        single = gpuconv.conv1d(given[0], k.transpose(order), b, **options, **chosen)
        assert single.shape == y.shape[1:]
        assert not problem.exact or np.array_equal(single, y[0])
    if (C, O) == (1, 1) and N:
        assert gpuconv.conv1d(x[0, 0], k[0, 0], **options, **chosen).shape == (wanted.shape[-1],)


@shares
@given(problem=forwards(), other=small_pairs)
def test_prepared_is_conv2d(share, problem, other):
    """For the first image, another one of another size and dtype, and the first again; later writes change nothing."""
    rng = np.random.default_rng(problem.seed)
    x = problem.image(values(rng, problem.sizes, problem.dtypes[0], problem.exact))
    k = problem.weights(values(rng, problem.kernel, problem.dtypes[1], problem.exact))
    k = np.ascontiguousarray(k)  # as the copy that is kept: GEMM libraries give other bits for other strides
    b = values(rng, (problem.kernel[0],), "int8", True) if problem.rank > 2 else None
    N, C, H, W = problem.sizes
    larger = problem.image(values(rng, (N + 1, C, H + other[0], W + other[1]), "float32", problem.exact))
    options = problem.asked | {"workspace_limit": None}
    dtype = oracle.result_dtype(x.dtype, k.dtype).name
    for name in (affordable(x.dtype.name, dtype).get("backend"), *usable()):
        if name is not None and is_costly(name, x.dtype.name, dtype):
            continue
        try:
            wanted = [conv2d(image, k, b, backend=name, **options) for image in (x, larger, x)]
        except gpuconv.NoBackendError:
            continue
        held = k.copy()
        prepared = gpuconv.Conv2d(held, b, backend=name, **options)
        held[...] = 1
        for image, y in zip((x, larger, x), wanted, strict=True):
            again = prepared(image)
            assert (again.dtype, again.shape) == (y.dtype, y.shape)
            assert again.tobytes() == y.tobytes(), "prepared weights gave other bits"
            out = np.full_like(y, 77)
            assert prepared(image, out=out) is out and out.tobytes() == y.tobytes()


# ---- arguments of every kind

IMAGE, KERNEL, GRADIENT = np.ones((2, 3, 5, 6)), np.ones((4, 3, 2, 3)), np.ones((2, 4, 4, 4))
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "conv_transpose2d": (gpuconv.conv_transpose2d, {"x": GRADIENT, "k": KERNEL}),
    "conv2d_input": (
        gpuconv.grad.conv2d_input, {"input_size": (2, 3, 5, 6), "weight": KERNEL, "grad_output": GRADIENT},
    ),
    "conv2d_weight": (
        gpuconv.grad.conv2d_weight, {"input": IMAGE, "weight_size": (4, 3, 2, 3), "grad_output": GRADIENT},
    ),
    "conv2d_bias": (gpuconv.grad.conv2d_bias, {"grad_output": GRADIENT}),
    "conv1d": (gpuconv.conv1d, {"x": np.ones((2, 4, 9)), "k": np.ones((3, 4, 2))}),
    "unfold": (gpuconv.unfold, {"x": IMAGE, "kernel_size": (2, 3)}),
    "fold": (gpuconv.fold, {"columns": np.ones((2, 18, 16)), "output_size": (5, 6), "kernel_size": (2, 3)}),
    "Conv2d": (lambda **given: gpuconv.Conv2d(**given)(IMAGE), {"k": KERNEL}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::gpuconv.DeviceFallbackWarning")
@pytest.mark.parametrize("name", CALLS)
@shares
@given(data=st.data())
def test_any_arguments_are_refused_by_name_or_served(share, name, data):
    """With implementations that do nothing, so that a valid call for a terabyte costs nothing either."""
    function, given_arguments = CALLS[name]
    signature = inspect.signature(gpuconv.Conv2d if name == "Conv2d" else function)
    names = [parameter for parameter in signature.parameters if parameter not in ("stream", "self")]
    changed = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    replaced = {
        key: data.draw(ARRAYS | ANYTHING if isinstance(given_arguments.get(key), np.ndarray) else ANYTHING)
        for key in changed
    }
    started: list[Any] = []
    with contextlib.ExitStack() as stack:
        for implementation in map(dispatch.implementation, dispatch.TABLE):
            stack.enter_context(mock.patch.object(implementation, "run", lambda *given: started.append(given)))
        try:
            function(**given_arguments | replaced)
        except (ValueError, TypeError) as refusal:
            assert str(refusal).startswith(f"{name}: "), f"{refusal!r} of {replaced}"
            assert not started, f"refused after an implementation was started: {refusal}"
            event("refused")
        except (MemoryError, gpuconv.NoBackendError):
            assert not started
