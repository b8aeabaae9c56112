"""The arithmetic of a convolution's sizes: pure integers, no arrays of data.

Every size in gpuconv comes from here, in Python integers that cannot overflow. What a window reads comes from
here too: an index table gives, for each output position and kernel tap, the index of the source element, or -1
where the padding constant stands. Every backend, and ``trace``, reads these tables, so padding modes need no
code of their own anywhere else.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Pair = tuple[int, int]
Pads = tuple[Pair, Pair]

# stride, padding and dilation stay below this, so that i*stride + p*dilation of two of them fits 64 bits.
STEP_LIMIT = 2**31

PADDING_NAMES = ("valid", "same", "same_upper", "same_lower", "full")
PADDING_MODES = ("constant", "reflect", "symmetric", "edge", "wrap")
PADDING_MODE_ALIASES = {"zeros": "constant", "replicate": "edge", "circular": "wrap"}
_MODE_NAMES = (*PADDING_MODES, *PADDING_MODE_ALIASES)
# SciPy's names for the same (its own "reflect" is NumPy's "symmetric").
_OTHER_MODES = {"mirror": "reflect", "nearest": "edge", "grid-mirror": "symmetric", "grid-wrap": "wrap"}


def as_integer(
    call: str, name: str, value: Any, minimum: int, limit: int | None = STEP_LIMIT, forms: str = "an integer"
) -> int:
    """``value`` as an int in [minimum, limit), refusing floats (1.0) and booleans (True).

    ``forms`` is what an error says that it must be.
    """
    try:
        # Any library's booleans count as such: a tensor of one True has an index too.
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        result = operator.index(value)
    except TypeError:
        got = f"{said(value)} of type {type(value).__name__}"
        raise TypeError(f"{call}: {name} must be {forms}; got {got}") from None
    if result < minimum:
        raise ValueError(f"{call}: {name} must be at least {minimum}; got {shown(result)}")
    if limit is not None and result >= limit:
        raise ValueError(f"{call}: {name} must be below {limit}; got {shown(result)}")
    return result


def shown(value: int) -> str:
    """``value`` for a message; Python refuses to print integers of thousands of digits."""
    return str(value) if value.bit_length() <= 256 else f"an integer of {value.bit_length()} bits"


def said(value: Any) -> str:
    """``value`` for a message: of an array its shape, of what is long its beginning."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"an array of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def meant(value: Any, known: Iterable[Any]) -> str:
    """The end of a message about ``value``: which of the ``known`` names it may be a slip for, if one is near."""
    if not isinstance(value, str) or len(value) > 40:
        return ""
    import difflib  # for errors alone

    names = {name.lower(): name for name in known if isinstance(name, str)}
    near = difflib.get_close_matches(value.lower(), names, 1, 0.8)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def is_sequence(value: Any) -> bool:
    """Whether ``value`` is a list, tuple or array of one axis or more, and no text."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def as_pair(call: str, name: str, value: Any, minimum: int, form: str = "(rows, columns)") -> Pair:
    """``value``, an integer or a pair of the given ``form``, as a pair."""
    forms = f"an integer or a pair {form}"
    if not is_sequence(value):
        integer = as_integer(call, name, value, minimum, forms=forms)
        return integer, integer
    if len(value) != 2:
        raise ValueError(f"{call}: {name} must be {forms}; got {said(value)}")
    first, second = (as_integer(call, f"{name}[{axis}]", item, minimum) for axis, item in enumerate(value))
    return first, second


def window(k: int, dilation: int) -> int:
    """Extent of a dilated kernel: ``dilation·(k - 1) + 1``."""
    return dilation * (k - 1) + 1


def _named_padding(name: str, n: int, k: int, stride: int, dilation: int) -> Pair:
    if name == "valid":
        return 0, 0
    if name == "full":
        return dilation * (k - 1), dilation * (k - 1)
    # "same": ceil(n / stride) outputs; TensorFlow's rule, by which the odd pixel goes to the end.
    total = max(0, (-(-n // stride) - 1) * stride + window(k, dilation) - n)
    small, large = total // 2, total - total // 2
    return (large, small) if name == "same_lower" else (small, large)


# How padding can be given: for images, and for one axis.
_FORMS = "(rows, columns) or ((top, bottom), (left, right))"
_FORMS_OF_ONE = "or a pair (before, after)"


def axis_padding(call: str, padding: Any, n: int, k: int, stride: int, dilation: int) -> Pair:
    """Padding of one axis, in any accepted form."""
    if isinstance(padding, str):
        _check_padding_name(call, padding, _FORMS_OF_ONE)
        return _named_padding(padding, n, k, stride, dilation)
    if padding is None:
        _check_padding_name(call, padding, _FORMS_OF_ONE)
    return as_pair(call, "padding", padding, 0, "(before, after)")


def _check_padding_name(call: str, name: Any, forms: str) -> None:
    if name not in PADDING_NAMES:
        known = ", ".join(repr(known) for known in PADDING_NAMES)
        kind = ValueError if isinstance(name, str) else TypeError
        hint = f"; did you mean padding_mode={name!r}?" if name in _MODE_NAMES else meant(name, PADDING_NAMES)
        raise kind(f"{call}: padding must be one of {known}, an integer, {forms}; got {name!r}{hint}")


def resolve_padding(
    call: str, padding: Any, sizes: Pair, kernel: Pair, stride: Pair, dilation: Pair, minimum: int = 0
) -> Pads:
    """Padding in any accepted form as ((top, bottom), (left, right)), each at least ``minimum``."""
    if padding is None:
        _check_padding_name(call, padding, _FORMS)
    if isinstance(padding, str):
        _check_padding_name(call, padding, _FORMS)
        named = [_named_padding(padding, *axis) for axis in zip(sizes, kernel, stride, dilation, strict=True)]
        return named[0], named[1]
    if not is_sequence(padding):
        forms = "an integer, (rows, columns), ((top, bottom), (left, right)) or a name"
        both = as_integer(call, "padding", padding, minimum, forms=forms)
        return (both, both), (both, both)
    if len(padding) == 4 and all(map(is_sequence, padding)):
        raise ValueError(
            f"{call}: padding is for the rows and the columns alone, ((top, bottom), (left, right)), without those of "
            f"images and channels; got {said(padding)}"
        )
    if len(padding) == 4:
        raise ValueError(
            f"{call}: padding as a flat sequence of four is ambiguous (ONNX and PyTorch order it differently); "
            f"write it as ((top, bottom), (left, right)); got {padding!r}"
        )
    if len(padding) != 2:
        raise ValueError(
            f"{call}: padding must be an integer, (rows, columns), ((top, bottom), (left, right)) or a name; "
            f"got {padding!r}"
        )
    nested = [is_sequence(item) for item in padding]
    if any(nested) != all(nested):
        raise ValueError(
            f"{call}: padding must give both axes in the same form, (rows, columns) or "
            f"((top, bottom), (left, right)); got {padding!r}"
        )
    if not all(nested):
        rows, columns = (as_integer(call, f"padding[{axis}]", item, minimum) for axis, item in enumerate(padding))
        return (rows, rows), (columns, columns)
    return as_pair(call, "padding[0]", padding[0], minimum, "(top, bottom)"), as_pair(
        call, "padding[1]", padding[1], minimum, "(left, right)"
    )


def as_padding_mode(call: str, padding_mode: Any) -> str:
    """``padding_mode`` by NumPy's name for it."""
    mode = PADDING_MODE_ALIASES.get(padding_mode, padding_mode) if isinstance(padding_mode, str) else None
    if mode not in PADDING_MODES:
        other = _OTHER_MODES.get(padding_mode) if isinstance(padding_mode, str) else None
        hint = f"; that is {other!r} here" if other else meant(padding_mode, _MODE_NAMES)
        raise ValueError(f"{call}: padding_mode must be one of {', '.join(_MODE_NAMES)}; got {padding_mode!r}{hint}")
    return mode


