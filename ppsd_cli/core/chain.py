"""The accept rule of a chain, and the ledger of nodes in flight.

The rule (arXiv 2509.19368, section 3): the full model's token for a position is final. If stage 0
had fed the same token there, the nodes behind it stay; otherwise they are void and the token
enters next. A runner uses this class to decide; the schedule uses it to follow what was decided.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from ppsd_cli.core.events import Outcome
from ppsd_cli.core.plan import Node


def accepts(fed: Any, target: Any) -> Any:
    """Whether a fed guess stands. Plain integers or tensors of token ids alike (elementwise)."""
    return fed == target


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one target settled: the token at ``position`` is final, ``void`` nodes are dead."""

    position: int
    token_id: int
    outcome: Outcome
    draft_id: int | None
    void: tuple[Node, ...]


class Chain:
    """Live nodes in the order in which they entered, and the token that is due to enter."""

    def __init__(self) -> None:
        self._live: deque[Node] = deque()
        self._due: tuple[int, int] | None = None

    @property
    def due(self) -> tuple[int, int] | None:
        """Position and token id of a committed token that has not been fed, or None."""
        return self._due

    @property
    def newest(self) -> Node | None:
        """The live node that entered last, or None."""
        return self._live[-1] if self._live else None

    def clear(self) -> None:
        """A new answer begins: everything in flight is void."""
        self._live.clear()
        self._due = None

    def enter(self, node: Node) -> None:
        """A node entered stage 0."""
        if node.final:
            self._live.append(node)
        self._due = None

    def next_position(self) -> int:
        """Position of the token that enters next."""
        if self._due is not None:
            return self._due[0]
        newest = self._live[-1]
        return newest.position + newest.tokens

    def verify(self, serial: int, target_id: int) -> Verdict | None:
        """Apply the full model's token for the node ``serial``; None if that node is void.

        Results come in the order of entry, so a live node that is verified is the oldest one.
        """
        if not self._live or self._live[0].serial != serial:
            return None
        node = self._live.popleft()
        position = node.position + node.tokens
        if not self._live:
            self._due = (position, target_id)
            return Verdict(position, target_id, Outcome.UNDRAFTED, None, ())
        fed = self._live[0]
        if accepts(fed.token_id, target_id):
            return Verdict(position, target_id, Outcome.ACCEPTED, None, ())
        void = tuple(self._live)
        self._live.clear()
        self._due = (position, target_id)
        return Verdict(position, target_id, Outcome.CORRECTED, fed.token_id, void)
