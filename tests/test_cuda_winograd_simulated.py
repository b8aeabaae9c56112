"""``numba_cuda.winograd`` in Numba's simulator: its kernels at every edge, in all the ways that they read and write.

``test_cuda_winograd.py`` starts this file in a process of its own, because Numba decides on import whether CUDA is
simulated. Blocks are made small here, so that small problems have several each way. Scratch begins as NaN and lies
between NaN that must stay.

In the simulator the 36 matrix products of a small problem take two seconds. Where they are not what is tested, NumPy
makes them, and one test shows that it gives what their kernel gives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import oracle_family
import pytest
import units
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import cuda
from running import SIMULATED, SIMULATOR_MARKS

if not SIMULATED:
    pytest.skip("runs in the simulator's own process", allow_module_level=True)

import gpuconv
from gpuconv import dispatch
from gpuconv.backends.numba_cuda import launch, tiles, winograd, winograd_kernels, winograd_run, winograd_transforms
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.winograd"
HIGH = 2e-5  # of the norm of |x| * |k|: what precision="high" promises
GUARD = 64
KERNELS = (
    winograd_run.weights_kernel, winograd_run.image_kernel, winograd_run.result_kernel, winograd_run.multiply_kernel,
)  # fmt: skip
pytestmark = SIMULATOR_MARKS


def forget() -> None:
    for kernel in KERNELS:
        kernel.cache_clear()
    dispatch.choose.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def small_blocks_and_poisoned_scratch():
    given_out: list[Any] = []

    def poisoned(like: Any, dtype: Any, size: int) -> Any:
        whole = cuda.device_array(size + 2 * GUARD, dtype)
        whole[:] = np.nan
        given_out.append(whole)
        return whole[GUARD : GUARD + size]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd_kernels, "SIDE", 4)
        patch.setattr(launch, "scratch", poisoned)
        forget()
        yield
        forget()
    assert given_out
    for whole in given_out:
        host = whole.copy_to_host()
        assert np.isnan(host[:GUARD]).all() and np.isnan(host[-GUARD:]).all()


@pytest.fixture
def change(monkeypatch):
    """Change a fact of the plan, and what was planned and built before is forgotten."""

    def change(owner: Any, **facts: Any) -> None:
        for name, value in facts.items():
            monkeypatch.setattr(owner, name, value)
        forget()

    yield change
    forget()


@pytest.fixture
def ways(monkeypatch):
    """The specialisations that were launched: (reader, channels last) and (channels last, vectors)."""
    used: dict[str, list[tuple]] = {"image_kernel": [], "result_kernel": []}
    for name, found in used.items():
        kernel = getattr(winograd_run, name)

        def recorded(*facts: Any, kernel: Any = kernel, found: list[tuple] = found) -> Any:
            found.append(facts)
            return kernel(*facts)

        monkeypatch.setattr(winograd_run, name, recorded)
    return used


def product(U: np.ndarray, V: np.ndarray, slices: int, part_slices: int) -> np.ndarray:
    """What the kernel makes of (products, C, O) and (products, C, tiles), every sum in its order: part after part."""
    parts = -(-slices // part_slices)
    made = np.zeros((parts, len(U), U.shape[2], V.shape[2]), np.float32)
    with np.errstate(all="ignore"):
        for c in range(U.shape[1]):
            made[c // (8 * part_slices)] += U[:, c, :, None] * V[:, c, None, :]
    return made


@pytest.fixture
def by_numpy(monkeypatch):
    """NumPy makes the matrix products."""

    class Product:
        def __init__(self, cut: Any, U: Any, V: Any, M: Any, count: int) -> None:
            self.facts = cut, U, V, M

        def run(self, stream: Any) -> None:
            cut, U, V, M = self.facts
            u = U.copy_to_host()[: cut.weights_size].reshape(cut.products, cut.inputs, cut.pitch)[..., : cut.outputs]
            v = V.copy_to_host()[: cut.image_size].reshape(cut.products, cut.inputs, cut.chunk)
            made = product(u, v, cut.slices, cut.part_slices)
            assert len(made) == cut.parts
            M[: made.size] = made.reshape(-1)

    monkeypatch.setattr(winograd_run, "_multiply", Product)


def run(x: np.ndarray, k: np.ndarray, bias: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
    return gpuconv.conv2d(x, k, bias, backend=NAME, **{"precision": "high"} | kwargs)


def posed(N: int, C: int, O: int, H: int, W: int, groups: int = 1, positive: bool = False) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(N + C + O + H + W)
    shapes = (N, C, H, W), (O, C // groups, 3, 3), (O,)
    x, k, bias = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return (abs(x), abs(k), bias) if positive else (x, k, bias)


def judge(y: np.ndarray, answer: oracle.Answer, part: float = 0.1) -> None:
    """At most so large a part of the promised error, and no element that is wrong by itself."""
    assert (y.dtype, y.shape) == (np.float32, answer.y.shape)
    error = np.abs(y - answer.y)
    assert np.linalg.norm(error) <= part * HIGH * np.linalg.norm(answer.magnitude)
    assert np.max(error, initial=0) <= 10 * part * HIGH * np.max(answer.magnitude, initial=0)


def check(
    N: int, C: int, O: int, H: int, W: int, layout: str = "NCHW", positive: bool = False, **kwargs: Any
) -> np.ndarray:
    """Against the oracle, between guards, at a tenth of the error that is promised."""
    x, k, bias = posed(N, C, O, H, W, kwargs.get("groups", 1), positive)
    if layout == "NHWC":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    kwargs = {"padding": 1, "activation": "relu", "layout": layout, **kwargs}
    answer = oracle.answer(x, k, bias, **kwargs)
    guarded, out = units.Guarded(x), units.unwritten(answer)
    run(guarded.array, k, bias, out=out.array, **kwargs)
    guarded.check_whole(layout)
    out.check_edges(layout)
    judge(out.array, answer)
    return out.array


# ---- edges


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("height", "width", "pad"),
    [(1, 1, 1), (3, 3, 0), (4, 4, 1), (5, 3, 1), (6, 10, 0), (9, 8, 1), (2, 13, 2), (1, 2, 4)],
)
def test_planes_one_less_and_one_more_than_tiles(by_numpy, height, width, pad, layout):
    check(2, 3, 2, height, width, layout, padding=pad)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_all_four_kernels(layout):
    check(1, 18, 6, 4, 5, layout, groups=2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 11), st.integers(1, 11),
    st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 2), st.sampled_from(["NCHW", "NHWC"]),
    st.sampled_from([None, "relu"]), st.sampled_from([0, -1.5]),
)  # fmt: skip
def test_any_sizes_and_paddings(by_numpy, N, groups, inputs, outputs, H, W, padding, layout, activation, value):
    if H + sum(padding[0]) < 3 or W + sum(padding[1]) < 3:
        return
    check(
        N, groups * inputs, groups * outputs, H, W, layout, groups=groups, padding=padding, activation=activation,
        padding_value=value,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "edge", "wrap"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_padding_by_tables(by_numpy, ways, mode, layout):
    check(1, 2, 3, 6, 5, layout, padding=((3, 1), (2, 7)), padding_mode=mode)
    assert ways["image_kernel"] == [("tabled", layout == "NHWC")]


@pytest.mark.parametrize("tile", tiles.TILES["float32"], ids=str)
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_matrix_products_at_their_tiles_edges(tile, beyond):
    """Two products, in parts of whole slices: bit for bit, with NaN in what rounds rows up, and in place of sums."""
    rng = np.random.default_rng(beyond + 1)
    C, O, T = 16 + beyond, tile.outputs + beyond, tile.pixels + beyond
    pitches = (-(-O // 4) * 4, -(-T // 4) * 4 + 4)
    slices = -(-C // 8)
    for part_slices in (1, slices):
        parts = -(-slices // part_slices)
        U, V = (np.full((2, C, pitch), np.nan, np.float32) for pitch in pitches)
        U[..., :O], V[..., :T] = rng.standard_normal((2, C, O)), rng.standard_normal((2, C, T))
        M = cuda.to_device(np.full(parts * 2 * O * pitches[1] + GUARD, np.nan, np.float32))
        grid = -(-O // tile.outputs) * -(-T // tile.pixels) * 2 * parts
        sizes = map(np.int32, (C, O, T, 2, slices, part_slices))
        winograd_run.multiply_kernel(tile)[grid, tile.threads](
            cuda.to_device(U.ravel()), np.int32(pitches[0]), cuda.to_device(V.ravel()), np.int32(pitches[1]), M, *sizes
        )
        found = M.copy_to_host()
        assert np.isnan(found[-GUARD:]).all()
        wanted = product(U[..., :O], V[..., :T], slices, part_slices)
        assert np.array_equal(found[:-GUARD].reshape(parts, 2, O, -1)[..., :T], wanted)


def test_vectors_are_written_where_memory_allows_and_nowhere_else(by_numpy, ways):
    for width, vectors in ((8, True), (7, False)):
        check(1, 2, 3, 5, width)
        assert ways["result_kernel"].pop() == (False, vectors)
    check(1, 2, 3, 5, 8, "NHWC")
    assert ways["result_kernel"].pop() == (True, False)
    problem = Conv2dProblem.parse("n2c2h4w8_o3kh3kw3_p1_high_f32")
    memory = np.zeros(1024, np.float32)
    memory = memory[-(memory.ctypes.data // 4) % 4 :]
    strides = (96, 0, 32, 8, 1)
    assert winograd_run.in_vectors(problem, Flat(memory, 4, strides))
    for offset, views in ((1, strides), (0, (97, 0, 32, 8, 1)), (0, (96, 0, 33, 8, 1)), (0, (96, 0, 32, 9, 1)),
                          (0, (192, 0, 64, 16, 2))):  # fmt: skip
        assert not winograd_run.in_vectors(problem, Flat(memory, offset, views)), views


# ---- sums


@pytest.mark.parametrize("positive", [False, True], ids=["normal", "positive"])
@pytest.mark.parametrize("channels", [300, 512])
def test_the_promise_of_precision_high(by_numpy, channels, positive):
    """A tenth of what is promised, with sums in two parts; the promise is for weights and images worse than these."""
    check(1, channels, 2, 6, 6, positive=positive)
    plan = gpuconv.explain((1, channels, 6, 6), (2, channels, 3, 3), padding=1, precision="high", backend=NAME).plan
    (cut,) = plan.config["launches"]
    assert (cut.parts, cut.part_slices) == (2, -(-channels // 16))


@pytest.mark.parametrize("channels", [8, 9, 23, 24, 25])
def test_sums_in_parts(change, by_numpy, channels):
    change(winograd, _SUM=8)
    check(1, channels, 3, 5, 6)


def test_same_bits_whatever_the_batch_the_chunk_the_tile_and_the_layout(change):
    x, k, bias = posed(2, 10, 5, 5, 6)
    options = {"padding": 1, "activation": "relu"}
    change(winograd, _SUM=8)
    y = run(x, k, bias, **options)
    judge(y, oracle.answer(x, k, bias, **options))
    assert run(x[1:], k, bias, **options)[0].tobytes() == y[1].tobytes()
    last = run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), k, bias, **options, layout="NHWC")
    assert np.ascontiguousarray(last.transpose(0, 3, 1, 2)).tobytes() == y.tobytes()
    flipped = x[:, ::-1, ::-1, ::-1].copy()[:, ::-1, ::-1, ::-1]
    kernel = np.ascontiguousarray(k.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    assert run(flipped, kernel, bias, **options).tobytes() == y.tobytes()
    change(winograd, _tile=lambda *facts: tiles.NARROW)
    assert run(x, k, bias, **options).tobytes() == y.tobytes()
    change(winograd, _CHUNK=0, _UNIT=4)
    assert gpuconv.explain(x, k, bias, **options, precision="high", backend=NAME).plan.config["launches"][0].chunk == 4
    assert run(x, k, bias, **options).tobytes() == y.tobytes()


def test_chunks_are_as_small_as_the_limit_asks(by_numpy):
    x, k, bias = posed(2, 3, 5, 9, 10)
    y = run(x, k, bias, padding=1)
    with pytest.raises(
        MemoryError, match=r"needs [0-9]+ bytes of scratch, of them 1728 for transformed weights of 4 output channel"
    ) as found:
        run(x, k, bias, padding=1, workspace_limit=5000)
    least = int(str(found.value).split("needs ")[1].split()[0])
    with pytest.raises(MemoryError):
        run(x, k, bias, padding=1, workspace_limit=least - 1)
    for limit, outputs, chunk in ((least, 4, 4), (2 * least, 4, 8), (10 * least, 5, 20)):
        report = gpuconv.explain(x, k, bias, padding=1, precision="high", backend=NAME, workspace_limit=limit)
        assert report.plan.workspace <= limit
        (cut,) = report.plan.config["launches"]
        assert (cut.outputs, cut.chunk) == (outputs, chunk)
        assert run(x, k, bias, padding=1, workspace_limit=limit).tobytes() == y.tobytes()


@pytest.mark.parametrize(
    ("groups", "outputs", "layout", "limit", "blocks"),
    [
        (1, 11, "NHWC", 10_000, [(1, 4), (1, 4), (1, 3)]),
        (3, 2, "NCHW", 16_000, [(2, 2), (1, 2)]),
        (2, 5, "NCHW", 8000, [(1, 4), (1, 1)] * 2),
    ],
)
def test_channels_whose_weights_a_limit_has_no_room_for_are_made_in_turn(
    by_numpy, groups, outputs, layout, limit, blocks
):
    """The same bits, in a layer and in a gradient too."""
    x, k, bias = posed(2, 3 * groups, outputs * groups, 5, 6, groups)
    if layout == "NHWC":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    options = {"padding": 1, "groups": groups, "layout": layout, "activation": "relu"}
    y = run(x, k, bias, **options)
    report = gpuconv.explain(x, k, bias, **options, precision="high", backend=NAME, workspace_limit=limit)
    (cut,) = report.plan.config["launches"]
    assert [(block.groups, block.outputs) for block, _, _ in cut.blocks()] == blocks
    assert run(x, k, bias, **options, workspace_limit=limit).tobytes() == y.tobytes()
    layer = gpuconv.Conv2d(k, bias, **options, precision="high", backend=NAME, workspace_limit=limit)
    for _ in range(2):
        assert layer(x).tobytes() == y.tobytes()
    # The gradient makes as many channels as k here has outputs, of an image that is like x.
    options = {"padding": 1, "groups": groups, "layout": layout, "precision": "high", "backend": NAME}
    turned = np.ascontiguousarray(k.reshape(groups, outputs, 3, 3, 3).swapaxes(1, 2)).reshape(-1, outputs, 3, 3)
    size = y.shape
    found = [
        gpuconv.grad.conv2d_input(size, turned, x, **options, workspace_limit=room).tobytes() for room in (None, limit)
    ]
    assert found[0] == found[1]


# ---- operands


@pytest.mark.parametrize("padding", [0, 1, 2, 3, ((0, 1), (4, 0))])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_input_gradients(by_numpy, padding, layout):
    """A padding beyond 2 is a crop of the gradient's forward convolution."""
    rng = np.random.default_rng(5)
    size = (2, 4, 7, 6) if layout == "NCHW" else (2, 7, 6, 4)
    k = rng.standard_normal((6, 2, 3, 3)).astype(np.float32)
    options = {"groups": 2, "padding": padding, "layout": layout}
    shape = oracle.answer(np.zeros(size, np.float32), k, **options).y.shape
    dy = rng.standard_normal(shape).astype(np.float32)
    found = gpuconv.grad.conv2d_input(size, k, dy, **options, precision="high", backend=NAME)
    judge(found, oracle_family.conv2d_input(size, k, dy, **options))


