"""The gradients of ``conv2d``: the adjoints of the convolution in its input, its kernel and its bias.

With ``y = conv2d(x, k, bias, …)`` and ``grad_output`` the gradient of a real number in y, these are the gradients in x,
k and bias. The order of arguments is that of ``torch.nn.grad``. Borders are constant zeros.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes, geometry, layouts, quick, request
from gpuconv.arrays import Operand
from gpuconv.dispatch import Choice
from gpuconv.problem import Conv2dProblem

__all__ = ["conv2d_bias", "conv2d_input", "conv2d_weight"]


def conv2d_input(
    input_size: Any,
    weight: Any,
    grad_output: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    flip: bool = False,
    layout: str = "NCHW",
    kernel_layout: str = "OIHW",
    dtype: Any = None,
    precision: str = "highest",
    out: Any = None,
    device: str | None = None,
    backend: str | None = None,
    workspace_limit: int | None = None,
    stream: Any = None,
) -> Any:
    """The gradient of a convolution in its input.

    ``dx[n,c,h,w] = Σ_opq grad_output[n,o,i,j] · conj(weight[o,c,p,q])`` over the i, j with ``i·s + p·d - pad = h`` and
    ``j·s + q·d - pad = w``. Input pixels that no window reads have a gradient of exactly zero.

    Parameters
    ----------
    input_size : tuple of int
        Shape of the convolution's input: (H, W), (C, H, W) or (N, C, H, W), in ``layout``'s order.
    weight : array_like
        The kernel, as for ``conv2d``.
    grad_output : array_like
        The gradient in the convolution's result, and of its shape.
    stride, padding, dilation, groups, flip, layout, kernel_layout
        Those of the convolution, as for ``conv2d``. Borders are zeros.
    dtype, precision, out, device, backend, workspace_limit, stream
        As for ``conv2d``; ``device=None`` is where ``grad_output`` lives.

    Returns
    -------
    array
        Of shape ``input_size``, in grad_output's library and on its device; by default of the dtype that ``conv2d``
        gives for grad_output and weight.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or value, before anything is allocated.
    NoBackendError, MemoryError
        As ``conv2d``.

    Notes
    -----
    Each element sums at most ``O // groups · KH · KW`` products. It takes as many operations as the convolution: the
    gradient is cut into convolutions of stride 1, one per residue of the rows and columns modulo the stride.

    Examples
    --------
    >>> import numpy as np
    >>> conv2d_input((1, 5), np.array([[1.0, 10.0]]), np.array([[1.0, 2.0]]), stride=2)
    array([[ 1., 10.,  2., 20.,  0.]])
    """
    call = "conv2d_input"
    options = input_size, stride, padding, dilation, groups, flip, layout, kernel_layout, precision, backend
    key = quick.key_of(call, grad_output, weight, options, (dtype, out, device, workspace_limit, stream))
    if (y := quick.repeated(key, grad_output, weight)) is not None:
        return y
    size = _size(call, "input_size", input_size)
    kernel, gradient = arrays.operand(call, "weight", weight), arrays.operand(call, "grad_output", grad_output)
    problem = Conv2dProblem.of(
        size, kernel.shape, call=call, x_dtype=gradient.dtype, k_dtype=kernel.dtype, dtype=dtype, stride=stride,
        padding=padding, dilation=dilation, groups=groups, flip=flip, layout=layout, kernel_layout=kernel_layout,
        precision=precision, op="input_grad", conjugate=True, names=("input_size", "weight"),
    )  # fmt: skip
    _check_gradient(call, gradient, problem, len(size), len(kernel.shape))
    asked = request.Request(problem, size, gradient, kernel, names=("grad_output", "weight"))
    return _computed(call, key, asked, out, device, backend, workspace_limit, stream)


def conv2d_weight(
    input: Any,
    weight_size: Any,
    grad_output: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    flip: bool = False,
    layout: str = "NCHW",
    kernel_layout: str = "OIHW",
    dtype: Any = None,
    precision: str = "highest",
    out: Any = None,
    device: str | None = None,
    backend: str | None = None,
    workspace_limit: int | None = None,
    stream: Any = None,
) -> Any:
    """The gradient of a convolution in its kernel.

    ``dk[o,c,p,q] = Σ_nij conj(input[n,c, i·s + p·d - pad, j·s + q·d - pad]) · grad_output[n,o,i,j]``

    Parameters
    ----------
    input : array_like
        The convolution's input, as for ``conv2d``.
    weight_size : tuple of int
        Shape of the kernel, in ``kernel_layout``'s order.
    grad_output : array_like
        The gradient in the convolution's result, and of its shape.
    stride, padding, dilation, groups, flip, layout, kernel_layout
        Those of the convolution, as for ``conv2d``. Borders are zeros.
    dtype, precision, out, device, backend, workspace_limit, stream
        As for ``conv2d``; ``device=None`` is where ``input`` lives.

    Returns
    -------
    array
        Of shape ``weight_size``, in input's library and on its device; zeros for N = 0. By default of the dtype that
        ``conv2d`` gives for input and grad_output.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or value, before anything is allocated.
    NoBackendError, MemoryError
        As ``conv2d``.

    Notes
    -----
    Each element sums ``N · OH · OW`` products. It takes as many operations as the convolution.

    NumPy arrays of 16 MiB and more go through a GPU in pieces, so that they may be larger than its memory, also where
    the other operand is on it. Their sums are added up there, in float64 (complex128) where they are of floating point,
    and rounded once; how they are split depends on the problem and on which operands are NumPy's alone.

    Examples
    --------
    >>> import numpy as np
    >>> conv2d_weight(np.array([[1.0, 2.0, 3.0]]), (1, 2), np.array([[1.0, 10.0]]))
    array([[21., 32.]])
    """
    call = "conv2d_weight"
    options = weight_size, stride, padding, dilation, groups, flip, layout, kernel_layout, precision, backend
    key = quick.key_of(call, input, grad_output, options, (dtype, out, device, workspace_limit, stream))
    if (y := quick.repeated(key, input, grad_output)) is not None:
        return y
    size = _size(call, "weight_size", weight_size)
    image, gradient = arrays.operand(call, "input", input), arrays.operand(call, "grad_output", grad_output)
    problem = Conv2dProblem.of(
        image.shape, size, call=call, x_dtype=image.dtype, k_dtype=gradient.dtype, dtype=dtype, stride=stride,
        padding=padding, dilation=dilation, groups=groups, flip=flip, layout=layout, kernel_layout=kernel_layout,
        precision=precision, op="weight_grad", conjugate=True, names=("input", "weight_size"),
    )  # fmt: skip
    _check_gradient(call, gradient, problem, len(image.shape), len(size))
    asked = request.Request(problem, size, image, gradient, names=("input", "grad_output"))
    return _computed(call, key, asked, out, device, backend, workspace_limit, stream)


def conv2d_bias(
    grad_output: Any,
    *,
    layout: str = "NCHW",
    dtype: Any = None,
    out: Any = None,
    device: str | None = None,
    backend: str | None = None,
    workspace_limit: int | None = None,
    stream: Any = None,
) -> Any:
    """The gradient of a convolution in its bias: the sum of ``grad_output`` over images and pixels.

    ``db[o] = Σ_nij grad_output[n,o,i,j]``

    Parameters
    ----------
    grad_output : array_like
        (OH, OW), (O, OH, OW) or (N, O, OH, OW), in ``layout``'s order.
    layout, dtype, out, device, backend, workspace_limit, stream
        As for ``conv2d``.

    Returns
    -------
    array
        Of shape (O,), in grad_output's library and on its device.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or value, before anything is allocated.
    NoBackendError, MemoryError
        As ``conv2d``.

    Notes
    -----
    It is the weight gradient of a 1×1 convolution of a constant image of ones, and runs as that: each element sums
    ``N · OH · OW`` numbers.

    Examples
    --------
    >>> import numpy as np
    >>> conv2d_bias(np.ones((8, 3, 5, 5)))
    array([200., 200., 200.])
    """
    call = "conv2d_bias"
    if not isinstance(layout, str) or layout not in layouts.LAYOUTS:
        raise ValueError(f"{call}: layout must be one of {', '.join(map(repr, layouts.LAYOUTS))}; got {layout!r}")
    key = quick.key_of(call, grad_output, grad_output, (layout, backend), (dtype, out, device, workspace_limit, stream))
    ready = None if key is None else quick.find(key)
    if ready is not None:
        return ready(np.ones((), grad_output.dtype), grad_output, None)  # the one element of the array of ones
    gradient = arrays.operand(call, "grad_output", grad_output)
    rank = len(gradient.shape)
    if rank not in (2, 3, 4):
        raise ValueError(
            f"{call}: grad_output must have shape (OH, OW), (O, OH, OW) or (N, O, OH, OW); got {gradient.shape}"
        )
    ordered = [gradient.shape[axis] for axis in layouts.image_axes(layout, rank)]
    *images, channels, rows, columns = ordered if rank > 2 else [1, *ordered]
    if channels == 0:
        raise ValueError(f"{call}: grad_output has 0 channels (shape {gradient.shape}); a bias needs at least one")
    if 0 in (rows, columns):
        raise ValueError(f"{call}: grad_output has no pixels (shape {gradient.shape}), which no convolution gives")
    ones_shape = (*images, 1, rows, columns) if layout == "NCHW" else (*images, rows, columns, 1)
    # bool beside a float would leave it to the few implementations that take operands of two kinds.
    exact = dtypes.is_integer(gradient.dtype) or dtypes.is_complex(gradient.dtype)
    ones_dtype = "bool" if exact else gradient.dtype
    problem = Conv2dProblem.of(
        ones_shape, (channels, 1, 1, 1), call=call, x_dtype=ones_dtype, k_dtype=gradient.dtype, dtype=dtype,
        layout=layout, op="weight_grad",
    )  # fmt: skip
    ones = arrays.ones(ones_shape, ones_dtype, gradient)
    asked = request.Request(problem, (channels,), ones, gradient, names=("ones", "grad_output"))
    where = device, backend, workspace_limit, stream
    if not dtypes.is_complex(problem.y_dtype):
        return _computed(call, key, asked, out, *where)
    # The parts apart: a complex infinity times 1 + 0j is no number.
    request.check_where(call, device, backend)
    total = request.result(call, asked, out)
    real = "float32" if problem.y_dtype == "complex64" else "float64"
    parts = ["real", "imag"] if dtypes.is_complex(gradient.dtype) else ["real"]
    if len(parts) == 1:
        total.array.imag = 0
    for part in parts:
        terms = replace(gradient, array=getattr(gradient.array, part))
        terms = replace(terms, dtype=terms.array.dtype.name)
        half = replace(asked, problem=replace(problem, k_dtype=terms.dtype, y_dtype=real), second=terms)
        request.compute(call, half, replace(total, array=getattr(total.array, part), dtype=real), *where)
    return arrays.deliver(total.array, gradient) if out is None else out


def _computed(
    call: str,
    key: Hashable | None,
    asked: request.Request,
    out: Any,
    device: Any,
    backend: Any,
    limit: Any,
    stream: Any,
) -> Any:
    """The result of ``request.compute``; the call is remembered under ``key``."""

    def done(choice: Choice) -> None:
        if key is not None:
            quick.remember(key, quick.of_request(asked, choice, None))

    return request.compute(call, asked, out, device, backend, limit, stream, done=done)


def _size(call: str, name: str, value: Any) -> tuple[int, ...]:
    """A shape given as a sequence of integers."""
    if not geometry.is_sequence(value) or getattr(value, "ndim", 1) != 1:
        hint = f"; did you mean its shape, {tuple(value.shape)}?" if getattr(value, "shape", ()) else ""
        raise TypeError(f"{call}: {name} must be a shape, a sequence of integers; got {geometry.said(value)}{hint}")
    return tuple(geometry.as_integer(call, f"{name}[{axis}]", extent, 0, 2**63) for axis, extent in enumerate(value))


def _check_gradient(call: str, gradient: Operand, problem: Conv2dProblem, x_rank: int, k_rank: int) -> None:
    """Refuse a gradient that is not of the shape of the convolution's result."""
    expected = request.image_shape(problem, problem.y_shape, x_rank, k_rank)
    if gradient.shape != expected:
        raise ValueError(
            f"{call}: grad_output has shape {gradient.shape}, but the convolution {problem} has a result of shape "
            f"{expected}"
        )
