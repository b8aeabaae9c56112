"""``numba_cuda.implicit_gemm`` in Numba's simulator: its index arithmetic, and its kernel at every tile's edges.

``test_implicit_gemm.py`` starts this file in a process of its own, because Numba decides on import whether CUDA is
simulated.
"""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import units
from hypothesis import given
from hypothesis import strategies as st
from running import SIMULATED, SIMULATOR_MARKS

if not SIMULATED:
    pytest.skip("runs in the simulator's own process", allow_module_level=True)

import simulated_warp

import gpuconv
from gpuconv import dispatch
from gpuconv.backends.numba_cuda import (
    cost,
    direct,
    gathers,
    implicit_gemm,
    implicit_gemm_run,
    launch,
    panels,
    tiles,
    uploads,
)
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.implicit_gemm"
pytestmark = SIMULATOR_MARKS
EVERY_TILE = [(dtype, tile) for dtype, found in tiles.TILES.items() for tile in found]


# ---- index arithmetic


@pytest.mark.parametrize(("dtype", "tile"), EVERY_TILE, ids=str)
def test_every_element_of_a_slice_is_loaded_once(dtype, tile):
    loads = tile.depth * tile.pixels // tile.threads
    for name, maker in gathers.MAKERS.items():
        reader = maker(tile.pixels, tile.threads, tile.depth, dtype)
        found = {(reader.product(t, load), reader.pixel(t)) for t in range(tile.threads) for load in range(loads)}
        assert found == set(itertools.product(range(tile.depth), range(tile.pixels))), name


