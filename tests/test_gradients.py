"""What makes a gradient one, whatever computes it: the adjoint, the derivative, and SciPy's answer."""

from __future__ import annotations

import functools
from typing import Any

import cases
import family
import numpy as np
import oracle
import oracle_family
import pytest
import scipy.signal
import units
from calls import affordable, is_costly
from cases import BYTES, Case
from family import FORWARD, FamilyCase, Shapes
from hypothesis import given
from hypothesis import strategies as st
from running import SERVE_EVERYTHING, SIMULATOR_MARKS, home, skip_in_simulator, skip_unless_usable
from test_family import chosen, every_implementation_of, runner

import gpuconv
from gpuconv import dispatch

pytestmark = SIMULATOR_MARKS

GRADIENTS = ("conv2d_input", "conv2d_weight")


def both(case: Case) -> tuple[FamilyCase, FamilyCase]:
    """The gradient with respect to the input, and that with respect to the weight."""
    first, second = family.gradients(case)
    return first, second


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Small whole numbers, whose products and sums every type holds exactly."""
    values = rng.integers(-9, 10, shape).astype(np.float64)
    if dtype in cases.COMPLEX:
        values = values + 1j * rng.integers(-9, 10, shape)
    return values.astype(dtype)


# ---- the adjoint


# Types whose kernels the quick profile meets in one adjoint test or another, and not for every case.
RARER = ("complex128", "int32")


@pytest.mark.parametrize("dtype", ["float64", "int64", *(pytest.param(d, marks=pytest.mark.full) for d in RARER)])
@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.name)
def test_adjoint(case, dtype):
    """<conv(x, k), y> = <x, input_grad(k, y)> = <k, weight_grad(x, y)>, exactly, with the second side conjugated."""
    rng, shapes = np.random.default_rng(4), Shapes.of(case)
    x, k, y = (integers(rng, shape, dtype) for shape in (case.x_shape, case.k_shape, shapes.y))
    options = {name: value for name, value in case.kwargs.items() if name in family.GEOMETRY}
    options |= affordable(dtype)
    wanted = np.vdot(y, gpuconv.conv2d(x, k, **options))
    assert np.vdot(gpuconv.grad.conv2d_input(x.shape, k, y, **options), x) == wanted
    assert np.vdot(gpuconv.grad.conv2d_weight(x, k.shape, y, **options), k) == wanted


@pytest.mark.parametrize("dtype", ["float64", "complex128", "int64"])
@pytest.mark.parametrize("case", [case for case in FORWARD if case.smoke], ids=lambda case: case.name)
def test_transpose_is_the_adjoint_without_the_conjugate(case, dtype):
    shapes = Shapes.of(case)
    for found in family.transposed(case):
        rng, kwargs = np.random.default_rng(5), found.kwargs | affordable(dtype)
        x, k, y = (integers(rng, shape, dtype) for shape in (case.x_shape, case.k_shape, shapes.y))
        forward = gpuconv.conv2d(x, k, **{name: value for name, value in kwargs.items() if name != "output_padding"})
        back = gpuconv.conv_transpose2d(y, k, **kwargs)
        assert back.shape == x.shape
        assert (forward * y).sum() == (x * back).sum()


# ---- the derivative


DIFFERENTIATED = (
    "stride_2_dilation_3", "grouped_everything", "depthwise_stride", "same_lower_stride_2", "crop_with_stride",
    "nhwc_ohwi_stride", "flip_stride", "rank_2_bias_stride", "rank_2_filters", "rank_3",
)  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_finite_differences(name):
    """The map is linear in x and in k, so a central difference of any step is the derivative."""
    case = family.BY_FORWARD[name]
    rng, options = np.random.default_rng(6), both(case)[0].kwargs
    x, k, y = (rng.standard_normal(shape) for shape in (case.x_shape, case.k_shape, Shapes.of(case).y))

    def derivative(of: np.ndarray) -> np.ndarray:
        found = np.empty(of.size)
        for i, value in enumerate(of.ravel().tolist()):
            sides = []
            for step in (1, -1):
                of.flat[i] = value + step
                sides.append(np.vdot(y, gpuconv.conv2d(x, k, **options)))
            of.flat[i] = value
            found[i] = (sides[0] - sides[1]) / 2
        return found.reshape(of.shape)

    for gradient, operand in (
        (gpuconv.grad.conv2d_input(x.shape, k, y, **options), x),
        (gpuconv.grad.conv2d_weight(x, k.shape, y, **options), k),
    ):
        wanted = derivative(operand)
        assert np.max(np.abs(gradient - wanted)) <= 1e-11 * np.max(np.abs(wanted))


# ---- SciPy


def spread(array: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    """The last two axes with ``step - 1`` zeros between their elements."""
    *batch, H, W = array.shape
    found = np.zeros((*batch, (H - 1) * step[0] + 1, (W - 1) * step[1] + 1), array.dtype)
    found[..., :: step[0], :: step[1]] = array
    return found


def by_scipy(x: np.ndarray, k: np.ndarray, y: np.ndarray, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Both gradients, a plane at a time, from convolve2d and correlate2d on rows and taps written out with zeros."""
    (O, I, KH, KW), groups = k.shape, options.get("groups", 1)
    strides, dilations = (oracle.pair(options.get(name, 1)) for name in ("stride", "dilation"))
    pads = oracle.resolve_padding(options.get("padding", 0), x.shape[2:], (KH, KW), strides, dilations)
    padded = np.pad(x, ((0, 0), (0, 0), *pads))
    dx, dk = np.zeros_like(padded), np.zeros_like(k)
    taps, rows = spread(k, dilations), spread(y, strides)
    for n in range(len(x)):
        for o in range(O):
            for i in range(I):
                c = o // (O // groups) * I + i
                # convolve2d conjugates nothing; correlate2d conjugates its second argument, which is what autograd does
                back = scipy.signal.convolve2d(rows[n, o], taps[o, i].conj())
                dx[n, c, : back.shape[0], : back.shape[1]] += back
                read = padded[n, c, : back.shape[0], : back.shape[1]]
                across = scipy.signal.correlate2d(read.conj(), rows[n, o].conj(), "valid")
                dk[o, i] += across[:: dilations[0], :: dilations[1]]
    (top, _), (left, _) = pads
    return dx[:, :, top : top + x.shape[2], left : left + x.shape[3]], dk


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize(
    "name",
    [
        "tail", "dilated", "stride_2_dilation_3", "stride_3_dilation_2", "grouped_everything", "same_stride_2", "full",
        "depthwise_stride", "asymmetric_stride_dilation", "crop_with_stride", "rows_between_windows", "patches",
    ],
)  # fmt: skip
def test_scipy(name, dtype):
    case = family.BY_FORWARD[name]
    of_input, of_weight = both(case)
    (k, y, *_), (x, *_) = (family.fill(found, dtype, "normal") for found in (of_input, of_weight))
    dx, dk = by_scipy(x, k, y, dict(of_input.kwargs))
    options = of_input.kwargs | affordable(dtype)
    found = gpuconv.grad.conv2d_input(x.shape, k, y, **options)
    assert np.max(np.abs(found - dx)) <= 1e-11 * np.max(np.abs(dx))
    found = gpuconv.grad.conv2d_weight(x, k.shape, y, **options)
    assert np.max(np.abs(found - dk)) <= 1e-11 * np.max(np.abs(dk))


