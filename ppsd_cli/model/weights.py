"""Single tensors out of a folder of safetensors, and atomic saving of one file.

Reads only what is asked for, so a stage process never holds other stages' weights.
"""

import errno
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ppsd_cli.errors import AssetError
from ppsd_cli.files import replacing
from ppsd_cli.model.shards import SINGLE, weight_files

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}


class Checkpoint:
    """The tensors of a model folder, or of one safetensors file, read on demand.

    Opening reads headers only. AssetError, naming the file, when the folder has no weights or a
    file is missing, truncated or lacks a tensor that the index promises. ``described_by`` is the
    file that errors about shapes and absent tensors point to.
    """

    def __init__(self, place: Path, *, described_by: str = "config.json") -> None:
        self.folder = place
        self._described_by = described_by
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        for path in [place] if place.suffix == ".safetensors" else weight_files(place):
            handle = _open(path)
            self._handles[path] = handle
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                self._files.setdefault(name, path)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._files)

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor ``name``."""
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``, from the header."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def tensor(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Read one tensor, as ``dtype`` if given; its memory may be a view of the mapped file.

        AssetError when it is absent, has another shape than ``shape``, or is no float tensor
        although a float ``dtype`` is wanted (a quantized checkpoint).
        """
        handle = self._handle(name)
        path = self._files[name]
        found = self.shape(name)
        if shape is not None and found != tuple(shape):
            raise AssetError(
                f"{path}: {name} has shape {list(found)}, "
                f"but {self._described_by} implies {list(shape)}"
            )
        try:
            value: torch.Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise AssetError(f"{path}: cannot read {name}: {_line(error)}") from error
        if dtype is None:
            return value
        if dtype.is_floating_point and value.dtype not in _FLOATS:
            raise AssetError(
                f"{path}: {name} is {value.dtype}; quantized checkpoints are not supported, "
                "use the unquantized model or a .gguf"
            )
        return value.to(dtype)

    def nbytes(self, names: Iterable[str], dtype: torch.dtype | None = None) -> int:
        """Bytes that ``names`` take together, in their stored type or as ``dtype``."""
        total = 0
        for name in names:
            part = self._handle(name).get_slice(name)
            elements = 1
            for size in part.get_shape():
                elements *= size
            total += elements * (dtype.itemsize if dtype else _ITEM_BYTES.get(part.get_dtype(), 1))
        return total

    def _handle(self, name: str) -> Any:
        path = self._files.get(name)
        if path is None:
            single = self.folder / SINGLE
            where = single if single.is_file() else self.folder
            raise AssetError(
                f"{where} has no tensor {name}; it does not fit its {self._described_by}"
            )
        return self._handles[path]


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file in one step: it is there completely or the old one is untouched.

    ResourceError when the disk is full, AssetError when the place cannot be written.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(ready, temporary, dict(metadata))
        except SafetensorError as error:
            number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            raise OSError(number, _line(error)) from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise AssetError(
            f"{path} is truncated or no safetensors file ({_line(error)}); download it again"
        ) from error


def _line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__
