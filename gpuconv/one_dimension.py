"""``conv1d``: a convolution along one axis, which is one of images that are one row high."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpuconv import arrays, geometry, layouts, quick, request
from gpuconv.arrays import Array
from gpuconv.dispatch import Choice
from gpuconv.geometry import Pair
from gpuconv.problem import check_choice

_LAYOUTS = {"NCL": "NCHW", "NLC": "NHWC"}
_KERNEL_LAYOUTS = {"OIK": "OIHW", "KIO": "HWIO", "OKI": "OHWI"}


def conv1d(
    x: Any,
    k: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    padding_mode: str = "constant",
    padding_value: complex = 0,
    flip: bool = False,
    layout: str = "NCL",
    kernel_layout: str = "OIK",
    activation: str | None = None,
    x_zero_point: Any = 0,
    k_zero_point: Any = 0,
    dtype: Any = None,
    precision: str = "highest",
    out: Any = None,
    device: str | None = None,
    backend: str | None = None,
    workspace_limit: int | None = None,
    stream: Any = None,
) -> Any:
    """Convolve signals with kernels, on the GPU or the CPU.

    ``y[n,o,i] = bias[o] + Σ_cp x[n, c, i·s + p·d - pad] · k[o,c,p]``

    Parameters
    ----------
    x : array_like
        (L,), (C, L) or (N, C, L); with ``layout="NLC"`` (L, C) or (N, L, C). A dask array gives one, as for ``conv2d``.
    k : array_like
        (K,) for a one-dimensional x, else (O, C // groups, K), in ``kernel_layout``'s order.
    bias : array_like of shape (O,), optional
        Added to each output channel.
    stride : int, default 1
        Step of the window, in elements.
    padding : int, (before, after) or str, default 0
        Elements added on each side, or a name as for ``conv2d``.
    dilation : int, default 1
        Spacing of the kernel's taps, in elements.
    groups, padding_mode, padding_value, flip
        As for ``conv2d``.
    layout : {"NCL", "NLC"}
        Whether channels come before or after the elements, in x and in the result.
    kernel_layout : {"OIK", "KIO", "OKI"}
        The order of k's axes.
    activation, x_zero_point, k_zero_point, dtype, precision, out, device, backend, workspace_limit, stream
        As for ``conv2d``.

    Returns
    -------
    array
        (OL,), (O, OL) or (N, O, OL), channels last in NLC; in x's library, on x's device.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or value, before anything is allocated.
    NoBackendError, MemoryError
        As ``conv2d``.

    Notes
    -----
    Runs as ``conv2d`` of images of one row, through the same implementations.

    Examples
    --------
    >>> import numpy as np
    >>> conv1d(np.array([1.0, 2.0, 4.0, 8.0]), [-1, 1])
    array([1., 2., 4.])
    """
    call = "conv1d"
    options = (
        stride, padding, dilation, groups, padding_mode, padding_value, flip, layout, kernel_layout, activation,
        x_zero_point, k_zero_point, precision, backend,
    )  # fmt: skip
    key = quick.key_of(call, x, k, options, (dtype, device, workspace_limit, stream), bias, out)
    if (y := quick.repeated(key, x, k, bias, out)) is not None:
        return y
    check_choice(call, "layout", layout, tuple(_LAYOUTS))
    check_choice(call, "kernel_layout", kernel_layout, tuple(_KERNEL_LAYOUTS))
    groups = geometry.as_integer(call, "groups", groups, 1, 2**63)
    offset = bias
    if lazy := arrays.is_dask(x):
        from gpuconv import blocked

        signal, kernel, offset = blocked.stand_ins(call, x, k, bias)
    else:
        signal, kernel = arrays.operand(call, "x", x), arrays.operand(call, "k", k)
    image_layout, layout_2d = _LAYOUTS[layout], _KERNEL_LAYOUTS[kernel_layout]
    L, K = _check_shapes(call, signal.shape, kernel.shape, image_layout, layout_2d, groups)
    strides = 1, _as_one(call, "stride", stride)
    dilations = 1, _as_one(call, "dilation", dilation)
    pads = _padding(call, padding, L, K, strides[1], dilations[1])
    geometry.require_fit(call, (L,), (K,), (pads,), (dilations[1],), ("x", "k"))
    mode = geometry.PADDING_MODE_ALIASES.get(padding_mode, padding_mode) if isinstance(padding_mode, str) else ""
    if mode in geometry.PADDING_MODES[1:] and L == 0 and any(pads):
        raise ValueError(
            f"{call}: padding_mode={padding_mode!r} cannot extend an empty axis; x has shape {signal.shape}"
        )

    def lift(array: Array) -> Array:
        """A signal as an image of one row: its elements are the last axis, or in NLC the last but one."""
        return array[..., None, :, :] if layout == "NLC" and array.ndim > 1 else array[..., None, :]

    row: tuple[Any, ...] = (..., None, slice(None))
    if len(kernel.shape) == 3:
        row = {"OIHW": row, "HWIO": (None, ...), "OHWI": (slice(None), None, ...)}[layout_2d]
    asked = request.forward(
        call, replace(signal, array=lift(signal.array)), replace(kernel, array=kernel.array[row]), offset, strides,
        ((0, 0), pads), dilations, groups, padding_mode, padding_value, flip, image_layout, layout_2d, activation,
        x_zero_point, k_zero_point, dtype, precision,
    )  # fmt: skip
    # The row's axis is the last but one, or before the channels in NLC.
    axis = len(asked.shape) - (3 if layout == "NLC" and len(asked.shape) > 2 else 2)
    if lazy:
        weights = k[row] if arrays.is_dask(k) else k
        y = blocked.compute(call, asked, lift(x), weights, bias, out, device, backend, workspace_limit, stream)
        return y[(slice(None),) * axis + (0,)]
    asked = replace(asked, shape=asked.shape[:axis] + asked.shape[axis + 1 :], lift=lift)

    def done(choice: Choice) -> None:
        if key is not None:
            quick.remember(key, quick.of_request(asked, choice, None, out))

    return request.compute(call, asked, out, device, backend, workspace_limit, stream, done=done)


def _as_one(call: str, name: str, value: Any) -> int:
    """``value``, an integer or a sequence of one, as PyTorch has it."""
    if geometry.is_sequence(value) and len(value) == 1:
        value = value[0]
    return geometry.as_integer(call, name, value, 1)


def _padding(call: str, padding: Any, n: int, k: int, stride: int, dilation: int) -> Pair:
    if geometry.is_sequence(padding) and len(padding) == 1:
        padding = padding[0]
    return geometry.axis_padding(call, padding, n, k, stride, dilation)


_PAIRINGS = """\
    x (L,)         with k (K,)                  gives (OL,)
    x (C, L)       with k (O, C/groups, K)      gives (O, OL)
    x (N, C, L)    with k (O, C/groups, K)      gives (N, O, OL)"""


def _check_shapes(
    call: str, x_shape: tuple[int, ...], k_shape: tuple[int, ...], layout: str, kernel_layout: str, groups: int
) -> Pair:
    """(L, K), or a ValueError that says which shapes would work."""
    ranks = (len(x_shape), len(k_shape))
    if ranks not in ((1, 1), (2, 3), (3, 3)):
        hint = ""
        if ranks in ((2, 1), (3, 1)):
            channels = x_shape[-1] if layout == "NHWC" else x_shape[-2]
            hint = (
                f"\nTo filter each of the {channels} channels with the same kernel (depthwise):\n"
                f"    conv1d(x, np.broadcast_to(k, ({channels}, 1, {k_shape[0]})), groups={channels})"
            )
        raise ValueError(
            f"{call}: x of shape {x_shape} and k of shape {k_shape} do not pair; what works:\n{_PAIRINGS}{hint}"
        )
    C, L = (1, x_shape[0]) if ranks[0] == 1 else (x_shape[-2:] if layout == "NCHW" else x_shape[:-3:-1])
    O, I, K = (1, 1, k_shape[0])
    if ranks[1] == 3:
        order = {"OIHW": (0, 1, 2), "HWIO": (2, 1, 0), "OHWI": (0, 2, 1)}[kernel_layout]
        O, I, K = (k_shape[axis] for axis in order)
    for name, extent in (("output channels", O), ("elements", K)):
        if extent == 0:
            raise ValueError(f"{call}: k has 0 {name} (shape {k_shape}); a kernel needs at least one")
    layouts.check_channels(call, ("x", "k"), x_shape, k_shape, C, O, I, groups, 2 if kernel_layout == "OHWI" else 1)
    return L, K
