"""What the tests of the command line share: running it, pictures to feed it, and plain NumPy to check it."""

import inspect
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click", reason="the command line needs the extra `cli`")
pytest.importorskip("rich", reason="the command line needs the extra `cli`")
pytest.importorskip("PIL", reason="the command line needs the extra `cli`")

from click.testing import CliRunner
from PIL import Image

import gpuconv
from gpuconv.cli import cli


def run(*arguments):
    # click 8.1 mixes the streams unless told otherwise; later versions never do.
    apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    return CliRunner(**apart).invoke(cli, [str(argument) for argument in arguments])


def run_program(*arguments, program=("-m", "gpuconv"), **environment):
    """The program in a process of its own, which sees no GPU."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NUMBA_ENABLE_CUDASIM", "NO_COLOR")}
    root = Path(gpuconv.__file__).parent.parent
    ours = {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        env=inherited | ours | environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )


def assert_ran(result):
    assert result.exit_code == 0, (result.stderr, result.exception)


def assert_refused(code, stderr, *parts):
    assert code == 2, stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("gpuconv: ")
    for part in parts:
        assert part in lines[0]


def pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(7).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def save(name, array, **options):
    Image.fromarray(array).save(name, **options)
    return name


def load(name):
    with Image.open(name) as image:
        return np.asarray(image)


def png(width, height, depth, lines):
    """An RGB picture byte by byte: Pillow writes none of 16 bits, and none whose size is a lie."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def filtered(x, k):
    """What the filter must give, in float64 and without gpuconv: edge padding, the odd pixel at the end."""
    k = np.asarray(k, dtype=np.float64)
    pads = [((n - 1) // 2, n // 2) for n in k.shape] + [(0, 0)] * (x.ndim - 2)
    padded = np.pad(x.astype(np.float64), pads, mode="edge")
    return np.einsum("ij...pq,pq->ij...", np.lib.stride_tricks.sliding_window_view(padded, k.shape, (0, 1)), k)


def shown(y, peak=255):
    return np.clip(np.rint(y), 0, peak)