# ---- the calls


def test_the_order_of_torch_nn_grad():
    case = family.BY_FORWARD["grouped_everything"]
    of_input, of_weight = both(case)
    order = [of_input.kwargs[name] for name in ("stride", "padding", "dilation", "groups")]
    for found in (of_input, of_weight):
        operands, answer = family.posed(found, "float32", "narrow")
        units.assert_exact(family.public(found.call)(*found.arguments(operands), *order), answer)
    x, k = operands[0], family.posed(of_input, "float32", "narrow")[0][0]
    y = operands[1]
    given = {"stride": order[0], "padding": order[1], "dilation": order[2], "groups": order[3]}
    named = gpuconv.grad.conv2d_input(input_size=x.shape, weight=k, grad_output=y, **given)
    assert np.array_equal(named, gpuconv.grad.conv2d_input(x.shape, k, y, *order))
    named = gpuconv.grad.conv2d_weight(input=x, weight_size=k.shape, grad_output=y, **given)
    assert np.array_equal(named, gpuconv.grad.conv2d_weight(x, k.shape, y, *order))


def test_the_order_of_pytorchs_conv_transpose2d():
    case = family.BY_NAME["conv_transpose2d", "output_padding_beyond_one_stride"]
    (x, k, _), _ = family.posed(case, "float32", "narrow")
    k = np.concatenate([k, k])
    x, bias = np.concatenate([x, x], axis=1), np.array([1, 2, 3, 4], np.float32)
    answer = oracle_family.conv_transpose2d(x, k, bias, 2, 1, (2, 1), 2, (3, 1))
    units.assert_exact(gpuconv.conv_transpose2d(x, k, bias, 2, 1, (2, 1), 2, (3, 1)), answer)
    options = {"stride": 2, "padding": 1, "output_padding": (2, 1), "groups": 2, "dilation": (3, 1)}
    units.assert_exact(gpuconv.conv_transpose2d(x=x, k=k, bias=bias, **options), answer)


