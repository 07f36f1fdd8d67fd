"""Prompt chunks through all stages as one graph, so that a short prompt is not bound by launches.

Every chunk has the same width C, padded at the end by rows that go to the trash slot. Attention
reads the cache up to a bucket of the chunk's last slot, under a mask; the bucket follows from the
position alone, so that the numbers do not depend on the decoder, the split or the context, and a
cache has room for the bucket of its last slot.

Shapes: C rows of a chunk, H hidden, N query heads, M key/value heads, G = N / M, D head size,
B slots of a bucket.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ppsd_cli.model.cache import LayerCache
from ppsd_cli.model.layers import Shape, finish, project
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.crew import Crew
from ppsd_cli.runtime.cuda.recorder import Immediate, Playable, Recorder
from ppsd_cli.runtime.cuda.tiles import power_of_two

_SMALLEST = 512
_COARSE = 2048


def bucket_of(end: int) -> int:
    """Slots that attention reads where ``end`` are in use: a power of two from 512 on, behind 2,048
    a multiple of that.
    """
    if end > _COARSE:
        return -(-end // _COARSE) * _COARSE
    return max(_SMALLEST, power_of_two(end))


class PromptLane:
    """One device's static buffers for a chunk, and a graph for each bucket of lengths."""

    def __init__(self, stages: list[Stage], recorder: Recorder | Immediate, *, chunk: int) -> None:
        first = stages[0]
        device = first.device
        self._stages, self.recorder, self.chunk = stages, recorder, chunk
        self._shape = Shape.of(first.spec)
        self._trash = first.slots - 1
        self._ids = torch.zeros(chunk, dtype=torch.int64, device=device)
        self._rows = torch.arange(chunk, device=device)
        self._start = torch.zeros(1, dtype=torch.int64, device=device)
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        depths = {depth for stage in stages for depth in stage.tap_depths}
        self._taps = {d: self._state(first) for d in sorted(depths)}
        self._source, self._last = self._state(first), self._state(first)
        self._graphs: dict[int, Playable] = {}

    def _state(self, stage: Stage) -> Tensor:
        return torch.zeros(self.chunk, stage.spec.hidden, dtype=stage.dtype, device=stage.device)

    def run(
        self, token_ids: tuple[int, ...], start: int, source: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """States [W, H] of a chunk of W tokens after the last layer, and by tapped depth.

        ``source`` [W, H]: states before the first layer, where that is not the model's. Results
        lie in buffers that the next chunk overwrites.
        """
        count = len(token_ids)
        graph = self._graph(bucket_of(start + count))
        if source is None:
            padded = (*token_ids, *(0,) * (self.chunk - count))
            self._ids.copy_(torch.tensor(padded))
        else:
            self._source[:count].copy_(source)
        self._start.fill_(start)
        self._count.fill_(count)
        graph.replay()
        return self._last[:count], {depth: taps[:count] for depth, taps in self._taps.items()}

    def _graph(self, bucket: int) -> Playable:
        assert bucket <= self._trash, "the caches have no room for the bucket"
        if bucket not in self._graphs:
            self._count.zero_()  # recording runs once: with no rows but those to the trash slot
            self._start.zero_()
            self._graphs[bucket] = self.recorder.record(lambda: self._launch(bucket))
        return self._graphs[bucket]

    def _launch(self, bucket: int) -> None:
        position = (self._start + self._rows).clamp(max=self._trash)
        slot = torch.where(self._rows < self._count, position, self._trash)
        masks: dict[int | None, Tensor] = {}
        first = self._stages[0]
        hidden = self._source if first.embedding is None else first.embed(self._ids)
        for stage in self._stages:
            cos, sin = (table[position][:, None] for table in stage.tables)
            windows = stage.spec.windows[stage.part.first : stage.part.last]
            layers = zip(stage.layers, stage.caches, windows, strict=True)
            for depth, (weights, cache, window) in enumerate(layers, stage.part.first + 1):
                if window not in masks:
                    masks[window] = _mask(position, bucket, window, self._shape)
                q, k, v = project(hidden, weights, self._shape, cos, sin)
                cache.write(k, v, slot)
                attended = _attend(q, cache, masks[window], bucket)
                hidden = finish(hidden, attended, weights, self._shape)
                if depth in stage.tap_depths:
                    self._taps[depth].copy_(hidden)
        self._last.copy_(hidden)


class PromptLine:
    """The lanes of all devices, one after the other."""

    def __init__(self, lanes: list[PromptLane], crew: Crew) -> None:
        self._lanes, self._crew = lanes, crew

    def run(self, token_ids: tuple[int, ...], start: int) -> tuple[Tensor, dict[int, Tensor]]:
        """As a lane's, with the last states on the last device and the taps on the first."""
        crew = self._crew
        hidden: Tensor | None = None
        taps: dict[int, Tensor] = {}
        for number, lane in enumerate(self._lanes):
            if hidden is not None:
                hidden = crew.hand_over(hidden, number - 1, number)
            with lane.recorder.stream():
                hidden, tapped = lane.run(token_ids, start, hidden)
            for depth, states in tapped.items():
                taps[depth] = crew.hand_over(states, number, 0)
        crew.meet()
        assert hidden is not None
        return hidden, taps


def _mask(position: Tensor, bucket: int, window: int | None, shape: Shape) -> Tensor:
    """Which slots [G * C, B] each row sees: its own and those before it, within the window."""
    slots = torch.arange(bucket, device=position.device)
    behind = position[:, None] - slots[None, :]
    seen = behind >= 0
    if window is not None:
        seen &= behind < window
    return seen.repeat(shape.heads // shape.kv_heads, 1)


def _attend(q: Tensor, cache: LayerCache, mask: Tensor, bucket: int) -> Tensor:
    """Attention [C, N * D] of q [C, N, D]; the queries of a group are rows, see ``model.cache``."""
    c, n, d = q.shape
    m = cache.keys.shape[0]
    grouped = q.reshape(c, m, n // m, d).permute(1, 2, 0, 3).reshape(m, -1, d)
    keys, values = cache.keys[:, :bucket], cache.values[:, :bucket]
    out = functional.scaled_dot_product_attention(
        grouped[None], keys[None], values[None], attn_mask=mask
    )[0]
    return out.reshape(m, n // m, c, d).permute(2, 0, 1, 3).reshape(c, n * d)
