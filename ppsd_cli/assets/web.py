"""One file from a web address, checked by its sha256 and kept in the cache.

For data that is on no package index. The address names a commit, so that the content is fixed;
the checksum proves it. Proxies of the environment are honoured.
"""

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppsd_cli.assets.cache import cache_folder, locked, publish, scratch_folder, storage_error
from ppsd_cli.assets.hashing import file_sha256
from ppsd_cli.errors import AssetError

Progress = Callable[[str], None]
_CHUNK = 1 << 16
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class WebSource:
    """A file at ``url`` (https). ``limit``: bytes that it cannot exceed."""

    url: str
    sha256: str
    limit: int

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]


def cached_web_file(source: WebSource) -> Path | None:
    """The file if it is in the cache and whole; touches no network."""
    place = _place(source)
    return place if place.is_file() and file_sha256(place) == source.sha256 else None


def fetch_web_file(
    source: WebSource, *, offline: bool = False, progress: Progress | None = None
) -> Path:
    """The cached file, downloaded first if need be.

    AssetError when it is not cached and ``offline``, the download fails, or the content is not
    the expected one; ResourceError when the disk is full.
    """
    assert source.url.startswith("https://")
    if (there := cached_web_file(source)) is not None:
        return there
    place = _place(source)
    if offline:
        raise AssetError(
            f"{source.url} is not in the cache; run once without --offline and HF_HUB_OFFLINE, "
            f"or put the file at {place}"
        )
    with locked(place):
        if (there := cached_web_file(source)) is not None:
            return there
        with scratch_folder(place) as scratch:
            if progress is not None:
                progress(f"downloading {source.url}")
            fetched = scratch / "file"
            _download(source, fetched, place)
            publish(fetched, place)
    return place


def _place(source: WebSource) -> Path:
    return cache_folder() / "web" / source.sha256[:16] / source.file_name


def _download(source: WebSource, target: Path, place: Path) -> None:
    """Fetch to ``target`` in pieces, checking length and sha256."""
    request = urllib.request.Request(source.url, headers={"User-Agent": "ppsd"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            digest = _copy(answer, target, source)
    except urllib.error.HTTPError as error:
        raise AssetError(f"{source.url} answered {error.code}; try again later") from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise AssetError(
            f"cannot download {source.url} ({type(reason).__name__}); check the network, "
            f"or put the file at {place}"
        ) from error
    if digest != source.sha256:
        raise AssetError(
            f"{source.url} is not the expected file (sha256 {digest[:16]}, "
            f"expected {source.sha256[:16]}); check the network's proxy and try again"
        )


def _copy(answer: Any, target: Path, source: WebSource) -> str:
    """Copy the body to ``target``; returns its sha256."""
    digest, total = hashlib.sha256(), 0
    try:
        file = target.open("xb")
    except OSError as error:
        raise storage_error(target.parent, error) from error
    with file:
        while chunk := answer.read(_CHUNK):
            total += len(chunk)
            if total > source.limit:
                raise AssetError(
                    f"{source.url} is not the expected file: more than {source.limit} bytes; "
                    "check the network's proxy and try again"
                )
            digest.update(chunk)
            try:
                file.write(chunk)
            except OSError as error:
                raise storage_error(target.parent, error) from error
    return digest.hexdigest()