def test_sizes_in_every_form():
    of_input, of_weight = both(family.BY_FORWARD["tail"])
    for found in (of_input, of_weight):
        operands, answer = family.posed(found, "float32", "narrow")
        size = found.sizes[0]
        for form in (list(size), np.array(size), tuple(np.int64(n) for n in size)):
            arguments = [form if argument is size else argument for argument in found.arguments(operands)]
            units.assert_exact(family.public(found.call)(*arguments), answer)


def test_lists_of_numbers():
    found = gpuconv.grad.conv2d_input((3, 3), [[1.0, 2.0]], [[1.0], [5.0], [3.0]], stride=2, padding=(1, 0))
    assert found.tolist() == [[0, 0, 0], [5, 10, 0], [0, 0, 0]]
    assert gpuconv.grad.conv2d_weight([[1.0, 2.0, 3.0]], (1, 2), [[1.0, 10.0]]).tolist() == [[21, 32]]
    assert gpuconv.grad.conv2d_bias([[[1.0, 10.0]], [[2.0, 3.0]]]).tolist() == [11, 5]
    assert gpuconv.conv_transpose2d([[1.0, 2.0]], [[1.0, 10.0, 100.0]], stride=2).tolist() == [[1, 10, 102, 20, 200]]


def test_padding_names_are_those_of_the_forward_problem():
    rng = np.random.default_rng(8)
    x, k = rng.integers(-9, 9, (1, 2, 7, 6)).astype(np.float32), rng.integers(-9, 9, (3, 2, 4, 3)).astype(np.float32)
    for padding, stride in (("valid", 2), ("same", 1), ("same", 3), ("same_upper", 2), ("same_lower", 2), ("full", 2)):
        options = {"padding": padding, "stride": stride}
        y = gpuconv.conv2d(x, k, **options)
        units.assert_exact(
            gpuconv.grad.conv2d_input(x.shape, k, y, **options), oracle_family.conv2d_input(x.shape, k, y, **options)
        )
        units.assert_exact(
            gpuconv.grad.conv2d_weight(x, k.shape, y, **options), oracle_family.conv2d_weight(x, k.shape, y, **options)
        )


def test_complex_weights_are_conjugated_and_those_of_a_transpose_are_not():
    x, k = np.array([[2 + 1j]]), np.array([[3 + 4j]])
    y = np.array([[1 - 2j]])
    assert gpuconv.grad.conv2d_input((1, 1), k, y).item() == y.item() * (3 - 4j)
    assert gpuconv.grad.conv2d_weight(x, (1, 1), y).item() == y.item() * (2 - 1j)
    assert gpuconv.grad.conv2d_bias(y[None]).tolist() == [1 - 2j]
    assert gpuconv.conv_transpose2d(y, k).item() == y.item() * (3 + 4j)


