"""Complex convolutions on the CPU: real ones of the parts, as channels or term by term."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import oracle_family
import pytest
import units

import gpuconv
from gpuconv import quick, request
from gpuconv.backends import protocol
from gpuconv.backends.numba_cpu import complex as complex_numbers
from gpuconv.backends.numba_cpu import runtime
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

NAME = complex_numbers.NAME
# (x, k, arguments): parts as channels, in several blocks, and with steps and borders; term by term.
CHANNELS: list[Any] = [
    ((2, 3, 7, 9), (5, 3, 3, 3), {"padding": 1}),
    ((1, 43, 5, 4), (3, 43, 3, 3), {"padding": ((0, 1), (2, 0))}),
    ((2, 6, 9, 21), (4, 3, 2, 3), {"groups": 2, "padding": 1, "stride": (2, 1), "padding_mode": "reflect"}),
    ((1, 2, 6, 11), (2, 2, 3, 2), {"padding": 2, "dilation": (1, 2), "padding_value": 2 + 2j}),
]
TERMS: list[Any] = [
    ((2, 3, 13, 17), (3, 1, 3, 3), {"padding": 1, "groups": 3}),
    ((1, 1, 30, 50), (2, 1, 3, 3), {"padding": 1, "padding_mode": "wrap", "dilation": (2, 1)}),
    ((1, 2, 5, 7), (2, 2, 3, 3), {"padding": 1, "padding_value": 1 - 2j}),
]
# Of x and k: a real operand has half the terms.
MIXED = [("complex64", "float32"), ("float32", "complex64"), ("int8", "complex64"), ("complex64", "int8")]


def numbers(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    rng, dtype = np.random.default_rng((seed, *shape)), np.dtype(dtype)
    values = rng.standard_normal(shape)
    if dtype.kind == "i":
        values = 40 * values
    return (values + 1j * rng.standard_normal(shape) if dtype.kind == "c" else values).astype(dtype)


def operands(x_shape: Any, k_shape: Any, x_dtype: Any = "complex64", k_dtype: Any = "complex64") -> tuple[Any, ...]:
    bias = numbers(k_shape[:1], "complex64")
    return numbers(x_shape, x_dtype), numbers(k_shape, k_dtype, 1), bias


def convolved(
    x: Any, k: Any, bias: Any, limit: int = 1 << 28, threads: int = 1, bits: Any = None, **kwargs: Any
) -> Any:
    """The convolution on any number of threads, and the plan."""
    named = {"x_dtype": x.dtype.name, "k_dtype": k.dtype.name, "bias": bias is not None}
    problem = Conv2dProblem.of(x.shape, k.shape, **named, **kwargs)
    target = protocol.Target("cpu", threads=threads, vector_bits=bits)
    assert complex_numbers.unsupported(problem, target) == []
    plan = complex_numbers.plan(problem, target, limit)
    y = np.full(problem.y_shape, np.nan, problem.y_dtype)
    views = [request.view(problem, which, array) for which, array in enumerate((x, k, y))]
    complex_numbers.run(plan, protocol.Operands(views[0], views[1], bias), views[2])
    return y, plan


@pytest.mark.parametrize(("x_shape", "k_shape", "kwargs"), CHANNELS + TERMS)
def test_nothing_beyond_the_arrays_is_read_or_written(x_shape, k_shape, kwargs):
    x, k, bias = operands(x_shape, k_shape)
    answer = oracle.answer(x, k, bias, **kwargs)
    guarded, out = [units.Guarded(array) for array in (x, k, bias)], units.unwritten(answer)
    gpuconv.conv2d(*(one.array for one in guarded), out=out.array, backend=NAME, **kwargs)
    out.check_edges(str(k_shape))
    units.assert_close(out.array, answer, str(k_shape))


@pytest.mark.full
@pytest.mark.parametrize("bits", [512, 256, 128])
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize(("x_shape", "k_shape", "kwargs"), CHANNELS + TERMS)
def test_every_register(x_shape, k_shape, kwargs, dtype, bits):
    x, k, _ = operands(x_shape, k_shape, dtype, dtype)
    y, _ = convolved(x, k, None, threads=2, bits=bits, **kwargs)
    units.assert_close(y, oracle.answer(x, k, **kwargs))


@pytest.mark.parametrize("dtypes", MIXED, ids="-".join)
def test_a_real_operand(dtypes):
    for x_shape, k_shape, kwargs in (TERMS[0], CHANNELS[0]):
        x, k, bias = operands(x_shape, k_shape, *dtypes)
        units.assert_close(gpuconv.conv2d(x, k, bias, backend=NAME, **kwargs), oracle.answer(x, k, bias, **kwargs))


@pytest.mark.parametrize("posed", [CHANNELS[2], TERMS[0]], ids=["channels", "terms"])
def test_channels_last(posed):
    x_shape, k_shape, kwargs = posed
    x, k, bias = operands(x_shape, k_shape)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    y = gpuconv.conv2d(last, k, bias, layout="NHWC", backend=NAME, **kwargs)
    units.assert_close(y.transpose(0, 3, 1, 2), oracle.answer(x, k, bias, **kwargs))


@pytest.mark.parametrize("part", ["real", "imag"])
@pytest.mark.parametrize("posed", [CHANNELS[0], TERMS[0]], ids=["channels", "terms"])
def test_a_nan_reaches_the_windows_that_read_it(posed, part):
    x_shape, k_shape, kwargs = posed
    x, k, _ = operands(x_shape, k_shape)
    for at in (0, x.size // 2, x.size - 1):
        damaged = x.copy()
        getattr(damaged, part).flat[at] = np.nan
        units.assert_close(gpuconv.conv2d(damaged, k, backend=NAME, **kwargs), oracle.answer(damaged, k, **kwargs))


@pytest.mark.parametrize("mixed", [("complex64", "float32"), ("float32", "complex64")], ids="-".join)
def test_a_real_operand_has_no_imaginary_part_for_an_infinity_to_meet(mixed):
    """0 · ∞ would be no number."""
    x, k, _ = operands((1, 1, 5, 5), (1, 1, 3, 3), *mixed)
    x[0, 0, 2, 2] = np.inf
    y = gpuconv.conv2d(x, k, backend=NAME)
    part = "real" if mixed[0] == "complex64" else "imag"
    assert not np.isnan(y.view(np.float32)).any()
    assert np.isinf(getattr(y, part)).all()
    assert np.isinf(y.real).all() and np.isfinite(y.imag).all() == (part == "real")


@pytest.mark.parametrize("posed", [CHANNELS[1], TERMS[0]], ids=["channels", "terms"])
def test_same_bits(posed):
    x_shape, k_shape, kwargs = posed
    x, k, bias = operands((3, *x_shape[1:]), k_shape)
    y, _ = convolved(x, k, bias, **kwargs)
    assert np.array_equal(convolved(x[:1], k, bias, **kwargs)[0], y[:1])
    for threads in (2, 5):
        assert np.array_equal(convolved(x, k, bias, threads=threads, **kwargs)[0], y)
    order, steps = (3, 1, 0, 2), (1, -2, 1, -2)
    strided, kernel = units.arranged(x, order, steps)[0], units.arranged(k, order, (2, 1, -1, 1))[0]
    out, memory = units.arranged(np.zeros_like(y), (0, 3, 2, 1), (1, 2, -1, 1))
    before = np.count_nonzero(np.isnan(memory))
    assert gpuconv.conv2d(strided, kernel, bias, out=out, backend=NAME, **kwargs) is out
    assert np.array_equal(out, y)
    assert np.count_nonzero(np.isnan(memory)) == before
    layer = gpuconv.Conv2d(k, bias, backend=NAME, **kwargs)
    for _ in range(2):
        assert np.array_equal(layer(x), y)


@pytest.mark.parametrize(("mode", "stride"), [("constant", (2, 1)), ("symmetric", (1, 2)), ("symmetric", (2, 1))])
def test_little_scratch_gives_the_same_bits(mode, stride, monkeypatch):
    """The terms are made in blocks of images, groups and rows."""
    x, k, bias = operands((2, 2, 37, 30), (4, 1, 3, 3))
    kwargs: Any = {"padding": ((2, 5), (1, 0)), "stride": stride, "groups": 2, "padding_mode": mode}
    wanted, whole = convolved(x, k, bias, **kwargs)
    units.assert_close(wanted, oracle.answer(x, k, bias, **kwargs))
    rows = wanted.shape[2]
    for most in (4000, 1):
        monkeypatch.setattr(complex_numbers, "_TERMS", most)
        y, plan = convolved(x, k, bias, **kwargs)
        n, g, some = plan.config["block"]
        # By numba_cpu.rows, with a stride, the lines of few rows would be added up in another order.
        assert n == g == 1 and (some == rows if (mode, stride) == ("symmetric", (2, 1)) else some < rows // 2)
        assert plan.workspace < whole.workspace
        assert np.array_equal(y, wanted)
    with pytest.raises(MemoryError, match="needs at least"):
        convolved(x, k, bias, limit=5000, **kwargs)


@pytest.mark.parametrize(
    "line",
    ["n64c64h7w7_o24kh3kw3_p1", "n3c16h64w64_o16kh3kw3_p1", "n4c8h64w64_o8kh3kw3_g8", "n1c8h9w9_o6kh3kw3_p1g2"],
)
@pytest.mark.parametrize("dtypes", [("float32", "complex64"), ("complex64", "complex64")], ids="-".join)
def test_more_scratch_never_hurts_and_changes_no_implementation(line, dtypes):
    """Other ones would add up in another order."""
    x_dtype, k_dtype = dtypes
    problem = Conv2dProblem.parse(f"{line}_f32")
    problem = replace(problem, x_dtype=x_dtype, k_dtype=k_dtype, y_dtype="complex64")
    names, planned, least = set(), False, 0
    for limit in [int(1e3 * 1.3**step) for step in range(48)]:
        for threads in (1, 2):
            target = protocol.Target("cpu", threads=threads)
            try:
                plan = complex_numbers.plan(problem, target, limit)
            except MemoryError as error:
                assert not (planned and threads == 2), f"{limit} bytes were enough before"
                least = max(least, getattr(error, "needed", 0))
                continue
            planned = planned or threads == 2
            assert plan.workspace <= limit
            names.add(str([term.name for part in plan.config.get("terms", {}).values() for term in part]))
    assert len(names) == 1
    assert complex_numbers.plan(problem, protocol.Target("cpu", threads=2), least), "what a refusal asks for is enough"


def test_a_sign_changed_where_results_lie_apart():
    """NumPy's negative in place read its operand as if it were contiguous, 16 bytes from element to element."""
    weight, dy = np.full((1, 1, 1, 1), 1 + 2j, np.complex64), np.ones((1, 1, 4, 20), np.float32)
    dx = gpuconv.grad.conv2d_input((1, 1, 4, 40), weight, dy, stride=(1, 2), backend=NAME)
    assert np.all(dx[..., ::2] == 1 - 2j)
    assert np.all(dx[..., 1::2] == 0)