def test_prepared_weights_are_transformed_once(by_numpy, monkeypatch):
    transforms = []
    weights = winograd_run._weights
    monkeypatch.setattr(winograd_run, "_weights", lambda *facts: (transforms.append(facts), weights(*facts))[1])
    x, k, bias = posed(2, 8, 5, 5, 6)
    layer = gpuconv.Conv2d(k, bias, padding=1, precision="high", backend=NAME)
    for size in (slice(0, 1), slice(0, 2)):
        assert layer(x[size]).tobytes() == run(x[size], k, bias, padding=1).tobytes()
    assert len(transforms) == 3, "once for the layer, twice for the plain calls"
    gpuconv.clear()
    assert layer(x).tobytes() == run(x, k, bias, padding=1).tobytes()


def test_nan_stays_in_its_tiles_and_reaches_every_window_that_reads_it(by_numpy):
    x, k, _ = posed(2, 2, 2, 10, 12)
    plain = run(x, k, padding=1)
    x[0, 1, 5, 4] = np.nan
    y = run(x, k, padding=1)
    assert np.isnan(y[0, :, 4:7, 3:6]).all()
    assert np.isfinite(y[0, :, 8:]).all() and np.isfinite(y[0, :, :, 8:]).all()
    assert y[1].tobytes() == plain[1].tobytes()
    # Beyond a crop nothing is asked for.
    k = np.ones((2, 2, 3, 3), np.float32)
    dy = np.full((1, 2, 12, 12), np.nan, np.float32)
    dy[..., 2:-3, 2:-3] = 1
    with pytest.raises(AssertionError):
        assert np.isfinite(
            gpuconv.grad.conv2d_input((1, 2, 6, 6), k, dy, padding=4, precision="high", backend=NAME)
        ).all()
    dy[..., 1:-1, 1:-1] = 1
    found = gpuconv.grad.conv2d_input((1, 2, 4, 4), k, dy, padding=5, precision="high", backend=NAME)
    assert np.isfinite(found).all()


