"""The compiled weight gradients: vectors of any width, guard bands, and one sum whatever the threads and the memory."""

from __future__ import annotations

from typing import Any

import family
import numpy as np
import oracle_family
import pytest
import units
from cases import Case, numpy_dtype

import gpuconv
from gpuconv import request
from gpuconv.backends.numba_cpu import runtime, weight_grad, weight_planes
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

MOST = 1 << 28


def of(name: str, x: tuple, k: tuple, **kwargs: Any) -> family.FamilyCase:
    """The weight gradient of the convolution of such an x by such a k."""
    _, weight = family.gradients(Case(name, x, k, kwargs))
    return weight


# Channels that fill no tile and no register, in one list of pixels or one for each tap; x in place and copied.
DENSE = [
    of("mixed", (2, 3, 12, 13), (13, 3, 3, 3), padding=1),
    of("mixed_in_place", (2, 3, 9, 8), (9, 3, 3, 2), stride=(2, 1)),
    of("mixed_dilated", (1, 2, 13, 20), (17, 2, 3, 2), padding=2, dilation=(2, 3)),
    of("by_taps", (3, 14, 7, 6), (10, 14, 3, 3), padding=1),
    of("by_taps_dilated", (2, 13, 11, 10), (8, 13, 2, 3), padding=((2, 0), (0, 3)), stride=2, dilation=(1, 3)),
    of("by_taps_strided", (2, 13, 11, 10), (33, 13, 3, 3), padding=((2, 0), (0, 1)), stride=2),
    of("unreached_taps", (2, 12, 1, 2), (8, 12, 3, 3), padding=1),
    of("pointwise", (2, 25, 5, 7), (50, 25, 1, 1)),
    of("pointwise_strided", (1, 31, 6, 7), (64, 31, 1, 1), stride=(3, 2)),
    of("panels", (1, 7, 5, 4), (150, 7, 2, 2), padding=(0, 1)),
    of("grouped", (2, 6, 6, 7), (20, 3, 3, 3), padding=1, groups=2),
    of("long_rows", (1, 2, 2, 700), (8, 2, 1, 3), padding=(0, 1)),
    of("many_chunks", (1, 2, 130, 44), (8, 2, 3, 3), padding=1),  # in parts
    of("many_lots", (1, 13, 70, 80), (8, 13, 2, 2), padding=1),
]
PLANES = [
    of("depthwise", (2, 5, 9, 17), (5, 1, 3, 3), padding=1, groups=5),
    of("depthwise_strided", (1, 3, 11, 35), (3, 1, 3, 3), padding=((0, 1), (2, 1)), groups=3, stride=2),
    of("depthwise_5", (1, 2, 8, 9), (2, 1, 5, 5), padding=2, groups=2, dilation=(1, 2)),
    of("multiplier", (2, 4, 6, 5), (12, 1, 2, 3), groups=4, stride=(1, 2)),
    of("few_outputs", (2, 7, 6, 8), (3, 7, 3, 3), padding=1),
    of("one_by_one", (3, 2, 5, 6), (2, 2, 1, 1)),
    of("tall", (1, 2, 300, 18), (2, 1, 2, 2), groups=2),
    of("short_rows_strided", (2, 5, 13, 14), (5, 1, 3, 3), padding=1, groups=5, stride=2),
    of("strips_strided", (1, 1, 150, 131), (1, 1, 3, 3), padding=(2, 1), stride=2),
    of("wide", (1, 1, 2, 5000), (1, 1, 1, 3), padding=(0, 1)),
]
# Two and three vectors of output channels are another kernel each, which takes seconds to compile.
LONG = ("mixed_dilated", "by_taps_strided")
BOTH = [
    pytest.param(module, case, id=case.name, marks=pytest.mark.full if case.name in LONG else ())
    for module, cases in ((weight_grad, DENSE), (weight_planes, PLANES))
    for case in cases
]
each = pytest.mark.parametrize(("module", "case"), BOTH)


def computed(module: Any, case: family.FamilyCase, x: Any, dy: Any, out: Any = None, threads: int = 2,
             bits: int | None = None, limit: int = MOST, **more: Any) -> np.ndarray:  # fmt: skip
    """The weight gradient by ``module``, on the threads and vectors of any target."""
    (k_shape,) = case.sizes
    problem = Conv2dProblem.of(
        x.shape, k_shape, x_dtype=x.dtype.name, k_dtype=dy.dtype.name, op="weight_grad", **case.kwargs, **more
    )
    target = Target("cpu", threads=threads, vector_bits=bits)
    assert module.unsupported(problem, target) == []
    plan = module.plan(problem, target, limit)
    assert plan.workspace <= limit
    dk = np.full(k_shape, np.nan, x.dtype) if out is None else out
    operands = Operands(request.view(problem, 0, x), request.view(problem, 1, dy))
    module.run(plan, operands, request.view(problem, 2, dk))
    return dk