PAIRS = [("float32", "int8"), ("float16", "float32"), ("bfloat16", "float16"), ("complex64", "float32"),
         ("uint8", "int8"), ("int8", "int16"), ("int64", "int32"), ("float64", "bool")]  # fmt: skip
ASKED = [("float32", "float64"), ("float16", "float32"), ("float32", "bfloat16"), ("int8", "int64"),
         ("int8", "float32"), ("float32", "complex64")]  # fmt: skip


def narrow_or_normal(case: FamilyCase, dtype: str) -> list[Any]:
    return family.fill(case, dtype, "narrow" if dtype in cases.INTEGERS else "normal")


@pytest.mark.parametrize(("first", "second"), PAIRS)
@every_implementation_of("conv2d_input", "conv2d_weight", "conv_transpose2d")
def test_two_dtypes(name, call, first, second):
    if call == "conv_transpose2d":  # one kernel with the input gradient
        skip_in_simulator(name)
    run, case = runner(name, call), family.BY_NAME[call, "nhwc" if call == "conv_transpose2d" else "nhwc_hwio_strided"]
    operands = [narrow_or_normal(case, first)[0], narrow_or_normal(case, second)[1]]
    units.assert_close(run(*case.arguments(operands), **case.kwargs), case.answer(operands), case.name)


@pytest.mark.parametrize(("given_dtype", "asked"), ASKED)
@every_implementation_of("conv2d_input", "conv2d_weight", "conv_transpose2d", "fold", "conv1d")
def test_asked_for_dtype(name, call, given_dtype, asked):
    run, case = runner(name, call), family.BY_NAME[call, "tail" if call == "fold" else "grouped"]
    operands, dtype = narrow_or_normal(case, given_dtype), cases.numpy_dtype(asked)
    if case.bias:
        operands[-1] = np.arange(case.bias).astype(operands[-1].dtype)  # which every type holds
    found = run(*case.arguments(operands), dtype=dtype, **case.kwargs)
    units.assert_close(found, case.answer(operands, dtype=dtype), case.name)


@pytest.mark.parametrize("dtype", BYTES)
def test_32_bit_sums_never_overflow(dtype):
    """As of conv2d: the number of products of each sum is counted, and int64 offered where it could be too much."""
    extreme, most = (-128, 131_071) if dtype == "int8" else (255, 33_025)

    def calls(n: int) -> list[Any]:
        line = np.full(n, extreme, dtype)
        taps, image, row = line.reshape(n, 1, 1, 1), line.reshape(1, n, 1, 1), line.reshape(1, 1, 1, n)
        return [
            functools.partial(gpuconv.grad.conv2d_input, (1, 1, 1, 1), taps, image, **affordable(dtype)),
            functools.partial(gpuconv.grad.conv2d_weight, row, (1, 1, 1, 1), row, **affordable(dtype)),
            functools.partial(gpuconv.conv_transpose2d, image, taps, **affordable(dtype)),
        ]

    for call in calls(most):
        found = call()
        assert found.dtype == np.int32
        assert found.item() == most * extreme**2
    for call in calls(most + 1):
        with pytest.raises(ValueError, match="int64"):
            call()
        assert call(dtype=np.int64).item() == (most + 1) * extreme**2


# ---- the gradient of the bias


@pytest.mark.parametrize("dtype", [*cases.FLOATS, *cases.COMPLEX])
@pytest.mark.parametrize("case", [case for case in family.FAMILY if case.call == "conv2d_bias"], ids=str)
def test_bias_gradient(case, dtype):
    run = functools.partial(family.public(case.call), **affordable(dtype))
    for kind in ("normal", "positive", "wide", "narrow"):
        family.check(run, case, dtype, kind, into=kind in ("normal", "wide"))


