"""``python -m bench tiled``: an image larger than the memory it may take, from file to file.

Each way is a process of its own, whose peak of resident memory is the kernel's own figure (VmHWM: every page that it
had in memory at once, those of Python, NumPy and Numba included). The source is evicted from the system's cache first;
the time is that of the call, and of all until the result is on the disk. Parts of the result, borders among them, are
compared with SciPy in float64 before any figure is reported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 1024
KINDS = ("npy", "zarr")
_PART = 2000  # rows for what is measured in memory


def make(folder: Path, size: int) -> None:
    """The image, float32 of ``size`` × ``size``, as .npy and as .zarr, written by rows of chunks."""
    import zarr

    rng = np.random.default_rng(0)
    plain = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float32, shape=(size, size))
    stored = zarr.create_array(folder / "x.zarr", shape=(size, size), chunks=(CHUNK, CHUNK), dtype="float32")
    for start in range(0, size, CHUNK):
        rows = rng.standard_normal((min(CHUNK, size - start), size), dtype=np.float32)
        plain[start : start + CHUNK] = rows
        stored[start : start + CHUNK] = rows
    plain.flush()


def opened(folder: Path, kind: str, size: int) -> tuple[Any, Any]:
    """Source and output of one kind."""
    import zarr

    if kind == "npy":
        out = np.lib.format.open_memmap(folder / "y.npy", mode="w+", dtype=np.float32, shape=(size, size))
        return np.load(folder / "x.npy", mmap_mode="r"), out
    out = zarr.create_array(folder / "y.zarr", shape=(size, size), chunks=(CHUNK, CHUNK), dtype="float32")
    return zarr.open_array(folder / "x.zarr", mode="r"), out


def kernel() -> np.ndarray[Any, Any]:
    """5×5 weights of no structure that could be used."""
    return np.random.default_rng(1).standard_normal((5, 5), dtype=np.float32)


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def evict(path: Path) -> None:
    """Drop a file, or all in a folder, from the system's cache."""
    for file in files(path):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)  # what is not on the disk yet cannot be dropped
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def memory(field: str) -> int:
    """Bytes of ``VmHWM`` (the peak) or ``VmRSS`` (now) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def child(folder: Path, kind: str, size: int, limit: int, resume: bool) -> dict[str, Any]:
    """One run; what it took."""
    import gpuconv

    source, out = opened(folder, kind, size)
    k = kernel()
    gpuconv.conv2d(np.zeros((64, 512), np.float32), k)  # compiles, or loads what was compiled
    before = memory("VmRSS")
    start = time.perf_counter()
    gpuconv.conv2d_tiled(source, k, out, padding="same", padding_mode="reflect", workspace_limit=limit, resume=resume)
    called = time.perf_counter() - start
    peak = memory("VmHWM")
    for file in files(folder / f"y.{kind}"):
        with file.open("rb") as written:
            os.fsync(written.fileno())
    return {
        "seconds": called, "seconds_until_on_disk": time.perf_counter() - start, "peak_bytes": peak,
        "bytes_before_the_call": before,
    }  # fmt: skip


def in_memory(folder: Path, size: int) -> dict[str, Any]:
    """Seconds per pixel of the same filter on a part in memory: ``conv2d`` and SciPy."""
    from scipy import ndimage

    import gpuconv

    x, k = np.array(np.load(folder / "x.npy", mmap_mode="r")[: min(_PART, size)]), kernel()

    def best(call: Callable[[], Any], times: int) -> float:
        def once() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return min(once() for _ in range(times)) / x.size

    ours = best(lambda: gpuconv.conv2d(x, k, padding="same", padding_mode="reflect"), 4)
    return {"conv2d": ours, "scipy.ndimage.correlate": best(lambda: ndimage.correlate(x, k, mode="mirror"), 2)}


def error(folder: Path, kind: str, size: int) -> float:
    """Largest difference from SciPy in float64 in the corners, in the middle and across tiles."""
    from scipy import ndimage

    x = np.load(folder / "x.npy", mmap_mode="r")
    import zarr

    y = np.load(folder / "y.npy", mmap_mode="r") if kind == "npy" else zarr.open_array(folder / "y.zarr", mode="r")
    k, side, worst = kernel().astype(np.float64), min(600, size), 0.0
    far = size - side
    for top, left in ((0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2), (far // 3, far // 2)):
        # With a border of real pixels where there are any: what SciPy makes of its own border is cut off.
        i, j = max(top - 8, 0), max(left - 8, 0)
        wide = np.asarray(x[i : top + side + 8, j : left + side + 8], dtype=np.float64)
        wanted = ndimage.correlate(wide, k, mode="mirror")[top - i :, left - j :][:side, :side]
        found = np.asarray(y[top : top + side, left : left + side], dtype=np.float64)
        worst = max(worst, float(np.abs(found - wanted).max()))
    return worst


def run(folder: Path, size: int, limit: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the files, run each way, check and measure."""
    say(f"an image of {size} × {size} float32, {size * size * 4 / 1e9:.2f} GB, twice in {folder}")
    _apart("make", folder, size)
    rows = []
    for kind in KINDS:
        for resume in (False, True):
            evict(folder / f"x.{kind}")
            row = {"kind": kind, "resume": resume} | _apart("child", folder, kind, size, limit, resume)
            row["largest_error"] = _apart("error", folder, kind, size)
            if not row["largest_error"] < 1e-4:
                raise RuntimeError(f"{kind}: wrong by {row['largest_error']}; not timed")
            row["megapixels_per_second"] = size * size / 1e6 / row["seconds"]
            rows.append(row)
            recorded = ", each tile flushed and recorded" if resume else ""
            say(
                f"{kind} → {kind}{recorded}: {row['seconds']:.1f} s ({row['seconds_until_on_disk']:.1f} s until on the "
                f"disk), peak {row['peak_bytes'] / 2**20:.0f} MiB"
            )
            _apart("forget", folder, kind)
    part = _apart("in_memory", folder, size)
    for name, seconds in part.items():
        say(f"{name} in memory, {min(_PART, size)} rows: {1e-6 / seconds:.0f} megapixels per second")
    return {"size": size, "workspace_limit": limit, "chunk": CHUNK, "rows": rows, "seconds_per_pixel_in_memory": part}


def forget(folder: Path, kind: str) -> None:
    """Delete a result."""
    import shutil

    path = folder / f"y.{kind}"
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _apart(step: str, folder: Path, *arguments: Any) -> Any:
    """What ``step`` gives in a process of its own."""
    line = json.dumps([step, str(folder), *arguments])
    done = subprocess.run([sys.executable, "-m", "bench.tiled", line], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    step, where, *rest = json.loads(sys.argv[1])
    steps = {"make": make, "child": child, "error": error, "in_memory": in_memory, "forget": forget}
    print(json.dumps(steps[step](Path(where), *rest)))
