"""Acceptance of draft heads on whole texts: is the target among the head's k best guesses?

Shapes: n wanted positions, H hidden, V' draft vocabulary, C tokens of a chunk.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppsd_cli.model.heads import HeadWeights
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.one_pass import (
    PLAIN,
    Backbone,
    Pieces,
    backbone_states,
    head_states,
    second_one_pass,
)
from ppsd_cli.model.stage import Output
from ppsd_cli.tasks.dataset import Batch
from ppsd_cli.tasks.loss import chunk_tokens

TOP = (1, 2, 4, 8)
EDGES = (256, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Share of positions whose target is among the best 1, 2, 4, 8 drafts, and how many."""

    top: tuple[float, ...]
    count: int

    def to_json(self) -> dict[str, float | int]:
        """As a flat record."""
        rounded = {f"top{k}": round(v, 5) for k, v in zip(TOP, self.top, strict=True)}
        return {**rounded, "count": self.count}


@dataclass(frozen=True, slots=True)
class HeadScore:
    """Acceptance over all positions and by position (up to each edge, then beyond).

    ``second``: that of the second level over all positions, the token before being given.
    """

    whole: Acceptance
    by_position: dict[str, Acceptance]
    second: Acceptance | None = None

    def to_json(self) -> dict[str, object]:
        """As a record: top1 to top8, count, and the same by position."""
        parts = {name: a.to_json() for name, a in self.by_position.items() if a.count}
        more = {} if self.second is None else {"second": self.second.to_json()}
        return {**self.whole.to_json(), "by_position": parts, **more}


def bucket_names() -> list[str]:
    """Names of the position buckets: ``<=256``, ``<=1024``, ``<=2048``, ``>2048``."""
    return [f"<={edge}" for edge in EDGES] + [f">{EDGES[-1]}"]


@torch.no_grad()
def measure(
    backbone: Backbone,
    heads: Sequence[HeadWeights],
    batches: Iterable[Batch],
    pieces: Pieces = PLAIN,
) -> list[HeadScore]:
    """Score each head over ``batches``; the target is the full model's likeliest token."""
    guessers = 2 * len(heads)
    counts = torch.zeros(guessers, len(EDGES) + 1, len(TOP) + 1, device=backbone.device)
    for batch in batches:
        _count(counts, backbone, heads, batch.to(backbone.device), pieces)
    first, second = counts.double().cpu().chunk(2)
    return [_score(*each) for each in zip(heads, first, second, strict=True)]


def _count(
    counts: Tensor,
    backbone: Backbone,
    heads: Sequence[HeadWeights],
    batch: Batch,
    pieces: Pieces,
) -> None:
    """Add one batch to ``counts`` [heads, then second levels, buckets, tops + 1]."""
    length = batch.token_ids.shape[1]
    tables = backbone.tables(length)
    depths = {tap.depth for head in heads for tap in head.taps}
    states = backbone_states(backbone, batch.token_ids, depths, tables, pieces)
    final = _select(states[len(backbone.layers)], batch.where)
    shape = Shape.of(backbone.spec)
    tokens = backbone.embed(batch.token_ids)
    drafts: dict[int, tuple[Tensor, Output]] = {}
    for index, head in enumerate(heads):
        own = head_states(head, [states[t.depth] for t in head.taps], shape, tables, pieces)
        drafts[index] = _select(own.state, batch.where), head.output
        if head.second is not None:
            hidden = second_one_pass(head.second, own, tokens, shape, tables, pieces)
            output = replace(head.output, norm=head.second.norm)
            drafts[len(heads) + index] = _select(hidden, batch.where), output
    edges = torch.tensor(EDGES, device=backbone.device)
    bucket = torch.bucketize(batch.where % length + 1, edges)
    tops = torch.tensor(TOP, device=backbone.device)
    chunk = chunk_tokens(backbone.spec.vocabulary)
    for first in range(0, batch.count, chunk):
        part = slice(first, min(first + chunk, batch.count))
        best = backbone.output.logits(final[part]).float().argmax(dim=-1)
        for index, (rows, output) in drafts.items():
            ranks = target_ranks(output.logits(rows[part]), best, output)
            hits = (ranks[:, None] < tops[None, :]).float()
            row = torch.cat([hits, torch.ones_like(hits[:, :1])], dim=1)
            counts[index].index_add_(0, bucket[part], row)


def target_ranks(logits: Tensor, target: Tensor, output: Output) -> Tensor:
    """Rank [C] of each target id [C] in draft logits [C, V'], 0 = the draft; ties as in argmax."""
    scores = logits.float()
    columns = torch.arange(scores.shape[1], device=scores.device)
    column, known = target, None
    ids = output.token_ids
    if ids is not None:
        column = torch.searchsorted(ids, target).clamp(max=len(ids) - 1)
        known = ids[column] == target
    own = scores.gather(1, column[:, None])
    before = (scores > own) | ((scores == own) & (columns[None, :] < column[:, None]))
    ranks = before.sum(dim=1)
    return ranks if known is None else torch.where(known, ranks, scores.shape[1])


def _select(states: Tensor, where: Tensor) -> Tensor:
    """Rows [n, H] of states [B, T, H]."""
    return states.flatten(0, 1).index_select(0, where)


def _score(head: HeadWeights, table: Tensor, second: Tensor) -> HeadScore:
    """From counts [buckets, tops + 1]; the last column is the number of positions."""
    rows = zip(bucket_names(), table, strict=True)
    return HeadScore(
        _acceptance(table.sum(dim=0)),
        {name: _acceptance(row) for name, row in rows},
        None if head.second is None else _acceptance(second.sum(dim=0)),
    )


def _acceptance(row: Tensor) -> Acceptance:
    *hits, count = row.tolist()
    return Acceptance(tuple(h / count if count else 0.0 for h in hits), int(count))
