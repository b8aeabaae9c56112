"""A problem as one line of text, and back: the name of a test, a row of a benchmark, a way to reproduce.

    n8c3h224w224_o64kh7kw7_s2p3_f32

Sizes of x and of the kernel; stride, dilation, padding and groups; then, where they are not the default, padding mode
and value, ``flip``, layouts, ``bias``, activation, zero points and precision; ``dgrad`` and ``wgrad`` for the input
and the weight gradient, ``conj`` where they conjugate, ``unfold`` and ``fold``; last the dtypes of the first operand,
the second and the result, ``x*k-y``.
"""

from __future__ import annotations

import re
from typing import Any

from gpuconv import dtypes, geometry
from gpuconv.geometry import Pads, Pair
from gpuconv.layouts import KERNEL_LAYOUTS, LAYOUTS, kernel_axes
from gpuconv.problem import NO_PADS, PRECISIONS, Conv2dProblem

_OPS = {"dgrad": "input_grad", "wgrad": "weight_grad", "unfold": "unfold", "fold": "fold"}
_OP_WORDS = {op: word for word, op in _OPS.items()}


def text(p: Conv2dProblem) -> str:
    """``p`` as one line; defaults are left out."""
    parts = [f"n{p.N}c{p.C}h{p.H}w{p.W}", f"o{p.O}kh{p.KH}kw{p.KW}"]
    steps = "".join(
        f"{letter}{_pair(value)}"
        for letter, value, default in (("s", p.stride, (1, 1)), ("d", p.dilation, (1, 1)))
        if value != default
    )
    pads = f"p{_pads(p.padding)}" if p.padding != NO_PADS else ""
    groups = f"g{p.groups}" if p.groups != 1 else ""
    parts.append(steps + pads + groups)
    parts.append(p.padding_mode if p.padding_mode != "constant" else "")
    parts.append(f"fill{p.padding_value!r}" if p.padding_value != 0 else "")
    parts.append("flip" if p.flip else "")
    parts.append(p.layout.lower() if p.layout != "NCHW" else "")
    parts.append(p.kernel_layout.lower() if p.kernel_layout != "OIHW" else "")
    parts.append("bias" if p.bias else "")
    parts.append(p.activation or "")
    parts.append(f"xz{p.x_zero_point}" if p.x_zero_point else "")
    parts.append("kz" if p.k_zero_point else "")
    parts.append(p.precision if p.precision != "highest" else "")
    parts.append(_OP_WORDS.get(p.op, ""))
    parts.append("conj" if p.conjugate else "")
    types = dtypes.CODES[p.x_dtype]
    types += f"*{dtypes.CODES[p.k_dtype]}" if p.k_dtype != p.x_dtype else ""
    default = dtypes.promoted(p.x_dtype, p.k_dtype)
    types += f"-{dtypes.CODES[p.y_dtype]}" if p.y_dtype != default and p.op != "unfold" else ""
    parts.append(types)
    return "_".join(part for part in parts if part)


def _pair(value: Pair) -> str:
    return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"


def _pads(pads: Pads) -> str:
    if all(low == high for low, high in pads):
        return _pair((pads[0][0], pads[1][0]))
    return "x".join(f"{low}.{high}" for low, high in pads)


_D = "[0-9]{1,19}"
_SIZES = re.compile(f"n({_D})c({_D})h({_D})w({_D})")
_KERNEL = re.compile(f"o({_D})kh({_D})kw({_D})")
_PAIR = f"{_D}(?:x{_D})?"
_STEPS = re.compile(
    f"(?:s(?P<stride>{_PAIR}))?(?:d(?P<dilation>{_PAIR}))?"
    rf"(?:p(?P<padding>{_D}\.-?{_D}x{_D}\.-?{_D}|{_PAIR}))?(?:g(?P<groups>{_D}))?"
)
_CODE = "|".join(sorted(map(re.escape, dtypes.NAMES), key=len, reverse=True))
_TYPES = re.compile(rf"(?P<x>{_CODE})(?:\*(?P<k>{_CODE}))?(?:-(?P<y>{_CODE}))?")
_WORDS = (
    {mode: ("padding_mode", mode) for mode in geometry.PADDING_MODES}
    | {level: ("precision", level) for level in PRECISIONS}
    | {layout.lower(): ("layout", layout) for layout in LAYOUTS}
    | {layout.lower(): ("kernel_layout", layout) for layout in KERNEL_LAYOUTS}
    | {word: ("op", op) for word, op in _OPS.items()}
    | {
        "conj": ("conjugate", True),
        "flip": ("flip", True),
        "bias": ("bias", True),
        "relu": ("activation", "relu"),
        "kz": ("k_zero_point", True),
    }
)


