"""Beyond 2^31 elements, bytes and products, and beyond 65,535 blocks: what 32 bits and a grid's axes do not hold.

Where an array is larger than memory, only corners of it are read: it is a view of one number, or memory that nobody
touched and the operating system therefore never handed out. Kernels of a GPU are checked by the integers they are
given and by the types they compute with; on a GPU with room for it, everything is computed.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import cases
import numpy as np
import pytest
import units
from hypothesis import given
from hypothesis import strategies as st
from running import (
    FORWARD,
    SERVE_EVERYTHING,
    SIMULATED,
    SIMULATOR_MARKS,
    every_implementation,
    gpu_arrays,
    home,
    runner,
    skip_in_simulator,
    skip_unless_usable,
)

import gpuconv
from gpuconv import Conv2dProblem, dispatch, explain, geometry, schedule
from gpuconv.backends import cupy_gemm, gemm
from gpuconv.backends.numba_cuda import launch
from gpuconv.backends.protocol import Target

pytestmark = SIMULATOR_MARKS

LIMIT = 2**31
GEMMS = [name for name in FORWARD if name.endswith(".gemm")]


def target(name: str) -> Target:
    return Target("cuda", 0) if dispatch.DEVICES[dispatch.library_of(name)] == "cuda" else Target("cpu")


def broadcast(value: float, shape: tuple[int, ...], xp: Any) -> Any:
    return xp.broadcast_to(xp.asarray(np.float32(value)), shape)


# ---- more blocks than a grid's axis holds


@every_implementation
def test_batches_and_channels_of_70000(name):
    """y and z of a grid end at 65,535 blocks."""
    skip_in_simulator(name)
    run = runner(name)
    x = np.arange(70_000, dtype=np.float32)
    k = np.full((1, 1, 1, 1), 2, np.float32)
    assert np.array_equal(units.to_host(run(x.reshape(-1, 1, 1, 1), k)).ravel(), 2 * x)
    y = run(x.reshape(1, -1, 1, 1), np.broadcast_to(k, (70_000, 1, 1, 1)), groups=70_000)
    assert np.array_equal(units.to_host(y).ravel(), 2 * x)
    y = run(x.reshape(7, -1, 1, 1), np.broadcast_to(k, (10_000, 1, 1, 1)), groups=10_000)
    assert np.array_equal(units.to_host(y).ravel(), 2 * x)
    y = run(x[:1].reshape(1, 1, 1, 1) + 3, x.reshape(-1, 1, 1, 1))
    assert np.array_equal(units.to_host(y).ravel(), 3 * x)
    y = run(x.reshape(1, 1, -1, 1), np.ones((1, 1, 1, 3), np.float32), padding=((0, 0), (1, 1)))
    assert np.array_equal(units.to_host(y).ravel(), x)


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("case", ["stride_tail", "depthwise_multiplier", "rank_2_filters"])
@pytest.mark.parametrize("name", [name for name in FORWARD if name.startswith("numba_cuda")])
def test_a_block_takes_another_tile_where_the_grid_ends(name, case, blocks, monkeypatch):
    """As beyond 2^31 - 1 tiles, with a grid that ends sooner."""
    run = runner(name)
    monkeypatch.setattr(launch, "MAX_GRID_X", blocks)
    units.check(run, cases.BY_NAME[case], "float32", "wide", into=True)


# ---- sizes: Python's integers, which have no end

GIANT = Conv2dProblem.of((4096, 64, 65_536, 65_536), (64, 64, 3, 3), padding=1)


def test_sizes_are_exact():
    assert math.prod(GIANT.y_shape) == 2**50
    assert GIANT.products == 9 * 2**6
    assert GIANT.flops == 2 * 2**50 * 9 * 2**6
    assert GIANT.bytes == 4 * (2 * 2**50 + 9 * 2**12)
    view = np.broadcast_to(np.float32(1), GIANT.x_shape)
    assert explain(view, np.broadcast_to(np.float32(1), GIANT.k_shape), padding=1).flops == GIANT.flops
    report = explain((1, 1, 2**40, 2**70), (1, 1, 1, 1), padding=2**31 - 1)
    assert report.output_shape == (1, 1, 2**40 + 2**32 - 2, 2**70 + 2**32 - 2)


@pytest.mark.parametrize("name", FORWARD)
def test_plans_of_giants_stay_inside_the_workspace(name):
    """The columns have 2^59 elements and more: taken modulo 2^32 they would seem to fit in one piece."""
    module = dispatch.implementation(name)
    refusals = module.unsupported(GIANT, target(name))
    if refusals and name not in SERVE_EVERYTHING:
        pytest.skip("; ".join(refusals))
    assert not refusals
    plan = module.plan(GIANT, target(name), schedule.DEFAULT_WORKSPACE)
    assert 0 < plan.workspace <= schedule.DEFAULT_WORKSPACE
    if name in GEMMS:
        assert math.prod(plan.config["block"]) * GIANT.products * 4 <= schedule.DEFAULT_WORKSPACE


def test_a_result_beyond_any_address_space_is_a_memory_error():
    x = np.broadcast_to(np.float32(1), (2**20, 1, 1, 2**20))
    with pytest.raises(MemoryError, match=f"{4 * 2**60 * (2**32 - 1)} bytes"):
        gpuconv.conv2d(x, np.broadcast_to(np.float32(1), (2**20, 1, 1, 1)), padding=((2**31 - 1, 2**31 - 1), (0, 0)))


# ---- columns of 2^31 elements and more, and what a BLAS takes

far = st.integers(1, 9) | st.integers(1, 2**40)


@pytest.mark.parametrize("name", GEMMS)
@given(
    extents=st.tuples(far, far, far, far), channels=st.tuples(*[st.integers(1, 2**33)] * 2), stride=st.integers(1, 9)
)
def test_every_matrix_dimension_is_below_2_to_the_31(name, extents, channels, stride):
    """BLAS takes C ints: a dimension of 2^31 + 5 would be five."""
    N, groups, H, W = extents
    I, O = channels
    problem = Conv2dProblem.of((N, groups * I, H, W), (groups * O, I, 1, 1), groups=groups, stride=stride)
    module = dispatch.implementation(name)
    refusals = module.unsupported(problem, target(name))
    if max(I, O) >= LIMIT:
        assert any("2**31" in reason for reason in refusals)
        return
    assert not refusals
    n, g, rows, columns = module.plan(problem, target(name), 2**200).config["block"]
    assert n * g < LIMIT, "the number of matrices"
    assert rows * columns < LIMIT, "the columns of each"


MERGED = cases.Case("images merged into one matrix", (3, 2, 3, 4), (5, 4, 1, 1), {"layout": "NHWC"})
CUT = [
    (MERGED, 8),
    *((cases.BY_NAME[name], most) for name, most in (("batch", 8), ("one_by_one", 8), ("one_by_one_stride_batch", 5))),
]


@pytest.mark.parametrize(("case", "most"), CUT, ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("name", GEMMS)
def test_where_a_matrix_would_be_too_wide_it_is_cut(name, case, most, monkeypatch):
    """With a BLAS that takes no dimension above ``most``, instead of 2^31 - 1; out is full of NaN before."""
    run, module, seen = runner(name), dispatch.implementation(name), []
    multiply = module.gemm

    def noting(problem: Any, a: Any, b: Any, out: Any) -> None:
        seen.append(max(*out.shape[2:], *a.shape[2:]))
        multiply(problem, a, b, out)

    monkeypatch.setattr(module, "gemm", noting)
    for limit in (gemm.BLAS_LIMIT, most):
        monkeypatch.setattr(gemm, "BLAS_LIMIT", limit)
        gpuconv.clear()
        seen.clear()
        units.check(run, case, "float32", "wide", into=True)
        assert (max(seen) <= most) == (limit == most), seen
    gpuconv.clear()


def giant_view(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An array of any size, in elements; nothing of it may be read."""
    item = np.dtype(dtype).itemsize
    return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, [item * step for step in strides])