@pytest.mark.parametrize("name", [NAME, "numba_cuda.direct"])
def test_the_last_block_of_the_largest_grid_has_its_own_place(name, monkeypatch):
    """Of 2^31 - 1 blocks, whose pixels and elements no 32 bits count."""
    simulated_warp.only_the_last_block(monkeypatch)
    x, k = np.random.default_rng(3).integers(-3, 4, (2, 8)).astype(np.float32)
    k = np.stack([k] * 8)
    pixels = tiles.SMALL.pixels if name == NAME else direct.FEW_OUTPUTS.pixels
    problem = Conv2dProblem(launch.MAX_GRID_X * pixels, 8, 1, 1, 8, 1, 1)
    y = np.full(pixels * 8 + 8, 7, np.float32)
    first = (problem.N - pixels) * 8
    x_view, k_view = Flat(x, 0, (0, 0, 1, 0, 0)), Flat(k.reshape(-1), 0, (0, 8, 1, 0, 0))
    y_view, bias = Flat(y, -first, (8, 8, 1, 8, 8)), np.zeros(8, np.float32)
    if name == NAME:
        ways = [cost.Candidate(tiles.SMALL, 1, 0.0)]
        (cut,) = implicit_gemm.plan(problem, Target("cuda", 0), 2**62, ways).config["launches"]
        pack, multiply = implicit_gemm_run.steps(cut, x_view, k_view, y_view, bias, False, x, 0)
        assert (cut.images, multiply.grid) == (problem.N, launch.MAX_GRID_X)
        pack.run(0)
        multiply.run(0)
    else:
        (part,), (tile,) = direct.plan(problem, Target("cuda", 0), 2**62).config.values()
        assert tile is direct.FEW_OUTPUTS and direct.blocks(problem, tile, problem.N) == launch.MAX_GRID_X
        tables = uploads.index_tables(problem, x, 0)
        direct._launch(part, tile, 0, (x_view, k_view, y_view), bias, False, tables, bias)
    assert (y[:-8].reshape(pixels, 8) == x @ k.T).all() and (y[-8:] == 7).all()


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 5), st.integers(0, 30))
def test_panels_hold_every_weight_once(C, KH, KW, first):
    """Whatever the order: (p, q, c) with slices of one tap, or (c, p, q); from any slice on."""
    O, outputs, depth = 5, 4, 8
    k = np.arange(1, O * C * KH * KW + 1, dtype=np.float32).reshape(O, C, KH, KW)
    for by_tap in (True, False):
        slices = KH * KW * -(-C // depth) if by_tap else -(-C * KH * KW // depth)
        start = first % max(slices, 1)
        slots = max(slices - start, 1) * depth
        made = np.full(2 * slots * outputs, np.nan, np.float32)
        strides = [0, *(step // 4 for step in k.strides)]
        body = launch.jit(panels.build("float32", outputs, depth, by_tap))
        body[1, 32](
            k.ravel() if k.size else np.zeros(1, np.float32), 0, *strides, made, start * depth, slots, C, O, KH, KW, 1,
            1, 0,
        )  # fmt: skip
        wanted = np.zeros((slices * depth + slots, O), np.float32)
        for slot, (c, p, q) in enumerate(itertools.product(range(C), range(KH), range(KW))):
            at = ((p * KW + q) * -(-C // depth) * depth + c) if by_tap else slot
            wanted[at] = k[:, c, p, q]
        seen = made.reshape(2, slots, outputs).transpose(1, 0, 2).reshape(slots, -1)
        assert np.array_equal(seen[:, :O], wanted[start * depth :][:slots])
        assert not seen[:, O:].any()


# ---- the kernel at its tiles' edges


def run(x: np.ndarray, k: np.ndarray, bias: np.ndarray | None = None, **kwargs: object) -> np.ndarray:
    return gpuconv.conv2d(x, k, bias, backend=NAME, **kwargs)


@pytest.fixture
def forced(monkeypatch):
    """Make every plan use one tile, and cut sums into so many parts."""

    def force(tile: tiles.Tile, parts: int = 1) -> None:
        monkeypatch.setattr(cost, "configurations", lambda work, *rest: [only(work, tile, parts)])
        dispatch.choose.cache_clear()

    def only(work: cost.Work, tile: tiles.Tile, parts: int) -> cost.Candidate:
        return cost.Candidate(tile, cost.whole(work.slices, parts), 0.0)

    yield force
    dispatch.choose.cache_clear()


def check(dtype: str, N: int, C: int, O: int, H: int, W: int, layout: str, **kwargs: object) -> None:
    """Against the oracle, on poisoned memory."""
    rng = np.random.default_rng(N + C + O + H + W)
    x, k = (rng.standard_normal(shape).astype(dtype) for shape in ((N, C, H, W), (O, C, 3, 3)))
    bias = rng.standard_normal(O).astype(dtype)
    if layout == "NHWC":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    kwargs = {"padding": 1, "layout": layout, "activation": "relu", **kwargs}
    answer = oracle.answer(x, k, bias, **kwargs)
    out = units.unwritten(answer)
    run(x, k, bias, out=out.array, **kwargs)
    out.check_edges(layout)
    units.assert_close(out.array, answer, f"{O} outputs, {N}×{H}×{W} pixels", units.limit_of(answer))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("outputs", "H", "W"), [(15, 1, 31), (16, 4, 8), (17, 3, 11), (16, 3, 11), (15, 4, 8), (17, 1, 31)]
)
def test_small_tile_at_its_edges(forced, outputs, H, W, layout):
    """16 × 32: one less, exactly one, and one more of each extent; the channels of one slice, one less and one more."""
    forced(tiles.SMALL)
    for C in (7, 8, 9) if (H, outputs) == (4, 16) else (8,):
        check("float32", 1, C, outputs, H, W, layout)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("dtype", "tile"), EVERY_TILE, ids=str)
def test_every_tile_one_beyond_its_edges(forced, dtype, tile, layout):
    """Two tiles each way, of which the second are nearly empty; channels last in whole vectors and not."""
    forced(tile)
    check(
        dtype,
        1,
        8 if layout == "NHWC" else 3,
        tile.outputs + (4 if layout == "NHWC" else 1),
        3,
        tile.pixels // 3 + 1,
        layout,
    )


@pytest.mark.parametrize("parts", [2, 3, 100])
@pytest.mark.parametrize("channels", [8, 3])
def test_sums_in_parts(forced, parts, channels):
    """Also with fewer slices than parts were asked for, and with planes that are no whole vectors (5×5)."""
    forced(tiles.SMALL, parts)
    for layout in ("NCHW", "NHWC"):
        check("float32", 2, channels, 5, 5, 5, layout)


def test_parts_and_images_in_turn_give_the_same_bits(forced):
    """Too little workspace for all partial sums: some images at a time."""
    forced(tiles.SMALL, 4)
    rng = np.random.default_rng(2)
    x, k = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8, 4, 5), (5, 8, 3, 3)))
    plain = run(x, k)
    found = set()
    for limit in (1000, 2300, 3200, 5600, 9000):
        if limit == 1000:
            with pytest.raises(MemoryError, match="needs 2108 bytes"):
                run(x, k, workspace_limit=limit)
            continue
        y = run(x, k, workspace_limit=limit)
        (cut,) = gpuconv.explain(x, k, backend=NAME, workspace_limit=limit).plan.config["launches"]
        found.add((cut.images, cut.parts_packed))
        assert y.tobytes() == plain.tobytes(), limit
    assert found == {(1, 1), (3, 1), (1, 3), (3, 3)}


