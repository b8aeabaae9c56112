"""``conv_transpose2d``: the convolution run backwards, as an operator of its own."""

from __future__ import annotations

from typing import Any

from gpuconv import arrays, dtypes, geometry, layouts, quick, request
from gpuconv.dispatch import Choice
from gpuconv.geometry import Pads, Pair
from gpuconv.problem import ACTIVATIONS, PRECISIONS, Conv2dProblem, check_choice


def conv_transpose2d(
    x: Any,
    k: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    layout: str = "NCHW",
    activation: str | None = None,
    dtype: Any = None,
    precision: str = "highest",
    out: Any = None,
    device: str | None = None,
    backend: str | None = None,
    workspace_limit: int | None = None,
    stream: Any = None,
) -> Any:
    """Transposed convolution: every pixel of x adds a copy of the kernel to the result, ``stride`` pixels apart.

    ``y[n,o,h,w] = bias[o] + Σ_cpq x[n,c,i,j] · k[c,o,p,q]`` over the i, j with ``i·s + p·d - pad = h`` and
    ``j·s + q·d - pad = w``. It is the gradient of ``conv2d`` in its input, without conjugation, plus a bias.

    Parameters
    ----------
    x : array_like
        (H, W), (C, H, W) or (N, C, H, W); with ``layout="NHWC"`` (H, W, C) or (N, H, W, C). A dask array gives one, as
        for ``conv2d``, without blocks of groups.
    k : array_like
        (KH, KW) for a two-dimensional x, else (C, O // groups, KH, KW), as PyTorch has it.
    bias : array_like of shape (O,), optional
        Added to each output channel, where no pixel of x reaches too.
    stride : int or (rows, columns), default 1
        Distance of the copies, in pixels of the result.
    padding : int, (rows, columns) or ((top, bottom), (left, right)), default 0
        Rows and columns cut off the result's border: the padding of the convolution that this one runs backwards.
    output_padding : int or (rows, columns), default 0
        Rows and columns added at the end of the result, below max(stride, dilation): of the sizes that the convolution
        would map to x's, which one to return.
    groups : int, default 1
        Groups of channels.
    dilation : int or (rows, columns), default 1
        Spacing of the kernel's taps, in pixels of the result.
    layout, activation, dtype, precision, out, device, backend, workspace_limit, stream
        As for ``conv2d``.

    Returns
    -------
    array
        (N, O, OH, OW) in x's rank and layout, with
        ``OH = (H - 1)·stride - top - bottom + dilation·(KH - 1) + 1 + output_padding``.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or value, before anything is allocated.
    NoBackendError, MemoryError
        As ``conv2d``.

    Notes
    -----
    Takes ``2 · N · C · H · W · (O // groups) · KH · KW`` operations: no product with the zeros between the copies is
    made. Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", chapter 4.

    Examples
    --------
    >>> import numpy as np
    >>> conv_transpose2d(np.array([[1.0, 2.0]]), np.array([[1.0, 10.0, 100.0]]), stride=2)
    array([[  1.,  10., 102.,  20., 200.]])
    """
    call = "conv_transpose2d"
    options = stride, padding, output_padding, groups, dilation, layout, activation, precision, backend
    key = quick.key_of(call, x, k, options, (dtype, device, workspace_limit, stream), bias, out)
    if (y := quick.repeated(key, x, k, bias, out)) is not None:
        return y
    if lazy := arrays.is_dask(x):
        from gpuconv import blocked

        image, kernel, offset = blocked.stand_ins(call, x, k, bias)
    else:
        image, kernel = arrays.operand(call, "x", x), arrays.operand(call, "k", k)
        offset = None if bias is None else request.as_bias(call, bias)
    problem = problem_of(
        call, image.shape, kernel.shape, image.dtype, kernel.dtype, offset is not None, stride, padding, output_padding,
        groups, dilation, layout, activation, dtype, precision,
    )  # fmt: skip
    if offset is not None:
        request.check_bias(call, offset, problem)
    shape = request.image_shape(problem, problem.x_shape, len(image.shape), len(kernel.shape))
    asked = request.Request(problem, shape, image, kernel, offset)
    if lazy:
        return blocked.compute(call, asked, x, k, bias, out, device, backend, workspace_limit, stream)

    def done(choice: Choice) -> None:
        if key is not None:
            quick.remember(key, quick.of_request(asked, choice, None, out))

    return request.compute(call, asked, out, device, backend, workspace_limit, stream, done=done)


