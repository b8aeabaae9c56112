"""Which tiles are finished, in a file beside the output: what lets a run that was killed go on.

Tiles are written in order, so the record is a number, with a checksum of what they hold and a description of the
problem they belong to. It is replaced as a whole (a new file, flushed, renamed over the old one) after a tile's data
has reached the disk. Killed at any moment, a run leaves the old record or the new one, and neither names a tile that
is not there; at worst one tile is written twice.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv.tiling.storage import sync

_FORMAT = "gpuconv tiles 1"

# What a reader is told of each part of the description.
_NAMES = {
    "problem": "the sizes, dtypes or options",
    "kernel": "the weights of k",
    "bias": "the bias",
    "source": "the source",
    "source_state": "the source's file, which has changed since",
    "out": "out",
    "implementation": "the implementation that runs",
    "version": "the version of gpuconv",
    "tile": "the tiles (by workspace_limit, or the chunks)",
}


class Record:
    """The record in the file ``path``."""

    def __init__(self, call: str, path: Path) -> None:
        self.path, self._call = path, call
        self.description: dict[str, Any] = {}
        self.done, self.checksum = 0, 0

    def describe(self, description: dict[str, Any]) -> None:
        """Say what determines the run's result, in what JSON can hold."""
        self.description = json.loads(json.dumps(description))

    def load(self) -> dict[str, Any] | None:
        """What the file says, or None where there is no file; ValueError where it is no record."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        whole = isinstance(found, dict) and found.get("format") == _FORMAT and isinstance(found.get("of"), dict)
        if not whole or not isinstance(found.get("done"), int) or not isinstance(found.get("checksum"), int):
            raise ValueError(f"{self._call}: resume={str(self.path)!r} is a file, but no record of an unfinished run")
        return found  # type: ignore[no-any-return]

    def resume(self, found: dict[str, Any]) -> None:
        """Go on from ``found``; ValueError where that was another problem."""
        keys = self.description.keys() | found["of"].keys()
        if found["of"].get("source_state") is None:
            keys.discard("source_state")
        other = [key for key in sorted(keys) if self.description.get(key) != found["of"].get(key)]
        if other:
            raise ValueError(
                f"{self._call}: the unfinished run recorded in {self.path} was another one; what differs: "
                f"{', '.join(_NAMES.get(key, key) for key in other)}. Call it as it was called before to go on, or "
                "delete that file to begin anew"
            )
        self.done, self.checksum = found["done"], found["checksum"]

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """One more tile, which holds ``values``, is on the disk."""
        self.checksum = checksum(values, self.checksum)
        self.done += 1
        self.save()

    def expect_repair(self) -> None:
        """The source could not be read: before this goes on somebody will change its file, which is right."""
        self.description["source_state"] = None
        self.save()

    def save(self) -> None:
        """Replace the file."""
        content = {"format": _FORMAT, "done": self.done, "checksum": self.checksum, "of": self.description}
        new = self.path.with_name(f"{self.path.name}.new")
        with new.open("wb") as file:
            file.write(json.dumps(content, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
        sync(self.path.parent)

    def remove(self) -> None:
        """The run is finished."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(f"{self.path.name}.new").unlink(missing_ok=True)


def checksum(values: np.ndarray[Any, Any], before: int = 0) -> int:
    """The checksum of ``values`` behind those that ``before`` is the checksum of."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)
