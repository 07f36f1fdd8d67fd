"""Settings and profiles: what a run is told, from flags, a profile and defaults, in that order.

A profile is a YAML file; every key is optional but ``name``. Flags that were not given are None
and take the profile's value.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ppsd_cli.core.plan import MAX_DRAFT_LENGTH
from ppsd_cli.core.tree import MAX_DEPTH, MAX_WIDTH
from ppsd_cli.errors import AssetError, ConfigError

DECODERS = ("auto", "ppsd", "eesd", "ar")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_MAX_NEW_TOKENS = 512
DEFAULT_BENCH_TOKENS = 128
DEFAULT_DRAFT_LENGTH = 4
DEFAULT_TREE_SCALE = 1.0
MAX_TREE_SCALE = 100.0
_THREADS_PER_CORE = 8
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to decode. None: decide from the model, the head and the machine."""

    decoder: str | None = None
    exit_layer: int | None = None
    stages: int | None = None
    split: tuple[int, ...] | None = None
    devices: tuple[str, ...] | None = None
    head: str | None = None
    draft_vocab: int | None = None
    draft_length: int | None = None
    width: int | None = None
    depth: int | None = None
    tree_scale: float | None = None
    dtype: str | None = None
    context: int | None = None
    threads: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def over(self, base: "Settings") -> "Settings":
        """These settings, with those of ``base`` where nothing is said here.

        The pipeline's shape is one decision: a flag for exit layer, stages or split replaces the
        profile's shape as a whole, and its head and devices unless those are given too.
        """
        if any(v is not None for v in (self.exit_layer, self.stages, self.split)):
            base = replace(base, exit_layer=None, stages=None, split=None, head=None, devices=None)
        if self.devices is not None and self.head is None:
            base = replace(base, devices=None)
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(base, **{k: v for k, v in own.items() if v is not None})


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file inside a wheel on PyPI, with its checksum and size in bytes."""

    package: str
    version: str
    member: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Named settings for one model. ``folder`` is where relative head paths start.

    ``heads``: draft heads to choose from; the first that fits the wanted stages is taken.
    ``evidence``: what the settings rest on; that of ``ppsd calibrate`` is a whole calibration
    (``tasks.calibrate.export``), whatever else stands there is for people.
    """

    name: str
    settings: Settings
    model: str | None = None
    revision: str | None = None
    wheel: WheelFile | None = None
    model_hash: str | None = None
    folder: Path | None = None
    heads: tuple[str, ...] = ()
    evidence: Mapping[str, Any] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the evidence is that of ``ppsd calibrate``."""
        return self.evidence is not None and "schema_version" in self.evidence


def parse_split(text: str) -> tuple[int, ...]:
    """``10,10,10`` as layers of each stage."""
    try:
        split = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--split {text!r}: give layers per stage separated by commas, such as 10,10,10"
        ) from error
    if min(split) < 1:
        raise ConfigError(f"--split {text}: every stage needs at least one layer")
    return split


def parse_devices(text: str) -> tuple[str, ...]:
    """``cuda:0,cuda:1`` or ``cpu,cpu`` as device names."""
    devices = tuple(part.strip() for part in text.split(","))
    for device in devices:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ConfigError(f"--devices {text}: {device!r} is no device; use cpu, cuda or cuda:N")
    if len({d.split(":")[0] for d in devices}) > 1:
        raise ConfigError(f"--devices {text}: cpu and cuda cannot be mixed yet")
    return devices


def check(settings: Settings) -> None:
    """Raise ConfigError for values that no model could make right."""
    if settings.decoder is not None and settings.decoder not in DECODERS:
        raise ConfigError(f"--decoder {settings.decoder}: choose one of {', '.join(DECODERS)}")
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise ConfigError(f"--dtype {settings.dtype}: choose one of {', '.join(DTYPES)}")
    for name in (
        "exit_layer", "stages", "draft_vocab", "draft_length", "width", "context", "threads",
        "max_new_tokens",
    ):  # fmt: skip
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if settings.draft_length is not None and settings.draft_length > MAX_DRAFT_LENGTH:
        raise ConfigError(f"--draft-length {settings.draft_length}: at most {MAX_DRAFT_LENGTH}")
    check_width(settings.width)
    check_depth(settings.depth)
    if settings.tree_scale is not None and not 0 < settings.tree_scale <= MAX_TREE_SCALE:
        raise ConfigError(f"tree_scale {settings.tree_scale}: above 0, at most {MAX_TREE_SCALE}")
    check_threads(settings.threads)
    _check_sampling(settings)


def check_threads(threads: int | None) -> None:
    """ConfigError for more threads than a machine could be meant to run."""
    most = _THREADS_PER_CORE * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise ConfigError(
            f"--threads {threads}: this machine has {os.cpu_count()} cores; at most {most}"
        )


def check_width(width: int | None) -> None:
    """ConfigError for levels of a tree that are wider than the engines serve."""
    if width is not None and not 1 <= width <= MAX_WIDTH:
        raise ConfigError(f"--width {width}: 1 (a chain) to {MAX_WIDTH}")


def check_depth(depth: int | None) -> None:
    """ConfigError for more depths in a tick than the engines serve."""
    if depth is not None and not 1 <= depth <= MAX_DEPTH:
        raise ConfigError(f"--depth {depth}: 1 or {MAX_DEPTH} depths of guesses per tick")


def _check_sampling(s: Settings) -> None:
    ranges: list[tuple[str, float | None, float, float, str]] = [
        ("temperature", s.temperature, 0.0, 1e4, "0 (greedy) or more"),
        ("top-k", s.top_k, 0, 1e9, "0 (off) or more"),
        ("top-p", s.top_p, 1e-9, 1.0, "above 0 and at most 1"),
        ("min-p", s.min_p, 0.0, 1.0, "between 0 and 1"),
    ]
    for flag, value, low, high, allowed in ranges:
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{flag} {value}: must be {allowed}")
    if s.temperature and s.temperature < 1e-6:
        raise ConfigError(f"--temperature {s.temperature}: too close to 0; use 0 for greedy")


def load_profile(name_or_path: str, folders: tuple[Path, ...]) -> Profile:
    """The profile of that name in one of ``folders``, or at that path."""
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or "/" in name_or_path:
        if not path.is_file():
            raise AssetError(f"no profile at {path}")
        return read_profile(path)
    if not _NAME.fullmatch(name_or_path):
        raise ConfigError(f"profile name {name_or_path!r}: use letters, digits, '.', '_' and '-'")
    for folder in folders:
        if (folder / f"{name_or_path}.yaml").is_file():
            return read_profile(folder / f"{name_or_path}.yaml")
    known = ", ".join(profile_names(folders)) or "none"
    raise AssetError(f"no profile {name_or_path!r}; there are: {known}")


def profile_names(folders: tuple[Path, ...]) -> list[str]:
    """Names of all profiles in ``folders``."""
    return sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})


def read_profile(path: Path) -> Profile:
    """Parse one YAML file; AssetError if it cannot be read, ConfigError for wrong keys."""
    import yaml  # the command line reads its defaults here and should start fast

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise AssetError(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise AssetError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise AssetError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise AssetError(f"{path}: a profile is a list of keys and values")
    allowed = {"name", "model", "revision", "wheel", "model_hash", "heads", "settings", "evidence"}
    _check_keys(data, allowed, str(path))
    raw = data.get("settings") or {}
    _check_keys(raw, {f.name for f in fields(Settings)}, f"{path}: settings")
    wheel = data.get("wheel")
    if wheel is not None:
        _check_keys(wheel, {f.name for f in fields(WheelFile)}, f"{path}: wheel")
    try:
        settings = _typed_settings(raw)
        return Profile(
            name=_text(data, "name") or path.stem,
            settings=settings,
            model=_text(data, "model"),
            revision=_text(data, "revision"),
            wheel=None if wheel is None else _wheel(wheel),
            model_hash=_text(data, "model_hash"),
            folder=path.parent,
            heads=_names(data, "heads"),
            evidence=_map(data, "evidence"),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _text(data: Mapping[str, Any], key: str) -> str | None:
    """A text value or None; ValueError for anything else."""
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key}: {value!r} is no text; put it in quotes")
    return value


def _names(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of texts, or nothing; ValueError for anything else."""
    value = data.get(key) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{key}: {value!r} is no list of names")
    return tuple(value)


