"""The frozen model and its draft heads over whole texts at once, for training and evaluation.

The same weights and the same pieces as in the pipeline (``model/layers.py``, ``model/heads.py``),
without caches: what a head computes here for position p is what it drafts from in the pipeline
after position p.

Shapes: B texts (right-padded), T positions from 0, H hidden, N query heads, M key/value heads,
G = N / M, D head dimension, K taps, L = K - 1 near lags.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ppsd_cli.model.heads import HeadWeights, gated_mlp, tap_keys
from ppsd_cli.model.lagged_attention import lagged_attention
from ppsd_cli.model.layers import LayerWeights, Shape, finish, project, rms_norm
from ppsd_cli.model.load import Loader
from ppsd_cli.model.rope import rope_tables
from ppsd_cli.model.second_level import SecondLevel
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.model.stage import Output

_RECOMPILE_LIMIT = 64


@dataclass(frozen=True, slots=True)
class Backbone:
    """All weights of a model on one device. ``embedding`` [H, V] may be the LM matrix itself."""

    spec: ModelSpec
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    output: Output

    @classmethod
    def load(cls, loader: Loader) -> "Backbone":
        """Read everything; tied embeddings are held once."""
        embedding = loader.embedding()
        matrix = embedding if loader.spec.tied else loader.lm_matrix()
        output = Output(loader.final_norm(), matrix, loader.spec.rms_eps)
        layers = tuple(loader.layer(i) for i in range(loader.spec.layers))
        return cls(loader.spec, embedding, layers, output)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.device

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states [..., H] of token ids [...]."""
        return functional.embedding(token_ids, self.embedding.t())

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines [length, 1, D] in the weights' number format."""
        cos, sin = rope_tables(self.spec, length)
        cos, sin = (table.to(self.device, self.dtype)[:, None] for table in (cos, sin))
        return cos, sin


@dataclass(frozen=True, slots=True)
class Pieces:
    """The parts of a layer around its attention, which may be compiled."""

    project: Callable[..., tuple[Tensor, Tensor, Tensor]] = project
    finish: Callable[..., Tensor] = finish
    tap_keys: Callable[..., tuple[Tensor, Tensor]] = tap_keys
    gated_mlp: Callable[..., Tensor] = gated_mlp

    @classmethod
    def compiled(cls) -> "Pieces":
        """Each part fused by torch.compile (on first use, some seconds for each shape kind)."""
        return cls(*(compiled(part) for part in (project, finish, tap_keys, gated_mlp)))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under torch.compile; where compiling fails it runs as it is."""
    import torch._dynamo

    settings: Any = torch._dynamo.config
    settings.suppress_errors = True
    settings.recompile_limit = max(settings.recompile_limit, _RECOMPILE_LIMIT)
    result: Callable[..., Any] = torch.compile(function)
    return result


PLAIN = Pieces()


@torch.no_grad()
def backbone_states(
    backbone: Backbone,
    token_ids: Tensor,
    depths: Collection[int],
    tables: tuple[Tensor, Tensor],
    pieces: Pieces = PLAIN,
) -> dict[int, Tensor]:
    """States [B, T, H] after each of ``depths`` layers and after the last, by depth.

    ``token_ids`` [B, T]; ``tables`` from ``Backbone.tables``, of T rows or more. Padding belongs
    at the end, where no earlier position sees it.
    """
    length = token_ids.shape[1]
    cos, sin = (table[:length] for table in tables)
    shape = Shape.of(backbone.spec)
    masks = {w: window_mask(length, w, backbone.device) for w in set(backbone.spec.windows)}
    wanted = {*depths, len(backbone.layers)}
    hidden = backbone.embed(token_ids)
    states = {}
    for depth, (weights, window) in enumerate(
        zip(backbone.layers, backbone.spec.windows, strict=True), 1
    ):
        q, k, v = pieces.project(hidden, weights, shape, cos, sin)
        attended = causal_attention(q, k, v, masks[window])
        hidden = pieces.finish(hidden, attended, weights, shape)
        if depth in wanted:
            states[depth] = hidden
    return states


@dataclass(frozen=True, slots=True)
class HeadStates:
    """A head on whole texts: states [B, T, H] before its output norm, and where its last block
    sees exit states the keys and values [B, T, M, D] of that block."""

    state: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None

    def detached(self) -> "HeadStates":
        """The same without gradients."""
        parts = (None if t is None else t.detach() for t in (self.state, self.keys, self.values))
        return HeadStates(*parts)  # type: ignore[arg-type]


def head_one_pass(
    weights: HeadWeights,
    taps: Sequence[Tensor],
    shape: Shape,
    tables: tuple[Tensor, Tensor],
    pieces: Pieces = PLAIN,
) -> Tensor:
    """States [B, T, H] before the head's output norm; see ``head_states``."""
    return head_states(weights, taps, shape, tables, pieces).state


