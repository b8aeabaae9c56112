"""``numba_cuda.implicit_gemm_mma`` in Numba's simulator, its instructions played by ``simulated_warp``.

``test_implicit_gemm_mma.py`` starts this file in a process of its own, because Numba decides on import whether CUDA is
simulated.
"""

from __future__ import annotations

import re
from dataclasses import replace

import cases
import numpy as np
import oracle
import oracle_family
import pytest
import units
from running import SIMULATED, SIMULATOR_MARKS

if not SIMULATED:
    pytest.skip("runs in the simulator's own process", allow_module_level=True)

import simulated_warp

import gpuconv
from gpuconv import cutting, dispatch
from gpuconv.backends.numba_cuda import channels_last, cost, implicit_gemm_mma, implicit_gemm_mma_run, launch
from gpuconv.backends.numba_cuda import tensor_shape as shapes
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.implicit_gemm_mma"
pytestmark = SIMULATOR_MARKS
# Relative to ‖ |x| ∗ |k| ‖₂: what the levels promise of float32.
PROMISED = {"high": 2e-5, "medium": 1e-3}


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Every plan has one warp per block, the quickest to simulate, unless a test forces another tile, or parts."""

    def force(tile: shapes.TensorTile = shapes.SMALL, parts: int = 1) -> None:
        def only(work: cost.Work, *rest: object) -> list[cost.Candidate]:
            return [cost.Candidate(tile, cost.whole(work.slices, parts), 0.0)]

        monkeypatch.setattr(cost, "configurations", only)
        dispatch.choose.cache_clear()

    simulated_warp.install(monkeypatch)
    monkeypatch.setattr(implicit_gemm_mma, "unavailable", lambda: None)
    implicit_gemm_mma_run.kernel.cache_clear()
    force()
    yield force
    implicit_gemm_mma_run.kernel.cache_clear()
    dispatch.choose.cache_clear()


def operands(dtype: str, x_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(x_shape) + sum(k_shape))
    shapes = x_shape, k_shape, (k_shape[0],)
    return [rng.standard_normal(shape).astype(cases.numpy_dtype(dtype)) for shape in shapes]


def check(dtype: str, x_shape: tuple, k_shape: tuple, precision: str = "highest", **kwargs: object) -> np.ndarray:
    """Against the oracle, into poisoned memory."""
    x, k, bias = operands(dtype, x_shape, k_shape)
    answer = oracle.answer(x, k, bias, **kwargs)
    out = units.unwritten(answer)
    gpuconv.conv2d(x, k, bias, backend=NAME, out=out.array, precision=precision, **kwargs)
    out.check_edges(str(kwargs))
    if dtype == "float32":
        size = np.linalg.norm(answer.magnitude.astype(float))
        assert np.linalg.norm((out.array - answer.y).astype(float)) <= PROMISED[precision] * size
    else:
        units.assert_close(out.array, answer, f"{dtype} {kwargs}", units.limit_of(answer))
    return out.array


NHWC = {"layout": "NHWC", "kernel_layout": "HWIO"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("outputs", "pixels"), [(-1, -1), (0, 0), (1, 1)], ids=["less", "exact", "more"])
def test_16_bits_at_the_tiles_edges(dtype, outputs, pixels):
    """One less, exactly a tile and one more each way; 33 channels: two slices, the second with one."""
    check(dtype, (1, 33, 1, 32 + pixels), (32 + outputs, 33, 1, 1), activation="relu")


@pytest.mark.parametrize("tile", shapes.TILES, ids=lambda tile: tile.name)
def test_every_tile_one_beyond_its_edges(forced, tile):
    """Integers, thinned so that every sum is exact: whatever the order, not one may differ."""
    forced(tile)
    rng = np.random.default_rng(tile.outputs)
    x = rng.integers(-2, 3, (1, 40, 1, tile.pixels + 1)).astype(np.float16)
    k = rng.integers(-2, 3, (tile.outputs + 1, 40, 1, 1)).astype(np.float16)
    answer = oracle.answer(x, k, None)
    out = units.unwritten(answer)
    gpuconv.conv2d(x, k, backend=NAME, out=out.array)
    out.check_edges(tile.name)
    assert np.array_equal(out.array.astype(float), answer.y.astype(float))


def test_channels_last_in_place():
    """Whole vectors of 8 channels, the slice's last ones beyond C; taps, padding and stride."""
    x, k, _ = operands("float16", (1, 5, 6, 8), (3, 3, 8, 16))
    bias = np.zeros(16, np.float16)
    answer = oracle.answer(x, k, bias, padding=1, stride=2, **NHWC)
    y = gpuconv.conv2d(x, k, bias, backend=NAME, padding=1, stride=2, **NHWC)
    units.assert_close(y, answer, "in place")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32(precision):
    """Within the promise of its level, and 3xTF32 not far from float32's own sums."""
    x, k, bias = operands("float32", (1, 19, 5, 4), (17, 19, 3, 2))
    y = check("float32", x.shape, k.shape, precision=precision, padding=1)
    wanted = oracle.answer(x, k, bias, padding=1)
    error = np.linalg.norm((y - wanted.y).astype(float)) / np.linalg.norm(wanted.magnitude.astype(float))
    assert error < 4e-7 if precision == "high" else 1e-6 < error < 1e-3