def output_extent(n: int, k: int, pads: Pair, stride: int, dilation: int) -> int:
    """``floor((n + lo + hi - window) / stride) + 1``; below 1 when the kernel does not fit."""
    return (n + sum(pads) - window(k, dilation)) // stride + 1


def output_size(n: int, k: int, padding: int | Pair | str = 0, stride: int = 1, dilation: int = 1) -> int:
    """Output positions of a convolution along one axis.

    Parameters
    ----------
    n, k : int
        Extent of the input and of the kernel, in elements.
    padding : int, (before, after) or str, default 0
        Elements added on each side, or ``"valid"``, ``"same"``, ``"same_upper"``, ``"same_lower"``, ``"full"``, with
        the meaning they have for ``conv2d``.
    stride : int, default 1
        Step of the window, in elements.
    dilation : int, default 1
        Spacing of the kernel's taps, in elements.

    Returns
    -------
    int
        ``floor((n + before + after - dilation·(k - 1) - 1) / stride) + 1``, in exact integers.

    Raises
    ------
    TypeError, ValueError
        When an argument is not an integer in range, or the dilated kernel is larger than the padded input.

    Notes
    -----
    The formula of Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", relationship 6.

    Examples
    --------
    >>> output_size(5, 3)
    3
    >>> output_size(224, 7, padding=3, stride=2)
    112
    """
    call = "output_size"
    n = as_integer(call, "n", n, 0, None)
    k = as_integer(call, "k", k, 1, None)
    stride = as_integer(call, "stride", stride, 1)
    dilation = as_integer(call, "dilation", dilation, 1)
    pads = axis_padding(call, padding, n, k, stride, dilation)
    require_fit(call, (n,), (k,), (pads,), (dilation,))
    return output_extent(n, k, pads, stride, dilation)


