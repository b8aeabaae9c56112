"""Dask arrays: block by block the answer of the whole, and nothing computed before it is asked for.

Integers compare exactly with the call on the array in memory, whatever the blocks; reals with the oracle in units of
the bound. What reads the wrong halo is shown to be found.
"""

from __future__ import annotations

import pickle
from typing import Any

import calls
import dask
import dask.array as da
import numpy as np
import oracle
import pytest
import strategies
from calls import is_costly
from dask.base import tokenize
from hypothesis import given
from hypothesis import strategies as st
from test_halo import chunks_of
from test_properties import judge

import gpuconv
from gpuconv import Conv2d, conv1d, conv2d, conv_transpose2d, explain, geometry, halo

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
    options |= {"groups": groups, "layout": layout, "flip": data.draw(st.booleans())}
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
    if is_costly("numba_cpu.rows", call.x_dtype):
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


# ---- laziness and names


class Untouchable:
    """An array that may be described, and read only when that is allowed."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.allowed = values, False
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim

    def __getitem__(self, index: Any) -> np.ndarray:
        assert self.allowed, "read before anybody asked"
        return self.values[index]


def test_nothing_is_read_until_it_is_asked_for():
    held = [Untouchable(values) for values in (X, K, BIAS)]
    x, k, bias = (
        da.from_array(values, chunks=blocks, asarray=False, meta=np.empty((0,) * values.ndim, np.float32))
        for values, blocks in zip(held, (BLOCKS, 2, 3), strict=True)
    )
    lazy = [conv2d(x, k, bias, padding=1, padding_mode="wrap"), Conv2d(K, BIAS)(x), conv_transpose2d(x, k[:4])]
    assert "blocks" in str(explain(x, k, bias))
    for values in held:
        values.allowed = True
    same(lazy[0], conv2d(X, K, BIAS, padding=1, padding_mode="wrap"))
    same(lazy[1], conv2d(X, K, BIAS))
    same(lazy[2], conv_transpose2d(X, K[:4]))


def test_only_the_blocks_in_reach_are_computed():
    def counted(block: np.ndarray) -> np.ndarray:
        read.append(block.shape)
        return block

    read: list[Any] = []
    x = da.zeros((1000, 1000), chunks=100, dtype=np.float32).map_blocks(counted, meta=np.empty((0, 0), np.float32))
    for mode, pixel in (("constant", (250, 250)), ("wrap", (0, 999))):  # whose block has eight neighbours
        read.clear()
        conv2d(x, K[0, 0], padding="same", padding_mode=mode)[pixel].compute(scheduler="synchronous")
        assert len(read) == 9


def test_equal_calls_have_equal_names():
    k, bias = integers((4, 2, 3, 3)), integers((4,))

    def name(k: Any = k, bias: Any = bias, blocks: Any = 9, groups: int = 2, **options: Any) -> str:
        return conv2d(in_blocks(blocks=blocks), k, bias, groups=groups, **options).name

    other = k.copy()
    other.flat[-1] += 1
    changes: list[dict[str, Any]] = [
        {}, {"k": other}, {"bias": bias + 1}, {"bias": None}, {"blocks": 8}, {"padding": 1}, {"stride": 2},
        {"dilation": 2}, {"padding": 1, "padding_mode": "wrap"}, {"padding": 1, "padding_value": 1}, {"flip": True},
        {"activation": "relu"}, {"dtype": np.float64}, {"precision": "high"}, {"backend": "numpy"}, {"device": "cpu"},
        {"workspace_limit": 10**6}, {"k": da.from_array(k)}, {"padding": 1, "padding_value": np.nan},
    ]  # fmt: skip
    names = [name(**change) for change in changes]
    assert len(set(names)) == len(changes)
    assert names == [name(**change) for change in changes]
    script = """
