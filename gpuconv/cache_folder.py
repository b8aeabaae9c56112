"""Where things are kept between processes: a folder of the user's own, or nowhere.

It must belong to this user and be closed to everyone else (mode 0700). A folder that is not is left alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path


def folder() -> Path:
    """``GPUCONV_CACHE_DIR``, or ``gpuconv`` in the user's own cache folder."""
    chosen = os.environ.get("GPUCONV_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "gpuconv"


def usable() -> tuple[Path | None, str]:
    """The folder, made if need be, and its path; or None, and why nothing is kept."""
    try:
        place = folder()
        _make(place)
        facts = place.stat()
    except (OSError, RuntimeError) as error:
        return None, f"no cache folder can be had ({error})"
    if not stat.S_ISDIR(facts.st_mode):
        return None, f"{place} is not a folder"
    if hasattr(os, "geteuid"):
        if facts.st_uid != os.geteuid():
            return None, f"{place} belongs to another user"
        if facts.st_mode & 0o077:
            return None, f"{place} is open to others (mode {facts.st_mode & 0o777:o}); chmod 700 it"
    return place, str(place)


def _make(place: Path) -> None:
    """Make ``place`` and what is missing above it, all closed to others."""
    if not place.exists():
        _make(place.parent)
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700)
