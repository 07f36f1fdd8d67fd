"""The kernels of one stage and of the draft head, in their order, over static buffers.

Shapes: W rows, H hidden, N query heads, D head size, F intermediate, K taps, L = K - 1.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppsd_cli.core.choose import restrict
from ppsd_cli.core.plan import Sampling
from ppsd_cli.model.cache import LayerCache
from ppsd_cli.model.heads import DraftHead, HeadWeights
from ppsd_cli.model.layers import LayerWeights, Shape
from ppsd_cli.model.second_level import SecondLevel
from ppsd_cli.model.stage import Output, Stage
from ppsd_cli.runtime.cuda import launch
from ppsd_cli.runtime.cuda.choice import vote_kernel
from ppsd_cli.runtime.cuda.launch import (
    Attend,
    Branch,
    Launcher,
    Linear,
    Near,
    Noise,
    Qkv,
    Scores,
    Stamp,
    Votes,
    rows_of,
)
from ppsd_cli.runtime.cuda.tiles import ROWS, Tile

_VOTE_TILE = 512


@dataclass(frozen=True, slots=True)
class Scratch:
    """Work buffers of one branch: nothing in them outlives a tick."""

    q: Tensor
    attended: Tensor
    work: Tensor
    middle: Tensor
    scores: Scores

    @classmethod
    def of(cls, launcher: Launcher, shape: Shape, *, middle: int, source: Tensor) -> "Scratch":
        """Buffers for rows like ``source`` [W, H]; ``middle``: width of the widest MLP."""
        width, hidden = source.shape

        def room(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=source.dtype, device=source.device)

        n, d = shape.heads, shape.head_dim
        return cls(
            room(width, n, d),
            room(width, n * d),
            room(width, hidden),
            room(width, middle),
            Scores.of(shape, width=width, splits=launcher.splits, device=source.device),
        )


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer in the kernels' layout: matrices [out, in]."""

    weights: LayerWeights
    qkv: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor
    window: int | None = None

    @classmethod
    def of(cls, weights: LayerWeights, window: int | None = None) -> "Block":
        """Views where the loader has laid the matrices out that way, copies elsewhere."""
        w = weights
        qkv, output = rows_of(w.qkv), rows_of(w.output)
        return cls(weights, qkv, output, rows_of(w.gate_up), rows_of(w.down), window)


