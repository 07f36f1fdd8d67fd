"""Plans and results between the driver and the process of stage 0, as bytes."""

import json
import struct
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.core.events import Span, Ticked
from ppsd_cli.core.plan import Bubble, Burst, Node, Plan, Prompt, Step, Target, TickResult
from ppsd_cli.runtime.wire import pack_request, unpack_request

_NONE = -1
_CLOCK = struct.Struct("<q4d3q")
_TARGET = struct.Struct("<4q")
_SPAN = struct.Struct("<q2d")
_NODE = struct.Struct("<8qd")
_SIZE = struct.Struct("<q")


def pack_plan(plan: Plan) -> bytes:
    """A plan as bytes; ``unpack_plan`` is the inverse."""
    if isinstance(plan, Step):
        return b"s"
    if isinstance(plan, Bubble):
        return b"b"
    if isinstance(plan, Burst):
        return b"d%d" % plan.draft_length
    fields = asdict(plan)
    fields["request"] = None if plan.request is None else pack_request(plan.request).decode()
    return b"p" + json.dumps(fields).encode()


def unpack_plan(data: bytes) -> Plan:
    """The inverse of ``pack_plan``."""
    if data == b"s":
        return Step()
    if data == b"b":
        return Bubble()
    if data[:1] == b"d":
        return Burst(int(data[1:]))
    fields = json.loads(data[1:])
    request = fields.pop("request")
    return Prompt(
        token_ids=tuple(fields.pop("token_ids")),
        request=None if request is None else unpack_request(request.encode()),
        **fields,
    )


def pack_result(result: TickResult) -> list[bytes]:
    """A result as parts of one message; ``unpack_result`` is the inverse."""
    clock, targets, nodes = result.clock, result.targets, result.entered
    times = (clock.begin, clock.received, clock.drafted, clock.end)
    counts = (len(targets), len(nodes), len(result.draft_logits))
    parts = [_CLOCK.pack(clock.tick, *times, *counts)]
    for target in targets:
        logits = _raw(target.logits)
        token = _code(target.token_id)
        parts.append(_TARGET.pack(target.serial, token, len(target.spans), len(logits)))
        parts += [_SPAN.pack(s.stage, s.begin, s.end) for s in target.spans]
        parts.append(logits)
    for node in nodes:
        token = _code(node.token_id)
        flags = (int(node.drafted), int(node.final))
        place = (_code(node.parent), _code(node.slot), node.score)
        parts.append(_NODE.pack(node.serial, node.position, token, node.tokens, *flags, *place))
    for drafted in result.draft_logits:
        logits = _raw(drafted)
        parts += [_SIZE.pack(len(logits)), logits]
    return parts


def unpack_result(data: bytes) -> TickResult:
    """The inverse of ``pack_result``."""
    reader = _Reader(data)
    tick, *times, targets, nodes, drafts = reader.take(_CLOCK)
    return TickResult(
        Ticked(tick, *times),
        tuple(_target(reader) for _ in range(targets)),
        tuple(_node(*reader.take(_NODE)) for _ in range(nodes)),
        tuple(reader.logits(*reader.take(_SIZE)) for _ in range(drafts)),
    )


class _Reader:
    """Takes the parts of a message one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The fields of the next part."""
        fields = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return fields

    def logits(self, size: int) -> Tensor | None:
        """The next ``size`` bytes as float32 [V]; None for no bytes."""
        begin, self._at = self._at, self._at + size
        if not size:
            return None
        return torch.frombuffer(bytearray(self._data[begin : self._at]), dtype=torch.float32)


def _target(reader: _Reader) -> Target:
    serial, token, spans, logits = reader.take(_TARGET)
    stamps = tuple(Span(*reader.take(_SPAN)) for _ in range(spans))
    return Target(serial, _id(token), stamps, reader.logits(logits))


def _node(*fields: Any) -> Node:
    serial, position, token, tokens, drafted, final, parent, slot, score = fields
    return Node(
        serial,
        position,
        _id(token),
        tokens,
        bool(drafted),
        bool(final),
        parent=_id(parent),
        slot=_id(slot),
        score=score,
    )


def _id(number: int) -> int | None:
    return None if number == _NONE else number


def _code(number: int | None) -> int:
    return _NONE if number is None else number


def _raw(logits: Tensor | None) -> bytes:
    """float32 logits [V] as bytes; nothing for None."""
    if logits is None:
        return b""
    assert logits.dtype == torch.float32
    return logits.numpy().tobytes()
