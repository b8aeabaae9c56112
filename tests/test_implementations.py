"""One body for every implementation, case and dtype, and what each must hold beyond the cases.

What this machine cannot run is skipped with the implementation's own sentence, so that the same tests run on a GPU.
There the operands of every second check stand on the GPU. Everything is compared with the oracle, not with another
implementation: two results within the bound of a third may be twice the bound apart.
"""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cases
import numpy as np
import oracle
import pytest
import units
from cases import BY_NAME, CASES, DTYPES, Case
from hypothesis import given
from hypothesis import strategies as st

import gpuconv
from gpuconv import dispatch

# These serve every valid problem; the others may refuse one, with reasons.
SERVE_EVERYTHING = ("numba_cuda.direct", "numpy.reference")
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
# More than two seconds each in the simulator, which gives every CUDA thread a thread of Python.
SLOW_IN_SIMULATOR = (
    "long_sum", "channels_17_to_33", "channels_33_to_5", "channels_3_to_65", "one_more_than_a_tile", "grouped",
    "grouped_everything", "wrap_grouped_strided", "depthwise_stride_flip",
)  # fmt: skip
if SIMULATED:
    # Kernels run as Python there: NumPy warns where a GPU's numbers wrap or become NaN without a word.
    pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in scalar:RuntimeWarning")

every_implementation = pytest.mark.parametrize("name", dispatch.serving("forward"))


def skip_unless_usable(name: str) -> None:
    reason = dispatch.implementation(name).unavailable()
    if reason is not None:
        pytest.skip(reason)


def simulated(name: str) -> bool:
    return SIMULATED and name.startswith("numba_cuda")


def skip_in_simulator(name: str) -> None:
    if simulated(name):
        pytest.skip("too much work for the CUDA simulator")


def share(name: str, items: Any, step: int) -> list[Any]:
    """All of ``items``; in the simulator every ``step``-th, of cases those that are not slow there."""
    if not simulated(name):
        return list(items)
    return [item for item in items if getattr(item, "name", "") not in SLOW_IN_SIMULATOR][::step]


def runner(name: str) -> units.Run:
    """``conv2d`` on one implementation; a refusal by one that need not serve everything skips the test."""
    skip_unless_usable(name)

    def run(*operands: Any, **kwargs: Any) -> Any:
        try:
            return gpuconv.conv2d(*operands, backend=name, **kwargs)
        except gpuconv.NoBackendError as refusal:
            if name in SERVE_EVERYTHING:
                raise
            # without the line of the problem, so that pytest folds equal reasons
            pytest.skip(str(refusal).partition("\n")[2].strip())

    return run


@functools.cache
def gpu_arrays() -> Any:
    """CuPy where it is usable, else None."""
    if dispatch.implementation("cupy.gemm").unavailable() is not None:
        return None
    import cupy

    return cupy


def home(name: str, dtype: str = "float32") -> Any:
    """The array library of the device that ``name`` runs on; bfloat16 arrays stay on the host."""
    on_gpu = dispatch.DEVICES[dispatch.library_of(name)] == "cuda" and not SIMULATED and dtype != "bfloat16"
    return gpu_arrays() or np if on_gpu else np


def is_quick(name: str, case: Case, dtype: str) -> bool:
    """float32, or another dtype for a case that is not for float32, and the smoke cases in every dtype."""
    main = dtype == ("float32" if "float32" in case.only else case.only[0])
    if simulated(name):
        return case.name not in SLOW_IN_SIMULATOR and (main or case.name in ("stride_tail", "rank_3", "huge_stride"))
    return case.smoke or main


def agreements() -> list[Any]:
    params = []
    for name, case, dtype in itertools.product(dispatch.serving("forward"), CASES, DTYPES):
        if case.accepts(dtype):
            marks = () if is_quick(name, case, dtype) else pytest.mark.full
            params.append(pytest.param(name, case, dtype, id=f"{name}-{case.name}-{dtype}", marks=marks))
    return params


@pytest.mark.parametrize(("name", "case", "dtype"), agreements())
def test_agrees(name, case, dtype):
    run, xp = runner(name), home(name, dtype)
    units.check(run, case, dtype, "normal", into=True)
    if not simulated(name):
        units.check(run, case, dtype, "wide", into=True, xp=xp)
        units.check(run, case, dtype, "narrow", xp=xp)
        units.check(run, case, dtype, "positive")


