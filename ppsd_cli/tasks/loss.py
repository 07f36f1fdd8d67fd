"""Cross-entropy of draft heads against the full model's distribution, in chunks.

The gradient with respect to the head's normed state is formed together with the loss, so no
logits are kept for a backward pass: memory is one chunk of logits whatever the batch.

Shapes: C tokens of a chunk, H hidden, V vocabulary, V' draft vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.model.layers import linear
from ppsd_cli.model.stage import Output

_CHUNK_BYTES = 1 << 30
_CHUNK_TOKENS = 4096


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of one chunk, so that its float32 logits stay below 1 GiB."""
    return max(64, min(_CHUNK_TOKENS, _CHUNK_BYTES // (4 * vocabulary) // 64 * 64))


@dataclass(frozen=True, slots=True)
class Targets:
    """What the full model says of one chunk: normed states [C, H] before the LM matrix,
    log-sum-exp [C] of its logits and the likeliest token [C] (full ids)."""

    normed: Tensor
    logits: Tensor
    lse: Tensor
    best: Tensor


def target_stats(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [C] in float32 and the likeliest token [C] of logits [C, V]."""
    scores = logits.float()
    return scores.logsumexp(dim=-1), scores.argmax(dim=-1)


def soft_cross_entropy(
    draft: Tensor, target: Tensor, target_lse: Tensor, column: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (a sum), its gradient with respect to the draft logits, and the number of hits: rows
    whose draft is the target's likeliest token. Ties go to the lowest column, as in ``choose``.

    ``draft``, ``target`` [C, V']; ``target_lse`` [C] over the full vocabulary, so that target
    probability outside a draft vocabulary counts for nothing; ``column`` [C] of the target's
    likeliest token (-1: not in the draft vocabulary); ``weight`` [C].
    """
    scores = draft.float()
    probability = (target.float() - target_lse[:, None]).exp()
    mass = probability.sum(dim=-1)
    best, guessed = scores.max(dim=-1)
    total = (scores - best[:, None]).exp().sum(dim=-1)
    lse = best + total.log()
    loss = ((mass * lse - (probability * scores).sum(dim=-1)) * weight).sum()
    guess = (scores - lse[:, None]).exp()
    gradient = (mass[:, None] * guess - probability) * weight[:, None]
    hits = (guessed == column) & (weight > 0)
    return loss, gradient.to(draft.dtype), hits.float().sum()


@dataclass(frozen=True, slots=True)
class LossPieces:
    """The two functions that pass over [C, V], which may be compiled."""

    stats: Callable[..., tuple[Tensor, Tensor]] = target_stats
    cross_entropy: Callable[..., tuple[Tensor, Tensor, Tensor]] = soft_cross_entropy

    @classmethod
    def compiled(cls, compiler: Callable[[Any], Any]) -> "LossPieces":
        """Both fused by ``compiler``."""
        return cls(compiler(target_stats), compiler(soft_cross_entropy))


class DraftOutput:
    """The frozen LM matrix of one draft vocabulary, and the way from full ids to its columns."""

    def __init__(self, lm_matrix: Tensor, token_ids: Tensor | None, vocabulary: int) -> None:
        self.lm_matrix = lm_matrix
        self.token_ids = token_ids
        self._columns: Tensor | None = None
        if token_ids is not None:
            self._columns = torch.full((vocabulary,), -1, device=lm_matrix.device)
            self._columns[token_ids] = torch.arange(len(token_ids), device=lm_matrix.device)

    def columns(self, token_ids: Tensor) -> Tensor:
        """Columns [C] of full token ids [C]; -1 where they are not in the draft vocabulary."""
        return token_ids if self._columns is None else self._columns[token_ids]

    def target_logits(self, targets: Targets) -> Tensor:
        """The full model's logits [C, V'] of the draft vocabulary."""
        return targets.logits if self.token_ids is None else targets.normed @ self.lm_matrix


@torch.no_grad()
def losses_and_gradients(
    final: Tensor,
    drafts: Sequence[tuple[Tensor, DraftOutput]],
    weight: Tensor,
    model_output: Output,
    pieces: LossPieces,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses [heads], hits [heads], and for each head the gradient [n, H] of its normed states.

    ``final`` [n, H]: normed final states of the full model at the wanted positions; ``drafts``:
    for each head its normed states [n, H] and output; ``weight`` [n] (0 for padding rows).
    """
    chunk = chunk_tokens(model_output.lm_matrix.shape[1])
    gradients = [torch.empty_like(states) for states, _ in drafts]
    losses = torch.zeros(len(drafts), device=final.device)
    hits = torch.zeros(len(drafts), device=final.device)
    for first in range(0, final.shape[0], chunk):
        part = slice(first, first + chunk)
        logits = linear(final[part], model_output.lm_matrix)
        targets = Targets(final[part], logits, *pieces.stats(logits))
        reduced: dict[int, tuple[Tensor, Tensor]] = {}
        for index, (states, output) in enumerate(drafts):
            if id(output) not in reduced:
                reduced[id(output)] = (output.target_logits(targets), output.columns(targets.best))
            target, column = reduced[id(output)]
            draft = states[part] @ output.lm_matrix
            loss, gradient, hit = pieces.cross_entropy(
                draft, target, targets.lse, column, weight[part]
            )
            losses[index] += loss
            hits[index] += hit
            torch.mm(gradient, output.lm_matrix.t(), out=gradients[index][part])
    return losses, hits, gradients
