"""unfold and fold: PyTorch's meaning, and what ties them to the convolutions and to each other."""

from __future__ import annotations

from typing import Any

import cases
import family
import numpy as np
import oracle
import pytest
import units
from family import FamilyCase
from running import SIMULATOR_MARKS, simulated
from test_family import every_implementation_of, runner

import gpuconv
from gpuconv import fold, unfold

pytestmark = SIMULATOR_MARKS

WINDOWS = [case for case in family.FAMILY if case.call == "unfold"]


def integers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    values = rng.integers(-9, 10, shape).astype(np.float64)
    return (values + 1j * rng.integers(-9, 10, shape) if dtype in cases.COMPLEX else values).astype(dtype)


def test_pytorchs_order_of_rows_and_columns():
    """Rows: channels, then the kernel's rows, then its columns. Columns: windows, row by row."""
    x = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    wanted = [
        [x[c, i + p, j + q] for i in range(2) for j in range(2)] for c in range(2) for p in range(2) for q in range(3)
    ]
    assert unfold(x, (2, 3)).tolist() == wanted
    assert unfold(x[None], (2, 3)).tolist() == [wanted]
    columns = np.arange(12.0).reshape(1, 3, 4)
    # three taps of one row, four windows: 0 | 1+4 | 2+5+8 | 3+6+9 | 7+10 | 11
    assert fold(columns, (1, 6), (1, 3)).tolist() == [[[[0, 5, 15, 18, 17, 11]]]]
    assert fold(columns[0], (1, 6), (1, 3)).tolist() == [[[0, 5, 15, 18, 17, 11]]]


def test_pytorchs_order_of_arguments():
    x = integers((2, 3, 9, 8), "float32")
    columns = unfold(x, (3, 2), (2, 1), (2, 1), (3, 2))
    assert np.array_equal(columns, unfold(x=x, kernel_size=(3, 2), dilation=(2, 1), padding=(2, 1), stride=(3, 2)))
    back = fold(columns, (9, 8), (3, 2), (2, 1), (2, 1), (3, 2))
    named = {"output_size": (9, 8), "kernel_size": (3, 2), "dilation": (2, 1), "padding": (2, 1), "stride": (3, 2)}
    assert np.array_equal(back, fold(columns=columns, **named))
    assert back.shape == x.shape


def test_forms_of_the_arguments():
    x = integers((1, 2, 6, 6), "float32")
    wanted, options = unfold(x, (3, 3), (2, 2), (1, 1), (2, 2)), {"dilation": 2, "padding": 1, "stride": 2}
    for kernel in (3, np.int64(3), [3, 3], np.array([3, 3])):
        assert np.array_equal(unfold(x, kernel, **options), wanted)
    assert np.array_equal(unfold(x, 3, 2, ((1, 1), (1, 1)), [2, 2]), wanted)
    back = fold(wanted, (6, 6), (3, 3), **options)
    for size in (6, np.int64(6), [6, 6], np.array([6, 6])):
        assert np.array_equal(fold(wanted, size, 3, **options), back)
    assert unfold([[[1, 2], [3, 4]]], 2).tolist() == [[1], [2], [3], [4]]
    assert fold([[1.0], [2.0], [3.0], [4.0]], 2, 2).tolist() == [[[1, 2], [3, 4]]]


@pytest.mark.parametrize("dtype", ["float32", "complex64", "int64"])
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_fold_of_unfold_counts_the_windows(case, dtype):
    (shape,), (kernel,) = case.shapes, case.sizes
    x, size = integers(shape, dtype), shape[-2:]

    def there_and_back(image: np.ndarray) -> np.ndarray:
        return fold(unfold(image, kernel, **case.kwargs), size, kernel, **case.kwargs)

    count = there_and_back(np.ones_like(x))
    assert np.array_equal(there_and_back(x), count * x)
    if case.name == "stride_is_kernel":
        assert np.all(count == 1)


@pytest.mark.parametrize("dtype", ["float64", "complex128", "int64"])
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_adjoint(case, dtype):
    (shape,), (kernel,) = case.shapes, case.sizes
    x = integers(shape, dtype)
    columns = unfold(x, kernel, **case.kwargs)
    y = integers(columns.shape, dtype, 1)
    assert np.vdot(y, columns) == np.vdot(fold(y, shape[-2:], kernel, **case.kwargs), x)


