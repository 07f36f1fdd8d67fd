"""From measured times to tokens per second. Pure.

``Times`` is what every machine answers, whether its stages are processes on cores, devices of one
process, or the stages of one graph (``engine_times``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Setting:
    """A pipeline to predict. ``taps``: depths that its head reads, the exit layer first."""

    split: tuple[int, ...]
    head: str
    taps: tuple[int, ...]

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

    def plain(self) -> tuple[Plain, ...]:
        """Plain decoding, one for each thread count or device; the preferred one first."""

    def quick(self, setting: Setting) -> float:
        """About the seconds of a tick, for comparing splits."""

    def tick(self, setting: Setting, acceptance: float, *, free: str | None = None) -> float:
        """Mean seconds of a tick; ``free``: a part that costs nothing, to see what it costs."""


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """Stage processes on the cores of one machine (``cpu_times``).

    ``alone``, ``busy``: the parts by number of stages, with one and with all of them at work; the
    largest number stands for more. ``places``: core shares by number of stages.
    """

    alone: dict[int, PartTimes]
    busy: dict[int, PartTimes]
    boundary: Boundary
    places: dict[int, tuple[int, ...]]
    length: float
    decoding: tuple[Plain, ...]

    def plain(self) -> tuple[Plain, ...]:
        """As measured, with what a runner adds to a stage's parts."""
        extra = self.boundary.turn_alone
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
        stages, split = len(setting.split), setting.split
        alone, busy = _by_stages(self.alone, stages), _by_stages(self.busy, stages)
        ends = (self.boundary.turn_alone, self.boundary.turn_busy)
        extra = Turn(0.0, 0.0) if free == BOUNDARY else Turn(*ends)
        last = stages - 1

        def turn(stage: int) -> Turn:
            lm = stage == last and free != LAST_STAGE
            each = (p.turn(split[stage], self.length, lm=lm) for p in (alone, busy))
            return Turn(*each) + extra

        head = Turn()
        if setting.head and free != STAGE_0:
            head = Turn(alone.head(setting.head), busy.head(setting.head))
        return Flow(
            turns=tuple(turn(s) for s in range(stages)),
            head=head,
            places=self.places[stages],
            hop=0.0 if free == BOUNDARY else self.boundary.hop,
            returning=setting.returning,
            spread=self.boundary.spread,
        )


def _by_stages(parts: dict[int, PartTimes], stages: int) -> PartTimes:
    return parts[min(stages, max(parts))]


def tokens_per_tick(stages: int, acceptance: float, *, width: int = 1) -> float:
    """Expected tokens of a tick of a chain in steady state (arXiv 2509.19368)."""
    assert width == 1, "trees are not predicted yet"
    return 1 / (1 + (stages - 1) * (1 - acceptance))


def ticks_of(stages: int, hits: Sequence[bool]) -> int:
    """Ticks from the first token of an answer to its last, given which guesses are right.

    After a right guess the next token is verified in the next tick; after a wrong one, and after
    the first token, the pipe is empty and it takes ``stages`` ticks, whatever the guess.
    """
    if not hits:
        return 0
    return stages + sum(1 if hit else stages for hit in hits[:-1])


def speed(stages: int, tick: float, texts: Sequence[Sequence[bool]]) -> float:
    """Median tokens per second over answers with these guesses."""
    return median(len(hits) / (ticks_of(stages, hits) * tick) for hits in texts if hits)


def acceptance_of(texts: Sequence[Sequence[bool]]) -> float:
    """Share of right guesses."""
    found = [hit for hits in texts for hit in hits]
    return fmean(found) if found else 0.0


def needed_acceptance(stages: int, tick: float, plain_seconds: float) -> float:
    """Acceptance at which a chain is as fast as plain decoding; above 1 where none is enough."""
    return 1 - (plain_seconds / tick - 1) / (stages - 1)
