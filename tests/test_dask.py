"""Dask arrays: block by block the answer of the whole, and nothing computed before it is asked for.

Integers compare exactly with the call on the array in memory, whatever the blocks; reals with the oracle in units of
the bound. What reads the wrong halo is shown to be found.
"""

from __future__ import annotations

import pickle
from typing import Any

import dask.array as da
import numpy as np
import oracle
import pytest
import strategies
from calls import affordable, is_costly
from hypothesis import given
from hypothesis import strategies as st
from test_halo import chunks_of
from test_properties import judge

from gpuconv import Conv2d, conv1d, conv2d, conv_transpose2d, geometry, halo

RNG = np.random.default_rng(0)
MODES = geometry.PADDING_MODES


def integers(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return RNG.integers(-4, 5, shape).astype(dtype)


X, K, BIAS = integers((2, 4, 23, 31)), integers((6, 4, 3, 5)), integers((6,))
# Uneven, with blocks smaller than the halo and than the stride, and two of nothing.
ROWS, COLUMNS = (5, 1, 0, 10, 7), (20, 0, 8, 1, 2)
BLOCKS = ((1, 1), (3, 1), ROWS, COLUMNS)


def in_blocks(x: np.ndarray = X, blocks: Any = BLOCKS) -> da.Array:
    return da.from_array(x, chunks=blocks)


def computed(y: da.Array, **options: Any) -> np.ndarray:
    """The value of ``y``, whose description must be that of its value, block by block."""
    value = y.compute(**{"scheduler": "synchronous"} | options)
    assert isinstance(y, da.Array) and (y.shape, y.dtype) == (value.shape, value.dtype)
    assert y._meta.dtype == y.dtype and y._meta.ndim == y.ndim
    return value


def same(y: da.Array, wanted: np.ndarray, **options: Any) -> None:
    """``y`` has the bits of ``wanted``, and every block the extents that its chunks say."""
    value = computed(y, **options)
    assert np.array_equal(value, wanted) and value.dtype == wanted.dtype


# ---- the same numbers as in memory

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"padding": "same"},
    {"padding": "same", "stride": (2, 3)},
    {"padding": "same_lower", "stride": 2, "dilation": (3, 2)},
    {"padding": "full", "stride": (1, 4)},
    {"padding": ((3, 0), (0, 7)), "stride": (2, 1), "dilation": (2, 1)},
    {"padding": ((0, 9), (40, 1)), "stride": (9, 5)},
    {"padding": 60, "stride": 11},
    {"padding": 9, "dilation": (8, 7)},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_blocks_give_what_the_whole_gives(geometry, mode):
    x = X if mode != "constant" else X + 1  # so that a missing border shows
    options = geometry | {"padding_mode": mode, "backend": "numpy.gemm"}
    same(conv2d(in_blocks(x), K, BIAS, **options), conv2d(x, K, BIAS, **options))


def test_the_constant_is_the_constant():
    for options in ({"padding": 3, "padding_value": 7}, {"padding": 40, "padding_value": -2, "dilation": (1, 9)}):
        same(conv2d(in_blocks(), K, **options), conv2d(X, K, **options))
    x, k = integers((2, 4, 23, 31), np.int8), integers((6, 4, 3, 5), np.int8)
    options = {"padding": 30, "dilation": (1, 8), "x_zero_point": 3, "k_zero_point": np.arange(6)}
    same(conv2d(in_blocks(x), k, **options), conv2d(x, k, **options))


@given(data=st.data())
def test_any_blocks_of_integers(data):
    """Small arrays in blocks of any size along all axes: every output must be that of the whole array."""
    (H, W), (KH, KW), options = data.draw(strategies.geometries())
    layout, groups = data.draw(st.sampled_from(strategies.LAYOUTS)), data.draw(st.sampled_from((1, 2, 3)))
    N, I, per_group = (data.draw(st.integers(1, 3)) for _ in range(3))
    seed = data.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    extents = {"N": N, "C": I * groups, "H": H, "W": W}
    shape = tuple(extents[axis] for axis in layout)
    x = rng.integers(-9, 10, shape, dtype=np.int16)
    k = rng.integers(-9, 10, (per_group * groups, I, KH, KW), dtype=np.int16)
    options |= {"groups": groups, "layout": layout, "flip": data.draw(st.booleans())} | affordable("int16")
    blocks = tuple(data.draw(chunks_of(n)) for n in shape)
    same(conv2d(in_blocks(x, blocks), k, **options), conv2d(x, k, **options))