@pytest.mark.parametrize("dtype", cases.FLOATS)
@every_implementation
def test_nan_and_inf_reach_the_windows_that_read_them(name, dtype):
    run = runner(name)
    for case in share(name, CASES, 15):
        if np.prod(case.x_shape) and case.accepts(dtype) and (case.smoke or dtype == "float32"):
            for value in share(name, (np.nan, np.inf, -np.inf), 2):
                units.check_specials(run, case, dtype, value, home(name, dtype))


@pytest.mark.parametrize("channels", [3, 128, 300])
@every_implementation
def test_inf_stays_inf(name, channels):
    """Not NaN, as where a sum is split and one part's Inf meets another's."""
    if channels > 3:
        skip_in_simulator(name)
    run = runner(name)
    x, k = np.ones((1, channels, 4, 4), np.float32), np.ones((2, channels, 3, 3), np.float32)
    for channel, value in itertools.product((0, channels // 2, channels - 1), (np.inf, -np.inf)):
        x[...] = 1
        x[0, channel, 0, 1] = value
        y = units.to_host(run(x, k))
        assert np.all(y[0, :, 0] == value), f"channel {channel}: {y[0, :, 0]}, not {value}"
        assert np.all(y[0, :, 1] == 9 * channels)


@every_implementation
def test_inf_of_either_sign_in_one_window_is_nan(name):
    run = runner(name)
    x = np.ones((1, 2, 3, 4), np.float32)
    x[0, 0, 0, 0], x[0, 1, 2, 2] = np.inf, -np.inf
    y = units.to_host(run(x, np.ones((1, 2, 3, 3), np.float32)))
    assert np.isnan(y[0, 0, 0, 0])
    assert y[0, 0, 0, 1] == -np.inf
    # a NaN or Inf weight on finite data without padding
    for value in (np.nan, np.inf):
        k = np.ones((2, 2, 3, 3), np.float32)
        k[1, 1, 2, 0] = value
        y = units.to_host(run(np.ones((1, 2, 4, 4), np.float32), k))
        assert np.all(y[0, 0] == 18)
        assert np.array_equal(y[0, 1], np.full((2, 2), value, np.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_implementation
def test_16_bit_sums_are_kept_in_float32(name, dtype):
    units.check_cancelling(runner(name), dtype)


@every_implementation
def test_relu_passes_nan(name):
    run = runner(name)
    bias = np.array([np.nan, -1e9, 1, -0.5], np.float32)
    y = units.to_host(run(*fixed((1, 2, 3, 3), (4, 2, 3, 3)), bias, activation="relu"))
    assert np.isnan(y[0, 0, 0, 0])
    assert y[0, 1, 0, 0] == 0
    x = np.ones((1, 1, 2, 2), np.float16)
    x[0, 0, 0, 0] = np.nan
    y = units.to_host(run(x, -np.ones((1, 1, 1, 1), np.float16), activation="relu"))
    assert np.array_equal(y[0, 0], np.array([[np.nan, 0], [0, 0]], np.float16), equal_nan=True)


def fixed(x_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    return rng.standard_normal(x_shape).astype(np.float32), rng.standard_normal(k_shape).astype(np.float32)


# ---- memory: any strides of x, k and out


FORMS = Case("forms", (2, 4, 4, 5), (4, 2, 2, 3), {"groups": 2, "padding": ((0, 1), (1, 0))}, bias=True)
FORMS_LAST = Case("forms_last", (2, 4, 5, 4), (2, 3, 2, 4), {"groups": 2, "layout": "NHWC", "kernel_layout": "HWIO"})
FORMS_1X1 = Case("forms_1x1", (2, 4, 3, 4), (4, 4, 1, 1))


@pytest.mark.parametrize("operand", ["x", "k"])
@pytest.mark.parametrize("case", [FORMS, FORMS_LAST, FORMS_1X1], ids=lambda case: case.name)
@every_implementation
def test_memory_forms_of_inputs(name, case, operand):
    """Real values, so that a kernel of our own must also give the same bits for every form."""
    run, xp = runner(name), home(name)
    x, k, bias, answer = units.posed(case, "float32", "normal")
    operands = {"x": xp.asarray(x), "k": xp.asarray(k), "bias": None if bias is None else xp.asarray(bias)}
    plain = units.to_host(run(**operands, **case.kwargs))
    for text, *form in share(name, units.forms(), 9):
        view, _ = units.arranged({"x": x, "k": k}[operand], *form, xp)
        y = run(**operands | {operand: view}, **case.kwargs)
        units.assert_close(y, answer, f"{operand} with {text}")
        if name.startswith("numba"):
            assert units.to_host(y).tobytes() == plain.tobytes(), f"{operand} with {text} gave other bits"


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int64", "complex64"])
@every_implementation
def test_memory_forms_of_out(name, dtype):
    run, xp = runner(name), home(name)
    if dtype != "float32":
        skip_in_simulator(name)
    for case in (FORMS, FORMS_LAST, FORMS_1X1):
        x, k, bias, answer = units.posed(case, dtype, "narrow")
        x, k, bias = (None if operand is None else xp.asarray(operand) for operand in (x, k, bias))
        blank = units.unwritten(answer).array
        for text, *form in share(name, units.forms()[:: 1 if dtype == "float32" else 5], 9):
            out, memory = units.arranged(blank, *form, xp)
            before = units.to_host(memory).tobytes()
            assert run(x, k, bias, out=out, **case.kwargs) is out
            units.assert_exact(out, answer, f"{case.name} {dtype} out with {text}")
            out[...] = xp.asarray(blank)
            assert units.to_host(memory).tobytes() == before, f"{case.name} {dtype} out with {text}: the gaps changed"


@every_implementation
def test_stepped_and_broadcast_operands(name):
    run = runner(name)
    x, k = fixed((2, 3, 5, 6), (4, 3, 4, 4))
    overlapping = np.lib.stride_tricks.sliding_window_view(x[0], 2, axis=0).transpose(0, 3, 1, 2)
    views = {
        "k[:, :, ::2, ::2]": (x, k[:, :, ::2, ::2]),
        "k of one filter": (x, np.broadcast_to(k[:1], k.shape)),
        "k[:, :, ::-2, 1::2]": (x, k[:, :, ::-2, 1::2]),
        "k of one row": (x, np.broadcast_to(k[..., :1, :], k.shape)),
        "x of one image": (np.broadcast_to(x[:1], x.shape), k),
        "k of one number": (x, np.broadcast_to(k[0, 0, 0, 0], (4, 3, 2, 2))),
        "overlapping images": (overlapping, k[:, :2, :2, :2]),
        "x of one pixel": (np.broadcast_to(x[:, :, :1, :1], x.shape), k),
        "Fortran order": (np.asfortranarray(x), np.asfortranarray(k)),
        "x of one number": (np.broadcast_to(np.float32(3), x.shape), k),
        "x and k of the same memory": (x[:, :, :4, :4], x[:, :, :4, :4]),
        "read-only": (x.view(), k.view()),
    }
    for array in views["read-only"]:
        array.flags.writeable = False
    for text, (image, kernel) in share(name, views.items(), 2):
        units.assert_close(run(image, kernel), oracle.answer(image.copy(), kernel.copy()), text)


# ---- the same bits


@every_implementation
def test_same_bits_from_run_to_run(name):
    run = runner(name)
    for case in share(name, (BY_NAME["grouped_everything"], BY_NAME["bias_relu"], BY_NAME["long_sum"]), 1):
        x, k, bias, _ = units.posed(case, "float32", "normal")
        first = units.to_host(run(x, k, bias, **case.kwargs)).tobytes()
        for _ in range(3):
            assert units.to_host(run(x, k, bias, **case.kwargs)).tobytes() == first, case.name


@every_implementation
def test_same_bits_in_a_batch(name):
    """conv2d(x)[n] is conv2d(x[n:n+1]), whatever else is in the batch: of our own kernels. GEMM libraries are near."""
    run = runner(name)
    for case in share(name, (BY_NAME["batch"], BY_NAME["grouped_everything"], BY_NAME["one_by_one_stride_batch"]), 2):
        x, k, bias, answer = units.posed(case, "float32", "normal")
        whole = units.to_host(run(x, k, bias, **case.kwargs))
        for n in range(len(x)):
            alone = units.to_host(run(x[n : n + 1], k, bias, **case.kwargs))
            if name.startswith("numba"):
                assert alone[0].tobytes() == whole[n].tobytes(), f"{case.name}, image {n}"
            units.assert_close(np.concatenate([whole[:n], alone, whole[n + 1 :]]), answer, f"{case.name}, image {n}")


@pytest.mark.parametrize("runs", [24, pytest.param(1000, marks=pytest.mark.full)])
@every_implementation
def test_same_bits_on_eight_threads(name, runs):
    skip_in_simulator(name)
    run = runner(name)
    x, k = fixed((2, 16, 12, 12), (24, 16, 3, 3))
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: units.to_host(run(x, k, padding="same")).tobytes(), range(runs)))
    assert len(found) == 1


@every_implementation
def test_small_workspaces_give_the_same_answer_or_a_memory_error(name):
    run = runner(name)
    for case in share(name, (BY_NAME["nhwc_hwio_strided"], BY_NAME["grouped_everything"], BY_NAME["tail"]), 3):
        x, k, bias, answer = units.posed(case, "float32", "normal")
        plain = units.to_host(run(x, k, bias, **case.kwargs))
        served = []
        for limit in (0, 500, 2000, 5000, 10_000, 50_000, 10**6):
            out = units.unwritten(answer)
            try:
                run(x, k, bias, out=out.array, workspace_limit=limit, **case.kwargs)
            except MemoryError as error:
                assert any(character.isdigit() for character in str(error)), f"{error} names no number of bytes"
                continue
            served.append(limit)
            units.assert_close(out.array, answer, f"{case.name} in {limit} bytes")
            if name.startswith("numba"):
                assert out.array.tobytes() == plain.tobytes(), f"{case.name} in {limit} bytes gave other bits"
        assert 10**6 in served, f"{case.name} does not fit a megabyte"


# ---- accuracy


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (64, 3), (512, 3), (1024, 3), (576, 1), (4608, 1)])
@every_implementation
def test_unit_b(name, channels, kernel, dtype, record_property):
    skip_in_simulator(name)
    run = runner(name)
    normal = units.statistic(run, channels, dtype, "normal", kernel)
    positive = units.statistic(run, channels, dtype, "positive", kernel)
    record_property("unit_b_normal", normal)
    record_property("unit_b_positive", positive)
    assert normal <= 10
    if dispatch.DEVICES[dispatch.library_of(name)] == "cpu":
        # A GPU's matrix products keep one sum per output: reported, not judged.
        assert positive <= 150


# ---- integers


@every_implementation
def test_64_bit_integers_wrap(name):
    run = runner(name)
    x = np.array([[[[2**62, 2**40, 2**32 + 1, -(2**63)]]]])
    k = np.array([4, 2**40, 2**32 + 1, -1]).reshape(4, 1, 1, 1)
    y = units.to_host(run(x, k))[0, :, 0]
    wanted = [[(int(a) * int(b) + 2**63) % 2**64 - 2**63 for a in x.ravel()] for b in k.ravel()]
    assert y.tolist() == wanted
    x = np.full((1, 1, 1, 2), 2**32 - 1, np.uint32)
    assert units.to_host(run(x, x[:, :, :, :1])).tolist() == [[[[(2**32 - 1) ** 2 - 2**64] * 2]]]


@pytest.mark.parametrize(("dtype", "most", "extreme"), [("int8", 131_071, -128), ("uint8", 33_025, 255)])
@every_implementation
def test_32_bit_sums_never_overflow(name, dtype, most, extreme):
    skip_in_simulator(name)
    run = runner(name)
    x = np.full((1, most, 1, 1), extreme, dtype)
    total = most * extreme**2
    assert units.to_host(run(x, x)).item() == total
    spare = 2**31 - 1 - total
    assert units.to_host(run(x, x, np.array([spare], np.int32))).item() == 2**31 - 1
    with pytest.raises(ValueError, match="int64"):
        run(x, x, np.array([spare + 1], np.int32))
    x = np.full((1, most + 1, 1, 1), extreme, dtype)
    with pytest.raises(ValueError, match="int64"):
        run(x, x)
    assert units.to_host(run(x, x, dtype=np.int64)).item() == (most + 1) * extreme**2


# ---- dtypes beside each other

PAIRS = [
    ("float32", "int8"), ("int16", "float64"), ("float16", "int8"), ("uint8", "bfloat16"), ("float32", "complex64"),
    ("complex64", "float64"), ("float16", "float32"), ("bfloat16", "float16"), ("float32", "bfloat16"),
    ("uint8", "int8"), ("bool", "uint8"), ("int8", "int16"), ("uint32", "int8"), ("int64", "int32"),
    ("float64", "bool"),
]  # fmt: skip
ASKED = [
    ("float32", "float64"), ("float16", "float32"), ("bfloat16", "float32"), ("float32", "float16"),
    ("float32", "complex64"), ("int8", "int64"), ("int8", "float32"), ("uint32", "float64"), ("int16", "complex128"),
]  # fmt: skip


def narrow_or_normal(case: Case, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Small integers where the type is one, so that 16-bit floats hold the sums."""
    return cases.fill(case, dtype, "narrow" if dtype in cases.INTEGERS else "normal")[:2]


@pytest.mark.parametrize(("x_dtype", "k_dtype"), PAIRS)
@every_implementation
def test_two_dtypes(name, x_dtype, k_dtype):
    run = runner(name)
    for case in share(name, (BY_NAME["one_by_one"], BY_NAME["grouped"], BY_NAME["nhwc_hwio_strided"]), 2):
        x, k = narrow_or_normal(case, x_dtype)[0], narrow_or_normal(case, k_dtype)[1]
        units.assert_close(run(x, k, **case.kwargs), oracle.answer(x, k, **case.kwargs), case.name)


@pytest.mark.parametrize(("given_dtype", "asked"), ASKED)
@every_implementation
def test_asked_for_dtype(name, given_dtype, asked):
    run = runner(name)
    for case in share(name, (BY_NAME["one_by_one"], BY_NAME["grouped"]), 1):
        x, k = narrow_or_normal(case, given_dtype)
        bias = np.array([1, 0, -3, 1, 2, 0, 1][: len(k)])
        answer = oracle.answer(x, k, bias, dtype=cases.numpy_dtype(asked), **case.kwargs)
        units.assert_close(run(x, k, bias, dtype=cases.numpy_dtype(asked), **case.kwargs), answer, case.name)


# ---- extents


@every_implementation
def test_more_images_and_channels_than_a_grid_axis_holds(name):
    skip_in_simulator(name)
    run = runner(name)
    x = np.arange(70_000, dtype=np.float32)
    k = np.full((1, 1, 1, 1), 2, np.float32)
    assert np.array_equal(units.to_host(run(x.reshape(-1, 1, 1, 1), k)).ravel(), 2 * x)
    y = run(x.reshape(1, -1, 1, 1), np.broadcast_to(k, (70_000, 1, 1, 1)), groups=70_000)
    assert np.array_equal(units.to_host(y).ravel(), 2 * x)
    y = run(x.reshape(1, 1, -1, 1), np.ones((1, 1, 1, 3), np.float32), padding=((0, 0), (1, 1)))
    assert np.array_equal(units.to_host(y).ravel(), x)


@every_implementation
def test_one_by_one_kernel_keeps_the_stride(name):
    ramp = np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    assert units.to_host(runner(name)(ramp, [[1]], stride=2)).tolist() == [[1, 3], [7, 9]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, str]:
    """Any problem of a few hundred products per output, valid by construction."""
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
    dtype = draw(st.sampled_from(DTYPES))
    kwargs = {
        "stride": strides,
        "padding": padding,
        "dilation": dilations,
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["constant", "reflect", "symmetric", "edge", "wrap"])),
        "flip": draw(st.booleans()),
        "layout": draw(st.sampled_from(["NCHW", "NHWC"])),
        "kernel_layout": draw(st.sampled_from(["OIHW", "HWIO", "OHWI"])),
        "activation": None if dtype in cases.COMPLEX else draw(st.sampled_from([None, "relu"])),
    }
    KH, KW = kernel
    x_shape = (N, C, H, W) if kwargs["layout"] == "NCHW" else (N, H, W, C)
    k_shape = {"OIHW": (O, I, KH, KW), "HWIO": (KH, KW, I, O), "OHWI": (O, KH, KW, I)}[kwargs["kernel_layout"]]
    return Case(f"{x_shape} with {k_shape}: {kwargs}", x_shape, k_shape, kwargs, bias=draw(st.booleans())), dtype


@every_implementation
@given(problem=problems(), kind=st.sampled_from(["normal", "wide", "positive"]), into=st.booleans())
def test_any_problem(name, problem, kind, into):
    skip_unless_usable(name)
    case, dtype = problem

    def run(*operands: Any, **kwargs: Any) -> Any:
        return gpuconv.conv2d(*operands, backend=name, **kwargs)

    try:
        units.check(run, case, dtype, kind, into=into, xp=home(name, dtype))
    except gpuconv.NoBackendError:
        assert name not in SERVE_EVERYTHING
