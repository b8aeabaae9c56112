"""The command line: a demonstration, filters for pictures, and what ``explain`` and ``info`` say.

rich and Pillow are imported by the commands that need them: ``info`` and ``explain`` work with click alone.
"""

from gpuconv.cli import demonstration, filtering, machine
from gpuconv.cli.base import cli

__all__ = ["cli", "demonstration", "filtering", "machine"]
