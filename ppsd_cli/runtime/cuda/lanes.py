"""The kernels of one stage and of the draft head, in their order, over static buffers.

Shapes: W rows, H hidden, N query heads, D head size, F intermediate, K taps, L = K - 1.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppsd_cli.core.choose import restrict
from ppsd_cli.core.plan import Sampling
from ppsd_cli.model.cache import LayerCache
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.layers import LayerWeights, Shape
from ppsd_cli.model.stage import Output, Stage
from ppsd_cli.runtime.cuda import launch
from ppsd_cli.runtime.cuda.choice import vote_kernel
from ppsd_cli.runtime.cuda.launch import Attention, Launcher, Near, Noise, Stamp, Votes, rows_of
from ppsd_cli.runtime.cuda.tiles import ROWS, Tile

_VOTE_TILE = 512


@dataclass(frozen=True, slots=True)
class Scratch:
    """Work buffers of one branch: nothing in them outlives a tick."""

    q: Tensor
    attended: Tensor
    work: Tensor
    middle: Tensor
    attention: Attention

    @classmethod
    def of(
        cls, launcher: Launcher, shape: Shape, *, middle: int, source: Tensor
    ) -> "Scratch":
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
            Attention.of(shape, width=width, splits=launcher.splits, device=source.device),
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
        matrices = (rows_of(m) for m in (w.qkv, w.output, w.gate_up, w.down))
        return cls(weights, *matrices, window)


class Chooser:
    """The LM head of a branch: logits, votes, and the cuts that need all logits at once."""

    def __init__(self, launcher: Launcher, head: Output, *, width: int) -> None:
        self._launcher, self._head = launcher, head
        self._matrix = rows_of(head.lm_matrix)
        columns, inner = self._matrix.shape
        device = self._matrix.device
        tile = launch.output_tile(inner, columns, width=width, dtype=self._matrix.dtype)
        self.logits = torch.zeros(width, columns, dtype=torch.float32, device=device)
        self._votes = Votes.of(width, -(-columns // tile.rows), device)
        self._cut_votes = Votes.of(width, -(-columns // _VOTE_TILE), device)

    @property
    def token_ids(self) -> Tensor | None:
        """Full-vocabulary ids of the columns where they are reduced."""
        return self._head.token_ids

    def votes(self, sampling: Sampling) -> Votes:
        """Where the votes lie under these settings."""
        return self._cut_votes if is_cut(sampling) else self._votes

    def run(
        self, x: Tensor, place: Tensor, sampling: Sampling, noise: Noise, stamp: Stamp | None
    ) -> None:
        """Votes for the token after each row of x [W, H]."""
        cut = is_cut(sampling)
        launch.output(
            self._launcher,
            x,
            self._head.norm,
            self._matrix,
            eps=self._head.eps,
            place=place,
            logits=self.logits,
            votes=self._votes,
            noise=noise if sampling.temperature > 0 and not cut else None,
            token_ids=self.token_ids,
            stamp=stamp,
        )
        if cut:
            self._vote(restrict(self.logits / noise.temperature, sampling), place, noise)

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
            **self._launcher.flags(Tile(0, 0, 4), head=True),
        )


def is_cut(sampling: Sampling) -> bool:
    """Whether top-k, top-p or min-p take part."""
    drawn = sampling.temperature > 0
    return drawn and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)


def run_block(
    launcher: Launcher,
    block: Block,
    x: Tensor,
    out: Tensor,
    *,
    cache: LayerCache,
    shape: Shape,
    tables: tuple[Tensor, Tensor],
    place: Tensor,
    scratch: Scratch,
    head: bool = False,
    stamp: Stamp | None = None,
) -> None:
    """One decoder layer of x [W, H] into out [W, H], which may be ``scratch.work``."""
    w = block.weights
    launch.qkv(
        launcher,
        x,
        w,
        block.qkv,
        norm=w.input_norm,
        bias=w.qkv_bias,
        shape=shape,
        tables=tables,
        place=place,
        q=scratch.q,
        keys=cache.keys,
        values=cache.values,
        head=head,
    )
    launch.attend(
        launcher,
        scratch.q,
        cache,
        scratch.attended,
        shape=shape,
        place=place,
        scratch=scratch.attention,
        window=block.window,
    )
    finish_block(launcher, block, x, out, scratch=scratch, shape=shape, stamp=stamp)


def finish_block(
    launcher: Launcher,
    block: Block,
    x: Tensor,
    out: Tensor,
    *,
    scratch: Scratch,
    shape: Shape,
    stamp: Stamp | None = None,
) -> None:
    """The layer after attention: output projection, gated MLP and both residuals."""
    w, work = block.weights, scratch.work
    launch.linear(
        launcher, scratch.attended, block.output, work, bias=w.output_bias, residual=x
    )
    launch.linear(
        launcher,
        work,
        block.gate_up,
        scratch.middle,
        norm=w.mlp_norm,
        eps=shape.rms_eps,
        bias=w.gate_up_bias,
        gated=True,
    )
    launch.linear(
        launcher, scratch.middle, block.down, out, bias=w.down_bias, residual=work, stamp=stamp
    )


class StageLane:
    """A stage's layers for ``width`` rows, from its input buffer to its states."""

    def __init__(
        self, launcher: Launcher, stage: Stage, *, source: Tensor, states: dict[int, Tensor]
    ) -> None:
        """``source`` [W, H]: what enters. ``states``: buffers [W, H] by depth, for taps and the
        stage's last layer.
        """
        self._launcher, self.stage = launcher, stage
        self._source, self._states = source, states
        spec = stage.spec
        windows = spec.windows[stage.part.first : stage.part.last]
        pairs = zip(stage.layers, windows, strict=True)
        self._blocks = [Block.of(weights, window) for weights, window in pairs]
        self._shape, width = Shape.of(spec), source.shape[0]
        self._scratch = Scratch.of(
            launcher, self._shape, middle=spec.intermediate, source=source
        )
        self.chooser = None
        if stage.output is not None:
            self.chooser = Chooser(launcher, stage.output, width=width)

    def run(self, place: Tensor, sampling: Sampling, noise: Noise, stamp: Stamp | None) -> None:
        """All layers, and on the last stage the LM head. ``place`` [W, 2]."""
        x, last = self._source, self.stage.part.last
        depth = self.stage.part.first
        predicts = self.chooser is not None
        for index, (block, cache) in enumerate(
            zip(self._blocks, self.stage.caches, strict=True)
        ):
            depth += 1
            out = self._states.get(depth, self._scratch.work)
            run_block(
                self._launcher,
                block,
                x,
                out,
                cache=cache,
                shape=self._shape,
                tables=self.stage.tables,
                place=place,
                scratch=self._scratch,
                head=index == 0,
                stamp=stamp if depth == last and not predicts else None,
            )
            x = out
        if self.chooser is not None:
            self.chooser.run(x, place, sampling, noise, stamp)