def test_what_cublas_is_told_fits_a_c_int():
    """Dimensions, leading dimensions and counts are C ints; the steps from matrix to matrix are not."""
    M, K, P = 3, 5, LIMIT - 1
    a = giant_view((2, M, K), (M * K, K, 1))
    b = giant_view((4, 2, K, P), (2 * K * P, K * P, P, 1))
    out = giant_view((4, 2, M, P), (2 * M * P, M * P, P, 1))
    calls = list(cupy_gemm.gemm_calls("highest", a, b, out))
    assert len(calls) == 2
    for _, _, m, n, k, _, _, _, lda, a_step, _, _, ldb, _, _, _, _, ldc, c_step, count, _, _ in calls:
        assert (m, n, k, count) == (P, M, K, 4)
        assert max(m, n, k, lda, ldb, ldc, count) < LIMIT
        assert (a_step, c_step) == (2 * K * P, 2 * M * P)
    assert gemm.blas_layout((3, LIMIT), (LIMIT, 1)) is None, "a leading dimension that is no C int"
    merged = gemm._merge_images(giant_view((2, 1, 4, 2**30), (4 * 2**30, 1, 1, 4)))
    assert merged is None, "2^31 columns in one matrix"


@pytest.mark.full
@every_implementation
def test_columns_of_more_than_2_to_the_31_elements(name):
    """im2col of this image has 2.3e9. Small integers, so that the window sums are exact; out is full of NaN before."""
    skip_in_simulator(name)
    run, side, window, channels = runner(name), 1200, 5, 64
    x = np.random.default_rng(5).integers(0, 4, (1, channels, side, side), np.uint8).astype(np.float32)
    sums = np.zeros((side + 1, side + 1), np.int64)
    sums[1:, 1:] = x[0].sum(axis=0, dtype=np.int64).cumsum(0).cumsum(1)
    wanted = sums[window:, window:] - sums[:-window, window:] - sums[window:, :-window] + sums[:-window, :-window]
    out = np.full((1, 1, *wanted.shape), np.nan, np.float32)
    assert channels * window**2 * wanted.size > LIMIT
    run(x, np.ones((1, channels, window, window), np.float32), out=out)
    assert np.array_equal(out[0, 0], wanted)


