"""The reference implementation against three answers that owe gpuconv nothing: the oracle, SciPy, and ONNX's tests."""

from __future__ import annotations

import functools
import importlib
import itertools
import pathlib
from typing import Any

import cases
import numpy as np
import onnx
import oracle
import pytest
import scipy.ndimage
import scipy.signal
import units
from cases import CASES, DTYPES, Case

import gpuconv

run = functools.partial(gpuconv.conv2d, backend="numpy.reference")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.name}-{dtype}")
        for case, dtype in itertools.product(CASES, DTYPES)
        if case.accepts(dtype)
    ],
)
def test_agrees_with_the_oracle(case, dtype):
    units.check(run, case, dtype, "normal")


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_oracle_on_other_seeds(case):
    for seed, dtype in itertools.product(range(1, 6), DTYPES):
        if case.accepts(dtype):
            for kind in ("normal", "positive", "narrow", "wide"):
                x, k, bias = cases.fill(case, dtype, kind, seed)
                answer = oracle.answer(x, k, bias, **case.kwargs)
                check = units.assert_exact if kind in ("narrow", "wide") else units.assert_close
                check(run(x, k, bias, **case.kwargs), answer, f"{case.name} {dtype} {kind} seed {seed}")


def test_reference_is_within_one_rounding():
    """float32 is summed in float64: half a unit in the last place, whatever K."""
    for case in CASES:
        if case.accepts("float32"):
            x, k, bias, answer = units.posed(case, "float32", "normal")
            y = run(x, k, bias, **case.kwargs).astype(np.longdouble)
            slack = units.roundoff(np.dtype("float32")) * np.abs(answer.y) * (1 + 1e-6) + 1e-15 * answer.magnitude
            assert np.all(np.abs(y - answer.y) <= slack), case.name


# ---- SciPy, given types that it neither wraps nor rounds


def pictures(dtype: Any, shape: tuple[int, int] = (9, 8), kernel: tuple[int, int] = (3, 5)) -> tuple[Any, Any]:
    case = Case("picture", shape, kernel)
    return cases.fill(case, dtype, "normal")[:2]


def compare(y: np.ndarray, wanted: np.ndarray, x: np.ndarray, k: np.ndarray, **kwargs: Any) -> None:
    """``y`` against ``wanted``, within the bound that the oracle knows."""
    answer = oracle.answer(x, k, **kwargs)
    if oracle.is_integer(y.dtype):
        assert np.array_equal(y, wanted)
        return
    error = units.components(y) - units.components(np.asarray(wanted))
    assert np.all(np.abs(error) <= units.bound(answer) * (1 + 1e-6))


def widened(array: np.ndarray) -> np.ndarray:
    kind = np.int64 if oracle.is_integer(array.dtype) else np.longdouble
    return array.astype(np.clongdouble if oracle.is_complex(array.dtype) else kind)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128", "int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("mode", ["valid", "full"])
def test_scipy_correlate2d(mode, dtype):
    for shape, kernel in (((9, 8), (3, 5)), ((5, 5), (5, 5)), ((6, 7), (2, 4)), ((1, 9), (1, 4))):
        x, k = pictures(dtype, shape, kernel)
        # correlate2d conjugates its second argument, and conv2d nothing
        wanted = scipy.signal.correlate2d(widened(x), widened(k).conj(), mode)
        compare(run(x, k, padding=mode), wanted, x, k, padding=mode)
        wanted = scipy.signal.convolve2d(widened(x), widened(k), mode)
        compare(run(x, k, padding=mode, flip=True), wanted, x, k, padding=mode, flip=True)


@pytest.mark.parametrize(("boundary", "mode"), [("fill", "constant"), ("wrap", "wrap"), ("symm", "symmetric")])
def test_scipy_correlate2d_same(boundary, mode):
    for kernel in ((3, 5), (1, 1), (5, 3)):
        x, k = pictures("float64", (7, 6), kernel)
        wanted = scipy.signal.correlate2d(widened(x), widened(k), "same", boundary)
        compare(run(x, k, padding="same", padding_mode=mode), wanted, x, k, padding="same", padding_mode=mode)


@pytest.mark.parametrize(
    ("scipy_mode", "mode"),
    [
        ("constant", "constant"),
        ("reflect", "symmetric"),  # SciPy's "reflect" repeats the edge pixel,
        ("mirror", "reflect"),  # its "mirror" does not
        ("nearest", "edge"),
        ("grid-wrap", "wrap"),
    ],
)
def test_scipy_ndimage(scipy_mode, mode):
    for shape, kernel in (((9, 8), (3, 5)), ((3, 4), (5, 7)), ((2, 3), (7, 7)), ((6, 5), (2, 4))):
        x, k = pictures("float64", shape, kernel)
        # ndimage puts the centre of an even kernel after its middle, as "same_lower" does
        wanted = scipy.ndimage.correlate(x, k, mode=scipy_mode, cval=3)
        kwargs: dict[str, Any] = {"padding": "same_lower", "padding_mode": mode}
        if mode == "constant":
            kwargs["padding_value"] = 3
        answer = oracle.answer(x, k, **kwargs)
        # two float64 sums, each within the bound
        assert np.all(np.abs(run(x, k, **kwargs) - wanted) <= 2 * units.bound(answer)), f"{shape} {kernel}"