def problem_of(
    call: str, x_shape: tuple[int, ...], k_shape: tuple[int, ...], x_dtype: str, k_dtype: str, bias: bool, stride: Any,
    padding: Any, output_padding: Any, groups: Any, dilation: Any, layout: Any, activation: Any, dtype: Any,
    precision: Any,
) -> Conv2dProblem:  # fmt: skip
    """The input gradient that a transposed convolution is."""
    check_choice(call, "layout", layout, layouts.LAYOUTS)
    check_choice(call, "activation", activation, ACTIVATIONS)
    check_choice(call, "precision", precision, PRECISIONS)
    groups = geometry.as_integer(call, "groups", groups, 1, 2**63)
    N, C, OH, OW, I, KH, KW = _sizes(call, x_shape, k_shape, layout, groups)
    strides = geometry.as_pair(call, "stride", stride, 1)
    dilations = geometry.as_pair(call, "dilation", dilation, 1)
    if isinstance(padding, str):
        raise ValueError(
            f"{call}: padding must be an integer, (rows, columns) or ((top, bottom), (left, right)), because the size "
            f"of the result follows from it; got {padding!r}"
        )
    pads = geometry.resolve_padding(call, padding, (OH, OW), (KH, KW), strides, dilations)
    extra = geometry.as_pair(call, "output_padding", output_padding, 0)
    for axis, rest in enumerate(extra):
        limit = max(strides[axis], dilations[axis])
        if rest >= limit:
            raise ValueError(
                f"{call}: output_padding must be below max(stride, dilation) = {limit}; got {output_padding!r}"
            )
    sizes, forward_pads = [], []
    for n, k, s, d, (low, high), rest in zip((OH, OW), (KH, KW), strides, dilations, pads, extra, strict=True):
        reach = (n - 1) * s + geometry.window(k, d)
        size = reach - low - high + rest
        if size < 1:
            raise ValueError(
                f"{call}: the result would have {size} rows or columns: {n} pixels of x reach {reach}, "
                f"padding={padding!r} cuts off {low + high}"
            )
        sizes.append(size)
        # The convolution that maps a result of this size to x may leave up to stride - 1 pixels at the end unread. An
        # output_padding beyond that is a crop.
        forward_pads.append((low, high if rest < s else high - rest))
    y_dtype = dtypes.result_dtype(call, x_dtype, k_dtype, dtype)
    if activation is not None and dtypes.is_complex(y_dtype):
        raise ValueError(f"{call}: activation={activation!r} is not defined for complex results ({y_dtype})")
    problem = Conv2dProblem(
        N, I * groups, sizes[0], sizes[1], C, KH, KW, stride=strides, padding=_pads(forward_pads), dilation=dilations,
        groups=groups, layout=layout, activation=activation, bias=bias, x_dtype=x_dtype, k_dtype=k_dtype,
        y_dtype=y_dtype, precision=precision, op="input_grad",
    )  # fmt: skip
    problem.check_overflow(call)
    return problem


def _pads(pads: list[Pair]) -> Pads:
    return pads[0], pads[1]


_PAIRINGS = """\
    x (H, W)         with k (KH, KW)                  gives (OH, OW)
    x (C, H, W)      with k (C, O/groups, KH, KW)     gives (O, OH, OW)
    x (N, C, H, W)   with k (C, O/groups, KH, KW)     gives (N, O, OH, OW)"""


def _sizes(
    call: str, x_shape: tuple[int, ...], k_shape: tuple[int, ...], layout: str, groups: int
) -> tuple[int, int, int, int, int, int, int]:
    """(N, C, H, W, O // groups, KH, KW), or a ValueError that says which shapes would work."""
    if (len(x_shape), len(k_shape)) not in ((2, 2), (3, 4), (4, 4)):
        raise ValueError(f"{call}: x of shape {x_shape} and k of shape {k_shape} do not pair; what works:\n{_PAIRINGS}")
    x = tuple(x_shape[axis] for axis in layouts.image_axes(layout, len(x_shape)))
    N, C, H, W = (1,) * (4 - len(x)) + x
    channels, I, KH, KW = (1,) * (4 - len(k_shape)) + k_shape
    for name, extent in (("output channels per group", I), ("rows", KH), ("columns", KW)):
        if extent == 0:
            raise ValueError(f"{call}: k has 0 {name} (shape {k_shape}); a kernel needs at least one")
    for name, extent in (("rows", H), ("columns", W)):
        if extent == 0:
            raise ValueError(f"{call}: x has 0 {name} (shape {x_shape}), and the result's size is counted from them")
    if channels != C:
        raise ValueError(
            f"{call}: k has {channels} input channels (shape {k_shape}) but x has {C} channels (shape {x_shape}); "
            f"k.shape[0] must be x's channels, as for PyTorch's conv_transpose2d"
        )
    if C % groups:
        raise ValueError(f"{call}: groups must divide x's channels; got groups={groups} and {C} channels (x {x_shape})")
    return N, C, H, W, I, KH, KW
