"""Kernels that are an outer product, on the CPU: which they are, what the two passes promise, and who may take them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dispatch, quick, request, separability
from gpuconv.backends import numpy_gemm
from gpuconv.backends.numba_cpu import runtime, separable
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

LIMIT = 256 << 20
HIGH = 2e-5  # of the norm of |x| * |k|: what precision="high" promises
MODES = ("constant", "reflect", "symmetric", "edge", "wrap")

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))


def gaussian(n: int, sigma: float) -> Any:
    g = np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * sigma**2))
    return g / g.sum()


def outer(shape: tuple[int, ...], seed: int = 0) -> Any:
    """Random kernels (O, 1, KH, KW) that are outer products."""
    rng = np.random.default_rng(seed)
    O, _, KH, KW = shape
    return (rng.standard_normal((O, 1, KH, 1)) * rng.standard_normal((O, 1, 1, KW))).astype(np.float32)


def target(threads: int = 2, bits: int | None = None) -> Target:
    return Target("cpu", None, threads, bits, separable=True)


def guarded(shape: tuple[int, ...], values: Any = None) -> Any:
    """An array in the middle of NaN, not at the start of a cache line, and the whole."""
    size = int(np.prod(shape))
    whole = np.full(size + 256, np.nan, np.float32)
    inside = whole[129 : 129 + size].reshape(shape)
    if values is not None:
        inside[...] = values
    return inside, whole


def computed(
    problem: Conv2dProblem,
    x: Any,
    k: Any,
    bias: Any = None,
    where: Target | None = None,
    packed: bool = False,
    limit: int = LIMIT,
) -> Any:
    """The result of one plan, in guarded memory that must stay as it was."""
    where = where or target()
    y, whole = guarded(problem.y_shape)
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, k), bias)
    assert separable.unsupported(problem, where) == []
    plan = separable.plan(problem, where, limit)
    if packed:
        operands.packed = separable.pack(plan, operands)
        operands.k = operands.k[..., :0]  # not to be looked at any more
    separable.run(plan, operands, request.view(problem, 2, y))
    assert np.isnan(whole[:129]).all() and np.isnan(whole[129 + y.size :]).all()
    return y


def reference(problem: Conv2dProblem, x: Any, k: Any, bias: Any = None) -> Any:
    wide = replace(problem, x_dtype="float64", k_dtype="float64", y_dtype="float64", precision="highest")
    out = np.empty(problem.y_shape)
    operands = Operands(
        request.view(problem, 0, x.astype(np.float64)), request.view(problem, 1, k.astype(np.float64)),
        None if bias is None else bias.astype(np.float64),
    )  # fmt: skip
    numpy_gemm.run(numpy_gemm.plan(wide, Target("cpu"), LIMIT), operands, request.view(wide, 2, out))
    return out


def error(problem: Conv2dProblem, y: Any, x: Any, k: Any, bias: Any = None) -> float:
    """The norm of the error in units of the norm of |x| * |k| (and of the bias, which is added)."""
    plain = replace(problem, activation=None, padding_value=abs(problem.padding_value))
    most = reference(plain, abs(x), abs(k), None if bias is None else abs(bias))
    return float(np.linalg.norm(y - reference(problem, x, k, bias)) / np.linalg.norm(most))


def posed(x_shape: tuple[int, ...], k_shape: tuple[int, ...], bias: bool = False, **kwargs: Any) -> Any:
    """A problem, guarded operands and a bias."""
    rng = np.random.default_rng(x_shape[-1])
    problem = Conv2dProblem.of(x_shape, k_shape, bias=bias, precision="high", **kwargs)
    x, k = guarded(x_shape, rng.standard_normal(x_shape))[0], guarded(k_shape, outer(k_shape))[0]
    return problem, x, k, rng.standard_normal(k_shape[0]).astype(np.float32) if bias else None


# ---- which kernels

PRODUCTS = {
    "gaussian": np.outer(gaussian(15, 2.5), gaussian(15, 2.5)),
    "gaussian_whose_tails_vanish": np.outer(gaussian(63, 2), gaussian(63, 2)),
    "gaussian_of_a_sum": np.exp(-(np.add.outer(np.arange(-9, 10) ** 2, np.arange(-9, 10) ** 2) / np.float32(18))),
    "box": np.full((7, 9), 1 / 63),
    "binomial": np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256,
    "sobel": np.outer([1, 4, 6, 4, 1], [-1, -2, 0, 2, 1]),
    "zero": np.zeros((5, 5)),
    "one_tap": np.eye(25)[7].reshape(5, 5),
    "large": np.full((5, 5), 1e30),
    "small": np.outer(gaussian(9, 2), gaussian(9, 2)) * 1e-30,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_outer_products_are_found(name):
    k = PRODUCTS[name].astype(np.float32)[None, None, None]
    columns, rows = separability.factors(k)
    assert columns.dtype == rows.dtype == np.float32
    wide = k.astype(np.float64)
    products = columns[..., None].astype(np.float64) * rows[..., None, :]
    assert np.all(np.abs(products - wide) <= separability.TOLERANCE * np.abs(wide) + 2.0**-149)
    assert np.abs(columns.astype(np.float64)).sum() <= 1 or np.abs(rows).max() == 1


def almost(kind: str) -> Any:
    k = np.outer(gaussian(15, 2.5), gaussian(15, 2.5))
    if kind == "largest":
        k[7, 7] *= 1 + 2e-5
    elif kind == "corner":  # far below the rounding errors of the sum, but not of an image that is one pixel
        k[0, 0] *= 1 + 2e-5
    elif kind == "hole":
        k[3, 4] = 0
    elif kind == "turned":
        k = np.exp(
            -(np.add.outer(np.arange(-7, 8) ** 2, np.arange(-7, 8) ** 2) + np.outer(*[np.arange(-7, 8)] * 2)) / 40
        )
    elif kind == "rank_2":
        k += 1e-4 * np.outer(gaussian(15, 1), gaussian(15, 4))
    else:
        k[2, 2] = float(kind)
    return k.astype(np.float32)


@pytest.mark.parametrize("kind", ("largest", "corner", "hole", "turned", "rank_2", "nan", "inf"))
def test_what_is_almost_an_outer_product_is_none(kind):
    k = almost(kind)
    assert separability.factors(k) is None
    among = np.broadcast_to(PRODUCTS["gaussian"].astype(np.float32), (40, 1, 15, 15)).copy()
    assert separability.factors(among) is not None
    among[33, 0] = k
    assert separability.factors(among) is None
    # Where it would be worth it, it takes another path, and forcing says why.
    x = np.broadcast_to(np.float32(1), (2048, 2048))
    report = gpuconv.explain(x, k, precision="high")
    assert report.implementation != separable.NAME
    with pytest.raises(gpuconv.NoBackendError, match="outer product"):
        gpuconv.conv2d(np.ones((20, 20), np.float32), k, precision="high", backend=separable.NAME)


# ---- the two passes

# Planes smaller than a tile, rows of several blocks, strips that end within a tile; sums of several runs.
SHAPES = [
    ((2, 1, 3, 4), (1, 1, 5, 5), ((3, 1), (2, 6)), {}),
    ((1, 2, 40, 300), (4, 1, 4, 7), 3, {"groups": 2}),
    ((1, 1, 131, 97), (2, 1, 15, 9), ((0, 20), (9, 0)), {"padding_value": -2}),
    ((1, 3, 30, 1100), (3, 1, 7, 31), 0, {"groups": 3, "activation": "relu"}),
    ((1, 1, 20, 10), (1, 1, 67, 131), ((66, 5), (7, 130)), {}),
    ((1, 1, 1, 1), (1, 1, 9, 9), 4, {}),
    ((1, 1, 4036, 8), (1, 1, 4033, 4), 0, {}),  # in sums of 64, one row would be left over
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("x_shape", "k_shape", "padding", "kwargs"), SHAPES)
def test_the_promise_with_guard_bands(x_shape, k_shape, padding, kwargs, mode):
    kwargs = kwargs | {"padding_mode": mode}
    if mode != "constant":
        kwargs.pop("padding_value", None)
    problem, x, k, bias = posed(x_shape, k_shape, True, padding=padding, **kwargs)
    assert error(problem, computed(problem, x, k, bias), x, k, bias) <= HIGH / 20


@pytest.mark.full
@pytest.mark.parametrize("bits", (128, 256))
@pytest.mark.parametrize(("x_shape", "k_shape", "padding", "kwargs"), SHAPES)
def test_narrower_registers(x_shape, k_shape, padding, kwargs, bits):
    if bits > runtime.vector_bits():
        pytest.skip(f"the registers of this machine have {runtime.vector_bits()} bits")
    problem, x, k, bias = posed(x_shape, k_shape, True, padding=padding, **kwargs)
    assert error(problem, computed(problem, x, k, bias, target(2, bits)), x, k, bias) <= HIGH / 20


def test_small_integers_are_exact():
    x = np.random.default_rng(3).integers(-9, 10, (1, 1, 37, 61)).astype(np.float32)
    k = PRODUCTS["sobel"].astype(np.float32)[None, None]
    problem = Conv2dProblem.of(x.shape, k.shape, padding=2, padding_mode="reflect", precision="high")
    assert np.array_equal(computed(problem, x, k), reference(problem, x, k))


def test_threads_batches_preparation_memory_and_limits_change_no_bit():
    problem, x, k, bias = posed((3, 2, 70, 330), (4, 1, 9, 70), True, groups=2, padding=(4, 35), padding_mode="wrap")
    y = computed(problem, x, k, bias)
    assert np.array_equal(y, computed(problem, x, k, bias, packed=True))
    for threads in (1, 3):
        assert np.array_equal(y, computed(problem, x, k, bias, target(threads)))
    for n in range(3):
        assert np.array_equal(y[n : n + 1], computed(replace(problem, N=1), x[n : n + 1], k, bias))
    apart = np.full((3, 2, 140, 990), np.nan, np.float32)[:, :, ::2, ::3]
    apart[...] = x
    mirrored = np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    upside_down = np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]
    other = np.ascontiguousarray(k.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    for image, kernel in itertools.product((x, apart, mirrored, upside_down, np.asfortranarray(x)), (k, other)):
        assert np.array_equal(y, computed(problem, image, kernel, bias))
    whole = separable.plan(problem, target(), LIMIT).workspace
    least = whole
    for limit in (whole * 9 // 10, whole * 4 // 5):
        plan = separable.plan(problem, target(), limit)
        assert plan.workspace <= limit
        least = min(least, plan.workspace)
        assert np.array_equal(y, computed(problem, x, k, bias, limit=limit))
    assert least < whole
    with pytest.raises(MemoryError, match=r"numba_cpu\.separable .* needs at least"):
        separable.plan(problem, target(), 1000)
    into = np.full((3, 4, 140, 2 * y.shape[-1]), np.nan, np.float32)
    strided = into[:, :, ::2, 1::2]
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, k), bias)
    separable.run(separable.plan(problem, target(), LIMIT), operands, request.view(problem, 2, strided))
    assert np.array_equal(strided, y)
    strided[...] = np.nan
    assert np.isnan(into).all()


@pytest.mark.parametrize(("x_shape", "k_shape", "padding", "kwargs"), SHAPES)
def test_scratch_is_large_enough(x_shape, k_shape, padding, kwargs, monkeypatch):
    """Also for results that do not lie side by side, which are made beside them first."""
    given = []

    def poisoned(count: int, dtype: Any) -> Any:
        given.append(np.full(count + 512, np.nan, dtype))
        return given[-1][256:-256]

    problem, x, k, bias = posed(x_shape, k_shape, True, padding=padding, **kwargs)
    wanted = computed(problem, x, k, bias)
    monkeypatch.setattr(runtime, "aligned", poisoned)
    assert np.array_equal(computed(problem, x, k, bias, target(1)), wanted)
    apart = np.full((*wanted.shape[:3], 2 * wanted.shape[3]), np.nan, np.float32)[..., ::2]
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, k), bias)
    separable.run(separable.plan(problem, target(), LIMIT), operands, request.view(problem, 2, apart))
    assert np.array_equal(apart, wanted)
    assert len(given) == 2
    assert all(np.isnan(whole[:256]).all() and np.isnan(whole[-256:]).all() for whole in given)


def test_finite_images_stay_finite():
    """The largest pixels under a large, a small and a lopsided kernel, and the smallest."""
    lopsided = np.outer(np.full(31, 1e-2), np.eye(7)[3])  # whose column alone sums to more than its largest product
    for k in (np.full((9, 9), 1e10), np.full((9, 9), 1 / 81), lopsided, np.outer(gaussian(21, 2), gaussian(21, 1.5))):
        k = k.astype(np.float32)[None, None]
        top = np.float32(3e38) / max(float(np.abs(k).sum(dtype=np.float64)), 1) / 2
        for scale in (top, np.float32(1e-25)):
            x = (np.random.default_rng(1).uniform(0.5, 1, (1, 1, 40, 50)) * scale).astype(np.float32)
            problem = Conv2dProblem.of(x.shape, k.shape, precision="high")
            y = computed(problem, x, k)
            assert np.isfinite(y).all()
            assert error(problem, y, x, k) <= HIGH / 20


# ---- who may take it


def test_values_decide_where_it_is_worth_it():
    x, k = np.broadcast_to(np.float32(1), (1500, 1500)), PRODUCTS["gaussian"].astype(np.float32)
    assert gpuconv.explain(x, k, precision="high").implementation == separable.NAME
    assert gpuconv.explain(x, k, precision="medium", padding="same").implementation == separable.NAME
    assert gpuconv.explain(x, k).implementation == "numba_cpu.fft"
    assert gpuconv.explain(x[:60, :60], k, precision="high").implementation == "numba_cpu.rows"
    by_shape = gpuconv.explain(x.shape, k.shape, precision="high")
    assert by_shape.implementation == "numba_cpu.fft"
    # Of a larger one transforms are quicker.
    large = np.outer(gaussian(63, 9), gaussian(63, 9)).astype(np.float32)
    assert gpuconv.explain(x, large, precision="high").implementation == "numba_cpu.fft"
    assert [verdict for verdict in by_shape.table if "only its shape is known" in " ".join(verdict.reasons)]
    for name in ("numba_cpu.rows", "numpy"):  # forced, nobody asks
        assert not dispatch.values_matter(by_shape.problem, Target("cpu"), name)


@pytest.mark.parametrize("order", (1, -1))
def test_a_repeated_call_looks_at_the_values_again(order, monkeypatch):
    gpuconv.clear()
    x = np.random.default_rng(2).standard_normal((700, 700)).astype(np.float32)
    kernels = [outer((1, 1, 15, 15))[0, 0], almost("rank_2")][::order]
    ran = []
    for name in (separable.NAME, "numba_cpu.rows"):
        module = dispatch.implementation(name)
        run = module.run
        monkeypatch.setattr(module, "run", lambda *given, run=run, name=name: (ran.append(name), run(*given))[1])
    for k in (*kernels, *kernels):
        gpuconv.conv2d(x, k, precision="high")
    assert ran == [separable.NAME, "numba_cpu.rows"][::order] * 2
    assert not quick._ready


def test_a_prepared_layer_asks_once_and_keeps_a_snapshot(monkeypatch):
    x = np.random.default_rng(2).standard_normal((700, 700)).astype(np.float32)
    k = outer((1, 1, 15, 15))[0, 0]
    wanted = gpuconv.conv2d(x, k, precision="high")
    layer = gpuconv.Conv2d(k, precision="high")
    assert np.array_equal(layer(x), wanted)
    k[3, 4] = 0
    monkeypatch.setattr(separability, "factors", None)
    assert np.array_equal(layer(x), wanted) and np.array_equal(layer(x), wanted)
    monkeypatch.undo()
    rows = gpuconv.conv2d(x, k, backend="numba_cpu.rows")
    assert np.array_equal(gpuconv.Conv2d(k, precision="high")(x), rows)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    (
        ({"precision": "highest"}, "rounding errors"),
        ({"stride": 2}, "without stride"),
        ({"dilation": (1, 2)}, "without stride"),
        ({"x_dtype": "float64"}, "float32"),
        ({"k_dtype": "float64", "dtype": np.float32}, "float32"),
        ({"x_dtype": "float16", "k_dtype": "float16"}, "float32"),
        ({"groups": 1}, "one channel per group"),
        ({"layout": "NHWC"}, "NCHW"),
    ),
)
def test_what_it_refuses(kwargs, reason):
    groups = kwargs.get("groups", 4)
    x_shape = (1, 19, 19, 4) if "layout" in kwargs else (1, 4, 19, 19)
    options = {"precision": "high", "groups": groups} | kwargs
    problem = Conv2dProblem.of(x_shape, (4, 4 // groups, 5, 5), **options)
    assert [text for text in separable.unsupported(problem, target()) if reason in text]
    assert not dispatch.values_matter(problem, target(), separable.NAME)


def test_highest_never_takes_it():
    k = PRODUCTS["gaussian"].astype(np.float32)
    x = np.ones((30, 30), np.float32)
    with pytest.raises(gpuconv.NoBackendError, match="highest"):
        gpuconv.conv2d(x, k, backend=separable.NAME)
    swapped = x.astype(x.dtype.newbyteorder())
    with pytest.raises(gpuconv.NoBackendError, match="byte order"):  # no room for a copy in the machine's own
        gpuconv.conv2d(swapped, k, precision="high", backend=separable.NAME, workspace_limit=2 * x.nbytes - 1)
    assert np.allclose(gpuconv.conv2d(x, k, precision="high", backend=separable.NAME), 1, rtol=1e-6)
    transposed = Conv2dProblem.of((1, 1, 2000, 2000), (1, 1, 15, 15), precision="high", op="input_grad")
    assert dispatch.preferred(transposed, "cpu")[0][0] == "numba_cpu.fft"