def _map(data: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """Keys and values, or None; ValueError for anything else."""
    value = data.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key}: expected keys and values")
    return value


def _wheel(data: Mapping[str, Any]) -> WheelFile:
    """The wheel of a profile, every field of it."""
    for field in fields(WheelFile):
        kind = int if field.name == "size" else str
        if not isinstance(data.get(field.name), kind):
            raise ValueError(f"wheel: {field.name} is missing or no {kind.__name__}")
    return WheelFile(**data)


def _typed_settings(raw: Mapping[str, Any]) -> Settings:
    """Settings from YAML values; ValueError names the key whose type is wrong."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "decoder": str, "head": str, "dtype": str,
        "temperature": (int, float), "top_p": (int, float), "min_p": (int, float),
        "tree_scale": (int, float),
        "split": list, "devices": list,
    }  # fmt: skip
    values: dict[str, Any] = {}
    for key, value in raw.items():
        kind = kinds.get(key, int)
        if value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"settings: {key}: {value!r} has the wrong type")
        if isinstance(value, list):
            parse = parse_split if key == "split" else parse_devices
            values[key] = parse(",".join(map(str, value)))
        else:
            values[key] = value
    settings = Settings(**values)
    check(settings)
    return settings


def _check_keys(data: Any, allowed: set[str], where: str) -> None:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys and values")
    for key in data:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
