"""Check a GGUF file before any library parses it.

The header's counts, lengths and offsets come from whoever made the file, and parsers trust them:
43 bytes are enough to hang one. Here every length is held against the file's size first.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppsd_cli.errors import AssetError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_NESTING = 4
_MAX_DIMENSIONS = 4
_SMALLEST_KV = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """``values`` has scalars and text, and the length (int) of each array; ``shapes`` are ggml's,
    fastest dimension first."""

    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def elements(self) -> int:
        """Number of weights in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_gguf_header(path: Path) -> GgufHeader:
    """Walk header, key-value section and tensor table; AssetError when anything does not fit."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise AssetError(f"{path} is too short for a GGUF file; download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walker(path, data).walk()
    except OSError as error:
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error


class _Walker:
    """A cursor over the file's bytes that never goes past their end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0

    def walk(self) -> GgufHeader:
        if self.take(4) != b"GGUF":
            self.fail("it does not start with 'GGUF'")
        version = self.scalar("I")
        if version not in (2, 3):
            self.fail(f"version {version} is not supported; convert it to little-endian version 3")
        tensors, pairs = self.scalar("Q"), self.scalar("Q")
        self.expect_room(tensors, _SMALLEST_TENSOR, "tensors")
        self.expect_room(pairs, _SMALLEST_KV, "key-value pairs")
        values: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.text()
            if key in values:
                self.fail(f"key {key[:60]!r} occurs twice")
            values[key] = self.value(self.scalar("I"))
        return GgufHeader(values=values, shapes=self.tensor_table(tensors, values))

    def tensor_table(self, count: int, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 65536 or alignment % 8:
            self.fail(f"alignment {alignment!r} is not a multiple of 8")
        shapes: dict[str, tuple[int, ...]] = {}
        end = 0
        for _ in range(count):
            name = self.text()
            if name in shapes:
                self.fail(f"tensor {name[:60]!r} occurs twice")
            dimensions = self.scalar("I")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                self.fail(f"tensor {name[:60]!r} has {dimensions} dimensions")
            shapes[name] = tuple(self.scalar("Q") for _ in range(dimensions))
            needed = self.tensor_bytes(name, shapes[name], self.scalar("I"))
            offset = self.scalar("Q")
            if offset % alignment:
                self.fail(f"tensor {name[:60]!r} is not aligned")
            end = max(end, offset + needed)
        start = -(-self.at // alignment) * alignment
        if start + end > self.size:
            self.fail(f"its tensors need {start + end} bytes, the file has {self.size}")
        return shapes

    def tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(known): size for known, size in GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            self.fail(f"tensor {name[:60]!r} has the unknown type {kind}")
        block, block_bytes = sizes[kind]
        if min(shape) < 1 or shape[0] % block:
            self.fail(f"tensor {name[:60]!r} has the impossible shape {list(shape)}")
        return int(math.prod(shape) // block * block_bytes)

    def value(self, kind: int, depth: int = 0) -> Any:
        """One value; arrays are walked and give their length."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(self.format_of(kind))
        if depth >= _MAX_NESTING:
            self.fail("arrays are nested too deeply")
        inner: int = self.scalar("I")
        count: int = self.scalar("Q")
        if inner in (_STRING, _ARRAY):
            self.expect_room(count, 8 if inner == _STRING else 12, "array elements")
            for _ in range(count):
                self.skip_text() if inner == _STRING else self.value(inner, depth + 1)
        else:
            width = struct.calcsize(self.format_of(inner))
            self.expect_room(count, width, "array elements")
            self.at += count * width
        return count

    def format_of(self, kind: int) -> str:
        if kind not in _SCALARS:
            self.fail(f"value type {kind} is unknown")
        return _SCALARS[kind]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"text at byte {self.at - len(raw)} is not UTF-8")
            raise

    def skip_text(self) -> None:
        length = self.scalar("Q")
        self.expect_room(length, 1, "bytes of text")
        self.at += length

    def take(self, count: int) -> bytes:
        self.expect_room(count, 1, "bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def expect_room(self, count: int, width: int, what: str) -> None:
        if count * width > self.size - self.at:
            self.fail(f"byte {self.at} promises {count} {what}, more than the file holds")

    def fail(self, message: str) -> None:
        raise AssetError(f"{self.path} is truncated or no GGUF file: {message}; download it again")
