"""Errors on their way from a stage's process to the driver's. Loaded before torch."""

import json
import traceback
from typing import TYPE_CHECKING

from ppsd_cli.errors import (
    AssetError,
    ConfigError,
    GateError,
    PpsdError,
    ResourceError,
    StageError,
)

if TYPE_CHECKING:
    from ppsd_cli.runtime.pipeline import PipelineConfig

_KINDS = {
    kind.__name__: kind for kind in (ConfigError, AssetError, ResourceError, StageError, GateError)
}


class PeerLost(StageError):
    """The connection to another stage broke: that stage, or one behind it, has failed."""

    def __init__(self, peer: int) -> None:
        super().__init__(f"the connection to stage {peer} broke")
        self.peer = peer


def pack_failure(error: BaseException) -> bytes:
    """An error as JSON: its class, and its message or the last line of its traceback."""
    text = str(error)
    if not isinstance(error, PpsdError):
        text = traceback.format_exception_only(error)[-1].strip()
    peer = error.peer if isinstance(error, PeerLost) else None
    return json.dumps({"kind": type(error).__name__, "text": text, "peer": peer}).encode()


def unpack_failure(data: bytes, stage: str) -> PpsdError:
    """The same error where it is a PpsdError; others become a StageError that names ``stage``."""
    fields = json.loads(data)
    if fields["peer"] is not None:
        return PeerLost(fields["peer"])
    kind = _KINDS.get(fields["kind"])
    return StageError(f"{stage}: {fields['text']}") if kind is None else kind(fields["text"])


def stage_name(config: "PipelineConfig", stage: int) -> str:
    """A stage for messages: its index, its layers and its device."""
    part = config.part(stage)
    return f"stage {stage} (layers {part.first} to {part.last - 1}, {config.devices[stage]})"
