"""``python -m bench cpu`` and ``python -m bench gpu``, and ``python -m bench plot`` for a picture of an earlier run;
``python -m bench kernels`` for what the CUDA kernels promise on paper; ``python -m bench tiled`` for images larger than
memory.

The numerical libraries read their number of threads when they are imported, so nothing of them is imported here
before the options are known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bench import record
    from bench.layers import Row
    from bench.timing import Clock, Effort

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_FILE = click.Path(dir_okay=False, path_type=Path)
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
        click.option("--json", "path", type=_FILE, help="Where the rows go.  [default: a new file in out/]"),
        click.option("--plot", "picture", type=_FILE, help="Where the plot goes (PNG).  [default: beside the rows]"),
        click.option("--backend", metavar="NAME", help="Force one of gpuconv's libraries or implementations."),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@main.command()
@_common(minutes=8)
@click.option(
    "--peers", "names", type=_Names(), default="torch,torch-ahead,onnxruntime,opencv,scipy", show_default=True
)
@click.option("--threads", type=click.IntRange(1), help="Of gpuconv and of every peer.  [default: all CPUs]")
@click.option("--quick", is_flag=True, help="A rehearsal for CI: go through all of it with tiny layers; no figures.")
def cpu(names: tuple[str, ...], threads: int | None, quick: bool, **options: Any) -> None:
    """gpuconv's plain call and a prepared Conv2d on NumPy arrays against PyTorch, ONNX Runtime, OpenCV and SciPy.

    Each peer runs in the fastest of its settings for the row's layout, weights reordered ahead of time among them.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads or usable
    os.environ |= dict.fromkeys(_THREADS, str(threads))
    from bench import cpu as driver
    from bench import drive as driving
    from bench import layers, peers, timing

    unknown = set(names) - set(peers.PEERS)
    if unknown:
        raise click.BadParameter(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(peers.PEERS)}")
    _check_backend(options["backend"])
    with peers.torch_restored():
        enter = driver.field(names, threads, options["backend"])
        facts = {"peers": names, "threads": threads, "device": "cpu", "quick": quick}
        rows = [layers.tiny(row) if quick else row for row in _rows(options)]
        effort = timing.QUICK if quick else timing.Effort()
        clock = timing.WallClock()

        def drive(book: record.Record, begin: Callable[[Row], None], say: Callable[[str], None]) -> str | None:
            measuring = driving.here(enter, clock, effort)
            return driving.run(rows, measuring, book, options["minutes"], say, begin)

        _run("cpu rehearsal" if quick else "cpu", rows, options | facts, drive, clock, effort)


@main.command()
@_common(minutes=8)
@click.option("--dry-run", is_flag=True, help="Go through all of it on the CPU, with tiny layers; no figures.")
@click.option("--verify/--no-verify", default=True, help="Run the GPU's tests and compute-sanitizer afterwards.")
@click.pass_context
def gpu(context: click.Context, dry_run: bool, verify: bool, **options: Any) -> None:
    """Every usable CUDA implementation against cuDNN through PyTorch (the better of both memory formats).

    Without --suites, --problem or an option of form: the most telling layers first, in float32, TF32 and 16 bits, both
    layouts, one image to 256, both gradients, and from NumPy to NumPy. A fifth of the time is kept for --verify.
    """
    from bench import gpu as driver
    from bench import layers, peers, timing, tour
    from bench import verify as checks

    _check_backend(options["backend"])
    rig = driver.rig(dry_run)
    if isinstance(rig, str):
        raise click.ClickException(rig)
    click.echo(checks.versions(rig.name), err=True)
    for line in checks.missing():
        click.echo(f"missing: {line}", err=True)
    form = ("suites", "lines", "batch", "dtype", "layout", "precision")
    default = click.core.ParameterSource.DEFAULT
    if all(context.get_parameter_source(name) is default for name in form):
        wanted = list(tour.sections(tiny=dry_run))
    else:
        rows = tuple(layers.tiny(row) if dry_run else row for row in _rows(options))
        wanted = [tour.Section(rows)]
        verify = False
    facts = {"device": rig.name, "dry_run": dry_run, "l2_bytes": rig.cache}
    effort = timing.QUICK if dry_run else timing.GPU
    minutes = options["minutes"] * (0.8 if verify else 1)

    def drive(book: record.Record, begin: Callable[[Row], None], say: Callable[[str], None]) -> str | None:
        return tour.run(dry_run, options["backend"], wanted, book, minutes, effort, say, begin)

    def finish(book: record.Record, say: Callable[[str], None]) -> None:
        if verify:
            book.note("verified", checks.run(0.2 * options["minutes"], say, dry_run))

    every = [row for section in wanted for row in section.rows]
    with peers.torch_restored():
        _run("gpu rehearsal" if dry_run else "gpu", every, options | facts, drive, rig.clock(), effort, finish)


@main.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="JSON")
@click.option("--plot", "picture", type=_FILE, help="Where the plot goes (PNG).  [default: beside the rows]")
def plot(path: Path, picture: Path | None) -> None:
    """Draw the plot of an earlier run again, from its rows."""
    import json

    _draw(json.loads(path.read_text()), picture or path.with_suffix(".png"))


