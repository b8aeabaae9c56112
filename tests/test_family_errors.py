"""Bad calls of conv2d's relatives, refused as conv2d's are: by name, value and rule, before anything is allocated.

The operands are views of one number, large enough for a call that computes before it refuses to show in its memory.
"""

from __future__ import annotations

import re
import time
import tracemalloc
import warnings
from dataclasses import dataclass
from typing import Any

import family
import numpy as np
import pytest
from test_errors import DIGITS, SMALL_PEAK, Copied, Index, Lazy, view

V, T = ValueError, TypeError

# A good call of each, by its arguments' names.
GOOD: dict[str, dict[str, Any]] = {
    "conv_transpose2d": {"x": view((2, 6, 256, 256)), "k": view((6, 4, 3, 3))},
    "conv2d_input": {
        "input_size": (2, 6, 256, 256), "weight": view((12, 6, 3, 3)), "grad_output": view((2, 12, 254, 254)),
    },
    "conv2d_weight": {
        "input": view((2, 6, 256, 256)), "weight_size": (12, 6, 3, 3), "grad_output": view((2, 12, 254, 254)),
    },
    "conv2d_bias": {"grad_output": view((2, 12, 254, 254))},
    "conv1d": {"x": view((2, 6, 65536)), "k": view((12, 6, 3))},
    "unfold": {"x": view((2, 6, 256, 256)), "kernel_size": 3},
    "fold": {"columns": view((2, 54, 254 * 254)), "output_size": (256, 256), "kernel_size": 3},
}  # fmt: skip
RESULTS = {
    "conv_transpose2d": (2, 4, 258, 258), "conv2d_input": (2, 6, 256, 256), "conv2d_weight": (12, 6, 3, 3),
    "conv2d_bias": (12,), "conv1d": (2, 12, 65534), "unfold": (2, 54, 254 * 254), "fold": (2, 6, 256, 256),
}  # fmt: skip
ARRAYS = {call: [name for name in given if isinstance(given[name], np.ndarray)] for call, given in GOOD.items()}
TWO_DIMENSIONAL = ("conv_transpose2d", "conv2d_input", "conv2d_weight", "unfold", "fold")
WEIGHTED = ("conv_transpose2d", "conv2d_input", "conv2d_weight", "conv1d")


@dataclass(frozen=True)
class Bad:
    """One bad call: what it raises, and what the message has to contain."""

    name: str
    call: str
    error: type[Exception]
    says: tuple[str, ...]
    arguments: dict[str, Any]


BAD: list[Bad] = []


def bad(call: str, name: str, error: type[Exception], *says: str, **arguments: Any) -> None:
    BAD.append(Bad(f"{call}: {re.sub(r' at 0x.*', '', name)}", call, error, says, arguments))


# ---- steps

for call in (*TWO_DIMENSIONAL, "conv1d"):
    steps = ["stride", "padding", "dilation", *(["groups"] if call in WEIGHTED else [])]
    steps += ["kernel_size"] if call in ("unfold", "fold") else ["output_padding"] * (call == "conv_transpose2d")
    for name in steps:
        for value in (1.0, True, None, b"1", np.float32(1), {1: 1}):
            bad(call, f"{name}={value!r}", T, name, "integer", repr(value), **{name: value})
        bad(call, f"{name}=-1", V, name, "-1", "at least", **{name: -1})
        bad(call, f"{name} with 5,001 digits", V, name, **{name: DIGITS})
        bad(call, f"{name}=2**62", V, name, **{name: Index(2**62)})
        if name in ("stride", "dilation", "groups", "kernel_size"):
            bad(call, f"{name}=0", V, name, "0", "at least 1", **{name: 0})
        if name != "groups":
            one = call == "conv1d" and name != "padding"
            bad(call, f"{name} of three", T if one else V, name, "(1, 1, 1)", **{name: (1, 1, 1)})
            bad(call, f"{name} half boolean", T, name, "True", "integer", **{name: (1, True)})
for call in TWO_DIMENSIONAL:
    bad(call, "flat padding", V, "padding", "(1, 1, 1, 1)", "((top, bottom), (left, right))", padding=(1, 1, 1, 1))
    bad(call, "negative padding", V, "padding", "-3", "at least 0", padding=((1, 1), (-3, 1)))
    bad(call, "unknown padding", V, "padding", "'SAME'", padding="SAME")