@pytest.mark.parametrize("name", ["tail", "dilated", "stride_2_dilation_3", "patches", "asymmetric_stride_dilation"])
def test_columns_times_a_kernel_are_the_convolution(name):
    """And back: fold of the kernel's transpose times the gradient is the input gradient."""
    case = family.BY_FORWARD[name]
    x, k = integers(case.x_shape, "float64"), integers(case.k_shape, "float64", 1)
    window = {key: value for key, value in case.kwargs.items() if key in ("stride", "dilation", "padding")}
    rows, size = k.reshape(len(k), -1), k.shape[2:]
    y = gpuconv.conv2d(x, k, **case.kwargs)
    assert np.array_equal((rows @ unfold(x, size, **window)).reshape(y.shape), y)
    back = fold(rows.T @ y.reshape(*y.shape[:2], -1), x.shape[2:], size, **window)
    assert np.array_equal(back, gpuconv.grad.conv2d_input(x.shape, k, y, **case.kwargs))


@pytest.mark.parametrize("dtype", [*cases.DTYPES])
@every_implementation_of("unfold")
def test_copies_keep_every_bit(name, call, dtype):
    """NaN, infinities, both zeros, subnormals, extremes, and the dtype."""
    run, numpy_type = runner(name, call), cases.numpy_dtype(dtype)
    if oracle.is_integer(numpy_type):
        ends = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        values: Any = np.array([0, 1, *ends], dtype)
    else:
        info = units.finfo(numpy_type)
        ends = (float(info.max), float(info.tiny), float(info.smallest_subnormal))
        values = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, *ends], numpy_type)
    x = np.resize(values, (1, 2, 4, 5))
    found = units.to_host(run(x, (2, 3), padding=1))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    wanted = np.lib.stride_tricks.sliding_window_view(padded, (2, 3), (2, 3)).transpose(0, 1, 4, 5, 2, 3)
    assert found.dtype == numpy_type
    assert found.tobytes() == wanted.reshape(1, 12, -1).tobytes()
    assert found.flags.c_contiguous


FOLDED = {
    "bool": "int32", "int8": "int32", "uint8": "int32", "int16": "int64", "uint32": "int64", "float16": "float16",
    "bfloat16": "bfloat16", "float32": "float32", "complex64": "complex64",
}  # fmt: skip


@pytest.mark.parametrize("dtype", FOLDED)
@every_implementation_of("fold")
def test_dtype_of_a_fold(name, call, dtype):
    run = runner(name, call)
    columns = np.ones((9, 4), cases.numpy_dtype(dtype))
    found = units.to_host(run(columns, (4, 4), 3))
    assert found.dtype == cases.numpy_dtype(FOLDED[dtype])
    assert found[0].real.astype(int).tolist() == [[1, 2, 2, 1], [2, 4, 4, 2], [2, 4, 4, 2], [1, 2, 2, 1]]


@every_implementation_of("fold")
def test_pixels_of_no_window_are_zero(name, call):
    """Whatever the columns hold, and whatever out held."""
    run = runner(name, call)
    columns, out = np.full((1, 4, 4), np.nan, np.float32), np.full((1, 1, 7, 8), np.nan, np.float32)
    run(columns, (7, 8), (2, 2), stride=(4, 5), out=out)
    seen = np.zeros((7, 8), bool)
    seen[np.ix_([0, 1, 4, 5], [0, 1, 5, 6])] = True
    assert np.array_equal(np.isnan(out[0, 0]), seen)
    assert not out[0, 0][~seen].any()


@every_implementation_of("fold")
def test_folds_of_long_columns(name, call):
    """One pixel that 900 windows give to: a float16 running sum would stop at 2,048."""
    if simulated(name):
        pytest.skip("too much work for the CUDA simulator")
    run = runner(name, call)
    case = FamilyCase("fold", "long", ((1, 900, 900),), ((59, 59), 30), {})
    for dtype in ("float16", "bfloat16", "float32"):
        for kind in ("normal", "positive"):
            family.check(run, case, dtype, kind)
    ones = units.to_host(run(np.full((900, 900), 4, np.float16), (59, 59), 30))
    assert ones[0, 29, 29] == 3600
