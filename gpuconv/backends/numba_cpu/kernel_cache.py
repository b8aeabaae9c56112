"""Compiled kernels kept between processes, in the folder of ``cache_folder``.

Loading compiled code is running it, so the folder must belong to this user and be closed to everyone else. Where there
is no such folder, kernels are compiled anew in each process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import platform
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult

from gpuconv.cache_folder import folder, usable

__all__ = ["KernelCache", "alone", "folder", "usable"]


def _digest() -> bytes:
    """A digest of the code that kernels are made of and of what compiles it: another one, another kernel."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for version in (numba.__version__, llvmlite.__version__, platform.python_version(), sys.implementation.cache_tag):
        digest.update(str(version).encode())
    return digest.digest()


# Taken when the code is loaded: files that change later, in an upgrade, are not what this process compiles.
_SOURCES = _digest()


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under a name that no other process gives to anything.

    Machine code from the cache is linked by name. Numba's names are those of the source with a count of this process,
    so that two functions from one place in the source, compiled in two processes, could be taken for one another.
    """
    function.__qualname__ = f"{function.__qualname__}_{uuid.uuid4().hex}"
    return function


_DIGEST = 32  # bytes of the digest that a file begins with


class KernelCache(_Cache):  # type: ignore[misc]
    """One file for one compiled function; what Numba's compilers ask for under the name of a cache."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def cache_path(self) -> str:
        """The folder."""
        return str(folder())

    def enable(self) -> None:
        """It always is."""

    def disable(self) -> None:
        """It never is."""

    def flush(self) -> None:
        """Nothing is held back."""

    def path(self, codegen: Any) -> Path | None:
        """The file of this function for the processor that ``codegen`` compiles for."""
        place, _ = usable()
        if place is None:
            return None
        digest = hashlib.sha256(_SOURCES)
        digest.update(repr((self.name, codegen.magic_tuple())).encode())
        return place / f"{self.name}-{digest.hexdigest()[:16]}.kernel"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function from its file; None when there is none that can be read."""
        target_context.refresh()
        path = self.path(target_context.codegen())
        if path is None:
            return None
        try:
            content = path.read_bytes()
            kept = content[_DIGEST:]
            if hashlib.sha256(kept).digest() != content[:_DIGEST]:  # cut short or damaged: compile anew, replace it
                return None
            return CompileResult._rebuild(target_context, *pickle.loads(kept))
        except Exception:  # no file, or one of another making
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write the compiled function to its file; a disk that cannot take it is no reason to stop."""
        path = self.path(data.codegen)
        if path is None or data.library.has_dynamic_globals:
            return
        with contextlib.suppress(OSError):
            descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=".part-")  # mode 0600
            try:
                kept = pickle.dumps(data._reduce(), protocol=-1)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(kept).digest() + kept)
                os.replace(beside, path)
            except BaseException:
                os.unlink(beside)
                raise
