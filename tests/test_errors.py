"""Bad calls: refused by name, value and rule, before anything is allocated, without a warning and at once.

The operands are huge views of one number, so that a call which copies, converts or computes before it refuses shows in
the memory it takes. The workspace limit is one byte: a bad call that is taken for a good one ends in a MemoryError
instead of in a computation of hours.
"""

from __future__ import annotations

import re
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpuconv import conv2d, dispatch, explain

X, K = (8, 6, 4096, 4096), (12, 6, 3, 3)
SMALL_PEAK = 32 * 1024  # bytes; the longest message takes 11,000
DIGITS = 10**5000  # more digits than Python agrees to print


def view(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An array of ``shape`` that takes a few bytes."""
    return np.broadcast_to(np.ones((), dtype), shape)


class Index:
    """An integer to operator.index, and nothing else."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Lazy:
    """A dask collection, as far as a library that never imports dask can tell."""

    shape, ndim, dtype = (6, 6), 2, np.dtype("float32")

    def __dask_graph__(self) -> dict:
        return {"task": None}

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise AssertionError("a lazy array was computed")


class Copied:
    """Its array is a new one each time: nothing written there would reach the caller."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.inner = np.zeros(shape, np.float32)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.inner.copy()


class Stream:
    """What a CUDA stream of CuPy looks like, with any address."""

    def __init__(self, ptr: Any) -> None:
        self.ptr = ptr


class StreamProtocol:
    """A stream by ``__cuda_stream__``, which has to give (version, address)."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __cuda_stream__(self) -> Any:
        return self.answer


@dataclass(frozen=True)
class Bad:
    """One bad call: what it raises, and what the message has to contain."""

    name: str
    error: type[Exception]
    says: tuple[str, ...]
    arguments: dict[str, Any]
    explained: bool = True  # whether explain has to refuse it as well


BAD: list[Bad] = []


def bad(name: str, error: type[Exception], *says: str, explained: bool = True, **arguments: Any) -> None:
    # without addresses, so that a test has one name in every process
    BAD.append(Bad(re.sub(r" at 0x.*", "", name), error, says, arguments, explained))


V, T = ValueError, TypeError
BYTES = {"x": view(X, np.int8), "k": view(K, np.int8)}
COMPLEX = {"x": view(X, np.complex64)}

# shapes and ranks
bad("x of rank 1", V, "x", "(5,)", "do not pair", x=view((5,)))
bad("x of rank 5", V, "x", "(1, 1, 6, 9, 9)", "do not pair", x=view((1, 1, 6, 9, 9)))
bad("k of rank 1", V, "k", "(3,)", "do not pair", k=view((3,)))
bad("ranks 2 and 4", V, "(9, 9)", "(12, 6, 3, 3)", "do not pair", x=view((9, 9)))
bad("ranks 4 and 3", V, "(6, 3, 3)", "do not pair", k=view((6, 3, 3)))
bad(
    "ranks 3 and 3",
    V,
    "(6, 9, 9)",
    "(6, 3, 3)",
    "do not pair",
    "k[None]",
    "no 3-D convolution",
    x=view((6, 9, 9)),
    k=view((6, 3, 3)),
)
bad("a number as x", V, "x", "()", "do not pair", x=5)
bad("True as x", V, "x", "()", "do not pair", x=True)
bad("no output channels", V, "k", "(0, 6, 3, 3)", "output channels", k=view((0, 6, 3, 3)))
bad("no kernel rows", V, "k", "(12, 6, 0, 3)", "rows", k=view((12, 6, 0, 3)))
bad("no kernel columns", V, "k", "(12, 6, 3, 0)", "columns", k=view((12, 6, 3, 0)))
bad("other channels", V, "k", "(12, 5, 3, 3)", "6 channels", "groups=1", k=view((12, 5, 3, 3)))
bad("channels of NHWC", V, "(8, 6, 4096, 4096)", "4096 channels", "is it layout='NCHW'?", layout="NHWC")
bad("a photo as NCHW", V, "9 channels", "is it layout='NHWC'?", x=view((9, 9, 6)))
bad("channels of HWIO", V, "(3, 3, 5, 12)", "k.shape[2]", k=view((3, 3, 5, 12)), kernel_layout="HWIO")
bad("channels per group", V, "6 input channels per group", "groups=2", "= 3", groups=2)
bad("groups do not divide C", V, "groups", "groups=4", "6 channels", groups=4)
bad("groups do not divide O", V, "groups", "groups=3", "10 channels", k=view((10, 2, 3, 3)), groups=3)
bad("kernel larger than x", V, "kernel (5×4097)", "(4096×4096)", k=view((12, 6, 5, 4097)))
bad("phantom output", V, "kernel (5×5)", "(4×4)", x=view((8, 6, 4, 4)), dilation=2, stride=2)
bad("x and k exchanged", V, "larger", "x comes before k", x=view((3, 3)), k=view((9, 9)))
bad("x without pixels", V, "(1×1)", "(0×0)", x=view((8, 6, 0, 0)), k=view((12, 6, 1, 1)))

# what is no array of numbers
for who in ("x", "k", "bias"):
    for word, value in {
        "a string": "abc", "bytes": b"abc", "a dict": {}, "a set": {1}, "an object": object(),
        "a class": np.ndarray, "a generator": (i for i in ()),
    }.items():  # fmt: skip
        # a string in x's place is a problem line to explain
        bad(f"{word} as {who}", T, who, "array", explained=not (who == "x" and word == "a string"), **{who: value})
    bad(f"ragged {who}", V, who, "cannot become an array", **{who: [[1], [2, 3]]})
    bad(f"masked {who}", T, who, "masked", "filled", **{who: np.ma.zeros((12,) if who == "bias" else (6, 6))})
    bad(f"lazy {who}", T, who, "dask", "compute()", **{who: Lazy()})
    bad(f"lazy item of {who}", T, f"{who}[1]", "dask", "compute()", **{who: [1, Lazy()]})
    bad(f"masked item of {who}", T, f"{who}[0]", "masked", **{who: [np.ma.zeros(3), [1, 2, 3]]})
    bad(f"masked element of {who}", T, f"{who}[1][0]", "masked", **{who: [[1], (np.ma.masked,)]})
    for dtype in ("O", "U3", "S3", "M8[s]", "m8[s]", "f4,f4", "g", "G", "u8"):
        array = np.zeros(12 if who == "bias" else (9, 9), dtype)
        bad(f"{who} of dtype {dtype}", T, who, array.dtype.name, "one of", **{who: array})
bad("None as x", T, "x", "None", explained=False, x=None)
bad("None as k", T, "k", x=view((9, 9)), k=None)
bad("integers beyond 64 bits", T, "x", "object", x=[[1, 2**70]])
bad("uint64 list", T, "x", "uint64", "int64", x=[[2**63, 2**63]])
bad("float8", T, "x", "float8_e5m2", x=view(X, ml_dtypes.float8_e5m2))

# bias
bad("bias is a stride", T, "bias", "2", "stride", bias=2)
bad("bias is a pair of strides", V, "bias", "(2,)", "(12,)", "stride", explained=False, bias=(2, 2))
bad("bias is a NumPy integer", T, "bias", "2", "stride", bias=np.int64(2))
bad(
    "bias is True",
    T,
    "bias",
    "True",
    "one number per output channel",
    "None is for no bias",
    explained=False,
    bias=True,
)
bad("bias is a number", T, "bias", "1.5", "one number per output channel", bias=1.5)
bad("bias of the wrong length", V, "bias", "(12,)", "(6,)", bias=view((6,)))
bad("bias with too many axes", V, "bias", "(12,)", "(1, 12, 1, 1)", bias=view((1, 12, 1, 1)))
bad("complex bias", T, "bias", "complex64", "float32", bias=view((12,), np.complex64))
bad("float bias of integers", T, "bias", "float32", "int32", bias=view((12,)), **BYTES)

# strides, dilations, paddings, groups
for name in ("stride", "padding", "dilation", "groups"):
    for value in (1.0, True, None, "1" if name != "padding" else b"1", np.True_, np.float32(1), 1j, {1: 1}, object()):
        rule = "must be an integer", repr(value), type(value).__name__
        if name == "padding" and value is None:
            rule = "must be one of 'valid', ", "an integer, (rows, columns) or", "got None"
        bad(f"{name}={value!r}", T, name, *rule, **{name: value})
    bad(f"{name}=-1", V, name, "-1", "at least", **{name: -1})
    bad(f"{name} with 5,001 digits", V, name, "below" if name != "groups" else "groups", **{name: DIGITS})
    bad(f"{name} with -5,001 digits", V, name, "at least", **{name: -DIGITS})
    if name == "groups":
        continue
    for power in (31, 32, 55, 62, 63, 64):
        bad(f"{name}=2**{power}", V, name, str(2**power), "below 2147483648", **{name: 2**power})
        bad(f"{name}=(1, 2**{power})", V, f"{name}[1]", str(2**power), "below", **{name: (1, 2**power)})
    bad(f"{name} of an index", V, name, str(2**62), "below", **{name: Index(2**62)})
    bad(f"{name} of three", V, name, "(1, 1, 1)", "(rows, columns)", **{name: (1, 1, 1)})
    bad(f"{name} of none", V, name, "()", "(rows, columns)", **{name: ()})
    bad(f"{name} of floats", T, f"{name}[0]", "1.0", "integer", **{name: np.array([1.0, 1.0])})
    bad(f"{name} half boolean", T, f"{name}[1]", "True", "integer", **{name: (1, True)})
for name in ("stride", "dilation", "groups"):
    bad(f"{name}=0", V, name, "0", "at least 1", **{name: 0})
bad("groups=2**62", V, "groups", str(2**62), "divide", groups=2**62)
bad("nested stride", T, "stride[0]", "(1, 1)", "integer", stride=((1, 1), (1, 1)))
bad("flat padding", V, "padding", "(1, 1, 1, 1)", "((top, bottom), (left, right))", padding=(1, 1, 1, 1))
bad("padding of four axes", V, "padding", "((top, bottom), (left, right))", "channels", padding=((0, 0), (1, 1)) * 2)
bad("flat padding array", V, "padding", "ambiguous", padding=np.array([1, 1, 1, 1]))
bad("mixed padding", V, "padding", "(1, (1, 1))", "same form", padding=(1, (1, 1)))
bad("ragged padding", V, "padding[1]", "(1,)", "(left, right)", padding=((1, 1), (1,)))
bad("negative padding", V, "padding[1][0]", "-3", "at least 0", padding=((1, 1), (-3, 1)))
bad("unknown padding", V, "padding", "'SAME'", "'same_upper'", padding="SAME")
bad("two padding names", T, "padding[0]", "'same'", padding=("same", "same"))
bad("full beyond 2**31", V, "padding", "'full'", "below", padding="full", dilation=2**31 - 1)

# choices
for name, value in (
    ("layout", "nchw"), ("layout", "CHWN"), ("layout", None), ("layout", ["NCHW"]), ("kernel_layout", "IOHW"),
    ("kernel_layout", 0), ("activation", "gelu"), ("activation", True), ("activation", b"relu"), ("precision", "low"),
    ("precision", None), ("padding_mode", "Reflect"), ("padding_mode", "mean"), ("padding_mode", None),
    ("padding_mode", np.array(["constant", "edge"])), ("layout", np.array(["NCHW", "NHWC"])),
):  # fmt: skip
    bad(f"{name}={value!r}", V, name, repr(value), "one of", **{name: value})
for value in (0, 1, None, "False", []):
    bad(f"flip={value!r}", T, "flip", repr(value), "True or False", flip=value)
bad("complex relu", V, "activation", "'relu'", "complex64", activation="relu", **COMPLEX)
bad("relu of a complex dtype", V, "activation", "complex64", activation="relu", dtype=np.complex64)
bad("reflect of nothing", V, "padding_mode", "'reflect'", "empty", x=view((8, 6, 0, 9)), padding=2,
    padding_mode="reflect")  # fmt: skip

# slips
for name, value, wanted in (
    ("padding", "SAME", "did you mean 'same'?"), ("padding", "reflect", "did you mean padding_mode='reflect'?"),
    ("padding_mode", "mirror", "that is 'reflect' here"), ("padding_mode", "Wrap", "did you mean 'wrap'?"),
    ("layout", "NHW", "did you mean 'NHWC'?"), ("kernel_layout", "oihw", "did you mean 'OIHW'?"),
    ("activation", "ReLU", "did you mean 'relu'?"), ("precision", "hihgest", "did you mean 'highest'?"),
    ("device", "gpu:1", "did you mean 'cuda:1'?"), ("device", 1, "did you mean 'cuda:1'?"),
    ("backend", "numpy.gem", "did you mean 'numpy.gemm'?"),
):  # fmt: skip
    bad(f"a slip: {name}={value!r}", V, name, wanted, **{name: value})

# padding_value
for value in ("0", None, b"0", [0], [0, [1]], np.zeros(1), object(), np.datetime64(0, "s")):
    bad(f"padding_value={value!r}", T, "padding_value", "number", padding=1, padding_value=value)
bad("padding_value beyond float32", V, "padding_value", "1e+300", "float32", padding=1, padding_value=1e300)
bad("padding_value beyond float16", V, "padding_value", "65520", "float16", x=view(X, np.float16), padding=1,
    padding_value=65520)  # fmt: skip
bad("padding_value beyond bfloat16", V, "padding_value", "3.4e+38", "bfloat16", x=view(X, ml_dtypes.bfloat16),
    padding=1, padding_value=3.4e38)  # fmt: skip
bad("padding_value beyond complex64", V, "padding_value", "complex64", padding=1, padding_value=1e300j, **COMPLEX)
bad("complex padding_value", T, "padding_value", "1j", "real", "float32", padding=1, padding_value=1j)
bad("padding_value of 5,001 digits", V, "padding_value", padding=1, padding_value=DIGITS)
bad("float padding_value of integers", T, "padding_value", "1.0", "int8", padding=1, padding_value=1.0, **BYTES)
bad("padding_value beyond int8", V, "padding_value", "128", "-128 to 127", padding=1, padding_value=128, **BYTES)
bad("padding_value and a mode", V, "padding_value", "padding_mode='reflect'", padding=1, padding_value=1,
    padding_mode="reflect")  # fmt: skip
bad("padding_value and zeros", V, "padding_value", "'zeros'", padding=1, padding_value=1, padding_mode="zeros")

# zero points
for name in ("x_zero_point", "k_zero_point"):
    for value in (1.0, True, None, "1"):
        bad(f"{name}={value!r}", T, name, repr(value), "integer", **BYTES, **{name: value})
    bad(f"{name}=128", V, name, "128", "-128 to 127", **BYTES, **{name: 128})
    bad(f"{name}=-129", V, name, "-129", "-128 to 127", **BYTES, **{name: -129})
    bad(f"{name} with 5,001 digits", V, name, **BYTES, **{name: DIGITS})
    bad(f"{name} of float32", T, name, "float32", "8", **{name: 1})
bad("k_zero_point of 11", V, "k_zero_point", "(12,)", "(11,)", **BYTES, k_zero_point=[1] * 11)
bad("zero k_zero_point of 11", V, "k_zero_point", "(12,)", "(11,)", **BYTES, k_zero_point=[0] * 11)
bad("empty k_zero_point", V, "k_zero_point", "(12,)", "(0,)", **BYTES, k_zero_point=np.zeros(0, np.int8))
bad("k_zero_point of rank 2", V, "k_zero_point", "(12,)", "(12, 1)", **BYTES, k_zero_point=view((12, 1), np.int8))
bad("huge k_zero_point", V, "k_zero_point", "(12,)", **BYTES, k_zero_point=view((2**23,), np.int8))
bad("float k_zero_point", T, "k_zero_point", "float64", "integer", **BYTES, k_zero_point=[1.0] * 12)
bad("boolean k_zero_point", T, "k_zero_point", "bool", "integer", **BYTES, k_zero_point=[True] * 12)
bad("one k_zero_point out of range", V, "k_zero_point", "200", "127", **BYTES, k_zero_point=[200] + [1] * 11)
bad("zero point and padding_value", V, "padding_value=1", "zero point", **BYTES, padding=1, padding_value=1,
    x_zero_point=3)  # fmt: skip

# dtypes and overflow
for dtype in ("int16", "uint8", "bool", "uint32"):
    bad(f"dtype={dtype}", T, "dtype", dtype, "int32, int64", dtype=dtype, **BYTES)
for dtype in ("nonsense", "O", "g", "u8", object, 0, 1.5, [], "f4,f4", True):
    bad(f"dtype={dtype!r}", T, "dtype", "one of", dtype=dtype)
bad("float to int", T, "dtype", "int64", "float32", "same_kind", dtype=np.int64)
bad("complex to real", T, "dtype", "float64", "complex64", "same_kind", dtype=np.float64, **COMPLEX)
WIDE = {"x": view((8, 2**18, 9, 9), np.int8), "k": view((12, 2**18, 1, 1), np.int8)}
bad("int32 overflow", V, "262144 products", "int8", "int32", "dtype=np.int64", **WIDE)
bad("int32 overflow by zero points", V, "int32", "np.int64", x=view((1, 2**16, 9, 9), np.uint8),
    k=view((12, 2**16, 1, 1), np.int8), x_zero_point=255, k_zero_point=-128)  # fmt: skip
bad("int32 overflow by the bias", V, "bias", "int32", "np.int64", bias=view((12,), np.int64) * 2**31, **BYTES)
bad("int32 asked for", V, "int32", "np.int64", x=view(X, np.int64), k=view(K, np.int64), dtype=np.int32)

# where to compute
for name, value in (
    ("device", "gpu"), ("device", "CPU"), ("device", "cuda:"), ("device", "cuda:-1"), ("device", "cuda:1.0"),
    ("device", "cuda:99999"), ("device", "cuda:\uff11"), ("device", 0), ("device", True), ("device", []),
    ("device", np.array(["cpu", "cuda"])), ("backend", "gpu"), ("backend", ""), ("backend", "numpy."),
    ("backend", "NumPy"), ("backend", "cupy.direct"), ("backend", 0), ("backend", ["numpy"]), ("backend", b"numpy"),
):  # fmt: skip
    bad(f"{name}={value!a}", V, name, repr(value), "must be", **{name: value})
for backend, device in (("numpy", "cuda"), ("numpy.gemm", "cuda:0"), ("cupy", "cpu"), ("numba_cuda.direct", "cpu")):
    bad(f"{backend} on {device}", V, f"backend={backend!r}", f"device={device!r}", "contradicts", backend=backend,
        device=device)  # fmt: skip
for value in (-1, -DIGITS):
    bad(f"workspace_limit={str(value)[:4]}" if value == -1 else "workspace_limit with -5,001 digits", V,
        "workspace_limit", "at least 0", workspace_limit=value)  # fmt: skip
for value in (1.0, True, "1", float("inf"), (1,)):
    bad(f"workspace_limit={value!r}", T, "workspace_limit", repr(value), "integer", workspace_limit=value)
for value in (0, 1, 1000):
    bad(f"workspace of {value} bytes", MemoryError, "workspace_limit", str(value), "bytes", explained=False,
        workspace_limit=value)  # fmt: skip
for value in ("x", -1, 1.0, True, object(), [], b"", {}):
    bad(f"stream={value!r}", V if value == -1 else T, "stream", repr(value), "address", explained=False, stream=value)
for text in ("a", None, 1.5, -5, print):
    bad(
        f"stream with address {text!r}",
        V if text == -5 else T,
        "stream",
        "address",
        explained=False,
        stream=Stream(text),
    )
for answer in (None, (), (0,), (0, "a"), 5):
    bad(f"stream protocol {answer!r}", T, "stream", "address", explained=False, stream=StreamProtocol(answer))

# out
RESULT = (8, 12, 4094, 4094)


def out(name: str, error: type[Exception], *says: str, value: Any, **arguments: Any) -> None:
    bad(f"out: {name}", error, "out", *says, explained=False, out=value, **arguments)


out("wrong shape", V, "(8, 12, 4096, 4096)", "(8, 12, 4094, 4094)", value=view((8, 12, 4096, 4096)))
out("wrong rank", V, "(12, 4094, 4094)", value=view(RESULT[1:]))
out("wrong dtype", T, "float64", "float32", value=view(RESULT, np.float64))
out("unsupported dtype", T, "object", value=np.zeros((2, 2), object))
out("read-only", V, "read-only", value=view(RESULT))
for value in (
    [1], (), "ab", b"ab", 1.0, True, np.float32(0), {}, object(), memoryview(bytearray(8)), np.ndarray,
):  # fmt: skip
    out(f"{value!r}"[:24], T, "array", value=value)
TINY = {"x": np.ones((1, 1, 3, 3), np.float32), "k": np.ones((2, 1, 2, 2), np.float32)}
ANSWER = (1, 2, 2, 2)
out("masked", T, "masked", value=np.ma.zeros(ANSWER, np.float32), **TINY)
out("broadcast", V, "memory", value=np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), ANSWER, (0, 0, 8, 4)),
    **TINY)  # fmt: skip