@main.command()
@click.option("--device", type=click.Choice(["a100", "rtx3090", "rtx4090", "h200"]), default="h200", show_default=True)
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True)
@click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), default="NCHW", show_default=True)
@click.option("--suites", type=_Names(), help="Suites of layers.csv, with commas.  [default: all]")
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Images at once, instead of the table's N.")
def kernels(device: str, **options: Any) -> None:
    """Registers, spills, occupancy and instructions of the CUDA kernels, and the least time of each layer on a device.

    Needs no GPU: the kernels are compiled, not run.
    """
    from rich.console import Console

    from bench import kernels as paper
    from bench import machine_code

    if machine_code.ptxas() is None:
        raise click.ClickException('NVIDIA\'s assembler is missing; pip install "gpuconv[test]"')
    rows = _rows(options | {"lines": (), "precision": "highest"})
    console = Console(width=None if os.isatty(1) else 200)
    paper.show_configurations(paper.configurations(options["dtype"]), console)
    paper.show_layers(rows, paper.DEVICES[device], console)


@main.command()
@click.option("--size", type=click.IntRange(600), default=20_000, show_default=True, help="Rows and columns.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="For the files.  [default: a new one]")
@click.option("--workspace-limit", type=click.IntRange(1), default=256, show_default=True, metavar="MiB")
@click.option("--json", "path", type=_FILE, help="Where the rows go.  [default: a new file in out/]")
def tiled(size: int, folder: Path | None, workspace_limit: int, path: Path | None) -> None:
    """An image from file to file, .npy and Zarr, through a 5×5 kernel: time and peak memory. Linux only.

    Four times the image's bytes of free disk are needed; what is written there is deleted.
    """
    import json
    import tempfile

    from bench import record
    from bench import tiled as driver

    facts = record.machine()
    with tempfile.TemporaryDirectory(prefix="gpuconv-tiled-", dir=folder) as there:
        found = driver.run(Path(there), size, workspace_limit << 20, lambda line: click.echo(line, err=True))
    path = path or Path("out") / f"bench-tiled-{datetime.now():%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts, "versions": record.versions()} | found, indent=1) + "\n")
    click.echo(f"{len(found['rows'])} rows in {path}")


def _draw(data: dict[str, Any], picture: Path) -> None:
    from bench import plot as plots

    click.echo(plots.draw(data, picture) or f"plot in {picture}")


def _check_backend(backend: str | None) -> None:
    from gpuconv import dispatch

    try:
        dispatch.check_backend("bench", backend)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _rows(options: dict[str, Any]) -> list[Row]:
    from bench import layers

    try:
        form = {key: options[key] for key in ("batch", "dtype", "layout", "precision")}
        if options["lines"]:
            if form != {"batch": None, "dtype": "float32", "layout": "NCHW", "precision": "highest"}:
                names = ", ".join(f"--{name}" for name in form)
                raise ValueError(f"{names} are for suites; a problem line has its own, like n4c3h9w9_o8kh3kw3_high_f32")
            return layers.from_lines(options["lines"])
        return layers.load(options["suites"] or layers.suites(), **form)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[Row], None], Callable[[str], None]]]:
    """What to call before each row, and after it with its line: a bar on a terminal, plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield (lambda row: None), (lambda line: click.echo(line, err=True))
        return
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=total)

        # Drawn between rows only: a thread that draws while a row is timed would disturb it.
        def begin(row: Row) -> None:
            progress.update(task, description=f"{row.suite}: {row.name}", refresh=True)

        def say(line: str) -> None:
            console.print(line, markup=False, highlight=False)
            progress.update(task, advance=1, refresh=True)

        yield begin, say


def _run(
    kind: str,
    rows: list[Row],
    options: dict[str, Any],
    drive: Callable[[record.Record, Callable[[Row], None], Callable[[str], None]], str | None],
    clock: Clock,
    effort: Effort,
    finish: Callable[[record.Record, Callable[[str], None]], None] = lambda book, say: None,
) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from bench import record

    settings = {name: value for name, value in options.items() if name not in ("path", "picture")}
    path = options["path"] or Path("out") / f"bench-{kind.replace(' ', '-')}-{datetime.now():%Y%m%d-%H%M%S}.json"
    settings |= {"clock": clock.name, "effort": asdict(effort)}
    book = record.Record(path, kind, settings, rows)
    with _progress(len(rows)) as (begin, say):
        stopped = drive(book, begin, say)
        if stopped != "interrupted":
            finish(book, say)
    record.show(book, Console(width=None if os.isatty(1) else 180))
    click.echo(f"{len(book.data['rows'])} of {len(rows)} rows in {path}")
    _draw(book.data, options["picture"] or path.with_suffix(".png"))
    if "rehearsal" in kind:
        click.echo("A rehearsal: tiny layers on the CPU; its times and ratios say nothing.")
    if stopped == "interrupted":
        raise SystemExit(_INTERRUPTED)
    if book.refusals() or ("rehearsal" in kind and stopped is not None):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
