"""Bugs that others shipped, where gradients, transposes and their relatives can have them too.

Each operator is held to what ``strategies_family`` makes of conv2d; see ``test_known_bugs.py`` for conv2d's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import oracle
import pytest
import units
from oracle import Answer
from running import (
    SIMULATOR_MARKS,
    gpu_arrays,
    home,
    share,
    simulated,
    skip_in_simulator,
    skip_unless_usable,
)
from strategies_family import Forward, across, backwards, plain, values, wide

import gpuconv
from gpuconv import conv2d, dispatch

pytestmark = SIMULATOR_MARKS

# What has all adjoints of real numbers; the compiled CPU kernels, which have one each, are met in test_family.
GRADIENTS = tuple(
    name
    for name in dispatch.serving("input_grad")
    if name in dispatch.serving("weight_grad") and name != "numba_cpu.complex"
)
every_implementation = pytest.mark.parametrize("name", GRADIENTS)
every_patches = pytest.mark.parametrize("name", dispatch.serving("fold"))


class On:
    """The operators on one implementation."""

    def __init__(self, name: str) -> None:
        skip_unless_usable(name)
        self.name = name

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        function = getattr(gpuconv.grad if operator.startswith("conv2d") else gpuconv, operator)

        def call(*operands: Any, **kwargs: Any) -> Any:
            try:
                return function(*operands, backend=self.name, **kwargs)
            except gpuconv.NoBackendError as refusal:
                if not dispatch.is_experimental(self.name):  # those are for few types
                    raise
                pytest.skip(str(refusal).partition("\n")[2].strip())

        return call

    def check(self, problem: Forward, forms: Any = (None, None)) -> None:
        """All three adjoints of ``problem`` on guarded operands, into poisoned results."""
        rng = np.random.default_rng(problem.seed)
        x, k, g = (values(rng, shape, "float32", True) for shape in (problem.sizes, problem.kernel, problem.outputs))
        steps, xp = problem.kwargs, home(self.name)
        pads = steps | {"padding": problem.pads, "output_padding": problem.output_padding}
        calls = {
            "conv2d_input": (problem.sizes, (k, g), backwards(problem, wide(k), wide(g))),
            "conv2d_weight": (problem.kernel, (x, g), across(problem, wide(x), wide(g))),
            "conv_transpose2d": (problem.sizes, (g, k), backwards(problem, wide(k), wide(g))),
        }
        for operator, (shape, operands, wanted) in calls.items():
            answer = Answer(wanted, np.abs(wanted), 1, False, np.dtype(np.float32))  # exact
            guarded = [units.Guarded(array, xp) for array in operands]
            first, second = (
                guard.array if form is None else units.arranged(array, *form, xp)[0]
                for guard, array, form in zip(guarded, operands, forms, strict=True)
            )
            out = units.unwritten(answer, xp)
            if operator == "conv_transpose2d":
                y = self.conv_transpose2d(first, second, out=out.array, **pads)
            elif operator == "conv2d_input":
                y = self.conv2d_input(shape, first, second, out=out.array, **steps)
            else:
                y = self.conv2d_weight(first, shape, second, out=out.array, **steps)
            context = f"{operator} of {problem.sizes} by {problem.kernel} with {steps}"
            for guard in guarded:
                guard.check_whole(context)
            out.check_edges(context)
            units.assert_exact(y, answer, context)


# ---- memory

SIGNS = list(itertools.product((1, -1), repeat=4))


@every_implementation
def test_negative_strides_of_both_operands(name):
    on = On(name)
    problem = plain((2, 3, 4, 3), (2, 3, 2, 3), padding=((1, 0), (0, 1)))
    some = list(itertools.product(SIGNS, SIGNS))[::5]  # each sign of either, beside many of the other
    for first, second in share(name, some, 30):
        on.check(problem, forms=(((0, 1, 2, 3), first, 1), ((0, 1, 2, 3), second, 1)))


@every_implementation
def test_strided_and_broadcast_operands_are_not_taken_for_contiguous(name):
    on = On(name)
    rng = np.random.default_rng(8)
    k, g = values(rng, (4, 3, 4, 4), "float32", True), values(rng, (2, 4, 5, 6), "float32", True)
    kernels = [k[:, :, ::2, ::2], k[:, :, ::-2, 1::2], np.broadcast_to(k[:1], k.shape), np.asfortranarray(k),
               np.broadcast_to(k[0, 0, 0, 0], (4, 3, 2, 2)), k[:, :, 1:2, 2:3]]  # fmt: skip
    gradients = [g, g[..., ::-1], np.broadcast_to(g[..., :1, :1], g.shape), np.asfortranarray(g)]
    for kernel, gradient in share(name, itertools.product(kernels, gradients), 13):
        KH, KW = kernel.shape[2:]
        problem = plain((2, 3, 5 + KH - 1, 6 + KW - 1), kernel.shape)
        wanted = backwards(problem, wide(kernel), wide(gradient))
        assert np.array_equal(units.to_host(on.conv2d_input(problem.sizes, kernel, gradient)), wanted)
        assert np.array_equal(units.to_host(on.conv_transpose2d(gradient, kernel)), wanted)
        x = np.broadcast_to(values(rng, (1, 3, 1, 6 + KW - 1), "float32", True), problem.sizes)
        wanted = across(problem, wide(x), wide(gradient))
        assert np.array_equal(units.to_host(on.conv2d_weight(x, kernel.shape, gradient)), wanted)


@pytest.mark.parametrize("kernel", [1, 2])
@every_implementation
def test_channel_counts_that_divide_no_tile_read_no_garbage(name, kernel):
    on = On(name)
    for C, O in share(name, itertools.product((1, 2, 3, 5, 9, 17, 33), repeat=2), 40):
        on.check(plain((1, C, 3, 3), (O, C, kernel, kernel), stride=2))
        if C == O and not simulated(name):
            on.check(plain((2, C, 3, 3), (C, 1, kernel, kernel), groups=C, padding=1))


# ---- geometry


@every_implementation
def test_one_by_one_kernels_keep_the_stride(name):
    on = On(name)
    g = np.array([[1.0, 2.0], [3.0, 4.0]])
    spread = [[1, 0, 2], [0, 0, 0], [3, 0, 4]]
    assert units.to_host(on.conv2d_input((3, 3), [[1.0]], g, stride=2)).tolist() == spread
    assert units.to_host(on.conv_transpose2d(g, [[1.0]], stride=2)).tolist() == spread
    x = np.arange(1.0, 10).reshape(3, 3)
    assert units.to_host(on.conv2d_weight(x, (1, 1), g, stride=2)).item() == 1 + 2 * 3 + 3 * 7 + 4 * 9
    assert units.to_host(on.conv_transpose2d(g, [[1.0]], dilation=5)).tolist() == g.tolist()
    assert units.to_host(on.conv_transpose2d(g[:1, :1], [[1.0]], stride=cases.HUGE)).tolist() == [[1]]


@every_implementation
def test_geometries_that_went_wrong(name):
    on = On(name)
    problems = [
        plain((1, 1, 4, 4), (1, 1, 3, 3), stride=2, padding="same"),  # pads (0, 1), not (1, 1)
        plain((1, 2, 6, 5), (2, 2, 3, 4), stride=(2, 3), padding="same_lower"),
        plain((1, 1, 2, 2), (1, 1, 3, 3), stride=23, padding=100),  # no window but one sees the input
        plain((1, 2, 3, 3), (2, 2, 2, 2), padding="full"),
        plain((1, 2, 8, 9), (3, 2, 3, 2), stride=2),  # the last row and column are never read
        plain((1, 2, 9, 9), (2, 2, 1, 1), stride=4),  # most pixels are never read
        plain((1, 2, 13, 12), (2, 2, 3, 3), stride=2, dilation=3),
        plain((2, 6, 7, 6), (4, 3, 3, 2), stride=(3, 2), dilation=(2, 1), padding=(2, 1), groups=2),
        plain((2, 2, 4, 5), (3, 2, 2, 2), stride=cases.HUGE),
    ]
    for problem in share(name, problems, 4):
        on.check(problem)


@pytest.mark.parametrize("value", [2**31, 2**55, 2**62, 2**64 + 1])
@pytest.mark.parametrize("argument", ["stride", "padding", "dilation"])
def test_sizes_that_overflow_are_refused(argument, value):
    one, image = np.ones((1, 1)), np.ones((5, 5))
    for form in (value, (1, value)):
        option = {argument: form}
        for call in (
            lambda option=option: gpuconv.conv_transpose2d(image, one, **option),
            lambda option=option: gpuconv.grad.conv2d_input((5, 5), one, image, **option),
            lambda option=option: gpuconv.grad.conv2d_weight(image, (1, 1), image, **option),
            lambda option=option: gpuconv.unfold(image[None], 1, **option),
            lambda option=option: gpuconv.fold(np.ones((1, 25)), 5, 1, **option),
            lambda option=option: gpuconv.conv1d(image[0], one[0], **option),
            lambda option=option: gpuconv.Conv2d(one, **option)(image),
        ):
            with pytest.raises((ValueError, TypeError) if form != value else ValueError, match=argument):
                call()
    for call in (
        lambda: gpuconv.conv_transpose2d(image, one, stride=2, output_padding=value),
        lambda: gpuconv.grad.conv2d_input((value, value), one, image),
        lambda: gpuconv.grad.conv2d_weight(image, (value, 1), image),
        lambda: gpuconv.unfold(image[None], value),
        lambda: gpuconv.fold(np.ones((1, 25)), value, 1),
    ):
        with pytest.raises(ValueError, match=str(value)):
            call()


def test_nothing_is_divided_by_zero():
    image, k, g = np.ones((1, 2, 4, 4)), np.ones((2, 2, 3, 3)), np.ones((1, 2, 2, 2))
    empty = np.ones((2, 2, 0, 3))
    for call in (
        lambda: gpuconv.conv_transpose2d(g, k, groups=0),
        lambda: gpuconv.conv_transpose2d(g, empty),
        lambda: gpuconv.conv_transpose2d(g, np.ones((2, 0, 3, 3))),
        lambda: gpuconv.conv_transpose2d(g, k, stride=0),
        lambda: gpuconv.conv_transpose2d(np.ones((1, 2, 0, 4)), k),
        lambda: gpuconv.grad.conv2d_input(image.shape, k, g, groups=0),
        lambda: gpuconv.grad.conv2d_input(image.shape, empty, g),
        lambda: gpuconv.grad.conv2d_input(image.shape, np.ones((0, 2, 3, 3)), g[:, :0]),
        lambda: gpuconv.grad.conv2d_weight(image, k.shape, g, groups=0),
        lambda: gpuconv.grad.conv2d_weight(image, (2, 2, 3, 0), g),
        lambda: gpuconv.grad.conv2d_weight(image, (0, 2, 3, 3), g[:, :0]),
        lambda: gpuconv.grad.conv2d_bias(g[:, :0]),
        lambda: gpuconv.unfold(image, 0),
        lambda: gpuconv.fold(np.ones((1, 18, 4)), 4, (3, 0)),
        lambda: gpuconv.fold(np.ones((1, 18, 4)), 0, 3),
        lambda: gpuconv.conv1d(np.ones(4), np.ones(0)),
        lambda: gpuconv.conv1d(np.ones((1, 4)), np.ones((1, 1, 2)), groups=0),
        lambda: gpuconv.Conv2d(empty),
        lambda: gpuconv.Conv2d(k, groups=0),
    ):
        with pytest.raises(ValueError, match=r"^\w+: "):
            call()


@every_implementation
def test_the_weight_gradient_of_an_empty_batch_is_zero(name):
    """It was uninitialised memory; here out is NaN before."""
    on = On(name)
    for dtype in ("float32", "float16", "bfloat16", "int8", "complex64"):
        numpy_type = cases.numpy_dtype(dtype)
        x, g = np.zeros((0, 2, 4, 4), numpy_type), np.zeros((0, 3, 3, 3), numpy_type)
        out = np.full((3, 2, 2, 2), 77, oracle.result_dtype(numpy_type, numpy_type))
        assert on.conv2d_weight(x, (3, 2, 2, 2), g, out=out) is out
        assert not np.any(out)
        assert not np.any(units.to_host(on.conv2d_weight(x, (3, 2, 2, 2), g)))
        bias = np.full(3, 77, out.dtype)
        on.conv2d_bias(g, out=bias)
        assert not np.any(bias)
        k = np.ones((3, 2, 2, 2), numpy_type)
        assert on.conv2d_input((0, 2, 4, 4), k, g).shape == (0, 2, 4, 4)
        assert on.conv_transpose2d(g, k, [1, 2]).shape == (0, 2, 4, 4)


@every_implementation
def test_no_channels_leave_zeros_or_the_bias(name):
    on = On(name)
    g = np.zeros((2, 0, 2, 3), np.float32)
    y = units.to_host(on.conv_transpose2d(g, np.zeros((0, 3, 2, 2), np.float32), np.array([1, -2, 3])))
    assert y.shape == (2, 3, 3, 4)
    assert np.all(y == np.array([1, -2, 3])[:, None, None])
    x, k, g = np.zeros((1, 0, 3, 3), np.float32), np.zeros((2, 0, 2, 2), np.float32), np.ones((1, 2, 2, 2), np.float32)
    assert on.conv2d_weight(x, k.shape, g).shape == k.shape
    assert on.conv2d_input(x.shape, k, g).shape == x.shape


@every_implementation
def test_an_input_without_pixels_has_an_empty_gradient(name):
    """Padding alone gives a convolution of nothing pixels; its weight gradient is zero."""
    on = On(name)
    k, g = np.ones((2, 3, 2, 1), np.float32), np.ones((1, 2, 1, 2), np.float32)
    assert on.conv2d_input((1, 3, 0, 0), k, g, padding=1).shape == (1, 3, 0, 0)
    assert on.conv2d_input((1, 3, 0, 2), k, g, padding=(1, 0)).shape == (1, 3, 0, 2)
    out = np.full(k.shape, np.nan, np.float32)
    on.conv2d_weight(np.ones((1, 3, 0, 2), np.float32), k.shape, g, padding=(1, 0), out=out)
    assert not np.any(out)


@every_implementation
def test_pixels_that_no_window_reads_are_zero(name):
    """Not whatever was in memory: most of this gradient is never written by any window."""
    on = On(name)
    out = np.full((1, 2, 40, 41), np.nan, np.float32)
    on.conv2d_input(out.shape, np.ones((3, 2, 2, 2), np.float32), np.ones((1, 3, 3, 3), np.float32), stride=15, out=out)
    wanted = np.zeros((40, 41))
    for i, j in itertools.product((0, 15, 30), repeat=2):
        wanted[i : i + 2, j : j + 2] = 3
    assert np.array_equal(out[0, 0], wanted) and np.array_equal(out[0, 1], wanted)
    # output_padding adds what no pixel of x reaches
    y = units.to_host(
        on.conv_transpose2d(np.ones((1, 1, 1, 1), np.float32), [[[[2]]]], [5], stride=4, output_padding=3)
    )
    assert units.to_host(y)[0, 0].tolist() == [[7, 5, 5, 5], [5] * 4, [5] * 4, [5] * 4]


# ---- numbers


@pytest.mark.parametrize("channels", [3, 128, 300])
@every_implementation
def test_inf_stays_inf(name, channels):
    if channels > 3:
        skip_in_simulator(name)
    on = On(name)
    k = np.ones((channels, 2, 3, 3), np.float32)
    for channel, value in share(name, itertools.product((0, channels // 2, channels - 1), (np.inf, -np.inf)), 4):
        g = np.ones((1, channels, 2, 2), np.float32)
        g[0, channel, 0, 1] = value
        finite = backwards(plain((1, 2, 4, 4), k.shape), wide(k), np.ones(g.shape))
        wanted = finite.copy()
        wanted[..., :3, 1:] = value
        assert np.array_equal(units.to_host(on.conv2d_input((1, 2, 4, 4), k, g)), wanted)
        assert np.array_equal(units.to_host(on.conv_transpose2d(g, k)), wanted)
        x = np.ones((channels, 1, 4, 4), np.float32)  # as many images
        x[channel, 0, 0, 1] = value
        found = units.to_host(on.conv2d_weight(x, (2, 1, 3, 3), np.ones((channels, 2, 2, 2), np.float32)))
        wanted = np.full((2, 1, 3, 3), 4.0 * channels)
        wanted[:, :, 0, :2] = value
        assert np.array_equal(found, wanted)


@every_implementation
def test_one_nan_reaches_what_reads_it_and_nothing_else(name):
    on = On(name)
    for problem in share(name, (
        plain((1, 2, 5, 4), (4, 1, 3, 2), stride=(2, 1), padding=(1, 0), groups=2),
        plain((2, 3, 6, 6), (2, 3, 2, 3), dilation=2, padding=1),
    ), 2):  # fmt: skip
        rng = np.random.default_rng(2)
        x, k, g = (rng.random(shape).astype("f") + 1 for shape in (problem.sizes, problem.kernel, problem.outputs))
        for spot in share(name, rng.integers(0, 10**6, 4), 3):
            spoilt, at = g.copy(), np.unravel_index(spot % g.size, g.shape)
            spoilt[at] = np.nan
            reached = backwards(problem, wide(k), (spoilt != spoilt).astype(float)) != 0
            found = units.to_host(on.conv2d_input(problem.sizes, k, spoilt, **problem.kwargs))
            assert np.array_equal(np.isnan(found), reached)
            spoilt, at = x.copy(), np.unravel_index(spot % x.size, x.shape)
            spoilt[at] = np.nan
            reached = across(problem, (spoilt != spoilt).astype(float), wide(g)) != 0
            found = units.to_host(on.conv2d_weight(spoilt, problem.kernel, g, **problem.kwargs))
            assert np.array_equal(np.isnan(found), reached)


def alternating(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """299 times 16, or 300, and as often -16: with 16s, products that cancel but for one of 256."""
    count = int(np.prod(shape))
    return np.where(np.arange(count) < (count + 1) // 2, 16, -16).reshape(shape).astype(cases.numpy_dtype(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_implementation
def test_16_bit_sums_are_kept_in_float32(name, dtype):
    """PyTorch's transposed convolution on the CPU is 255 bounds off here."""
    on, numpy_type = On(name), cases.numpy_dtype(dtype)
    sixteen = np.full((1, 599, 1, 1), 16, numpy_type)
    k = alternating((599, 1, 1, 1), dtype)
    assert float(units.to_host(on.conv_transpose2d(sixteen, k)).item()) == 256
    assert float(units.to_host(on.conv2d_input((1, 1, 1, 1), k, sixteen)).item()) == 256
    if simulated(name):
        return
    for shape in ((599, 1, 1, 1), (1, 1, 1, 599), (1, 1, 599, 1), (7, 1, 5, 17)):
        x, g = alternating(shape, dtype), np.full(shape, 16, numpy_type)
        wanted = 256 if x.size % 2 else 0
        assert float(units.to_host(on.conv2d_weight(x, (1, 1, 1, 1), g)).item()) == wanted, shape
        assert float(units.to_host(on.conv2d_bias(x)).item()) == (16 if x.size % 2 else 0)
    taps, row = alternating((1, 1, 1, 599), dtype), np.full((1, 1, 1, 599), 16, numpy_type)
    for padded in ({"padding": (0, 598)}, {"padding": ((0, 0), (598, 598))}):  # all taps meet in the one pixel left
        assert float(units.to_host(on.conv_transpose2d(row, taps, **padded)).item()) == 256
        assert float(units.to_host(on.conv2d_input((1, 1, 1, 1), taps, row, **padded)).item()) == 256


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_patches
def test_fold_keeps_16_bit_sums_in_float32(name, dtype):
    on = On(name)
    columns = np.zeros((67, 67), cases.numpy_dtype(dtype))
    columns[np.arange(67), 66 - np.arange(67)] = np.where(np.arange(67) < 34, 2000, -2000)
    y = units.to_host(on.fold(columns, (1, 133), (1, 67)))  # tap q of window j lands on q + j = 66
    assert float(y[0, 0, 66]) == 2000, "34 times 2,000 is beyond float16"
    assert not np.any(np.delete(y[0, 0], 66))


