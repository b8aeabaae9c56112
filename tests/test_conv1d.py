"""conv1d is conv2d on one row, and NumPy's own convolve and correlate."""

from __future__ import annotations

from typing import Any

import cases
import family
import numpy as np
import oracle
import oracle_family
import pytest
import scipy.ndimage
import units
from calls import affordable
from running import SIMULATOR_MARKS
from test_family import every_implementation_of, runner

import gpuconv
from gpuconv import conv1d

pytestmark = SIMULATOR_MARKS

ROWS = [case for case in family.FAMILY if case.call == "conv1d"]


def drawn(dtype: str, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([n, k])

    def draw(size: int) -> np.ndarray:
        values: Any = rng.integers(-99, 99, size) if dtype in cases.INTEGERS else rng.standard_normal(size)
        return (values + 1j * rng.standard_normal(size) if dtype in cases.COMPLEX else values).astype(dtype)

    return draw(n), draw(k)


def compare(y: np.ndarray, wanted: np.ndarray, x: np.ndarray, k: np.ndarray, **kwargs: Any) -> None:
    answer = oracle_family.conv1d(x, k, **kwargs)
    assert y.dtype == answer.dtype and y.shape == wanted.shape
    error = np.abs(units.components(y) - units.components(wanted))
    # two sums, each within the bound
    assert np.all(error <= (0 if oracle.is_integer(answer.dtype) else 2 * units.bound(answer)))


@pytest.mark.parametrize("dtype", ["float64", "complex128", "int64", "float32"])
@pytest.mark.parametrize(("padding", "mode"), [("valid", "valid"), ("full", "full"), ("same_lower", "same")])
def test_numpy_convolve_and_correlate(padding, mode, dtype):
    """NumPy's "same" takes the odd element from the start."""
    for n, k in ((9, 3), (9, 4), (8, 1), (5, 5), (6, 6), (17, 2)):
        x, kernel = drawn(dtype, n, k)
        y = conv1d(x, kernel, padding=padding, flip=True, **affordable(dtype))
        compare(y, np.convolve(x, kernel, mode), x, kernel, padding=padding, flip=True)
        # correlate conjugates its second argument; its "same" centres the kernel as given, not turned
        if mode != "same" or k % 2:
            y = conv1d(x, kernel, padding=padding, **affordable(dtype))
            compare(y, np.correlate(x, kernel.conj(), mode), x, kernel, padding=padding)


@pytest.mark.parametrize(
    ("scipy_mode", "mode"),
    [("constant", "constant"), ("reflect", "symmetric"), ("mirror", "reflect"), ("nearest", "edge"), ("wrap", "wrap")],
)
def test_scipy_ndimage_correlate1d(scipy_mode, mode):
    for n, k in ((9, 3), (9, 4), (5, 5), (7, 6)):
        x, kernel = drawn("float64", n, k)
        wanted = scipy.ndimage.correlate1d(x, kernel, mode=scipy_mode)
        kwargs: dict[str, Any] = {"padding": "same_lower", "padding_mode": mode}
        compare(conv1d(x, kernel, **kwargs), wanted, x, kernel, **kwargs)


@pytest.mark.parametrize("case", [case for case in ROWS if len(case.shapes[0]) > 1], ids=str)
def test_equals_conv2d_on_a_row(case):
    """In every layout, on fills that are exact in any order."""
    kwargs = dict(case.kwargs)
    last, order = kwargs.pop("layout", "NCL") == "NLC", kwargs.pop("kernel_layout", "OIK")
    kwargs["layout"] = "NHWC" if last else "NCHW"
    kwargs["kernel_layout"] = {"OIK": "OIHW", "KIO": "HWIO", "OKI": "OHWI"}[order]
    for name in ("stride", "dilation"):
        kwargs[name] = (1, kwargs.get(name, 1))
    padding = kwargs.get("padding", 0)
    if not isinstance(padding, str):
        kwargs["padding"] = ((0, 0), (padding, padding) if isinstance(padding, int) else padding)
    for dtype in ("int8",) if "float32" not in case.only else ("float32", "complex64", "int16"):
        if case.accepts(dtype):
            operands, _ = family.posed(case, dtype, "narrow")
            x, k, bias = operands
            row = x[..., None, :, :] if last else x[..., None, :]
            kernel = k[None] if order == "KIO" else k[:, None] if order == "OKI" else k[:, :, None]
            chosen = affordable(dtype)
            wanted = gpuconv.conv2d(row, kernel, bias, **kwargs, **chosen)
            wanted = wanted[..., 0, :, :] if last else wanted[..., 0, :]
            found = conv1d(*operands, **case.kwargs, **chosen)
            assert found.dtype == wanted.dtype
            assert np.array_equal(found, wanted)


def test_pytorchs_order_of_arguments():
    case = family.BY_NAME["conv1d", "grouped"]
    (x, k, bias), _ = family.posed(case, "float32", "narrow")
    answer = oracle_family.conv1d(x, k, bias, 2, 3, 2, 2)
    units.assert_exact(conv1d(x, k, bias, 2, 3, 2, 2), answer)
    units.assert_exact(conv1d(x=x, k=k, bias=bias, stride=2, padding=3, dilation=2, groups=2), answer)
    units.assert_exact(conv1d(x, k, bias, 2, (3, 3), 2, 2), answer)
    units.assert_exact(conv1d(x, k, bias, 2, [3, 3], 2, 2), answer)


def test_lists_of_numbers():
    assert conv1d([1, 2, 3, 4], [1, 0, -1]).tolist() == [-2, -2]
    assert conv1d([1, 2, 3, 4], [1, 0, -1], flip=True, padding="full").tolist() == [1, 2, 2, 2, -3, -4]
    assert conv1d([[1.0, 2.0]], [[[1.0]], [[10.0]]], [0.5, 0.25]).tolist() == [[1.5, 2.5], [10.25, 20.25]]
    assert conv1d([1, 2, 3], [1, 1], padding=(2, 0)).tolist() == [0, 1, 3, 5]


@every_implementation_of("conv1d")
def test_nan_in_a_signal(name, call):
    x = np.arange(9, dtype=np.float32)
    x[4] = np.nan
    y = units.to_host(runner(name, call)(x, np.zeros(3, np.float32), padding=1))
    assert np.isnan(y).tolist() == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("dtype", [np.float64, "bfloat16", np.complex64])
@every_implementation_of("conv1d")
def test_asked_for_dtype_and_out(name, call, dtype):
    run, case = runner(name, call), family.BY_NAME["conv1d", "nlc_kio"]
    operands = family.fill(case, "float32", "normal")
    operands[-1] = np.arange(case.bias, dtype=np.float32)  # which every type holds
    numpy_type = cases.numpy_dtype(dtype) if isinstance(dtype, str) else np.dtype(dtype)
    answer = case.answer(operands, dtype=numpy_type)
    out = family.unwritten(answer)
    assert run(*operands, dtype=dtype, out=out.array, **case.kwargs) is out.array
    out.check_edges(case.name)
    units.assert_close(out.array, answer, case.name)
