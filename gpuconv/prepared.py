"""``Conv2d``: a convolution prepared once, for many images."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes, geometry, layouts, marks, notation, padding_value, quick, request
from gpuconv.arrays import Operand
from gpuconv.dispatch import Choice
from gpuconv.geometry import Pads, Pair
from gpuconv.problem import Conv2dProblem, check_choice
from gpuconv.zero_points import as_zero_point

_PROBLEMS = 64  # input sizes that one Conv2d remembers
_SHOWN = 11  # rows and columns of a kernel that a notebook shows

_live: weakref.WeakSet[Conv2d] = weakref.WeakSet()


class Conv2d:
    """``conv2d`` with its kernel and options fixed: ``Conv2d(k, …)(x)`` is ``conv2d(x, k, …)``.

    The kernel and the bias are copied when it is made, so later changes to them change nothing. What an implementation
    makes of them (matrices in its own layout, copies on a GPU) is made at the first call that needs it, and kept.

    Parameters
    ----------
    k : array_like
        The kernel, as for ``conv2d``.
    bias, stride, padding, dilation, groups, padding_mode, padding_value, flip, layout, kernel_layout, activation, \
x_zero_point, k_zero_point, dtype, precision, device, backend, workspace_limit
        As for ``conv2d``.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or value; what depends on the image is checked with the image.

    Notes
    -----
    One object may be called from several threads at once, with images of any size, dtype and device; on a dask array
    it gives one, as ``conv2d`` does. It can be pickled. ``gpuconv.clear()`` releases what was packed and uploaded; the
    next call makes it again.

    On a GPU, calls may come on any streams, without a word to each other: what one packs, the others' streams wait for
    on the GPU, while it is not done. Only where a CUDA graph is captured before it is done does the host wait, once.
    Within a capture nothing can be packed, which is a RuntimeError: call the layer once before. Call
    ``gpuconv.clear()`` when no other thread is within a call.

    Examples
    --------
    >>> import numpy as np
    >>> blur = Conv2d(np.full((3, 3), 1 / 9), padding="same", padding_mode="edge")
    >>> blur(np.ones((4, 4))).round(6)
    array([[1., 1., 1., 1.],
           [1., 1., 1., 1.],
           [1., 1., 1., 1.],
           [1., 1., 1., 1.]])
    """

    def __init__(
        self,
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
        device: str | None = None,
        backend: str | None = None,
        workspace_limit: int | None = None,
    ) -> None:
        call = "Conv2d"
        self._copied: list[marks.Mark] = []  # behind the copies of kernel and bias, where these are on a GPU
        self._kernel = self._snapshot(arrays.operand(call, "k", k))
        self._bias = None if bias is None else self._snapshot(request.as_bias(call, bias))
        self._zero_points = request.as_zero_points(call, k_zero_point).copy()
        self._options: dict[str, Any] = {
            "stride": _frozen(stride), "padding": _frozen(padding), "dilation": _frozen(dilation), "groups": groups,
            "padding_mode": padding_mode, "padding_value": _frozen(padding_value), "flip": flip, "layout": layout,
            "kernel_layout": kernel_layout, "activation": activation, "dtype": dtype, "precision": precision,
            "x_zero_point": as_zero_point(call, "x_zero_point", x_zero_point, None),
        }  # fmt: skip
        self._where: dict[str, Any] = {"device": device, "backend": backend, "workspace_limit": workspace_limit}
        request.workspace(call, workspace_limit)
        request.check_where(call, device, backend)
        self._line = self._check(call)
        self._lock = threading.RLock()
        self._kept: dict[Any, tuple[Any, marks.Mark | None]] = {}
        self._ready: dict[Any, quick.Ready] = {}
        self._repeats = device is None and workspace_limit is None
        self._problems: OrderedDict[Any, tuple[Conv2dProblem, tuple[int, ...]]] = OrderedDict()
        _live.add(self)
        copies = (self._kernel, self._bias)
        weakref.finalize(self, _let_go, self._kept, self._copied, copies).atexit = False

    def __call__(self, x: Any, out: Any = None, stream: Any = None) -> Any:
        """Convolve ``x``: ``conv2d`` with the kernel and the options of this object.

        Parameters
        ----------
        x : array_like
            As for ``conv2d``; images may differ in size, dtype and device from call to call.
        out : array, optional
            Where to write the result.
        stream : CUDA stream, optional
            Where GPU work is ordered.

        Returns
        -------
        array
            As ``conv2d``, and with the same bits.

        Raises
        ------
        TypeError, ValueError
            When ``x`` or ``out`` does not fit the kernel and the options.
        NoBackendError, MemoryError
            As ``conv2d``.
        """
        call = "Conv2d"
        key = None
        # The kernel and the bias are copies of its own, which out cannot meet.
        writable = out is None or (type(out) is np.ndarray and type(x) is np.ndarray and quick.may_be_written(out, x))
        if type(x) is np.ndarray and writable and stream is None and self._repeats:
            key = x.shape, x.strides, x.dtype, quick.form(out)
            ready = self._ready.get(key)
            if ready is not None and ready.holds():
                try:
                    return ready(x, self._kernel.array, None if self._bias is None else self._bias.array, out)
                except MemoryError:  # the long way knows what takes less
                    key = None
        if arrays.is_dask(x):
            from gpuconv import blocked

            image = blocked.stand_in(call, "x", x)
            asked = request.of_operands(call, image, self._kernel, self._bias, self._zero_points, **self._options)
            return blocked.compute(call, asked, x, out=out, stream=stream, layer=self, **self._where)
        image = arrays.operand(call, "x", x)
        problem, shape = self._problem(call, image)
        points = self._zero_points if problem.k_zero_point else None
        asked = request.Request(problem, shape, image, self._kernel, self._bias, points)
        where = self._where

        def done(choice: Choice) -> None:
            if key is not None:
                ready = quick.of_request(asked, choice, self, out)
                with self._lock:
                    if len(self._ready) >= _PROBLEMS:
                        self._ready.clear()
                    if ready is not None:
                        self._ready[key] = ready

        return request.compute(
            call, asked, out, where["device"], where["backend"], where["workspace_limit"], stream, self, done
        )

    def on_window(self, call: str, x: Any, stride: Pair, padding: Pads, dilation: Pair) -> Any:
        """Convolve a window of a larger image, which has steps and borders of its own, for the public ``call``."""
        options = self._options | {"stride": stride, "padding": padding, "dilation": dilation}
        image = arrays.operand(call, "x", x)
        asked = request.of_operands(call, image, self._kernel, self._bias, self._zero_points, **options)
        # What is packed is for the steps of the whole image.
        own = tuple(geometry.as_pair(call, name, self._options[name], 1) for name in ("stride", "dilation"))
        keeper = self if own == (stride, dilation) else None
        if keeper is None:
            self._await_copies(on_host=True)  # the window may be on another GPU
        return request.compute(call, asked, keeper=keeper, **self._where)

    def __repr__(self) -> str:
        return f"Conv2d({self._line})"

    def _repr_html_(self) -> str:
        from gpuconv import notebook

        kernel, bias = self._kernel, self._bias
        rows = [("kernel", f"{notation.by(kernel.shape)}, {kernel.dtype}")]
        if bias is not None:
            rows.append(("bias", f"{notation.by(bias.shape)}, {bias.dtype}"))
        given = {name: value for name, value in self._options.items() if value != _DEFAULTS[name]}
        if "dtype" in given:
            given["dtype"] = dtypes.name_of("Conv2d", "dtype is", given["dtype"])
        if self._zero_points.any():
            given["k_zero_point"] = self._zero_points.tolist()
        given |= {name: value for name, value in self._where.items() if value is not None}
        rows += [(name, str(value)) for name, value in given.items()]
        parts = [notebook.paragraph(repr(self)), notebook.fields(rows)]
        if kernel.device is None and len(kernel.shape) == 2 and max(kernel.shape) <= _SHOWN:
            parts.append(notebook.numbers([notation.number(w) for w in row] for row in _plain(kernel.array)))
        return notebook.block(*parts)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = self._options | self._where | {"k_zero_point": self._zero_points}
        bias = None if self._bias is None else self._bias.array
        for mark in self._copied:
            mark.reach()  # pickling copies to the host
        return _rebuilt, (self._kernel.array, bias, arguments)

    def kept(self, key: Any, make: Callable[[], Any], ordinal: int | None) -> Any:
        """What ``make`` gave the first time it was asked for under ``key``: on the current stream of GPU ``ordinal``,
        which is there for what the stream is asked for from here on; or with None on the host.
        """
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                if ordinal is not None and marks.captures():
                    raise RuntimeError(
                        "Conv2d: its weights cannot be packed while a CUDA graph is captured, which would hold the "
                        "packing and not the weights; call the layer once, with such an image, before the capture"
                    )
                self._await_copies(ordinal is None)
                made = make()
                self._kept[key] = made, None if ordinal is None else marks.Mark(ordinal)
                return made
            if found[1] is not None:
                found[1].wait()
            return found[0]

    def _await_copies(self, on_host: bool = False) -> None:
        """Let what comes read the copies of kernel and bias: on CuPy's current stream, or on the host."""
        for mark in self._copied:
            if on_host:
                mark.reach()
            else:
                mark.wait()

    def _snapshot(self, operand: Operand) -> Operand:
        """A contiguous copy, in memory of its own."""
        if operand.device is None:
            return replace(operand, array=arrays.native(operand.array.copy(order="C")), stream=None)
        with arrays.on_stream(operand.device, operand.stream):
            if marks.captures():
                raise RuntimeError(
                    "Conv2d: it cannot be made while a CUDA graph is captured; make it before the capture"
                )
            copy = operand.array.copy(order="C")
            self._copied.append(marks.Mark(operand.device))
        return replace(operand, array=copy, stream=None)

    def _problem(self, call: str, image: Operand) -> tuple[Conv2dProblem, tuple[int, ...]]:
        """The problem of one image, and the shape of its result."""
        key = image.shape, image.dtype
        with self._lock:
            if key in self._problems:
                self._problems.move_to_end(key)
                return self._problems[key]
        asked = request.of_operands(call, image, self._kernel, self._bias, self._zero_points, **self._options)
        with self._lock:
            self._problems[key] = asked.problem, asked.shape
            while len(self._problems) > _PROBLEMS:
                self._problems.popitem(last=False)
        return asked.problem, asked.shape

    def _check(self, call: str) -> str:
        """Refuse what no image can make valid; the problem line with the sizes of x left open."""
        options = self._options | {"x_zero_point": 0, "padding_value": 0}
        # An image of complex128 has any number as its padding; whether others do is checked with the image.
        value = padding_value.checked(call, self._options["padding_value"], "complex128")
        padding_value.check_meaning(call, self._options["padding_value"], value, options["padding_mode"])
        kernel = self._kernel
        groups = geometry.as_integer(call, "groups", options["groups"], 1, 2**63)
        check_choice(call, "layout", options["layout"], layouts.LAYOUTS)
        _, I, rows, columns = request.kernel_shape(call, kernel.shape, options["kernel_layout"])
        size = [
            geometry.window(k, d)
            for k, d in zip((rows, columns), geometry.as_pair(call, "dilation", options["dilation"], 1), strict=True)
        ]
        x_shape: tuple[int, ...] = tuple(size)
        if len(kernel.shape) == 4:
            x_shape = (1, I * groups, *size) if options["layout"] == "NCHW" else (1, *size, I * groups)
        # The narrowest image: any other has sums at least as large.
        x_dtype = "bool" if dtypes.is_integer(kernel.dtype) else kernel.dtype
        problem = Conv2dProblem.of(
            x_shape, kernel.shape, call=call, x_dtype=x_dtype, k_dtype=kernel.dtype, bias=self._bias is not None,
            k_zero_point=bool(self._zero_points.any()), **options,
        )  # fmt: skip
        request.check_zero_points(call, self._zero_points, problem)
        if self._bias is not None:
            request.check_bias_shape(call, self._bias, problem)
        shown = replace(
            problem, x_dtype=kernel.dtype, y_dtype=dtypes.result_dtype(call, kernel.dtype, kernel.dtype, None)
        )
        named = isinstance(options["padding"], str) and options["padding"] != "valid"
        if named:
            shown = replace(shown, padding=((0, 0), (0, 0)))
        rest = str(shown).partition("_")[2]
        return f"n?c{problem.C}h?w?_{rest}" + (f", padding={options['padding']!r}" if named else "")


