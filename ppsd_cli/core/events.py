"""What happened, as facts: the decode loop yields these; others draw, count and record them.

A *node* is one prompt chunk or one token on its way through the pipeline. The node that enters
stage 0 in tick ``t`` is in stage ``s`` in tick ``t + s``. Nodes are known by serial number,
because void and live nodes share positions.
"""

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """How a committed token came about."""

    UNDRAFTED = "undrafted"
    """No guess was made for it (first token of an answer, or plain decoding)."""
    ACCEPTED = "accepted"
    """Stage 0 had guessed it, and the full model chose the same."""
    CORRECTED = "corrected"
    """Stage 0 had guessed another token; this is the full model's choice."""


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CONTEXT = "context"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Span:
    """When one stage worked on one node, in seconds of the host's monotonic clock."""

    stage: int
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Ticked:
    """A tick of stage 0 has ended. Times in seconds, on the host's monotonic clock.

    ``begin`` to ``received``: waiting for the boundary (results of the other stages);
    to ``drafted``: deciding and running the draft head; to ``end``: stage 0's layers. Where both
    take turns (EESD), ``drafted`` is ``received`` plus all the drafting of the tick.
    """

    tick: int
    begin: float
    received: float
    drafted: float
    end: float


@dataclass(frozen=True, slots=True)
class Entered:
    """A node entered stage 0. ``tokens`` is 1, or the size of a prompt chunk (``token_id`` None).

    ``position`` is that of its first token; ``drafted`` says that the token is a guess. ``parent``
    is the serial of the node that it stands on in a tree; None: the one that entered before.
    """

    tick: int
    serial: int
    position: int
    token_id: int | None
    tokens: int
    drafted: bool
    parent: int | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """The last stage finished a node: ``target_id`` is the full model's token after it.

    ``live`` is false for a node that was void before. ``spans`` has one entry a stage.
    """

    tick: int
    serial: int
    target_id: int
    live: bool
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """A token of the answer is final. ``draft_id`` is the wrong guess where it was corrected."""

    tick: int
    position: int
    token_id: int
    outcome: Outcome
    draft_id: int | None = None


@dataclass(frozen=True, slots=True)
class Flushed:
    """No guess for ``position`` was right; the nodes in flight with these serials are void."""

    tick: int
    position: int
    void: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pruned:
    """A guess for ``position`` was right; these nodes of a tree, which are not below it, are void.

    A chain has none.
    """

    tick: int
    position: int
    void: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete."""

    tick: int
    reason: FinishReason


Event = Ticked | Entered | Verified | Committed | Flushed | Pruned | Finished