bad("conv1d", "unknown padding", V, "padding", "'SAME'", padding="SAME")
bad("conv1d", "padding of two axes", T, "padding", "(1, 1)", "integer", padding=((1, 1), (1, 1)))
bad("conv1d", "stride of two axes", T, "stride", "(1, 1)", stride=(1, 1))

# ---- choices

for call, name, value in (
    ("conv_transpose2d", "layout", "nchw"), ("conv2d_input", "layout", None), ("conv2d_weight", "layout", "CHWN"),
    ("conv2d_bias", "layout", "OIHW"), ("conv1d", "layout", "NCHW"), ("conv1d", "kernel_layout", "OIHW"),
    ("conv2d_input", "kernel_layout", "IOHW"), ("conv2d_weight", "kernel_layout", 0), ("conv1d", "activation", "gelu"),
    ("conv_transpose2d", "activation", True), ("conv1d", "padding_mode", "mean"),
    ("conv_transpose2d", "precision", None),
    ("conv2d_input", "precision", "low"), ("conv2d_weight", "precision", "low"), ("conv1d", "precision", "low"),
):  # fmt: skip
    bad(call, f"{name}={value!r}", V, name, repr(value), "one of", **{name: value})
for call in ("conv2d_input", "conv2d_weight", "conv1d"):
    bad(call, "flip=1", T, "flip", "1", "True or False", flip=1)
COMPLEX = {call: {name: view(GOOD[call][name].shape, np.complex64) for name in ARRAYS[call]} for call in GOOD}
for call in ("conv_transpose2d", "conv1d"):
    bad(call, "complex relu", V, "activation", "complex64", activation="relu", **COMPLEX[call])

# ---- arrays

for call, names in ARRAYS.items():
    for name in names:
        for word, value in {"a string": "abc", "an object": object(), "a dict": {}, "None": None}.items():
            bad(call, f"{word} as {name}", T, name, **{name: value})
        bad(call, f"masked {name}", T, name, "masked", **{name: np.ma.zeros(GOOD[call][name].shape, np.float32)})
        bad(call, f"lazy {name}", T, name, "dask", **{name: Lazy()})
        for dtype in ("O", "g", "u8", "M8[s]"):
            array = view(GOOD[call][name].shape, dtype) if dtype != "O" else np.zeros((2, 2), object)
            bad(call, f"{name} of dtype {dtype}", T, name, array.dtype.name, **{name: array})
        bad(call, f"{name} of rank 6", V, name, "(1, 1, 1, 1, 9, 9)", **{name: view((1, 1, 1, 1, 9, 9))})
        bad(call, f"a number as {name}", V, name, "()", **{name: 5.0})

# ---- shapes

bad("conv_transpose2d", "other channels", V, "k", "(5, 4, 3, 3)", "6 channels", k=view((5, 4, 3, 3)))
bad("conv_transpose2d", "channels of NHWC", V, "256 channels", "(6, 4, 3, 3)", layout="NHWC")
bad("conv_transpose2d", "groups do not divide C", V, "groups", "4", "6 channels", groups=4)
bad("conv_transpose2d", "no output channels", V, "k", "(6, 0, 3, 3)", k=view((6, 0, 3, 3)))
bad("conv_transpose2d", "no kernel rows", V, "k", "(6, 4, 0, 3)", k=view((6, 4, 0, 3)))
bad("conv_transpose2d", "ranks 2 and 4", V, "(9, 9)", "(6, 4, 3, 3)", x=view((9, 9)))
bad("conv_transpose2d", "ranks 4 and 2", V, "(3, 3)", k=view((3, 3)))
bad("conv_transpose2d", "more padding than result", V, "padding", padding=130)
bad("conv_transpose2d", "more padding on one side", V, "padding", padding=((0, 259), (0, 0)))
bad("conv_transpose2d", "output_padding of a stride", V, "output_padding", "2", "stride", stride=2, output_padding=2)
bad("conv_transpose2d", "output_padding without a stride", V, "output_padding", "1", output_padding=1)
bad("conv_transpose2d", "output_padding in one axis", V, "output_padding", stride=(1, 3), output_padding=(1, 2))
bad("conv_transpose2d", "output_padding of a dilation", V, "output_padding", dilation=(3, 4), output_padding=(2, 4))
bad("conv_transpose2d", "bias of the input's channels", V, "bias", "(4,)", "(6,)", bias=view((6,)))
bad("conv_transpose2d", "bias is a stride", T, "bias", "2", "stride", bias=2)
bad("conv_transpose2d", "complex bias", T, "bias", "complex64", bias=view((4,), np.complex64))
bad("conv_transpose2d", "a result of 2**31 rows", V, "", x=view((1, 6, 3, 1)), stride=2**31 - 1, padding=2**31)

