"""Saving without losing what was there: temporary file in the same folder, fsync, rename."""

import contextlib
import os
import tempfile
from pathlib import Path

from ppsd_cli.errors import ResourceError


def replace_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically; on failure the old file is intact (ResourceError)."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise ResourceError(f"cannot write {path}: {error.strerror or error}") from error
