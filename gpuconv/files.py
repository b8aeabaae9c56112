"""Files written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Write the whole of ``data`` to ``path`` or leave it as it was; ValueError, in one line, where that fails.

    A device or a pipe (``/dev/stdout``) is written to: it must not be replaced by a file.
    """
    target = Path(os.path.realpath(path))  # through a link: what it points to is replaced, not the link
    temporary = target.with_name(f".gpuconv-{secrets.token_hex(6)}.tmp")
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as device:
                device.write(data)
            return
        try:
            with temporary.open("xb") as file:
                file.write(data)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
