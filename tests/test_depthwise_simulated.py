"""``numba_cuda.depthwise`` in Numba's simulator: its kernel at every tile's edges, in all the ways it reads and writes.

``test_depthwise.py`` starts this file in a process of its own, because Numba decides on import whether CUDA is
simulated. Blocks are made small here, so that small problems have several tiles each way, and shared memory begins as
NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import units
from cases import Case
from running import SIMULATED, SIMULATOR_MARKS

if not SIMULATED:
    pytest.skip("runs in the simulator's own process", allow_module_level=True)

import gpuconv
from gpuconv import dispatch
from gpuconv.backends.numba_cuda import depthwise_run, depthwise_shape, launch

NAME = "numba_cuda.depthwise"
pytestmark = SIMULATOR_MARKS


@pytest.fixture(autouse=True)
def poisoned_shared_memory(monkeypatch):
    from numba.cuda.simulator import kernelapi

    initialise = kernelapi.FakeCUDAShared.__init__

    def poisoned(self: Any, size: int) -> None:
        initialise(self, size)
        self._dynshared[...] = -1  # of floats of any width, NaN

    monkeypatch.setattr(kernelapi.FakeCUDAShared, "__init__", poisoned)


@pytest.fixture
def small(monkeypatch):
    """Make blocks small: of some threads, some of them side by side, and with so many taps at a time."""

    def shrink(threads: int = 4, across: int = 2, row: int = 64, column: int = 16) -> None:
        facts = {"THREADS": threads, "ACROSS": across, "THREADS_SIDE": threads * 32, "ROW": row, "COLUMN": column}
        for name, value in facts.items():
            monkeypatch.setattr(depthwise_shape, name, value)
        depthwise_shape.block.cache_clear()
        dispatch.choose.cache_clear()

    yield shrink
    depthwise_shape.block.cache_clear()
    dispatch.choose.cache_clear()


@pytest.fixture
def ways(monkeypatch):
    """The specialisations that were launched: (shape, dtype, reader, load, vectors)."""
    used: list[tuple] = []
    kernel = depthwise_run.kernel
    monkeypatch.setattr(depthwise_run, "kernel", lambda *facts: (used.append(facts), kernel(*facts))[1])
    return used


def run(x: np.ndarray, k: np.ndarray, bias: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
    return gpuconv.conv2d(x, k, bias, backend=NAME, **kwargs)


def check(
    N: int, groups: int, inputs: int, outputs: int, plane: tuple, kernel: tuple, dtype: str = "float32", **kwargs: Any
) -> None:
    """Integers, exactly, between guards."""
    x = (N, groups * inputs, *plane)
    if kwargs.get("layout") == "NHWC":
        x = (N, *plane, groups * inputs)
    case = Case("edges", x, (groups * outputs, inputs, *kernel), {"groups": groups, **kwargs}, bias=True)
    units.check(run, case, dtype, "wide", into=True)


def wide(plane: tuple, kernel: tuple, stride: int, pad: int) -> int:
    return (plane[1] + 2 * pad - kernel[1]) // stride + 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pad", [0, 1, 2, 3, 6])
def test_rows_in_vectors(small, ways, stride, pad):
    """Every place of a window in the vectors of a row, tiles of 8 columns and 2 rows, and 1 to 3 of each."""
    small()
    for plane in ((3, 8), (5, 20)):
        check(1, 3, 1, 1, plane, (3, 3), stride=stride, padding=pad)
        shape, _, reader, load, vectors = ways.pop()
        assert (reader, load, shape.stride) == ("inside", "along_columns", (stride, stride))
        assert vectors == (wide(plane, (3, 3), stride, pad) % 4 == 0)


@pytest.mark.parametrize("width", [7, 8, 9, 15, 17])
@pytest.mark.parametrize("height", [1, 2, 3])
def test_tiles_one_less_and_one_more(small, ways, width, height):
    small()
    check(1, 2, 1, 1, (height, width), (3, 3), padding="same", activation="relu")
    assert ways[0][3] == ("along_columns" if width == 8 else "by_element")


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "edge", "wrap"])
def test_padding_by_tables(small, ways, mode):
    """Also where the last tile begins what no table has an entry for."""
    small()
    for kwargs in ({}, {"stride": 2}, {"stride": (3, 1), "dilation": (1, 2)}):
        check(1, 2, 1, 1, (6, 8), (2, 3), padding=((3, 1), (2, 7)), padding_mode=mode, **kwargs)
        assert ways.pop()[2:4] == ("tabled", "by_element")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"stride": 3}, {"dilation": 2}, {"stride": (1, 5), "dilation": (3, 1)}, {"stride": (7, 2), "padding": 4},
        {"dilation": (2, 9), "padding": 10, "padding_value": -2}, {"stride": 2**31 - 1, "padding": 1},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_any_steps(small, ways, layout, kwargs):
    small()
    check(1, 16 if layout == "NHWC" else 2, 1, 1, (9, 20), (3, 2), layout=layout, **kwargs)
    assert ways[0][0].stride is None
    assert ways[0][3].startswith("across" if layout == "NHWC" else "by_element")


@pytest.mark.parametrize(("groups", "load"), [(16, "across_groups_in_vectors"), (33, "across_groups")])
@pytest.mark.parametrize("stride", [1, 2])
def test_channels_last(small, ways, groups, load, stride):
    """Fewer groups than a warp has threads, and one more."""
    small()
    check(1, groups, 1, 1, (4, 10), (3, 3), stride=stride, padding=1, layout="NHWC")
    assert (ways[0][3], ways[0][0].side) == (load, 32)
    check(1, groups, 1, 1, (4, 9), (2, 3), stride=stride, padding=2, layout="NHWC", padding_mode="reflect")
    assert ways[1][2] == "tabled"


@pytest.mark.parametrize("kernel", [(9, 9), (3, 17), (17, 3), (5, 40), (1, 8), (1, 16)])
@pytest.mark.parametrize("column", [2, 16])
def test_large_kernels_in_pieces(small, ways, kernel, column):
    """Rows of taps in steps of 8 and a rest, 16 of them at a time, and columns of taps ``column`` at a time."""
    small(row=16, column=column)
    check(1, 1, 1, 1, (4, 12), kernel, padding=(kernel[0] // 2, kernel[1] // 2))
    assert (ways[0][0].taps, ways[0][0].rest) == (min(kernel[1], 8), kernel[1] % min(kernel[1], 8))


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 2), (1, 4), (1, 5), (3, 1), (5, 9)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_few_channels(small, inputs, outputs, layout):
    small()
    check(2, 1, inputs, outputs, (3, 9), (3, 3), padding=1, layout=layout)
    check(1, 2, inputs, outputs, (3, 5), (2, 2), layout=layout)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_floats(small, ways, dtype):
    """Vectors of 2 and of 8; sums of 16-bit numbers in float32."""
    small()
    check(1, 2, 1, 1, (5, 24), (3, 3), dtype, padding=1)
    assert ways.pop()[3:] == ("along_columns", True)
    check(1, 2, 1, 1, (5, 16), (3, 3), dtype, padding=1, stride=2)
    assert ways.pop()[3:] == ("along_columns", True)
    check(1, 16, 1, 1, (3, 9), (3, 3), dtype, padding=1, layout="NHWC")
    assert ways.pop()[3] == "across_groups_in_vectors"


def test_the_rows_of_a_thread(small, ways, monkeypatch):
    """As where a problem fills a GPU: several rows of the result from each row of the image."""
    monkeypatch.setattr(depthwise_shape, "_MULTIPROCESSORS", 0)
    small()
    for height in (3, 4, 9):
        for stride in (1, 2):
            check(1, 2, 1, 1, (height, 9), (3, 3), padding=1, stride=stride)
            assert ways.pop()[0].rows == 4
            check(1, 1, 2, 3, (height, 9), (3, 2), padding=1, stride=stride)
            assert ways.pop()[0].rows == 2
    check(1, 16, 1, 1, (5, 5), (3, 3), padding=1, layout="NHWC")
    assert ways.pop()[0].rows == 4


def test_input_gradients(small):
    """Of stride 1, the kernel turned around; of stride 2, four convolutions, and pixels that no window reads."""
    small()
    rng = np.random.default_rng(5)
    for options in ({"padding": 1}, {"stride": 2}, {"stride": (3, 4)}):
        size = (1, 2, 7, 9)
        k = rng.integers(-3, 4, (4, 1, 3, 3)).astype(np.float32)
        shape = run(np.zeros(size, np.float32), k, groups=2, **options).shape
        dy = rng.integers(-3, 4, shape).astype(np.float32)
        found = gpuconv.grad.conv2d_input(size, k, dy, groups=2, **options, backend=NAME)
        wanted = gpuconv.grad.conv2d_input(size, k, dy, groups=2, **options, backend="numpy.reference")
        assert np.array_equal(found, wanted), options


def test_same_bits_whatever_the_blocks_the_layout_and_the_rows(small):
    """Real numbers: a sum's order is that of the kernel and the channels alone. Also above 256 products."""
    rng = np.random.default_rng(6)
    for kernel, plane in (((3, 3), (5, 8)), ((17, 18), (3, 2))):
        x = rng.standard_normal((2, 16, *plane)).astype(np.float32)
        k = rng.standard_normal((16, 1, *kernel)).astype(np.float32)
        top, left = kernel[0] // 2, kernel[1] // 2
        options = {"groups": 16, "padding": (top, left)}
        small(threads=16, across=8)
        y = run(x, k, **options)
        answer = oracle.answer(x, k, None, **options)
        units.assert_close(y, answer, str(kernel), units.limit_of(answer))
        small(threads=3, across=1, column=2)
        assert run(x[1:], k, **options)[0].tobytes() == y[1].tobytes()
        last = run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), k, **options, layout="NHWC")
        assert np.ascontiguousarray(last.transpose(0, 3, 1, 2)).tobytes() == y.tobytes()
        # A piece of the result, by its rows from the second on, of which the windows read one row less of padding.
        piece = run(x[:1], k, groups=16, padding=((top - 1, top), (left, left)))
        assert piece.tobytes() == np.ascontiguousarray(y[:1, :, 1:]).tobytes()


