"""The definitions of conv2d's relatives, written for being right: plain loops in extended precision.

Each function takes the public call's arguments and shares no code with gpuconv. The gradients are the adjoint of
``oracle.conv2d`` under the complex inner product, found by giving instead of taking: every output of the forward
problem is walked to, and gives to the pixels (or to the weights) that its window read.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import oracle
from oracle import PAD_MODES, Answer, extended, image_to_nchw, kernel_to_oihw, magnitudes, pair, result_dtype

Pads = tuple[tuple[int, int], tuple[int, int]]


def windows(n: int, k: int, pads: tuple[int, int], stride: int, dilation: int) -> int:
    """How many windows fit along an axis of ``n`` pixels."""
    return len(range(0, n + sum(pads) - dilation * (k - 1), stride))


def _accumulators(shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    if oracle.is_complex(dtype):
        return np.zeros(shape, np.clongdouble), np.zeros(shape, np.clongdouble)
    return np.zeros(shape, np.int64 if oracle.is_integer(dtype) else np.longdouble), np.zeros(shape, np.longdouble)


def absolute(array: np.ndarray) -> np.ndarray:
    """|a|, of a complex number one per component."""
    if oracle.is_complex(array.dtype):
        return np.abs(array.real) + 1j * np.abs(array.imag)
    return np.abs(array).astype(np.longdouble)


def _scatter(
    y: np.ndarray, k: np.ndarray, size: tuple[int, int], stride: Any, pads: Pads, dilation: Any, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every y[n,o,i,j] gives y·k[o,c,p,q] to pixel (i·s + p·d - pad, j·s + q·d - pad) of channel c, if there is one.

    ``y`` (N, O, OH, OW) and ``k`` (O, I, KH, KW) are in extended precision. Returns (N, I·groups, H, W), and the same
    of the magnitudes.
    """
    (sh, sw), (dh, dw), (H, W) = stride, dilation, size
    N, O, OH, OW = y.shape
    _, I, KH, KW = k.shape
    reach_h, reach_w = dh * (KH - 1) + 1, dw * (KW - 1) + 1
    # what lies in the padding is given to, and cut away at the end
    extents = (max(H + sum(pads[0]), (OH - 1) * sh + reach_h), max(W + sum(pads[1]), (OW - 1) * sw + reach_w))
    total, magnitude = _accumulators((N, I * groups, *extents), y.dtype)
    with np.errstate(all="ignore"):  # NaN and Inf are among the inputs; integers wrap
        for n, g in itertools.product(range(N), range(groups)):
            channels, filters = slice(g * I, (g + 1) * I), slice(g * (O // groups), (g + 1) * (O // groups))
            for i, j in itertools.product(range(OH), range(OW)):
                rows, columns = slice(i * sh, i * sh + reach_h, dh), slice(j * sw, j * sw + reach_w, dw)
                given = y[n, filters, i, j].reshape(-1, 1, 1, 1)
                total[n, channels, rows, columns] += (given * k[filters]).sum(axis=0)
                magnitude[n, channels, rows, columns] += magnitudes(given, k[filters]).sum(axis=0)
    (top, _), (left, _) = pads
    inside = (slice(None), slice(None), slice(top, top + H), slice(left, left + W))
    return total[inside], magnitude[inside]


def _image_back(array: np.ndarray, ndim: int, layout: str) -> np.ndarray:
    """(N, C, H, W) in the caller's rank and layout."""
    if ndim == 2:
        return array[0, 0]
    array = np.moveaxis(array, 1, -1) if layout == "NHWC" else array
    return array if ndim == 4 else array[0]


def _kernel_back(array: np.ndarray, ndim: int, kernel_layout: str) -> np.ndarray:
    """(O, I, KH, KW) in the caller's rank and order of axes."""
    if ndim == 2:
        return array[0, 0]
    if ndim == 3:
        array = array[:, 0]
        return np.moveaxis(array, 0, -1) if kernel_layout == "HWIO" else array
    return array.transpose({"OIHW": (0, 1, 2, 3), "HWIO": (2, 3, 1, 0), "OHWI": (0, 2, 3, 1)}[kernel_layout])


def _chosen(first: np.ndarray, second: np.ndarray, dtype: Any) -> np.dtype:
    return result_dtype(first.dtype, second.dtype) if dtype is None else np.dtype(dtype)


def conv2d_input(
    input_size: Any,
    weight: np.ndarray,
    grad_output: np.ndarray,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    flip: bool = False,
    layout: str = "NCHW",
    kernel_layout: str = "OIHW",
    dtype: Any = None,
) -> Answer:
    """Σ over o, p, q of conj(k)·y, at the pixels of an input of ``input_size``."""
    dtype, ndim = _chosen(weight, grad_output, dtype), len(input_size)
    k = extended(kernel_to_oihw(weight, kernel_layout), dtype).conj()
    k = k[:, :, ::-1, ::-1] if flip else k
    y = image_to_nchw(extended(grad_output, dtype), layout)
    size = image_to_nchw(np.empty(input_size, np.int8), layout).shape
    O, I, *taps = k.shape
    pads = oracle.resolve_padding(padding, size[2:], taps, pair(stride), pair(dilation))
    assert size[1] == I * groups
    assert y.shape[2:] == tuple(
        windows(*axis) for axis in zip(size[2:], taps, pads, pair(stride), pair(dilation), strict=True)
    )
    total, magnitude = _scatter(y, k, size[2:], pair(stride), pads, pair(dilation), groups)
    total, magnitude = (_image_back(array, ndim, layout) for array in (total, magnitude))
    return Answer(total, magnitude, O // groups * taps[0] * taps[1], False, dtype)


def conv2d_weight(
    input: np.ndarray,
    weight_size: Any,
    grad_output: np.ndarray,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    flip: bool = False,
    layout: str = "NCHW",
    kernel_layout: str = "OIHW",
    dtype: Any = None,
) -> Answer:
    """Σ over n, i, j of conj(x)·y, for every weight: that of the pixel it was multiplied with at (i, j)."""
    dtype = _chosen(input, grad_output, dtype)
    (sh, sw), (dh, dw) = pair(stride), pair(dilation)
    O, I, KH, KW = kernel_to_oihw(np.empty(weight_size, np.int8), kernel_layout).shape
    x = extended(image_to_nchw(input, layout), dtype).conj()
    y = image_to_nchw(extended(grad_output, dtype), layout)
    pads = oracle.resolve_padding(padding, x.shape[2:], (KH, KW), (sh, sw), (dh, dw))
    x = np.pad(x, ((0, 0), (0, 0), *pads))
    N, _, OH, OW = y.shape
    total, magnitude = _accumulators((O, I, KH, KW), dtype)
    with np.errstate(all="ignore"):
        for o, p, q in itertools.product(range(O), range(KH), range(KW)):
            first = o // (O // groups) * I
            rows = slice(p * dh, p * dh + (OH - 1) * sh + 1, sh)
            columns = slice(q * dw, q * dw + (OW - 1) * sw + 1, sw)
            seen, given = x[:, first : first + I, rows, columns], y[:, o, None]
            total[o, :, p, q] = (seen * given).sum(axis=(0, 2, 3))
            magnitude[o, :, p, q] = magnitudes(seen, given).sum(axis=(0, 2, 3))
    if flip:
        total, magnitude = total[:, :, ::-1, ::-1], magnitude[:, :, ::-1, ::-1]
    total, magnitude = (_kernel_back(array, len(weight_size), kernel_layout) for array in (total, magnitude))
    return Answer(total, magnitude, N * OH * OW, False, dtype)


def conv2d_bias(grad_output: np.ndarray, *, layout: str = "NCHW", dtype: Any = None) -> Answer:
    """Σ over n, i, j of y."""
    dtype = _chosen(grad_output, grad_output, dtype)
    y = image_to_nchw(extended(grad_output, dtype), layout)
    with np.errstate(all="ignore"):
        return Answer(y.sum(axis=(0, 2, 3)), absolute(y).sum(axis=(0, 2, 3)), y[:, 0].size, False, dtype)


def conv_transpose2d(
    x: np.ndarray,
    k: np.ndarray,
    bias: np.ndarray | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    layout: str = "NCHW",
    activation: str | None = None,
    dtype: Any = None,
) -> Answer:
    """Every x[n,c,i,j] gives x·k[c,o,p,q] to (i·s + p·d - pad, j·s + q·d - pad); what nothing reaches is the bias."""
    dtype = _chosen(x, k, dtype)
    strides, dilations, more = pair(stride), pair(dilation), pair(output_padding)
    images, kernel = extended(image_to_nchw(x, layout), dtype), extended(kernel_to_oihw(k, "OIHW"), dtype)
    C, _, *taps = kernel.shape
    pads = oracle.resolve_padding(padding, None, None, None, None)
    size = tuple(
        (n - 1) * s + d * (t - 1) + 1 + extra - sum(pad)
        for n, t, s, d, extra, pad in zip(images.shape[2:], taps, strides, dilations, more, pads, strict=True)
    )
    total, magnitude = _scatter(images, kernel, size, strides, pads, dilations, groups)
    if bias is not None:
        column = extended(bias.astype(dtype), dtype).reshape(-1, 1, 1)
        with np.errstate(all="ignore"):
            total, magnitude = total + column, magnitude + absolute(column)
    if activation == "relu":
        total = np.where(total < 0, np.zeros_like(total), total)  # a NaN compares false, and passes
    total, magnitude = (_image_back(array, x.ndim, layout) for array in (total, magnitude))
    return Answer(total, magnitude, C // groups * taps[0] * taps[1], bias is not None, dtype)


def _patches(size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> tuple[Any, ...]:
    """Numbers of windows, kernel extents and pads, and for every tap the slices of the padded image that it reads."""
    taps, strides, dilations = pair(kernel_size), pair(stride), pair(dilation)
    pads = oracle.resolve_padding(padding, None, None, None, None)
    counts = [windows(*axis) for axis in zip(size, taps, pads, strides, dilations, strict=True)]
    read = [
        [slice(t * d, t * d + (count - 1) * s + 1, s) for t in range(tap)]
        for tap, d, s, count in zip(taps, dilations, strides, counts, strict=True)
    ]
    return counts, taps, pads, read


def unfold(x: np.ndarray, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Answer:
    """Column l of channel c holds the window l of x: copies, of x's own type."""
    images = image_to_nchw(x, "NCHW")
    (OH, OW), (KH, KW), pads, (rows, columns) = _patches(images.shape[2:], kernel_size, dilation, padding, stride)
    N, C = images.shape[:2]
    padded = np.pad(images, ((0, 0), (0, 0), *pads))
    y = np.empty((N, C, KH, KW, OH, OW), x.dtype)
    for p, q in itertools.product(range(KH), range(KW)):
        y[:, :, p, q] = padded[:, :, rows[p], columns[q]]
    y = extended(y.reshape(N, C * KH * KW, OH * OW), x.dtype)
    y = y if x.ndim == 4 else y[0]
    return Answer(y, absolute(y), 1, False, x.dtype)


def fold(
    columns: np.ndarray,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
    *,
    dtype: Any = None,
) -> Answer:
    """The adjoint of unfold: every window gives its column back, and overlapping windows add up."""
    dtype = _chosen(columns, columns, dtype)
    size = pair(output_size)
    (OH, OW), (KH, KW), pads, (rows, lines) = _patches(size, kernel_size, dilation, padding, stride)
    given = extended(columns, dtype).reshape((1,) * (3 - columns.ndim) + columns.shape)
    N, C = len(given), given.shape[1] // (KH * KW)
    given = given.reshape(N, C, KH, KW, OH, OW)
    extents = (n + sum(pad) for n, pad in zip(size, pads, strict=True))
    total, magnitude = _accumulators((N, C, *extents), dtype)
    with np.errstate(all="ignore"):
        for p, q in itertools.product(range(KH), range(KW)):
            total[:, :, rows[p], lines[q]] += given[:, :, p, q]
            magnitude[:, :, rows[p], lines[q]] += absolute(given[:, :, p, q])
    (top, _), (left, _) = pads
    inside = (slice(None), slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
    total, magnitude = (_image_back(array[inside], columns.ndim + 1, "NCHW") for array in (total, magnitude))
    return Answer(total, magnitude, KH * KW, False, dtype)


def conv1d(
    x: np.ndarray,
    k: np.ndarray,
    bias: np.ndarray | None = None,
    stride: int = 1,
    padding: Any = 0,
    dilation: int = 1,
    groups: int = 1,
    *,
    padding_mode: str = "constant",
    padding_value: Any = 0,
    flip: bool = False,
    layout: str = "NCL",
    kernel_layout: str = "OIK",
    activation: str | None = None,
    x_zero_point: int = 0,
    k_zero_point: Any = 0,
    dtype: Any = None,
) -> Answer:
    """y[n,o,i] = b[o] + Σ_cp x[n,c, i·s + p·d - pad] · k[o,c,p]."""
    dtype = _chosen(x, k, dtype)
    signal = np.moveaxis(x, -1, -2) if layout == "NLC" and x.ndim > 1 else x
    signal = signal.reshape((1,) * (3 - x.ndim) + signal.shape)
    kernel = k.reshape(1, 1, -1) if k.ndim == 1 else k
    if k.ndim == 3:
        kernel = kernel.transpose({"OIK": (0, 1, 2), "KIO": (2, 1, 0), "OKI": (0, 2, 1)}[kernel_layout])
    (O, I, K), N = kernel.shape, len(signal)
    if not isinstance(padding, str):
        padding = ((0, 0), (padding, padding) if np.ndim(padding) == 0 else tuple(padding))
    pads = oracle.resolve_padding(padding, (1, signal.shape[2]), (1, K), (1, stride), (1, dilation))[1]
    mode = PAD_MODES.get(padding_mode, padding_mode)
    constant = {"constant_values": x_zero_point or padding_value} if mode == "constant" else {}
    signal = extended(np.pad(signal, ((0, 0), (0, 0), pads), mode=mode, **constant), dtype)
    kernel = extended(kernel, dtype)
    if oracle.is_integer(dtype):
        signal = signal - np.int64(x_zero_point)
        kernel = kernel - np.asarray(k_zero_point, np.int64).reshape(-1, 1, 1)
    kernel = kernel[:, :, ::-1] if flip else kernel
    starts = range(0, signal.shape[2] - dilation * (K - 1), stride)
    total, magnitude = _accumulators((N, O, len(starts)), dtype)
    with np.errstate(all="ignore"):
        for n, o, (i, start) in itertools.product(range(N), range(O), enumerate(starts)):
            first = o // (O // groups) * I
            seen = signal[n, first : first + I, start : start + dilation * (K - 1) + 1 : dilation]
            total[n, o, i] = (seen * kernel[o]).sum()
            magnitude[n, o, i] = magnitudes(seen, kernel[o]).sum()
        if bias is not None:
            column = extended(bias.astype(dtype), dtype).reshape(-1, 1)
            total, magnitude = total + column, magnitude + absolute(column)
    if activation == "relu":
        total = np.where(total < 0, np.zeros_like(total), total)
    if k.ndim == 1:
        total, magnitude = total[0, 0], magnitude[0, 0]
    else:
        if layout == "NLC":
            total, magnitude = np.moveaxis(total, 1, -1), np.moveaxis(magnitude, 1, -1)
        if x.ndim == 2:
            total, magnitude = total[0], magnitude[0]
    return Answer(total, magnitude, I * K, bias is not None, dtype)
