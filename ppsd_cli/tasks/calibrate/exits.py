"""How often each exit layer and each head guesses what the model says, in one pass over answers.

Shapes: T positions of one text, n of them before an answer token, H hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppsd_cli.calibration_records import TOP, LayerScore
from ppsd_cli.model.heads import HeadWeights
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.one_pass import Backbone, backbone_states, head_one_pass
from ppsd_cli.tasks.batch_decode import AnswerLimits, write_answers
from ppsd_cli.tasks.evaluate import target_ranks
from ppsd_cli.tasks.loss import chunk_tokens

RAW_POSITIONS = 384
"""Answer tokens at which every layer is asked; each costs the LM matrix once a layer."""


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and the model's own greedy answer to it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def guessed(self) -> range:
        """Positions behind which a pipeline guesses: the first answer token is never a guess."""
        return range(len(self.prompt), len(self.prompt) + len(self.answer) - 1)


@dataclass(frozen=True, slots=True)
class HeadRanks:
    """For each text, the rank of every guessed token among the head's guesses (0: its draft)."""

    ranks: tuple[tuple[int, ...], ...]

    def share(self, top: int) -> float:
        """Share of all tokens among the best ``top`` guesses."""
        found = [rank < top for text in self.ranks for rank in text]
        return sum(found) / len(found) if found else 0.0

    @property
    def top(self) -> tuple[float, ...]:
        """Shares among the best 1, 2, 4, 8."""
        return tuple(self.share(count) for count in TOP)

    @property
    def hits(self) -> tuple[tuple[bool, ...], ...]:
        """For each text, which guesses are right."""
        return tuple(tuple(rank == 0 for rank in text) for text in self.ranks)


def answer_prompts(
    backbone: Backbone,
    prompts: Sequence[tuple[int, ...]],
    *,
    tokens: int,
    end_ids: Sequence[int],
) -> list[Text]:
    """The model's greedy answers; those of fewer than two tokens have nothing to guess."""
    limits = AnswerLimits(tokens, tuple(end_ids))
    answers = write_answers(backbone, prompts, limits=limits)
    pairs = zip(prompts, answers, strict=True)
    return [Text(prompt, tuple(answer)) for prompt, answer in pairs if len(answer) > 1]


@torch.no_grad()
def score_layers(
    backbone: Backbone, texts: Sequence[Text], step: Callable[[], None]
) -> tuple[LayerScore, ...]:
    """Acceptance of the raw exit behind every layer but the last, over a share of the tokens."""
    count = len(backbone.layers)
    rows, targets = _sampled_states(backbone, texts, step)
    scores, before = [], None
    hits = torch.tensor(TOP, device=backbone.device)
    for layer in range(count, 0, -1):
        ranks, best = _ranks_and_best(backbone, rows[layer], targets)
        if layer < count:
            assert before is not None
            top = (ranks[:, None] < hits[None, :]).double().mean(dim=0)
            agreement = float((best == before).double().mean())
            scores.append(LayerScore(layer, tuple(top.tolist()), agreement))
        before = best
        step()
    return tuple(reversed(scores))


@torch.no_grad()
def score_heads(
    backbone: Backbone,
    heads: Mapping[str, HeadWeights],
    texts: Sequence[Text],
    step: Callable[[], None],
) -> dict[str, HeadRanks]:
    """Ranks of every guessed token for each head, by its name."""
    shape = Shape.of(backbone.spec)
    found: dict[str, list[tuple[int, ...]]] = {name: [] for name in heads}
    depths = {tap.depth for head in heads.values() for tap in head.taps}
    for text in texts:
        ids, where, targets = _tensors(backbone, text)
        tables = backbone.tables(ids.shape[1])
        states = backbone_states(backbone, ids, depths, tables)
        for name, head in heads.items():
            taps = [states[tap.depth] for tap in head.taps]
            hidden = head_one_pass(head, taps, shape, tables)[0].index_select(0, where)
            ranks = target_ranks(head.output.logits(hidden), targets, head)
            found[name].append(tuple(ranks.tolist()))
        step()
    return {name: HeadRanks(tuple(ranks)) for name, ranks in found.items()}


def _sampled_states(
    backbone: Backbone, texts: Sequence[Text], step: Callable[[], None]
) -> tuple[dict[int, Tensor], Tensor]:
    """States [n, H] behind every layer at evenly chosen positions, and their targets [n]."""
    total = sum(len(text.guessed) for text in texts)
    stride = max(1, -(-total // RAW_POSITIONS))
    depths = range(1, len(backbone.layers) + 1)
    rows: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    targets: list[Tensor] = []
    for text in texts:
        ids, where, wanted = _tensors(backbone, text)
        states = backbone_states(backbone, ids, depths, backbone.tables(ids.shape[1]))
        chosen = where[::stride]
        for depth in depths:
            rows[depth].append(states[depth][0].index_select(0, chosen))
        targets.append(wanted[::stride])
        step()
    return {depth: torch.cat(parts) for depth, parts in rows.items()}, torch.cat(targets)


def _tensors(backbone: Backbone, text: Text) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [1, T], positions [n] behind which a token is guessed, and those tokens [n]."""
    ids = torch.tensor([*text.prompt, *text.answer], device=backbone.device)
    where = torch.tensor(list(text.guessed), device=backbone.device)
    return ids[None], where, ids[where + 1]


def _ranks_and_best(backbone: Backbone, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rank [n] of each target behind a layer's states [n, H], and the layer's first choice [n]."""
    head = HeadWeights((), backbone.output)
    chunk = chunk_tokens(backbone.spec.vocabulary)
    ranks, best = [], []
    for first in range(0, len(targets), chunk):
        part = slice(first, first + chunk)
        logits = backbone.output.logits(rows[part])
        ranks.append(target_ranks(logits, targets[part], head))
        best.append(logits.float().argmax(dim=-1))
    return torch.cat(ranks), torch.cat(best)
