"""``conv2d``."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import arrays, quick, request
from gpuconv.dispatch import Choice
from gpuconv.quick import token


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
        array, any object with DLPack or ``__cuda_array_interface__``, or nested lists. Or a dask array: see Notes.
    k : array_like
        (KH, KW) or (O, KH, KW) for a two-dimensional x, else (O, C // groups, KH, KW), in ``kernel_layout``'s order.
    bias : array_like of shape (O,), optional
        Added to each output channel. It is cast to the result's dtype.
    stride : int or (rows, columns), default 1
        Step of the window, in pixels.
    padding : int, (rows, columns), ((top, bottom), (left, right)) or str, default 0
        Pixels added around x. Or a name: ``"valid"`` adds none; ``"same"`` or ``"same_upper"`` as many as give
        ``ceil(H / stride)`` outputs, the odd pixel at the end; ``"same_lower"`` the same with the odd pixel at the
        start; ``"full"`` adds ``dilation · (KH - 1)`` on every side, so that each pixel meets each tap.
    dilation : int or (rows, columns), default 1
        Spacing of the kernel's taps, in pixels; 1 is a dense kernel.
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
        The promise on float32 results. ``"highest"``: every element within the a-priori bound of a float32 sum,
        ``γ_K·Σ|x||k|`` for K products. ``"high"`` and ``"medium"``: ``‖error‖₂ ≤ ε · ‖ |x| ∗ |k| ‖₂`` with ε = 2e-5 and
        1e-3, which allows faster algorithms; NaN and infinities may spread further. Other dtypes are always at highest.
    out : array, optional
        Where to write the result; of its shape, dtype and device, and apart from x, k and bias in memory.
    device : {None, "cpu", "cuda", "cuda:<ordinal>", "auto"}
        Where to compute; None is where x lives. The result returns to x's device in any case.
    backend : str, optional
        A library (``"numpy"``, ``"numba_cpu"``, ``"cupy"``, ``"numba_cuda"``) or an implementation (``"cupy.gemm"``)
        to force. It never falls back.
    workspace_limit : int, optional
        Bytes of scratch beyond operands and result; default 256 MiB.
    stream : CUDA stream, optional
        Where GPU work is ordered, as the library's own object or its address; default: the current stream of x's
        library.

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

    A dask array x gives a dask array. Nothing is computed, but what is wrong with the arguments is said at once; k and
    bias may be dask arrays too, and are then one block each. ``out`` and ``stream`` are refused.

    - Every block of the result is one task, which reads its window of x, with the pixels of neighbouring blocks that it
      needs; padding and stride are those of the whole image.
    - The result's blocks follow those of x: the same where the sizes are the same, else an output is in the block of
      the middle of its window. Blocks much smaller than the window are merged first. A block has all output channels,
      made from all channels of x, so that many of them ask for small blocks of pixels; of several groups, blocks of
      channels stay blocks.
    - Integers come out as from an array in memory, everything else within the same bound: what runs may depend on a
      block's size and on the worker, where ``backend`` does not say. ``device="cuda"`` is each worker's current GPU.
    - Where blocks run side by side in threads, each has its share of Numba's threads (one, from as many blocks as
      threads on), or what ``GPUCONV_NUM_THREADS`` says; the threads of NumPy's BLAS are a matter of its own
      (``OPENBLAS_NUM_THREADS``). Each block that runs may take ``workspace_limit``.

    Examples
    --------
    >>> import numpy as np
    >>> ramp = np.arange(10.0, 251.0, 10.0).reshape(5, 5)
    >>> conv2d(ramp, [[1, 0, -1], [1, 0, -1], [1, 0, -1]])
    array([[-60., -60., -60.],
           [-60., -60., -60.],
           [-60., -60., -60.]])

    A batch of eight colour images through sixteen kernels:

    >>> photos, kernels = np.zeros((8, 3, 64, 64), np.float32), np.zeros((16, 3, 3, 3), np.float32)
    >>> conv2d(photos, kernels, stride=2, padding="same").shape
    (8, 16, 32, 32)

    Each channel of one image with the same 3×3 blur:

    >>> blur = np.broadcast_to(np.float32(1 / 9), (3, 1, 3, 3))
    >>> conv2d(photos[0], blur, padding=1, padding_mode="reflect", groups=3).shape
    (3, 64, 64)
    """
    call = "conv2d"
    key = None
    if (
        type(x) is np.ndarray and type(k) is np.ndarray and (bias is None or type(bias) is np.ndarray)
        and (out is None or (type(out) is np.ndarray and quick.may_be_written(out, x, k, bias)))
        and dtype is None and device is None and workspace_limit is None and stream is None
        and flip is False and type(x_zero_point) is int and type(k_zero_point) is int
        and x_zero_point == k_zero_point == 0
    ):  # fmt: skip
        key = (
            x.shape, x.strides, x.dtype, k.shape, k.strides, k.dtype,
            None if bias is None else (bias.shape, bias.dtype), token(stride), token(padding), token(dilation),
            token(groups), padding_mode, token(padding_value), layout, kernel_layout, activation, precision, backend,
            quick.form(out),
        )  # fmt: skip
        ready = quick.find(key)
        if ready is not None:
            try:
                return ready(x, k, bias, out)
            except MemoryError:  # the long way knows what takes less
                key = None
    lazy = arrays.is_dask(x)
    operands = x, k, bias
    if lazy:
        from gpuconv import blocked

        operands = blocked.stand_ins(call, x, k, bias)
    asked = request.forward(
        call, *operands, stride, padding, dilation, groups, padding_mode, padding_value, flip, layout, kernel_layout,
        activation, x_zero_point, k_zero_point, dtype, precision,
    )  # fmt: skip
    if lazy:
        return blocked.compute(call, asked, x, k, bias, out, device, backend, workspace_limit, stream)

    def done(choice: Choice) -> None:
        if key is not None:
            quick.remember(key, quick.of_request(asked, choice, None, out))

    return request.compute(call, asked, out, device, backend, workspace_limit, stream, done=done)
