"""The draft head's part of a prompt chunk as a graph, on the first device.

Only what later tokens read is made: the rings of tapped states, the caches of the head's blocks,
and what a second level goes on from. A head without blocks reads nothing but its newest token's
state, so it has no part here.

Numbers are those of ``model.heads``, up to the rounding of another matrix height. Attention on
the lagged view is one call: keys of the near taps stand behind those of the cache, one stretch of
C for each lag, and every row sees its own key of each stretch.

Shapes: C rows of a chunk, H hidden, M key/value heads, D head size, K taps, L = K - 1 lags,
B slots of a bucket.
"""

import torch
from torch import Tensor

from ppsd_cli.model.cache import LayerCache
from ppsd_cli.model.heads import DraftHead, gated_mlp, tap_keys
from ppsd_cli.model.layers import LayerWeights, Shape, finish, project, rms_norm
from ppsd_cli.runtime.cuda.prompts import ChunkRows, attend, bucket_of, for_groups, seen
from ppsd_cli.runtime.cuda.recorder import Immediate, Playable, Recorder


class PromptHead:
    """Static buffers for a chunk's tapped states, and a graph for each bucket of lengths."""

    def __init__(
        self,
        head: DraftHead,
        shape: Shape,
        rows: ChunkRows,
        recorder: Recorder | Immediate,
        *,
        taps: dict[int, Tensor],
    ) -> None:
        """``rows``, ``taps``: what the first device's lane was told, and its states [C, H] by
        depth. Depths of other devices come through ``take``.
        """
        weights = head.weights
        assert weights.blocks, "a head without blocks has no part in a prompt"
        self._head, self._weights, self._shape = head, weights, shape
        self._rows, self._recorder = rows, recorder
        self._ring, self._lags = head.rings.shape[1] - 1, len(head.taps) - 1
        assert self._ring >= rows.chunk + self._lags, (
            "the ring holds less than a chunk and its lags"
        )
        self._taps = dict(taps)
        for tap in head.taps:
            if tap.depth not in self._taps:
                self._taps[tap.depth] = head.rings.new_zeros(rows.chunk, head.rings.shape[2])
        self._graphs: dict[int, Playable] = {}

    def prepare(self, bucket: int) -> None:
        """Have the graph of a bucket."""
        if self._key(bucket) not in self._graphs:
            self._rows.empty()  # see ``PromptLane.prepare``
            graph = self._recorder.record(lambda: self._launch(bucket))
            self._graphs[self._key(bucket)] = graph

    def _key(self, bucket: int) -> int:
        """Without attention a graph serves every length."""
        return bucket if self._goes_on or len(self._weights.blocks) > 1 else 0

    @property
    def _goes_on(self) -> bool:
        """Whether a second level reads what the last block makes of the prompt's last token."""
        return self._weights.second is not None

    def take(self, depth: int, states: Tensor) -> None:
        """States [W, H] of the chunk after ``depth`` layers of another device."""
        self._taps[depth][: states.shape[0]].copy_(states)

    def run(self, end: int) -> None:
        """The chunk that the rows tell of, up to position ``end``; all taps must be there."""
        self._graphs[self._key(bucket_of(end))].replay()

    def _launch(self, bucket: int) -> None:
        position = self._rows.positions()
        self._remember(position)
        hidden = self._taps[self._head.taps[0].depth]
        for mlp in self._weights.mlps:
            hidden = gated_mlp(hidden, mlp, self._shape.rms_eps)
        last = len(self._weights.blocks) - 1
        for index, (block, cache) in enumerate(
            zip(self._weights.blocks, self._head.caches, strict=True)
        ):
            # Nobody else reads what the last block makes of a prompt's tokens: keys are enough.
            ends = index == last and not self._goes_on
            step = self._lagged_block if index == 0 and self._lags else self._block
            hidden = step(hidden, block, cache, position, None if ends else bucket)
        if self._goes_on:
            self._head.own.index_copy_(0, self._rows.where(position, self._rows.trash), hidden)

    def _remember(self, position: Tensor) -> None:
        """The chunk's tapped states into their rings; padding into the last place."""
        place = self._rows.where(position % self._ring, self._ring)
        for index, tap in enumerate(self._head.taps):
            self._head.rings[index].index_copy_(0, place, self._taps[tap.depth])

    def _tables(self, position: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._head.tables
        return cos[position][:, None], sin[position][:, None]

    def _block(
        self, x: Tensor, w: LayerWeights, cache: LayerCache, position: Tensor, bucket: int | None
    ) -> Tensor:
        """States [C, H] after a block, which sees the slots of a bucket; None: just its keys."""
        q, k, v = project(x, w, self._shape, *self._tables(position))
        cache.write(k, v, self._rows.where(position, self._rows.trash))
        if bucket is None:
            return x
        mask = for_groups(seen(position, bucket), self._shape)
        attended = attend(q, cache.keys[:, :bucket], cache.values[:, :bucket], mask)
        return finish(x, attended, w, self._shape)

    def _lagged_block(
        self, x: Tensor, w: LayerWeights, cache: LayerCache, position: Tensor, bucket: int | None
    ) -> Tensor:
        """The same of the first block of a deep head; see ``DraftHead`` for what it reads."""
        deep, lags = self._weights.deep, self._lags
        assert deep is not None
        farthest = self._behind(lags, position)
        self._write_last_tap(farthest, w, cache, position)
        if bucket is None:
            return x
        states = [*(self._behind(lag, position) for lag in range(1, lags)), farthest]
        q, k, v = project(x, w, self._shape, *self._tables(position))
        near, hidden = [(k, v)], x
        for lag, state in enumerate(states, 1):
            hidden = hidden + state @ deep.fuse[lag - 1]
            if lag < lags:
                near.append(self._tap_keys(state, lag, w, position))
        far = seen(position, bucket, nearest=lags)
        mask = torch.cat([far, *(self._seen_near(position, lag) for lag in range(lags))], dim=1)
        keys, values = (
            torch.cat([cached[:, :bucket], *(pair[part].transpose(0, 1) for pair in near)], dim=1)
            for part, cached in enumerate((cache.keys, cache.values))
        )
        attended = attend(q, keys, values, for_groups(mask, self._shape))
        return finish(hidden, attended, w, self._shape)

    def _behind(self, lag: int, position: Tensor) -> Tensor:
        """Normed states [C, H] of tap ``lag``, so many tokens before each row; zeros before the
        start.
        """
        deep = self._weights.deep
        assert deep is not None
        at = position - lag
        states = self._head.rings[lag][at.clamp(min=0) % self._ring]
        states = torch.where((at >= 0)[:, None], states, 0)
        return rms_norm(states, deep.norms[lag - 1], self._shape.rms_eps)

    def _tap_keys(
        self, state: Tensor, lag: int, w: LayerWeights, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        deep = self._weights.deep
        assert deep is not None
        tables = self._tables((position - lag).clamp(min=0))
        return tap_keys(state, lag, w, deep, self._shape, tables)

    def _write_last_tap(
        self, state: Tensor, w: LayerWeights, cache: LayerCache, position: Tensor
    ) -> None:
        """Keys and values of the last tap, at the slots L tokens before the rows."""
        at, trash = position - self._lags, self._rows.trash
        slot = self._rows.where(torch.where(at >= 0, at, trash), trash)
        cache.write(*self._tap_keys(state, self._lags, w, position), slot)

    def _seen_near(self, position: Tensor, lag: int) -> Tensor:
        """Which of the C keys of a near lag each row sees [C, C]: its own, behind the start."""
        row = torch.arange(len(position), device=position.device)
        return (row[:, None] == row[None, :]) & (position >= lag)[:, None]