for call, size, y in (("conv2d_input", "input_size", "grad_output"), ("conv2d_weight", "weight_size", "grad_output")):
    for value in (None, 5, "abc", 2.5, object()):
        bad(call, f"{size}={value!r}", T, size, **{size: value})
    good = GOOD[call][size]
    bad(call, f"{size} of floats", T, size, "3.0", "integer", **{size: (*good[:3], 3.0)})
    bad(call, f"{size} half boolean", T, size, "True", "integer", **{size: (*good[:3], True)})
    bad(call, f"negative {size}", V, size, "-3", **{size: (*good[:3], -3)})
    bad(call, f"{size} with 5,001 digits", V, size, **{size: (*good[:3], DIGITS)})
    bad(call, f"{size} of five", V, size, **{size: (1, *good)})
    bad(call, f"{size} of one", V, size, **{size: (3,)})
    bad(call, "rows of the gradient", V, y, "(2, 12, 253, 254)", "254", **{y: view((2, 12, 253, 254))})
    bad(call, "columns of the gradient", V, y, "(2, 12, 254, 255)", "254", **{y: view((2, 12, 254, 255))})
    bad(call, "channels of the gradient", V, y, "(2, 11, 254, 254)", "12", **{y: view((2, 11, 254, 254))})
    bad(call, "batch of the gradient", V, y, "(3, 12, 254, 254)", "2", **{y: view((3, 12, 254, 254))})
    bad(call, "no batch in the gradient", V, y, "(12, 254, 254)", **{y: view((12, 254, 254))})
    bad(call, "strided gradient", V, y, "(2, 12, 254, 254)", "127", stride=2)
    bad(call, "layout of the gradient", V, layout="NHWC")
    bad(call, "groups do not divide", V, "groups", "5", groups=5)
    bad(call, "channels per group", V, "groups", "2", groups=2)
bad("conv2d_input", "channels of the weight", V, "weight", "(12, 5, 3, 3)", "6", weight=view((12, 5, 3, 3)))
bad("conv2d_input", "kernel larger than the input", V, "kernel", "(3×3)", "(2×256)", input_size=(2, 6, 2, 256))
bad("conv2d_input", "no output channels", V, "weight", "(0, 6, 3, 3)", weight=view((0, 6, 3, 3)))
bad("conv2d_weight", "channels of weight_size", V, "weight_size", "(12, 5, 3, 3)", "6", weight_size=(12, 5, 3, 3))
bad("conv2d_weight", "no kernel rows", V, "weight_size", "(12, 6, 0, 3)", weight_size=(12, 6, 0, 3))
bad("conv2d_weight", "kernel larger than the input", V, "kernel", "(257×3)", weight_size=(12, 6, 257, 3))
bad("conv2d_bias", "a line of numbers", V, "grad_output", "(9,)", grad_output=view((9,)))

bad("conv1d", "ranks 2 and 2", V, "(6, 9)", "(6, 3)", x=view((6, 9)), k=view((6, 3)))
bad("conv1d", "ranks 1 and 3", V, "(9,)", "(12, 6, 3)", x=view((9,)))
bad("conv1d", "an image", V, "(1, 6, 9, 9)", x=view((1, 6, 9, 9)))
bad("conv1d", "other channels", V, "k", "(12, 5, 3)", "6 channels", k=view((12, 5, 3)))
bad("conv1d", "channels of NLC", V, "65536 channels", layout="NLC")
bad("conv1d", "groups do not divide O", V, "groups", "4", groups=4)
bad("conv1d", "kernel larger than x", V, "kernel", "65537", "65536", k=view((12, 6, 65537)))
bad("conv1d", "no taps", V, "k", "(12, 6, 0)", k=view((12, 6, 0)))
bad("conv1d", "bias of the wrong length", V, "bias", "(12,)", "(6,)", bias=view((6,)))
bad("conv1d", "bias is a stride", T, "bias", "2", "stride", bias=2)
bad("conv1d", "padding_value and a mode", V, "padding_value", "'reflect'", padding=1, padding_value=1,
    padding_mode="reflect")  # fmt: skip
bad("conv1d", "zero point of float32", T, "x_zero_point", "float32", x_zero_point=1)

