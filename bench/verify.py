"""After the figures: the tests that need a GPU, and every CUDA kernel under ``compute-sanitizer``, where it is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# What only a GPU can show, most telling first; the rest of the tests takes many minutes and little of it is a GPU's.
GPU_TESTS = (
    "tests/test_gpu_memory.py",
    "tests/test_streamed.py",
    "tests/test_streamed_gradients.py",
    "tests/test_streamed_numba.py",
    "tests/test_implementations.py",
    "tests/test_family.py",
)

# A small convolution and both gradients on each usable implementation, in the dtypes that have kernels of their own.
KERNELS = """
import numpy as np, gpuconv
from gpuconv import dispatch
ran = 0
for name in dispatch.serving("forward", {device!r}):
    if dispatch.implementation(name).unavailable() is not None:
        continue
    for dtype in ("float32", "float16", "float64", "int8"):
        x, k = np.ones((2, 6, 9, 11), dtype), np.ones((8, 3, 3, 3), dtype)
        options = {{"padding": 1, "groups": 2, "backend": name}}
        try:
            y = gpuconv.conv2d(x, k, **options)
            gpuconv.grad.conv2d_input(x.shape, k, y.astype(dtype), **options)
            gpuconv.grad.conv2d_weight(x, k.shape, y.astype(dtype), **options)
        except gpuconv.NoBackendError:
            continue
        ran += 1
assert ran, "no implementation ran"
print(ran, "dtypes and implementations")
"""


def run(minutes: float, say: Callable[[str], None], rehearsal: bool = False) -> dict[str, Any]:
    """Each check with what came of it, within about ``minutes``; a check that cannot run says why."""
    tests = ["tests/test_geometry.py"] if rehearsal else [*GPU_TESTS, "-k", "cupy or numba_cuda or gpu or streamed"]
    checks: dict[str, list[str] | str] = {"tests": _pytest(tests)}
    script = [sys.executable, "-c", KERNELS.format(device="cpu" if rehearsal else "cuda")]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck", "initcheck"):
        if rehearsal:
            checks[f"rehearsal of {tool}"] = script
            break
        missing = "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", *script]
        checks[tool] = command if sanitizer else missing
    deadline = time.monotonic() + 60 * minutes
    found: dict[str, Any] = {}
    for index, (name, command) in enumerate(checks.items()):
        left = (deadline - time.monotonic()) / (len(checks) - index)
        found[name] = {"skipped": command} if isinstance(command, str) else _timed(command, left)
        say(f"{name}: " + "; ".join(f"{value}" for value in found[name].values()))
    return found


def _pytest(tests: list[str]) -> list[str] | str:
    if not (ROOT / "tests").is_dir():
        return "the tests are not here"
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]


def _timed(command: list[str], seconds: float) -> dict[str, Any]:
    if seconds <= 0:
        return {"skipped": "out of time"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    try:
        # A session of its own, to be ended with all that it has started: a child may be what hangs on the GPU.
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    except OSError as error:
        return {"skipped": str(error)}
    with process:
        try:
            said, complained = process.communicate(timeout=seconds)
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"stopped": f"after {seconds:.3g} s", "said": _last_line(error.stdout)}
    outcome = "passed" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    return {"outcome": outcome, "said": _last_line(said) or _last_line(complained)}


def _end(process: subprocess.Popen[str]) -> None:
    """Kill it and its children."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _last_line(text: str | bytes | None) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def versions(device: str) -> str:
    """The GPU and the version of everything that takes part, on a line."""
    from bench import record

    return f"{device}: " + ", ".join(f"{name} {version}" for name, version in record.versions().items())


def missing() -> list[str]:
    """What this run goes without, each with its remedy."""
    from bench import peers
    from gpuconv import dispatch, machine

    found = list(machine.info().mismatches)
    found += [f"{name}: {reason}" for name, reason in _unusable(dispatch)]
    torch = peers.PEERS["torch"].missing()
    if torch is None:
        import torch as pytorch

        torch = None if pytorch.cuda.is_available() else "this PyTorch finds no GPU; install a build for CUDA"
    found += [f"cuDNN: {torch}"] if torch else []
    if shutil.which("compute-sanitizer") is None:
        found.append("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    return found


def _unusable(dispatch: Any) -> list[tuple[str, str]]:
    reasons = [(name, dispatch.implementation(name).unavailable()) for name in dispatch.serving("forward", "cuda")]
    return [(name, reason) for name, reason in reasons if reason is not None]
