"""Trees of guesses without a model: how a pipeline goes through an answer whose guesses are known.

The rule is that of ``core.tree``. On the true text the guesses are those given for its positions;
on any other text those of a position drawn at random, none of which is right. With one stage or
two all leaves are true, so there nothing is drawn; with more, what a head says on a wrong text is
the only thing that is not known (docs/trees.md compares it with real runs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ppsd_cli.core.events import Outcome
from ppsd_cli.core.plan import Node
from ppsd_cli.core.tree import CONTINUED, Child, Tree, best_children, best_of_two_depths

Guesses = Sequence[Sequence[tuple[int, float]]]
"""For each token of an answer but the first its best guesses with their log shares, best first."""


@dataclass(frozen=True, slots=True)
class Level:
    """What one tick fed: so many nodes; ``behind``: nodes on which the head ran for them (0: what
    entered was known, or stands on what was)."""

    nodes: int
    behind: int


@dataclass(frozen=True, slots=True)
class Course:
    """One answer: ticks from the prompt's last chunk to the last token, and its levels in order.

    ``verified``: tokens that guesses had entered for; ``accepted``: those among these guesses.
    """

    ticks: int
    levels: tuple[Level, ...]
    verified: int
    accepted: int


class TreeSimulation:
    """One answer's tree. False tokens are numbers below zero."""

    def __init__(
        self,
        rows: Guesses,
        tokens: Sequence[int],
        *,
        stages: int,
        width: int,
        random: Random,
        second: Guesses | None = None,
    ) -> None:
        """``rows`` for ``tokens[1:]``; of each the best ``width`` are used.

        ``second``: with two depths a tick, the guesses for the same tokens where the token before
        them enters in the same tick.
        """
        self._rows, self._tokens, self._stages, self._width = rows, tokens, stages, width
        self._second = second
        self._random, self._tree, self._serial = random, Tree(), 0
        self._true: dict[int, bool] = {}
        self._last = len(tokens) - 1

    def run(self) -> Course:
        """Go to the last token."""
        tokens = self._tokens
        flying: list[list[Node]] = []
        levels: list[Level] = []
        self._tree.enter(self._node(0, None, None, 0.0, true=True))
        self._tree.verify(0, tokens[0])
        committed, tick, verified, accepted = 1, self._stages, 0, 0
        while committed < len(tokens):
            behind = 0 if self._tree.due else len(self._tree.level)
            flying.append(self._level())
            levels.append(Level(len(flying[-1]), behind if flying[-1] else 0))
            tick += 1
            if len(flying) < self._stages:
                continue
            for node in flying.pop(0):
                if node.position >= len(tokens):
                    continue
                verdict = self._tree.verify(node.serial, tokens[node.position])
                if verdict is not None:
                    committed += 1
                    verified += verdict.outcome is not Outcome.UNDRAFTED
                    accepted += verdict.outcome is Outcome.ACCEPTED
        return Course(tick, tuple(levels), verified, accepted)

    def _level(self) -> list[Node]:
        """The nodes that enter in this tick; position p is that of token p - 1 of the answer."""
        tree = self._tree
        position = tree.next_position()
        if position > self._last:
            return []
        if tree.due is not None:
            root = self._node(position, tree.due[1], None, 0.0, true=True)
            entering = [root, *self._behind_due(root)]
        else:
            entering = self._guesses()
        if entering:
            tree.enter_level(entering)
        return entering

    def _guesses(self) -> list[Node]:
        leaves = [leaf for leaf in self._tree.leaves if leaf.position < self._last]
        offered = [
            self._offer(self._rows, leaf.position, self._true[leaf.serial]) for leaf in leaves
        ]
        first = best_children(leaves, offered, self._width)
        second = [child for each in first[:CONTINUED] for child in self._behind(each)]
        made: dict[int, Node] = {}
        for child in best_of_two_depths(first, second, self._width):
            above = child.parent
            made[id(child)] = self._child(
                made[id(above)] if isinstance(above, Child) else above, child.token_id, child.score
            )
        return list(made.values())

    def _behind(self, child: Child) -> list[Child]:
        """The second depth behind a guess."""
        if self._second is None or child.position >= self._last:
            return []
        true = self._true[child.node.serial] and child.token_id == self._tokens[child.position - 1]
        offer = self._offer(self._second, child.position, true)
        return [Child(child, token, child.score + share) for token, share in offer]

    def _behind_due(self, root: Node) -> list[Node]:
        """The second depth behind a token that is due."""
        if self._second is None or root.position >= self._last or self._width == 1:
            return []
        offer = self._offer(self._second, root.position, true=True)
        return [self._child(root, token, share) for token, share in offer[: self._width - 1]]

    def _child(self, parent: Node, token: int, score: float) -> Node:
        position = parent.position + 1
        true = self._true[parent.serial] and token == self._tokens[position - 1]
        return self._node(position, token, parent.serial, score, true=true)

    def _offer(self, rows: Guesses, position: int, true: bool) -> Sequence[tuple[int, float]]:
        """The given guesses behind ``position`` on a true text; on another, wrong ones with shares
        of elsewhere."""
        if true:
            return rows[position - 1][: self._width]
        row = self._random.choice(rows)[: self._width]
        return [(-1 - rank, share) for rank, (_, share) in enumerate(row)]

    def _node(
        self, position: int, token: int | None, parent: int | None, score: float, *, true: bool
    ) -> Node:
        node = Node(
            self._serial, position, token, 1, drafted=parent is not None, final=True,
            parent=parent, score=score,
        )  # fmt: skip
        self._true[self._serial] = true
        self._serial += 1
        return node