@pytest.mark.parametrize("parts", [1, 3])
def test_weight_gradient_in_parts(forced, parts, monkeypatch):
    forced(tiles.SMALL, parts)
    rng = np.random.default_rng(3)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 6, 7), (3, 6, 3, 3)))
    options = {"stride": 2, "padding": (1, 0), "groups": 2}
    wanted = gpuconv.grad.conv2d_weight(
        x.astype(float), (6, 2, 3, 3), dy.astype(float), **options, backend="numpy.reference"
    )
    for layout_of in (lambda a: a, lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)):
        found = gpuconv.grad.conv2d_weight(layout_of(x), (6, 2, 3, 3), layout_of(dy), **options, backend=NAME)
        assert np.abs(found - wanted).max() < 1e-4
    if parts > 1:  # one part packed at a time
        monkeypatch.setattr(implicit_gemm, "_PANELS", 100)
        dispatch.choose.cache_clear()
        again = gpuconv.grad.conv2d_weight(x, (6, 2, 3, 3), dy, **options, backend=NAME, workspace_limit=9000)
        assert np.abs(again - wanted).max() < 1e-4


def test_vectors_are_used_where_memory_allows_and_nowhere_else(monkeypatch):
    used: list[tuple[str, str]] = []
    kernel = implicit_gemm_run.kernel
    monkeypatch.setattr(implicit_gemm_run, "kernel", lambda *facts: (used.append(facts[2:]), kernel(*facts))[1])
    x, k = np.ones((1, 4, 4, 8), np.float32), np.ones((4, 8, 1, 1), np.float32)

    def ways(x: np.ndarray, layout: str = "NHWC", channels: int = 8) -> tuple[str, str]:
        run(x, k[:, :channels], layout=layout)
        return used.pop()

    assert ways(x) == ("along_channels", "along_outputs")
    assert ways(x.transpose(0, 3, 1, 2), "NCHW")[0] == "along_channels"
    assert ways(np.ones((1, 8, 4, 4), np.float32), "NCHW") == ("across_pixels", "along_pixels")
    assert ways(np.ones((1, 8, 3, 3), np.float32), "NCHW") == ("across_pixels", "one_by_one")
    assert ways(np.ones((1, 4, 4, 7), np.float32), channels=7)[0] == "across_pixels"
    assert ways(np.ones((1, 4, 4, 3), np.float32), channels=3)[0] == "mixed"


def test_vectors_need_aligned_memory():
    """Of views on a GPU, which are not copied: an element beyond 16 bytes, or a step of an odd number of elements."""
    problem = Conv2dProblem.parse("n2c8h4w4_o4kh1kw1_f32")
    (cut,) = implicit_gemm.plan(problem, Target("cuda", 0), 2**20).config["launches"]
    memory = np.zeros(1024, np.float32)
    memory = memory[-(memory.ctypes.data // 4) % 4 :]
    ways = {
        "across_pixels": [
            (1, (128, 0, 1, 32, 8)),
            (0, (128, 0, 1, 36, 9)),
            (0, (128, 0, 2, 32, 16)),
            (4, (130, 0, 1, 32, 8)),
        ],
        "along_channels": [(0, (128, 0, 1, 32, 8)), (4, (-128, 4, 1, -32, 12))],
    }
    for way, views in ways.items():
        for offset, strides in views:
            assert implicit_gemm_run.gather_of(cut, Flat(memory, offset, strides)) == way, (offset, strides)


def test_prepared_weights_are_packed_once(monkeypatch):
    packs = []
    pack = implicit_gemm_run._pack
    monkeypatch.setattr(implicit_gemm_run, "_pack", lambda *facts: (packs.append(facts), pack(*facts))[1])
    rng = np.random.default_rng(4)
    x, k = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 8, 5, 6), (5, 8, 3, 3)))
    layer = gpuconv.Conv2d(k, padding=1, backend=NAME)
    for _ in range(2):
        assert layer(x).tobytes() == run(x, k, padding=1).tobytes()
    assert len(packs) == 3, "once for the layer, twice for the plain calls"
