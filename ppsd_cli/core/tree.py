"""The accept rule of a tree of guesses, and the ledger of nodes in flight. Width 1 is the chain.

The rule (arXiv 2509.19368, section 3, there for a chain): the full model's token for a position is
final. If stage 0 had fed the same token behind the node that was verified, the nodes below it stay
and all others are void; if not, everything in flight is void and the token enters next. A runner
uses this class to decide; the schedule uses it to follow what was decided.

Nodes enter level by level, one a tick. Those of a level share a position, or with depth 2 some are
children of others of their level. What is live is at most ``stages`` levels of ``width`` nodes, so
that the whole state fits in integer arrays of fixed size.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ppsd_cli.core.events import Outcome
from ppsd_cli.core.plan import Node
from ppsd_cli.core.slots import Slots

MAX_WIDTH = 16
"""Nodes of one level at most."""

MAX_DEPTH = 2
"""Depths of guesses that may enter in one tick."""

CONTINUED = 4
"""Guesses of a level, the best ones, behind which a second depth is drafted."""


def accepts(fed: Any, target: Any) -> Any:
    """Whether a fed guess stands. Plain integers or tensors of token ids alike (elementwise)."""
    return fed == target


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one target settled: the token at ``position`` is final, ``void`` nodes are dead.

    ``void``: after a wrong guess everything that was in flight; after a right one what is not
    below it. ``draft_id``: the best wrong guess where the token is a correction.
    """

    position: int
    token_id: int
    outcome: Outcome
    draft_id: int | None
    void: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Child:
    """A guess that may enter: ``score`` is the sum of log shares along its path.

    ``parent``: the node that it stands on, or a guess that enters with it (depth 2).
    """

    parent: "Node | Child"
    token_id: int
    score: float

    @property
    def node(self) -> Node:
        """The node that a guess of the first depth stands on."""
        assert isinstance(self.parent, Node)
        return self.parent

    @property
    def position(self) -> int:
        """Where it stands in the text."""
        above = self.parent
        return above.position + (above.tokens if isinstance(above, Node) else 1)