# ---- operands of more than 2^31 elements


@every_implementation
def test_views_of_one_number_beyond_2_to_the_31_elements(name):
    skip_in_simulator(name)
    run, xp, ones = runner(name), home(name), np.ones((1, 1, 3, 3), np.float32)
    if xp is np and dispatch.DEVICES[dispatch.library_of(name)] == "cuda":
        pytest.skip("a host array is uploaded whole, and nothing here has room for it")
    square = broadcast(2, (1, 1, 70_000, 70_000), xp)
    assert np.all(units.to_host(run(square, ones[..., :1, :1], stride=2**16)) == np.full((1, 1, 2, 2), 2, np.float32))
    assert units.to_host(run(square, ones, dilation=34_999, stride=2**31 - 1)).tolist() == [[[[18]]]]
    assert units.to_host(run(square, ones, dilation=34_999, padding=1, stride=3)).tolist() == [[[[8] * 2] * 2]]
    images = broadcast(3, (3, 2, 40_000, 40_000), xp)
    assert np.all(units.to_host(run(images, np.ones((5, 2, 1, 1), np.float32), stride=39_999)) == 6)
    kernel = broadcast(1, (1, 1, 1, 1), xp)
    wide = broadcast(4, (1, 1, 2, 2**33), xp)
    assert np.all(units.to_host(run(wide, kernel, stride=(1, 2**31 - 1))) == np.full((1, 1, 2, 5), 4, np.float32))
    assert np.all(units.to_host(run(wide, kernel, stride=(1, 2**31 - 1), padding=2, padding_mode="wrap")) == 4)


