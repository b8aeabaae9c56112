"""A trace as a page to step through: its data beside a template's style and script, in one file.

The page's policy (CSP) names the style and the script by their digests, so that a browser runs these and nothing else,
whatever the data hold.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpuconv import geometry, notation
from gpuconv.geometry import Pair

if TYPE_CHECKING:
    from gpuconv.tracing import Step, Trace

Array = npt.NDArray[Any]

# A cell needs some pixels of a screen, and a product a place in the sum that is written out.
SIDE_LIMIT = 48
PIXEL_LIMIT = 4096
WEIGHT_LIMIT = 256
PRODUCT_LIMIT = 30_000


def page(trace: Trace, embedded: bool = False) -> str:
    """The page of ``trace``; ``embedded`` leaves out what only a page of its own needs."""
    said = unreadable(trace)
    if said is not None:
        raise ValueError(f"Trace.to_html: {said}")
    style, script = (_part(f"trace.{kind}") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_part("trace.html")).substitute(
        embedded=' class="embedded"' if embedded else "",
        policy=policy,
        caption=html.escape(trace.caption),
        style=style,
        script=script,
        formulas=_formulas(trace),
        table=html.escape(str(trace)),
        data=_json(_data(trace)),
    )


def unreadable(trace: Trace) -> str | None:
    """Why ``trace`` is too large for a page, or None."""
    height, width = _padded(trace)
    channels = math.prod(trace.x.shape[:-2])
    for what, count, limit in (
        ("rows of padded input", height, SIDE_LIMIT),
        ("columns of padded input", width, SIDE_LIMIT),
        ("pixels of padded input", channels * height * width, PIXEL_LIMIT),
        ("weights", trace.k.size, WEIGHT_LIMIT),
        ("products", trace.k.size * len(trace), PRODUCT_LIMIT),
    ):
        if count > limit:
            return f"a page shows at most {limit} {what}, and here are {count}; crop x, or take a smaller kernel"
    return None


def typical_height(trace: Trace) -> int:
    """About how many pixels the embedded page is high, some 900 of them wide; a frame cannot ask what it holds."""
    channels = math.prod(trace.x.shape[:-2])
    rows, taps = _padded(trace)[0], trace.k.shape[-2]
    cell = max(24, min(46, 620 // (channels * rows)))  # as the script has it
    figure, sums = channels * (rows * cell + 45), channels * max(27 * taps + 40, 49 * taps)
    return int(min(figure + sums + 370, 1000))


def _part(name: str) -> str:
    return resources.files("gpuconv").joinpath("data", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What a browser computes of the text between the tags."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _padded(trace: Trace) -> Pair:
    height, width = (n + sum(pad) for n, pad in zip(trace.x.shape[-2:], trace.padding, strict=True))
    return height, width


def _data(trace: Trace) -> dict[str, Any]:
    """All that the script shows, as texts; shades are between -1 and 1."""
    extents = trace.x.shape[-2:]
    places = [np.arange(-before, n + after) for (before, after), n in zip(trace.padding, extents, strict=True)]
    rows, columns = (
        geometry.source_index(place, n, trace.padding_mode) for place, n in zip(places, extents, strict=True)
    )
    pad_rows, pad_columns = ((place < 0) | (place >= n) for place, n in zip(places, extents, strict=True))
    # One row and one column of zeros at the end, where a source of -1 points.
    extended = np.pad(trace.x, [(0, 0)] * (trace.x.ndim - 2) + [(0, 1), (0, 1)])
    inputs = _flat(extended[..., rows[:, None], columns])
    kernels = _flat(trace.k)
    return {
        "size": extents,
        "padded": _padded(trace),
        "before": [before for before, _ in trace.padding],
        "taps": trace.k.shape[-2:],
        "output": trace.shape,
        "stride": trace.stride,
        "dilation": trace.dilation,
        "channels": len(inputs),
        "padding": (pad_rows[:, None] | pad_columns).ravel().astype(int).tolist(),
        "input": _texts(inputs),
        "inputTint": _shades(inputs),
        "kernel": _texts(kernels),
        "kernelTint": _shades(kernels),
        "outputTint": _shades(trace.output.ravel()),
        "steps": [_step(step) for step in trace],
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "products": _texts(_flat(step.products)),
        "running": _texts(_flat(step.running)),
        "channels": _texts(step.channel_sums),
        "sum": _number(step.sum),
        "calculation": _worded(step.calculation),
    }


def _flat(array: Array) -> Array:
    """(C, rows·columns)."""
    return array.reshape(-1, array.shape[-2] * array.shape[-1])


def _texts(array: Array) -> Any:
    if array.ndim > 1:
        return [_texts(part) for part in array]
    return [_number(value) for value in array.tolist()]


def _number(value: Any) -> str:
    return _worded(notation.number(value))


def _worded(text: str) -> str:
    return text.replace("inf", "∞").replace("nan", "NaN")


def _shades(array: Array) -> Any:
    """Each value over the largest: of complex numbers the real part; NaN has no shade."""
    values = np.nan_to_num(array.real.astype(np.float64), nan=0.0)
    finite = np.abs(values[np.abs(values) < np.finfo(np.float64).max])
    largest = finite.max(initial=0.0)
    with np.errstate(over="ignore"):  # infinity over something tiny
        return np.clip(values / (largest or 1.0), -1, 1).round(3).tolist()


def _formulas(trace: Trace) -> str:
    """The size of each axis of the output, with its numbers; once where both are the same."""
    sizes, kernel = trace.x.shape[-2:], trace.k.shape[-2:]
    axes = list(zip(sizes, kernel, trace.padding, trace.stride, trace.dilation, trace.shape, strict=True))
    names = ("Output size",) if axes[0] == axes[1] else ("Output rows", "Output columns")
    return "\n    ".join(
        f'<p class="formula">{name} = {_size(*axis)}</p>' for name, axis in zip(names, axes, strict=False)
    )


def _size(n: int, k: int, pads: Pair, stride: int, dilation: int, outputs: int) -> str:
    """The formula in letters, then in numbers: k is stretched by a dilation, p and p′ are the two sides."""
    window, stretched = "<i>k</i>", f"{k}"
    if dilation > 1:
        window, stretched = "(<i>d</i>(<i>k</i> − 1) + 1)", f"({dilation}·({k} − 1) + 1)"
    before, after = pads
    padding, padded = (
        ("2<i>p</i>", f"2·{before}") if before == after else ("<i>p</i> + <i>p</i>′", f"{before} + {after}")
    )
    letters = f"⌊(<i>n</i> − {window} + {padding}) / <i>s</i>⌋ + 1"
    return f"{letters} = ⌊({n} − {stretched} + {padded}) / {stride}⌋ + 1 = <b>{outputs}</b>"
