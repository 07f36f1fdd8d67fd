"""The second level of a draft head: how it goes on from its own state behind the best guesses.

What ``DraftHead.second_logits`` does, over static buffers. A row is a guess that has not entered:
it sees what the node before it sees in the cache of the head's last block, and its own key, which
goes into no cache.

Shapes: R rows, H hidden, M key/value heads, D head size, P nodes of a path, V' draft vocabulary.
"""

import torch
from torch import Tensor

from ppsd_cli.core.plan import Sampling
from ppsd_cli.runtime.cuda import launch
from ppsd_cli.runtime.cuda.lanes import BlockCall, HeadLane, Scratch, finish_blocks
from ppsd_cli.runtime.cuda.launch import Attend, Branch, Launcher, Linear, Near, Noise, Qkv

_GREEDY = Sampling()


class SecondLane:
    """Rows in ``before`` [R, H] (states), ``pair`` [R, 2 H] (norms of state and token), ``place``
    [R, 2] (position and row) and ``path`` [R, P]; logits [R, V'] in ``chooser``.
    """

    def __init__(self, launcher: Launcher, lane: HeadLane, *, rows: int, path: int) -> None:
        """``lane``: the head, whose LM matrix is shared."""
        second, head, shape = lane.second, lane.draft_head, lane.shape
        assert second is not None, "a head of one depth"
        weights = second.weights
        self._launcher, self._shape, self._tables = launcher, shape, head.tables
        self._cache, self.norms = head.caches[-1], (weights.state_norm, weights.token_norm)
        self._block, self._fuse = second.layer, second.fuse
        self.chooser = lane.chooser.behind(weights.norm, rows)
        device, hidden = head.rings.device, head.rings.shape[2]

        def room(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=head.rings.dtype, device=device)

        self.before, self.pair = room(rows, hidden), room(rows, 2 * hidden)
        self._joined, self._out = room(rows, hidden), room(rows, hidden)
        self.place = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.path = torch.zeros(rows, path, dtype=torch.int32, device=device)
        self._no_kin = torch.full((rows, 2), -1, dtype=torch.int64, device=device)
        near = room(2, shape.kv_heads, rows, shape.head_dim)
        self._near = Near(near[0], near[1], rows)
        middle = self._block.down.shape[1]
        self._scratch = Scratch.of(launcher, shape, middle=middle, source=self.before)

    def run(self, owner: Tensor, where: Tensor, view: Tensor, noise: Noise) -> None:
        """Logits behind every row. ``owner``, ``where``, ``view``: the account of slots."""
        scratch, shape, weights = self._scratch, self._shape, self._block.weights
        x = self._joined
        launch.linear(self._launcher, [Linear(self.pair, self._fuse, x, residual=self.before)])
        call = Qkv(
            x,
            self._block.qkv,
            weights.input_norm,
            self.place,
            scratch.q,
            self._near.keys,
            self._near.values,
            weights.qkv_bias,
            weights.q_norm,
            weights.k_norm,
        )
        launch.qkv(self._launcher, [call], shape=shape, tables=self._tables)
        branch = Branch(owner, where, self.path, view, self._no_kin)
        attention = Attend(
            scratch.q,
            self._cache.keys,
            self._cache.values,
            self.place,
            scratch.scores,
            scratch.attended,
            self._near,
            branch,
        )
        launch.attend(self._launcher, [attention], shape=shape)
        block = BlockCall(self._block, x, self._out, self._cache, self.place, scratch)
        finish_blocks(self._launcher, [block], shape)
        self.chooser.run(self._out, self.place, _GREEDY, noise)