import numpy as np, dask.array as da, gpuconv
print(gpuconv.conv2d(da.zeros((9, 9), chunks=4), np.ones((3, 3)), padding=1).name)"""
    assert calls.child(script).strip() == conv2d(da.zeros((9, 9), chunks=4), np.ones((3, 3)), padding=1).name


def test_the_kernel_is_one_key_of_the_graph():
    k = RNG.standard_normal((64, 64, 5, 5)).astype(np.float32)
    x = da.zeros((1, 64, 640, 640), chunks=(1, 64, 64, 64), dtype=np.float32)
    for y in (conv2d(x, k, padding="same"), Conv2d(k)(x), conv_transpose2d(x, k)):
        (y,) = dask.optimize(y)
        # Each key on its own, as a scheduler sends them.
        sizes = sorted(len(pickle.dumps(task)) for task in dict(y.__dask_graph__()).values())
        assert k.nbytes < sizes[-1] < 1.1 * k.nbytes and sizes[-2] < k.nbytes / 50


def test_ten_thousand_blocks_are_described_at_once():
    x = da.zeros((100 * 8, 100 * 8), chunks=8, dtype=np.float32)
    y = conv2d(x, K[0, 0], padding="same", padding_mode="reflect")
    assert y.numblocks == (100, 100)
    assert len(y.__dask_graph__()) <= 100 * 100 * 10 + 1  # with eight strips of neighbours for each
    y = conv1d(da.zeros(80_000, chunks=8), np.ones(3), padding="same")
    assert y.numblocks == (10_000,)


def test_importing_gpuconv_and_using_it_does_not_import_dask():
    calls.child("""
import sys, numpy as np, gpuconv
gpuconv.conv2d(np.ones((5, 5)), np.ones((3, 3)), backend="numpy")
gpuconv.Conv2d(np.ones((3, 3)), backend="numpy")(np.ones((5, 5)))
try:
    gpuconv.conv2d({}, np.ones((3, 3)))
except TypeError:
    pass
assert not {"dask", "distributed"} & sys.modules.keys()
""")


# ---- what is refused


def test_refusals_name_the_argument_and_the_remedy():
    x = in_blocks()
    with pytest.raises(TypeError, match=r"conv2d: out .*dask.array.store"):
        conv2d(x, K, out=np.zeros(1))
    with pytest.raises(TypeError, match=r"Conv2d: out .*dask.array.store"):
        Conv2d(K)(x, out=np.zeros(1))
    with pytest.raises(TypeError, match=r"conv2d: stream"):
        conv2d(x, K, stream=0)
    with pytest.raises(ValueError, match=r"x has blocks of unknown size.*x\.compute_chunk_sizes"):
        conv2d(x[:, :, da.from_array(np.arange(23) % 2 == 0, chunks=5)], K)
    with pytest.raises(TypeError, match=r"conv2d: x is a masked array"):
        conv2d(da.ma.masked_equal(x, 0), K)
    with pytest.raises(TypeError, match=r"conv2d: x has dtype object"):
        conv2d(x.astype(object), K)
    for lazy in ({"k": da.from_array(K)}, {"k": K, "bias": da.from_array(BIAS)}):
        with pytest.raises(TypeError, match=r"is a dask array.*compute\(\).*map_blocks"):
            conv2d(X, **lazy)
    for call in (
        lambda: gpuconv.unfold(x, 3), lambda: gpuconv.grad.conv2d_input(X.shape, K, x),
        lambda: gpuconv.grad.conv2d_weight(x, K.shape, X), lambda: gpuconv.grad.conv2d_bias(x), lambda: Conv2d(x),
        lambda: conv2d(x, K, k_zero_point=da.zeros(6, dtype=int)), lambda: explain(x, K, op="weight_grad"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"is a dask array.*compute\(\).*map_blocks"):
            call()


def test_query_planning_is_refused(monkeypatch):
    """With it ``dask.array.Array`` is another class."""

    class Expression:
        pass

    monkeypatch.setattr(da, "Array", Expression)
    with pytest.raises(TypeError, match=r"conv2d: x is a dask array with query planning.*array\.query-planning"):
        conv2d(Expression(), K)


def test_a_dask_array_inside_another_collection_is_pointed_at():
    class Labelled:
        """As xarray's DataArray."""

        data = in_blocks()

        def __dask_graph__(self) -> Any:
            return self.data.__dask_graph__()

    with pytest.raises(TypeError, match=r"x is a lazy dask collection.*compute\(\).*x\.data"):
        conv2d(Labelled(), K)


