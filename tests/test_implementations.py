"""One body for every implementation, case and dtype, and what each must hold beyond the cases.

What this machine cannot run is skipped with the implementation's own sentence, so that the same tests run on a GPU.
There the operands of every second check stand on the GPU. Everything is compared with the oracle, not with another
implementation: two results within the bound of a third may be twice the bound apart.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cases
import numpy as np
import oracle
import pytest
import units
from calls import is_costly
from cases import BY_NAME, CASES, DTYPES, Case
from running import (
    FORWARD,
    LONG,
    SIMULATOR_MARKS,
    SLOW_IN_SIMULATOR,
    STAND_IN,
    device_of,
    every_implementation,
    home,
    is_usable,
    runner,
    share,
    simulated,
    skip_in_simulator,
)  # fmt: skip

pytestmark = SIMULATOR_MARKS


def is_quick(name: str, case: Case, dtype: str) -> bool:
    """float32, or another dtype for a case that is not for float32, and the smoke cases in every dtype."""
    main = dtype == ("float32" if "float32" in case.only else case.only[0])
    if simulated(name):
        return case.name not in SLOW_IN_SIMULATOR and (main or case.name in ("stride_tail", "rank_3", "huge_stride"))
    return case.smoke or main


def agreements() -> list[Any]:
    params, absent = [], set()
    for name, case, dtype in itertools.product(FORWARD, CASES, DTYPES):
        quick = is_quick(name, case, dtype) and not is_costly(name, dtype)
        if case.accepts(dtype) and (quick or LONG) and name not in absent:
            marks = () if quick else pytest.mark.full
            params.append(pytest.param(name, case, dtype, id=f"{name}-{case.name}-{dtype}", marks=marks))
            absent |= set() if is_usable(name) else {name}  # one skipped test says why
    return params


@pytest.mark.parametrize(("name", "case", "dtype"), agreements())
def test_agrees(name, case, dtype):
    run, xp = runner(name), home(name, dtype)
    units.check(run, case, dtype, "normal", into=True)
    if simulated(name):
        return
    units.check(run, case, dtype, "narrow", xp=xp)
    if LONG or not STAND_IN:  # whose sums are NumPy's
        units.check(run, case, dtype, "wide", into=True, xp=xp)
        units.check(run, case, dtype, "positive")


@pytest.mark.parametrize("dtype", cases.FLOATS)
@every_implementation
def test_nan_and_inf_reach_the_windows_that_read_them(name, dtype):
    run = runner(name)
    for case in share(name, CASES, 15):
        if np.prod(case.x_shape) and case.accepts(dtype) and (case.smoke or dtype == "float32"):
            for value in share(name, (np.nan, np.inf, -np.inf), 2):
                units.check_specials(run, case, dtype, value, home(name, dtype))


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


# ---- padding values


@pytest.mark.parametrize(
    ("x_dtype", "k_dtype"),
    [("float16", "float32"), ("bfloat16", "float64"), ("float32", "float64"), ("complex64", "complex128")],
)
@every_implementation
def test_a_padded_pixel_is_a_number_of_the_type_of_x(name, x_dtype, k_dtype):
    """0.1 around a float16 image is float16's 0.1, whatever the sum is kept in."""
    run = runner(name)
    x, k = np.ones((1, 1, 2, 2), cases.numpy_dtype(x_dtype)), np.ones((2, 1, 3, 3), k_dtype)
    for kwargs in ({"padding": 2, "padding_value": 0.1}, {"padding": "same", "padding_value": np.float32(1.1)}):
        units.assert_close(run(x, k, **kwargs), oracle.answer(x, k, **kwargs), str(kwargs))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"])
@every_implementation
def test_padding_values_take_the_whole_range_of_x(name, dtype):
    run = runner(name)
    for value in (np.iinfo(dtype).min, np.iinfo(dtype).max):
        y = run(np.ones((1, 1), dtype), np.ones((1, 1), np.int64), padding=1, padding_value=int(value))
        assert units.to_host(y).tolist() == [[value] * 3, [value, 1, value], [value] * 3]


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
    if device_of(name) == "cpu":
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
