"""Pictures through one kernel, and the kernels that have names."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

import gpuconv
from gpuconv.cli import large
from gpuconv.cli.base import EPILOG, cli, json_option, print_json, reported, say, where_options
from gpuconv.filters import KERNELS, is_zero_sum, kernel_from


@cli.command(epilog=EPILOG)
@json_option
def kernels(as_json: bool) -> None:
    """List the kernels that `gpuconv filter` knows by name."""
    if as_json:
        rows = [asdict(kernel) for kernel in KERNELS.values()]
        print_json({"kernels": rows})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "weights", "what it does", show_lines=True)
    for kernel in KERNELS.values():
        table.add_row(kernel.name, as_text(kernel.rows, kernel.divisor), kernel.about)
    Console().print(table)


def as_text(rows: Any, divisor: int = 1) -> str:
    """Rows of numbers in columns, and what divides them."""
    width = max(len(f"{weight:g}") for row in rows for weight in row)
    lines = [" ".join(f"{weight:{width}g}" for weight in row) for row in rows]
    if divisor != 1:
        lines.append(f"/ {divisor}")
    return "\n".join(lines).replace("-", "−")


@cli.command("filter", epilog=EPILOG)
@click.argument("photo", type=click.Path(path_type=Path))
@click.option("--kernel", required=True, metavar="NAME|FILE", help="A name (see `gpuconv kernels`), or a file.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where to write the picture.")
@click.option(
    "--padding-mode",
    default="edge",
    show_default=True,
    metavar="MODE",
    help="How the picture continues past its border: edge, reflect, symmetric, wrap, or constant (black).",
)
@click.option("--signed", is_flag=True, help="Show a zero-sum kernel's sign: mid-grey is 0, and responses are halved.")
@click.option("--gain", type=float, default=1.0, show_default=True, help="Multiply the response by this.")
@large.options
@where_options
@json_option
def filter_(
    photo: Path,
    kernel: str,
    output: Path,
    padding_mode: str,
    signed: bool,
    gain: float,
    device: str | None,
    backend: str | None,
    dtype: str | None,
    workspace_limit: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Filter a PHOTO with one kernel; the size stays.

    Each colour channel is filtered on its own, transparency not at all. A photo is turned upright by its EXIF tag; of
    an animation the first frame is taken; 16-bit greyscale stays 16-bit where the output's format can hold it.

    A kernel whose weights sum to zero finds edges: its response is shown as its magnitude, or with --signed around
    mid-grey. Any other response is shown as it is. All are clipped at black and white.

    A kernel file holds rows of numbers: .npy, .txt or .csv (commas or blanks between the numbers), or .json (a list of
    lists). It is not turned: this is cross-correlation.

    Images of numbers, larger than memory if need be, go from .zarr, .npy or TIFF to .zarr, .npy or TIFF (which takes
    the extra `zarr`): (H, W), (H, W, C) with up to 4 channels, or planes (..., H, W). The responses are stored as they
    are: of integers rounded and clipped to their type, and said how many were clipped; --dtype float32 keeps all. From
    TIFF to TIFF a picture is made unless the file is larger than 64 MiB or one of the options for numbers is given.
    """
    if not math.isfinite(gain):
        raise click.UsageError(f"--gain must be a finite number; got {gain}")
    if large.takes(photo, output, bool(dtype or workspace_limit is not None or resume)):
        if signed:
            raise click.UsageError("--signed is for pictures; numbers keep their sign with --dtype float32")
        with reported():
            facts = large.filter_numbers(
                photo, kernel_from(kernel), output, padding_mode, gain, device, backend, dtype, workspace_limit, resume
            )
        if as_json:
            print_json(facts)
        else:
            click.echo(large.as_line(facts))
        return
    from gpuconv import pictures

    with reported():
        weights = kernel_from(kernel)
        pictures.format_for(output)  # before any work
        picture = pictures.read(photo)
        for note in picture.notes:
            say(f"warning: {photo}: {note}")
        y, ran, seconds = filtered(picture.pixels, weights, padding_mode, device, backend)
        style = "plain" if not is_zero_sum(weights) else "signed" if signed else "magnitude"
        for note in pictures.write(output, pictures.to_display(y, picture.peak, style, gain), picture):
            say(f"warning: {output}: {note}")
    if as_json:
        height, width, *channels = picture.pixels.shape
        print_json(
            {
                "photo": str(photo),
                "output": str(output),
                "width": width,
                "height": height,
                "channels": channels[0] if channels else 1,
                "kernel_size": list(weights.shape),
                "shown": style,
                "implementation": ran,
                "seconds": seconds,
            }
        )
        return
    size = " × ".join(map(str, (picture.pixels.shape[1], picture.pixels.shape[0], *picture.pixels.shape[2:])))
    taps = " × ".join(map(str, weights.shape))
    click.echo(f"{ran}: {size} pixels with a {taps} kernel in {1e3 * seconds:.1f} ms (first call) → {output}")


def filtered(
    pixels: Any, weights: Any, padding_mode: str, device: str | None, backend: str | None, repeats: int = 0
) -> tuple[Any, str, float]:
    """The response, the implementation's name, and seconds: of the one call, or the least of ``repeats`` later ones."""
    k = weights.astype(np.float32)
    options: dict[str, Any] = {"padding": "same", "padding_mode": padding_mode, "device": device, "backend": backend}
    if pixels.ndim == 3:  # depthwise: each channel meets its own copy of the kernel
        channels = pixels.shape[-1]
        k = np.broadcast_to(k, (channels, 1, *k.shape))
        options |= {"groups": channels, "layout": "NHWC"}

    def timed() -> tuple[Any, float]:
        start = time.perf_counter()
        return gpuconv.conv2d(pixels, k, **options), time.perf_counter() - start

    y, seconds = timed()
    if repeats:
        seconds = min(timed()[1] for _ in range(repeats))
    return y, str(gpuconv.explain(pixels, k, **options).implementation), seconds
