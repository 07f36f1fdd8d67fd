"""Prompt chunks through a device's stages as a graph, so that no prompt is bound by launches.

Every chunk has the same width C, padded at the end by rows that go to the trash slot. Attention
reads the cache up to a bucket of the chunk's last slot, under a mask; the bucket follows from the
position alone, so that the numbers do not depend on the decoder, the split or the context, and a
cache has room for the bucket of its last slot.

Shapes: C rows of a chunk, H hidden, N query heads, M key/value heads, G = N / M, D head size,
B slots of a bucket, T keys.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ppsd_cli.model.layers import Shape, finish, project
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.recorder import Immediate, Playable, Recorder, send
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


class ChunkRows:
    """Which tokens a chunk holds and where they belong, on one device: C rows, padded at the end.

    ``ids`` [C]: token ids, 0 in padding.
    """

    def __init__(self, chunk: int, *, trash: int, device: torch.device) -> None:
        """``trash``: the slot of padding, behind all that is ever seen."""
        self.chunk, self.trash = chunk, trash
        self._facts = torch.zeros(chunk + 2, dtype=torch.int64, device=device)
        self.ids = self._facts[:chunk]
        self._start, self._count = self._facts[chunk : chunk + 1], self._facts[chunk + 1 :]
        self._rows = torch.arange(chunk, device=device)

    def tell(self, token_ids: tuple[int, ...], start: int) -> None:
        """The next chunk, from position ``start`` on."""
        count = len(token_ids)
        send(self._facts, (*token_ids, *(0,) * (self.chunk - count), start, count))

    def empty(self) -> None:
        """Padding only."""
        self._facts.zero_()

    def positions(self) -> Tensor:
        """Positions [C]; padding goes on counting, up to the trash slot."""
        return (self._start + self._rows).clamp(max=self.trash)

    def where(self, places: Tensor, otherwise: int) -> Tensor:
        """``places`` [C] of tokens, and one place for all padding."""
        return torch.where(self._rows < self._count, places, otherwise)


class PromptLane:
    """One device's static buffers for a chunk, and a graph for each bucket of lengths."""

    def __init__(self, stages: list[Stage], recorder: Recorder | Immediate, *, chunk: int) -> None:
        first = stages[0]
        self._stages, self.recorder = stages, recorder
        self._shape = Shape.of(first.spec)
        self.rows = ChunkRows(chunk, trash=first.slots - 1, device=first.device)
        depths = {depth for stage in stages for depth in stage.tap_depths}
        self.taps = {d: self._state(first) for d in sorted(depths)}
        """States [C, H] by tapped depth, which the next chunk overwrites."""
        self._source, self._last = self._state(first), self._state(first)
        self._graphs: dict[int, Playable] = {}

    def _state(self, stage: Stage) -> Tensor:
        return torch.zeros(
            self.rows.chunk, stage.spec.hidden, dtype=stage.dtype, device=stage.device
        )

    def prepare(self, bucket: int) -> None:
        """Have the graph of a bucket."""
        assert bucket <= self.rows.trash, "the caches have no room for the bucket"
        if bucket not in self._graphs:
            self.rows.empty()  # recording runs once: with no rows but those to the trash slot
            self._graphs[bucket] = self.recorder.record(lambda: self._launch(bucket))

    def run(self, token_ids: tuple[int, ...], start: int, source: Tensor | None) -> Tensor:
        """States [W, H] of a chunk of W tokens after the last layer, which the next overwrites.

        ``source`` [W, H]: states before the first layer, where that is not the model's. The
        graph of the bucket must be there.
        """
        count = len(token_ids)
        if source is not None:
            self._source[:count].copy_(source)
        self.rows.tell(token_ids, start)
        self._graphs[bucket_of(start + count)].replay()
        return self._last[:count]

    def _launch(self, bucket: int) -> None:
        position = self.rows.positions()
        slot = self.rows.where(position, self.rows.trash)
        masks: dict[int | None, Tensor] = {}
        first = self._stages[0]
        hidden = self._source if first.embedding is None else first.embed(self.rows.ids)
        for stage in self._stages:
            cos, sin = (table[position][:, None] for table in stage.tables)
            windows = stage.spec.windows[stage.part.first : stage.part.last]
            layers = zip(stage.layers, stage.caches, windows, strict=True)
            for depth, (weights, cache, window) in enumerate(layers, stage.part.first + 1):
                if window not in masks:
                    masks[window] = for_groups(seen(position, bucket, window), self._shape)
                q, k, v = project(hidden, weights, self._shape, cos, sin)
                cache.write(k, v, slot)
                attended = attend(
                    q, cache.keys[:, :bucket], cache.values[:, :bucket], masks[window]
                )
                hidden = finish(hidden, attended, weights, self._shape)
                if depth in stage.tap_depths:
                    self.taps[depth].copy_(hidden)
        self._last.copy_(hidden)


def seen(position: Tensor, bucket: int, window: int | None = None, *, nearest: int = 0) -> Tensor:
    """Which slots [C, B] each row sees: those ``nearest`` or more before it, within the window."""
    slots = torch.arange(bucket, device=position.device)
    behind = position[:, None] - slots[None, :]
    found = behind >= nearest
    if window is not None:
        found &= behind < window
    return found


def for_groups(mask: Tensor, shape: Shape) -> Tensor:
    """A mask [C, T] for ``attend``, where the queries of a group are rows: [G * C, T]."""
    return mask.repeat(shape.heads // shape.kv_heads, 1)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention [C, N * D] of q [C, N, D] over keys and values [M, T, D], see ``model.cache``."""
    c, n, d = q.shape
    m = keys.shape[0]
    grouped = q.reshape(c, m, n // m, d).permute(1, 2, 0, 3).reshape(m, -1, d)
    out = functional.scaled_dot_product_attention(
        grouped[None], keys[None], values[None], attn_mask=mask
    )[0]
    return out.reshape(m, n // m, c, d).permute(2, 0, 1, 3).reshape(c, n * d)
