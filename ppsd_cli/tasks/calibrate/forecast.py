"""From measured times to tokens per second. Pure.

``Times`` is what every machine answers, whether its stages are processes on cores, devices of one
process, or the stages of one graph (``engine_forecast``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Protocol

from ppsd_cli.calibration_records import Boundary, PartTimes
from ppsd_cli.tasks.calibrate.flow import (
    Flow,
    Turn,
    hits_at,
    one_by_one,
    slowest,
    tick_seconds,
)

STAGE_0, LAST_STAGE, BOUNDARY = "stage 0", "last stage", "boundary"
Parts = dict[tuple[int, int], PartTimes]
"""By number of stages and width."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A pipeline to predict. ``taps``: depths that its head reads, the exit layer first.

    ``width``: guesses of a tick, ``depth``: depths of them; ``leaves``: mean number of nodes behind
    which it drafts.
    """

    split: tuple[int, ...]
    head: str
    taps: tuple[int, ...]
    width: int = 1
    leaves: float = 1.0
    depth: int = 1

    @property
    def returning(self) -> tuple[int, ...]:
        """Stages after 0 that send something to stage 0: those with taps, and the last."""
        ends = [sum(self.split[: s + 1]) for s in range(len(self.split))]
        last = len(ends) - 1
        return tuple(
            s
            for s in range(1, last + 1)
            if s == last or any(ends[s - 1] < tap <= ends[s] for tap in self.taps)
        )


@dataclass(frozen=True, slots=True)
class Plain:
    """Plain decoding in one place: seconds of a token."""

    threads: int
    device: str
    seconds: float


class Times(Protocol):
    """What is known of a machine, for tokens at one mean cache length."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths for which ticks are known, 1 first."""

    @property
    def deep_widths(self) -> tuple[int, ...]:
        """Widths for which ticks of two depths are known, of heads that can."""

    def plain(self) -> tuple[Plain, ...]:
        """Plain decoding, one for each thread count or device; the preferred one first."""

    def quick(self, setting: Setting) -> float:
        """About the seconds of a tick, for comparing splits."""

    def tick(self, setting: Setting, acceptance: float, *, free: str | None = None) -> float:
        """Mean seconds of a tick; ``free``: a part that costs nothing, to see what it costs."""


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """Stage processes on the cores of one machine (``cpu_times``).

    ``alone``, ``busy``: the parts by number of stages and width, with one stage and with all of
    them at work; the largest number stands for more. ``places``: core shares by number of stages.
    """

    alone: Parts
    busy: Parts
    boundary: Boundary
    places: dict[int, tuple[int, ...]]
    length: float
    decoding: tuple[Plain, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Those that are known for every number of stages."""
        counts = {stages for stages, _ in self.busy}
        every = {width for _, width in self.busy}
        return tuple(w for w in sorted(every) if all((n, w) in self.busy for n in counts))

    @property
    def deep_widths(self) -> tuple[int, ...]:
        """Those at which a head was timed that goes on behind its guesses."""
        least = min(count for count, _ in self.busy)
        return tuple(w for w in self.widths if self.busy[least, w].second)

    def plain(self) -> tuple[Plain, ...]:
        """As measured, with what a runner adds to a stage's parts."""
        extra = max(0.0, self.boundary.turn_alone)
        return tuple(replace(each, seconds=each.seconds + extra) for each in self.decoding)

    def quick(self, setting: Setting) -> float:
        """The busiest core, or the way around."""
        return slowest(self.flow(setting))

    def tick(self, setting: Setting, acceptance: float, *, free: str | None = None) -> float:
        """By simulation."""
        return tick_seconds(self.flow(setting, free=free), hits_at(acceptance))

    def naive(self, split: tuple[int, ...]) -> float:
        """Seconds of a token of the naive split."""
        return one_by_one(self.flow(Setting(split, "", ())))

    def flow(self, setting: Setting, *, free: str | None = None) -> Flow:
        """The stages of a setting as the simulation takes them."""
        hop = 0.0 if free == BOUNDARY else self.boundary.hop
        head = due = Turn()
        if setting.head and free != STAGE_0:
            head = self._head(self._draft, setting)
        turns = self._turns(setting.split, 1, free)
        wide = self._turns(setting.split, setting.width, free) if setting.width > 1 else ()
        if setting.depth > 1:  # behind a token that is due the head goes on at once
            turns = wide
            if setting.head and free != STAGE_0:
                head += self._head(_going_on, setting)
                due = self._head(_behind_due, setting)
        return Flow(
            turns=(turns[0] + due, *turns[1:]),
            head=head,
            places=self.places[len(setting.split)],
            hop=hop,
            returning=setting.returning,
            spread=self.boundary.spread,
            wide=wide,
            shared=Turn(self.boundary.shared_alone, self.boundary.shared_busy),
        )

    def _head(self, seconds: Callable[[Parts, Setting], float], setting: Setting) -> Turn:
        """A part of the head's work, alone and busy, as a real stage does it."""
        both = zip((self.alone, self.busy), self._beyond(), strict=True)
        return Turn(*(scale * seconds(some, setting) for some, (scale, _) in both))

    def _turns(self, split: tuple[int, ...], width: int, free: str | None) -> tuple[Turn, ...]:
        """Each stage's work on a level of that width."""
        last = len(split) - 1
        both = [_of(some, len(split), width) for some in (self.alone, self.busy)]

        def turn(stage: int) -> Turn:
            lm = stage == last and free != LAST_STAGE
            return Turn(
                *(
                    scale * parts.turn(split[stage], self.length, lm=lm)
                    + (0.0 if free == BOUNDARY else extra)
                    for parts, (scale, extra) in zip(both, self._beyond(), strict=True)
                )
            )

        return tuple(turn(s) for s in range(len(split)))

    def _beyond(self) -> list[tuple[float, float]]:
        """How a real stage's work differs from its parts, alone and busy: a factor, and seconds.

        What it takes longer is the runner's, once for every stage. Where it took less, the parts
        were timed beside something else, and all of them by the same share.
        """
        found = []
        split, stages = self.boundary.split, min(count for count, _ in self.busy)
        for some, extra in (
            (self.alone, self.boundary.turn_alone),
            (self.busy, self.boundary.turn_busy),
        ):
            parts = some[stages, 1]
            turns = [
                parts.turn(m, self.length, lm=s == len(split) - 1) for s, m in enumerate(split)
            ]
            scale = 1 + min(0.0, extra) / max(1e-9, fmean(turns))
            found.append((max(0.1, scale), max(0.0, extra)))
        return found

    def _draft(self, some: Parts, setting: Setting) -> float:
        """Seconds of a draft behind the mean number of leaves, between two measured ones."""
        stages = len(setting.split)
        widths = self.widths if setting.leaves > 1 else (1,)
        known = [(w, _of(some, stages, w).head(setting.head)) for w in widths]
        return between(known, setting.leaves)


def _going_on(some: Parts, setting: Setting) -> float:
    """Seconds of the second depth behind a level's best guesses."""
    return _of(some, len(setting.split), setting.width).going_on(setting.head)


def _behind_due(some: Parts, setting: Setting) -> float:
    """Seconds of the second depth behind one token: so much less as a draft behind one takes."""
    one, more = (_of(some, len(setting.split), w).head(setting.head) for w in (1, setting.width))
    return _going_on(some, setting) * min(1.0, one / max(1e-9, more))


def _of(parts: Parts, stages: int, width: int) -> PartTimes:
    most = max(count for count, _ in parts)
    return parts[min(stages, most), width]


def between(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value at ``at`` on the line through the two nearest points (x, y), in order of x; that
    of the first or last point beyond them."""
    for (low, before), (high, after) in pairwise(points):
        if at <= high:
            return before + max(0.0, (at - low) / (high - low)) * (after - before)
    return points[-1][1]


def tokens_per_tick(stages: int, acceptance: float) -> float:
    """Expected tokens of a tick in steady state (arXiv 2509.19368); of a tree, if that share of the
    tokens is among its guesses."""
    return 1 / (1 + (stages - 1) * (1 - acceptance))


def ticks_of(stages: int, hits: Sequence[bool]) -> int:
    """Ticks from the first token of an answer to its last, given which guesses are right.

    After a right guess the next token is verified in the next tick; after a wrong one, and after
    the first token, the pipe is empty and it takes ``stages`` ticks, whatever the guess.
    """
    if not hits:
        return 0
    return stages + sum(1 if hit else stages for hit in hits[:-1])


def speed(tick: float, answers: Sequence[tuple[int, int]]) -> float:
    """Median tokens per second over answers of so many tokens and ticks."""
    return median(tokens / (ticks * tick) for tokens, ticks in answers)


def acceptance_of(texts: Sequence[Sequence[bool]]) -> float:
    """Share of right guesses."""
    found = [hit for hits in texts for hit in hits]
    return fmean(found) if found else 0.0


def needed_acceptance(stages: int, tick: float, plain_seconds: float) -> float:
    """Acceptance at which a chain is as fast as plain decoding; above 1 where none is enough."""
    return 1 - (plain_seconds / tick - 1) / (stages - 1)