@pytest.mark.parametrize("share", ["quick", pytest.param("long", marks=pytest.mark.full)])
@given(call=strategies.calls(), data=st.data())
def test_any_call_holds_the_bound(share, call, data):
    """All that conv2d takes: ranks, layouts, kernel layouts, types, zero points, precisions, NaN and infinities."""
    x, k, bias = call.operands()
    dtype = call.kwargs.get("dtype")
    numpy_dtype = None if dtype is None else strategies.cases.numpy_dtype(dtype)
    answer = oracle.answer(x, k, bias, **call.kwargs | {"dtype": numpy_dtype})
    options = {"precision": call.options["precision"]}
    if is_costly("numba_cpu.rows", call.x_dtype, answer.dtype.name):
        options["backend"] = "numpy"
    blocks = tuple(data.draw(chunks_of(n)) for n in x.shape)
    lazy = data.draw(st.booleans())
    weights = da.from_array(k, chunks=2) if lazy else k
    offset = da.from_array(bias, chunks=2) if lazy and bias is not None else bias
    y = computed(conv2d(in_blocks(x, blocks), weights, offset, **call.kwargs, **options))
    judge(y, answer, call, f"blocks {blocks}")


def test_wrong_halos_are_found(monkeypatch):
    """The checks above fail where a block reads a pixel too early, too little, or is padded on its own."""
    right = halo._forward_reach

    def early(row, k, first, outputs, before, *rest):
        return right(row, k, first, outputs, before + (first > 0), *rest)

    def late(row, k, first, outputs, before, *rest):
        return right(row, k, first, outputs, before - (first > 0), *rest)

    def alone(row, k, first, outputs, before, stride, dilation, mode):
        reach = right(row, k, first, outputs, before, stride, dilation, mode)
        (block, start, stop), *others = reach.parts
        if not others or reach.table is not None:
            return reach
        lost = sum(stop - start for _, start, stop in others)
        low, high = reach.padding
        return halo.Reach(outputs, ((block, start, stop),), stride, dilation, (low, high + lost))

    for wrong in (early, late, alone):
        monkeypatch.setattr(halo, "_forward_reach", wrong)
        for options in GEOMETRIES[:3]:
            with pytest.raises(AssertionError):
                same(conv2d(in_blocks(X + 1), K, **options), conv2d(X + 1, K, **options))


# ---- channels, batches, layouts


def test_blocks_of_channels_are_gathered_for_every_output_channel():
    y = conv2d(in_blocks(), K, padding=1)
    assert y.chunks[:2] == ((1, 1), (6,))
    same(y, conv2d(X, K, padding=1))


def test_many_small_blocks_of_channels_are_merged():
    """Rather than cut into strips one by one: 32 times nine pieces for each block of the result."""
    x, k = integers((32, 40, 40), np.int64), integers((8, 32, 3, 3), np.int64)
    for weights, options in ((k, {}), (k[:, :16], {"groups": 2}), (k[:, :1], {"groups": 32})):
        weights = np.concatenate([weights] * 4)
        y = conv2d(da.from_array(x, chunks=(1, 10, 10)), weights, padding=1, **options)
        same(y, conv2d(x, weights, padding=1, **options))
        pieces = [key for key in y.__dask_graph__() if "strip" in key[0]]
        assert len(pieces) <= 8 * y.npartitions
    same(
        conv_transpose2d(da.from_array(x, chunks=(1, 20, 20)), k.swapaxes(0, 1)), conv_transpose2d(x, k.swapaxes(0, 1))
    )


@pytest.mark.parametrize(("groups", "blocks", "runs"), [(4, (1, 2, 1), (2, 4, 2)), (4, (3, 0, 1), (6, 2)),
                                                        (2, (1, 2, 1), (4, 4)), (2, (4,), (8,))])  # fmt: skip
