"""Plans on their way from rank 0 to the ranks that launch the same ticks, over gloo.

A tick's plan is one small message of fixed size, which the receiver awaits beforehand; a prompt's
has a second one behind it.
"""

import struct
from enum import Enum

import torch
from torch import Tensor

from ppsd_cli.core.plan import Plan
from ppsd_cli.runtime.messages import pack_plan, unpack_plan

_HEAD = struct.Struct("<2q")
_END, _ABANDON = 0, 1


class Broken(Enum):
    """Rank 0 ends in the middle of a tick: whoever waits for it waits in vain."""

    BROKEN = 0


BROKEN = Broken.BROKEN
Order = Plan | Broken


class OrderCodec:
    """Orders (``runtime.links.Codec``); None says that rank 0 has ended in good order."""

    small_bytes = _HEAD.size

    def pack(self, item: Order | None) -> list[Tensor]:
        """The messages of one order: the plan's first byte and the length of the others; those."""
        if item is None or isinstance(item, Broken):
            return [_bytes(_HEAD.pack(_END if item is None else _ABANDON, 0))]
        data = pack_plan(item)
        small = _bytes(_HEAD.pack(data[0], len(data) - 1))
        return [small, _bytes(data[1:])] if len(data) > 1 else [small]

    def following(self, small: Tensor) -> list[int]:
        """Sizes of the messages that follow this small one."""
        _, size = _HEAD.unpack(small.numpy().tobytes())
        return [size] if size else []

    def unpack(self, small: Tensor, following: list[Tensor]) -> Order | None:
        """The inverse of ``pack``."""
        kind, _ = _HEAD.unpack(small.numpy().tobytes())
        if kind in (_END, _ABANDON):
            return None if kind == _END else BROKEN
        return unpack_plan(bytes([kind]) + b"".join(part.numpy().tobytes() for part in following))


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
