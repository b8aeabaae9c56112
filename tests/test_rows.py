"""One input channel per output on the CPU: filters of images and depthwise layers, with and without copied windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import units

from gpuconv import request
from gpuconv.backends import protocol
from gpuconv.backends.numba_cpu import lanes, rows, runtime
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

# (x, k, arguments): tiles cut short on every side, the inside of a large image, nothing but border.
FILTERS: list[Any] = [
    ((2, 3, 13, 17), (3, 1, 3, 3), {"padding": 1, "groups": 3}),
    ((1, 2, 3, 2), (4, 1, 3, 3), {"padding": (3, 4), "groups": 2, "activation": "relu"}),
    ((1, 1, 30, 431), (1, 1, 3, 3), {"padding": 1}),
    ((1, 1, 21, 300), (2, 1, 3, 3), {"padding": ((0, 2), (3, 0)), "padding_value": 2}),
    ((1, 1, 9, 400), (1, 1, 3, 3), {"padding": 1, "padding_mode": "reflect"}),
    ((2, 2, 15, 70), (4, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 2}),
    ((1, 2, 9, 9), (2, 1, 2, 3), {"padding": (9, 12), "stride": (3, 1), "groups": 2, "dilation": (1, 2)}),
    ((1, 1, 60, 330), (1, 1, 19, 23), {"padding": (9, 11)}),
    ((1, 1, 3, 700), (1, 1, 2, 300), {"padding": (1, 10)}),
]
PLANES: list[Any] = [
    ((2, 19, 7, 7), (19, 1, 3, 3), {"padding": 1, "groups": 19}),
    ((1, 33, 15, 14), (33, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 33, "activation": "relu"}),
    ((1, 5, 4, 3), (5, 1, 5, 2), {"padding": (11, 6), "padding_value": -1, "groups": 5, "dilation": (2, 1)}),
    ((1, 17, 11, 30), (17, 1, 7, 7), {"padding": ((0, 3), (2, 0)), "groups": 17, "stride": (1, 3)}),
]
BOTH = [(rows, *posed) for posed in FILTERS + PLANES[:2]] + [(lanes, *posed) for posed in PLANES]


def convolved(
    module: Any,
    x: Any,
    k: Any,
    bias: Any = None,
    out: Any = None,
    threads: int = 1,
    bits: int | None = None,
    **kwargs: Any,
) -> Any:
    """The convolution by ``module``, on the threads and vectors of any target."""
    named = dict(x_dtype=x.dtype.name, k_dtype=k.dtype.name, bias=bias is not None)
    problem = Conv2dProblem.of(x.shape, k.shape, **named, **kwargs)
    target = protocol.Target("cpu", threads=threads, vector_bits=bits)
    assert module.unsupported(problem, target) == []
    plan = module.plan(problem, target, 1 << 28)
    y = np.empty(problem.y_shape, x.dtype) if out is None else out
    operands = protocol.Operands(request.view(problem, 0, x), request.view(problem, 1, k), bias)
    module.run(plan, operands, request.view(problem, 2, y))
    return y


def operands_of(x_shape: Any, k_shape: Any, dtype: str = "float32") -> Any:
    rng = np.random.default_rng(5)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in (x_shape, k_shape, k_shape[:1]))


def check(module: Any, x_shape: Any, k_shape: Any, kwargs: Any, dtype: str = "float32", **target: Any) -> None:
    x, k, bias = operands_of(x_shape, k_shape, dtype)
    answer = oracle.answer(x, k, bias, **kwargs)
    guarded, out = [units.Guarded(array) for array in (x, k, bias)], units.unwritten(answer)
    convolved(module, *(one.array for one in guarded), out=out.array, **target, **kwargs)
    out.check_edges(str(k_shape))
    units.assert_close(out.array, answer, str(k_shape))


@pytest.mark.parametrize(("module", "x_shape", "k_shape", "kwargs"), BOTH)
def test_nothing_beyond_the_arrays_is_read_or_written(module, x_shape, k_shape, kwargs):
    check(module, x_shape, k_shape, kwargs)


@pytest.mark.parametrize(
    ("module", "posed", "dtype", "bits"),
    [(rows, FILTERS[2], "float64", 128), (rows, FILTERS[7], "float32", 256), (lanes, PLANES[0], "float64", 256)],
)
def test_other_registers(module, posed, dtype, bits):
    check(module, *posed, dtype=dtype, bits=bits)


@pytest.mark.parametrize(("module", "x_shape", "k_shape", "kwargs"), BOTH)
def test_a_nan_reaches_the_windows_that_read_it(module, x_shape, k_shape, kwargs):
    x, k, _ = operands_of(x_shape, k_shape)
    for at in (0, x.size // 2, x.size - 1):
        damaged = x.copy()
        damaged.flat[at] = np.nan
        units.assert_close(convolved(module, damaged, k, **kwargs), oracle.answer(damaged, k, **kwargs))


@pytest.mark.parametrize(("module", "x_shape", "k_shape", "kwargs"), BOTH)
def test_same_bits(module, x_shape, k_shape, kwargs):
    x, k, bias = operands_of((3, *x_shape[1:]), k_shape)
    y = convolved(module, x, k, bias, **kwargs)
    assert np.array_equal(convolved(module, x[:1], k, bias, **kwargs), y[:1])
    assert np.array_equal(convolved(module, x, k, bias, threads=2, **kwargs), y)
    assert np.array_equal(convolved(module, x, k, bias, threads=3, **kwargs), y)
    order, steps = (3, 1, 0, 2), (1, -2, 1, -2)
    strided = units.arranged(x, order, steps)[0]
    kernel = units.arranged(k, order, (2, 1, -1, 1))[0]
    out, memory = units.arranged(np.zeros_like(y), (0, 3, 2, 1), (1, 2, -1, 1))
    before = np.count_nonzero(np.isnan(memory))
    convolved(module, strided, kernel, bias, out=out, **kwargs)
    assert np.array_equal(out, y)
    assert np.count_nonzero(np.isnan(memory)) == before


def test_long_sums_are_cut():
    x, k, _ = operands_of((1, 1, 40, 330), (1, 1, 31, 31))
    answer = oracle.answer(x, k, None, padding=15)
    y = convolved(rows, x, k, padding=15)
    units.assert_close(y, answer, "31×31", units.limit_of(answer))
    # One running sum of 961 products reads 7 or so.
    assert units.unit_b(y, answer, x, k) < 5
