"""Calibrated profiles as YAML files: where they go, what is in them, and reading them again."""

from pathlib import Path
from typing import Any

import yaml

from ppsd_cli.calibration_records import Calibration
from ppsd_cli.config import Profile, Settings, read_profile
from ppsd_cli.errors import AssetError, ConfigError, PpsdError
from ppsd_cli.runtime.engine import default_threads
from ppsd_cli.tasks.calibrate.export import calibration_data, calibration_from

_WIDTH = 100


def default_place(folder: Path, name: str) -> Path:
    """A file in the user's folder, named after the model or profile that was calibrated."""
    stem = Path(name).name.removesuffix(".gguf").removesuffix("-calibrated")
    return folder / f"{stem}-calibrated.yaml"


def check_place(place: Path, packaged: tuple[Path, ...]) -> None:
    """ConfigError for a packaged profile that was written by hand; those are read-only."""
    if not place.is_file() or place.resolve().parent not in {f.resolve() for f in packaged}:
        return
    try:
        calibrated = read_profile(place).calibrated
    except PpsdError:
        calibrated = False
    if not calibrated:
        raise ConfigError(
            f"-o {place}: packaged profiles are read-only; name another file, or leave it out"
        )


def profile_text(calibration: Calibration, profile: Profile, flags: Settings, *, name: str) -> str:
    """The profile as YAML. ``profile`` is the model's own, whose source of the model is kept."""
    folder = Path(profile.model or profile.name).expanduser()
    data: dict[str, Any] = {
        "name": name,
        "model": str(folder.absolute()) if folder.exists() else calibration.model,
    }
    if profile.revision is not None:
        data["revision"] = profile.revision
    if profile.wheel is not None:
        wheel = profile.wheel
        names = ("package", "version", "member", "sha256", "size")
        data["wheel"] = {each: getattr(wheel, each) for each in names}
    data["model_hash"] = calibration.model_hash
    data["settings"] = _settings(calibration, flags)
    heads = (calibration.chosen.head, *(head.name for head in calibration.heads))
    data["heads"] = list(dict.fromkeys(h for h in heads if h is not None and h != "raw"))
    data["evidence"] = calibration_data(calibration)
    head = (
        "# Written by `ppsd calibrate`. Settings may be changed by hand; the evidence says what\n"
        f"# they rest on (`ppsd calibrate --show {name}`).\n"
    )
    return head + yaml.safe_dump(
        data, sort_keys=False, default_flow_style=None, width=_WIDTH, allow_unicode=True
    )


def read_calibration(profile: Profile) -> Calibration:
    """The calibration in a profile; AssetError where there is none."""
    if not profile.calibrated:
        raise AssetError(
            f"profile {profile.name} was not made by `ppsd calibrate`; run it to make one"
        )
    return calibration_from(profile.evidence, f"profile {profile.name}")


def _settings(calibration: Calibration, flags: Settings) -> dict[str, Any]:
    """What is needed to run the chosen candidate again, and the flags that shaped all of it."""
    chosen = calibration.chosen
    settings: dict[str, Any] = {"decoder": chosen.decoder}
    if chosen.head is not None:
        settings |= {"split": list(chosen.split), "head": chosen.head}
    if chosen.width > 1:
        settings["width"] = chosen.width
    if chosen.depth > 1:
        settings["depth"] = chosen.depth
    own = chosen.devices if chosen.processes or len(set(chosen.devices)) > 1 else chosen.devices[:1]
    settings["devices"] = list(own)
    on_cpu = chosen.devices[0] == "cpu"
    if on_cpu and (flags.threads or chosen.threads != default_threads(chosen.stages)):
        settings["threads"] = chosen.threads
    if flags.dtype not in (None, "auto"):
        settings["dtype"] = flags.dtype
    if flags.context is not None:
        settings["context"] = flags.context
    return settings