# ---- what is kept between calls


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@every_implementation
def test_no_plan_is_used_for_another_operator(name, dtype):
    """All on the same arrays, whose shapes suit every operator: forwards, backwards, conjugated and not."""
    skip_in_simulator(name)
    on, rng = On(name), np.random.default_rng(4)
    x, k = (values(rng, shape, dtype, True) for shape in ((4, 4, 4, 4), (4, 4, 3, 3)))
    problem = plain(x.shape, k.shape, padding=1)
    same = {"padding": 1}
    wanted = {
        "forward": conv2d(wide(x), wide(k), backend="numpy.reference", **same),
        "input": backwards(problem, wide(k).conj(), wide(x)),
        "weight": across(problem, wide(x).conj(), wide(x)),
        "transpose": backwards(problem, wide(k), wide(x)),
    }
    calls = {
        "forward": lambda: conv2d(x, k, backend=name, **same),
        "input": lambda: on.conv2d_input(x.shape, k, x, **same),
        "weight": lambda: on.conv2d_weight(x, k.shape, x, **same),
        "transpose": lambda: on.conv_transpose2d(x, k, **same),
    }
    gpuconv.clear()
    for order in itertools.permutations(calls):
        for operator in order:
            assert np.array_equal(units.to_host(calls[operator]()), wanted[operator]), order