@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": ((1, 2), (3, 0)), "padding_value": -2.5},
        {"padding": 2, "padding_mode": "reflect", "stride": (2, 1)},
        {"padding": 3, "padding_mode": "wrap", "dilation": (2, 1), "groups": 2},
        {"flip": True, "groups": 2, "activation": "relu"},
    ],
    ids=["value", "reflect", "wrap_grouped", "flip_grouped"],
)
def test_any_geometry(kwargs):
    groups = kwargs.get("groups", 1)
    check("float16", (2, 6, 6, 5), (4, 6 // groups, 3, 2), **kwargs)


def test_sums_in_parts_and_images_in_turn(forced):
    """The parts are added in order: the same bits, however many images are under way at once."""
    forced(parts=3)
    x, k, bias = operands("float16", (3, 34, 3, 3), (5, 34, 2, 2))
    answer = oracle.answer(x, k, bias, padding=1, activation="relu")
    found = {}
    for limit in (24_000, 21_000):
        y = gpuconv.conv2d(x, k, bias, backend=NAME, padding=1, activation="relu", workspace_limit=limit)
        units.assert_close(y, answer, "parts", units.limit_of(answer))
        plan = gpuconv.explain(x, k, bias, padding=1, activation="relu", backend=NAME, workspace_limit=limit).plan
        (cut,) = plan.config["launches"]
        assert cut.parts == 3
        found[cut.images] = y.tobytes()
    assert found.keys() == {1, 3}
    assert found[1] == found[3]


@pytest.mark.parametrize(("dtype", "precision"), [("float16", "highest"), ("float32", "high")])
def test_same_bits_in_every_batch_layout_and_tile(forced, dtype, precision):
    """The parts are those of one image; in what tile a sum is made changes nothing in it."""
    x, k, bias = operands(dtype, (3, 40, 4, 3), (9, 40, 2, 2))
    found = set()
    for tile, parts in ((shapes.SMALL, 2), (shapes.SQUARE_2, 2)):
        forced(tile, parts)
        options = {"padding": 1, "precision": precision, "backend": NAME}
        whole = gpuconv.conv2d(x, k, bias, **options)
        found.add(whole.tobytes())
        assert gpuconv.conv2d(x[2:], k, bias, **options).tobytes() == whole[2:].tobytes()
        last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        found.add(gpuconv.conv2d(last, k, bias, layout="NHWC", **options).transpose(0, 3, 1, 2).tobytes())
    assert len(found) == 1


def test_input_gradient():
    dy, k, _ = operands("float16", (2, 6, 3, 3), (6, 4, 3, 3))
    found = gpuconv.grad.conv2d_input((2, 4, 6, 7), k, dy, stride=2, padding=(1, 0), backend=NAME)
    wanted = gpuconv.grad.conv2d_input(
        (2, 4, 6, 7), k.astype(float), dy.astype(float), stride=2, padding=(1, 0), backend="numpy.reference"
    )
    assert np.abs(found - wanted).max() <= 2**-10 * np.abs(wanted).max()


# ---- the weight gradient, whose sums go over the batch


def weight_gradient(dtype: str, x: np.ndarray, dy: np.ndarray, size: tuple, kwargs: dict, **how: object) -> np.ndarray:
    """Against the oracle, into poisoned memory."""
    answer = oracle_family.conv2d_weight(x, size, dy, **kwargs)
    out = units.unwritten(answer)
    gpuconv.grad.conv2d_weight(x, size, dy, backend=NAME, out=out.array, **kwargs, **how)
    out.check_edges(f"{kwargs} {how}")
    if dtype == "float32":
        size_of_sums = np.linalg.norm(answer.magnitude.astype(float))
        error = np.linalg.norm((out.array - answer.y).astype(float))
        assert error <= PROMISED[how["precision"]] * size_of_sums
    else:
        units.assert_close(out.array, answer, f"{dtype} {kwargs} {how}", units.limit_of(answer))
    return out.array


def gradient_operands(dtype: str, x: tuple[int, ...], dy: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(x) + sum(dy))
    return [rng.standard_normal(shape).astype(cases.numpy_dtype(dtype)) for shape in (x, dy)]


GRADIENTS = {
    "strided_grouped": ((3, 4, 6, 7), (3, 6, 3, 3), (6, 2, 3, 3), {"stride": 2, "padding": (1, 0), "groups": 2}),
    "dilated": ((2, 3, 7, 6), (2, 5, 3, 4), (5, 3, 3, 2), {"dilation": 2}),
    # 33 images are two slices of each pixel, 33 outputs and 4·9 weights two tiles each way.
    "one_beyond": ((33, 4, 3, 4), (33, 33, 1, 2), (33, 4, 3, 3), {}),
    "padded": ((2, 2, 2, 1), (2, 3, 4, 3), (3, 2, 3, 3), {"padding": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("parts", [1, 3])
def test_weight_gradient(forced, name, parts):
    forced(parts=parts)
    x_shape, dy_shape, size, kwargs = GRADIENTS[name]
    x, dy = gradient_operands("float16", x_shape, dy_shape)
    found = weight_gradient("float16", x, dy, size, kwargs)
    # Other memory, same bits.
    x, dy = (np.ascontiguousarray(array.transpose(2, 0, 3, 1)).transpose(1, 3, 0, 2) for array in (x, dy))
    assert weight_gradient("float16", x, dy, size, kwargs).tobytes() == found.tobytes()


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "highest"), ("float32", "high"), ("float32", "medium")])
def test_weight_gradient_in_other_ways(forced, dtype, precision):
    forced(parts=2)
    x_shape, dy_shape, size, kwargs = GRADIENTS["dilated"]
    x, dy = gradient_operands(dtype, x_shape, dy_shape)
    weight_gradient(dtype, x, dy, size, kwargs, precision=precision)


def test_weight_gradient_with_parts_packed_and_channels_copied_in_turn(forced):
    """The same bits, however little workspace there is."""
    forced(parts=4)
    x_shape, dy_shape, size, kwargs = GRADIENTS["strided_grouped"]
    x, dy = gradient_operands("float16", x_shape, dy_shape)
    problem = Conv2dProblem.of(
        x_shape, size, call="test", x_dtype="float16", k_dtype="float16", op="weight_grad", **kwargs
    )
    found, seen = set(), set()
    plain = implicit_gemm_mma.plan(problem, Target("cuda", 0), 2**20).workspace
    with pytest.raises(MemoryError) as refusal:
        implicit_gemm_mma.plan(problem, Target("cuda", 0), 1000)
    least = int(re.search(r"needs (\d+) bytes", str(refusal.value))[1])
    for limit in (plain, plain - 1, least):
        (cut,) = implicit_gemm_mma.plan(problem, Target("cuda", 0), limit).config["launches"]
        seen.add((cut.images, cut.parts_packed))
        found.add(weight_gradient("float16", x, dy, size, kwargs, workspace_limit=limit).tobytes())
    assert len(found) == 1
    assert seen == {(2, 3), (2, 2), (1, 1)}, "three slices are three parts"


def test_weight_gradient_of_integers_is_exact(forced):
    """As many products as there are images and pixels, in three parts: none lost, none twice."""
    forced(parts=3)
    rng = np.random.default_rng(9)
    x, dy = (rng.integers(-2, 3, shape).astype(np.float16) for shape in ((34, 3, 4, 5), (34, 4, 3, 4)))
    found = gpuconv.grad.conv2d_weight(x, (4, 3, 2, 2), dy, backend=NAME)
    wanted = oracle_family.conv2d_weight(x, (4, 3, 2, 2), dy)
    assert np.array_equal(found.astype(float), wanted.y.astype(float))


@pytest.mark.parametrize(("images", "columns"), [(1, 10), (3, 10), (7, 5)])
def test_columns_beside_images(images, columns):
    """As many as fill a slice; with strides, dilations and a padding that the first and the last windows reach."""
    x_shape, dy_shape, size = (images, 4, 4, 19), (images, 2, 2, 10), (2, 2, 2, 3)
    kwargs = {"stride": (1, 2), "dilation": (2, 2), "padding": ((0, 0), (3, 1)), "groups": 2}
    problem = Conv2dProblem.of(
        x_shape, size, call="test", x_dtype="float16", k_dtype="float16", op="weight_grad", **kwargs
    )
    (cut,) = implicit_gemm_mma.plan(problem, Target("cuda", 0), 2**24).config["launches"]
    assert cut.together is not None and cut.together.columns == columns
    rng = np.random.default_rng(images)
    x, dy = (rng.integers(-2, 3, shape).astype(np.float16) for shape in (x_shape, dy_shape))
    found = gpuconv.grad.conv2d_weight(x, size, dy, backend=NAME, **kwargs)
    wanted = oracle_family.conv2d_weight(x, size, dy, **kwargs)
    assert np.array_equal(found.astype(float), wanted.y.astype(float))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weight_gradient_of_host_arrays_in_pieces(monkeypatch, dtype):
    """Images, then rows of one; sums of 16-bit products stay in float32 and float64 until all are added up."""
    monkeypatch.setattr(cutting, "_LEAST", 16)
    monkeypatch.setattr(cutting, "_MOST", 600)
    real, cuts = cutting.cut, []
    monkeypatch.setattr(cutting, "cut", lambda *given: cuts.append(real(*given)) or cuts[-1])
    kind = cases.numpy_dtype(dtype)
    for shape in ((3, 1, 8, 8), (1, 1, 24, 8)):
        x, dy = np.ones(shape, kind), np.zeros(shape, kind)
        # Pieces of +16384 and -16384 leave the 257 between them, which no 16 bits hold beside either.
        dy.reshape(-1)[:64], dy.reshape(-1)[128:] = 256, -256
        dy.reshape(-1)[70] = 256
        found = gpuconv.grad.conv2d_weight(x, (1, 1, 1, 1), dy, backend=NAME)
        assert cuts[-1] is not None and len(cuts[-1]) >= 3
        assert {piece.plan.problem.y_dtype for piece in cuts[-1]} == {"float32"}
        assert found.dtype == kind and found[0, 0, 0, 0] == 256
        again = gpuconv.grad.conv2d_weight(x, (1, 1, 1, 1), dy, backend=NAME, workspace_limit=2**20)
        assert again.tobytes() == found.tobytes()


def test_weight_gradient_of_16_bits_as_float32_is_still_refused():
    """Tensor cores round towards zero what they add up: unseen in 16 bits, but not in float32."""
    x, dy = gradient_operands("float16", (2, 2, 4, 4), (2, 3, 3, 3))
    with pytest.raises(gpuconv.NoBackendError, match="got float16 × float16 → float32"):
        gpuconv.grad.conv2d_weight(x, (3, 2, 2, 2), dy, backend=NAME, dtype="float32")


def test_nan_in_a_weight_gradient():
    x, dy = gradient_operands("float16", (2, 2, 4, 4), (2, 3, 3, 3))
    x[1, 1, 0, 0] = np.nan  # only tap (0, 0) of channel 1 reads it
    found = np.isnan(gpuconv.grad.conv2d_weight(x, (3, 2, 2, 2), dy, backend=NAME))
    wanted = np.zeros((3, 2, 2, 2), bool)
    wanted[:, 1, 0, 0] = True
    assert np.array_equal(found, wanted)


def test_weight_gradient_of_an_empty_batch():
    x, dy = np.zeros((0, 2, 4, 4), np.float16), np.zeros((0, 3, 3, 3), np.float16)
    assert not gpuconv.grad.conv2d_weight(x, (3, 2, 2, 2), dy, backend=NAME).any()


# ---- what memory holds


def test_nan_reaches_what_reads_it_and_nothing_else():
    """Not through the channels, outputs and pixels that fill up the tiles."""
    x, k, _ = operands("float16", (1, 9, 4, 4), (3, 9, 2, 2))
    x[0, 8, 1, 2] = np.nan
    y = gpuconv.conv2d(x, k, backend=NAME)
    wanted = np.zeros((3, 3), bool)
    wanted[0:2, 1:3] = True
    assert np.array_equal(np.isnan(y), np.broadcast_to(wanted, y.shape))


def test_swapped_bytes_and_strided_views():
    x, k, bias = operands("float16", (1, 9, 4, 4), (3, 9, 2, 2))
    plain = gpuconv.conv2d(x, k, bias, backend=NAME)
    swapped = gpuconv.conv2d(x.astype(">f2"), k.astype(">f2"), bias, backend=NAME)
    wide = np.full((1, 18, 4, 9), np.nan, np.float16)
    wide[:, ::2, :, 7::-2] = x
    assert swapped.tobytes() == gpuconv.conv2d(wide[:, ::2, :, 7::-2], k, bias, backend=NAME).tobytes()
    assert swapped.tobytes() == plain.tobytes()


def test_prepared_weights():
    x, k, bias = operands("float16", (1, 9, 4, 4), (3, 9, 2, 2))
    layer = gpuconv.Conv2d(k, bias, backend=NAME)
    assert layer(x).tobytes() == gpuconv.conv2d(x, k, bias, backend=NAME).tobytes() == layer(x).tobytes()


@pytest.mark.parametrize(("C", "H", "W"), [(1, 1, 1), (33, 5, 7), (5, 3, 11), (64, 2, 16)])
def test_channels_are_put_side_by_side(C, H, W):
    """Whole tiles of 32 × 32 and not, in both groups of both images; channels rounded up to 8 are zero."""
    x = np.arange(2 * 2 * C * H * W, dtype=np.float32).reshape(2, 2, C, H, W)
    channels = -(-C // 8) * 8
    copied = np.full((2, H, W, 2, channels), np.nan, np.float32)
    side = channels_last.SIDE
    grid = 2 * 2 * -(-channels // side) * -(-H * W // side)
    strides = [step // 4 for step in x.strides]
    turn = launch.jit(channels_last.build("float32"))
    turn[grid, channels_last.THREADS](x.ravel(), 0, *strides, copied.ravel(), channels, 2, C, H, W, 2, 1, 0, 0, 0)
    assert np.array_equal(copied[..., :C], x.transpose(0, 3, 4, 1, 2))
    assert not copied[..., C:].any()


def test_columns_are_put_beside_images():
    """Every second column of 3 images, from 2 before the first one on; zeros beside them and to fill up 16."""
    images, columns, left, step, H, W, width = 3, 4, 2, 2, 2, 5, 7
    x = np.arange(1, 1 + 2 * images * H * W, dtype=np.float32).reshape(2, 1, images, H, W)
    copied = np.full((2, H, width, 16), np.nan, np.float32)
    grid = 2 * -(-H * width // channels_last.SIDE)
    strides = [size // 4 for size in x.strides]
    turn = launch.jit(channels_last.build("float32", True))
    sizes = (2, columns * images, H, width, 1)
    turn[grid, channels_last.THREADS](x.ravel(), 0, *strides, copied.ravel(), 16, *sizes, images, W, left, step)
    padded = np.zeros((2, images, H, left + W + columns * step + width), np.float32)
    padded[..., left : left + W] = x[:, 0]
    for r in range(columns):
        of_column = padded[..., r * step : r * step + width].transpose(0, 2, 3, 1)
        assert np.array_equal(copied[..., r * images : (r + 1) * images], of_column)
    assert not copied[..., columns * images :].any()


class Far:
    """A vector of which only the elements from ``first`` on exist."""

    def __init__(self, first: int, found: np.ndarray) -> None:
        self.first, self.found = first, found

    def __setitem__(self, at, value) -> None:
        assert at >= self.first
        self.found[at - self.first] = value


def test_the_last_block_of_the_largest_grid_has_its_own_place(monkeypatch):
    """Of 2^31 - 1 blocks, whose pixels and elements no 32 bits count; and the block of the copy, one for each image."""
    simulated_warp.only_the_last_block(monkeypatch)
    rng = np.random.default_rng(3)
    x, k = rng.integers(-3, 4, (2, 8)).astype(np.float16).view(np.uint16)
    k = np.stack([k] * 8)
    ends, pixels = launch.MAX_GRID_X, shapes.SMALL.pixels
    forward = {"x_dtype": "float16", "k_dtype": "float16", "y_dtype": "float16"}
    problem = Conv2dProblem(ends * pixels, 8, 1, 1, 8, 1, 1, **forward)
    (cut,) = implicit_gemm_mma.plan(problem, Target("cuda", 0), 2**62).config["launches"]
    cut = replace(cut, images=problem.N)  # as where x is read in place
    y = np.full(pixels * 8 + 8, 7, np.float16)
    first = (problem.N - pixels) * 8
    views = (
        Flat(x, 0, (0, 0, 1, 0, 0)),
        Flat(k.reshape(-1), 0, (0, 8, 1, 0, 0)),
        Flat(y, -first, (8, 8, 1, 8, 8)),
    )
    pack, multiply = implicit_gemm_mma_run.steps(cut, *views, np.zeros(8, np.float32), False, x, 0)
    assert multiply.grid == ends
    pack.run(0)
    multiply.run(0)
    wanted = x.view(np.float16).astype(float) @ k.view(np.float16).astype(float).T
    assert (y[:-8].reshape(pixels, 8) == wanted).all() and (y[-8:] == 7).all()

    copied = Far((ends - 1) * 8, np.full(8, 7, np.uint16))
    problem = Conv2dProblem(ends, 8, 1, 1, 8, 1, 1, **forward)
    (cut,) = implicit_gemm_mma.plan(problem, Target("cuda", 0), 2**62).config["launches"]
    (turn,) = implicit_gemm_mma_run._turn(cut, views[0], copied, ends)
    assert turn.grid == ends
    turn.run(0)
    assert (copied.found == x).all()


def test_a_missing_wait_is_seen(monkeypatch):
    """The proof above can fail: one group too many left in flight gives NaN."""

    def hasty(pending: int) -> tuple:
        return simulated_warp.async_copies(pending + 1)

    from gpuconv.backends.numba_cuda import ptx

    monkeypatch.setattr(ptx, "async_copies", hasty)
    x, k, _ = operands("float16", (1, 9, 4, 4), (3, 9, 2, 2))
    assert np.isnan(gpuconv.conv2d(x, k, backend=NAME)).any()
