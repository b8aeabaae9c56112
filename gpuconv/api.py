"""``conv2d``: from the caller's arrays to the caller's result."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np

from gpuconv import arrays, dispatch, dtypes, geometry, schedule
from gpuconv.arrays import Array, Operand
from gpuconv.backends.protocol import Operands
from gpuconv.problem import Conv2dProblem, check_zero_point, image_axes, kernel_axes


def conv2d(
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
    layout: str = "NCHW",
    kernel_layout: str = "OIHW",
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
    """Convolve images with kernels, on the GPU or the CPU.

    "Convolution" is cross-correlation, as in every deep-learning library:
    ``y[n,o,i,j] = bias[o] + Σ_cpq x[n, c, i·s + p·d - pad, j·s + q·d - pad] · k[o,c,p,q]``.

    Parameters
    ----------
    x : array_like
        (H, W), (C, H, W) or (N, C, H, W); with ``layout="NHWC"`` (H, W, C) or (N, H, W, C). A NumPy, CuPy or PyTorch
        array, any object with DLPack or ``__cuda_array_interface__``, or nested lists.
    k : array_like
        (KH, KW) or (O, KH, KW) for a two-dimensional x, else (O, C // groups, KH, KW), in ``kernel_layout``'s order.
    bias : array_like of shape (O,), optional
        Added to each output channel. It is cast to the result's dtype.
    stride, dilation : int or (rows, columns), default 1
        Step of the window, and spacing of the kernel's taps, in pixels.
    padding : int, (rows, columns), ((top, bottom), (left, right)) or str, default 0
        Pixels added around x, or ``"valid"``, ``"same"`` (``ceil(H / stride)`` outputs, the odd pixel at the end),
        ``"same_upper"``, ``"same_lower"``, ``"full"``.
    groups : int, default 1
        Groups of channels convolved separately; ``groups = C`` is a depthwise convolution.
    padding_mode : str, default "constant"
        ``"constant"``, ``"reflect"``, ``"symmetric"``, ``"edge"`` or ``"wrap"``, with the meaning of ``numpy.pad``;
        PyTorch's names ``"zeros"``, ``"replicate"`` and ``"circular"`` are accepted.
    padding_value : number, default 0
        The constant; x's dtype must be able to hold it.
    flip : bool, default False
        Turn the kernel by 180°: the convolution of mathematics and of ``scipy.signal.convolve2d``.
    layout : {"NCHW", "NHWC"}
        Whether channels come before or after the pixels, in x and in the result.
    kernel_layout : {"OIHW", "HWIO", "OHWI"}
        The order of k's axes.
    activation : {None, "relu"}
        Applied after the bias and before a 16-bit rounding; NaN passes through.
    x_zero_point, k_zero_point : int or (for k) array_like of shape (O,), default 0
        For int8 and uint8 operands: subtracted before the product. A padded pixel equals the zero point.
    dtype : dtype, optional
        Of the result. Default: ``numpy.result_type(x, k)`` for floating and complex operands, the floating one's
        dtype where the other is an integer, int32 for two 8-bit integers, else int64. 16-bit floats are summed in
        float32 and rounded once.
    precision : {"highest", "high", "medium"}
        The promise on float32 results. ``"highest"``: every element within the a-priori bound of a float32 sum.
    out : array, optional
        Where to write the result; of its shape, dtype and device, and apart from x, k and bias in memory.
    device : {None, "cpu", "cuda", "cuda:<ordinal>", "auto"}
        Where to compute; None is where x lives. The result returns to x's device in any case.
    backend : str, optional
        A library (``"numpy"``, ``"cupy"``, ``"numba_cuda"``) or an implementation (``"cupy.gemm"``) to force.
    workspace_limit : int, optional
        Bytes of scratch beyond operands and result; default 256 MiB.
    stream : CUDA stream, optional
        Where GPU work is ordered; default: the current stream of x's library.

    Returns
    -------
    array
        (OH, OW), (O, OH, OW) or (N, O, OH, OW), channels last in NHWC; in x's library, on x's device.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or value, before anything is allocated.
    NoBackendError
        When a forced backend cannot run, with every reason.
    MemoryError
        When not even the smallest chunk fits ``workspace_limit``.

    Warns
    -----
    DeviceFallbackWarning
        When ``device="cuda"`` finds no usable GPU and the CPU computes instead.

    Notes
    -----
    Takes ``2 · N · O · OH · OW · (C // groups) · KH · KW`` operations. ``explain`` takes the same arguments and says
    what would run.

    Examples
    --------
    >>> import numpy as np
    >>> ramp = np.arange(10.0, 251.0, 10.0).reshape(5, 5)
    >>> conv2d(ramp, [[1, 0, -1], [1, 0, -1], [1, 0, -1]])
    array([[-60., -60., -60.],
           [-60., -60., -60.],
           [-60., -60., -60.]])
    """
    call = "conv2d"
    request = prepare(
        call, x, k, bias, stride, padding, dilation, groups, padding_mode, padding_value, flip, layout, kernel_layout,
        activation, x_zero_point, k_zero_point, dtype, precision,
    )  # fmt: skip
    limit = workspace(call, workspace_limit)
    given = None if out is None else arrays.output(call, out)
    shape = request.result_shape()
    needed = request.problem.y_size * dtypes.itemsize(request.problem.y_dtype)
    if needed > sys.maxsize:
        raise MemoryError(f"{call}: the result, of shape {shape}, needs {needed} bytes, beyond any address space")
    if given is not None:
        inputs = {"x": request.x, "k": request.k, "bias": request.bias}
        arrays.require_output(call, given, shape, request.problem.y_dtype, request.x.device, inputs)
    pointer = arrays.stream_pointer(call, stream)
    target = dispatch.resolve(call, device, backend, request.x.device)
    choice = dispatch.choose(call, request.problem, target, backend, limit)
    y = execute(request, choice, target, given, shape, pointer)
    return arrays.deliver(y, request.x) if out is None else out


@dataclass
class Request:
    """A valid call: the problem and the operands as the caller holds them."""

    problem: Conv2dProblem
    x: Operand
    k: Operand
    bias: Operand | None
    k_zero_point: np.ndarray[Any, Any] | None

    def result_shape(self) -> tuple[int, ...]:
        """The result's shape in the caller's layout and rank."""
        problem = self.problem
        shape: tuple[int, ...] = problem.y_shape
        if len(self.x.shape) < 4:
            shape = shape[1:]
        if len(self.k.shape) == 2:
            shape = shape[-2:]
        if problem.layout == "NHWC" and len(shape) > 2:
            shape = (*shape[:-3], *shape[-2:], shape[-3])
        return shape


def prepare(
    call: str, x: Any, k: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any, padding_mode: Any,
    padding_value: Any, flip: Any, layout: Any, kernel_layout: Any, activation: Any, x_zero_point: Any,
    k_zero_point: Any, dtype: Any, precision: Any,
) -> Request:  # fmt: skip
    """Check every argument that describes the convolution; nothing is computed or moved."""
    image, kernel = arrays.operand(call, "x", x), arrays.operand(call, "k", k)
    offset = None if bias is None else as_bias(call, bias)
    zero_points = as_zero_points(call, k_zero_point)
    problem = Conv2dProblem.of(
        image.shape, kernel.shape, call=call, x_dtype=image.dtype, k_dtype=kernel.dtype, dtype=dtype,
        bias=offset is not None, stride=stride, padding=padding, dilation=dilation, groups=groups,
        padding_mode=padding_mode, padding_value=padding_value, flip=flip, layout=layout, kernel_layout=kernel_layout,
        activation=activation, x_zero_point=x_zero_point, k_zero_point=bool(zero_points.any()), precision=precision,
    )  # fmt: skip
    check_zero_points(call, zero_points, problem)
    if offset is not None:
        check_bias(call, offset, problem)
    return Request(problem, image, kernel, offset, zero_points if problem.k_zero_point else None)


def as_bias(call: str, bias: Any) -> Operand:
    """The bias as an operand; a number is refused, most kindly when a stride was meant."""
    if isinstance(bias, (Number, np.generic)):
        hint = "; the third argument is the bias, did you mean stride=?" if isinstance(bias, (int, np.integer)) else ""
        raise TypeError(
            f"{call}: bias must be an array of shape (O,), one number per output channel; got {bias!r}{hint}"
        )
    return arrays.operand(call, "bias", bias)


def check_bias(call: str, bias: Operand, problem: Conv2dProblem) -> None:
    """Refuse a bias of the wrong shape, or one that the result cannot hold."""
    if bias.shape != (problem.O,):
        hint = "; the third argument is the bias, did you mean stride=?" if bias.array.size <= 2 else ""
        raise ValueError(
            f"{call}: bias must have shape ({problem.O},), one number per output channel of k; "
            f"got shape {bias.shape}{hint}"
        )
    if not dtypes.castable(bias.dtype, problem.y_dtype):
        raise TypeError(f"{call}: bias of dtype {bias.dtype} cannot be cast to the result's dtype {problem.y_dtype}")
    if problem.y_dtype == "int32" and bias.dtype != "bool":
        # A GPU's bias is judged by its dtype, because reading its values would wait for the GPU.
        low, high = dtypes.RANGES[bias.dtype]
        if bias.device is None:
            low, high = int(bias.array.min()), int(bias.array.max())
        problem.check_overflow(call, max(abs(low), abs(high)))


def as_zero_points(call: str, value: Any) -> np.ndarray[Any, Any]:
    """k's zero points as a host array of integers."""
    if isinstance(value, (Number, np.generic, str, bytes)) or value is None:
        return np.asarray(geometry.as_integer(call, "k_zero_point", value, -(2**62), 2**62))
    given = arrays.operand(call, "k_zero_point", value)
    with arrays.on_stream(given.device, given.stream):
        points = arrays.to_host(given.array)
    if points.dtype.kind not in "iu":
        raise TypeError(f"{call}: k_zero_point must be integers; got dtype {points.dtype}")
    return points


def check_zero_points(call: str, points: np.ndarray[Any, Any], problem: Conv2dProblem) -> None:
    """Refuse zero points of a shape that fits no kernel, or beyond the range of k's dtype."""
    if points.shape not in ((), (1,), (problem.O,)):
        raise ValueError(
            f"{call}: k_zero_point must be one integer or one per output channel, shape ({problem.O},); "
            f"got shape {points.shape}"
        )
    check_zero_point(call, "k_zero_point", int(points.min()), int(points.max()), problem.k_dtype)


def workspace(call: str, limit: Any) -> int:
    """``workspace_limit`` in bytes."""
    if limit is None:
        return schedule.DEFAULT_WORKSPACE
    return geometry.as_integer(call, "workspace_limit", limit, 0, None)


def execute(
    request: Request,
    choice: dispatch.Choice,
    target: Any,
    given: Operand | None,
    shape: tuple[int, ...],
    stream: int | None,
) -> Array:
    """Move the operands where the implementation wants them, run it, and bring the result to x's device."""
    problem, home = request.problem, request.x.device
    implementation = dispatch.implementation(choice.name)
    # A kernel of our own takes host arrays as they are; everything else on a GPU takes CuPy arrays.
    ordinal = target.ordinal
    if target.device == "cpu" or (implementation.ARRAYS == "any" and home is None):
        ordinal = None
    place = home if ordinal is None else ordinal
    if stream is None and place == home:
        stream = request.x.stream
    out = None if given is None else given.array
    sources = [(operand, arrays.stream_of(operand)) for operand in (request.x, request.k, request.bias, given)]
    with arrays.on_stream(place, stream):
        for operand, source in sources:
            if operand is not None and operand.device is not None:
                arrays.wait_for(source, operand.device)

        def moved(operand: Operand | None) -> Array | None:
            if operand is None:
                return None
            return arrays.to_host(operand.array) if ordinal is None else arrays.to_device(operand.array, ordinal)

        dtype = dtypes.numpy_dtype(problem.y_dtype)
        in_place = out is not None and home == ordinal
        y = out if in_place else _empty(shape, dtype, ordinal)
        view = as_nchw(y, problem.layout)
        bias = moved(request.bias)
        points = request.k_zero_point
        if points is not None:
            points = np.broadcast_to(points, (problem.O,)).astype(np.int64)
        if problem.y_size and problem.products:
            operands = Operands(
                as_nchw(moved(request.x), problem.layout),
                as_oihw(moved(request.k), problem.kernel_layout, problem.flip),
                bias,
                points if ordinal is None or points is None else arrays.to_device(points, ordinal),
                target.ordinal,
                stream,
            )
            implementation.run(choice.plan, operands, view)
        elif problem.y_size:
            _without_products(problem, bias, view)
        if home == ordinal:
            return y
        y = arrays.to_host(y) if home is None else arrays.to_device(y, home)
        if out is None:
            return y
        out[...] = y
        return out


def _empty(shape: tuple[int, ...], dtype: Any, ordinal: int | None) -> Array:
    if ordinal is None:
        return np.empty(shape, dtype)
    import cupy

    with cupy.cuda.Device(ordinal):
        return cupy.empty(shape, dtype)


def _without_products(problem: Conv2dProblem, bias: Array | None, y: Array) -> None:
    """A sum over no channels is zero: the result is the bias."""
    y[...] = 0
    if bias is not None:
        with np.errstate(all="ignore"):
            values = bias.astype(dtypes.numpy_dtype(problem.sum_dtype))
            if problem.activation == "relu":
                values = values.clip(0, None)
            y[...] = values.astype(y.dtype).reshape((1, -1, 1, 1))


def as_nchw(array: Array, layout: str) -> Array:
    """A view of an image or a result as (N, C, H, W)."""
    view = array.transpose(image_axes(layout, array.ndim))
    return view[(None,) * (4 - array.ndim)]


def as_oihw(kernel: Array, kernel_layout: str, flip: bool) -> Array:
    """A view of the kernel as (O, I, KH, KW), turned by 180° if asked."""
    if kernel.ndim == 2:
        view = kernel[None, None]
    else:
        view = kernel.transpose(kernel_axes(kernel_layout, kernel.ndim))
        view = view[:, None] if kernel.ndim == 3 else view
    return view[:, :, ::-1, ::-1] if flip else view