def require_fit(
    call: str, sizes: Sequence[int], kernel: Sequence[int], pads: Iterable[Pair], dilation: Iterable[int],
    order: tuple[str, str] | None = None,
) -> None:  # fmt: skip
    """Raise ValueError, quoting both sizes, unless the dilated kernel fits in the padded input on every axis. Where the
    two may have changed places, the error says in which ``order`` the call takes them.
    """
    padded = tuple(n + sum(pad) for n, pad in zip(sizes, pads, strict=True))
    windows = tuple(window(k, d) for k, d in zip(kernel, dilation, strict=True))
    if any(w > n for w, n in zip(windows, padded, strict=True)):
        exchanged = order and all(k > n for k, n in zip(kernel, sizes, strict=True))
        hint = f"; or exchange the two: {order[0]} comes before {order[1]}" if order and exchanged else ""
        raise ValueError(
            f"{call}: the dilated kernel ({_by(windows)}) is larger than the padded input ({_by(padded)}); "
            f"pad the input, or use a smaller kernel or dilation{hint}"
        )


def _by(extents: Sequence[int]) -> str:
    return "×".join(map(str, extents))


def receptive_field(layers: Iterable[int | Sequence[int]]) -> int:
    """Extent of the input that one output of a stack of layers depends on, along one axis.

    Parameters
    ----------
    layers : iterable of int, (k,), (k, stride) or (k, stride, dilation)
        The layers from input to output: the kernel's extent, and where they are not 1 its stride and dilation.

    Returns
    -------
    int
        ``1 + Σ_l dilation_l·(k_l - 1)·Π_{m<l} stride_m``, in elements of the input; 1 without layers.

    Raises
    ------
    TypeError, ValueError
        When a layer is not made of one to three integers of at least 1.

    Examples
    --------
    >>> receptive_field([3, 3])  # two layers of 3 see what one of 5 sees
    5
    >>> receptive_field([(7, 2), (3, 2), 3])  # with strides
    19
    """
    call = "receptive_field"
    if not isinstance(layers, Iterable) or isinstance(layers, (str, bytes)):
        raise TypeError(f"{call}: layers must be a sequence of (k, stride, dilation); got {layers!r}")
    field, jump = 1, 1
    for position, layer in enumerate(layers):
        values = tuple(layer) if is_sequence(layer) else (layer,)  # type: ignore[arg-type]
        if not 1 <= len(values) <= 3:
            raise ValueError(f"{call}: layers[{position}] must be (k, stride, dilation); got {layer!r}")
        k, stride, dilation = (
            as_integer(call, f"layers[{position}][{i}]", value, 1) for i, value in enumerate((*values, 1, 1)[:3])
        )
        field += dilation * (k - 1) * jump
        jump *= stride
    return field


