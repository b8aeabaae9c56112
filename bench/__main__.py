"""``python -m bench cpu`` and ``python -m bench gpu``.

The numerical libraries read their number of threads when they are imported, so nothing of them is imported here
before the options are known.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bench import drive
    from bench.layers import Row
    from bench.timing import Clock, Effort

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _Names(click.ParamType):
    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


@click.group()
def main() -> None:
    """Time gpuconv against its peers; every figure is a ratio, peer's time / gpuconv's time, of one run."""


def _common(minutes: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    options = (
        click.option("--suites", type=_Names(), help="Suites of layers.csv, with commas.  [default: all]"),
        click.option("--problem", "lines", multiple=True, metavar="LINE", help="A problem line instead; repeatable."),
        click.option("--batch", type=click.IntRange(1), metavar="N", help="Images at once, instead of the table's N."),
        click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True),
        click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), default="NCHW", show_default=True),
        click.option("--precision", type=click.Choice(["highest", "high", "medium"]), default="highest"),
        click.option("--minutes", type=click.FloatRange(0), default=minutes, show_default=True, help="Time in all."),
        click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Where the rows go."),
        click.option("--backend", metavar="NAME", help="Force one of gpuconv's libraries or implementations."),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@main.command()
@_common(minutes=5)
@click.option("--peers", "names", type=_Names(), default="scipy,torch,opencv", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of gpuconv and of every peer.  [default: all CPUs]")
def cpu(names: tuple[str, ...], threads: int | None, minutes: float, path: Path | None, **options: Any) -> None:
    """gpuconv's plain call on NumPy arrays against SciPy, PyTorch (oneDNN) and OpenCV."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads or usable
    os.environ |= dict.fromkeys(_THREADS, str(threads))
    from bench import cpu as driver
    from bench import peers, timing

    unknown = set(names) - set(peers.PEERS)
    if unknown:
        raise click.BadParameter(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(peers.PEERS)}")
    _check_backend(options["backend"])
    with peers.torch_restored():
        enter = driver.field(names, threads, options["backend"])
        facts = {"peers": names, "threads": threads, "device": "cpu"}
        _run("cpu", _rows(options), options | facts, enter, timing.WallClock(), minutes, timing.Effort(), path)


@main.command()
@_common(minutes=8)
@click.option("--dry-run", is_flag=True, help="Go through all of it on the CPU, with tiny layers; no figures.")
def gpu(dry_run: bool, minutes: float, path: Path | None, **options: Any) -> None:
    """Every usable CUDA implementation against cuDNN through PyTorch (the better of both memory formats)."""
    from bench import gpu as driver
    from bench import layers, peers, timing

    _check_backend(options["backend"])
    rig = driver.rig(dry_run)
    if isinstance(rig, str):
        raise click.ClickException(rig)
    rows = [layers.tiny(row) if dry_run else row for row in _rows(options)]
    facts = {"device": rig.name, "dry_run": dry_run, "l2_bytes": rig.cache}
    effort = timing.QUICK if dry_run else timing.GPU
    with peers.torch_restored():
        enter = driver.field(rig, options["backend"])
        _run("gpu rehearsal" if dry_run else "gpu", rows, options | facts, enter, rig.clock(), minutes, effort, path)


def _check_backend(backend: str | None) -> None:
    from gpuconv import dispatch

    try:
        dispatch.check_backend("bench", backend)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _rows(options: dict[str, Any]) -> list[Row]:
    from bench import layers

    try:
        if options["lines"]:
            return layers.from_lines(options["lines"])
        form = {key: options[key] for key in ("batch", "dtype", "layout", "precision")}
        return layers.load(options["suites"] or layers.suites(), **form)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _run(
    kind: str, rows: list[Row], settings: dict[str, Any], enter: drive.Enter, clock: Clock, minutes: float,
    effort: Effort, path: Path | None,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from rich.console import Console

    from bench import drive, record

    path = path or Path("out") / f"bench-{kind.replace(' ', '-')}-{datetime.now():%Y%m%d-%H%M%S}.json"
    settings = settings | {"minutes": minutes, "clock": clock.name, "effort": asdict(effort)}
    book = record.Record(path, kind, settings, rows)
    stopped = drive.run(rows, enter, book, clock, minutes, effort, lambda line: click.echo(line, err=True))
    record.show(book, Console(width=None if os.isatty(1) else 160))
    click.echo(f"{len(book.data['rows'])} of {len(rows)} rows in {path}")
    if "rehearsal" in kind:
        click.echo("A rehearsal: tiny layers on the CPU; the times and ratios say nothing about a GPU.")
    if stopped == "interrupted":
        raise SystemExit(_INTERRUPTED)
    if book.refusals():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