bad("unfold", "an image without channels", V, "x", "(9, 9)", x=view((9, 9)))
bad("unfold", "kernel larger than x", V, "kernel", "(257×1)", "(256×256)", kernel_size=(257, 1))
bad("unfold", "dilated kernel larger than x", V, "kernel", "(257×257)", dilation=128)
bad("unfold", "no channels", V, "x", "(2, 0, 9, 9)", "0 channels", x=view((2, 0, 9, 9)))
bad("fold", "no channels", V, "columns", "(2, 0, 9)", columns=view((2, 0, 9)), output_size=5)
bad("fold", "columns without windows", V, "columns", "(9, 9)", columns=view((9, 9)))
bad("fold", "an image", V, "columns", "(2, 6, 256, 256)", columns=view((2, 6, 256, 256)))
bad("fold", "rows of no kernel", V, "columns", "(2, 55, 64516)", "9", columns=view((2, 55, 254 * 254)))
bad("fold", "one window too many", V, "columns", "64517", "64516", columns=view((2, 54, 254 * 254 + 1)))
bad("fold", "strided windows", V, "columns", "64516", "16129", stride=2)
bad("fold", "kernel larger than the image", V, "kernel", "(3×3)", "(2×256)", output_size=(2, 256))
for value in (1.5, None, "abc", (256, 2.5), (256, True)):
    bad("fold", f"output_size={value!r}", T, "output_size", "integer", output_size=value)
bad("fold", "output_size of three", V, "output_size", "(1, 256, 256)", output_size=(1, 256, 256))
bad("fold", "negative output_size", V, "output_size", "-1", output_size=(-1, 256))
bad("fold", "output_size with 5,001 digits", V, "output_size", output_size=(DIGITS, 256))

# ---- dtypes

for call in (*WEIGHTED, "conv2d_bias", "fold"):
    for dtype in ("nonsense", "int16", "O", 0, "u8"):
        bad(call, f"dtype={dtype!r}", T, "dtype", dtype=dtype)
    bad(call, "float to int", T, "dtype", "int64", "float32", dtype=np.int64)
    bad(call, "complex to real", T, "dtype", "float64", "complex64", dtype=np.float64, **COMPLEX[call])

# ---- where to compute and to write

for call in GOOD:
    for name, value in (("device", "gpu"), ("device", "cuda:99999"), ("backend", "gpu"), ("backend", "numpy.")):
        bad(call, f"{name}={value!r}", V, name, repr(value), "must be", **{name: value})
    bad(call, "numpy on cuda", V, "backend='numpy'", "device='cuda'", "contradicts", backend="numpy", device="cuda")
    bad(call, "workspace_limit=-1", V, "workspace_limit", "-1", "at least 0", workspace_limit=-1)
    bad(call, "workspace_limit=1.5", T, "workspace_limit", "1.5", "integer", workspace_limit=1.5)
    bad(call, "stream='x'", T, "stream", "'x'", "address", stream="x")
    shape = RESULTS[call]
    bad(call, "out of the wrong shape", V, "out", str((*shape[:-1], shape[-1] + 1)), str(shape),
        out=np.broadcast_to(np.float32(0), (*shape[:-1], shape[-1] + 1)))  # fmt: skip
    bad(call, "out of the wrong rank", V, "out", out=view((1, *shape)))
    bad(call, "out of the wrong dtype", T, "out", "float64", "float32", out=view(shape, np.float64))
    bad(call, "read-only out", V, "out", "read-only", out=view(shape))
    for value in ([1], 1.0, "ab", object()):
        bad(call, f"out={value!r}"[:24], T, "out", "array", out=value)
    bad(call, "copied out", T, "out", out=Copied((2, 2)))

# ---- out in the operands' memory

