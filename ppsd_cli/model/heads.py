"""Draft heads: what stage 0 guesses with. One class serves every kind.

A head turns the state at the exit layer into draft logits. Kinds: ``raw`` (the model's own final
norm and LM matrix), ``mlp``, ``block`` (decoder layers) and ``deep`` (the first block also
attends to deeper states of earlier tokens, arXiv 2605.30852 reports the idea for several depths).

The lagged view. A *tap* ``(depth, lag)`` is the output of the first ``depth`` layers, as seen
from ``lag`` tokens later: for a query at position p the head reads, at position p - k, the tap of
lag k, and at lag K - 1 and more always the last tap. By the boundary before the draft for
position p + 1, position p - k has passed k + 1 stages, so a tap fits a split in which its layer
lies in stage k or before. The view is a function of the tokens alone, never of what happened to
have arrived.

Shapes: W rows, H hidden, N query heads, M key/value heads, D head dimension, T slots, K taps,
V' draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ppsd_cli.model.cache import LayerCache, Rows, attend, visible
from ppsd_cli.model.layers import (
    LayerWeights,
    Shape,
    finish,
    linear,
    project,
    rms_norm,
    split_heads,
)
from ppsd_cli.model.rope import rope_tables
from ppsd_cli.model.second_level import SecondLevel
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.model.stage import Output


@dataclass(frozen=True, slots=True)
class Tap:
    """The output of the first ``depth`` layers, seen ``lag`` tokens later."""

    depth: int
    lag: int


def lagged_taps(split: Sequence[int], *, depth: int = 1) -> tuple[Tap, ...]:
    """The end of every stage, lagged as the pipeline delivers it: what a deep head reads.

    With two depths (``depth``) a token and the one before it may enter together, so that the token
    ``lag`` before has certainly passed only ``lag // 2 + 1`` stages.
    """
    lags = range(depth * (len(split) - 1) + 1)
    return tuple(Tap(sum(split[: lag // depth + 1]), lag) for lag in lags)


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """A gated MLP on the exit state, without attention (kind ``mlp``)."""

    norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class DeepWeights:
    """What the first block of a ``deep`` head has beside its layer, for each tap k >= 1.

    ``norms`` [K-1, H], ``kv`` [K-1, H, 2 * M * D] make keys and values of tap k;
    ``fuse`` [K-1, H, H] adds the normed tap k of position p - k to the state at p.
    """

    norms: Tensor
    kv: Tensor
    fuse: Tensor


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """All tensors of a head. ``blocks`` and ``mlps`` run in order, then ``output``.

    ``second``: how it goes on from its own state, for ticks of two depths; None where it cannot.
    """

    taps: tuple[Tap, ...]
    output: Output
    blocks: tuple[LayerWeights, ...] = ()
    mlps: tuple[MlpWeights, ...] = ()
    deep: DeepWeights | None = None
    second: SecondLevel | None = None


class DraftHead:
    """A head with its caches and its memory of tapped states.

    Tapped states live in rings indexed by slot, because a query after a flush needs states that a
    void query has already used. In a chain a slot is a position, and ``ring`` at least ``stages``
    prompt chunks plus twice the number of stages, and two bursts (``core.plan``); in a tree it is
    the number of slots.
    """

    def __init__(self, spec: ModelSpec, weights: HeadWeights, *, slots: int, ring: int) -> None:
        self.weights = weights
        self._shape = Shape.of(spec)
        norm = weights.output.norm
        self._ring = ring
        self.rings = torch.zeros(
            len(weights.taps), ring + 1, spec.hidden, dtype=norm.dtype, device=norm.device
        )
        """Tapped states [K, ring + 1, H] by slot modulo the ring; nothing reads the last place."""
        self._states = self.rings[:, :ring]
        rows = slots if weights.second is not None else 0
        self._own = torch.zeros(rows, spec.hidden, dtype=norm.dtype, device=norm.device)
        needed = slots if weights.blocks else 0
        cos, sin = rope_tables(spec, needed)
        self._cos = cos.to(norm.device, norm.dtype)
        self._sin = sin.to(norm.device, norm.dtype)
        self._caches = [
            LayerCache(
                kv_heads=spec.kv_heads,
                slots=slots,
                head_dim=spec.head_dim,
                dtype=norm.dtype,
                device=norm.device,
            )
            for _ in weights.blocks
        ]

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What the head reads, by lag."""
        return self.weights.taps

    @property
    def token_ids(self) -> Tensor | None:
        """Full-vocabulary ids [V'] of the draft logits' columns, or None if they are the same."""
        return self.weights.output.token_ids

    @property
    def caches(self) -> list[LayerCache]:
        """One for each block."""
        return self._caches

    @property
    def own(self) -> Tensor:
        """States [S, H] before the output norm by slot, of a head with a second level."""
        return self._own

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Rotary cosines and signed sines [S, D]."""
        return self._cos, self._sin

    def observe(self, depth: int, where: int | Sequence[int], states: Tensor) -> None:
        """Remember the states [W, H] after ``depth`` layers of the tokens in these slots.

        ``where``: the slot of each row, or that of the first of consecutive ones.
        """
        if isinstance(where, int):
            where = range(where, where + states.shape[0])
        slots = torch.tensor(where, device=states.device) % self._ring
        for index, tap in enumerate(self.taps):
            if tap.depth == depth:
                self._states[index, slots] = states.to(self._states.device)

    def prefill(self, start: int, count: int) -> None:
        """Fill the caches for ``count`` prompt positions whose taps have all been observed."""
        if self.weights.blocks:
            self._run(Rows.chain(start, count, self._states.device))

    def draft_logits(self, position: int, *, rows: int = 1) -> Tensor:
        """Logits [1, V'] of the token after ``position``, the newest one at the exit layer.

        ``rows``: positions up to it whose keys are new or to be replaced, itself included.
        """
        hidden = self._run(Rows.chain(position - rows + 1, rows, self._states.device))
        return self.weights.output.logits(hidden[-1:])

    def branch_logits(self, rows: Rows) -> Tensor:
        """Logits [W, V'] of the tokens behind nodes of a tree, each with its own ancestors."""
        return self.weights.output.logits(self._run(rows))

    def second_logits(self, parents: Rows, tokens: Tensor) -> Tensor:
        """Logits [R, V'] of the tokens behind tokens that stand on ``parents``.

        ``parents``: nodes that the head has run on; ``tokens`` [R, H]: embeddings of the tokens.
        """
        second, cache = self.weights.second, self._caches[-1]
        assert second is not None, "a head of one depth"
        before, tokens = self._own[parents.slots], tokens.to(self._own)
        x = second.join(before, tokens, self._shape.rms_eps)
        q, k, v = project(x, second.layer, self._shape, *self._tables(parents.positions + 1))
        attended = attend_beside(q, cache, parents, k, v)
        x = finish(x, attended, second.layer, self._shape)
        output: Output = replace(self.weights.output, norm=second.norm)
        return output.logits(x)

    def _run(self, rows: Rows) -> Tensor:
        """States [W, H] before the output norm."""
        hidden = self._tapped(0, rows.slots)
        for mlp in self.weights.mlps:
            hidden = gated_mlp(hidden, mlp, self._shape.rms_eps)
        for index, block in enumerate(self.weights.blocks):
            lagged = index == 0 and len(self.taps) > 1
            step = self._lagged_block if lagged else self._block
            hidden = step(hidden, block, self._caches[index], rows)
        if self.weights.second is not None:
            self._own[rows.slots] = hidden
        return hidden

    def _tapped(self, index: int, slots: Tensor) -> Tensor:
        """States [W, H] of tap ``index`` in the slots [W] (zeros before the start)."""
        states = self._states[index, slots.clamp(min=0) % self._ring]
        return torch.where((slots >= 0)[:, None], states, 0) if index else states

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.clamp(min=0)
        return self._cos[positions][:, None], self._sin[positions][:, None]

    def _block(self, x: Tensor, w: LayerWeights, cache: LayerCache, rows: Rows) -> Tensor:
        q, k, v = project(x, w, self._shape, *self._tables(rows.positions))
        cache.write(k, v, rows.slots)
        return finish(x, attend(q, cache, rows, visible(rows, None)), w, self._shape)

    def _lagged_block(self, x: Tensor, w: LayerWeights, cache: LayerCache, rows: Rows) -> Tensor:
        """The first block of a deep head, on the lagged view.

        The cache holds the last tap's keys of every position; the K - 1 newest positions of each
        row are read from the other taps instead.
        """
        deep = self.weights.deep
        assert deep is not None
        last = len(self.taps) - 1
        q, k, v = project(x, w, self._shape, *self._tables(rows.positions))
        near_k, near_v, hidden = [k], [v], x
        for index in range(1, last + 1):
            behind = rows.positions - index
            state = rms_norm(
                self._tapped(index, rows.behind(index)), deep.norms[index - 1], self._shape.rms_eps
            )
            hidden = hidden + state @ deep.fuse[index - 1]
            if index < last:
                k, v = tap_keys(state, index, w, deep, self._shape, self._tables(behind))
                near_k.append(k)
                near_v.append(v)
        self._write_last_tap(w, cache, rows)
        attended = attend_lagged(
            q, cache, rows, torch.stack(near_k, dim=1), torch.stack(near_v, dim=1)
        )
        return finish(hidden, attended, w, self._shape)

    def _write_last_tap(self, w: LayerWeights, cache: LayerCache, rows: Rows) -> None:
        """Store the last tap's keys of every position that some row sees at full depth."""
        deep = self.weights.deep
        assert deep is not None
        last = len(self.taps) - 1
        positions, slots = rows.positions - last, rows.behind(last)
        known = positions >= 0
        positions, slots = positions[known], slots[known]
        if not len(positions):
            return
        state = self._tapped(last, slots)
        state = rms_norm(state, deep.norms[last - 1], self._shape.rms_eps)
        k, v = tap_keys(state, last, w, deep, self._shape, self._tables(positions))
        cache.write(k, v, slots)


def gated_mlp(x: Tensor, w: MlpWeights, eps: float) -> Tensor:
    """x [..., H] plus a gated MLP of its norm."""
    gate, up = (rms_norm(x, w.norm, eps) @ w.gate_up).chunk(2, dim=-1)
    return x + (functional.silu(gate) * up) @ w.down


def tap_keys(
    state: Tensor,
    index: int,
    w: LayerWeights,
    deep: DeepWeights,
    shape: Shape,
    tables: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Keys and values [..., M, D] of tap ``index`` (1 or more) from its normed state [..., H]."""
    width = shape.kv_heads * shape.head_dim
    bias = None if w.qkv_bias is None else w.qkv_bias[-2 * width :]
    kv = linear(state, deep.kv[index - 1], bias)
    keys_only = Shape(0, shape.kv_heads, shape.head_dim, shape.rms_eps)
    _, k, v = split_heads(kv, w, keys_only, *tables)
    return k, v


def attend_lagged(
    q: Tensor, cache: LayerCache, rows: Rows, near_k: Tensor, near_v: Tensor
) -> Tensor:
    """Attention [W, N * D] of q [W, N, D] over the cache up to lag L and ``near`` rows.

    ``near_k``, ``near_v`` [W, L, M, D]: each row's own keys at lags 0 to L - 1 (rows before the
    start of the text are masked).
    """
    w, n, d = q.shape
    lags, m = near_k.shape[1], near_k.shape[2]
    grouped = q.reshape(w, m, n // m, d)
    hide_far = _hidden_far(rows, lags)
    far = hide_far.shape[1]
    keys, values = cache.keys[:, :far], cache.values[:, :far]
    scores_far = torch.einsum("wmgd,mtd->wmgt", grouped, keys)
    scores_near = torch.einsum("wmgd,wlmd->wmgl", grouped, near_k)
    hide_near = torch.arange(lags, device=q.device)[None, :] > rows.positions[:, None]
    hide = torch.cat([hide_far, hide_near], dim=-1)[:, None, None]
    scores = torch.cat([scores_far, scores_near], dim=-1) * d**-0.5
    weights = scores.masked_fill(hide, -torch.inf).softmax(dim=-1)
    out = torch.einsum("wmgt,mtd->wmgd", weights[..., :far], values)
    out = out + torch.einsum("wmgl,wlmd->wmgd", weights[..., far:], near_v)
    return out.reshape(w, n * d)


def attend_beside(q: Tensor, cache: LayerCache, rows: Rows, own_k: Tensor, own_v: Tensor) -> Tensor:
    """Attention [R, N * D] of q [R, N, D] over what ``rows`` see and each row's own key.

    ``own_k``, ``own_v`` [R, M, D] are in no cache.
    """
    r, n, d = q.shape
    m, seen = own_k.shape[1], rows.tree_mask
    assert seen is not None
    grouped = q.reshape(r, m, n // m, d)
    keys, values = cache.keys[:, : rows.length], cache.values[:, : rows.length]
    far = torch.einsum("rmgd,mtd->rmgt", grouped, keys)
    far = far.masked_fill(~seen[:, None, None], -torch.inf)
    own = torch.einsum("rmgd,rmd->rmg", grouped, own_k)[..., None]
    weights = (torch.cat([far, own], dim=-1) * d**-0.5).softmax(dim=-1)
    out: Tensor = torch.einsum("rmgt,mtd->rmgd", weights[..., :-1], values)
    out = out + weights[..., -1:] * own_v[:, :, None]
    return out.reshape(r, n * d)


def _hidden_far(rows: Rows, lags: int) -> Tensor:
    """Which slots [W, T] a row does not see at full depth: other branches, and its near ones."""
    if rows.tree_mask is None:
        slots = torch.arange(max(rows.length - lags, 0), device=rows.positions.device)
        return slots[None, :] > rows.positions[:, None] - lags
    hide = ~rows.tree_mask
    for lag in range(lags):
        near = rows.behind(lag)
        some = near >= 0
        hide[some, near[some]] = True
    return hide