def head_states(
    weights: HeadWeights,
    taps: Sequence[Tensor],
    shape: Shape,
    tables: tuple[Tensor, Tensor],
    pieces: Pieces = PLAIN,
) -> HeadStates:
    """What a head makes of every position; differentiable.

    ``taps``: for each of the head's K taps the states [B, T, H] at its depth, unshifted.
    """
    assert len(taps) == len(weights.taps)
    length = taps[0].shape[1]
    tables = (tables[0][:length], tables[1][:length])
    hidden = taps[0]
    k = v = None
    for mlp in weights.mlps:
        hidden = pieces.gated_mlp(hidden, mlp, shape.rms_eps)
    for index, block in enumerate(weights.blocks):
        if index == 0 and len(taps) > 1:
            hidden = _lagged_block(weights, taps, shape, tables, pieces)
            continue
        q, k, v = pieces.project(hidden, block, shape, *tables)
        hidden = pieces.finish(hidden, causal_attention(q, k, v, None), block, shape)
    return HeadStates(hidden, k, v)


def second_one_pass(
    second: SecondLevel,
    head: HeadStates,
    tokens: Tensor,
    shape: Shape,
    tables: tuple[Tensor, Tensor],
    pieces: Pieces = PLAIN,
) -> Tensor:
    """States [B, T, H] before the second level's norm; differentiable.

    At position p from the head's state at p - 1 and the embedding of the token at p (``tokens``
    [B, T, H]): what guesses the token behind p when p itself was a guess. The first position has
    no state before it and means nothing.
    """
    assert head.keys is not None, "no block that sees exit states"
    assert head.values is not None
    length = tokens.shape[1]
    tables = (tables[0][:length], tables[1][:length])
    hidden = second.join(shift(head.state, 1), tokens, shape.rms_eps)
    q, k, v = pieces.project(hidden, second.layer, shape, *tables)
    groups = q.shape[2] // k.shape[2]
    attended = lagged_attention(
        q.transpose(1, 2),
        _spread(head.keys, groups),
        _spread(head.values, groups),
        _spread(k, groups)[:, :, :, None],
        _spread(v, groups)[:, :, :, None],
    )
    return pieces.finish(hidden, attended.transpose(1, 2).flatten(2), second.layer, shape)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention [B, T, N * D] of q [B, T, N, D] over k, v [B, T, M, D]; no mask means causal."""
    groups = q.shape[2] // k.shape[2]
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        _spread(k, groups),
        _spread(v, groups),
        attn_mask=mask,
        is_causal=mask is None,
    )
    return out.transpose(1, 2).flatten(2)


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Who sees whom [T, T] under a sliding window; None where plain causal attention is meant."""
    if window is None or window >= length:
        return None
    positions = torch.arange(length, device=device)
    behind = positions[:, None] - positions[None, :]
    return (behind >= 0) & (behind < window)


def _lagged_block(
    weights: HeadWeights,
    taps: Sequence[Tensor],
    shape: Shape,
    tables: tuple[Tensor, Tensor],
    pieces: Pieces,
) -> Tensor:
    """The first block of a deep head at all positions (``DraftHead._lagged_block``)."""
    deep, block = weights.deep, weights.blocks[0]
    assert deep is not None
    last = len(taps) - 1
    hidden = taps[0]
    q, k, v = pieces.project(hidden, block, shape, *tables)
    near_k, near_v = [k], [v]
    for index in range(1, last + 1):
        state = rms_norm(taps[index], deep.norms[index - 1], shape.rms_eps)
        hidden = hidden + shift(state @ deep.fuse[index - 1], index)
        k, v = pieces.tap_keys(state, index, block, deep, shape, tables)
        if index < last:
            near_k.append(shift(k, index))
            near_v.append(shift(v, index))
    groups = q.shape[2] // k.shape[2]
    attended = lagged_attention(
        q.transpose(1, 2),
        _spread(k, groups),
        _spread(v, groups),
        torch.stack([_spread(x, groups) for x in near_k], dim=3),
        torch.stack([_spread(x, groups) for x in near_v], dim=3),
    )
    return pieces.finish(hidden, attended.transpose(1, 2).flatten(2), block, shape)


def shift(x: Tensor, by: int) -> Tensor:
    """x [B, T, ...] moved ``by`` positions later; the first ones become zeros."""
    start = x.new_zeros(x.shape[0], min(by, x.shape[1]), *x.shape[2:])
    return torch.cat([start, x[:, : max(x.shape[1] - by, 0)]], dim=1)


def _spread(x: Tensor, groups: int) -> Tensor:
    """Keys or values [B, T, M, D] as [B, N, T, D], each repeated for its group's queries."""
    b, t, m, d = x.shape
    return x.transpose(1, 2)[:, :, None].expand(b, m, groups, t, d).reshape(b, m * groups, t, d)
