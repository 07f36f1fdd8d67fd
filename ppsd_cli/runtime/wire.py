"""Frames and returns as byte messages of announced sizes, without pickling.

Every frame is one *small* message of a fixed size: a header and R rows, as many as a level of the
widest tree has, one for chains. Where there are more (a prompt chunk, a burst), they follow in a
further message, as do logits and a request; the header tells the sizes. A decode step is therefore
a single message that the receiver can wait for beforehand.

Shapes: W rows, R rows of a small message, H hidden, K taps of one stage, V vocabulary. Tensors on
the wire are uint8 [bytes].
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ppsd_cli.core.events import Span
from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.runtime.frames import Frame, Return

_NODE, _STOP = 0, 1
_NONE = -1


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What one row of hidden states looks like, and how many stages stamp their times.

    ``most``: rows for which a small message has room (R).
    """

    hidden: int
    dtype: torch.dtype
    stages: int
    most: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one tensor."""
        return self.hidden * self.dtype.itemsize


class FrameCodec:
    """Frames [W, H] on their way to the next stage; None stands for "stop".

    In a tree the header has slot and parent's slot of each row.
    """

    def __init__(self, rows: RowFormat) -> None:
        self._rows = rows
        self._layout = struct.Struct(f"<8q{2 * rows.most}q{2 * rows.stages}d")
        self.small_bytes = self._layout.size + rows.most * rows.row_bytes

    def pack(self, frame: Frame | None) -> list[Tensor]:
        """The messages of one frame, the small one first."""
        places = [0] * (2 * self._rows.most)
        if frame is None:
            return [_small(self._layout, self.small_bytes, (_STOP, *[0] * 7, *places))]
        count = frame.hidden.shape[0]
        request = b"" if frame.request is None else pack_request(frame.request)
        places[: 2 * len(frame.tree)] = [slot for pair in frame.tree for slot in pair]
        header = (
            _NODE,
            frame.serial,
            frame.position,
            count,
            frame.wanted,
            len(request),
            len(frame.spans),
            len(frame.tree),
        )
        small = _small(self._layout, self.small_bytes, (*header, *places), frame.spans)
        messages = [small]
        data = _bytes_of(frame.hidden)
        if count <= self._rows.most:
            small[self._layout.size :][: len(data)] = data
        else:
            messages.append(data)
        if request:
            messages.append(torch.frombuffer(bytearray(request), dtype=torch.uint8))
        return messages

    def following(self, small: Tensor) -> list[int]:
        """Sizes of the messages that follow this small one."""
        _, _, _, count, _, request, *_ = self._layout.unpack_from(small.numpy().data)
        rows = [count * self._rows.row_bytes] if count > self._rows.most else []
        return rows + ([request] if request else [])

    def unpack(self, small: Tensor, following: list[Tensor]) -> Frame | None:
        """The inverse of ``pack``. The frame does not share memory with ``small``."""
        kind, serial, position, count, wanted, request_bytes, stamps, nodes, *rest = (
            self._layout.unpack_from(small.numpy().data)
        )
        if kind == _STOP:
            return None
        data = _rows_of(small[self._layout.size :], following, count, self._rows)
        request = None
        if request_bytes:
            request = unpack_request(following[-1].numpy().tobytes())
        hidden = data.view(self._rows.dtype).view(count, self._rows.hidden)
        places = tuple(zip(rest[: 2 * nodes : 2], rest[1 : 2 * nodes : 2], strict=True))
        spans = _spans(rest[2 * self._rows.most :], stamps)
        return Frame(serial, position, wanted, hidden, spans, request, places)


class ReturnCodec:
    """What ``stage`` sends to stage 0: the states of its tap depths, and from the last targets.

    The header has room for R targets; more follow in their own message.
    """

    def __init__(self, rows: RowFormat, stage: int, depths: frozenset[int]) -> None:
        self._rows, self._stage, self._depths = rows, stage, sorted(depths)
        self._layout = struct.Struct(f"<7q{rows.most}q{2 * rows.stages}d")
        self.small_bytes = self._layout.size + len(depths) * rows.most * rows.row_bytes

    def pack(self, back: Return | None) -> list[Tensor]:
        """The messages of one return, the small one first; None says that the stage has ended."""
        tokens = [_NONE] * self._rows.most
        if back is None:
            return [_small(self._layout, self.small_bytes, (_STOP, *[0] * 6, *tokens))]
        taps = [_bytes_of(back.taps[depth]) for depth in self._depths]
        count = next((states.shape[0] for states in back.taps.values()), 1)
        targets, logits = back.token_ids, back.logits
        inside = len(targets) <= self._rows.most
        if inside:
            tokens[: len(targets)] = targets
        header = (
            _NODE,
            back.serial,
            back.position,
            count,
            len(targets),
            0 if logits is None else logits.numel(),
            len(back.spans),
        )
        small = _small(self._layout, self.small_bytes, (*header, *tokens), back.spans)
        messages = [small]
        if taps and count <= self._rows.most:
            data = torch.cat(taps)
            small[self._layout.size :][: len(data)] = data
        elif taps:
            messages.append(torch.cat(taps))
        if not inside:
            messages.append(_bytes_of(torch.tensor(targets)))
        if logits is not None:
            messages.append(_bytes_of(logits))
        return messages

    def following(self, small: Tensor) -> list[int]:
        """Sizes of the messages that follow this small one."""
        _, _, _, count, targets, logits, *_ = self._layout.unpack_from(small.numpy().data)
        taps = len(self._depths) * count * self._rows.row_bytes
        rows = [taps] if count > self._rows.most and taps else []
        more = [8 * targets] if targets > self._rows.most else []
        return rows + more + ([4 * logits] if logits else [])

    def unpack(self, small: Tensor, following: list[Tensor]) -> Return | None:
        """The inverse of ``pack``. The return does not share memory with ``small``."""
        kind, serial, position, count, targets, logits_count, stamps, *rest = (
            self._layout.unpack_from(small.numpy().data)
        )
        if kind == _STOP:
            return None
        more = list(following)
        taps = {}
        if self._depths:
            kept = len(self._depths) * count
            data = _rows_of(small[self._layout.size :], more, kept, self._rows, each=count)
            states = data.view(self._rows.dtype).view(-1, count, self._rows.hidden)  # [K, W, H]
            taps = dict(zip(self._depths, states.unbind(), strict=True))
            more = more[count > self._rows.most :]
        token_ids = tuple(rest[:targets])
        if targets > self._rows.most:
            token_ids = tuple(more.pop(0).view(torch.int64).tolist())
        logits = None
        if logits_count:
            logits = more.pop(0).view(torch.float32).view(targets, -1)  # [targets, V]
        spans = _spans(rest[self._rows.most :], stamps)
        return Return(self._stage, serial, position, taps, token_ids, spans, logits)


def pack_request(request: Request) -> bytes:
    """A request as JSON; ``unpack_request`` is the inverse."""
    return json.dumps(asdict(request)).encode()


def unpack_request(data: bytes) -> Request:
    """The inverse of ``pack_request``."""
    fields = json.loads(data)
    for name in ("forced_drafts", "forced_ranks", "rank_scores"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    return Request(sampling=Sampling(**fields.pop("sampling")), **fields)


def _small(
    layout: struct.Struct, size: int, header: tuple[int, ...], spans: tuple[Span, ...] = ()
) -> Tensor:
    """A small message [size] with its header filled in."""
    data = bytearray(size)
    times = [0.0] * ((layout.size - 8 * len(header)) // 8)
    for index, span in enumerate(spans):
        assert span.stage == index, "stages stamp their times in order"
        times[2 * index : 2 * index + 2] = span.begin, span.end
    layout.pack_into(data, 0, *header, *times)
    return torch.frombuffer(data, dtype=torch.uint8)


def _spans(times: Sequence[float], count: int) -> tuple[Span, ...]:
    return tuple(Span(i, times[2 * i], times[2 * i + 1]) for i in range(count))


def _rows_of(
    inside: Tensor, following: list[Tensor], count: int, rows: RowFormat, *, each: int | None = None
) -> Tensor:
    """The bytes of ``count`` rows: out of the small message, or the first message behind it.

    ``each``: how many of them belong to one tensor; there is room inside for R of each.
    """
    if (each or count) > rows.most:
        return following[0]
    return inside[: count * rows.row_bytes].clone()


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor [...] as uint8 [bytes] on the CPU, without a copy where possible."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)
