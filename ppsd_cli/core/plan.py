"""What the schedule asks of a runner, and what it gets back, one tick at a time.

A plan may be symbolic (``Step``: "the draft of the newest node, or the correction"), so that a
runner can decide by itself with ``core.tree`` and run ahead of whoever reads the results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ppsd_cli.core.events import Span, Ticked

MAX_DRAFT_LENGTH = 64
"""Guesses of one burst at most; buffers are made for it."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from logits. Temperature 0 is greedy; the other defaults are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """Settings of one answer, known to every stage.

    ``feed_limit``: first position that need not be fed, because no token after it is wanted.
    ``drafting``: false makes every token wait for the full model (AR, the naive split).
    ``draft_length``: guesses that are drafted before all are verified at once (EESD); 0 drafts one
    a tick (the chain), or none.
    ``forced_drafts``: guesses by position from the end of the prompt on, which replace the draft
    head's output (the head still runs): drafts of a chosen quality for measurements and tests.
    ``keep_logits``: targets and drafts carry their logits.
    ``width``: guesses that enter per tick as a tree; 1 is the chain. ``tree_scale`` multiplies
    draft logits before they become the log shares by which a tree ranks its branches. ``depth`` 2:
    a level may hold guesses behind guesses of the same tick.
    ``forced_ranks``: where in a tree the forced guess stands among its siblings, by position: 0 is
    the best one, ``width`` or more means that it is not among them; None is always 0. Then
    ``rank_scores`` [width] are the log shares of all siblings, in place of the head's.
    """

    sampling: Sampling
    drafting: bool
    feed_limit: int
    forced_drafts: tuple[int, ...] | None = None
    prompt_tokens: int = 0
    keep_logits: bool = False
    draft_length: int = 0
    width: int = 1
    tree_scale: float = 1.0
    forced_ranks: tuple[int, ...] | None = None
    rank_scores: tuple[float, ...] = ()
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """Feed one chunk of the prompt. The first (``start`` 0) carries the request."""

    token_ids: tuple[int, ...]
    start: int
    last: bool
    request: Request | None


@dataclass(frozen=True, slots=True)
class Step:
    """Feed the next level: the correction if one is due, else the best guesses on the leaves.

    In a chain that is the one draft of the newest node.
    """


@dataclass(frozen=True, slots=True)
class Burst:
    """Feed the due token, then ``draft_length`` guesses one after the other, all in one tick.

    Each guess is drafted from the exit state of the token before it and run through stage 0's
    layers. All rows then leave stage 0 as one frame, and the last stage answers every row. Fewer
    guesses where the feed limit is near. Nothing may be in flight: a token is due.
    """

    draft_length: int


@dataclass(frozen=True, slots=True)
class Bubble:
    """Feed nothing; the other stages go on."""


Plan = Prompt | Step | Burst | Bubble


@dataclass(frozen=True, slots=True)
class Node:
    """A prompt chunk or token that entered stage 0. ``token_id`` is None for a chunk.

    In a tree ``parent`` is the serial of the node it stands on, ``slot`` its place in the caches
    and ``score`` the sum of log shares along its path since the last correction. In a chain they
    may be left out: a node stands on the one before, and its slot is its position.
    """

    serial: int
    position: int
    token_id: int | None
    tokens: int
    drafted: bool
    final: bool
    """The full model's token after this node is wanted (all but early prompt chunks)."""
    parent: int | None = None
    slot: int | None = None
    score: float = 0.0

    @property
    def last_slot(self) -> int:
        """Slot of its last token, on which the next one stands."""
        first = self.position if self.slot is None else self.slot
        return first + self.tokens - 1


@dataclass(frozen=True, slots=True)
class Target:
    """The last stage's answer for one node; ``token_id`` is None for an early prompt chunk."""

    serial: int
    token_id: int | None
    spans: tuple[Span, ...]
    logits: Any = None


@dataclass(frozen=True, slots=True)
class TickResult:
    """One finished tick of stage 0: what arrived at its boundary, and what entered.

    ``targets`` and ``entered`` are in the order of entry, with rising serials: none for a bubble,
    one in a chain, one for each row of a burst or node of a level. ``draft_logits``: with
    ``keep_logits`` the head's logits [V'] for each guess among ``entered``, in their order
    (siblings have the same); otherwise empty.
    """

    clock: Ticked
    targets: tuple[Target, ...]
    entered: tuple[Node, ...]
    draft_logits: tuple[Any, ...] = ()


class Runner(Protocol):
    """Runs the stages. Plans are answered in the order of their submission."""

    @property
    def stages(self) -> int:
        """Number of stages, 1 or more."""

    @property
    def lookahead(self) -> int:
        """Plans that may wait unanswered beside the one being collected; 0 = in step."""

    @property
    def pending(self) -> int:
        """Plans submitted and not yet collected."""

    def submit(self, plan: Plan) -> None:
        """Ask for one tick."""

    def collect(self) -> TickResult:
        """The oldest unanswered tick; raises StageError when a stage has failed."""

    def close(self) -> None:
        """Release devices and processes. Safe to call twice."""


def chunks(token_ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Cut a prompt into chunks of ``size`` tokens; the last may be shorter.

    The same for every decoder and split, because the width of a matrix decides its rounding.
    """
    return [tuple(token_ids[i : i + size]) for i in range(0, len(token_ids), size)]
