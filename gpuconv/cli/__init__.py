"""The command line: a demonstration, filters for pictures, one convolution in steps, what ``explain`` and ``info`` say.

rich and Pillow are imported by the commands that need them: ``info``, ``explain`` and ``trace`` work with click alone.
"""

from gpuconv.cli import demonstration, filtering, machine, tracing
from gpuconv.cli.base import cli

__all__ = ["cli", "demonstration", "filtering", "machine", "tracing"]
