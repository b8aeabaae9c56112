"""No compiled kernel reads or writes a byte outside its arrays, nor takes more scratch than was announced.

They work on raw addresses, so that nothing else would tell. ``guard_pages.py`` runs in a child process, whose last line
names the problem that ended it.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpuconv.backends.numba_cpu import runtime

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages by Linux's mprotect"),
    pytest.mark.skipif(runtime.unavailable() is not None, reason="no compiled kernels on this machine"),
    pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="not about the CUDA simulator"),
]
EVERY_DTYPE = "float32,float32,float64,float16,bfloat16"
# Of x and k: what is converted as it is read, and integers, which are summed as floating point.
CONVERTED = "float32,uint8*float32,int16*float64,float32*float64,uint8*int8,int16*uint16"
EVERY_WIDTH = "512,512,256,128"


def child(first: int, count: int, side: str, seconds: int = 600, dtypes: str = "float32", bits: str = "") -> Any:
    """The exit status of the child, and its last lines."""
    script = str(Path(__file__).with_name("guard_pages.py"))
    command = [sys.executable, script, str(first), str(count), str(seconds), side, dtypes]
    done = subprocess.run(
        [*command, bits or str(runtime.vector_bits())], capture_output=True, text=True, timeout=seconds + 300
    )
    lines = done.stdout.splitlines()
    wrong = [pair for pair in itertools.pairwise(lines) if pair[1].startswith("WRONG")]
    shown = "\n".join([*(line for pair in wrong for line in pair), *lines[-1:], done.stderr[:2000]])
    print(f"{side}: {lines[-1] if lines else 'nothing ran'}")
    return done.returncode, shown


@pytest.mark.parametrize("side", ["end", "begin", "memory"])
def test_random_problems(side):
    status, shown = child(0, 24, side)
    assert status == 0, shown


def test_random_problems_of_two_types():
    status, shown = child(100, 10, "end", dtypes=CONVERTED)
    assert status == 0, shown


@pytest.mark.parametrize("side", ["end!0", "end!1", "begin!1", "begin!2"])
def test_an_array_one_byte_off_is_found(side):
    """x, the weights and the result."""
    status, shown = child(0, 20, side)
    assert status == -signal.SIGSEGV, shown
    assert "numba_cpu." in shown and "Segmentation fault" in shown


@pytest.mark.full
@pytest.mark.parametrize("first", [1_000_000, 2_000_000])
@pytest.mark.parametrize("side", ["end", "begin", "memory"])
def test_many_random_problems(side, first):
    status, shown = child(first, 10**6, side, seconds=240, dtypes=f"{EVERY_DTYPE},{CONVERTED}", bits=EVERY_WIDTH)
    assert status == 0, shown