class HeadLane:
    """The draft head for one row, on the lagged view; see ``model.heads``.

    ``rings`` [K, RING + 1, H] hold the tapped states by position; the last place is for bubbles.
    """

    def __init__(self, launcher: Launcher, head: DraftHead, shape: Shape) -> None:
        self._launcher, self._head, self._shape = launcher, head, shape
        weights = head.weights
        self._blocks = [Block.of(block) for block in weights.blocks]
        states = head.states
        taps, self.ring, hidden = states.shape
        self.rings = torch.zeros(
            taps, self.ring + 1, hidden, dtype=states.dtype, device=states.device
        )
        self.lags = taps - 1
        middle = max((b.down.shape[1] for b in self._blocks), default=1)
        middle = max([middle, *(m.down.shape[0] for m in weights.mlps)])
        self._mlps = [(m.norm, rows_of(m.gate_up), rows_of(m.down)) for m in weights.mlps]
        self._taps = torch.zeros(taps, 1, hidden, dtype=states.dtype, device=states.device)
        self._scratch = Scratch.of(launcher, shape, middle=middle, source=self._taps[0])
        self._fused = torch.zeros(1, hidden, dtype=states.dtype, device=states.device)
        self.chooser = Chooser(launcher, weights.output, width=1)
        if self.lags:
            assert weights.deep is not None
            self._kv = [rows_of(kv) for kv in weights.deep.kv]
            self._fuse = [rows_of(fuse) for fuse in weights.deep.fuse]
            near = torch.zeros(
                2, shape.kv_heads, self.lags, shape.head_dim, dtype=states.dtype,
                device=states.device,
            )
            self._near = Near(near[0], near[1])

    def adopt(self) -> None:
        """Take over the tapped states that prefill has left in the head."""
        self.rings[:, : self.ring].copy_(self._head.states)

    def run(self, place: Tensor, sampling: Sampling, noise: Noise) -> None:
        """Votes for the guess after the newest token. ``place`` [2 + L, 2]: its position and
        slot, then position and slot of each lag.
        """
        launch.gather(self._launcher, self.rings, place, self._taps)
        x, work = self._taps[0], self._scratch.work
        for norm, gate_up, down in self._mlps:
            middle = self._scratch.middle[:, : down.shape[1]]
            launch.linear(
                self._launcher, x, gate_up, middle, norm=norm, eps=self._shape.rms_eps, gated=True
            )
            launch.linear(self._launcher, middle, down, work, residual=x)
            x = work
        for index, block in enumerate(self._blocks):
            if index == 0 and self.lags:
                self._lagged_block(block, x, place)
            else:
                run_block(
                    self._launcher,
                    block,
                    x,
                    work,
                    cache=self._head.caches[index],
                    shape=self._shape,
                    tables=self._head.tables,
                    place=place[:1],
                    scratch=self._scratch,
                )
            x = work
        self.chooser.run(x, place[:1], sampling, noise, None)

    def _lagged_block(self, block: Block, x: Tensor, place: Tensor) -> None:
        """The first block of a deep head: own key, those of near taps, the cache of the last."""
        launcher, scratch, shape = self._launcher, self._scratch, self._shape
        w, deep, cache = block.weights, self._head.weights.deep, self._head.caches[0]
        assert deep is not None
        launch.qkv(
            launcher,
            x,
            w,
            block.qkv,
            norm=w.input_norm,
            bias=w.qkv_bias,
            shape=shape,
            tables=self._head.tables,
            place=place[1:2],
            q=scratch.q,
            keys=self._near.keys,
            values=self._near.values,
        )
        keys_only = replace(shape, heads=0)
        kv_bias = None
        if w.qkv_bias is not None:
            kv_bias = w.qkv_bias[shape.heads * shape.head_dim :]
        hidden = x
        for lag in range(1, self.lags + 1):
            target = cache if lag == self.lags else self._near
            launch.qkv(
                launcher,
                self._taps[lag],
                w,
                self._kv[lag - 1],
                norm=deep.norms[lag - 1],
                bias=kv_bias,
                shape=keys_only,
                tables=self._head.tables,
                place=place[1 + lag : 2 + lag],
                q=scratch.q,
                keys=target.keys,
                values=target.values,
            )
            launch.linear(
                launcher,
                self._taps[lag],
                self._fuse[lag - 1],
                self._fused,
                norm=deep.norms[lag - 1],
                eps=shape.rms_eps,
                residual=hidden,
            )
            hidden = self._fused
        launch.attend(
            launcher,
            scratch.q,
            cache,
            scratch.attended,
            shape=shape,
            place=place[:1],
            scratch=scratch.attention,
            near=self._near,
        )
        finish_block(launcher, block, hidden, scratch.work, scratch=scratch, shape=shape)