# ---- teeth


@pytest.mark.parametrize(("name", "count"), [("image", 6), ("result", 4), ("kernel", 6)])
def test_a_wrong_transform_is_found(by_numpy, change, name, count):
    """Two neighbouring results exchanged, one with the other sign, one slightly wrong."""
    right = getattr(winograd_transforms, name)

    def wrong(spoil: Any) -> Any:
        return cuda.jit(device=True)(lambda *values: spoil(right(*values)))

    for spoil in (
        lambda found: (found[1], found[0], *found[2:]),
        lambda found: (*found[:-1], -found[-1]),
        lambda found: (found[0], found[1] * np.float32(1 + 1e-3), *found[2:]),
    ):
        change(winograd_transforms, **{name: wrong(spoil)})
        with pytest.raises(AssertionError):
            check(1, 3, 2, 5, 6)


@pytest.mark.parametrize("fact", ["tiles", "part_slices", "pitch", "part_size"])
def test_a_wrong_size_is_found(change, fact):
    right = getattr(winograd.Launch, fact).fget
    step = {"tiles": -1, "part_slices": -1, "pitch": -4, "part_size": -1}[fact]
    change(winograd, _SUM=8)
    change(winograd.Launch, **{fact: property(lambda cut: right(cut) + step)})
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check(1, 10, 5, 5, 2)
