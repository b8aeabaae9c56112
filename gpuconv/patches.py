"""``unfold`` and ``fold``: the windows of a convolution as columns, and their sums."""

from __future__ import annotations

from typing import Any

from gpuconv import arrays, geometry, request
from gpuconv.problem import Conv2dProblem


def unfold(
    x: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
    *,
    out: Any = None,
    device: str | None = None,
    backend: str | None = None,
    workspace_limit: int | None = None,
    stream: Any = None,
) -> Any:
    """The windows that a convolution reads, one per column (im2col).

    ``columns[n, (c·KH + p)·KW + q, i·OW + j] = x[n, c, i·s + p·d - pad, j·s + q·d - pad]``, zero outside x.

    Parameters
    ----------
    x : array_like
        (C, H, W) or (N, C, H, W).
    kernel_size : int or (rows, columns)
        Extent of the window.
    dilation : int or (rows, columns), default 1
        Spacing of the window's pixels.
    padding : int, (rows, columns), ((top, bottom), (left, right)) or str, default 0
        Zeros around x, or a name, as for ``conv2d``.
    stride : int or (rows, columns), default 1
        Step of the window. The order of arguments is that of ``torch.nn.functional.unfold``.
    out, device, backend, workspace_limit, stream
        As for ``conv2d``.

    Returns
    -------
    array
        (C · KH · KW, OH · OW) or (N, C · KH · KW, OH · OW), of x's dtype, in x's library, on x's device.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or value, before anything is allocated.
    NoBackendError, MemoryError
        As ``conv2d``.

    Notes
    -----
    Elements are copied, no arithmetic touches them. The result is KH · KW times as large as x at stride 1:
    ``conv2d`` never makes all of it.

    Examples
    --------
    >>> import numpy as np
    >>> unfold(np.arange(6.0).reshape(1, 2, 3), 2)
    array([[0., 1.],
           [1., 2.],
           [3., 4.],
           [4., 5.]])
    """
    call = "unfold"
    image = arrays.operand(call, "x", x)
    if len(image.shape) not in (3, 4):
        raise ValueError(f"{call}: x must have shape (C, H, W) or (N, C, H, W); got {image.shape}")
    problem = _problem(call, "unfold", image.shape, kernel_size, dilation, padding, stride, image.dtype, None)
    shape = _columns_shape(problem, len(image.shape))
    return request.compute(call, request.Request(problem, shape, image), out, device, backend, workspace_limit, stream)


def fold(
    columns: Any,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
    *,
    dtype: Any = None,
    out: Any = None,
    device: str | None = None,
    backend: str | None = None,
    workspace_limit: int | None = None,
    stream: Any = None,
) -> Any:
    """The adjoint of ``unfold``: every column is added back to where it came from (col2im).

    ``x[n,c,h,w] = Σ_pq columns[n, (c·KH + p)·KW + q, i·OW + j]`` over the i, j with ``i·s + p·d - pad = h`` and
    ``j·s + q·d - pad = w``. What was read from the padding is dropped. It does not undo ``unfold``, which counts a
    pixel once for each window that reads it: divide by ``fold`` of ones for that.

    Parameters
    ----------
    columns : array_like
        (C · KH · KW, L) or (N, C · KH · KW, L), with as many columns L as ``unfold`` gives.
    output_size : int or (rows, columns)
        H and W of the result.
    kernel_size, dilation, padding, stride
        Those of ``unfold``; the order of arguments is that of ``torch.nn.functional.fold``.
    dtype, out, device, backend, workspace_limit, stream
        As for ``conv2d``.

    Returns
    -------
    array
        (C, H, W) or (N, C, H, W). 8-bit integers give int32, other integers int64; 16-bit floats are summed in float32
        and rounded once.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or value, before anything is allocated.
    NoBackendError, MemoryError
        As ``conv2d``.

    Notes
    -----
    Each element sums at most KH · KW numbers, in the same order on every run.

    Examples
    --------
    >>> import numpy as np
    >>> fold(np.ones((4, 2)), (2, 3), 2)
    array([[[1., 2., 1.],
            [1., 2., 1.]]])
    """
    call = "fold"
    windows = arrays.operand(call, "columns", columns)
    if len(windows.shape) not in (2, 3):
        raise ValueError(f"{call}: columns must have shape (C·KH·KW, L) or (N, C·KH·KW, L); got {windows.shape}")
    H, W = geometry.as_pair(call, "output_size", output_size, 1)
    kernel = geometry.as_pair(call, "kernel_size", kernel_size, 1)
    *images, rows, _ = windows.shape
    taps = kernel[0] * kernel[1]
    if rows == 0 or rows % taps:
        raise ValueError(
            f"{call}: columns has {rows} rows (shape {windows.shape}); with kernel_size={kernel_size!r} they must be "
            f"C · {taps}"
        )
    x_shape = (*images, rows // taps, H, W)
    problem = _problem(call, "fold", x_shape, kernel, dilation, padding, stride, windows.dtype, dtype)
    expected = _columns_shape(problem, len(x_shape))
    if windows.shape != expected:
        raise ValueError(
            f"{call}: columns has {windows.shape[-1]} columns (shape {windows.shape}); windows of {kernel} in an image "
            f"of {(H, W)} are {problem.OH} × {problem.OW} = {expected[-1]}"
        )
    asked = request.Request(problem, x_shape, windows, names=("columns", ""))
    return request.compute(call, asked, out, device, backend, workspace_limit, stream)


def _problem(
    call: str, op: str, x_shape: tuple[int, ...], kernel_size: Any, dilation: Any, padding: Any, stride: Any,
    x_dtype: str, dtype: Any,
) -> Conv2dProblem:  # fmt: skip
    kernel = geometry.as_pair(call, "kernel_size", kernel_size, 1)
    channels = x_shape[-3]
    if channels == 0:
        raise ValueError(f"{call}: x has 0 channels (shape {x_shape}); it needs at least one")
    k_shape = (channels * kernel[0] * kernel[1], 1, *kernel)
    return Conv2dProblem.of(
        x_shape, k_shape, call=call, x_dtype=x_dtype, k_dtype=x_dtype, dtype=dtype, stride=stride, padding=padding,
        dilation=dilation, groups=channels, op=op,
    )  # fmt: skip


def _columns_shape(problem: Conv2dProblem, rank: int) -> tuple[int, ...]:
    shape = (problem.N, problem.O, problem.OH * problem.OW)
    return shape if rank == 4 else shape[1:]
