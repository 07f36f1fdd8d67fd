"""Figures of one run, counted from its events. Pure: no clock, no tensors.

Boundaries are numbered by the tick that starts there. *Decode ticks* begin with the tick in which
the last prompt chunk enters and end at the boundary of the last commit, so ``n`` stages and a
one-chunk prompt cost ``n`` ticks to the first token.

EESD takes ``n`` ticks for the prompt and ``n`` for each burst, so ``tokens_per_tick`` compares it
with a chain over the same stages; on one device, where the stages run one after the other, what
counts is ``tokens_per_feed``, the tokens that a burst brings.
"""

from collections import Counter
from dataclasses import dataclass
from statistics import fmean, median

from ppsd_cli.core.events import (
    Committed,
    Entered,
    Event,
    Finished,
    Flushed,
    Outcome,
    Pruned,
    Ticked,
    Verified,
)
from ppsd_cli.core.occupancy import Cell, Occupancy


@dataclass(frozen=True, slots=True)
class StageBusy:
    """Shares of one stage's decode ticks; they add up to 1. Prompt work is useful."""

    useful: float
    void: float
    bubble: float


@dataclass(frozen=True, slots=True)
class StageTime:
    """How long one stage worked on what entered in one tick: a token, or a burst (seconds)."""

    mean: float
    median: float


@dataclass(frozen=True, slots=True)
class TickTime:
    """Medians over the decode ticks of stage 0, in seconds; parts need not add up to ``total``.

    ``draft`` and ``layers`` over those in which tokens entered.
    """

    total: float
    wait: float
    draft: float
    layers: float


@dataclass(frozen=True, slots=True)
class RunStats:
    """Figures of one run; a rate is None where there is nothing to divide by."""

    ticks: int
    """Decode ticks, see the module."""
    prompt_ticks: int
    """Ticks before them, in which earlier prompt chunks entered."""
    tokens: int
    """Committed tokens."""
    verified: int
    """Committed tokens for which there was a guess."""
    accepted: int
    void_drafts: int
    """Guesses that went in and were made void: wrong ones and all that stood on them; in a tree
    also those beside the right one."""
    flushes: int
    acceptance_rate: float | None
    tokens_per_tick: float | None
    runs: tuple[tuple[int, int], ...]
    """``(length, how often)`` of runs of accepted tokens in a row, shortest first."""
    stage_busy: tuple[StageBusy, ...]
    """One a stage; empty while there are no decode ticks."""
    stage_seconds: tuple[StageTime, ...]
    """One a stage; empty when the runner reports no spans for every stage."""
    tick_time: TickTime | None
    feeds: int = 0
    """Ticks in which tokens entered: one each in a chain, a burst each in EESD."""
    nodes: int = 0
    """Tokens that entered in them, guesses included."""

    @property
    def tokens_per_feed(self) -> float | None:
        """Tokens after the first, which the prompt gave, over ``feeds``."""
        return (self.tokens - 1) / self.feeds if self.feeds else None

    @property
    def nodes_per_feed(self) -> float | None:
        """``nodes`` over ``feeds``: 1 in a chain, up to the width in a tree."""
        return self.nodes / self.feeds if self.feeds else None

    @property
    def stage_busy_fraction(self) -> float | None:
        """Useful share of all stages' decode ticks."""
        return fmean(busy.useful for busy in self.stage_busy) if self.stage_busy else None

    @property
    def tick_seconds(self) -> float | None:
        """Median length of a decode tick."""
        return self.tick_time.total if self.tick_time else None