def test_bias_gradient_of_integers_and_of_an_asked_for_dtype():
    y = np.full((2, 3, 5, 5), 255, np.uint8)
    found = gpuconv.grad.conv2d_bias(y, dtype=np.int64)
    assert found.dtype == np.int64
    assert found.tolist() == [255 * 50] * 3
    assert gpuconv.grad.conv2d_bias(y).tolist() == [255 * 50] * 3
    narrow, options = y.astype(np.float16), affordable("float16", "float32")
    assert gpuconv.grad.conv2d_bias(narrow, dtype=np.float32, **options).tolist() == [255 * 50] * 3
    assert gpuconv.grad.conv2d_bias(y.transpose(0, 2, 3, 1), layout="NHWC").tolist() == [255 * 50] * 3


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.full), "float32", "float64"])
def test_bias_gradient_of_floats_is_compiled(dtype, layout):
    """Through NumPy it would wake the BLAS threads between two calls on Numba's."""
    y = np.random.default_rng(8).integers(-9, 9, (2, 3, 4, 3)).astype(cases.numpy_dtype(dtype))
    wanted = y.astype(np.float64).sum(axis=(0, 2, 3) if layout == "NCHW" else (0, 1, 2))
    for _ in range(2):  # the second time by the short path
        found = gpuconv.grad.conv2d_bias(y, layout=layout, backend="numba_cpu")
        assert found.dtype == y.dtype
        assert np.array_equal(found.astype(np.float64), wanted)
    assert np.array_equal(gpuconv.grad.conv2d_bias(y, layout=layout), found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bias_gradient_of_16_bits_is_summed_in_float32(dtype):
    taps = np.array([29952] * 300 + [256] + [-29952] * 300).astype(cases.numpy_dtype(dtype))
    options = {} if dtype == "float16" else affordable(dtype)
    assert gpuconv.grad.conv2d_bias(taps.reshape(1, 1, 1, -1), **options).astype(np.float64).tolist() == [256]


def test_bias_gradient_of_long_sums():
    """Within 20 roundings of the result; a running sum of 360,000 float32 numbers loses hundreds."""
    y = np.random.default_rng(9).random((4, 2, 300, 300), np.float32)
    wanted = y.astype(np.longdouble).sum(axis=(0, 2, 3))
    allowed = 20 * units.roundoff(y.dtype) * wanted
    assert np.all(np.abs(gpuconv.grad.conv2d_bias(y) - wanted) <= allowed)
    running = y.swapaxes(0, 1).reshape(2, -1).cumsum(axis=1)[:, -1]
    assert np.all(np.abs(running - wanted) > 5 * allowed)


def test_bias_gradient_of_every_memory_form_and_of_nan():
    y = np.random.default_rng(10).integers(-9, 9, (2, 3, 4, 5)).astype(np.float32)
    wanted = y.sum(axis=(0, 2, 3))
    for text, *form in units.forms():
        view, _ = units.arranged(y, *form)
        assert np.array_equal(gpuconv.grad.conv2d_bias(view), wanted), text
    assert gpuconv.grad.conv2d_bias(np.broadcast_to(np.float32(2), y.shape)).tolist() == [80] * 3
    y[1, 1, 3, 4] = np.nan
    assert np.isnan(gpuconv.grad.conv2d_bias(y)).tolist() == [False, True, False]
    assert gpuconv.grad.conv2d_bias(y[:0]).tolist() == [0, 0, 0]


def test_bias_gradient_of_a_complex_infinity():
    """A sum, not one of products with 1 + 0j, where the infinity would meet a zero."""
    y = np.array([complex(np.inf, 1), complex(2, 3)]).reshape(1, 1, 2, 1)
    assert gpuconv.grad.conv2d_bias(y).tolist() == [complex(np.inf, 4)]


# ---- the transpose, from the gradient


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "complex64"])
@every_implementation_of("conv_transpose2d")
def test_transpose_is_the_input_gradient_and_a_bias(name, call, dtype):
    if dtype != "float32":
        skip_in_simulator(name)
    run, gradient, xp = runner(name, call), runner(name, "conv2d_input"), home(name, dtype)
    found = ("rows_between_windows", "grouped_everything", "patches", "asymmetric_stride_dilation", "tail")
    for forward in chosen(name, found, 5):
        (case,) = family.transposed(family.BY_FORWARD[forward])
        x, k, bias = (None if array is None else xp.asarray(array) for array in family.fill(case, dtype, "narrow"))
        options = {key: value for key, value in case.kwargs.items() if key != "output_padding"}
        size = family.BY_FORWARD[forward].x_shape
        wanted = units.to_host(gradient(size, k.conj(), x, **options))
        assert np.array_equal(units.to_host(run(x, k, **case.kwargs)), wanted)
        if bias is not None and dtype != "float16":
            wanted = wanted + units.to_host(bias).reshape(-1, 1, 1)
            assert np.array_equal(units.to_host(run(x, k, bias, **case.kwargs)), wanted)


