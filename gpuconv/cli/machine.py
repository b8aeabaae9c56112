"""What this machine can use, what a convolution would run, and the CPU's kernels compiled ahead."""

from __future__ import annotations

import time
from typing import Any

import click

import gpuconv
from gpuconv.cli.base import EPILOG, Failure, cli, json_option, print_json, reported, shape, steps, where_options


@cli.command(epilog=EPILOG)
@json_option
def info(as_json: bool) -> None:
    """Say what this machine can use, and why not the rest."""
    with reported():
        report = gpuconv.info()
    _show(report, as_json)


def _show(report: gpuconv.Info | gpuconv.Explanation, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(str(report))


@cli.command(epilog=EPILOG)
@click.argument("lines", nargs=-1, metavar="[PROBLEM]")
@click.option("--x", "x_shape", type=shape, metavar="N,C,H,W", help="Shape of the input.")
@click.option("--k", "k_shape", type=shape, metavar="O,C,KH,KW", help="Shape of the kernel.")
@click.option("--bias", is_flag=True, help="With a bias.")
@click.option("--stride", type=steps, metavar="N|N,N", help="One number, or rows,columns.")
@click.option(
    "--padding",
    type=steps,
    metavar="N|N,N|N:N,N:N|NAME",
    help="One number, rows,columns, top:bottom,left:right, or valid, same, same_upper, same_lower, full.",
)
@click.option("--dilation", type=steps, metavar="N|N,N", help="One number, or rows,columns.")
@click.option("--groups", type=int, metavar="N", help="Groups of channels.")
@click.option("--padding-mode", metavar="MODE", help="constant, reflect, symmetric, edge or wrap.")
@click.option("--flip", is_flag=True, help="Turn the kernel by 180 degrees.")
@click.option("--layout", metavar="LAYOUT", help="NCHW or NHWC.")
@click.option("--kernel-layout", metavar="LAYOUT", help="OIHW, HWIO or OHWI.")
@click.option("--activation", metavar="NAME", help="relu.")
@click.option("--precision", metavar="LEVEL", help="highest, high or medium.")
@click.option("--dtype", "input_dtype", metavar="DTYPE", help="Of input and kernel.  [default: float32]")
@click.option("--result-dtype", "dtype", metavar="DTYPE", help="Of the result.  [default: follows from --dtype]")
@click.option("--op", metavar="OP", help="forward, transpose, input_grad or weight_grad.  [default: forward]")
@click.option("--output-padding", type=steps, metavar="N|N,N", help="Of --op transpose.")
@click.option("--workspace-limit", type=int, metavar="BYTES", help="Scratch memory.")
@where_options
@json_option
def explain(lines: tuple[str, ...], x_shape: Any, k_shape: Any, as_json: bool, **options: Any) -> None:
    """Say what conv2d, or with --op one of its relatives, would run, and why.

    Either a PROBLEM as the library prints it, such as n8c3h224w224_o64kh7kw7_s2p3_f32, or the shapes --x and --k with
    any other options. Nothing is computed.
    """
    # What was not given is left to explain's own defaults.
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if len(lines) > 1:
        raise click.UsageError(f"one problem line at most, got {' '.join(lines)}; shapes go to --x and --k")
    if lines:
        elsewhere = ("device", "backend", "workspace_limit")
        described = [name for name in given if name not in elsewhere]
        if described or x_shape is not None or k_shape is not None:
            raise click.UsageError("a problem line stands for the shapes and their options; give one or the other")
        operands: tuple[Any, ...] = lines
    else:
        if x_shape is None or k_shape is None:
            raise click.UsageError("give a problem line, or both --x and --k")
        operands = (x_shape, k_shape)
    with reported():
        report = gpuconv.explain(*operands, **given)
    _show(report, as_json)


@cli.command(epilog=EPILOG)
@click.option(
    "--dtype", "wanted", multiple=True, type=click.Choice(["float32", "float64", "float16", "bfloat16"]),
    default=["float32"], show_default=True, help="Of the arrays; repeatable.",
)  # fmt: skip
@json_option
def warmup(wanted: tuple[str, ...], as_json: bool) -> None:
    """Compile the CPU's kernels ahead, so that no first call has to wait for it.

    They are kept in a folder of your own (GPUCONV_CACHE_DIR, or the system's folder for caches).
    """
    from rich.console import Console
    from rich.progress import track

    from gpuconv.backends.numba_cpu import kernel_cache, runtime, warm

    with reported():
        missing = runtime.unavailable()
        if missing is not None:
            raise Failure(missing)
        start = time.perf_counter()
        todo = list(warm.steps(wanted))
        for _, do in track(todo, "compiling", console=Console(stderr=True), transient=True):
            do()
        place, said = kernel_cache.usable()
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "dtypes": list(wanted),
                "compiled": len(runtime.compiled),
                "seconds": seconds,
                "folder": None if place is None else str(place),
                "not_kept": None if place is not None else said,
            }
        )
        return
    kept = f"kept in {place}" if place is not None else f"not kept: {said}"
    click.echo(f"{len(runtime.compiled)} kernels compiled in {seconds:.1f} s, {kept}")