def parse(line: str, call: str) -> Conv2dProblem:
    """The problem that ``line`` prints; a ValueError that begins with ``call`` when it is not one."""

    def refuse(why: str) -> ValueError:
        example = "n8c3h224w224_o64kh7kw7_s2p3_f32"
        return ValueError(f"{call}: {line!r} is no problem line such as {example}: {why}")

    segments = line.strip().split("_")
    sizes = _SIZES.fullmatch(segments[0])
    kernel = _KERNEL.fullmatch(segments[1]) if len(segments) > 1 else None
    if sizes is None or kernel is None:
        raise refuse("it must begin with the sizes of x and of the kernel")
    N, C, H, W = map(int, sizes.groups())
    O, KH, KW = map(int, kernel.groups())
    options: dict[str, Any] = {}
    for segment in segments[2:]:
        found = _options(segment)
        if not found:
            raise refuse(f"{segment!r} is not understood")
        if repeated := options.keys() & found.keys():
            raise refuse(f"it gives {', '.join(sorted(repeated))} twice")
        options |= found
    groups = options.setdefault("groups", 1)
    if groups < 1:
        raise refuse("groups must be at least 1")
    x = (N, C, H, W) if options.get("layout", "NCHW") == "NCHW" else (N, H, W, C)
    given = dict(zip(kernel_axes(options.get("kernel_layout", "OIHW"), 4), (O, C // groups, KH, KW), strict=True))
    op = options.get("op", "forward")
    if options.get("conjugate") and op not in ("input_grad", "weight_grad"):
        raise refuse("'conj' is for gradients")
    if op in ("unfold", "fold") and (groups, O) != (C, C * KH * KW):
        raise refuse(f"{op!r} of {C} channels has g{C} and o{C * KH * KW}")
    if op != "forward":
        forward_only = {"padding_mode", "padding_value", "x_zero_point", "k_zero_point"}
        forward_only |= {"bias", "activation"} if op != "input_grad" else set()
        if refused := options.keys() & forward_only:
            raise refuse(f"{op!r} has no {', '.join(sorted(refused))}")
    # The end of an input gradient's axis may be a crop: its size, not the padding, is what the caller gave.
    options["least_padding"] = 1 - geometry.STEP_LIMIT if op == "input_grad" else 0
    return Conv2dProblem.of(x, tuple(given[axis] for axis in range(4)), call=call, **options)


def _options(segment: str) -> dict[str, Any]:
    """The arguments that one segment gives; none when it is not understood."""
    if segment in _WORDS:
        name, value = _WORDS[segment]
        return {name: value}
    if match := _TYPES.fullmatch(segment):
        x, k, y = match["x"], match["k"] or match["x"], match["y"]
        return {"x_dtype": dtypes.NAMES[x], "k_dtype": dtypes.NAMES[k], "dtype": dtypes.NAMES[y] if y else None}
    if match := re.fullmatch(f"xz(-?{_D})", segment):
        return {"x_zero_point": int(match[1])}
    if segment.startswith("fill"):
        number = _number(segment[4:])
        return {} if number is None else {"padding_value": number}
    match = _STEPS.fullmatch(segment)
    found: dict[str, Any] = {name: text for name, text in match.groupdict().items() if text} if match else {}
    for name, text in found.items():
        if name == "groups":
            found[name] = int(text)
        elif "." in text:
            found[name] = [[int(pad) for pad in axis.split(".")] for axis in text.split("x")]
        else:
            first, _, second = text.partition("x")
            found[name] = int(first), int(second or first)
    return found


def _number(text: str) -> complex | None:
    if text.isascii() and len(text) <= 100:
        for kind in (int, float, complex):
            try:
                return kind(text)
            except ValueError:
                continue
    return None
