"""How many tokens a tick brings, from what a head guessed on known answers. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import log

from ppsd_cli.calibration_records import TOP
from ppsd_cli.core.tree_simulation import Course, TreeSimulation
from ppsd_cli.tasks.calibrate.forecast import acceptance_of, ticks_of, tokens_per_tick

_SEED = 3
_STAND_IN_TOKENS = 400
"""Length of the answer that stands in where only shares of ranks are known."""
_LEAST = 1e-3


Rows = tuple[tuple[tuple[int, float], ...], ...]
"""The best guesses for each token of an answer but the first, with their log shares."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its tokens, and the guesses for each but the first.

    ``second``: the guesses for the same tokens behind a guess that is right, of a head that goes
    on from its own state.
    """

    tokens: tuple[int, ...]
    guesses: Rows
    second: Rows | None = None

    @property
    def hits(self) -> tuple[bool, ...]:
        """Which first guesses are right."""
        pairs = zip(self.guesses, self.tokens[1:], strict=True)
        return tuple(bool(row) and row[0][0] == token for row, token in pairs)


@dataclass(frozen=True, slots=True)
class Pace:
    """What a pipeline of some stages makes of guesses at one width and depth.

    ``acceptance``: share of tokens that are among the guesses of their tick. ``leaves``: mean
    number of nodes on which the head runs in a drafting tick. ``answers``: tokens after the first
    one and ticks of each answer; none where only the shares are known. ``steady``: acceptance of a
    chain that is emptied in as many of its ticks.
    """

    acceptance: float
    leaves: float
    tokens_per_tick: float
    steady: float
    answers: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Guesser:
    """A head, and what it guessed.

    ``top``: share of tokens among its best 1, 2, 4, 8 guesses. ``answers`` are empty where only
    these shares are known (raw exits).
    """

    name: str
    taps: tuple[int, ...]
    top: tuple[float, ...]
    answers: tuple[Answer, ...] = ()

    @property
    def acceptance(self) -> float:
        """Share of right first guesses."""
        return self.top[0]

    @property
    def depth(self) -> int:
        """Depths of guesses that it can make in one tick."""
        return 2 if self.answers and self.answers[0].second is not None else 1

    @classmethod
    def of(
        cls, name: str, taps: tuple[int, ...], top: Sequence[float], answers: Sequence[Answer]
    ) -> "Guesser":
        """With the acceptance that its guesses on these answers have."""
        first = acceptance_of([answer.hits for answer in answers])
        return cls(name, taps, (first, *top[1:]), tuple(answers))

    def most(self, width: int) -> float:
        """A bound on the acceptance of any tree of this width."""
        known = zip(TOP, self.top, strict=False)
        return next((share for count, share in known if count >= width), 1.0)

    def pace(self, stages: int, width: int, depth: int = 1) -> Pace:
        """What a pipeline of so many stages makes of the guesses."""
        return _chain(self, stages) if width == 1 else _tree(self, stages, width, depth)


def _tree(guesser: Guesser, stages: int, width: int, depth: int) -> Pace:
    answers = guesser.answers or (_stand_in(guesser.top),)
    courses = [_course(each, stages, width, depth) for each in answers]
    verified = sum(course.verified for course in courses)
    acceptance = sum(course.accepted for course in courses) / max(1, verified)
    levels = [level for course in courses for level in course.levels if level.nodes]
    drafting = [level.behind for level in levels if level.behind]
    counted = tuple(
        (len(answer.tokens) - 1, course.ticks - stages)
        for answer, course in zip(guesser.answers, courses, strict=False)
    )
    leaves = sum(drafting) / max(1, len(drafting))
    if depth == 1:
        return Pace(acceptance, leaves, tokens_per_tick(stages, acceptance), acceptance, counted)
    tokens, ticks = (sum(column) for column in zip(*counted, strict=True))
    steady = _steady(stages, 1 - len(drafting) / max(1, len(levels)))
    pace = tokens / ticks if ticks else 1.0  # answers of one token have no ticks
    return Pace(acceptance, leaves, pace, steady, counted)


def _steady(stages: int, known: float) -> float:
    """The acceptance at which that share of a chain's ticks has a known token to feed.

    Between two such ticks lie ``stages - 1`` in which the pipeline fills, and ``a / (1 - a)``.
    """
    hits = max(0.0, 1 / known - stages) if known else float("inf")
    return 1 - 1 / (1 + hits)


def _chain(guesser: Guesser, stages: int) -> Pace:
    hits = [answer.hits for answer in guesser.answers]
    counted = tuple((len(each), ticks_of(stages, each)) for each in hits if each)
    share = guesser.acceptance
    return Pace(share, 1.0, tokens_per_tick(stages, share), share, counted)


def _course(answer: Answer, stages: int, width: int, depth: int) -> Course:
    return TreeSimulation(
        answer.guesses,
        answer.tokens,
        stages=stages,
        width=width,
        random=random.Random(_SEED),
        second=answer.second if depth > 1 else None,
    ).run()


@lru_cache(maxsize=64)
def _stand_in(top: Sequence[float]) -> Answer:
    """An answer whose ranks have these shares; a rank's log share is that of how often it is right.

    Of the ranks between two known shares each is right as often as the others.
    """
    edges = (0, *TOP)
    shares = []
    for (low, high), (before, after) in zip(pairwise(edges), pairwise((0.0, *top)), strict=True):
        shares += [max(_LEAST, (after - before) / (high - low))] * (high - low)
    draw = random.Random(_SEED)
    rows = []
    for token in range(1, _STAND_IN_TOKENS):
        at = draw.random()
        right, below = None, 0.0
        for rank, share in enumerate(shares):
            if below <= at < below + share:
                right = rank
            below += share
        ids = [token if rank == right else -2 - rank for rank in range(len(shares))]
        rows.append(tuple(zip(ids, map(log, shares), strict=True)))
    return Answer(tuple(range(_STAND_IN_TOKENS)), tuple(rows))
