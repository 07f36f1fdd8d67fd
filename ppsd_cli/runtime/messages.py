"""Plans and results between the driver and the process of stage 0, as bytes."""

import json
import struct
from dataclasses import asdict

import torch
from torch import Tensor

from ppsd_cli.core.events import Span, Ticked
from ppsd_cli.core.plan import Bubble, Node, Plan, Prompt, Step, Target, TickResult
from ppsd_cli.runtime.wire import pack_request, unpack_request

_NONE = -1
_CLOCK = struct.Struct("<q4d3q")
_TARGET = struct.Struct("<3q")
_SPAN = struct.Struct("<q2d")
_NODE = struct.Struct("<6q")


def pack_plan(plan: Plan) -> bytes:
    """A plan as bytes; ``unpack_plan`` is the inverse."""
    if isinstance(plan, Step):
        return b"s"
    if isinstance(plan, Bubble):
        return b"b"
    fields = asdict(plan)
    fields["request"] = None if plan.request is None else pack_request(plan.request).decode()
    return b"p" + json.dumps(fields).encode()


def unpack_plan(data: bytes) -> Plan:
    """The inverse of ``pack_plan``."""
    if data == b"s":
        return Step()
    if data == b"b":
        return Bubble()
    fields = json.loads(data[1:])
    request = fields.pop("request")
    return Prompt(
        token_ids=tuple(fields.pop("token_ids")),
        request=None if request is None else unpack_request(request.encode()),
        **fields,
    )


def pack_result(result: TickResult) -> list[bytes]:
    """A result as parts of one message; ``unpack_result`` is the inverse."""
    clock, target, node = result.clock, result.target, result.entered
    drafted = _raw(result.draft_logits)
    times = (clock.begin, clock.received, clock.drafted, clock.end)
    parts = [
        _CLOCK.pack(clock.tick, *times, target is not None, node is not None, len(drafted)),
    ]
    logits = b""
    if target is not None:
        logits = _raw(target.logits)
        token = _NONE if target.token_id is None else target.token_id
        parts.append(_TARGET.pack(target.serial, token, len(target.spans)))
        parts += [_SPAN.pack(s.stage, s.begin, s.end) for s in target.spans]
    if node is not None:
        token = _NONE if node.token_id is None else node.token_id
        flags = (int(node.drafted), int(node.final))
        parts.append(_NODE.pack(node.serial, node.position, token, node.tokens, *flags))
    return [*parts, drafted, logits]


def unpack_result(data: bytes) -> TickResult:
    """The inverse of ``pack_result``."""
    tick, *times, has_target, has_node, draft_bytes = _CLOCK.unpack_from(data)
    at = _CLOCK.size
    serial, token, spans = 0, _NONE, []
    if has_target:
        serial, token, count = _TARGET.unpack_from(data, at)
        at += _TARGET.size
        for _ in range(count):
            spans.append(Span(*_SPAN.unpack_from(data, at)))
            at += _SPAN.size
    node = None
    if has_node:
        node = _node(*_NODE.unpack_from(data, at))
        at += _NODE.size
    target = None
    if has_target:
        target = Target(serial, _id(token), tuple(spans), _logits(data[at + draft_bytes :]))
    return TickResult(Ticked(tick, *times), target, node, _logits(data[at : at + draft_bytes]))


def _node(*fields: int) -> Node:
    serial, position, token, tokens, drafted, final = fields
    return Node(serial, position, _id(token), tokens, bool(drafted), bool(final))


def _id(token: int) -> int | None:
    return None if token == _NONE else token


def _raw(logits: Tensor | None) -> bytes:
    """float32 logits [V] as bytes; nothing for None."""
    if logits is None:
        return b""
    assert logits.dtype == torch.float32
    return logits.numpy().tobytes()


def _logits(data: bytes) -> Tensor | None:
    return torch.frombuffer(bytearray(data), dtype=torch.float32) if data else None
