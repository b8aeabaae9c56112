"""One input channel per output on the CPU, in place: filters and depthwise layers of a few rows, at every border."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import units
from test_rows import check, convolved, operands_of

import gpuconv
from gpuconv import arrays
from gpuconv.backends.numba_cpu import planes, runtime
from gpuconv.backends.numba_cpu.vectors import Lanes
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

# (x, k, arguments): one vector and several, inside and at every border, with windows that miss the image.
NARROW: list[Any] = [
    ((2, 19, 7, 7), (19, 1, 3, 3), {"padding": 1, "groups": 19}),
    ((1, 2, 29, 15), (4, 1, 3, 3), {"padding": 1, "groups": 2, "activation": "relu"}),
    ((1, 2, 20, 5), (2, 1, 3, 4), {"padding": (12, 9), "groups": 2, "dilation": (1, 3)}),
]
WIDE: list[Any] = [
    ((2, 3, 13, 17), (3, 1, 3, 3), {"padding": 1, "groups": 3}),
    ((1, 1, 30, 131), (2, 1, 3, 3), {}),
    ((1, 1, 8, 34), (1, 1, 3, 3), {}),
    ((1, 2, 9, 40), (2, 1, 3, 9), {"padding": ((0, 9), (7, 0)), "groups": 2, "dilation": (1, 2)}),
]
STEPS: list[Any] = [
    ((1, 3, 41, 90), (3, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 3}),
    ((1, 1, 40, 68), (1, 1, 3, 3), {"stride": 2, "activation": "relu"}),
    ((1, 2, 4, 7), (2, 1, 3, 3), {"padding": (5, 6), "stride": 2, "groups": 2}),
]
OTHERS: list[Any] = [
    ((1, 2, 23, 50), (2, 1, 7, 7), {"padding": 3, "groups": 2}),
    ((1, 17, 11, 30), (17, 1, 7, 6), {"padding": ((0, 3), (2, 0)), "groups": 17, "stride": (1, 2)}),
    ((1, 1, 1, 300), (1, 1, 1, 9), {"padding": (0, 4), "stride": (2, 1)}),
    ((1, 1, 50, 40), (3, 1, 5, 5), {"padding": (2, 0), "stride": (2, 1)}),
    ((1, 1, 3, 700), (1, 1, 2, 150), {"padding": (1, 10)}),
    ((2, 2, 19, 33), (4, 1, 4, 2), {"padding": 2, "stride": 2, "groups": 2}),
]
# Kernel rows apart: each row of outputs by itself, also where the lines of some are fewer, or none.
APART: list[Any] = [
    ((2, 3, 13, 17), (3, 1, 3, 3), {"padding": ((2, 3), (1, 1)), "groups": 3, "dilation": 2}),
    ((1, 1, 30, 131), (2, 1, 3, 3), {"dilation": (3, 2), "activation": "relu"}),
    ((1, 2, 2, 9), (2, 1, 3, 3), {"padding": (7, 1), "groups": 2, "dilation": (4, 1)}),
]
# Planes of which a few fit the first-level cache, in two tiles each.
SEVERAL: Any = ((1, 40, 15, 15), (40, 1, 3, 3), {"padding": 1, "groups": 40})
QUICK = NARROW + WIDE + STEPS
EVERY = [*QUICK, *APART, *(pytest.param(*posed, marks=pytest.mark.full) for posed in OTHERS)]


@pytest.mark.parametrize(("x_shape", "k_shape", "kwargs"), EVERY)
def test_nothing_beyond_the_arrays_is_read_or_written(x_shape, k_shape, kwargs):
    check(planes, x_shape, k_shape, kwargs)


@pytest.mark.full
@pytest.mark.parametrize("bits", [512, 256, 128])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(("x_shape", "k_shape", "kwargs"), QUICK + OTHERS)
def test_every_register(x_shape, k_shape, kwargs, dtype, bits):
    check(planes, x_shape, k_shape, kwargs, dtype, bits=bits, threads=2)


@pytest.mark.parametrize("bits", [256, 128])
@pytest.mark.parametrize("posed", [WIDE[0], NARROW[0], SEVERAL], ids=["overlapping", "pieces", "several"])
def test_other_registers(posed, bits):
    check(planes, *posed, bits=bits)


def test_tiles_with_sixteen_registers():
    """Rows that are whole tiles, where there is a height for it; two vectors where lines are long."""

    def tile(line: str) -> tuple[int, int]:
        return planes.tile_of(Conv2dProblem.parse(line), Lanes("float32", 8))

    assert tile("n1c3h14w14_o3kh3kw3_p1g3_f32") == (7, 1)
    assert tile("n1c3h28w28_o3kh3kw3_p1g3_f32") == (10, 1)
    assert tile("n1c3h56w56_o3kh7kw7_p3g3_f32") == (7, 1)
    assert tile("n1c1h2048w2048_o1kh3kw3_p1_f32") == (6, 2)
    assert tile("n1c1h2048w2048_o1kh7kw7_p3_f32") == (4, 2)


@pytest.mark.parametrize(("x_shape", "k_shape", "kwargs"), EVERY)
def test_a_nan_reaches_the_windows_that_read_it(x_shape, k_shape, kwargs):
    x, k, _ = operands_of(x_shape, k_shape)
    for at in (0, x.size // 2, x.size - 1):
        damaged = x.copy()
        damaged.flat[at] = np.nan
        units.assert_close(convolved(planes, damaged, k, **kwargs), oracle.answer(damaged, k, **kwargs))


@pytest.mark.parametrize(("x_shape", "k_shape", "kwargs"), EVERY)
def test_same_bits(x_shape, k_shape, kwargs):
    x, k, bias = operands_of((3, *x_shape[1:]), k_shape)
    y = convolved(planes, x, k, bias, **kwargs)
    assert np.array_equal(convolved(planes, x[:1], k, bias, **kwargs), y[:1])
    for threads in (2, 3, 40):
        assert np.array_equal(convolved(planes, x, k, bias, threads=threads, **kwargs), y)
    order, steps = (3, 1, 0, 2), (1, -2, 1, -2)
    strided, kernel = units.arranged(x, order, steps)[0], units.arranged(k, order, (2, 1, -1, 1))[0]
    out, memory = units.arranged(np.zeros_like(y), (0, 3, 2, 1), (1, 2, -1, 1))
    before = np.count_nonzero(np.isnan(memory))
    convolved(planes, strided, kernel, bias, out=out, **kwargs)
    assert np.array_equal(out, y)
    assert np.count_nonzero(np.isnan(memory)) == before
    for threads in (1, 2):  # a phase of an input gradient: planes side by side, results apart
        out = np.full((*y.shape[:3], 2 * y.shape[3]), np.nan, np.float32)
        convolved(planes, x, k, bias, out=out[..., ::2], threads=threads, **kwargs)
        assert np.array_equal(out[..., ::2], y) and np.isnan(out[..., 1::2]).all()


@pytest.mark.parametrize("shift", [0, 1])
def test_results_past_the_caches(monkeypatch, shift):
    """Only where every row begins at a cache line; the bits are the same."""
    x, k, bias = operands_of((2, 1, 37, 192), (3, 1, 3, 3))
    wanted = convolved(planes, x, k, bias, padding=1)
    monkeypatch.setattr(planes, "_STREAM", 0)
    memory = arrays.empty((wanted.size + 32,), np.float32)
    memory[...] = np.nan
    out = memory[shift : shift + wanted.size].reshape(wanted.shape)
    convolved(planes, x, k, bias, out=out, threads=2, padding=1)
    assert np.array_equal(out, wanted)
    assert np.count_nonzero(np.isnan(memory)) == 32


def test_lines_a_page_apart_are_copied_and_change_no_bit(monkeypatch):
    x, k, bias = operands_of((1, 1, 40, 1024), (1, 1, 7, 7))
    wanted = convolved(planes, x, k, bias, padding=3)
    copied: list[bool] = []
    collides = planes._collides
    monkeypatch.setattr(planes, "_collides", lambda *given: copied.append(collides(*given)) or copied[-1])
    apart = np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 8)))[..., :1024]
    assert np.array_equal(convolved(planes, x, k, bias, padding=3, threads=2), wanted)
    assert np.array_equal(convolved(planes, apart, k, bias, padding=3, threads=2), wanted)
    assert copied == [runtime.vector_bits() < 512, False]


@pytest.mark.parametrize("rows", [1, 1000])
def test_how_many_lines_are_copied_together_changes_no_bit(monkeypatch, rows):
    x, k, bias = operands_of((1, 2, 203, 70), (2, 1, 5, 5))
    wanted = convolved(planes, x, k, bias, padding=2, groups=2)
    strided = np.repeat(x, 2, axis=3)[..., ::2]
    monkeypatch.setattr(planes, "_COPIED_ROWS", rows)
    monkeypatch.setattr(planes, "ALONE", 0)
    out = np.empty((*wanted.shape, 2), np.float32)[..., 0]
    problem = Conv2dProblem.of(x.shape, k.shape, x_dtype="float32", k_dtype="float32", bias=True, padding=2, groups=2)
    target = gpuconv.backends.protocol.Target("cpu", threads=2)
    config = planes._plan_lines(problem, target, 1 << 30).config
    assert (config["copy"][planes.TALL] > config["table"][planes.HIGH]) == (rows == 1000)
    convolved(planes, strided, k, bias, out=out, threads=2, padding=2, groups=2)
    assert np.array_equal(out, wanted)


@pytest.mark.parametrize("stride", [1, 2])
def test_little_scratch_gives_the_same_bits(stride):
    """Columns are cut into parts, whose tiles read over the edges of the parts."""
    x, k, _ = operands_of((1, 2, 20, 500), (2, 1, 3, 3))
    strided = np.repeat(x, 2, axis=3)[..., ::2]
    problem = Conv2dProblem.of(
        x.shape, k.shape, x_dtype="float32", k_dtype="float32", padding=1, groups=2, stride=stride
    )
    target = gpuconv.backends.protocol.Target("cpu", threads=2)
    whole = planes.plan(problem, target, 1 << 28)
    with pytest.raises(MemoryError, match=r"numba_cpu\.planes .* needs at least"):
        planes.plan(problem, target, 4096)
    small = planes.plan(problem, target, 16_000)
    assert small.workspace <= 16_000 < whole.workspace
    wanted = convolved(planes, x, k, padding=1, groups=2, stride=stride)
    y = np.full(wanted.shape, np.nan, np.float32)
    operands = gpuconv.backends.protocol.Operands(strided[:, :, None], k[:, None])
    planes.run(small, operands, y[:, :, None])
    assert np.array_equal(y, wanted)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_transposed_image_with_columns_far_apart(sign):
    """It is copied a few columns at a time, the last of them fewer."""
    stored = np.random.default_rng(0).standard_normal((21, 256), np.float32)
    x, k = stored[::sign].T, np.arange(9, dtype=np.float32).reshape(3, 3)
    assert abs(x.strides[1]) == planes._FAR and x.shape[1] % planes._ABREAST
    given = {"padding": 1, "backend": "numba_cpu.planes"}
    y = gpuconv.conv2d(x, k, **given)
    assert np.array_equal(y, gpuconv.conv2d(x.copy("C"), k, **given))
    assert np.allclose(y, gpuconv.conv2d(x, k, padding=1, backend="numpy.reference"), atol=1e-4)


def test_what_dilated_kernels_are_chosen_for():
    def chosen(line: str) -> str:
        return gpuconv.explain(line, device="cpu").implementation

    assert chosen("n1c1h99w99_o1kh5kw5_d2_f32") == planes.NAME
    assert chosen("n1c4h20w20_o4kh3kw3_d2g4_f32") == planes.NAME
    assert chosen("n1c32h20w20_o32kh3kw3_d2g32_f32") == "numba_cpu.lanes"


def test_refusals_name_the_reason():
    def reasons(line: str) -> str:
        return "; ".join(planes.unsupported(Conv2dProblem.parse(line), gpuconv.backends.protocol.Target("cpu")))

    assert reasons("n1c3h9w9_o3kh3kw3_g3_f32") == ""
    assert "one channel per group, not 3" in reasons("n1c3h9w9_o3kh3kw3_f32")
    assert "registers for the weights of 7 kernel rows, not 8" in reasons("n1c3h9w9_o3kh8kw3_g3_f32")
    assert reasons("n1c3h19w19_o3kh3kw3_d4g3_f32") == ""
    assert "rows at most 16 apart, not 17" in reasons("n1c3h99w19_o3kh3kw3_d17x1g3_f32")
    assert "dilation of the kernel's rows with a stride" in reasons("n1c3h19w19_o3kh3kw3_s2d2g3_f32")
    assert "strides of 1 and 2" in reasons("n1c3h9w9_o3kh3kw3_s3g3_f32")
    assert "layout NCHW" in reasons("n1c3h9w9_o3kh3kw3_g3_nhwc_f32")
    assert "at most 320" in reasons("n1c3h9w99_o3kh7kw46_g3_f32")
