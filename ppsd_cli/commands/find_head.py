"""Which draft head a run uses, and how much work it is."""

from pathlib import Path

import ppsd_cli
from ppsd_cli.config import Profile, Settings
from ppsd_cli.errors import AssetError
from ppsd_cli.model.head_files import HeadInfo, late_tap, read_info
from ppsd_cli.model.random_weights import BLOCKS, DRAFT_VOCABULARY, RANDOM_HEADS
from ppsd_cli.runtime.pipeline import RAW_EXIT

_SHIPPED = Path(ppsd_cli.__file__).parent / "data" / "heads"
UNTRAINED = (RAW_EXIT, *RANDOM_HEADS)
"""Heads that are no folder."""


def find_head(settings: Settings, profile: Profile) -> str | None:
    """The head's folder, one of ``UNTRAINED``, or None: as asked for, or the profile's first
    that fits."""
    if settings.head in UNTRAINED:
        return settings.head
    if settings.head is not None:
        return _head_folder(settings.head, profile)
    for name in profile.heads:
        if name in UNTRAINED:
            return name
        if settings.draft_vocab is not None:
            return None
        folder = _head_folder(name, profile)
        if _suits(read_info(Path(folder)), settings):
            return folder
    return None


def describe_head(head: str | None) -> HeadInfo | None:
    """What the head's own file says; None where there is no file."""
    return None if head is None or head in UNTRAINED else read_info(Path(head))


def asked_stages(settings: Settings) -> int | None:
    """Stages as flags fix them: their number, or a device for each."""
    if settings.stages is None and settings.devices is not None and len(settings.devices) > 1:
        return len(settings.devices)
    return settings.stages


def head_size(
    head: str | None, info: HeadInfo | None, *, draft_vocab: int | None, vocabulary: int
) -> tuple[int, int]:
    """Blocks and draft vocabulary of a head, for a model of ``vocabulary`` tokens."""
    if info is not None:
        return info.blocks, info.draft_vocabulary or vocabulary
    if head in RANDOM_HEADS:
        return BLOCKS, min(draft_vocab or DRAFT_VOCABULARY, vocabulary)
    return 0, draft_vocab or vocabulary


def notes_on_head(head: str | None) -> list[str]:
    """What a person should know who drafts without a trained head."""
    if head == RAW_EXIT:
        return [
            "drafting with a raw exit: without a trained head few guesses are right "
            "(train one with `ppsd train-head`)"
        ]
    if head in RANDOM_HEADS:
        return ["drafting with a head of random numbers: it takes its time and guesses nothing"]
    return []


def shipped_name(folder: str) -> str:
    """What a person calls the head in ``folder``: its name if it is shipped, else the folder."""
    path = Path(folder)
    return path.name if path.parent == _SHIPPED.absolute() else folder


def _head_folder(name: str, profile: Profile) -> str:
    """Where a head lies: a path, beside the profile, or shipped by name."""
    places = [Path(name).expanduser(), _SHIPPED / name]
    if profile.folder is not None:
        places.insert(1, profile.folder / name)
    for place in places:
        if (place / "head.json").is_file():
            return str(place.absolute())
    known = ", ".join(sorted(path.parent.name for path in _SHIPPED.glob("*/head.json")))
    raise AssetError(f"no draft head {name!r}: no folder with a head.json, nor one of {known}")


def _suits(info: HeadInfo, settings: Settings) -> bool:
    """Whether a head is for the wanted pipeline, as far as flags fix it."""
    if settings.split is not None:
        in_time = late_tap(info.taps, settings.split) is None
        return in_time and info.exit_layer == settings.split[0]
    stages = asked_stages(settings)
    return stages in (None, info.stages) and settings.exit_layer in (None, info.exit_layer)