# ---- any problem


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, str]:
    """Any forward problem of a few hundred products per output, valid by construction."""
    groups, I, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    kernel, strides, dilations = (draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in range(3))
    dilations = tuple(1 + d // 2 for d in dilations)
    padding = draw(
        st.sampled_from(["valid", "same", "same_lower", "full"])
        | st.integers(0, 4)
        | st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 2)
    )
    explicit = padding if not isinstance(padding, str) else 0
    pads = oracle.resolve_padding(explicit, (1, 1), kernel, strides, dilations)
    least = [max(1, d * (k - 1) + 1 - sum(pad)) for k, d, pad in zip(kernel, dilations, pads, strict=True)]
    H, W = (draw(st.integers(low, low + 6)) for low in least)
    N, C, O = draw(st.integers(0, 2)), groups * I, groups * per_group
    dtype = draw(st.sampled_from(cases.DTYPES))
    kwargs = {
        "stride": strides,
        "padding": padding,
        "dilation": dilations,
        "groups": groups,
        "flip": draw(st.booleans()),
        "layout": draw(st.sampled_from(["NCHW", "NHWC"])),
        "kernel_layout": draw(st.sampled_from(["OIHW", "HWIO", "OHWI"])),
    }
    KH, KW = kernel
    x_shape = (N, C, H, W) if kwargs["layout"] == "NCHW" else (N, H, W, C)
    k_shape = {"OIHW": (O, I, KH, KW), "HWIO": (KH, KW, I, O), "OHWI": (O, KH, KW, I)}[kwargs["kernel_layout"]]
    return Case(f"{x_shape} with {k_shape}: {kwargs}", x_shape, k_shape, kwargs, bias=draw(st.booleans())), dtype


@st.composite
def relatives(draw: st.DrawFn, name: str) -> tuple[FamilyCase, str]:
    """A gradient or the transpose of any forward problem; windows of any image for what serves only those."""
    forward, dtype = draw(problems())
    shapes = Shapes.of(forward)
    explicit = {key: forward.kwargs[key] for key in ("stride", "dilation")} | {"padding": shapes.pads}
    if name.endswith(".patches"):
        found = family.windows(forward.name, shapes.nchw, shapes.oihw[2:], **explicit)
        return draw(st.sampled_from(found)), dtype
    kept = {key: value for key, value in forward.kwargs.items() if key in family.GEOMETRY}
    plain = explicit | {"groups": kept["groups"]}
    found = (
        *family.gradients(Case(forward.name, forward.x_shape, forward.k_shape, kept)),
        *family.transposed(Case(forward.name, shapes.nchw, shapes.oihw, plain, bias=forward.bias)),
    )
    return draw(st.sampled_from(found)), dtype


@pytest.mark.parametrize("name", dispatch.TABLE)
@given(data=st.data(), kind=st.sampled_from(["normal", "wide", "positive"]), into=st.booleans())
def test_any_problem(name, data, kind, into):
    skip_unless_usable(name)
    case, dtype = data.draw(relatives(name))
    if is_costly(name, dtype):
        return

    def run(*operands: Any, **kwargs: Any) -> Any:
        return family.public(case.call)(*operands, backend=name, **kwargs)

    try:
        family.check(run, case, dtype, kind, into=into, xp=home(name, dtype))
    except gpuconv.NoBackendError:
        assert name not in SERVE_EVERYTHING and not name.endswith(".patches")