def untouched(shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.zeros(shape, np.int8)
    except MemoryError:
        pytest.skip("no address space for 2^31 bytes")


@every_implementation
def test_elements_beyond_2_to_the_31_of_real_memory(name):
    """Numbers at the corners of memory that is otherwise never touched, from both ends and in every order of axes."""
    skip_in_simulator(name)
    run = runner(name)
    rows, columns = 2**16, 2**15 + 8
    x = untouched((1, 1, rows, columns))
    corners = np.array([[3, -5], [7, 11]])
    x[0, 0, :: rows - 1, :: columns - 1] = corners
    assert x.size > LIMIT
    k = np.array([[1, 10], [100, -1]], np.int8)
    for view, seen in (
        (x, corners),
        (x[:, :, ::-1], corners[::-1]),
        (x[:, :, ::-1, ::-1], corners[::-1, ::-1]),
        (x.transpose(0, 1, 3, 2), corners.T),
        (x.transpose(1, 0, 3, 2)[..., ::-1], corners.T[:, ::-1]),
    ):
        steps = tuple(n - 1 for n in view.shape[2:])
        y = units.to_host(run(view, k[None, None], dilation=steps))
        assert y.tolist() == [[[[int((seen * k).sum())]]]]
        y = units.to_host(run(view, np.full((1, 1, 1, 1), 2, np.int8), stride=steps))
        assert y.tolist() == [[(2 * seen).tolist()]]
        y = units.to_host(run(view, k[None, None], dilation=steps, padding="same", padding_mode="wrap", stride=steps))
        assert y.shape == (1, 1, 2, 2)
    channels = x.reshape(1, 2**9, 2**7, columns)  # the same memory as 512 channels
    y = units.to_host(run(channels, np.ones((1, 2**9, 1, 1), np.int8), stride=(2**7 - 1, columns - 1)))
    assert y.tolist() == [[[[3, -5], [7, 11]]]]
    images = x.reshape(2**9, 1, 2**7, columns)
    y = units.to_host(run(images, np.ones((1, 1, 1, 1), np.int8), stride=(2**7 - 1, columns - 1)))
    assert y[[0, -1], 0].tolist() == [[[3, -5], [0, 0]], [[0, 0], [7, 11]]]


# ---- what kernels on a GPU are given, and what they compute with


class OnGpu:
    """As much of a CuPy array as its memory's layout, at an address where nothing is."""

    def __init__(self, like: np.ndarray, address: int = 2**40) -> None:
        self.shape, self.strides, self.dtype = like.shape, like.strides, like.dtype
        self.size, self.itemsize, self.ndim = like.size, like.itemsize, like.ndim
        self.data = SimpleNamespace(ptr=address)


@pytest.mark.skipif(SIMULATED, reason="the simulator has no arrays on a GPU")
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=4)), ids=str)
def test_flat_operands_reach_beyond_2_to_the_31(signs, monkeypatch):
    numba_cuda = pytest.importorskip("numba.cuda", reason="numba-cuda is not installed")
    monkeypatch.setattr(numba_cuda, "as_cuda_array", lambda span, sync: span)
    shape, item = (3, 2, 70_000, 70_000), 4
    steps = [sign * step for sign, step in zip(signs, (2 * 70_000**2, 70_000**2, 70_000, 1), strict=True)]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)):
        array = OnGpu(giant_view(shape, tuple(steps)).transpose(order))
        flat = launch.flat(array)
        span = flat.vector.__cuda_array_interface__
        low, count = span["data"][0], span["shape"][0]
        assert count == math.prod(shape) > LIMIT, "as long as the memory"
        for corner in itertools.product(*[(0, n - 1) for n in array.shape]):
            address = array.data.ptr + sum(i * step for i, step in zip(corner, array.strides, strict=True))
            index = flat.offset + sum(i * step for i, step in zip(corner, flat.strides, strict=True))
            assert low + index * item == address
            assert 0 <= index < count, "outside of the memory"
        from numba import int64, typeof

        assert {typeof(argument) for argument in flat.arguments()[1:]} == {int64}
    single = launch.flat(OnGpu(giant_view(shape, (0, 0, 0, 0))))
    assert (single.offset, single.strides) == (0, (0, 0, 0, 0))
    assert single.vector.__cuda_array_interface__["shape"] == (1,), "a broadcast number is one element"


