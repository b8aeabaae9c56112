"""What every command shares: the group, errors and warnings as one line each on stderr, common options."""

from __future__ import annotations

import codecs
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import click

import gpuconv

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
            if sys.stdout is not None:  # closed by the caller (>&-)
                sys.stdout.flush()
        except click.exceptions.Abort:
            say("interrupted")
            sys.exit(_INTERRUPTED)
        except click.UsageError as error:
            context = error.ctx.command_path if error.ctx else "gpuconv"
            say(f"{error.format_message()} (see {context} --help)")
            sys.exit(_FAILED)
        except click.ClickException as error:
            say(error.format_message())
            sys.exit(_FAILED)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC):
                raise
            # Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if error.errno == errno.EPIPE:  # the reader of our output, `head` perhaps, has gone
                sys.exit(1)
            say(f"cannot write the output: {error.strerror}")
            sys.exit(_FAILED)
        sys.exit(code if isinstance(code, int) else 0)


def say(message: str) -> None:
    """Print one line on stderr."""
    click.echo(f"gpuconv: {_one_line(message)}", err=True)


def _one_line(message: str) -> str:
    """The lines of ``message`` after one another; a list of reasons stays a list."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    return "".join(f"{line} " if line[-1] in ":;,." else f"{line}; " for line in lines).rstrip("; ")


@contextmanager
def reported() -> Iterator[None]:
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
            say(f"warning: {message}")


def shape(text: str) -> tuple[int, ...]:
    """``8,3,224,224`` or ``8x3x224x224``."""
    try:
        return tuple(int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a shape such as 8,3,224,224") from None


def steps(text: str) -> Any:
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


def where_options(command: _Command) -> _Command:
    """Add ``--device`` and ``--backend``."""
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


def json_option(command: _Command) -> _Command:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for a program to read.")(
        command
    )


def print_json(fields: dict[str, Any]) -> None:
    """Print ``fields`` as one JSON object on one line; in ASCII, which every terminal and pipe carries unchanged."""
    click.echo(json.dumps(fields, allow_nan=False))


EPILOG = (
    "Exit codes: 0 done; 1 the reader of the output went away; 2 wrong arguments, a file that cannot be read or "
    "written, or nothing that can run; 130 interrupted."
)


@click.group(cls=_Group, invoke_without_command=True, epilog=EPILOG)
@click.version_option(gpuconv.__version__, prog_name="gpuconv", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """2-D convolution, on the GPU or the CPU."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
