"""ONNX's own tests of the relatives: ConvTranspose, Col2Im, and every convolution model in one or two dimensions.

The operator tests of Conv and ConvInteger, and the models of two-dimensional Conv, are in ``test_reference``.
"""

from __future__ import annotations

import functools
import importlib
import pathlib
from typing import Any

import numpy as np
import onnx
import oracle
import oracle_family
import pytest
import units

import gpuconv

OPERATORS = {"ConvTranspose": "convtranspose", "Col2Im": "col2im"}


@functools.cache
def operator_tests() -> tuple[Any, ...]:
    """ONNX's cases of the two operators. ``collect_testcases`` would import those of every operator."""
    package = importlib.import_module("onnx.backend.test.case.node")
    for module in OPERATORS.values():
        importlib.import_module(f"{package.__name__}.{module}")
    return tuple(case for case in package._NodeTestCases if case.model.graph.node[0].op_type in OPERATORS)


@functools.cache
def model_folders() -> tuple[pathlib.Path, ...]:
    root = pathlib.Path(onnx.__file__).parent / "backend" / "test" / "data"
    return tuple(sorted(root.glob("pytorch-*/test_*[Cc]onv*")))


def graph_of(folder: pathlib.Path) -> onnx.GraphProto:
    return onnx.load(folder / "model.onnx").graph


def spatial(case: Any) -> int:
    """The number of spatial axes: gpuconv convolves along one or two, not three."""
    if isinstance(case, pathlib.Path):
        graph = graph_of(case)
        weight = next(tensor for tensor in graph.initializer if tensor.name == graph.node[0].input[1])
        return len(weight.dims) - 2
    inputs, _ = case.data_sets[0]
    return len(inputs[1]) if case.model.graph.node[0].op_type == "Col2Im" else inputs[0].ndim - 2


def served(found: tuple[Any, ...]) -> list[Any]:
    return [case for case in found if spatial(case) <= 2]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def test_everything_of_one_and_two_dimensions_is_used():
    """A renamed module or folder must not turn these tests into nothing, nor may one be left out by mistake."""
    tests, models = operator_tests(), model_folders()
    assert {case.model.graph.node[0].op_type for case in tests} == set(OPERATORS)
    assert len(served(tests)) >= 12
    assert len(served(models)) >= 23
    assert {graph_of(folder).node[0].op_type for folder in served(models)} == {"Conv", "ConvTranspose"}
    assert {spatial(folder) for folder in served(models)} == {1, 2}
    assert all(len(graph_of(folder).node) == 1 for folder in models)
    # what is left out: the three-dimensional ones, for which there is no call
    for case in (*tests, *models):
        in_three = "3d" in case.name.lower() or "5d" in case.name
        assert spatial(case) == 3 if in_three else spatial(case) <= 2, case.name


def with_rows(array: np.ndarray) -> np.ndarray:
    """A signal or its kernel as one row of pixels."""
    return array[..., None, :] if array.ndim == 3 else array


def transpose_arguments(given: dict[str, Any], x: np.ndarray, k: np.ndarray) -> dict[str, Any]:
    """The attributes of ConvTranspose as arguments of ``conv_transpose2d``: ONNX's rule for the pads that give a wanted
    output shape, where what is missing is output padding and the odd pixel goes to the start but for SAME_UPPER.
    """
    axes = k.ndim - 2
    strides, dilations, more = (
        list(given.get(name, (default,) * axes))
        for name, default in (("strides", 1), ("dilations", 1), ("output_padding", 0))
    )
    pads = list(zip(*np.reshape(given.get("pads", (0,) * 2 * axes), (2, axes)).tolist(), strict=True))
    auto_pad = given.get("auto_pad", b"NOTSET").decode()
    wanted = given.get("output_shape")
    if wanted is None and auto_pad.startswith("SAME"):
        wanted = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if wanted is not None:
        for axis, size in enumerate(wanted[-axes:]):
            reach = dilations[axis] * (k.shape[2 + axis] - 1) + 1
            total = strides[axis] * (x.shape[2 + axis] - 1) + more[axis] + reach - size
            more[axis] += max(0, -total)
            halves = (max(0, total) // 2, max(0, total) - max(0, total) // 2)
            pads[axis] = halves if auto_pad == "SAME_UPPER" else halves[::-1]
    row = [1] * (2 - axes)
    return {
        "stride": (*row, *strides),
        "dilation": (*row, *dilations),
        "output_padding": (*(0 for _ in row), *more),
        "padding": (*((0, 0) for _ in row), *pads),
        "groups": given.get("group", 1),
    }


def fold_arguments(given: dict[str, Any]) -> dict[str, Any]:
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    return {
        "stride": tuple(given.get("strides", (1, 1))),
        "dilation": tuple(given.get("dilations", (1, 1))),
        "padding": ((top, bottom), (left, right)),
    }


@pytest.mark.parametrize("case", served(operator_tests()), ids=lambda case: case.name)
def test_operator(case):
    node = case.model.graph.node[0]
    given = attributes(node)
    for operands, (wanted,) in case.data_sets:
        if node.op_type == "Col2Im":
            columns, image, block = operands
            y = gpuconv.fold(columns, image.tolist(), block.tolist(), **fold_arguments(given))
        else:
            x, k, *bias = operands
            assert list(k.shape[2:]) == list(given.get("kernel_shape", k.shape[2:]))
            y = gpuconv.conv_transpose2d(with_rows(x), with_rows(k), *bias, **transpose_arguments(given, x, k))
        y = y.reshape(wanted.shape) if wanted.ndim == 3 else y
        assert y.dtype == wanted.dtype
        assert y.shape == wanted.shape
        # whole numbers, all of them
        assert np.array_equal(y, wanted)


@pytest.mark.parametrize("folder", served(model_folders()), ids=lambda folder: folder.name)
def test_model_of_pytorch(folder):
    """One node each, computed by PyTorch."""
    graph = graph_of(folder)
    (node,) = graph.node
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    x, wanted = (
        onnx.numpy_helper.to_array(onnx.load_tensor(folder / "test_data_set_0" / f"{name}_0.pb"))
        for name in ("input", "output")
    )
    operands = [held.get(name, x) for name in node.input]
    given, axes = attributes(node), wanted.ndim - 2
    pads = np.reshape(given["pads"], (2, axes)).T.tolist()
    options: dict[str, Any] = {"groups": given["group"]}
    if node.op_type == "ConvTranspose":
        call, options = "conv_transpose2d", transpose_arguments(given, *operands[:2])
    elif axes == 2:
        call = "conv2d"
        options |= {"stride": given["strides"], "dilation": given["dilations"], "padding": pads}
    else:
        call = "conv1d"
        options |= {"stride": given["strides"][0], "dilation": given["dilations"][0], "padding": pads[0]}
    y = getattr(gpuconv, call)(*operands, **options)
    assert y.dtype == wanted.dtype
    assert y.shape == wanted.shape
    # both within the bound of the true sum
    answer = getattr(oracle if call == "conv2d" else oracle_family, call)(*operands, **options)
    assert np.all(np.abs(y.astype(np.longdouble) - wanted) <= 2 * units.bound(answer))
