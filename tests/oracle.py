"""The definition, written for being right: plain loops in extended precision, sharing no code with gpuconv.

``conv2d`` sums in longdouble (64-bit integers for integer operands) on NCHW images and OIHW kernels; ``answer`` takes
the public call's arguments, brings them to that form by its own arithmetic, and brings the result back.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIXTEEN_BIT = (np.dtype("float16"), BFLOAT16)
PAD_MODES = {"zeros": "constant", "replicate": "edge", "circular": "wrap"}


@dataclass(frozen=True)
class Answer:
    """What a convolution should give, and what its rounding errors scale with."""

    y: np.ndarray  # longdouble, clongdouble or int64
    magnitude: np.ndarray  # Σ|x||k| + |bias|; of a complex result one sum per component, as real and imaginary part
    products: int  # C/groups·KH·KW, what one element sums
    bias: bool
    dtype: np.dtype  # of the result


def is_integer(dtype: Any) -> bool:
    return np.dtype(dtype).kind in "biu"


def is_complex(dtype: Any) -> bool:
    return np.dtype(dtype).kind == "c"


def result_dtype(x: Any, k: Any) -> np.dtype:
    """The result type of the public contract, from the operands' types."""
    x, k = np.dtype(x), np.dtype(k)
    if is_integer(x) and is_integer(k):
        return np.dtype("int32" if max(x.itemsize, k.itemsize) == 1 else "int64")
    if is_integer(x) or is_integer(k):
        return k if is_integer(x) else x
    if {x, k} == set(SIXTEEN_BIT):
        return np.dtype("float32")
    return np.result_type(x, k)