@dataclass(frozen=True, slots=True)
class Progress:
    """The figures that cost nothing to know at any moment; fields as in ``RunStats``."""

    ticks: int
    tokens: int
    verified: int
    accepted: int

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over verified."""
        return self.accepted / self.verified if self.verified else None

    @property
    def tokens_per_tick(self) -> float | None:
        """Committed tokens over decode ticks."""
        return self.tokens / self.ticks if self.ticks else None


class StatsBuilder:
    """Counts the events of one run; what comes after ``Finished`` is not part of it."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._occupancy = Occupancy()
        self._outcomes: Counter[Outcome] = Counter()
        self._runs: Counter[int] = Counter()
        self._run = 0
        self._drafted: set[int] = set()
        self._feeds: set[int] = set()
        self._nodes = 0
        self._leaders: set[int] = set()
        self._void_drafts: set[int] = set()
        self._flushes = 0
        self._first_enter: int | None = None
        self._last_chunk = 0
        self._last_commit: int | None = None
        self._ticked: list[Ticked] = []
        self._spans: list[list[float]] = [[] for _ in range(stages)]
        self._finished = False

    def add(self, event: Event) -> None:
        """Count one event, in the order in which the decode loop gives them."""
        if self._finished:
            return
        self._occupancy.add(event)
        match event:
            case Entered():
                self._enter(event)
            case Verified():
                self._verify(event)
            case Committed():
                self._commit(event)
            case Flushed():
                self._flushes += 1
                self._void_drafts.update(self._drafted.intersection(event.void))
            case Pruned():
                self._void_drafts.update(self._drafted.intersection(event.void))
            case Ticked():
                self._ticked.append(event)
            case Finished():
                self._finished = True

    def progress(self) -> Progress:
        """Counts so far, in constant time."""
        accepted = self._outcomes[Outcome.ACCEPTED]
        return Progress(
            ticks=0 if self._last_commit is None else self._last_commit - self._last_chunk,
            tokens=self._outcomes.total(),
            verified=accepted + self._outcomes[Outcome.CORRECTED],
            accepted=accepted,
        )

    def snapshot(self) -> RunStats:
        """All figures so far; takes time in proportion to the ticks."""
        now = self.progress()
        runs = self._runs + Counter([self._run] if self._run else [])
        first = self._first_enter
        return RunStats(
            ticks=now.ticks,
            prompt_ticks=0 if first is None else self._last_chunk - first,
            tokens=now.tokens,
            verified=now.verified,
            accepted=now.accepted,
            void_drafts=len(self._void_drafts),
            flushes=self._flushes,
            acceptance_rate=now.acceptance_rate,
            tokens_per_tick=now.tokens_per_tick,
            runs=tuple(sorted(runs.items())),
            stage_busy=self._busy(now.ticks),
            stage_seconds=self._stage_seconds(),
            tick_time=self._tick_time(now.ticks),
            feeds=len(self._feeds),
            nodes=self._nodes,
        )

    def _enter(self, event: Entered) -> None:
        if self._first_enter is None:
            self._first_enter = self._last_chunk = event.tick
        if event.token_id is None:
            if self._last_commit is None:
                self._last_chunk = event.tick
            return
        self._nodes += 1
        if event.tick not in self._feeds:  # nodes of one tick share their stages' times
            self._feeds.add(event.tick)
            self._leaders.add(event.serial)
        if event.drafted:
            self._drafted.add(event.serial)

    def _verify(self, event: Verified) -> None:
        if not event.live and event.serial in self._drafted:
            self._void_drafts.add(event.serial)
        if event.serial in self._leaders:
            for span in event.spans:
                self._spans[span.stage].append(span.end - span.begin)

    def _commit(self, event: Committed) -> None:
        self._outcomes[event.outcome] += 1
        self._last_commit = event.tick
        if event.outcome is Outcome.ACCEPTED:
            self._run += 1
        elif self._run:
            self._runs[self._run] += 1
            self._run = 0

    def _busy(self, ticks: int) -> tuple[StageBusy, ...]:
        if not ticks:
            return ()
        busy = []
        for stage in range(self._stages):
            span = range(self._last_chunk, self._last_chunk + ticks)
            cells = Counter(self._occupancy.cell(stage, tick) for tick in span)
            useful = cells[Cell.USEFUL] + cells[Cell.PROMPT]
            shares = (useful, cells[Cell.VOID], cells[Cell.BUBBLE])
            busy.append(StageBusy(*(count / ticks for count in shares)))
        return tuple(busy)

    def _stage_seconds(self) -> tuple[StageTime, ...]:
        if not all(self._spans):
            return ()
        return tuple(StageTime(mean=fmean(each), median=median(each)) for each in self._spans)

    def _tick_time(self, ticks: int) -> TickTime | None:
        first = self._last_chunk
        decode = [each for each in self._ticked if first <= each.tick < first + ticks]
        if not decode:
            return None
        feeding = [each for each in decode if each.tick in self._feeds] or decode
        return TickTime(
            total=median(each.end - each.begin for each in decode),
            wait=median(each.received - each.begin for each in decode),
            draft=median(each.drafted - each.received for each in feeding),
            layers=median(each.end - each.drafted for each in feeding),
        )