def test_arguments_are_checked_at_once():
    x = in_blocks()
    for options, match in (
        ({"stride": 0}, "stride"), ({"padding": "SAME"}, "padding"), ({"backend": "nympy"}, "backend"),
        ({"device": "gpu"}, "device"), ({"workspace_limit": -1}, "workspace_limit"), ({"groups": 3}, "groups"),
        ({"bias": da.zeros(5)}, "bias must have shape"), ({"bias": 1}, "bias must be an array"),
        ({"dilation": 30}, "larger than the padded input"), ({"k": da.zeros((6, 5, 3, 3))}, "5 input channels"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=f"conv2d: .*{match}"):
            conv2d(x, **{"k": K} | options)
    with pytest.raises(ValueError, match=r"conv_transpose2d: k has 6 input channels"):
        conv_transpose2d(x, K)


def test_what_only_the_values_show_is_refused_when_they_are_there():
    x = da.from_array(np.ones((1, 2**14, 3, 3), np.int8))
    k = np.ones((1, 2**14, 1, 1), np.int8)
    bias = da.from_array(np.array([2**31 - 10]))
    with pytest.raises(ValueError, match=r"^conv2d: .*overflow"):
        conv2d(x, k, bias).compute(scheduler="synchronous")


# ---- explain


def test_explain_says_what_a_block_in_the_middle_runs():
    x = da.zeros((4, 3, 1000, 1000), chunks=(1, 3, 100, 200), dtype=np.float32)
    found = explain(x, np.ones((16, 3, 5, 5), np.float32), padding="same", padding_mode="reflect")
    assert str(found.problem) == "n1c3h104w204_o16kh5kw5_f32"
    assert "200 blocks" in str(found) and "100×200" in found.note and "104×204" in found.note
    found = explain(x, da.ones((6, 1, 3, 3), dtype=np.float32), True, groups=3, stride=2, backend="numpy.gemm")
    assert found.implementation == "numpy.gemm" and found.problem.bias
    found = explain(x, (3, 16, 3, 3), stride=2, padding=1, output_padding=1, op="transpose")
    assert found.output_shape == (1, 16, 200, 400)
    found = explain(da.zeros((50, 50), chunks=10), (3, 3), device="cuda")
    assert "25 blocks" in found.note


def test_tokens_of_layers_are_those_of_their_weights():
    assert tokenize(Conv2d(K)) == tokenize(Conv2d(K.copy())) != tokenize(Conv2d(K + 1))


# ---- arrays that are not NumPy's


class Foreign:
    """An array as CuPy's are: no ndarray, and none to be made of it without asking; NumPy's functions call it."""

    def __init__(self, inner: np.ndarray) -> None:
        self.inner = inner
        self.shape, self.size, self.ndim, self.dtype = inner.shape, inner.size, inner.ndim, inner.dtype

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Foreign:
        assert function.__name__ in ("empty_like", "full_like", "asarray")
        arguments = [given.inner if isinstance(given, Foreign) else given for given in arguments]
        return Foreign(function(*arguments, **options))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def __getitem__(self, index: Any) -> Foreign:
        return Foreign(self.inner[_own(index)])

    def __setitem__(self, index: Any, value: Foreign) -> None:
        self.inner[_own(index)] = value.inner

    def copy(self) -> Foreign:
        return Foreign(self.inner.copy())


def _own(index: tuple[Any, ...]) -> tuple[Any, ...]:
    """The index, whose arrays must be of the library that is indexed."""
    assert not any(isinstance(part, np.ndarray) for part in index)
    return tuple(part.inner if isinstance(part, Foreign) else part for part in index)


@pytest.mark.parametrize("options", [{"padding": 30, "padding_mode": "wrap"}, {"padding": 9, "dilation": (8, 7)}])
def test_windows_are_put_together_in_the_blocks_own_library(options, monkeypatch):
    """What a GPU's blocks go through before they are convolved, on a stand-in; no GPU has run it."""
    right = Conv2d.on_window

    def own(self: Conv2d, call: str, x: Any, *steps: Any) -> np.ndarray:
        assert isinstance(x, Foreign)
        return right(self, call, x.inner, *steps)

    monkeypatch.setattr(Conv2d, "on_window", own)
    x = in_blocks().map_blocks(Foreign, dtype=X.dtype, meta=np.empty((0,) * 4, X.dtype))
    same(conv2d(x, K, **options), conv2d(X, K, **options))


def test_the_result_is_described_in_the_blocks_own_library():
    class Own(np.ndarray):
        pass

    x = da.from_array(X.view(Own), chunks=BLOCKS, asarray=False)
    assert isinstance(x._meta, Own)
    y = conv2d(x, K.astype(np.float64))
    assert isinstance(y._meta, Own) and y._meta.dtype == np.float64


def test_a_device_is_each_workers_own(monkeypatch):
    monkeypatch.setenv("GPUCONV_FALLBACK", "silent")
    same(conv2d(in_blocks(), K, device="cuda"), conv2d(X, K, device="cuda"))
    with pytest.raises(gpuconv.NoBackendError if calls.usable("cuda") == [] else ValueError):
        conv2d(in_blocks(), K, device="cuda:99", backend="cupy").compute(scheduler="synchronous")