def parameter_count(
    out_channels: int, in_channels: int, kernel_size: int | Pair, groups: int = 1, bias: bool = True
) -> int:
    """Learnable parameters of a convolution layer.

    Parameters
    ----------
    out_channels : int
        Filters, each of which makes one channel of the result.
    in_channels : int
        Channels of the input, all groups together.
    kernel_size : int or (KH, KW)
        Extent of the kernel.
    groups : int, default 1
        Number of groups; divides both channel counts.
    bias : bool, default True
        Whether each filter has a bias.

    Returns
    -------
    int
        ``out_channels · (in_channels / groups · KH · KW + 1)``, without the 1 when there is no bias.

    Raises
    ------
    TypeError, ValueError
        When an argument is not an integer in range or ``groups`` does not divide the channels.

    Examples
    --------
    >>> parameter_count(64, 3, 3)
    1792
    >>> parameter_count(32, 32, 3, groups=32, bias=False)  # depthwise
    288
    """
    call = "parameter_count"
    if not isinstance(bias, (bool, np.bool_)):
        raise TypeError(f"{call}: bias must be True or False; got {said(bias)}")
    out_channels = as_integer(call, "out_channels", out_channels, 1, None)
    in_channels = as_integer(call, "in_channels", in_channels, 0, None)
    groups = as_integer(call, "groups", groups, 1, None)
    kh, kw = as_pair(call, "kernel_size", kernel_size, 1)
    for name, channels in (("out_channels", out_channels), ("in_channels", in_channels)):
        if channels % groups:
            raise ValueError(f"{call}: groups must divide {name}; got groups={groups}, {name}={channels}")
    return out_channels * (in_channels // groups * kh * kw + bool(bias))


def source_index(position: IntArray, n: int, mode: str) -> IntArray:
    """Source element at each position of a padded axis; -1 where the constant stands.

    Position 0 is the first element of the unpadded axis of extent ``n``; the modes are those of ``numpy.pad``,
    continued periodically when the padding is larger than the axis.
    """
    if mode == "constant":
        return np.where((position >= 0) & (position < n), position, -1)
    if mode == "edge":
        return np.clip(position, 0, n - 1)
    if mode == "wrap":
        return position % n
    if mode == "symmetric":
        folded = position % (2 * n)
        return np.where(folded < n, folded, 2 * n - 1 - folded)
    period = max(2 * (n - 1), 1)  # reflect; an axis of one element has nothing to reflect but itself
    folded = position % period
    return np.where(folded < n, folded, period - folded)


@dataclass(frozen=True)
class IndexTable:
    """Where the windows of one axis read: tap ``p`` of output ``i`` reads ``index[i·outer + p·inner]``."""

    index: IntArray
    outer: int
    inner: int

    def tap(self, p: int, start: int, stop: int) -> IntArray:
        """Source indices of tap ``p`` for the outputs ``start`` to ``stop``."""
        return self.index[start * self.outer + p * self.inner :: self.outer][: stop - start]


def table_steps(k: int, outputs: int, stride: int, dilation: int) -> Pair:
    """(outer, inner) of the table that ``index_table`` makes: per position, or per output and tap if shorter."""
    by_position, by_tap = (outputs - 1) * stride + window(k, dilation), outputs * k
    return (stride, dilation) if by_position <= by_tap else (k, 1)


def require_source(call: str, mode: str, x_shape: Sequence[int], sizes: Pair, pads: Pads) -> None:
    """Refuse to continue an axis that has nothing to continue."""
    for axis, (extent, pad) in enumerate(zip(sizes, pads, strict=True)):
        if mode != "constant" and extent == 0 and any(pad):
            raise ValueError(
                f"{call}: padding_mode={mode!r} cannot extend an empty axis; x has shape {tuple(x_shape)}, "
                f"spatial axis {axis} is empty"
            )


def span(k: int, outputs: int, steps: Pair) -> int:
    """Entries of a table of (outer, inner) ``steps`` that ``outputs`` neighbouring outputs read."""
    return (outputs - 1) * steps[0] + (k - 1) * steps[1] + 1


def index_table(n: int, k: int, outputs: int, before: int, stride: int, dilation: int, mode: str) -> IndexTable:
    """The table of one axis: per padded position, or per output and tap where that is shorter.

    The second form keeps the table small when the padding, stride or dilation is huge: only what is read counts.
    """
    steps = table_steps(k, outputs, stride, dilation)
    if steps == (stride, dilation):
        position = np.arange(span(k, outputs, steps)) - before
    else:
        position = (np.arange(outputs)[:, None] * stride + np.arange(k) * dilation - before).ravel()
    return IndexTable(source_index(position, n, mode), *steps)
