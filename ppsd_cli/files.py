"""Saving without losing what was there: a temporary file in the same folder, fsync, rename."""

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ppsd_cli.errors import AssetError, PpsdError, ResourceError

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_ELSEWHERE = "choose another place"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to be filled; it takes the place of ``path`` if nothing fails.

    On failure the old file is intact. A link is followed, the permissions of an old file are
    kept, and a device or pipe is written in place. Raises what ``write_error`` gives.
    """
    try:
        if not _replaceable(path):
            yield path
            return
        target = path.resolve()
        temporary = beside(target)
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            permissions = temporary.stat().st_mode & 0o777
            yield temporary
            if target.exists():
                permissions = target.stat().st_mode & 0o777
            temporary.chmod(permissions)  # whoever filled it may have made a file of its own
            sync(temporary)
            temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise write_error(path, error) from error
    sync_folder(target.parent)


def replace_bytes(path: Path, data: bytes) -> None:
    """Make ``data`` the content of ``path``, all of it or, after an error, nothing."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def append_line(path: Path, line: str) -> None:
    """Add one line of text to ``path``."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise write_error(path, error) from error


def make_folder(folder: Path, remedy: str = _ELSEWHERE) -> Path:
    """Create ``folder`` (and parents) if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error, remedy) from error
    return folder


def check_writable(path: Path) -> None:
    """Raise unless a file can be written at ``path``; an old file is left alone."""
    if path.is_dir():
        raise AssetError(f"cannot write {path}: it is a folder; name a file")
    if not path.parent.is_dir():
        raise AssetError(f"cannot write {path}: folder {path.parent} does not exist")
    try:
        if _replaceable(path):
            with tempfile.TemporaryFile(dir=path.resolve().parent):
                pass
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise write_error(path, error) from error


def write_error(place: Path, error: OSError, remedy: str = _ELSEWHERE) -> PpsdError:
    """The error for a failed write: ResourceError when the disk is full, else AssetError."""
    if error.errno in _FULL_DISK:
        return ResourceError(f"no space left to write {place}; free some, or {remedy}")
    return AssetError(f"cannot write {place}: {error.strerror or type(error).__name__}; {remedy}")


def beside(path: Path) -> Path:
    """A hidden name in the folder of ``path`` that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Make the content of a file durable."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the platform can."""
    with contextlib.suppress(OSError):
        sync(folder)


def _replaceable(path: Path) -> bool:
    """Whether ``path`` is an ordinary file or free; a device or pipe is written in place."""
    return path.is_file() or not path.exists()
