"""How long a tick lasts where stages run by themselves: processes on cores, or devices. Pure.

A small simulation of the chain's rule (``core.schedule``): stage ``s`` takes node ``t`` when stage
``s - 1`` has handed it over and its own node ``t - 1`` is done; stage 0 takes its next node when
what the last stage, and every stage that keeps a tap, owes it has arrived. So a tick lasts as long
as the slowest stage, or as the way around divided by the stages, or as all that one core has to
do, whichever is longest; and where stages are level, as the later of them.

Stages of one core share it evenly, and there a part takes longer (``shared``), because they drive
each other out of its caches. A part takes ``solo`` seconds where no other core is busy and
``loaded`` where all are, because cores of one CPU share its memory; between, in proportion.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

TICKS = 160
_SEED = 7


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds of one piece of work, alone on the machine and with every core busy."""

    solo: float = 0.0
    loaded: float = 0.0

    def __add__(self, other: "Turn") -> "Turn":
        return Turn(self.solo + other.solo, self.loaded + other.loaded)

    def between(self, load: float) -> float:
        """Seconds where that share of the other cores is busy."""
        return self.solo + (self.loaded - self.solo) * load


@dataclass(frozen=True, slots=True)
class Flow:
    """Stages that run by themselves.

    ``turns``: each stage's work on one token, without the draft head; ``wide``: on a level of
    guesses. ``head``: stage 0's draft.
    ``places``: what each stage runs on; equal numbers share it. ``hop``: seconds from the end of a
    stage's work until the next may begin. ``returning``: stages after 0 that send something back.
    ``spread``: measured durations of a turn over their median. ``shared``: what work takes beside
    another stage of the same core, over what it takes on a core of its own.
    """

    turns: tuple[Turn, ...]
    head: Turn
    places: tuple[int, ...]
    hop: float
    returning: tuple[int, ...]
    spread: tuple[float, ...] = (1.0,)
    wide: tuple[Turn, ...] = ()
    shared: Turn = Turn(1.0, 1.0)


def hits_at(acceptance: float, count: int = TICKS) -> tuple[bool, ...]:
    """Which of ``count`` guesses are right, drawn with that probability; always the same draw."""
    draw = random.Random(_SEED)
    return tuple(draw.random() < acceptance for _ in range(count))


def tick_seconds(flow: Flow, hits: Sequence[bool]) -> float:
    """Mean seconds of a tick while a chain meets these guesses (cut or repeated as needed)."""
    drafts = _drafts(len(flow.turns), hits)
    return _Simulation(flow, drafts).run()


def slowest(flow: Flow) -> float:
    """A quick bound: the busiest place under load, or the way around."""
    first, *others = flow.wide or flow.turns
    turns = (first + flow.head, *others)
    busy = {p: 0.0 for p in flow.places}
    for place, turn in zip(flow.places, turns, strict=True):
        more = flow.shared.loaded if flow.places.count(place) > 1 else 1.0
        busy[place] += turn.loaded * more
    around = (sum(turn.loaded for turn in turns) + len(turns) * flow.hop) / len(turns)
    return max(*busy.values(), around)


def one_by_one(flow: Flow) -> float:
    """Seconds of a token where one stage works and the others wait (the naive split)."""
    return sum(turn.solo + flow.hop for turn in flow.turns)


def _drafts(stages: int, hits: Sequence[bool]) -> list[bool]:
    """For each tick whether stage 0 drafts: not when a correction enters.

    A wrong guess is known ``stages`` ticks after the token before it was fed.
    """
    drafts: list[bool] = []
    at = 0
    while len(drafts) < TICKS:
        drafts.append(False)  # the correction of the last miss, after which the pipe is filled
        drafts += [True] * (stages - 1)
        while len(drafts) < TICKS and hits[at % len(hits)]:
            drafts.append(True)
            at += 1
        at += 1
    return drafts[:TICKS]


@dataclass(slots=True)
class _Stage:
    """Nodes done, when the next may begin, and what is left of the one at work (a share)."""

    turn: Turn
    wide: Turn
    place: int
    done: int = 0
    left: float | None = None
    factor: float = 1.0
    handed: list[float] = field(default_factory=list)
    """When each finished node is at whoever waits for it."""


class _Simulation:
    def __init__(self, flow: Flow, drafts: Sequence[bool]) -> None:
        self._flow, self._drafts_at = flow, drafts
        each = zip(flow.turns, flow.wide or flow.turns, flow.places, strict=True)
        self._stages = [_Stage(turn, wide, place) for turn, wide, place in each]
        self._random = random.Random(_SEED)
        self._places = len(set(flow.places))

    def run(self) -> float:
        """Mean tick of stage 0, leaving out the first eighth, in which the pipe fills."""
        now, begin = 0.0, 0.0
        first, front = len(self._drafts_at) // 8, self._stages[0]
        while front.done < len(self._drafts_at):
            waiting = [self._start(index, now) for index in range(len(self._stages))]
            now = self._advance(now, min(waiting))
            if front.done == first and not begin:
                begin = now
        return (now - begin) / (front.done - first)

    def _start(self, index: int, now: float) -> float:
        """Begin the next node of a stage if it may; else when it may (infinity: not known)."""
        stage = self._stages[index]
        if stage.left is not None:
            return float("inf")
        ready = self._ready(index, stage.done)
        if ready > now:
            return ready
        stage.left = 1.0
        stage.factor = self._random.choice(self._flow.spread)
        return float("inf")

    def _ready(self, index: int, node: int) -> float:
        if index:
            before = self._stages[index - 1]
            return before.handed[node] if node < before.done else float("inf")
        ready = 0.0
        for s in self._flow.returning:
            owed = node - 1 - s
            if owed < 0:
                continue
            stage = self._stages[s]
            ready = max(ready, stage.handed[owed] if owed < stage.done else float("inf"))
        return ready

    def _advance(self, now: float, until: float) -> float:
        """Work on until a stage is done, or until ``until``; the new time."""
        working = [stage for stage in self._stages if stage.left is not None]
        crowd: dict[int, int] = {}
        for stage in working:
            crowd[stage.place] = crowd.get(stage.place, 0) + 1
        load = (len(crowd) - 1) / (self._places - 1) if self._places > 1 else 1.0
        speeds = [1.0 / self._seconds(stage, load, crowd[stage.place]) for stage in working]
        ends = [now + (s.left or 0.0) / v for s, v in zip(working, speeds, strict=True)]
        end = min([until, *ends])
        for stage, speed, own in zip(working, speeds, ends, strict=True):
            assert stage.left is not None
            stage.left -= (end - now) * speed
            if own <= end:
                stage.left = None
                stage.done += 1
                stage.handed.append(end + self._flow.hop)
        return end

    def _seconds(self, stage: _Stage, load: float, crowd: int) -> float:
        """How long the node at work would take if all stayed as it is."""
        drafted = self._drafts_at[stage.done]
        turn = stage.wide if drafted else stage.turn
        if stage is self._stages[0] and drafted:
            turn = turn + self._flow.head
        seconds = stage.factor * max(1e-9, turn.between(load))
        return seconds if crowd == 1 else seconds * crowd * self._flow.shared.between(load)