def resolve_padding(padding: Any, sizes: Any, kernel: Any, stride: Any, dilation: Any) -> tuple:
    """((top, bottom), (left, right)), found by counting windows rather than by a formula."""
    if not isinstance(padding, str):
        pairs = (padding, padding) if np.ndim(padding) == 0 else padding
        return tuple((pair, pair) if np.ndim(pair) == 0 else tuple(pair) for pair in pairs)
    pads = []
    for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        reach = d * (k - 1)  # from a window's first tap to its last
        if padding == "full":
            pads.append((reach, reach))
            continue
        last = (len(range(0, n, s)) - 1) * s + reach  # what the last of one window per s pixels reads
        total = 0 if padding == "valid" else next(t for t in itertools.count() if last < n + t)
        ends = (total // 2, total - total // 2)
        pads.append(ends[::-1] if padding == "same_lower" else ends)
    return tuple(pads)


def image_to_nchw(x: np.ndarray, layout: str) -> np.ndarray:
    if layout == "NHWC" and x.ndim > 2:
        x = np.moveaxis(x, -1, -3)
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def kernel_to_oihw(k: np.ndarray, layout: str) -> np.ndarray:
    """A view of ``k`` (rank 2, 3 or 4) with axes O, I, KH, KW."""
    if k.ndim == 2:
        return k[None, None]
    if layout == "HWIO":
        k = k.transpose(3, 2, 0, 1) if k.ndim == 4 else k.transpose(2, 0, 1)
    elif layout == "OHWI" and k.ndim == 4:
        k = k.transpose(0, 3, 1, 2)
    return k if k.ndim == 4 else k[:, None]


def pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if np.ndim(value) == 0 else (int(value[0]), int(value[1]))


def extended(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``array`` as the sum of a ``dtype`` result sees it, in the widest type of its kind."""
    if is_integer(dtype):
        return array.astype(np.int64)
    if is_integer(array.dtype):  # an integer operand takes the type that the sum has
        array = array.astype(np.float32 if dtype in SIXTEEN_BIT else dtype)
    return array.astype(np.clongdouble if is_complex(dtype) else np.longdouble)


def magnitudes(x: np.ndarray, k: np.ndarray) -> np.ndarray:
    """|x||k| with one term per component of a complex product."""
    if not is_complex(x.dtype):
        return np.abs(x).astype(np.longdouble) * np.abs(k).astype(np.longdouble)
    a, b, c, d = (np.abs(part) for part in (x.real, x.imag, k.real, k.imag))
    return (a * c + b * d) + 1j * (a * d + b * c)


def conv2d(
    x: np.ndarray,
    k: np.ndarray,
    bias: np.ndarray | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "constant",
    padding_value: Any = 0,
    flip: bool = False,
    activation: str | None = None,
    x_zero_point: int = 0,
    k_zero_point: Any = 0,
    dtype: Any = None,
) -> Answer:
    """y[n,o,i,j] = b[o] + Σ_cpq x[n,c, i·s+p·d−pad, j·s+q·d−pad] · k[o,c,p,q] on NCHW and OIHW arrays."""
    dtype = result_dtype(x.dtype, k.dtype) if dtype is None else np.dtype(dtype)
    (sh, sw), (dh, dw) = pair(stride), pair(dilation)
    N, C, *sizes = x.shape
    O, I, KH, KW = k.shape
    assert C == I * groups
    assert O % groups == 0
    pads = resolve_padding(padding, sizes, (KH, KW), (sh, sw), (dh, dw))
    mode = PAD_MODES.get(padding_mode, padding_mode)
    constant = {"constant_values": x_zero_point or padding_value} if mode == "constant" else {}
    x = np.pad(x, ((0, 0), (0, 0), *pads), mode=mode, **constant)
    x, k = extended(x, dtype), extended(k, dtype)
    if x_zero_point:
        x = x - x.dtype.type(x_zero_point)
    if np.any(k_zero_point):
        k = k - np.asarray(k_zero_point).astype(k.dtype).reshape(-1, 1, 1, 1)
    if flip:
        k = k[:, :, ::-1, ::-1]
    rows = range(0, x.shape[2] - dh * (KH - 1), sh)
    columns = range(0, x.shape[3] - dw * (KW - 1), sw)
    y = np.zeros((N, O, len(rows), len(columns)), x.dtype)
    magnitude = np.zeros(y.shape, np.clongdouble if is_complex(dtype) else np.longdouble)
    with np.errstate(all="ignore"):  # NaN and Inf are among the inputs; integers wrap
        for n, g in itertools.product(range(N), range(groups)):
            channels, filters = slice(g * I, (g + 1) * I), slice(g * (O // groups), (g + 1) * (O // groups))
            for (i, top), (j, left) in itertools.product(enumerate(rows), enumerate(columns)):
                seen = x[n, channels, top : top + dh * (KH - 1) + 1 : dh, left : left + dw * (KW - 1) + 1 : dw]
                y[n, filters, i, j] = (seen * k[filters]).sum(axis=(1, 2, 3))
                magnitude[n, filters, i, j] = magnitudes(seen, k[filters]).sum(axis=(1, 2, 3))
        if bias is not None:
            column = extended(bias.astype(dtype), dtype).reshape(-1, 1, 1)
            y = y + column
            parts = np.abs(column.real) + 1j * np.abs(column.imag) if is_complex(dtype) else np.abs(column)
            magnitude = magnitude + parts
        if activation == "relu":
            y = np.where(y < 0, np.zeros_like(y), y)  # a NaN compares false, and passes
    return Answer(y, magnitude, I * KH * KW, bias is not None, dtype)


def answer(
    x: np.ndarray,
    k: np.ndarray,
    bias: np.ndarray | None = None,
    *args: Any,
    layout: str = "NCHW",
    kernel_layout: str = "OIHW",
    **kwargs: Any,
) -> Answer:
    """What the public ``conv2d`` should return for these arguments, in the caller's rank and layout."""
    found = conv2d(image_to_nchw(x, layout), kernel_to_oihw(k, kernel_layout), bias, *args, **kwargs)

    def back(array: np.ndarray) -> np.ndarray:
        if (x.ndim, k.ndim) == (2, 2):
            return array[0, 0]
        if layout == "NHWC":
            array = np.moveaxis(array, 1, -1)
        return array if x.ndim == 4 else array[0]

    return replace(found, y=back(found.y), magnitude=back(found.magnitude))
