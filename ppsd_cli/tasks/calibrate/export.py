"""Calibrations as plain data, for profiles and JSON, and back."""

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from ppsd_cli.calibration_records import SCHEMA_VERSION, Calibration
from ppsd_cli.errors import AssetError

_DIGITS = 6
"""Digits that are kept of a measured number; a clock knows no more."""


def calibration_data(calibration: Calibration) -> dict[str, Any]:
    """As maps, lists, texts and numbers."""
    return {"schema_version": SCHEMA_VERSION, **_plain(calibration)}


def calibration_from(data: Any, where: str) -> Calibration:
    """The inverse; AssetError, naming ``where``, for anything else."""
    try:
        version = data["schema_version"]
        if version != SCHEMA_VERSION:
            raise AssetError(
                f"{where}: calibration format {version}, this ppsd reads {SCHEMA_VERSION}; "
                "run `ppsd calibrate` again"
            )
        fields = {name: value for name, value in data.items() if name != "schema_version"}
        found: Calibration = _typed(Calibration, fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AssetError(
            f"{where}: its evidence is no calibration ({error}); run `ppsd calibrate` again"
        ) from error
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _typed(kind: Any, value: Any) -> Any:
    """``value`` as ``kind``: a record, a tuple, or a plain value; TypeError where it is none."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(k for k in get_args(kind) if k is not type(None)), value)
    if origin is tuple:
        parts = get_args(kind)
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is no list")
        if parts[-1] is Ellipsis:
            return tuple(_typed(parts[0], each) for each in value)
        return tuple(_typed(k, each) for k, each in zip(parts, value, strict=True))
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise TypeError(f"unknown {min(unknown)!r}")
        assert isinstance(kind, type)
        return kind(**{name: _typed(hints[name], each) for name, each in value.items()})
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