GRADIENTS = [("complex64", "complex64"), ("float32", "complex64"), ("complex64", "float32")]


@pytest.mark.parametrize("dtypes", GRADIENTS, ids="-".join)
@pytest.mark.parametrize(
    ("x_shape", "k_shape", "kwargs"),
    [((2, 3, 7, 9), (9, 3, 3, 3), {"padding": 1, "stride": (2, 1)}), ((1, 2, 9, 8), (2, 1, 3, 3), {"groups": 2})],
)
def test_gradients(x_shape, k_shape, kwargs, dtypes):
    """Adjoints under the complex inner product, whatever is real."""
    other, dy = dtypes
    x, k, _ = operands(x_shape, k_shape, other, other)
    dy = numbers(gpuconv.conv2d(x, k, backend="numpy.reference", **kwargs).shape, dy, 3)
    for call, judge, given in (
        (gpuconv.grad.conv2d_input, oracle_family.conv2d_input, (x_shape, k, dy)),
        (gpuconv.grad.conv2d_weight, oracle_family.conv2d_weight, (x, k_shape, dy)),
    ):
        units.assert_close(call(*given, backend=NAME, **kwargs), judge(*given, **kwargs), call.__name__)


def test_a_transpose_is_not_conjugated_and_has_a_bias():
    y, k, _ = operands((1, 4, 6, 5), (4, 3, 3, 3))
    bias = numbers((3,), "complex64", 7)
    found = gpuconv.conv_transpose2d(y, k, bias, stride=2, backend=NAME)
    units.assert_close(found, oracle_family.conv_transpose2d(y, k, bias, stride=2))


