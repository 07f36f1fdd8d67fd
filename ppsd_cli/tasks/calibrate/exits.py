"""How often each exit layer and each head guesses what the model says, in one pass over answers.

Shapes: T positions of one text, n of them before an answer token, H hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppsd_cli.calibration_records import TOP, LayerScore
from ppsd_cli.config import DEFAULT_TREE_SCALE
from ppsd_cli.core.choose import best_tokens
from ppsd_cli.core.schedule import Limits
from ppsd_cli.core.tree import MAX_WIDTH
from ppsd_cli.model.heads import HeadWeights
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.one_pass import Backbone, backbone_states, head_states, second_one_pass
from ppsd_cli.model.stage import Output
from ppsd_cli.tasks.bench.decoders import Decoder
from ppsd_cli.tasks.calibrate.guessers import Rows
from ppsd_cli.tasks.evaluate import target_ranks
from ppsd_cli.tasks.loss import chunk_tokens

Found = tuple[tuple[int, ...], Rows]
"""Of one text: ranks of the guessed tokens, and the best guesses for them."""
RAW_POSITIONS = 256
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
    """For each text, the rank of every guessed token among the head's guesses (0: its draft), and
    the best of these guesses with their log shares.

    ``second``: the same where the token before was a guess that is right, so that the head goes on
    from its own state; None where it cannot.
    """

    ranks: tuple[tuple[int, ...], ...]
    guesses: tuple[Rows, ...] = ()
    second: "HeadRanks | None" = None

    @classmethod
    def of(cls, texts: "Sequence[tuple[Found, ...]]") -> "HeadRanks":
        """From what was found in each text, on the first level and, where there is one, on the
        second."""
        first, *more = (
            cls(tuple(ranks for ranks, _ in level), tuple(rows for _, rows in level))
            for level in zip(*texts, strict=True)
        )
        return replace(first, second=more[0]) if more else first

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
    decoder: Decoder,
    prompts: Sequence[tuple[int, ...]],
    limits: Limits,
    step: Callable[[], None],
) -> list[Text]:
    """The model's greedy answers; those of fewer than two tokens have nothing to guess."""
    texts = []
    for prompt in prompts:
        texts.append(Text(prompt, decoder.answer(prompt, limits).token_ids))
        step()
    return [text for text in texts if len(text.answer) > 1]


@torch.no_grad()
def score_exits(
    backbone: Backbone,
    heads: Mapping[str, HeadWeights],
    texts: Sequence[Text],
    step: Callable[[], None],
) -> tuple[tuple[LayerScore, ...], dict[str, HeadRanks]]:
    """The raw exit behind every layer but the last, over a share of the tokens; each head by its
    name, over all of them. One pass through the model for each text."""
    stride = max(1, -(-sum(len(text.guessed) for text in texts) // RAW_POSITIONS))
    depths = range(1, len(backbone.layers) + 1)
    rows: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    found: dict[str, list[tuple[Found, ...]]] = {name: [] for name in heads}
    sampled = []
    for text in texts:
        ids, where, targets = _tensors(backbone, text)
        states = backbone_states(backbone, ids, depths, backbone.tables(ids.shape[1]))
        tokens = backbone.embed(ids)
        for name, head in heads.items():
            levels = _levels(backbone, head, states, tokens)
            found[name].append(
                tuple(
                    _guesses(output, hidden[0].index_select(0, where), targets)
                    for hidden, output in levels
                )
            )
        for depth in depths:
            rows[depth].append(states[depth][0].index_select(0, where[::stride]))
        sampled.append(targets[::stride])
        step()
    wanted = torch.cat(sampled)
    layers = _score_layers(
        backbone, {d: torch.cat(parts) for d, parts in rows.items()}, wanted, step
    )
    return layers, {name: HeadRanks.of(texts) for name, texts in found.items()}


def _levels(
    backbone: Backbone, head: HeadWeights, states: Mapping[int, Tensor], tokens: Tensor
) -> list[tuple[Tensor, Output]]:
    """States [1, T, H] of a head's first level and, where it has one, its second, each with its
    output; ``tokens`` [1, T, H]: embeddings."""
    shape, tables = Shape.of(backbone.spec), backbone.tables(tokens.shape[1])
    own = head_states(head, [states[tap.depth] for tap in head.taps], shape, tables)
    levels = [(own.state, head.output)]
    if head.second is not None:
        hidden = second_one_pass(head.second, own, tokens, shape, tables)
        levels.append((hidden, replace(head.output, norm=head.second.norm)))
    return levels


def _guesses(output: Output, hidden: Tensor, targets: Tensor) -> Found:
    """Ranks of the targets [n] of one text, and the best guesses for them from states [n, H], as a
    tree with the usual scale takes them."""
    logits = output.logits(hidden).float()
    best = best_tokens(logits, MAX_WIDTH, scale=DEFAULT_TREE_SCALE, token_ids=output.token_ids)
    return tuple(target_ranks(logits, targets, output).tolist()), tuple(map(tuple, best))


def _score_layers(
    backbone: Backbone, rows: Mapping[int, Tensor], targets: Tensor, step: Callable[[], None]
) -> tuple[LayerScore, ...]:
    """From states [n, H] behind every layer and the targets [n]."""
    scores, later = [], None
    tops = torch.tensor(TOP, device=backbone.device)
    for layer in sorted(rows, reverse=True):
        ranks, best = _ranks_and_best(backbone, rows[layer], targets)
        if later is not None:
            top = (ranks[:, None] < tops[None, :]).double().mean(dim=0)
            agreement = float((best == later).double().mean())
            scores.append(LayerScore(layer, tuple(top.tolist()), agreement))
        later = best
        step()
    return tuple(reversed(scores))


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
        ranks.append(target_ranks(logits, targets[part], head.output))
        best.append(logits.float().argmax(dim=-1))
    return torch.cat(ranks), torch.cat(best)
