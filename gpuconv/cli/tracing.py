"""The steps of one small convolution: as a table, as a page to step through, or as JSON."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

import gpuconv
from gpuconv.cli.base import EPILOG, cli, json_option, print_json, reported, shape, steps
from gpuconv.filters import kernel_from, numbers_from

Array = npt.NDArray[Any]

_RAMP_LIMIT = 1_000_000  # pixels; trace refuses far fewer


@cli.command(epilog=EPILOG)
@click.option(
    "--x",
    "x_text",
    metavar="FILE|ROWS",
    help="The input: a file of numbers, or rows such as '1 2 3; 4 5 6', channels apart by |.  [default: a ramp]",
)
@click.option(
    "--k",
    "k_text",
    default="vertical-edges",
    show_default=True,
    metavar="NAME|FILE|ROWS",
    help="The kernel: a name (see `gpuconv kernels`), a file of numbers, or rows.",
)
@click.option(
    "--size",
    type=shape,
    metavar="N|H,W|C,H,W",
    help="Of the ramp 10, 20, 30, … that stands for --x.  [default: 5]",
)
@click.option("--stride", type=steps, metavar="N|N,N", help="One number, or rows,columns.")
@click.option(
    "--padding",
    type=steps,
    metavar="N|N,N|N:N,N:N|NAME",
    help="One number, rows,columns, top:bottom,left:right, or valid, same, same_upper, same_lower, full.",
)
@click.option("--padding-mode", metavar="MODE", help="constant, reflect, symmetric, edge or wrap.")
@click.option("--dilation", type=steps, metavar="N|N,N", help="One number, or rows,columns.")
@click.option(
    "-o", "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page that steps through it."
)
@click.option("--open", "show", is_flag=True, help="Open the page in a browser.")
@json_option
def trace(
    x_text: str | None,
    k_text: str,
    size: tuple[int, ...] | None,
    html: Path | None,
    show: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Step through one small convolution.

    Without options: a ramp of 5 by 5 pixels under a 3 by 3 detector of vertical edges.

    A file of numbers is .npy, .txt or .csv (commas or blanks between the numbers), or .json (a list of lists). Of an
    input with channels (rows, or .npy) a kernel of rows and columns serves every channel.

    The page is one file, which loads nothing from anywhere. In the JSON, what JSON has no number for is text: "nan",
    "inf", "-inf", and complex numbers as "(1+2j)".
    """
    if show and html is None:
        raise click.UsageError("--open needs a page to open: add --html FILE")
    if as_json and html is not None:
        raise click.UsageError("--json and --html are two different answers; ask for one")
    if x_text is not None and size is not None:
        raise click.UsageError("--size is for the ramp that stands for --x; give one or the other")
    given = {name: value for name, value in options.items() if value is not None}
    with reported():
        x = _ramp(size or (5,)) if x_text is None else _numbers("--x", x_text)
        k = _numbers("--k", k_text)
        if x.ndim == 3 and k.ndim == 2:
            k = np.broadcast_to(k, (len(x), *k.shape))
        traced = gpuconv.trace(x, k, **given)
        if html is None:
            if as_json:
                print_json(_object(traced))
            else:
                click.echo(str(traced))
            return
        size_of_page = _write(html, traced)
    click.echo(f"{traced.caption}; {len(traced)} steps → {html} ({size_of_page / 1e3:.0f} kB)")
    if show:
        import webbrowser

        webbrowser.open(html.resolve().as_uri())


def _write(path: Path, traced: gpuconv.Trace) -> int:
    from gpuconv.files import write_bytes

    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory")
    page = traced.to_html().encode()
    write_bytes(path, page)
    return len(page)


def _ramp(size: tuple[int, ...]) -> Array:
    extents = size * 2 if len(size) == 1 else size
    if len(extents) not in (2, 3) or min(extents) < 1 or math.prod(extents) > _RAMP_LIMIT:
        said = ",".join(map(str, size))
        raise ValueError(
            f"--size must be N, H,W or C,H,W, each at least 1, of at most {_RAMP_LIMIT} pixels; got {said}"
        )
    return np.arange(10, 10 * math.prod(extents) + 1, 10).reshape(extents)


def _numbers(option: str, text: str) -> Array:
    """Rows, where ``text`` begins with a number; else a kernel's name, or a file."""
    if not text.strip():
        raise ValueError(f"{option} is empty; give rows such as '1 2 3; 4 5 6', or a file")
    if _number(re.split(r"[\s,;|]", text.strip(), maxsplit=1)[0]) is not None:
        return _rows(option, text)
    if option == "--k" and not Path(text).suffix:
        return kernel_from(text)
    return numbers_from(Path(text), "kernel file" if option == "--k" else "input file")


def _rows(option: str, text: str) -> Array:
    """``1 2; 3 4 | 5 6; 7 8``: blanks or commas between numbers, ; between rows, | between channels."""
    channels = [[_row(option, row) for row in channel.strip(" ;").split(";")] for channel in text.split("|")]
    first = channels[0]
    for c, rows in enumerate(channels):
        if len(rows) != len(first):
            raise ValueError(f"{option}: channel {c} has {len(rows)} rows where the first has {len(first)}")
        for r, row in enumerate(rows):
            if len(row) != len(first[0]):
                place = f"row {r}" if len(channels) == 1 else f"row {r} of channel {c}"
                raise ValueError(f"{option}: {place} has {len(row)} numbers where the first has {len(first[0])}")
    return np.array(channels if len(channels) > 1 else first)


def _row(option: str, text: str) -> list[int | float | complex]:
    values = []
    for word in text.replace(",", " ").split():
        value = _number(word)
        if value is None:
            raise ValueError(f"{option}: {word[:40]!r} is not a number")
        values.append(value)
    return values


def _number(word: str) -> int | float | complex | None:
    for kind in (int, float, complex):
        try:
            return kind(word)
        except ValueError:
            continue
    return None


def _object(traced: gpuconv.Trace) -> dict[str, Any]:
    """The trace as JSON's kinds of values."""
    return {
        "x": _plain(traced.x.tolist()),
        "k": _plain(traced.k.tolist()),
        "stride": traced.stride,
        "padding": traced.padding,
        "padding_mode": traced.padding_mode,
        "dilation": traced.dilation,
        "output": _plain(traced.output.tolist()),
        "steps": [
            {
                "position": step.position,
                "rows": step.rows,
                "columns": step.columns,
                "patch": _plain(step.patch.tolist()),
                "products": _plain(step.products.tolist()),
                "running": _plain(step.running.tolist()),
                "sum": _plain(step.sum),
                "calculation": step.calculation,
            }
            for step in traced
        ],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float) and math.isfinite(value) else str(value)