def test_what_it_is_chosen_for():
    def chosen(line: str) -> str:
        return gpuconv.explain(line, device="cpu").implementation

    assert chosen("n1c8h64w64_o8kh3kw3_p1_c64") == NAME
    assert chosen("n1c1h64w64_o1kh5kw5_c128") == NAME
    assert chosen("n1c8h64w64_o8kh3kw3_p1_wgrad_c64") == NAME
    assert chosen("n1c8h64w64_o8kh1kw1_c64") == "numpy.gemm"
    assert chosen("n1c8h64w64_o8kh3kw3_p1_f32") != NAME
    report = gpuconv.explain((512, 512), (5, 5), padding=2, input_dtype="complex64", backend=NAME)
    assert "4 real convolutions, by numba_cpu.planes" in report.plan.detail
    real = Conv2dProblem.parse("n1c8h64w64_o8kh3kw3_p1_f32")
    assert complex_numbers.unsupported(real, protocol.Target("cpu")) == ["it is for complex numbers"]
    swapped = replace(real, x_dtype="complex64", k_dtype="complex64", y_dtype="complex64")
    assert "byte order" in complex_numbers.unsupported(swapped, protocol.Target("cpu", swapped=True))[0]


def test_repeated_calls_take_the_short_way():
    """One channel, several, a kept kernel, a weight gradient: new numbers each time, and nothing is planned again."""
    gpuconv.clear()
    bias = numbers((2,), "complex64")
    for channels in (1, 3):
        k = numbers((2, channels, 3, 3), "complex64", 1)
        layer = gpuconv.Conv2d(k, bias, backend=NAME)
        for seed in range(2, 5):
            x, dy = numbers((2, channels, 9, 8), "complex64", seed), numbers((2, 2, 7, 6), "complex64", seed + 9)
            wanted = gpuconv.conv2d(x, k, bias, backend="numpy.reference")
            assert np.allclose(gpuconv.conv2d(x, k, bias, backend=NAME), wanted, atol=1e-4)
            assert np.allclose(layer(x), wanted, atol=1e-4)
            gradients = [gpuconv.grad.conv2d_weight(x, k.shape, dy, backend=name) for name in (NAME, "numpy.reference")]
            assert np.allclose(*gradients, atol=1e-3)
    remembered = [ready.bound for ready in quick._ready.values()]
    assert sum(isinstance(bound, complex_numbers.Bound) for bound in remembered) == 4


def test_what_is_bound_does_not_grow_with_the_batch(monkeypatch):
    """Blocks of one image and one group look all the same."""
    monkeypatch.setattr(complex_numbers, "_TERMS", 1)
    for N, groups in ((1, 1), (4, 3)):
        problem = Conv2dProblem.of(
            (N, groups, 7, 9), (groups, 1, 3, 3), x_dtype="complex64", k_dtype="complex64", groups=groups
        )
        plan = complex_numbers.plan(problem, protocol.Target("cpu"), 1 << 28)
        assert plan.config["block"][:2] == (1, 1)
        x, k, _ = operands(problem.x_shape, problem.k_shape)
        y = np.empty(problem.y_shape, "complex64")
        bound = complex_numbers.Bound(plan, x, k, y)
        bound(x, k, None, None, y)
        units.assert_close(y, oracle.answer(x, k, groups=groups))
        assert len(bound.inner) == 4 * -(-problem.OH // plan.config["block"][2])