class Tree:
    """Live nodes in the order in which they entered, and the token that is due to enter."""

    def __init__(self) -> None:
        self._live: deque[Node] = deque()
        self._due: tuple[int, int] | None = None
        self._tip: Node | None = None
        self._slots = Slots()
        self._levels: list[int] = []

    @property
    def due(self) -> tuple[int, int] | None:
        """Position and token id of a committed token that has not been fed, or None."""
        return self._due

    @property
    def live(self) -> tuple[Node, ...]:
        """All live nodes; the first is the committed one that is verified next."""
        return tuple(self._live)

    @property
    def tip(self) -> Node | None:
        """The node that was verified last: a due token stands on it."""
        return self._tip

    @property
    def level(self) -> tuple[Node, ...]:
        """The live nodes of the newest level that has any, in their order; one in a chain."""
        if not self._live:
            return ()
        index = bisect_right(self._levels, self._live[-1].serial) - 1
        first = self._levels[index] if index >= 0 else 0
        return tuple(node for node in self._live if node.serial >= first)

    @property
    def leaves(self) -> tuple[Node, ...]:
        """Those of ``level`` that have no children in it: all, where a tick is one depth."""
        level = self.level
        parents = {node.parent for node in level}
        return tuple(node for node in level if node.serial not in parents)

    @property
    def newest(self) -> Node | None:
        """The live node that entered last, or None."""
        return self._live[-1] if self._live else None

    @property
    def slots(self) -> Slots:
        """Which cache slots are taken."""
        return self._slots

    def clear(self) -> None:
        """A new answer begins: everything in flight is void."""
        self._live.clear()
        self._due, self._tip = None, None
        self._slots.clear()
        self._levels.clear()

    def enter_level(self, nodes: Sequence[Node]) -> None:
        """What entered stage 0 in one tick, parents before their children."""
        self._levels.append(nodes[0].serial)
        for node in nodes:
            self.enter(node)

    def enter(self, node: Node) -> None:
        """A node entered stage 0 and takes the lowest free slot.

        A node without ``parent`` stands on the newest live one, a due token on the one that was
        verified last.
        """
        parent = self._parent(node)
        slot = self._slots.take(node.tokens)
        assert node.slot in (None, slot), "runner and schedule disagree about a slot"
        if node.final:
            above = None if parent is None else parent.serial
            if (node.slot, node.parent) != (slot, above):
                node = replace(node, slot=slot, parent=above)
            self._live.append(node)
        self._due = None

    def next_position(self) -> int:
        """Position of the tokens that enter next."""
        if self._due is not None:
            return self._due[0]
        leaf = self.leaves[0]
        return leaf.position + leaf.tokens

    def end_of_parent(self, node: Node) -> int:
        """The only position that this node, which has not entered yet, may have."""
        parent = self._parent(node)
        return 0 if parent is None else parent.position + parent.tokens

    def verify(self, serial: int, target_id: int) -> Verdict | None:
        """Apply the full model's token for the node ``serial``; None if that node is void.

        Results come in the order of entry, so the live node that is verified is the oldest one;
        its token is final, and every other live node is below it.
        """
        if not self._live or self._live[0].serial != serial:
            return None
        node = self._tip = self._live.popleft()
        position = node.position + node.tokens
        if not self._live:
            self._due = (position, target_id)
            return Verdict(position, target_id, Outcome.UNDRAFTED, None, ())
        children = [each for each in self._live if each.parent == serial]
        assert children, "a void node is live"
        right = [each for each in children if accepts(each.token_id, target_id)]
        void = self._keep_below(right[0] if right else None)
        if right:
            return Verdict(position, target_id, Outcome.ACCEPTED, None, void)
        self._due = (position, target_id)
        return Verdict(position, target_id, Outcome.CORRECTED, children[0].token_id, void)

    def _parent(self, node: Node) -> Node | None:
        """The live or last verified node that ``node`` stands on; None at the start of a text."""
        if node.parent is None:
            return self.newest or self._tip
        for each in (*self._live, self._tip):
            if each is not None and each.serial == node.parent:
                return each
        raise AssertionError("a node stands on one that is void")

    def _keep_below(self, root: Node | None) -> tuple[Node, ...]:
        """Only ``root`` and what is below it stay live; the others, in the order of entry."""
        kept: set[int | None] = set() if root is None else {root.serial}
        void = []
        for node in tuple(self._live):
            if node is root or node.parent in kept:
                kept.add(node.serial)
            else:
                void.append(node)
        self._live = deque(node for node in self._live if node.serial in kept)
        for node in void:
            assert node.slot is not None
            self._slots.free(node.slot)
        return tuple(void)


def best_children(
    leaves: Sequence[Node], candidates: Sequence[Sequence[tuple[int, float]]], width: int
) -> list[Child]:
    """The ``width`` best children over all leaves, best first; fewer where there are not so many.

    ``candidates``: for each leaf its best tokens with their log shares, best first; ``width`` of
    them are enough. A share of minus infinity does not enter. Ties go to the earlier leaf, then to
    the earlier candidate.
    """
    children = [
        Child(leaf, token_id, leaf.score + share)
        for leaf, tokens in zip(leaves, candidates, strict=True)
        for token_id, share in tokens
        if share > float("-inf")
    ]
    return sorted(children, key=lambda child: -child.score)[:width]


def best_of_two_depths(first: Sequence[Child], second: Sequence[Child], width: int) -> list[Child]:
    """The ``width`` best of guesses, best first, and of guesses behind them: the former first.

    A guess never scores higher than the one that it stands on, so none enters without it.
    """
    chosen = sorted((*first, *second), key=lambda child: -child.score)[:width]
    return sorted(chosen, key=lambda child: isinstance(child.parent, Child))
