"""The command line: a demonstration, filters for pictures, and what ``explain`` and ``info`` say.

Errors and warnings are one line each on stderr. rich and Pillow are imported by the commands that need them: ``info``
and ``explain`` work with click alone.
"""

from __future__ import annotations

import codecs
import errno
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
import numpy as np

import gpuconv
from gpuconv.filters import KERNELS, NamedKernel, is_zero_sum, kernel_from

if TYPE_CHECKING:
    from PIL import Image

_FAILED = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_Command = TypeVar("_Command", bound=Callable[..., Any])

# What a terminal without Unicode gets for the signs we print; an unknown one becomes "?".
_PLAIN = str.maketrans({"−": "-", "×": "x", "·": "*", "→": "->", "…": "...", "⌊": "floor(", "⌋": ")", "Σ": "sum "})


def _transliterate(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(letter if letter.isascii() else "?" for letter in plain), error.end


codecs.register_error("gpuconv.plain", _transliterate)


class Failure(click.ClickException):
    """An error to be shown as one line."""


class _Group(click.Group):
    """A group whose every error, click's own included, is one line on stderr that starts with the program's name."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="gpuconv.plain")
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
            sys.stdout.flush()
        except click.exceptions.Abort:
            _say("interrupted")
            sys.exit(_INTERRUPTED)
        except click.UsageError as error:
            context = error.ctx.command_path if error.ctx else "gpuconv"
            _say(f"{error.format_message()} (see {context} --help)")
            sys.exit(_FAILED)
        except click.ClickException as error:
            _say(error.format_message())
            sys.exit(_FAILED)
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            # The reader of our output, `head` perhaps, has gone; Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


def _say(message: str) -> None:
    click.echo(f"gpuconv: {_one_line(message)}", err=True)


def _one_line(message: str) -> str:
    """The lines of ``message`` after one another; a list of reasons stays a list."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    return "".join(f"{line} " if line[-1] in ":;,." else f"{line}; " for line in lines).rstrip("; ")


@contextmanager
def _reported() -> Iterator[None]:
    """Errors that the library or a file is to blame for become a Failure, warnings one line each, said once."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    # A Warning arrives here where the user's filter makes it an error.
    except (ValueError, TypeError, MemoryError, gpuconv.NoBackendError, UserWarning) as error:
        raise Failure(str(error) or type(error).__name__) from error
    finally:
        for message in dict.fromkeys(str(warning.message) for warning in caught):
            _say(f"warning: {message}")


def _where_options(command: _Command) -> _Command:
    for option in (
        click.option("--backend", metavar="NAME", help="Force a library (numpy, cupy, ...) or one implementation."),
        click.option(
            "--device",
            metavar="DEVICE",
            help="cpu, cuda, cuda:1, ... or auto (a GPU if there is one).  [default: cpu, or what --backend implies]",
        ),
    ):
        command = option(command)
    return command


_EPILOG = (
    "Exit codes: 0 done; 1 the reader of the output went away; 2 wrong arguments, a file that cannot be read or "
    "written, or nothing that can run; 130 interrupted."
)


@click.group(cls=_Group, invoke_without_command=True, epilog=_EPILOG)
@click.version_option(gpuconv.__version__, prog_name="gpuconv", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """2-D convolution, on the GPU or the CPU."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(epilog=_EPILOG)
def info() -> None:
    """Say what this machine can use, and why not the rest."""
    with _reported():
        report = str(gpuconv.info())
    click.echo(report)


def _shape(text: str) -> tuple[int, ...]:
    """``8,3,224,224`` or ``8x3x224x224``."""
    try:
        return tuple(int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a shape such as 8,3,224,224") from None


def _steps(text: str) -> Any:
    """``2``, ``2,1`` (rows, columns), ``0:1,0:1`` (before:after on each axis), or a name."""
    if text.replace("_", "").isalpha():
        return text
    try:
        axes = [[int(number) for number in axis.split(":")] for axis in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither an integer nor a pair such as 2,1") from None
    if len(axes) == 1 and len(axes[0]) == 1:
        return axes[0][0]
    return tuple(tuple(axis) if len(axis) > 1 else axis[0] for axis in axes)


@cli.command(epilog=_EPILOG)
@click.argument("problem", required=False, metavar="[PROBLEM]")
@click.option("--x", "x_shape", type=_shape, metavar="N,C,H,W", help="Shape of the input.")
@click.option("--k", "k_shape", type=_shape, metavar="O,C,KH,KW", help="Shape of the kernel.")
@click.option("--bias", is_flag=True, help="With a bias.")
@click.option("--stride", type=_steps, metavar="N|N,N", help="One number, or rows,columns.")
@click.option(
    "--padding",
    type=_steps,
    metavar="N|N,N|N:N,N:N|NAME",
    help="One number, rows,columns, top:bottom,left:right, or valid, same, same_upper, same_lower, full.",
)
@click.option("--dilation", type=_steps, metavar="N|N,N", help="One number, or rows,columns.")
@click.option("--groups", type=int, metavar="N", help="Groups of channels.")
@click.option("--padding-mode", metavar="MODE", help="constant, reflect, symmetric, edge or wrap.")
@click.option("--flip", is_flag=True, help="Turn the kernel by 180 degrees.")
@click.option("--layout", metavar="LAYOUT", help="NCHW or NHWC.")
@click.option("--kernel-layout", metavar="LAYOUT", help="OIHW, HWIO or OHWI.")
@click.option("--activation", metavar="NAME", help="relu.")
@click.option("--precision", metavar="LEVEL", help="highest, high or medium.")
@click.option("--dtype", "input_dtype", metavar="DTYPE", help="Of input and kernel.  [default: float32]")
@click.option("--result-dtype", "dtype", metavar="DTYPE", help="Of the result.  [default: follows from --dtype]")
@click.option("--workspace-limit", type=int, metavar="BYTES", help="Scratch memory.")
@_where_options
def explain(problem: str | None, x_shape: Any, k_shape: Any, **options: Any) -> None:
    """Say what conv2d would run, and why.

    Either a PROBLEM as the library prints it, such as n8c3h224w224_o64kh7kw7_s2p3_f32, or the shapes --x and --k with
    any other options. Nothing is computed.
    """
    # What was not given is left to explain's own defaults.
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if problem is not None:
        elsewhere = ("device", "backend", "workspace_limit")
        described = [name for name in given if name not in elsewhere]
        if described or x_shape is not None or k_shape is not None:
            raise click.UsageError("a problem line stands for the shapes and their options; give one or the other")
        operands: tuple[Any, ...] = (problem,)
    else:
        if x_shape is None or k_shape is None:
            raise click.UsageError("give a problem line, or both --x and --k")
        operands = (x_shape, k_shape)
    with _reported():
        report = gpuconv.explain(*operands, **given)
    click.echo(str(report))


@cli.command(epilog=_EPILOG)
@click.option(
    "--dtype", "wanted", multiple=True, type=click.Choice(["float32", "float64", "float16", "bfloat16"]),
    default=["float32"], show_default=True, help="Of the arrays; repeatable.",
)  # fmt: skip
def warmup(wanted: tuple[str, ...]) -> None:
    """Compile the CPU's kernels ahead, so that no first call has to wait for it.

    They are kept in a folder of your own (GPUCONV_CACHE_DIR, or the system's folder for caches).
    """
    from rich.console import Console
    from rich.progress import track

    from gpuconv.backends.numba_cpu import kernel_cache, runtime, warm

    with _reported():
        missing = runtime.unavailable()
        if missing is not None:
            raise Failure(missing)
        start = time.perf_counter()
        todo = list(warm.steps(wanted))
        for _, do in track(todo, "compiling", console=Console(stderr=True), transient=True):
            do()
        place, said = kernel_cache.usable()
    seconds = time.perf_counter() - start
    kept = f"kept in {place}" if place is not None else f"not kept: {said}"
    click.echo(f"{len(runtime.compiled)} kernels compiled in {seconds:.1f} s, {kept}")


@cli.command(epilog=_EPILOG)
def kernels() -> None:
    """List the kernels that `gpuconv filter` knows by name."""
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "weights", "what it does", show_lines=True)
    for kernel in KERNELS.values():
        table.add_row(kernel.name, _as_text(kernel.rows, kernel.divisor), kernel.about)
    Console().print(table)


def _as_text(rows: Any, divisor: int = 1) -> str:
    width = max(len(f"{weight:g}") for row in rows for weight in row)
    lines = [" ".join(f"{weight:{width}g}" for weight in row) for row in rows]
    if divisor != 1:
        lines.append(f"/ {divisor}")
    return "\n".join(lines).replace("-", "−")


@cli.command("filter", epilog=_EPILOG)
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
@_where_options
def filter_(
    photo: Path,
    kernel: str,
    output: Path,
    padding_mode: str,
    signed: bool,
    gain: float,
    device: str | None,
    backend: str | None,
) -> None:
    """Filter a PHOTO with one kernel; the size stays.

    Each colour channel is filtered on its own, transparency not at all. A photo is turned upright by its EXIF tag; of
    an animation the first frame is taken; 16-bit greyscale stays 16-bit where the output's format can hold it.

    A kernel whose weights sum to zero finds edges: its response is shown as its magnitude, or with --signed around
    mid-grey. Any other response is shown as it is. All are clipped at black and white.

    A kernel file holds rows of numbers: .npy, .txt or .csv (commas or blanks between the numbers), or .json (a list of
    lists). It is not turned: this is cross-correlation.
    """
    from gpuconv import pictures

    if not math.isfinite(gain):
        raise click.UsageError(f"--gain must be a finite number; got {gain}")
    with _reported():
        weights = kernel_from(kernel)
        pictures.format_for(output)  # before any work
        picture = pictures.read(photo)
        for note in picture.notes:
            _say(f"warning: {photo}: {note}")
        y, ran, seconds = _filtered(picture.pixels, weights, padding_mode, device, backend)
        style = "plain" if not is_zero_sum(weights) else "signed" if signed else "magnitude"
        for note in pictures.write(output, pictures.to_display(y, picture.peak, style, gain), picture):
            _say(f"warning: {output}: {note}")
    size = " × ".join(map(str, (picture.pixels.shape[1], picture.pixels.shape[0], *picture.pixels.shape[2:])))
    taps = " × ".join(map(str, weights.shape))
    click.echo(f"{ran}: {size} pixels with a {taps} kernel in {1e3 * seconds:.1f} ms (first call) → {output}")


def _filtered(
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


_DEMO = (
    "vertical-edges",
    "horizontal-edges",
    "diagonal-edges-down",
    "diagonal-edges-up",
    "emboss",
    "box-7",
    "sharpen",
)


@cli.command(epilog=_EPILOG)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("contact.png"), show_default=True)
@_where_options
def demo(output: Path, device: str | None, backend: str | None) -> None:
    """Work the textbook example through, then filter a photograph into a contact sheet."""
    from rich.console import Console
    from rich.table import Table

    from gpuconv import pictures

    photo = pictures.photograph()
    title = f"a photograph of {photo.width} × {photo.height} pixels, best of 3 calls"
    table = Table("filter", "picture", "implementation", title=title)
    table.add_column("ms", justify="right")
    with _reported():
        pictures.format_for(output)  # before any work
        click.echo(_demo_steps(device, backend))
        panels = [pictures.Panel(photo, "original", "the photograph")]
        for name in _DEMO:
            image, row = _demo_filter(photo, KERNELS[name], device, backend)
            table.add_row(name, *row)
            panels.append(pictures.Panel(image, name, KERNELS[name].about, KERNELS[name]))
        sheet = pictures.contact_sheet(
            panels,
            "One photograph, seven kernels",
            'y = gpuconv.conv2d(photo, kernel, padding="same", padding_mode="edge")',
            "Edges: orange where the response is positive, blue where negative, white where faint.     "
            "Photograph: Rachel Michetti (CC0), courtesy of Pikolo Espresso Bar",
        )
        size = pictures.write_sheet(output, sheet)
    Console().print(table)
    click.echo(f"contact sheet: {output} ({sheet.width} × {sheet.height} pixels, {size / 1e6:.1f} MB)")


def _demo_steps(device: str | None, backend: str | None) -> str:
    """The textbook example, from its input to its output."""
    x = np.arange(10.0, 251.0, 10.0).reshape(5, 5)
    kernel = KERNELS["vertical-edges"]
    y = gpuconv.conv2d(x, kernel.weights, device=device, backend=backend)
    size = gpuconv.output_size(5, 3)
    return "\n\n".join(
        (
            _beside(("input, 5 × 5", _as_text(x)), ("kernel, 3 × 3", _as_text(kernel.rows))),
            str(gpuconv.trace(x, kernel.weights)),
            _beside((f"output, {size} × {size}", _as_text(y))),
            f"output size: ⌊(n − k + 2p) / s⌋ + 1 = ⌊(5 − 3 + 0) / 1⌋ + 1 = {size}\n",
        )
    )


def _beside(*blocks: tuple[str, str]) -> str:
    """Titled blocks of text in columns."""
    columns = [[title, *text.splitlines()] for title, text in blocks]
    height = max(map(len, columns))
    padded = [[line.ljust(max(map(len, lines))) for line in lines + [""] * (height - len(lines))] for lines in columns]
    return "\n".join("      ".join(row).rstrip() for row in zip(*padded, strict=True))


def _demo_filter(
    photo: Image.Image, kernel: NamedKernel, device: str | None, backend: str | None
) -> tuple[Image.Image, tuple[str, str, str]]:
    """The photograph filtered, for the sheet, and the cells of the table: its pixels, implementation, milliseconds."""
    from PIL import Image

    from gpuconv import pictures

    edges = is_zero_sum(kernel.weights)
    pixels = np.asarray(photo.convert("L") if edges else photo, dtype=np.float32)
    y, ran, seconds = _filtered(pixels, kernel.weights, "edge", device, backend, repeats=3)
    if edges:
        image = pictures.in_two_inks(y, faint=14, full=170)
    else:
        image = Image.fromarray(pictures.to_display(y, 255, "plain").astype(np.uint8))
    return image, ("brightness" if edges else "3 channels", ran, f"{1e3 * seconds:.2f}")
