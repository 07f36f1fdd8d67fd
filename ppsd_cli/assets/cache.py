"""The cache folder, and how things get into it: complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ppsd_cli import files
from ppsd_cli.errors import AssetError, PpsdError

try:
    import fcntl
except ImportError:  # Windows: no lock, the rename alone decides who wins
    fcntl = None  # type: ignore[assignment]

_REMEDY = "set PPSD_CACHE to another folder"


def cache_folder() -> Path:
    """``$PPSD_CACHE``, else ``$XDG_CACHE_HOME/ppsd``, else ``~/.cache/ppsd``; not created here."""
    if own := os.environ.get("PPSD_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "ppsd"
    try:
        return Path.home() / ".cache" / "ppsd"
    except RuntimeError as error:
        raise AssetError("there is no home folder to cache in; set PPSD_CACHE") from error


def make_folder(folder: Path) -> Path:
    """Create ``folder`` (and parents); AssetError when that is not possible."""
    return files.make_folder(folder, _REMEDY)


def storage_error(place: Path, error: OSError) -> PpsdError:
    """The user-facing error for a failed write under ``place``."""
    return files.write_error(place, error, _REMEDY)


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold the lock of ``place`` (a file beside it) against other processes; waits for it."""
    make_folder(place.parent)
    if fcntl is None:
        yield
        return
    try:
        file = (place.parent / f".{place.name}.lock").open("ab")
    except OSError as error:
        raise storage_error(place.parent, error) from error
    with file:
        with contextlib.suppress(OSError):  # a network disk without locks: the rename decides
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """A temporary folder beside ``place``, removed at the end if it is still there."""
    make_folder(place.parent)
    scratch = files.beside(place)
    try:
        scratch.mkdir()
    except OSError as error:
        raise storage_error(place.parent, error) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(temporary: Path, place: Path) -> None:
    """Make ``temporary`` (file or folder, same parent's disk) durable and rename it to ``place``.

    When another process has put a folder there first, its result stays and ours is dropped.
    """
    whole = [temporary] if temporary.is_file() else [p for p in temporary.rglob("*") if p.is_file()]
    try:
        for file in whole:
            files.sync(file)
        temporary.replace(place)
    except OSError as error:
        if temporary.is_dir() and place.is_dir():
            return
        raise storage_error(place.parent, error) from error
    files.sync_folder(place.parent)