def operands_of(case: family.FamilyCase, dtype: str, kind: str) -> tuple[Any, Any, Any]:
    (x, dy), answer = family.posed(case, dtype, kind)
    return x, dy, answer


def check(module: Any, case: family.FamilyCase, dtype: str, kind: str, **how: Any) -> None:
    """Right, with nothing read or written beyond the arrays, which stand among NaN."""
    x, dy, answer = operands_of(case, dtype, kind)
    guarded = [units.Guarded(array) for array in (x, dy)]
    out = units.unwritten(answer)
    computed(module, case, *(guard.array for guard in guarded), out.array, **how)
    context = f"{case.name} {dtype} {kind} {how}"
    if kind in ("narrow", "wide"):
        units.assert_exact(out.array, answer, context)
    else:
        units.assert_close(out.array, answer, context, units.limit_of(answer))
    out.check_edges(context)
    for guard in guarded:
        guard.check_whole(context)


@each
def test_agrees(module, case):
    for kind in ("normal", "wide"):
        check(module, case, "float32", kind)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("float32", 128),
        pytest.param("float32", 256, marks=pytest.mark.full),
        pytest.param("float64", None, marks=pytest.mark.full),
        pytest.param("float64", 128, marks=pytest.mark.full),
        pytest.param("float16", None, marks=pytest.mark.full),
        pytest.param("bfloat16", 256, marks=pytest.mark.full),
    ],
)
def test_any_width_and_type(dtype, bits, request):
    long = request.config.getoption("-m")
    for module, cases in ((weight_grad, DENSE), (weight_planes, PLANES)):
        # In the quick profile those of one vector of outputs, which one kernel serves.
        for case in cases if long else [case for case in cases if case.sizes[0][0] <= 4]:
            check(module, case, dtype, "normal", bits=bits)


def odd(array: np.ndarray) -> np.ndarray:
    """The same numbers at addresses that no element is aligned to."""
    size = array.dtype.itemsize
    packed = np.zeros(array.shape, np.dtype([("gap", "u1"), ("number", array.dtype)]))
    assert packed.strides[-1] == size + 1
    packed["number"] = array
    return packed["number"]


@each
def test_same_bits(module, case):
    """Whatever the number of threads, the steps of memory and the workspace."""
    x, dy, _ = operands_of(case, "float32", "normal")
    dk = computed(module, case, x, dy)
    for threads in (1, 3, 7):
        assert computed(module, case, x, dy, threads=threads).tobytes() == dk.tobytes(), threads
    least = _least(module, case, 2)
    assert computed(module, case, x, dy, limit=least).tobytes() == dk.tobytes()
    last = [np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for array in (x, dy)]
    turned = [array[:, ::-1, :, ::-1].copy()[:, ::-1, :, ::-1] for array in (x, dy)]
    apart = [np.full((*array.shape[:3], 2 * array.shape[3]), np.nan, array.dtype)[..., ::2] for array in (x, dy)]
    for to, array in zip(apart, (x, dy), strict=True):
        to[...] = array
    for images in (last, turned, apart, [odd(x), odd(dy)]):
        assert computed(module, case, *images).tobytes() == dk.tobytes()
    for axes in ((2, 3, 1, 0), (1, 0, 3, 2)):
        into = np.full([2 * dk.shape[axis] for axis in axes], np.nan, np.float32)[::2, ::-2, ::2, ::2]
        view = into.transpose(np.argsort(axes))
        assert np.array_equal(computed(module, case, x, dy, view), dk)
        assert np.isnan(into.base).sum() == into.base.size - dk.size


def _least(module: Any, case: family.FamilyCase, threads: int) -> int:
    """The least workspace with which a plan can be made, to within a thousand bytes."""
    problem = Conv2dProblem.of(case.shapes[0], case.sizes[0], op="weight_grad", **case.kwargs)
    low, high = 0, MOST
    while high - low > 1000:
        middle = (low + high) // 2
        try:
            module.plan(problem, Target("cpu", threads=threads), middle)
            high = middle
        except MemoryError:
            low = middle
    return high


def test_scratch_is_as_announced():
    for module, cases in ((weight_grad, DENSE), (weight_planes, PLANES)):
        for case in cases:
            if case.name in LONG:
                continue
            x, dy, _ = operands_of(case, "float32", "normal")
            for limit in (MOST, _least(module, case, 3)):
                problem = Conv2dProblem.of(x.shape, case.sizes[0], op="weight_grad", **case.kwargs)
                plan = module.plan(problem, Target("cpu", threads=3), limit)
                views = [request.view(problem, which, array) for which, array in enumerate((x, dy))]
                out = request.view(problem, 2, np.empty(case.sizes[0], np.float32))
                assert module.Bound(plan, *views, out).scratch <= plan.workspace <= limit


