"""Stage 0's guesses: the draft head, its memory of tapped states, and the choice of tokens.

Shapes: W leaves of a tree, V' draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.core.choose import best_tokens, choose, perturbed
from ppsd_cli.core.plan import Node, Request
from ppsd_cli.core.tree import Child, best_children
from ppsd_cli.errors import StageError
from ppsd_cli.model.branches import Branches
from ppsd_cli.model.heads import DraftHead

Candidates = list[list[tuple[int, float]]]


class Drafter:
    """Guesses for one answer after another. ``head`` None: there are none to make."""

    def __init__(self, head: DraftHead | None, branches: Branches | None) -> None:
        """``branches``: stage 0's own, where trees may be asked for."""
        self.head, self._branches = head, branches
        self._request: Request | None = None
        self._next = 0  # first position whose row in the head is not as it should stay (chain)
        self.logits: list[Any] = []
        """Of each guess since the list was emptied, where the request keeps them."""

    def begin(self, request: Request) -> None:
        """A new answer."""
        self._request = request

    def observe(self, depth: int, where: int | Sequence[int], states: Tensor) -> None:
        """Remember tapped states (``DraftHead.observe``)."""
        if self.head is not None:
            self.head.observe(depth, where, states)

    def prefill(self, start: int, count: int) -> None:
        """A prompt chunk has left the last stage."""
        if self.head is not None:
            self.head.prefill(start, count)
            self._next = start + count

    def run_again_from(self, position: int) -> None:
        """Rows from ``position`` on were made from states that stood in for later ones."""
        self._next = min(self._next, position)

    def guess(self, position: int) -> int:
        """The chain's guess for ``position``, behind the token that entered last."""
        head, request = self._ready()
        first = min(self._next, position - 1)
        logits = head.draft_logits(position - 1, rows=position - first)
        self._next = position
        try:
            chosen = choose(
                logits, request.sampling, _at(position, logits), token_ids=head.token_ids
            )
        except ValueError as error:
            raise _not_numbers(error, position) from error
        self._keep(logits[0])
        forced = _forced_token(request, position)
        return int(chosen[0]) if forced is None else forced

    def children(self, leaves: Sequence[Node], position: int) -> list[Child]:
        """The tree's guesses for ``position``, behind the leaves of the deepest level."""
        head, request = self._ready()
        assert self._branches is not None
        slots = [leaf.last_slot for leaf in leaves]
        lineage = self._branches.ancestors(slots, max(len(head.taps), 1))
        logits = head.branch_logits(replace(self._branches.rows(slots), ancestors=lineage))
        self._next = position
        scores = perturbed(logits, request.sampling, _at(position, logits), head.token_ids)
        try:
            candidates = best_tokens(
                scores, request.width, scale=request.tree_scale, token_ids=head.token_ids
            )
        except ValueError as error:
            raise _not_numbers(error, position) from error
        children = best_children(leaves, with_forced(request, position, candidates), request.width)
        order = {leaf.serial: row for leaf, row in zip(leaves, logits, strict=True)}
        for child in children:
            self._keep(order[child.parent.serial])
        return children

    def _ready(self) -> tuple[DraftHead, Request]:
        assert self._request is not None
        assert self.head is not None, "drafting without a head"
        return self.head, self._request

    def _keep(self, logits: Tensor) -> None:
        if self._request is not None and self._request.keep_logits:
            self.logits.append(logits.float().cpu())


def with_forced(request: Request, position: int, candidates: Candidates) -> Candidates:
    """The candidates of each leaf, with the forced guess of this position where it shall stand."""
    token = _forced_token(request, position)
    if token is None:
        return candidates
    index = position - request.prompt_tokens
    rank = 0 if request.forced_ranks is None else request.forced_ranks[index]
    changed = []
    for row in candidates:
        others = [each for each, _ in row if each != token]
        tokens = [*others[:rank], token, *others[rank:]] if rank < request.width else others
        shares = request.rank_scores or [share for _, share in row]
        changed.append(list(zip(tokens, shares, strict=False)))
    return changed


def _forced_token(request: Request, position: int) -> int | None:
    tokens, index = request.forced_drafts, position - request.prompt_tokens
    return tokens[index] if tokens is not None and index < len(tokens) else None


def _at(position: int, logits: Tensor) -> Tensor:
    return torch.full((logits.shape[0],), position, device=logits.device)


def _not_numbers(error: ValueError, position: int) -> StageError:
    return StageError(f"stage 0: draft {error} at position {position}")
