"""Input gradients of stride 2 with one output channel per group, even and odd columns together."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle_family
import pytest
import units

import gpuconv
from gpuconv import dispatch, request
from gpuconv.backends import protocol
from gpuconv.backends.numba_cpu import runtime, spread
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

# (images and size of the result, groups, k, arguments of the convolution): rows shorter than a vector and longer, of
# odd and even length; strips; tiles of every height; other steps of rows; taps that miss the result; crops.
POSED: list[Any] = [
    ((2, 14, 14), 19, (1, 3, 3), {"stride": 2, "padding": 1}),
    ((1, 29, 57), 3, (1, 3, 3), {"stride": 2, "padding": 1}),
    ((2, 90, 131), 1, (2, 5, 4), {"stride": 2, "padding": (2, 1)}),
    ((1, 5, 3), 2, (3, 2, 2), {"stride": 2, "padding": 0}),
    ((1, 24, 40), 2, (1, 3, 3), {"stride": (1, 2), "padding": (0, 2)}),
    ((1, 31, 22), 2, (1, 4, 7), {"stride": (3, 2), "padding": (9, 8), "dilation": (1, 3)}),
    ((1, 20, 33), 1, (1, 2, 2), {"stride": 2, "padding": ((7, 0), (0, 11))}),
]


def problem_of(posed: Any, dtype: str = "float32", **more: Any) -> Conv2dProblem:
    (images, *size), groups, (outputs, *taps), arguments = posed
    return Conv2dProblem.of(
        (images, groups * outputs, *size), (groups, outputs, *taps), x_dtype=dtype, k_dtype=dtype, groups=groups,
        op="input_grad", **arguments, **more,
    )  # fmt: skip


def operands_of(problem: Conv2dProblem) -> tuple[Any, Any, Any]:
    source = np.random.default_rng(3)
    dtype = problem.x_dtype
    dy, k = (source.standard_normal(shape).astype(dtype) for shape in (problem.y_shape, problem.k_shape))
    return dy, k, source.standard_normal(problem.C).astype(dtype)


def gradient(
    problem: Conv2dProblem,
    dy: Any,
    k: Any,
    bias: Any = None,
    out: Any = None,
    threads: int = 1,
    bits: int | None = None,
) -> Any:
    target = protocol.Target("cpu", threads=threads, vector_bits=bits)
    assert spread.unsupported(problem, target) == []
    plan = spread.plan(problem, target, 1 << 28)
    out = np.empty(problem.x_shape, dy.dtype) if out is None else out
    operands = protocol.Operands(request.view(problem, 0, dy), request.view(problem, 1, k), bias)
    spread.run(plan, operands, request.view(problem, 2, out))
    return out


def expected(problem: Conv2dProblem, dy: Any, k: Any) -> Any:
    arguments = {name: getattr(problem, name) for name in ("stride", "padding", "dilation", "groups")}
    return oracle_family.conv2d_input(problem.x_shape, k, dy, **arguments)


@pytest.mark.parametrize("posed", POSED)
def test_every_border(posed):
    problem = problem_of(posed)
    dy, k, _ = operands_of(problem)
    units.assert_close(gradient(problem, dy, k), expected(problem, dy, k))


@pytest.mark.parametrize("posed", POSED[:3])
def test_same_bits(posed, monkeypatch):
    """In any batch, on any threads, in strips, from and to any memory; with a bias and a least value."""
    problem = problem_of(posed, bias=True, activation="relu")
    dy, k, bias = operands_of(problem)
    dx = gradient(problem, dy, k, bias)
    last = problem_of(((1, *posed[0][1:]), *posed[1:]), bias=True, activation="relu")
    assert np.array_equal(gradient(last, dy[-1:], k, bias), dx[-1:])
    assert dx.min() == 0
    order, steps = (3, 1, 0, 2), (1, -2, 1, -2)
    strided, kernel = units.arranged(dy, order, steps)[0], units.arranged(k, order, (2, 1, -1, 1))[0]
    out, memory = units.arranged(np.zeros_like(dx), (0, 3, 2, 1), (1, 2, -1, 1))
    before = np.count_nonzero(np.isnan(memory))
    gradient(problem, strided, kernel, bias, out=out)
    assert np.array_equal(out, dx) and np.count_nonzero(np.isnan(memory)) == before
    for name, value in (("_LINES", 1), ("ALONE", 0)):
        monkeypatch.setattr(spread, name, value)
        for threads in (1, 2, 40):
            assert np.array_equal(gradient(problem, dy, k, bias, threads=threads), dx)


@pytest.mark.parametrize("posed", POSED)
def test_a_nan_reaches_what_reads_it(posed):
    problem = problem_of(posed)
    dy, k, _ = operands_of(problem)
    for at in (0, dy.size // 2, dy.size - 1):
        damaged = dy.copy()
        damaged.flat[at] = np.nan
        units.assert_close(gradient(problem, damaged, k), expected(problem, damaged, k))


@pytest.mark.full
@pytest.mark.parametrize("bits", [512, 256, 128])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_every_register(dtype, bits):
    for posed in POSED:
        problem = problem_of(posed, dtype)
        dy, k, _ = operands_of(problem)
        units.assert_close(gradient(problem, dy, k, bits=bits, threads=2), expected(problem, dy, k))


def test_what_runs():
    def chosen(line: str) -> str:
        return gpuconv.explain(line, device="cpu").implementation

    assert chosen("n1c32h20w20_o32kh3kw3_s2p1g32_dgrad_f32") == "numba_cpu.spread"
    assert chosen("n1c64h20w20_o32kh3kw3_s2p1g32_dgrad_f32") == "numba_cpu.spread"
    for other in ("s1p1g32", "s3p1g32", "s2x1p1g32", "s2d2p1g32", "s2p1g32_nhwc"):
        assert chosen(f"n1c32h20w20_o32kh3kw3_{other}_dgrad_f32") != "numba_cpu.spread"
    problem = Conv2dProblem.parse("n1c32h20w20_o32kh1kw3_s2g32_dgrad_f32")
    assert spread.unsupported(problem, protocol.Target("cpu")) == ["it is for results of which every row has a tap"]


def test_a_kernel_of_too_many_taps_is_not_gone_through(monkeypatch):
    """One of a million rows, which explain may be asked about, would take seconds."""
    monkeypatch.setattr(spread, "_of_rows", pytest.fail)
    problem = Conv2dProblem.of(
        (1, 1, 2000, 4), (1, 1, 1000, 2), x_dtype="float32", k_dtype="float32", stride=(1000, 2), op="input_grad"
    )
    assert "at most 320" in spread.unsupported(problem, protocol.Target("cpu"))[0]


def test_a_repeated_call_and_a_kept_kernel():
    problem = problem_of(POSED[0])
    dy, k, _ = operands_of(problem)
    options = {"stride": 2, "padding": 1, "groups": 19, "backend": spread.NAME}
    calls = [gpuconv.grad.conv2d_input(problem.x_shape, k, dy, **options) for _ in range(2)]
    assert all(np.array_equal(call, gradient(problem, dy, k)) for call in calls)
    assert spread.NAME in dispatch.serving("input_grad") and spread.NAME not in dispatch.serving("forward")
