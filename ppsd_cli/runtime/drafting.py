"""Stage 0's guesses: the draft head, its memory of tapped states, and the choice of tokens.

Shapes: W nodes of a level, R guesses with others behind them, H hidden, V' draft vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.core.choose import best_tokens, choose, perturbed
from ppsd_cli.core.plan import Node, Request
from ppsd_cli.core.tree import CONTINUED, Child, best_children, best_of_two_depths
from ppsd_cli.errors import StageError
from ppsd_cli.model.branches import Branches
from ppsd_cli.model.heads import DraftHead

Candidates = list[list[tuple[int, float]]]


class Drafter:
    """Guesses for one answer after another. ``head`` None: there are none to make."""

    def __init__(
        self,
        head: DraftHead | None,
        branches: Branches | None,
        embed: Callable[[Tensor], Tensor],
    ) -> None:
        """``branches``: stage 0's own, where trees may be asked for; ``embed``: its embeddings
        [W, H] of token ids [W]."""
        self.head, self._branches, self._embed = head, branches, embed
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

    def children(self, level: Sequence[Node], leaves: Sequence[Node]) -> list[Child]:
        """The tree's guesses behind ``leaves``, those of the newest level without children.

        With depth 2 also guesses behind the best of these. The head runs on all nodes of the
        level, since what comes later sees them.
        """
        head, request = self._ready()
        assert self._branches is not None
        slots = [node.last_slot for node in level]
        lineage = self._branches.ancestors(slots, max(len(head.taps), 1))
        logits = head.branch_logits(replace(self._branches.rows(slots), ancestors=lineage))
        self._next = leaves[0].position + 1
        open_leaves = [leaf for leaf in leaves if leaf.position + 1 < request.feed_limit]
        if not open_leaves:
            return []
        rows = [level.index(leaf) for leaf in open_leaves]
        logits = logits[rows]
        candidates = self._candidates(logits, [leaf.position + 1 for leaf in open_leaves])
        first = best_children(open_leaves, candidates, request.width)
        order = {leaf.serial: row for leaf, row in zip(open_leaves, logits, strict=True)}
        if request.depth == 1:
            for child in first:
                self._keep(order[child.node.serial])
            return first
        second, behind = self._behind(first[:CONTINUED])
        children = best_of_two_depths(first, second, request.width)
        for child in children:
            above = child.parent
            self._keep(behind[id(above)] if isinstance(above, Child) else order[above.serial])
        return children

    def behind_due(self, root: Child) -> list[Child]:
        """The best guesses behind a token that is due and enters with them (depth 2)."""
        _, request = self._ready()
        children, logits = self._behind([root])
        children = children[: request.width - 1]
        for child in children:
            self._keep(logits[id(child.parent)])
        return children

    def _behind(self, parents: Sequence[Child]) -> tuple[list[Child], dict[int, Tensor]]:
        """The best guesses behind guesses, and the logits [V'] of each of these by identity."""
        head, request = self._ready()
        assert self._branches is not None
        fitting = [each for each in parents if each.position + 1 < request.feed_limit]
        if not fitting:
            return [], {}
        rows = self._branches.rows([each.node.last_slot for each in fitting])
        tokens = torch.tensor([each.token_id for each in fitting], device=rows.slots.device)
        logits = head.second_logits(rows, self._embed(tokens))
        candidates = self._candidates(logits, [each.position + 1 for each in fitting])
        found = [
            Child(parent, token_id, parent.score + share)
            for parent, tokens_of in zip(fitting, candidates, strict=True)
            for token_id, share in tokens_of
            if share > float("-inf")
        ]
        found.sort(key=lambda child: -child.score)
        return found, {id(each): row for each, row in zip(fitting, logits, strict=True)}

    def _candidates(self, logits: Tensor, positions: Sequence[int]) -> Candidates:
        """The best tokens of each row of logits [W, V'] with their log shares, for its position."""
        head, request = self._ready()
        at = torch.tensor(positions, device=logits.device)
        scores = perturbed(logits, request.sampling, at, head.token_ids)
        try:
            found = best_tokens(
                scores, request.width, scale=request.tree_scale, token_ids=head.token_ids
            )
        except ValueError as error:
            raise _not_numbers(error, positions[0]) from error
        pairs = zip(found, positions, strict=True)
        return [with_forced(request, position, [row])[0] for row, position in pairs]

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