class Chooser:
    """The LM head of a branch: logits, votes, and the cuts that need all logits at once."""

    def __init__(self, launcher: Launcher, head: Output, *, width: int) -> None:
        self._launcher, self._head = launcher, head
        self._matrix = rows_of(head.lm_matrix)
        self._make_room(width)

    def _make_room(self, width: int) -> None:
        columns, inner = self._matrix.shape
        device = self._matrix.device
        tile = self._launcher.tile(
            inner, columns, width=width, paired=False, dtype=self._matrix.dtype
        )
        self.logits = torch.zeros(width, columns, dtype=torch.float32, device=device)
        self._votes = Votes.of(width, -(-columns // tile.rows), device)
        self._cut_votes = Votes.of(width, -(-columns // _VOTE_TILE), device)

    def widened(self, width: int) -> "Chooser":
        """The same LM head with room for ``width`` rows."""
        other = copy(self)
        other._make_room(width)
        return other

    def behind(self, norm: Tensor, width: int) -> "Chooser":
        """The same LM head behind another norm [H], for ``width`` rows."""
        other = self.widened(width)
        other._head = replace(self._head, norm=norm)
        return other

    @property
    def width(self) -> int:
        """W, rows that it chooses for."""
        return self.logits.shape[0]

    @property
    def token_ids(self) -> Tensor | None:
        """Full-vocabulary ids of the columns where they are reduced."""
        return self._head.token_ids

    def votes(self, sampling: Sampling) -> Votes:
        """Where the votes lie under these settings."""
        return self._cut_votes if is_cut(sampling) else self._votes

    def run(
        self,
        x: Tensor,
        place: Tensor,
        sampling: Sampling,
        noise: Noise,
        *,
        stamp: Stamp | None = None,
        first: bool = False,
        logits: Tensor | None = None,
    ) -> None:
        """Votes for the token after each row of x [W, H]. ``logits`` [W, V]: where they are left,
        if not in the chooser's own.
        """
        cut, logits = is_cut(sampling), self.logits if logits is None else logits
        launch.output(
            self._launcher,
            x,
            self._head.norm,
            self._matrix,
            eps=self._head.eps,
            place=place,
            logits=logits,
            votes=self._votes,
            noise=noise if sampling.temperature > 0 and not cut else None,
            token_ids=self.token_ids,
            stamp=stamp,
            first=first,
        )
        if cut:
            self._vote(restrict(logits / noise.temperature, sampling), place, noise)

    def _vote(self, scores: Tensor, place: Tensor, noise: Noise) -> None:
        width, columns = scores.shape
        votes, ids = self._cut_votes, self.token_ids
        vote_kernel[(votes.tiles,)](
            scores,
            ids if ids is not None else scores,
            place,
            noise.seed,
            votes.scores,
            votes.columns,
            width,
            columns,
            BN=_VOTE_TILE,
            WP=1 if width == 1 else ROWS,
            MAPPED=ids is not None,
            **self._launcher.flags(Tile(0, 0, 4), first=True),
        )


def is_cut(sampling: Sampling) -> bool:
    """Whether top-k, top-p or min-p take part."""
    drawn = sampling.temperature > 0
    return drawn and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One decoder layer for rows x [W, H] into out [W, H], which may be ``scratch.work``.

    ``branch``: what the rows see, in a tree.
    """

    block: Block
    x: Tensor
    out: Tensor
    cache: LayerCache
    place: Tensor
    scratch: Scratch
    stamp: Stamp | None = None
    branch: Branch | None = None


def run_blocks(
    launcher: Launcher,
    calls: Sequence[BlockCall],
    shape: Shape,
    tables: tuple[Tensor, Tensor],
    *,
    first: bool = False,
) -> None:
    """The same layer of several stages in one go. ``first``: see ``Launcher.flags``."""
    launch.qkv(
        launcher,
        [
            Qkv(
                c.x,
                c.block.qkv,
                c.block.weights.input_norm,
                c.place,
                c.scratch.q,
                c.cache.keys,
                c.cache.values,
                c.block.weights.qkv_bias,
                c.block.weights.q_norm,
                c.block.weights.k_norm,
            )
            for c in calls
        ],
        shape=shape,
        tables=tables,
        first=first,
    )
    for window in dict.fromkeys(c.block.window for c in calls):
        members = [
            Attend(
                c.scratch.q,
                c.cache.keys,
                c.cache.values,
                c.place,
                c.scratch.scores,
                c.scratch.attended,
                branch=c.branch,
            )
            for c in calls
            if c.block.window == window
        ]
        launch.attend(launcher, members, shape=shape, window=window)
    finish_blocks(launcher, calls, shape)


def finish_blocks(launcher: Launcher, calls: Sequence[BlockCall], shape: Shape) -> None:
    """The layer after attention: output projection, gated MLP and both residuals."""
    launch.linear(
        launcher,
        [
            Linear(
                c.scratch.attended,
                c.block.output,
                c.scratch.work,
                bias=c.block.weights.output_bias,
                residual=c.x,
            )
            for c in calls
        ],
    )
    launch.linear(
        launcher,
        [
            Linear(
                c.scratch.work,
                c.block.gate_up,
                c.scratch.middle,
                norm=c.block.weights.mlp_norm,
                bias=c.block.weights.gate_up_bias,
            )
            for c in calls
        ],
        eps=shape.rms_eps,
        gated=True,
    )
    launch.linear(
        launcher,
        [
            Linear(
                c.scratch.middle,
                c.block.down,
                c.out,
                bias=c.block.weights.down_bias,
                residual=c.scratch.work,
                stamp=c.stamp,
            )
            for c in calls
        ],
    )


class StageLane:
    """A stage's layers for W rows, from its input buffer to its states."""

    def __init__(
        self, launcher: Launcher, stage: Stage, *, source: Tensor, states: dict[int, Tensor]
    ) -> None:
        """``source`` [W, H]: what enters. ``states``: buffers [W, H] by depth, for taps and the
        stage's last layer.
        """
        self.stage, self._source, self._states = stage, source, states
        self._launcher, spec = launcher, stage.spec
        windows = spec.windows[stage.part.first : stage.part.last]
        pairs = zip(stage.layers, windows, strict=True)
        self._blocks = [Block.of(weights, window) for weights, window in pairs]
        self.shape, width = Shape.of(spec), source.shape[0]
        self._scratch = Scratch.of(launcher, self.shape, middle=spec.intermediate, source=source)
        self.chooser = None
        if stage.output is not None:
            self.chooser = Chooser(launcher, stage.output, width=width)

    def __len__(self) -> int:
        return len(self._blocks)

    def over(self, source: Tensor, states: dict[int, Tensor]) -> "StageLane":
        """The same layers over other buffers, for as many rows as those have; weights are shared.

        Another width has work buffers of its own. The LM head stays as it is.
        """
        lane = copy(self)
        lane._source, lane._states = source, states
        if source.shape[0] != self._source.shape[0]:
            middle = self.stage.spec.intermediate
            lane._scratch = Scratch.of(self._launcher, self.shape, middle=middle, source=source)
        return lane

    @property
    def result(self) -> Tensor:
        """States [W, H] after the last layer."""
        return self._states[self.stage.part.last]

    def call(self, index: int, place: Tensor, stamp: Stamp | None) -> BlockCall:
        """Layer ``index`` of the stage. The last one notes its time as ``stamp`` says."""
        depth = self.stage.part.first + index
        x = self._states.get(depth, self._scratch.work) if index else self._source
        ends = index == len(self) - 1
        return BlockCall(
            self._blocks[index],
            x,
            self._states.get(depth + 1, self._scratch.work),
            self.stage.caches[index],
            place,
            self._scratch,
            stamp if ends else None,
        )


@dataclass(frozen=True, slots=True)
class Reads:
    """What a draft head reads for W rows.

    ``taps`` [K, W, H]: state of each tap at its lag, from lag 1 on normed. With more than one tap
    also ``own`` [W, H], the first one normed for the first block, and ``beside``
    [W, L * H + N * D]: states of lag 1 and more beside each other, and behind them room for what
    attention makes.
    """

    taps: Tensor
    own: Tensor
    beside: Tensor

    @classmethod
    def of(cls, rings: Tensor, shape: Shape, *, width: int) -> "Reads":
        """Room for ``width`` rows, in the format and on the device of ``rings``."""
        taps, _, hidden = rings.shape
        lags, attended = taps - 1, shape.heads * shape.head_dim
        if width > 1:
            return cls(
                rings.new_zeros(taps, width, hidden),
                rings.new_zeros(width, hidden),
                rings.new_zeros(width, lags * hidden + attended),
            )
        flat = rings.new_zeros(taps * hidden + attended)
        states = flat[: taps * hidden].view(taps, 1, hidden)
        return cls(states, rings.new_zeros(1, hidden), flat[hidden:].view(1, -1))

    @property
    def stride(self) -> int:
        """Elements from row to row of ``beside``."""
        return self.beside.stride(0)

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """As kernels take them."""
        return self.taps, self.own, self.beside


@dataclass(frozen=True, slots=True)
class SecondBlock:
    """How a head goes on from its own state, in the kernels' layout; see ``model.second_level``.

    ``fuse`` [H, 2 H].
    """

    weights: SecondLevel
    layer: Block
    fuse: Tensor

    @classmethod
    def of(cls, weights: SecondLevel) -> "SecondBlock":
        """See ``Block.of``."""
        return cls(weights, Block.of(weights.layer), rows_of(weights.fuse))


class HeadLane:
    """The draft head on the lagged view, for one row or for the newest few; see ``model.heads``.

    ``rings`` [K, RING + 1, H] are the head's tapped states; their last place is for bubbles.
    ``reads``: what a call takes from them.
    """

    def __init__(self, launcher: Launcher, head: DraftHead, shape: Shape) -> None:
        self._launcher, self.draft_head, self.shape = launcher, head, shape
        weights = head.weights
        self._blocks = [Block.of(block) for block in weights.blocks]
        self.rings = head.rings
        self.ring, self.lags = head.rings.shape[1] - 1, len(head.taps) - 1
        middle = max((b.down.shape[1] for b in self._blocks), default=1)
        self._middle = max([middle, *(m.down.shape[0] for m in weights.mlps)])
        self._mlps = [(m.norm, rows_of(m.gate_up), rows_of(m.down)) for m in weights.mlps]
        self.chooser = Chooser(launcher, weights.output, width=1)
        self.norms: Tensor | None = None
        if self.lags:
            self._join(weights)
        self.second: SecondBlock | None = None
        if weights.second is not None:
            self.second = SecondBlock.of(weights.second)
        self._make_room(1)

    def _join(self, weights: HeadWeights) -> None:
        """Matrices of the first block of a deep head that are used in one product."""
        block, deep = self._blocks[0], weights.deep
        assert deep is not None
        fuse = [rows_of(matrix) for matrix in deep.fuse]
        self._entrance = replace(block, output=torch.cat([*fuse, block.output], dim=1))
        self._keys = torch.cat([block.qkv, *(rows_of(kv) for kv in deep.kv)])
        self.norms = torch.stack([block.weights.input_norm, *deep.norms])

    def _make_room(self, width: int) -> None:
        shape = self.shape

        def room(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=self.rings.dtype, device=self.rings.device)

        self.width, self.reads = width, Reads.of(self.rings, shape, width=width)
        source = self.reads.taps[0]
        self._scratch = Scratch.of(self._launcher, shape, middle=self._middle, source=source)
        if self.lags:
            near = room(2, shape.kv_heads, width * self.lags, shape.head_dim)
            self._near = Near(near[0], near[1], width)

    def widened(self, width: int, *, guesses: int = 1) -> "HeadLane":
        """The same head, caches and rings with room for ``width`` rows; guesses after the last
        ``guesses`` of them.
        """
        other = copy(self)
        other._make_room(width)
        if guesses > 1:
            other.chooser = self.chooser.widened(guesses)
        return other

    @property
    def states(self) -> Tensor:
        """States [W, H] before the output norm, of the last call of a head with blocks."""
        return self._scratch.work

    @property
    def has_cache(self) -> bool:
        """Whether a row is seen by later ones, and so must be right."""
        return bool(self._blocks)

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.shape.rms_eps

    def guess(
        self,
        place: Tensor,
        sampling: Sampling,
        noise: Noise,
        logits: Tensor | None = None,
        branch: Branch | None = None,
    ) -> None:
        """Votes for the guess after the last row, or the last few, from ``reads``.

        ``place`` [2 + L, W, 2]: position and slot of each row, then position and slot of each lag.
        ``logits``: see ``Chooser.run``. ``branch``: what the rows see, in a tree.
        """
        x, work = self.reads.taps[0], self._scratch.work
        for norm, gate_up, down in self._mlps:
            inner = down.shape[1]
            middle = self._scratch.middle.view(-1)[: self.width * inner].view(-1, inner)
            launch.linear(
                self._launcher,
                [Linear(x, gate_up, middle, norm=norm)],
                eps=self.shape.rms_eps,
                gated=True,
            )
            launch.linear(self._launcher, [Linear(middle, down, work, residual=x)])
            x = work
        for index, block in enumerate(self._blocks):
            cache, scratch = self.draft_head.caches[index], self._scratch
            call = BlockCall(block, x, work, cache, place[0], scratch, branch=branch)
            if index == 0 and self.lags:
                self._lagged_block(call, place)
            else:
                run_blocks(self._launcher, [call], self.shape, self.draft_head.tables)
            x = work
        rows = self.chooser.width
        self.chooser.run(x[-rows:], place[0, -rows:], sampling, noise, logits=logits)

    def _lagged_block(self, call: BlockCall, place: Tensor) -> None:
        """The first block of a deep head: own key, those of near taps, the cache of the last.

        What deeper states add to the row goes through the output product, beside attention.
        """
        launcher, scratch, shape = self._launcher, self._scratch, self.shape
        near, beside = self._near, self.reads.beside
        behind = self.lags * self.rings.shape[2]
        launch.qkv(
            launcher, self._key_calls(call, place), shape=shape, tables=self.draft_head.tables
        )
        attention = Attend(
            scratch.q,
            call.cache.keys,
            call.cache.values,
            call.place,
            scratch.scores,
            beside[:, behind:],
            near,
            call.branch,
        )
        launch.attend(launcher, [attention], shape=shape)
        joined = replace(scratch, attended=beside)
        finish_blocks(launcher, [replace(call, block=self._entrance, scratch=joined)], shape)

    def _key_calls(self, call: BlockCall, place: Tensor) -> list[Qkv]:
        """The query with its own key and value, and keys and values of every lag."""
        w, q, near, shape = call.block.weights, self._scratch.q, self._near, self.shape
        step = 2 * shape.kv_heads * shape.head_dim
        targets: list[Near | LayerCache] = [*[near] * self.lags, call.cache]
        return [
            Qkv(
                self.reads.taps[lag] if lag else self.reads.own,
                self._keys[lag * step :],
                None,
                place[1 + lag],
                q,
                target.keys,
                target.values,
                w.qkv_bias,
                w.q_norm,
                w.k_norm,
                keys_only=lag > 0,
            )
            for lag, target in enumerate(targets)
        ]
