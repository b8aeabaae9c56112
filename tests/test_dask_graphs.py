"""Graphs of dask arrays: lazy, named by what they are made of, refused early, in whatever library the blocks have."""

from __future__ import annotations

import pickle
from typing import Any

import calls
import dask
import dask.array as da
import numpy as np
import pytest
from dask.base import tokenize
from test_dask import BIAS, BLOCKS, K, X, in_blocks, integers, same

import gpuconv
from gpuconv import Conv2d, conv1d, conv2d, conv_transpose2d, explain

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
    k = np.random.default_rng(3).standard_normal((64, 64, 5, 5)).astype(np.float32)
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