@pytest.mark.parametrize("channels_last", [False, True])
def test_im2col_facts_reach_beyond_2_to_the_31(channels_last):
    """The kernel's own walk, in Python's integers, arrives at the elements that the strides say."""
    H = W = 70_000
    n, g, C, KH, KW, OH, OW = 3, 2, 5, 2, 3, 69_999, 69_998
    x = giant_view((n, g, C, H, W), (g * C * H * W, C * H * W, H * W, W, 1))[..., ::-1]
    shape = (n, g, OH, OW, KH, KW, C) if channels_last else (n, g, C, KH, KW, OH, OW)
    steps = tuple(math.prod(shape[axis + 1 :]) for axis in range(7))
    out = giant_view(shape, steps)
    out = out.transpose(0, 1, 6, 4, 5, 2, 3) if channels_last else out
    rows, columns = (geometry.IndexTable(np.zeros(0, np.int64), 1, 1) for _ in range(2))
    facts = [int(fact) for fact in cupy_gemm.im2col_facts(x, rows, columns, slice(7, 7 + OH), slice(9, 9 + OW), out)]
    extents, out_step, n_step, i_step, j_step = (facts[5 * i : 5 * i + 5] for i in range(5))
    p_step, q_step, row_inner, column_inner, row_step, column_step, first_row, first_column = facts[27:35]
    assert facts[25:27] == [KH, KW]
    total = out.size // (KH * KW)
    assert math.prod(extents) == total > LIMIT
    rng = np.random.default_rng(1)
    seen = set()
    for t in [0, 1, total // 2, total - 1, *map(int, rng.integers(total, size=50))]:
        rest, to, source, row, column = t, 0, 0, first_row, first_column
        for axis in range(4, -1, -1):
            rest, index = divmod(rest, extents[axis])
            to, source = to + index * out_step[axis], source + index * n_step[axis]
            row, column = row + index * i_step[axis], column + index * j_step[axis]
        for p, q in itertools.product(range(KH), range(KW)):
            at = to + p * p_step + q * q_step
            i, j = row - 7, column - 9
            # which image, group and channel: by out's memory, undone digit by digit
            digits = (at // step % extent for step, extent in zip(steps, shape, strict=True))
            place = dict(zip("ngijpqc" if channels_last else "ngcpqij", digits, strict=True))
            assert (place["i"], place["j"], place["p"], place["q"]) == (i, j, p, q)
            where = (place["n"], place["g"], place["c"], row + p * row_inner, column + q * column_inner)
            wanted = sum(index * step // 4 for index, step in zip(where, x.strides, strict=True))
            assert source + where[3] * row_step + where[4] * column_step == wanted
            seen.add(wanted)
    assert max(map(abs, seen)) > LIMIT


# ---- computed, where there is room


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FORWARD if not name.startswith("numpy")])
def test_an_array_of_more_than_2_to_the_31_elements_on_a_gpu(name):
    skip_unless_usable(name)
    xp = gpu_arrays()
    if xp.cuda.Device().mem_info[0] < 24 * 2**30:
        pytest.skip("takes 24 GiB of free GPU memory")
    H, W = 2**16, 2**15 + 3
    x = xp.empty((1, 1, H, W), np.float16)
    for top in range(0, H, 4096):
        row, column = xp.arange(top, top + 4096)[:, None], xp.arange(W)
        x[0, 0, top : top + 4096] = (row * 31 + column * 17 + row // 8192) % 5
    k = np.array([[1, -2, 3], [0, 4, -1], [2, 1, -3]], np.float16)[None, None]
    out = xp.full((1, 1, H - 2, W - 2), np.nan, np.float16)
    assert min(x.size, out.size) > LIMIT
    gpuconv.conv2d(x, xp.asarray(k), out=out, backend=name)
    for top in range(0, H - 2, 4096):
        rows = min(4096, H - 2 - top)
        wanted = sum(
            int(k[0, 0, p, q]) * x[0, 0, top + p : top + p + rows, q : q + W - 2].astype(np.float32)
            for p, q in itertools.product(range(3), range(3))
        )
        assert bool((out[0, 0, top : top + rows] == wanted).all()), f"rows from {top}"
    del x, out, wanted
    gpuconv.clear()
