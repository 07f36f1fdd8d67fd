"""Checksums: what a head was trained on must be what is served."""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path

from ppsd_cli.assets.cache import cache_folder, make_folder
from ppsd_cli.errors import AssetError, PpsdError
from ppsd_cli.files import replace_bytes
from ppsd_cli.model.shards import weight_files
from ppsd_cli.model.spec_reader import read_spec

_Entry = tuple[int, int, str]


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, remembered in the cache by (path, size, mtime)."""
    try:
        before = path.stat()
        key = str(path.resolve())
        known = _read_known()
        entry = known.get(key)
        if entry is not None and entry[:2] == (before.st_size, before.st_mtime_ns):
            return entry[2]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = path.stat()
    except OSError as error:
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error
    if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
        _remember(key, (after.st_size, after.st_mtime_ns, digest))
    return digest


def folder_hash(folder: Path) -> str:
    """``sha256:<hex>`` over the weight files used and what config.json says of the shape.

    The same whatever dtype is asked for; tokenizer and generation settings do not count.
    """
    total = hashlib.sha256()
    for path in weight_files(folder):
        total.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    spec = dataclasses.asdict(read_spec(folder))
    total.update(json.dumps(spec, sort_keys=True).encode())
    return f"sha256:{total.hexdigest()}"


def _store() -> Path:
    return cache_folder() / "hashes.json"


def _read_known() -> dict[str, _Entry]:
    """What is remembered; a missing or garbled file means nothing is."""
    try:
        stored = json.loads(_store().read_bytes())
        return {
            path: (int(size), int(mtime), str(digest))
            for path, (size, mtime, digest) in stored.items()
            if len(digest) == 64
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(key: str, entry: _Entry) -> None:
    """Add one entry and drop those of deleted files; a cache that cannot be written is no error."""
    known = {path: old for path, old in _read_known().items() if Path(path).exists()}
    known[key] = entry
    with contextlib.suppress(PpsdError):
        make_folder(_store().parent)
        replace_bytes(_store(), json.dumps(known).encode())