TINY: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "conv_transpose2d": ({"x": (1, 2, 3, 3), "k": (2, 1, 2, 2)}, (1, 1, 4, 4)),
    "conv2d_input": ({"weight": (2, 1, 2, 2), "grad_output": (1, 2, 3, 3)}, (1, 1, 4, 4)),
    "conv2d_weight": ({"input": (1, 1, 4, 4), "grad_output": (1, 2, 3, 3)}, (2, 1, 2, 2)),
    "conv2d_bias": ({"grad_output": (1, 2, 3, 3)}, (2,)),
    "conv1d": ({"x": (1, 2, 5), "k": (2, 2, 2)}, (1, 2, 4)),
    "unfold": ({"x": (1, 1, 4, 4)}, (1, 4, 9)),
    "fold": ({"columns": (1, 4, 9)}, (1, 1, 4, 4)),
}
SIZES = {
    "conv2d_input": {"input_size": (1, 1, 4, 4)}, "conv2d_weight": {"weight_size": (2, 1, 2, 2)},
    "unfold": {"kernel_size": 2}, "fold": {"output_size": 4, "kernel_size": 2},
}  # fmt: skip
for call, (shapes, result) in TINY.items():
    operands: dict[str, Any] = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        memory, size = np.ones(100, np.float32), int(np.prod(shape))
        given = operands | SIZES.get(call, {}) | {name: memory[:size].reshape(shape)}
        count = int(np.prod(result))
        bad(call, f"out overlaps {name}", V, "out", name, "overlap",
            out=memory[size - 1 : size - 1 + count].reshape(result), **given)  # fmt: skip
        bad(call, f"out interleaves with {name}", V, "out", name, "overlap",
            out=memory[1 : 1 + 2 * count : 2].reshape(result), **given)  # fmt: skip
SHARED = np.ones(16, np.float32)
bad("conv_transpose2d", "out overlaps bias", V, "out", "bias", "overlap", x=np.ones((1, 2, 3, 3), np.float32),
    k=np.ones((2, 1, 2, 2), np.float32), bias=SHARED[3:4], out=SHARED.reshape(1, 1, 4, 4))  # fmt: skip


def called(call: Bad) -> Any:
    return family.public(call.call)(**(GOOD[call.call] | call.arguments))


def test_there_are_many_of_them():
    names = [call.name for call in BAD]
    assert len(names) == len(set(names)) >= 40
    for name in GOOD:
        assert sum(call.call == name for call in BAD) >= 20, name


@pytest.mark.parametrize("call", BAD, ids=lambda call: call.name)
def test_refused(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(call.error) as raised:  # imports what this refusal needs
            called(call)
        message = str(raised.value)
        assert message.startswith(f"{call.call}: "), message
        missing = [text for text in call.says if text not in message]
        assert not missing, f"{missing} not in {message!r}"
        assert len(message) < 2000
        tracemalloc.start()
        try:
            start = time.perf_counter()
            with pytest.raises(call.error):
                called(call)
            assert time.perf_counter() - start < 2, "not refused at once"
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < SMALL_PEAK, f"{peak} bytes were allocated before the refusal"


@pytest.mark.parametrize("call", GOOD)
def test_what_the_bad_calls_change_is_good(call):
    """Else they might be refused for something else."""
    if call in ("unfold", "fold"):  # small enough to run
        small = {"x": view((2, 6, 9, 9)), "columns": view((2, 54, 49)), "output_size": (9, 9), "kernel_size": 3}
        found = family.public(call)(**{name: small[name] for name in GOOD[call]})
        assert found.shape == ((2, 54, 49) if call == "unfold" else (2, 6, 9, 9))
        return
    assert family.public(call)(**GOOD[call]).shape == RESULTS[call]


def test_an_array_in_the_place_of_its_shape_is_told_so():
    """Its numbers would fill the message."""
    x, k = view((2, 6, 9, 9)), view((8, 6, 3, 3))
    for call, arguments in (("conv2d_input", (x, k, x)), ("conv2d_weight", (x, k, x))):
        with pytest.raises(TypeError, match=rf"{call}: \w+_size .* did you mean its shape, \(") as raised:
            family.public(call)(*arguments)
        assert len(str(raised.value)) < 200
    with pytest.raises(ValueError, match="do not pair") as refused:
        family.public("conv2d_weight")(x, (3, 3), x)
    assert "conv2d(" not in str(refused.value)


def test_a_result_larger_than_the_address_space_is_a_memory_error():
    one = [[[[1.0]]]]
    for call, arguments in (
        ("conv_transpose2d", ([[[[1.0, 1.0]] * 2]], one, None, 2**31 - 1)),
        ("conv2d_input", ((1, 1, 2**31 - 1, 2**31 - 1), one, one, 2**31 - 1)),
        ("unfold", (one, 2**16, 1, 2**31 - 1)),
        ("fold", (np.ones((1, 1), np.float32), (2**31 - 1, 2**31 - 1), 1, 1, 0, 2**31 - 1)),
    ):
        with pytest.raises(MemoryError, match=rf"{call}: .*\d{{10,}} bytes"):
            family.public(call)(*arguments)
