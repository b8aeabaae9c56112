"""The console script ``gpuconv`` and ``python -m gpuconv``: finds the command line, or says how to install it."""

from __future__ import annotations

import sys

# What the extra `cli` brings. Exact names: a Pillow that lacks a part of itself (PIL._imaging) is broken, not absent.
_EXTRA = ("click", "rich", "PIL")


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from gpuconv.cli import cli

        cli.main(prog_name="gpuconv")
    except ModuleNotFoundError as error:  # rich and Pillow are imported by the commands that need them
        if error.name not in _EXTRA:
            raise
        sys.stderr.write('gpuconv: the command line needs the cli extra: pip install "gpuconv[cli]"\n')
        sys.exit(2)


if __name__ == "__main__":
    main()