def test_vectors_need_aligned_memory(ways):
    """Of views on a GPU, which are not copied: an element beyond 16 bytes, or a step of an odd number of elements."""
    from gpuconv.backends.numba_cuda.launch import Flat
    from gpuconv.problem import Conv2dProblem

    problem = Conv2dProblem.parse("n2c16h4w8_o16kh3kw3_p1g16_f32")
    memory = np.zeros(4096, np.float32)
    memory = memory[-(memory.ctypes.data // 4) % 4 :]
    rows, last = (512, 32, 0, 8, 1), (512, 1, 0, 128, 16)

    def load(offset: int, strides: tuple[int, ...]) -> str:
        x = Flat(memory, offset, strides)
        return depthwise_run.load_of(problem, depthwise_run.block_of(problem, x), x)

    assert load(4, rows) == "along_columns"
    assert load(1, rows) == "by_element"
    odd = (514, 32, 0, 8, 1), (512, 34, 0, 8, 1), (512, 32, 2, 8, 1), (512, 32, 0, 9, 1), (512, 32, 0, 16, 2)
    for changed in odd:
        assert load(0, changed) == "by_element", changed
    assert load(4, last) == "across_groups_in_vectors"
    assert load(2, last) == "across_groups"
    for changed in ((513, 1, 0, 128, 16), (512, 2, 0, 128, 32), (512, 1, 0, 130, 16), (512, 1, 0, 128, 17)):
        assert load(0, changed) == "across_groups", changed
    assert load(100, (-512, -1, 0, 128, 16)) == "across_groups"


def test_images_in_several_launches_and_blocks_with_several_tiles(small, monkeypatch):
    """As where the tiles of all images, or of a grid, are more than the kernel counts."""
    small()
    x, k = np.arange(3 * 2 * 5 * 9, dtype=np.float32).reshape(3, 2, 5, 9), np.ones((2, 1, 3, 3), np.float32)
    wanted = run(x, k, groups=2, padding=1)
    grids = []
    kernel = depthwise_run.kernel

    class Recorded:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __getitem__(self, grid: tuple) -> Any:
            grids.append(grid[0])
            return self.function[grid]

    monkeypatch.setattr(depthwise_run, "kernel", lambda *facts: Recorded(kernel(*facts)))
    assert np.array_equal(run(x, k, groups=2, padding=1), wanted)
    (whole,) = grids
    monkeypatch.setattr(depthwise_shape, "MOST", whole - 1)
    monkeypatch.setattr(launch, "MAX_GRID_X", 4)
    assert np.array_equal(run(x, k, groups=2, padding=1), wanted)
    assert grids[1:] == [4, 4], "two images, then one, with four blocks each"
    assert whole > 12


# Together what the tests above have one by one: odd widths, whose rows are no whole vectors, with every kind of steps.
SIXTEEN_BITS = [
    ((5, 11), (3, 3), {"stride": 2, "padding": 1}),
    ((4, 13), (2, 5), {"stride": 3, "padding": 2}),
    ((7, 9), (3, 3), {"dilation": 2, "padding": 2, "activation": "relu"}),
    ((5, 7), (3, 3), {"padding": 2, "padding_mode": "reflect"}),
]  # fmt: skip


@pytest.mark.parametrize(("plane", "kernel", "options"), SIXTEEN_BITS, ids=str)
def test_sixteen_bits_in_odd_widths(small, ways, plane, kernel, options):
    small()
    check(1, 2, 1, 1, plane, kernel, "bfloat16", **options)
    assert ways.pop()[3:] == ("by_element", False)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("mode", ["constant", "reflect", "symmetric", "edge", "wrap"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_padding_of_every_float(small, ways, dtype, mode, layout):
    """Beyond one period too, with steps of 2 and 3 and taps apart."""
    small()
    groups = 17 if layout == "NHWC" else 2
    for options in ({"stride": (1, 2)}, {"stride": (3, 2), "dilation": (2, 1)}):
        pads = ((3, 1), (2, 5))
        check(1, groups, 1, 1, (3, 5), (2, 3), dtype, padding=pads, padding_mode=mode, layout=layout, **options)
        assert ways.pop()[2] == ("inside" if mode == "constant" else "tabled")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_kernel_of_31_by_31(small, ways, dtype, stride):
    """In pieces of 16 rows of taps; more products than one running sum takes."""
    small()
    check(1, 1, 1, 1, (3, 16 * stride), (31, 31), dtype, padding=15, stride=stride)
    shape = ways.pop()[0]
    assert shape.by_row and (shape.taps, shape.rest) == (8, 7)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_four_outputs_of_each_channel_channels_last(small, ways, monkeypatch, dtype, stride):
    """The most sums of a thread, 4 × 2 × 4, or with a stride of 3 half of them; a tile that has but one output too."""
    monkeypatch.setattr(depthwise_shape, "_MULTIPROCESSORS", 0)
    small()
    for outputs in (4, 5):
        check(1, 16, 1, outputs, (4, 7), (3, 3), dtype, padding=1, stride=stride, layout="NHWC")
        shape = ways.pop()[0]
        assert (shape.outputs, shape.rows, shape.columns) == (4, 1 if stride == 3 else 2, 4)
        assert shape.side == 32