@every_implementation
def test_the_call_after_a_memory_error_is_right(name):
    on, problem = On(name), plain((1, 4, 5, 4), (2, 2, 3, 2), stride=(2, 1), padding=(1, 0), groups=2)
    rng = np.random.default_rng(6)
    x, k, g = (values(rng, shape, "float32", True) for shape in (problem.sizes, problem.kernel, problem.outputs))
    for _ in range(1 if simulated(name) else 2):
        with pytest.raises(MemoryError, match=r"conv2d_input: .*\d+ bytes"):
            on.conv2d_input(problem.sizes, k, g, workspace_limit=1, **problem.kwargs)
        with pytest.raises(MemoryError, match=r"conv2d_weight: .*\d+ bytes"):
            on.conv2d_weight(x, problem.kernel, g, workspace_limit=1, **problem.kwargs)
        on.check(problem)


# ---- operands of more than 2^31 elements


@every_implementation
def test_the_weight_gradient_of_giants(name):
    """Corners of 2^31 elements of untouched memory, and a view of one number."""
    skip_in_simulator(name)
    on, xp = On(name), home(name)
    x = np.zeros((1, 1, 2**16, 2**15 + 8), np.int8)
    corners = np.array([[3, -5], [7, 11]])
    x[0, 0, :: x.shape[2] - 1, :: x.shape[3] - 1] = corners
    reach = (x.shape[2] - 1, x.shape[3] - 1)
    g = np.array([[1, 10], [100, -1]], np.int8)[None, None]
    for view, seen in ((x, corners), (x[..., ::-1, ::-1], corners[::-1, ::-1])):
        y = units.to_host(on.conv2d_weight(view, (1, 1, 1, 1), g, stride=reach))
        assert y.item() == (seen * g).sum()
        y = units.to_host(on.conv2d_weight(view, (1, 1, 2, 2), g[..., :1, :1], dilation=reach))
        assert y.tolist() == [[seen.tolist()]]
    if xp is np and gpu_arrays() is None and dispatch.DEVICES[dispatch.library_of(name)] == "cuda":
        return  # a host array is uploaded whole
    square = xp.broadcast_to(xp.asarray(np.float32(2)), (1, 1, 70_000, 70_000))
    ones = np.ones((1, 1, 2, 2), np.float32)
    assert np.all(units.to_host(on.conv2d_weight(square, (1, 1, 3, 3), ones, stride=2**15, dilation=2**14)) == 8)


@every_patches
def test_unfold_of_giants(name):
    skip_in_simulator(name)
    on = On(name)
    x = np.zeros((1, 2**16, 2**15 + 8), np.int8)
    x[0, :: x.shape[1] - 1, :: x.shape[2] - 1] = [[3, -5], [7, 11]]
    reach = (x.shape[1] - 1, x.shape[2] - 1)
    assert units.to_host(on.unfold(x, 2, dilation=reach)).ravel().tolist() == [3, -5, 7, 11]
    assert units.to_host(on.unfold(x[:, ::-1], 1, stride=reach)).ravel().tolist() == [7, 11, 3, -5]