@pytest.mark.parametrize("lazy", [False, True])
def test_groups_stay_in_blocks(groups, blocks, runs, lazy):
    k, bias = integers((8, 4 // groups, 3, 3)), integers((8,))
    x = in_blocks(blocks=((2,), blocks, ROWS, COLUMNS))
    weights = (da.from_array(k), da.from_array(bias)) if lazy else (k, bias)
    y = conv2d(x, *weights, groups=groups, padding="same")
    assert y.chunks[1] == runs
    same(y, conv2d(X, k, bias, groups=groups, padding="same"))
    hwio = k.transpose(2, 3, 1, 0)
    y = conv2d(x.transpose(0, 2, 3, 1), hwio, bias, groups=groups, layout="NHWC", kernel_layout="HWIO")
    assert y.chunks[3] == runs
    same(y, conv2d(X, k, bias, groups=groups).transpose(0, 2, 3, 1))


def test_zero_points_go_with_their_groups():
    x, k = integers((2, 4, 23, 31), np.uint8) % 8, integers((8, 1, 3, 3), np.int8)
    options = {"groups": 4, "padding": 2, "x_zero_point": 128, "k_zero_point": np.arange(8) - 3}
    same(conv2d(in_blocks(x), k, **options), conv2d(x, k, **options))


@pytest.mark.parametrize(
    ("x", "k", "layout"),
    [
        (X[0, 0], K[0, 0], "NCHW"),
        (X[0, 0], K[:, 0], "NCHW"),
        (X[0, 0], K[:, 0], "NHWC"),
        (X[0], K, "NCHW"),
        (X[0].transpose(1, 2, 0), K, "NHWC"),
    ],
)
def test_every_rank(x, k, layout):
    y = conv2d(da.from_array(x, chunks=7), k, padding="same", layout=layout)
    same(y, conv2d(x, k, padding="same", layout=layout))


def test_empty_axes():
    for shape in ((0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6)):
        x, k = np.zeros(shape, np.float32), integers((6, shape[1], 1, 1))
        same(conv2d(da.from_array(x, chunks=3), k, BIAS, padding=2), conv2d(x, k, BIAS, padding=2))


def test_every_kind_of_number():
    for dtype in ("float16", "bfloat16", "float64", "complex64", "int8", "uint8", "int16", "bool", ">f4", ">i2"):
        x, k = (np.abs(a).astype(strategies.cases.numpy_dtype(dtype)) for a in (X, K))
        options = {"padding": 3, "padding_mode": "reflect", "backend": "numpy"}
        same(conv2d(in_blocks(x), k, **options), conv2d(x, k, **options))


# ---- the relatives


@pytest.mark.parametrize("options", [
    {}, {"padding": "same"}, {"padding": (0, 9), "dilation": 4, "stride": 3},
    {"padding": 99, "padding_mode": "reflect"},
], ids=str)  # fmt: skip
def test_conv1d(options):
    for x, k, layout in (
        (X[0, 0, 0], K[0, 0, 0], "NCL"), (X[0, :, 0], K[:, :, 0], "NCL"), (X[:, :, 0], K[:, :, 0], "NCL"),
        (X[:, :, 0].transpose(0, 2, 1), K[:, :, 0], "NLC"),
    ):  # fmt: skip
        wanted = conv1d(x, k, layout=layout, **options)
        for weights in (k, da.from_array(k, chunks=2)):
            same(conv1d(da.from_array(x, chunks=6), weights, layout=layout, **options), wanted)


@given(data=st.data())
def test_transposed(data):
    strides, dilations = (data.draw(st.tuples(*[st.integers(1, 4)] * 2)) for _ in range(2))
    kernel = data.draw(st.tuples(*[st.integers(1, 4)] * 2))
    sizes = data.draw(st.tuples(*[st.integers(1, 9)] * 2))
    pads, extra = [], []
    for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        extra.append(data.draw(st.integers(0, max(s, d) - 1)))
        reach = (n - 1) * s + geometry.window(k, d)
        low = data.draw(st.integers(0, reach - 1))
        pads.append((low, data.draw(st.integers(0, reach - 1 - low))))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    x, k = rng.integers(-9, 10, (2, 4, *sizes)), rng.integers(-9, 10, (4, 3, *kernel))
    groups = data.draw(st.sampled_from((1, 2)))
    bias = rng.integers(-9, 10, 3 * groups)
    options = {"stride": strides, "padding": tuple(pads), "output_padding": tuple(extra), "dilation": dilations}
    blocks = tuple(data.draw(chunks_of(n)) for n in x.shape)
    wanted = conv_transpose2d(x, k, bias, groups=groups, **options)
    weights = k if data.draw(st.booleans()) else da.from_array(k, chunks=2)
    same(conv_transpose2d(in_blocks(x, blocks), weights, bias, groups=groups, **options), wanted)


def test_transposed_in_other_forms():
    k = integers((4, 3, 3, 5))
    y = conv_transpose2d(in_blocks().transpose(0, 2, 3, 1), k, stride=2, padding=1, layout="NHWC", activation="relu")
    same(y, np.maximum(conv_transpose2d(X, k, stride=2, padding=1), 0).transpose(0, 2, 3, 1))
    y = conv_transpose2d(da.from_array(X[0, 0], chunks=4), K[0, 0], stride=(1, 2), output_padding=(0, 1))
    same(y, conv_transpose2d(X[0, 0], K[0, 0], stride=(1, 2), output_padding=(0, 1)))
    y = conv_transpose2d(in_blocks(), k, stride=3)
    assert max(y.chunks[2]) <= 40


# ---- prepared


def test_a_prepared_convolution_takes_blocks():
    k = K.copy()
    layer = Conv2d(k, BIAS, stride=2, padding="same", padding_mode="wrap", activation="relu")
    y = layer(in_blocks())
    k[:] = 0
    wanted = conv2d(X, K, BIAS, stride=2, padding="same", padding_mode="wrap", activation="relu")
    same(y, wanted)
    same(pickle.loads(pickle.dumps(layer))(in_blocks()), wanted)
    depthwise = Conv2d(K[:4, :1], groups=4, padding=1)
    y = depthwise(in_blocks())
    assert y.chunks[1] == (3, 1)
    same(y, conv2d(X, K[:4, :1], groups=4, padding=1))


def test_later_changes_of_the_kernel_change_nothing():
    for call, weights in ((conv2d, K), (conv_transpose2d, integers((4, 3, 3, 5)))):
        k = weights.copy()
        y = call(in_blocks(), k)
        k[:] = 0
        same(y, call(X, weights))