_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(Conv2d).parameters.items()}


def _plain(array: Any) -> Any:
    """The array as nested lists of Python's own numbers."""
    kinds = {"b": np.int64, "i": np.int64, "u": np.int64, "c": np.complex128}
    return array.astype(kinds.get(array.dtype.kind, np.float64)).tolist()


def release() -> None:
    """Drop what every living Conv2d has packed and uploaded."""
    for layer in list(_live):
        with layer._lock:
            _let_go(layer._kept, [])
            layer._kept.clear()
            layer._ready.clear()


# What was to be given back while its GPU could not be waited for, and the GPUs.
_pending: list[tuple[set[int], Any]] = []


def _let_go(kept: dict[Any, tuple[Any, marks.Mark | None]], copied: list[marks.Mark], copies: Any = None) -> None:
    """Wait for the GPUs whose memory is given back, where another stream or a graph may still be reading it."""
    found = [(mark, None) for mark in copied] + [(mark, value) for value, mark in kept.values() if mark is not None]
    read = {mark.ordinal for mark, value in found if mark.shared or getattr(value, "captured", None)}
    if not read or any(mark.process != os.getpid() for mark, _ in found):  # CUDA does not survive a fork
        return
    try:
        marks.settle(sorted(read.union(*(ordinals for ordinals, _ in _pending))))
    except RuntimeError:  # a graph is being captured: kept until the next time
        _pending.append((read, (dict(kept), copies)))
    else:
        _pending.clear()


def _rebuilt(kernel: Any, bias: Any, arguments: dict[str, Any]) -> Conv2d:
    return Conv2d(kernel, bias, **arguments)


def _frozen(value: Any) -> Any:
    """``value`` with its lists and arrays as tuples and scalars, so that nobody can change them later."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value[()]
    if geometry.is_sequence(value):
        return tuple(_frozen(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value))
    return value
