"""The textbook example worked by hand, then a photograph through seven kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

import gpuconv
from gpuconv.cli.base import EPILOG, cli, json_option, print_json, reported, where_options
from gpuconv.cli.filtering import as_text, filtered
from gpuconv.filters import KERNELS, NamedKernel, is_zero_sum

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.float64]

_DEMO = (
    "vertical-edges",
    "horizontal-edges",
    "diagonal-edges-down",
    "diagonal-edges-up",
    "emboss",
    "box-7",
    "sharpen",
)


@cli.command(epilog=EPILOG)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("contact.png"), show_default=True)
@where_options
@json_option
def demo(output: Path, device: str | None, backend: str | None, as_json: bool) -> None:
    """Work the textbook example through, then filter a photograph into a contact sheet."""
    from rich.console import Console
    from rich.table import Table

    from gpuconv import pictures

    photo = pictures.photograph()
    with reported():
        pictures.format_for(output)  # before any work
        x, y, text = _demo_steps(device, backend)
        if not as_json:
            click.echo(text)
        panels = [pictures.Panel(photo, "original", "the photograph")]
        rows = []
        for name in _DEMO:
            image, row = _demo_filter(photo, KERNELS[name], device, backend)
            rows.append(row)
            panels.append(pictures.Panel(image, name, KERNELS[name].about, KERNELS[name]))
        sheet = pictures.contact_sheet(
            panels,
            "One photograph, seven kernels",
            'y = gpuconv.conv2d(photo, kernel, padding="same", padding_mode="edge")',
            "Edges: orange where the response is positive, blue where negative, white where faint.     "
            "Photograph: Rachel Michetti (CC0), courtesy of Pikolo Espresso Bar",
        )
        size = pictures.write_sheet(output, sheet)
    if as_json:
        print_json(
            {
                "example": {"x": x.tolist(), "kernel": KERNELS["vertical-edges"].rows, "y": y.tolist()},
                "filters": rows,
                "sheet": {"output": str(output), "width": sheet.width, "height": sheet.height, "bytes": size},
            }
        )
        return
    title = f"a photograph of {photo.width} × {photo.height} pixels, best of 3 calls"
    table = Table("filter", "picture", "implementation", title=title)
    table.add_column("ms", justify="right")
    for row in rows:
        seen = "brightness" if row["channels"] == 1 else f"{row['channels']} channels"
        table.add_row(row["kernel"], seen, row["implementation"], f"{1e3 * row['seconds']:.2f}")
    Console().print(table)
    click.echo(f"contact sheet: {output} ({sheet.width} × {sheet.height} pixels, {size / 1e6:.1f} MB)")


def _demo_steps(device: str | None, backend: str | None) -> tuple[Pixels, Pixels, str]:
    """The textbook example: its input, its output, and the way from one to the other."""
    x = np.arange(10.0, 251.0, 10.0).reshape(5, 5)
    kernel = KERNELS["vertical-edges"]
    y = gpuconv.conv2d(x, kernel.weights, device=device, backend=backend)
    size = gpuconv.output_size(5, 3)
    text = "\n\n".join(
        (
            _beside(("input, 5 × 5", as_text(x)), ("kernel, 3 × 3", as_text(kernel.rows))),
            str(gpuconv.trace(x, kernel.weights)),
            _beside((f"output, {size} × {size}", as_text(y))),
            f"output size: ⌊(n − k + 2p) / s⌋ + 1 = ⌊(5 − 3 + 0) / 1⌋ + 1 = {size}\n",
        )
    )
    return x, y, text


def _beside(*blocks: tuple[str, str]) -> str:
    """Titled blocks of text in columns."""
    columns = [[title, *text.splitlines()] for title, text in blocks]
    height = max(map(len, columns))
    padded = [[line.ljust(max(map(len, lines))) for line in lines + [""] * (height - len(lines))] for lines in columns]
    return "\n".join("      ".join(row).rstrip() for row in zip(*padded, strict=True))


def _demo_filter(
    photo: Image.Image, kernel: NamedKernel, device: str | None, backend: str | None
) -> tuple[Image.Image, dict[str, Any]]:
    """The photograph filtered, for the sheet, and what to say of it."""
    from PIL import Image

    from gpuconv import pictures

    edges = is_zero_sum(kernel.weights)
    pixels = np.asarray(photo.convert("L") if edges else photo, dtype=np.float32)
    y, ran, seconds = filtered(pixels, kernel.weights, "edge", device, backend, repeats=3)
    if edges:
        image = pictures.in_two_inks(y, faint=14, full=170)
    else:
        image = Image.fromarray(pictures.to_display(y, 255, "plain").astype(np.uint8))
    return image, {
        "kernel": kernel.name, "channels": 1 if edges else 3, "implementation": ran, "seconds": seconds,
    }  # fmt: skip
