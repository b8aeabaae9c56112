"""Output channels in the lanes on the CPU: images of both layouts, dense and depthwise, with guard bands, on vectors of
any width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import units
from cases import Case

from gpuconv import problem as problems
from gpuconv import request
from gpuconv.backends import protocol
from gpuconv.backends.numba_cpu import channels, pixels, pixels_kernel, runtime
from gpuconv.backends.numba_cpu.vectors import Lanes

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

LAST = {"layout": "NHWC"}


def last(name: str, x: tuple, k: tuple, bias: bool = False, **arguments: Any) -> Case:
    return Case(name, x, k, LAST | arguments, bias)


# Outputs that are no multiple of a vector, in few panels; sums that end inside a pixel, and that go on over several.
DENSE = [
    last("in_place", (3, 5, 4, 13), (50, 13, 1, 1), True, activation="relu"),
    last("in_place_strided", (2, 7, 8, 300), (50, 300, 1, 1), stride=(3, 2)),
    last("in_place_more", (1, 9, 9, 70), (150, 70, 1, 1), True),
    last("padded_1x1", (1, 3, 4, 5), (50, 5, 1, 1), padding=1, padding_value=2),
    last("strip", (2, 9, 17, 5), (50, 5, 3, 3), True, padding=1),
    last("strip_strided", (1, 12, 40, 3), (50, 3, 7, 7), padding=((3, 2), (0, 3)), stride=2, activation="relu"),
    last("strip_dilated", (1, 13, 20, 31), (50, 31, 3, 2), padding=2, dilation=(2, 3)),
    last("strip_short_runs", (1, 6, 9, 3), (50, 3, 3, 3), padding=2, dilation=2),
    last("strip_long_rows", (1, 4, 17, 101), (50, 101, 2, 3), padding=(0, 1), padding_value=-1),
    last("grouped", (2, 6, 7, 10), (100, 5, 3, 3), True, padding=1, groups=2),
    last("taps", (3, 7, 7, 130), (50, 130, 3, 3), True, padding=1, activation="relu"),
    last("taps_strided", (1, 9, 11, 131), (50, 131, 3, 3), padding=1, stride=2),
    last("taps_dilated", (2, 6, 5, 260), (50, 260, 3, 3), padding=2, dilation=2),
    last("taps_not_zero", (1, 6, 5, 128), (50, 128, 2, 2), padding=1, padding_value=3),
    last("no_tap_for_all", (1, 2, 2, 128), (50, 128, 2, 2), padding=3),
]


def first(case: Case) -> Case:
    """The same with its channels first."""
    N, H, W, C = case.x_shape
    return Case(f"{case.name}_first", (N, C, H, W), case.k_shape, case.kwargs | {"layout": "NCHW"}, case.bias)


# Planes of fewer, of as many and of more pixels than a register has lanes, with rows that follow each other or do not.
DENSE += [*map(first, DENSE), first(last("square", (3, 4, 4, 33), (64, 33, 1, 1))),
          first(last("taps_row", (2, 1, 14, 128), (33, 128, 3, 3), padding=1))]  # fmt: skip
DEPTHWISE = [
    last("tiles", (2, 9, 16, 35), (35, 1, 3, 3), True, padding=1, groups=35, activation="relu"),
    last("one_tile", (1, 7, 7, 32), (32, 1, 3, 3), padding=1, groups=32),
    last("narrow", (2, 3, 4, 5), (5, 1, 3, 3), padding=2, groups=5),
    last("nothing_but_border", (1, 1, 1, 17), (17, 1, 3, 3), padding=((4, 3), (9, 5)), groups=17),
    last("strided", (1, 8, 31, 19), (19, 1, 3, 3), padding=((0, 1), (0, 1)), groups=19, stride=2),
    last("any_kernel", (1, 9, 17, 18), (18, 1, 2, 4), True, padding=(1, 3), groups=18, stride=(1, 3), dilation=(2, 1)),
    last("large", (1, 30, 12, 3), (3, 1, 21, 19), padding=(10, 9), groups=3),
]


def convolved(module: Any, x: Any, k: Any, bias: Any = None, out: Any = None, threads: int = 2, bits: int | None = None,
              limit: int = 1 << 28, packed: bool = False, **arguments: Any) -> np.ndarray:  # fmt: skip
    """The convolution by ``module``, on the threads and vectors of any target."""
    name = x.dtype.name
    problem = problems.Conv2dProblem.of(
        x.shape, k.shape, x_dtype=name, k_dtype=name, bias=bias is not None, **arguments
    )  # fmt: skip
    target = protocol.Target("cpu", threads=threads, vector_bits=bits)
    assert module.unsupported(problem, target) == []
    plan = module.plan(problem, target, limit)
    assert plan.workspace <= limit
    N, O, OH, OW = problem.y_shape
    shape = (N, OH, OW, O) if problem.layout == "NHWC" else (N, O, OH, OW)
    y = np.empty(shape, x.dtype) if out is None else out
    operands = protocol.Operands(request.view(problem, 0, x), request.view(problem, 1, k), bias)
    operands.packed = module.pack(plan, operands) if packed else None
    module.run(plan, operands, request.view(problem, 2, y))
    return y


def check(module: Any, case: Case, dtype: str = "float32", **how: Any) -> None:
    """Right, with nothing read or written beyond the arrays, which stand among NaN."""
    x, k, bias, answer = units.posed(case, dtype, "normal")
    guarded = [units.Guarded(array) for array in (x, k)]
    guards = units.Guarded(bias) if bias is not None else None
    out = units.unwritten(answer)
    more = None if guards is None else guards.array
    convolved(module, *(guard.array for guard in guarded), more, out.array, **how, **case.kwargs)
    units.assert_close(out.array, answer, f"{case.name} {dtype}", units.limit_of(answer))
    out.check_edges(case.name)
    for guard in (*guarded, *([] if guards is None else [guards])):
        guard.check_whole(case.name)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_dense(case):
    check(pixels, case)


@pytest.mark.parametrize("case", DEPTHWISE, ids=lambda case: case.name)
def test_depthwise(case):
    check(channels, case)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("float32", 256),
        ("float32", 128),
        ("float64", None),
        pytest.param("float16", None, marks=pytest.mark.full),  # compiles for too long
    ],
)
def test_other_vectors(dtype, bits):
    few = dtype == "float16" or bits == 128
    for case in DENSE[1 :: 6 if few else 2]:
        check(pixels, case, dtype, bits=bits, threads=1)
    for case in DEPTHWISE[:: 6 if few else 1]:
        if dtype == "float32" or case.k_shape[2:] == (3, 3):
            check(channels, case, dtype, bits=bits, threads=1)


@pytest.mark.parametrize(("module", "case"), [(pixels, c) for c in DENSE] + [(channels, c) for c in DEPTHWISE])
def test_same_bits(module, case):
    """Whatever the number of images and threads, the steps of memory, the workspace, and who packs the weights."""
    x, k, bias, _ = units.posed(case, "float32", "normal")
    y = convolved(module, x, k, bias, **case.kwargs)
    assert convolved(module, x[-1:], k, bias, **case.kwargs).tobytes() == y[-1:].tobytes()
    for threads in (1, 3):
        assert convolved(module, x, k, bias, threads=threads, packed=True, **case.kwargs).tobytes() == y.tobytes()
    apart = np.full((*x.shape[:3], 2 * x.shape[3] + 1), np.nan, x.dtype)[:, ::-1, :, 1::2]
    apart[...] = x
    into = np.full((*y.shape[:3], 3 * y.shape[3]), np.nan, x.dtype)[..., ::3]
    other = np.ascontiguousarray(x.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    turned = np.ascontiguousarray(k.transpose(2, 3, 1, 0)).transpose(3, 2, 0, 1)
    assert np.array_equal(convolved(module, apart, turned, bias, into, **case.kwargs), y)
    assert np.isnan(into.base[..., 1::3]).all()
    assert convolved(module, other, k, bias, **case.kwargs).tobytes() == y.tobytes()
    least = _least(module, case)
    assert convolved(module, x, k, bias, limit=least, **case.kwargs).tobytes() == y.tobytes()


def _least(module: Any, case: Case) -> int:
    """The least workspace with which a plan can be made, to within a thousand bytes."""
    arguments = {"bias": case.bias, **case.kwargs}
    problem = problems.Conv2dProblem.of(case.x_shape, case.k_shape, **arguments)
    low, high = 0, 1 << 28
    while high - low > 1000:
        middle = (low + high) // 2
        try:
            module.plan(problem, protocol.Target("cpu", threads=2), middle)
            high = middle
        except MemoryError:
            low = middle
    return high


@pytest.mark.parametrize(("module", "case"), [(pixels, c) for c in DENSE] + [(channels, c) for c in DEPTHWISE])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_specials_reach_the_windows_that_read_them(module, case, value):
    x, k, bias = units.cases.fill(case, "float32", "positive", seed=1)
    x.flat[np.random.default_rng(x.size).integers(x.size)] = value
    answer = oracle.answer(x, k, bias, **case.kwargs)
    units.assert_close(convolved(module, x, k, bias, **case.kwargs), answer, f"{case.name} with one {value}")


def test_input_gradient():
    """Steps of the result over which the kernels write with holes between."""
    from gpuconv import grad

    rng = np.random.default_rng(3)
    for module, groups in ((pixels, 1), (channels, 50)):
        problem = problems.Conv2dProblem.of(
            (2, 9, 10, 50), (50, 50 // groups, 3, 3), stride=2, padding=1, groups=groups, op="input_grad", **LAST
        )  # fmt: skip
        dy = rng.standard_normal((2, problem.OH, problem.OW, 50)).astype(np.float32)
        k = rng.standard_normal((50, 50 // groups, 3, 3)).astype(np.float32)
        plan = module.plan(problem, protocol.Target("cpu", threads=2), 1 << 28)
        dx = np.full((2, 9, 10, 50), np.nan, np.float32)
        operands = protocol.Operands(request.view(problem, 0, dy), request.view(problem, 1, k))
        module.run(plan, operands, request.view(problem, 2, dx))
        wanted = grad.conv2d_input(
            (2, 50, 9, 10), k.astype(np.float64), dy.transpose(0, 3, 1, 2).astype(np.float64), 2, 1, 1, groups
        )  # fmt: skip
        assert np.abs(dx.transpose(0, 3, 1, 2) - wanted).max() < 1e-4


def test_refusals():
    target = protocol.Target("cpu")
    depthwise = problems.Conv2dProblem.of((1, 8, 9, 9), (8, 1, 3, 3), groups=8)
    assert any("NHWC" in reason for reason in channels.unsupported(depthwise, target))
    reflecting = problems.Conv2dProblem.of(
        (1, 9, 9, 8), (8, 1, 3, 3), padding=1, padding_mode="reflect", groups=8, **LAST
    )
    for module in (pixels, channels):
        assert any("pads with" in reason for reason in module.unsupported(reflecting, target))


def test_weights_of_any_order_in_memory_are_packed_alike():
    lanes = Lanes.of("float32", runtime.vector_bits())
    shape = (2, 2 * lanes.count + 3, 41, 3, 2)  # a whole panel, or two, and part of one; more channels than a task has
    plain = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    orders = {
        "outputs side by side": (0, 2, 3, 4, 1),
        "an input gradient's": (0, 2, 1, 3, 4),
        "groups last": (4, 3, 2, 1, 0),
    }
    forms = {
        name: np.ascontiguousarray(plain.transpose(axes)).transpose(np.argsort(axes)) for name, axes in orders.items()
    }
    turned = np.ascontiguousarray(plain.swapaxes(1, 2)[..., ::-1, ::-1])
    forms["an input gradient's, turned"] = turned[..., ::-1, ::-1].swapaxes(1, 2)
    phase = np.full((2, 41, shape[1], 6, 5), np.nan, np.float32)
    forms["every second tap, backwards"] = phase[..., 5::-2, 3::-2].swapaxes(1, 2)
    forms["every second tap, backwards"][...] = plain
    forms["between elements"] = np.zeros(shape, [("_", "i1"), ("k", "f4")])["k"]
    forms["between elements"][...] = plain
    for vectors in pixels_kernel.PIXELS[lanes.bits]:
        packed = {
            (name, threads): pixels_kernel.Packing(k, lanes, vectors, threads)(k).tobytes()
            for name, k in {"plain": plain, **forms}.items()
            for threads in (1, 2)
        }
        wanted = packed["plain", 1]
        assert [key for key, value in packed.items() if value != wanted] == []


@pytest.mark.parametrize(("N", "plane", "threads", "pixels_at_once"), [(2, 14, 2, 196), (8, 7, 2, 196), (8, 7, 1, 392),
                                                                       (32, 7, 2, 392), (4, 8, 8, 64)])  # fmt: skip
def test_small_images_are_shared_out_over_the_threads(N, plane, threads, pixels_at_once):
    """However many of them fit a unit of work."""
    problem = problems.Conv2dProblem.of(
        (N, 128, plane, plane), (64, 128, 3, 3), x_dtype="float32", k_dtype="float32", padding=1
    )
    plan = pixels.plan(problem, protocol.Target("cpu", threads=threads), 1 << 28)
    assert f"tap by tap, {pixels_at_once} pixels at a time" in plan.detail


def test_threads_have_as_many_strips(monkeypatch):
    """Seven strips of four rows would leave one of two threads idle for an eighth of the time."""
    monkeypatch.setattr(runtime, "l2_bytes", lambda: 1 << 19)
    problem = problems.Conv2dProblem.of(
        (1, 128, 56, 56), (128, 128, 3, 3), x_dtype="float32", k_dtype="float32", padding=1, stride=2
    )
    plan = pixels.plan(problem, protocol.Target("cpu", threads=2, vector_bits=256), 1 << 28)
    assert f"strips, {2 * 28} pixels at a time" in plan.detail


def test_strips_of_a_long_image_are_soon_chosen(monkeypatch):
    """Of a million rows of a pixel a strip has tens of thousands: comparing all heights took a quarter of a second."""
    asked, longest = [], pixels._longest
    monkeypatch.setattr(pixels, "_longest", lambda *given: asked.append(given) or longest(*given))
    problem = problems.Conv2dProblem.of(
        (1, 1, 10**6, 1), (16, 1, 3, 1), x_dtype="float32", k_dtype="float32", padding=(1, 0)
    )
    pixels.plan(problem, protocol.Target("cpu", threads=2, vector_bits=256), 1 << 28)
    assert 1 < len(asked) <= 100
