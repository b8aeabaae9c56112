"""What ``gpuconv.autotune`` has measured, in a file of the user's own that people can read.

``tuning.json`` in the cache folder holds, by GPU, software, problem and workspace, the configuration that was fastest:
a tile and a number of parts for every launch. Plans ask for it before they ask the cost model. The file is data: a name
that is not known here, or a number out of range, is not used.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gpuconv._version import __version__
from gpuconv.backends.numba_cuda import convert, cost, gpus, launch
from gpuconv.backends.numba_cuda.cost import Candidate
from gpuconv.backends.protocol import Target
from gpuconv.cache_folder import usable
from gpuconv.problem import Conv2dProblem

FILE = "tuning.json"
FORMAT = "gpuconv tuning 1"
_ENTRIES = 4096  # the oldest make room
_BYTES = 2**24  # of a file that is read at all

_PACKAGES = ("numba", "numba-cuda", "cuda-toolkit", "nvidia-cuda-nvcc", "nvidia-cuda-nvvm")


@dataclass(frozen=True)
class Tuned:
    """A configuration that was measured."""

    configuration: tuple[Candidate, ...]
    seconds: float


@lru_cache(maxsize=1)
def software() -> str:
    """The versions that machine code and its speed depend on."""
    from importlib import metadata

    from numba import cuda
    from numba.cuda.cudadrv.driver import driver

    found = [f"gpuconv {__version__}", f"driver {_dotted(driver.get_version())}"]
    found.append(f"CUDA {_dotted(cuda.runtime.get_version())}")
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def _dotted(version: Any) -> str:
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def key(name: str, problem: Conv2dProblem, target: Target, limit: int) -> str | None:
    """What a measurement holds for: every fact that changes it. None where no GPU is there to be measured."""
    if target.gpu is not None or convert.simulated() or launch.unavailable() is not None:
        return None
    return f"{gpus.of(target).name} | {software()} | {name} | {problem} | workspace {limit}"


def find(key: str | None, tiles: Iterable[Any], works: Sequence[cost.Work], least: Sequence[int]) -> Tuned | None:
    """What is remembered under ``key``; None where nothing is, or nothing that fits ``works``.

    ``tiles`` are the shapes that there are, ``least`` the fewest parts of each piece of work.
    """
    if key is None:
        return None
    entry = _read().get(key)
    if entry is None:
        return None
    known = {tile.name: tile for tile in tiles}
    try:
        chosen = [(known[name], parts) for name, parts in entry["configuration"]]
        seconds = float(entry["seconds"])
        for (_, parts), work, fewest in zip(chosen, works, least, strict=True):
            if type(parts) is not int or parts < fewest or parts != cost.whole(work.slices, parts):
                raise ValueError(parts)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        _complain(f"an entry for {key!r} is not one of this version's; it is not used")
        return None
    return Tuned(tuple(Candidate(tile, parts, 0.0) for tile, parts in chosen), seconds)


def remember(key: str, configuration: Sequence[Candidate], seconds: float) -> Path | str:
    """Write down what was fastest: the file's path, or why nothing is kept."""
    place, said = usable()
    if place is None:
        return said
    entry = {"configuration": [[found.tile.name, found.parts] for found in configuration], "seconds": seconds}
    try:
        with _alone(place):
            # What others wrote in the meantime stays; of this key the last one's word counts.
            entries = _load(place / FILE)
            entries.pop(key, None)
            entries[key] = entry
            kept = dict(list(entries.items())[-_ENTRIES:])
            _replace(place / FILE, json.dumps({"format": FORMAT, "entries": kept}, indent=1, ensure_ascii=False))
    except OSError as error:
        return f"{place / FILE} cannot be written ({error})"
    return place / FILE


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Keep other processes from writing meanwhile; where the system has no such locks, the last one wins."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    descriptor = os.open(place / f"{FILE}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    beside = path.with_name(f".part-{os.urandom(8).hex()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


# The entries as they were last read, and the state of the file then.
_last: dict[str, Any] = {"state": None, "entries": {}}


def _read() -> dict[str, Any]:
    """The entries of the file, read again when it has changed."""
    place, _ = usable()
    if place is None:
        return {}
    path = place / FILE
    try:
        facts = path.lstat()
    except OSError:
        return {}
    state = str(path), facts.st_mtime_ns, facts.st_size, facts.st_ino
    if _last["state"] != state:
        _last.update(entries=_load(path), state=state)
    entries: dict[str, Any] = _last["entries"]
    return entries


def _load(path: Path) -> dict[str, Any]:
    """The entries of ``path``; none, and a warning, where it is damaged or not ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return {}
    except OSError as error:
        _complain(f"{path} cannot be read ({error}); it is not used")
        return {}
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        foreign = hasattr(os, "geteuid") and facts.st_uid != os.geteuid()
        if foreign or not stat.S_ISREG(facts.st_mode) or facts.st_size > _BYTES:
            _complain(f"{path} is not a file of yours of at most {_BYTES} bytes; it is not used")
            return {}
        text = file.read()
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        return dict(content["entries"])
    except (KeyError, TypeError, ValueError, RecursionError):
        _complain(f"{path} is damaged, or of another version; it is not used")
        return {}


def _complain(sentence: str) -> None:
    warnings.warn(f"gpuconv: tuning: {sentence}", RuntimeWarning, stacklevel=2)