out("copied by its __array__", T, value=Copied(ANSWER), **TINY)
for who in ("x", "k"):
    memory = np.ones(64, np.float32)
    inputs = TINY | {who: memory[:9].reshape(1, 1, 3, 3) if who == "x" else memory[:8].reshape(2, 1, 2, 2)}
    out(f"overlaps {who}", V, who, "overlap", value=memory[5:13].reshape(ANSWER), **inputs)
    out(f"interleaves with {who}", V, who, "overlap", value=memory[1:17:2].reshape(ANSWER), **inputs)
SHARED = np.ones(8, np.float32)
out("overlaps bias", V, "bias", "overlap", value=SHARED.reshape(ANSWER), bias=SHARED[3:5], **TINY)


def called(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    given = {"x": view(X), "k": view(K), "workspace_limit": 1} | arguments
    return function(given.pop("x"), given.pop("k"), **given)


def refused(function: Callable[..., Any], call: Bad) -> None:
    name = function.__name__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(call.error) as raised:  # imports what this refusal needs
            called(function, call.arguments)
        message = str(raised.value)
        assert message.startswith(f"{name}: "), message
        missing = [text for text in call.says if text not in message]
        assert not missing, f"{missing} not in {message!r}"
        assert len(message) < 2000
        tracemalloc.start()
        try:
            start = time.perf_counter()
            with pytest.raises(call.error):
                called(function, call.arguments)
            assert time.perf_counter() - start < 2, "not refused at once"
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < SMALL_PEAK, f"{peak} bytes were allocated before the refusal"


@pytest.fixture
def nothing_runs(monkeypatch):
    """Entering an implementation is an error of the test, and not one that a refusal could be taken for."""

    def started(*arguments: Any) -> None:
        raise SystemError("an implementation was started")

    for name in dispatch.TABLE:
        monkeypatch.setattr(dispatch.implementation(name), "run", started)


def test_there_are_many_of_them():
    names = [call.name for call in BAD]
    assert len(names) == len(set(names))
    refusals = [call for call in BAD if call.error in (V, T)]
    assert len(refusals) >= 300, "none lost to a loop over nothing"
    assert all(call.says for call in refusals), "each says the argument, its value or the rule"


def test_a_good_call_would_have_been_started(nothing_runs):
    """What the refusals below show by its absence."""
    with pytest.raises(SystemError, match="was started"):
        conv2d(np.ones((3, 3)), np.ones((2, 2)))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("call", BAD, ids=lambda call: call.name)
def test_conv2d_refuses(call):
    refused(conv2d, call)


@pytest.mark.parametrize("call", [call for call in BAD if call.explained], ids=lambda call: call.name)
def test_explain_refuses_the_same(call):
    refused(explain, call)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("who", ["x", "k"])
def test_foreign_byte_order_is_converted_after_the_checks(who):
    shape = {"x": (1, 6, 2048, 2048), "k": (2048, 6, 32, 32)}[who]
    call = Bad(who, V, ("precision",), {who: view(shape, np.dtype(np.float32).newbyteorder()), "precision": "low"})
    refused(conv2d, call)
    refused(explain, call)


def test_a_result_larger_than_the_address_space_is_a_memory_error():
    with pytest.raises(MemoryError, match=r"conv2d: .*\d{10,} bytes"):
        conv2d([[1.0]], [[1.0]], padding=2**31 - 1, workspace_limit=2**70)


def test_the_least_that_would_do_is_named():
    """Not what the implementation that comes first would need."""
    with pytest.raises(MemoryError, match=r"least \d+ bytes") as raised:
        conv2d(np.ones((1, 64, 56, 56), np.float32), np.ones((64, 64, 3, 3), np.float32), workspace_limit=0)
    line, least = "n1c64h56w56_o64kh3kw3_f32", int(re.search(r"least (\d+)", str(raised.value))[1])
    assert explain(line, workspace_limit=least).implementation is not None
    assert explain(line, workspace_limit=least - 1).implementation is None
    assert f"least {least} bytes" not in explain(line, workspace_limit=0).table[0].reasons[0], "the first needs more"


@pytest.mark.parametrize("shape", [[9, 9], (9, 9.0), (True, 9)])
def test_what_looks_like_a_shape_and_is_data(shape):
    with pytest.raises(ValueError, match=r"explain: x=.* a shape is a tuple of integers"):
        explain(shape, (3, 3))


def test_what_explain_reports_instead_of_raising():
    """Too small a limit is no error to explain: it says what conv2d would."""
    report = explain(view(X), view(K), workspace_limit=1000)
    assert report.implementation is report.plan is report.workspace is report.accumulation is None
    assert "1000" in report.note and "bytes" in report.note
    assert not any("can run" in reason for verdict in report.table[:1] for reason in verdict.reasons), str(report)


# x's shape, the call's own options, and the number of channels
PICTURES = [
    ((9, 8, 3), {}, 3), ((9, 8, 4), {}, 4), ((3, 9, 8), {}, 3), ((2, 3, 9, 8), {}, 3), ((2, 9, 8, 3), {}, 3),
    ((9, 8, 5), {"layout": "NHWC"}, 5), ((2, 9, 8, 2), {"layout": "NHWC"}, 2), ((5, 9, 8), {}, 5),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "options", "channels"), PICTURES)
def test_the_recipe_for_colour_images_works(shape, options, channels):
    x = np.random.default_rng(0).standard_normal(shape)
    k = np.array([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]])
    for function in (conv2d, explain):
        with pytest.raises(ValueError, match="depthwise") as raised:
            function(x, k, **options)
    recipe = str(raised.value).splitlines()[-1].strip()
    assert f"groups={channels}" in recipe
    y = eval(recipe, {"np": np, "conv2d": conv2d, "x": x, "k": k})
    last = "NHWC" in recipe
    planes, results = (np.moveaxis(array, -1 if last else -3, 0) for array in (x, y))
    assert len(planes) == len(results) == channels
    for plane, result in zip(planes, results, strict=True):
        images = plane.reshape(-1, *plane.shape[-2:])
        wanted = np.stack([conv2d(image, k) for image in images]).reshape(result.shape)
        assert np.allclose(result, wanted, rtol=1e-13)