def test_scipy_channels_strides_and_dilations():
    """Channels summed, groups kept apart, strides and dilations as slices of correlate2d."""
    rng = np.random.default_rng(3)
    x, k = rng.integers(-99, 99, (2, 4, 11, 12)), rng.integers(-99, 99, (6, 2, 3, 2))
    spread = np.zeros((6, 2, 5, 4), k.dtype)  # dilation (2, 3) written out
    spread[:, :, ::2, ::3] = k
    wanted = np.array(
        [
            [
                sum(scipy.signal.correlate2d(image[o // 3 * 2 + c], spread[o, c], "valid")[::3, ::2] for c in range(2))
                for o in range(6)
            ]
            for image in x
        ]
    )
    assert np.array_equal(run(x, k, stride=(3, 2), dilation=(2, 3), groups=2), wanted)


# ---- ONNX's operator tests and the models in its data folder


@functools.cache
def operator_tests() -> tuple[Any, ...]:
    """ONNX's cases of Conv and ConvInteger. ``collect_testcases`` would import those of every operator."""
    package = importlib.import_module("onnx.backend.test.case.node")
    for module in ("conv", "convinteger"):
        importlib.import_module(f"{package.__name__}.{module}")
    found = [case for case in package._NodeTestCases if case.model.graph.node[0].op_type in ("Conv", "ConvInteger")]
    return tuple(found)


def arguments(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of Conv or ConvInteger as keyword arguments."""
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    auto_pad = given.get("auto_pad", b"NOTSET").decode()
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    return {
        "stride": tuple(given.get("strides", (1, 1))),
        "dilation": tuple(given.get("dilations", (1, 1))),
        "groups": given.get("group", 1),
        "padding": ((top, bottom), (left, right)) if auto_pad == "NOTSET" else auto_pad.lower(),
    }


def test_onnx_tests_are_all_there():
    """A renamed module or folder must not turn these tests into nothing."""
    names = {case.model.graph.node[0].op_type for case in operator_tests()}
    assert names == {"Conv", "ConvInteger"}
    assert len(operator_tests()) >= 8
    assert len(model_folders()) >= 10


@pytest.mark.parametrize("case", operator_tests(), ids=lambda case: case.name)
def test_onnx_operator(case):
    node = case.model.graph.node[0]
    for (x, k, *rest), (wanted,) in case.data_sets:
        kwargs = arguments(node)
        if node.op_type == "ConvInteger":
            zero_points = (*rest, 0, 0)[:2]
            kwargs |= {"x_zero_point": int(zero_points[0]), "k_zero_point": zero_points[1]}
            rest = []
        y = run(x, k, *rest, **kwargs)
        assert y.dtype == wanted.dtype
        assert y.shape == wanted.shape
        assert np.allclose(y, wanted, rtol=case.rtol, atol=case.atol)


def model_folders() -> list[pathlib.Path]:
    root = pathlib.Path(onnx.__file__).parent / "backend" / "test" / "data" / "pytorch-converted"
    return sorted(root.glob("test_Conv2d*"))


@pytest.mark.parametrize("folder", model_folders(), ids=lambda folder: folder.name)
def test_onnx_model_of_pytorch(folder):
    """One Conv each, computed by PyTorch."""
    graph = onnx.load(folder / "model.onnx").graph
    (node,) = graph.node
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    x, wanted = (
        onnx.numpy_helper.to_array(onnx.load_tensor(folder / "test_data_set_0" / f"{name}_0.pb"))
        for name in ("input", "output")
    )
    operands = [held.get(name, x) for name in node.input]
    y = run(*operands, **arguments(node))
    assert y.dtype == wanted.dtype
    # both within the bound of the true sum
    answer = oracle.answer(*operands, **arguments(node))
    assert y.shape == wanted.shape
    assert np.all(np.abs(y.astype(np.longdouble) - wanted) <= 2 * units.bound(answer))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_onnx_auto_pad_names(auto_pad):
    """ONNX's names in lower case are ours, with strides and even kernels. Shapes are ONNX's own inference."""
    for n, k, stride in itertools.product(range(4, 9), range(1, 5), range(1, 4)):
        node = onnx.helper.make_node(
            "Conv", ["x", "k"], ["y"], auto_pad=auto_pad, kernel_shape=[k, k], strides=[stride, stride]
        )
        graph = onnx.helper.make_graph(
            [node],
            "one",
            [
                onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1, n, n]),
                onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, [1, 1, k, k]),
            ],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        )
        inferred = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph), strict_mode=True).graph.output[0]
        wanted = tuple(dimension.dim_value for dimension in inferred.type.tensor_type.shape.dim)
        x, kernel = np.ones((1, 1, n, n), np.float32), np.ones((1, 1, k, k), np.float32)
        y = run(x, kernel, stride=stride, padding=auto_pad.lower())
        assert y.shape == wanted, f"{auto_pad} n={n} k={k} stride={stride}"
        answer = oracle.answer(x, kernel, stride=stride, padding=auto_pad.lower())
        units.assert_exact(y, answer, f"{auto_pad} n={n} k={k} stride={stride}")