@each
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_specials_reach_the_taps_that_read_them(module, case, value):
    x, dy, _ = operands_of(case, "float32", "positive")
    for which in (0, 1) if case.kwargs.get("padding", 0) == 0 else (0,):
        given = [x.copy(), dy.copy()]
        given[which].flat[np.random.default_rng(x.size).integers(given[which].size)] = value
        answer = oracle_family.conv2d_weight(given[0], case.sizes[0], given[1], **case.kwargs)
        units.assert_close(computed(module, case, *given), answer, f"{case.name} with one {value} in {which}")


@pytest.mark.parametrize(
    ("module", "x", "k"),
    [
        (weight_grad, (1, 2, 96, 96), (8, 2, 1, 1)),
        (weight_planes, (1, 2, 96, 96), (2, 2, 1, 1)),
        pytest.param(weight_grad, (1, 2, 256, 256), (8, 2, 1, 1), marks=pytest.mark.full),
        pytest.param(weight_planes, (1, 2, 256, 256), (2, 2, 1, 1), marks=pytest.mark.full),
    ],
)
def test_long_sums_of_positive_numbers(module, x, k):
    """Sums of 9,216 and of 65,536 products, in units of an ideal sum's error."""
    rng = np.random.default_rng(5)
    case = of("long", x, k)
    image, dy = (rng.uniform(0, 1, shape).astype(np.float32) for shape in case.shapes)
    wanted = np.einsum("nohw,nchw->oc", dy.astype(np.longdouble), image.astype(np.longdouble))[..., None, None]
    found = computed(module, case, image, dy)

    def rms(array: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(array.astype(np.float64)))))

    error = rms(found - wanted) / (2.0**-24 * np.sqrt(dy[0, 0].size) * rms(image) * rms(dy))
    assert error <= 150, error


@each
def test_what_runs_is_chosen_by_the_outputs_of_a_group(module, case):
    report = gpuconv.explain(case.shapes[0], case.sizes[0], op="weight_grad", **case.kwargs)
    assert report.implementation == module.NAME


def test_refusals():
    target = Target("cpu")
    eight = Conv2dProblem.of((1, 4, 9, 9), (8, 4, 3, 3), op="weight_grad")
    assert any("at most 7 output channels" in reason for reason in weight_planes.unsupported(eight, target))
    whole = Conv2dProblem.of((1, 4, 9, 9), (8, 4, 3, 3), x_dtype="int8", k_dtype="int8", op="weight_grad")
    for module in (weight_grad, weight_planes):
        assert any("sums floating point" in reason for reason in module.unsupported(whole, target))
        with pytest.raises(MemoryError, match=r"needs at least \d+ bytes of scratch and workspace_limit is 10"):
            module.plan(Conv2dProblem.of((1, 4, 9, 9), (4, 4, 3, 3), op="weight_grad"), target, 10)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.full)])
def test_repeated_gradients(dtype, monkeypatch):
    """A call like one before is answered by its memory, with other numbers and on another number of threads."""
    gpuconv.clear()
    rng = np.random.default_rng(2)
    if dtype != "float32":
        monkeypatch.setattr(gpuconv.quick, "_MOST", 1)
    for stride, kernel_layout in ((1, "OIHW"), (2, "HWIO"), (3, "OHWI")):
        k = rng.standard_normal((9, 5, 2, 3)).astype(numpy_dtype(dtype))
        axes = {"OIHW": (0, 1, 2, 3), "HWIO": (2, 3, 1, 0), "OHWI": (0, 2, 3, 1)}[kernel_layout]
        given = np.ascontiguousarray(k.transpose(axes))
        options: dict[str, Any] = {"stride": stride, "padding": (1, 0), "kernel_layout": kernel_layout}
        for _ in range(3):
            x = rng.standard_normal((2, 5, 8, 9)).astype(k.dtype)
            dy = np.ones_like(gpuconv.conv2d(x, given, **options))
            dy *= rng.standard_normal(dy.shape)
            for call, operands in (("conv2d_input", (x.shape, given, dy)), ("conv2d_weight", (x, given.shape, dy))):
                found = getattr(gpuconv.grad, call)(*operands, **options)
                wanted = getattr(gpuconv.grad, call)(*operands, **options, backend="numpy.reference")
                assert np.allclose(found, wanted, rtol=1e-4, atol=1e-4), (call, options)
    assert gpuconv.quick._ready
