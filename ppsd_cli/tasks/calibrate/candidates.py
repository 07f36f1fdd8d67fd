"""All ways to decode that a calibration compares, each with its predicted speed. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ppsd_cli.calibration_records import Candidate, LayerScore, Suggestion
from ppsd_cli.tasks.calibrate.forecast import (
    BOUNDARY,
    LAST_STAGE,
    STAGE_0,
    Plain,
    Setting,
    Times,
    needed_acceptance,
    speed,
    tokens_per_tick,
)
from ppsd_cli.tasks.calibrate.guessers import Guesser, Pace
from ppsd_cli.tasks.calibrate.splits import best_split, by_stage, in_time

ACCEPTANCE = "acceptance"
STAND_IN_ACCEPTANCE = 0.8
"""Of a head that is not trained yet, for the share of ticks in which it drafts."""
_WORTH = 1.03
"""A cost is named as the limit only where speed would rise by more than this without it."""
_PREFERRED_LOSE = 0.97
_NEAR = 0.03


@dataclass(frozen=True, slots=True)
class Layout:
    """Where stages go: devices and threads for each number of stages."""

    layers: int
    devices: dict[int, tuple[str, ...]]
    threads: dict[int, int]
    processes: bool


Fits = Callable[[Candidate], bool]


class Predictor:
    """Predicts candidates on one machine. ``fits`` says whether one has the memory it needs."""

    def __init__(self, times: Times, layout: Layout, fits: Fits = lambda _candidate: True) -> None:
        self._times, self._layout, self._fits = times, layout, fits
        self.plain = self._plain(_preferred(times.plain()))

    def plains(self) -> list[Candidate]:
        """Plain decoding with each thread count or on each device."""
        return [self._plain(each) for each in self._times.plain()]

    def candidates(self, guessers: Sequence[Guesser], widths: Sequence[int]) -> list[Candidate]:
        """Every exit, number of stages and width with its best split, fastest first; two depths a
        tick too, where the head can and ticks are known.

        Trees that could not reach the best chain or plain decoding, even if every token among the
        guesser's best ones were found, are left out.
        """
        found = self._of_width(guessers, 1)
        speeds = [each.tokens_per_second for each in (self.plain, *found)]
        for width in sorted(set(widths) & set(self._times.widths) - {1}):
            found += self._of_width(guessers, width, worth=max(speeds))
        deep = [each for each in guessers if each.depth > 1]
        for width in sorted(set(widths) & set(self._times.deep_widths)):
            found += self._of_width(deep, width, depth=2)
        return sorted(found, key=lambda each: -each.tokens_per_second)

    def _of_width(
        self, guessers: Sequence[Guesser], width: int, *, depth: int = 1, worth: float = 0.0
    ) -> list[Candidate]:
        """``worth``: tokens/s that trees of raw exits must be able to reach."""
        found = []
        for guesser in guessers:
            for stages in sorted(self._layout.devices):
                split = self.split(guesser, stages, width, depth)
                if split is None:
                    continue
                if not guesser.answers and self._bound(guesser, split, width) < worth:
                    continue
                candidate = self.predict(guesser, split, width, depth)
                found += [candidate] if self._fits(candidate) else []
        return found

    def _bound(self, guesser: Guesser, split: tuple[int, ...], width: int) -> float:
        """Tokens/s that no tree of this width exceeds."""
        tick = self._times.quick(Setting(split, guesser.name, guesser.taps, width))
        return tokens_per_tick(len(split), guesser.most(width)) / tick

    def split(
        self, guesser: Guesser, stages: int, width: int = 1, depth: int = 1
    ) -> tuple[int, ...] | None:
        """The best layers of each stage; None where the head fits no split into so many."""
        name, taps = guesser.name, guesser.taps
        return best_split(
            self._layout.layers,
            stages=stages,
            exit_layer=taps[0],
            taps=by_stage(taps, depth),
            cost=lambda split: self._times.quick(Setting(split, name, taps, width, depth=depth)),
        )

    def fitting(self, guesser: Guesser, split: tuple[int, ...], depth: int = 1) -> bool:
        """Whether a split has the guesser's exit, a layer in each stage, and its taps in time."""
        taps = guesser.taps
        return split[0] == taps[0] and min(split) > 0 and in_time(split, by_stage(taps, depth))

    def predict(
        self, guesser: Guesser, split: tuple[int, ...], width: int = 1, depth: int = 1
    ) -> Candidate:
        """What one split with one head is expected to do."""
        stages = len(split)
        pace = guesser.pace(stages, width, depth)
        setting = Setting(split, guesser.name, guesser.taps, width, pace.leaves, depth)
        tick = self._times.tick(setting, pace.steady)
        needed = needed_acceptance(stages, tick, self.plain.tick_seconds) if depth == 1 else None
        return Candidate(
            decoder="ppsd",
            split=split,
            devices=self._layout.devices[stages],
            processes=self._layout.processes,
            threads=self._layout.threads[stages],
            head=guesser.name,
            width=width,
            acceptance=pace.acceptance,
            tokens_per_tick=pace.tokens_per_tick,
            tick_seconds=tick,
            tokens_per_second=_speed(pace, tick),
            limit=self._limit(pace, setting, tick),
            needed=needed,
            depth=depth,
        )

    def suggest(self, stand_in: str, layers: Sequence[LayerScore]) -> Suggestion | None:
        """Where a trained head of about the stand-in's size is most likely to pay.

        Of the exits that need nearly the least acceptance to reach plain decoding, the one whose
        layer agrees most with the next one: what follows it changes the answer least. None where
        no acceptance is enough.
        """
        found = []
        for score in layers:
            guesser = Guesser(stand_in, (score.layer,), (STAND_IN_ACCEPTANCE,))
            splits = [self.split(guesser, stages) for stages in self._layout.devices]
            needs = [
                (self.predict(guesser, split).needed or 0.0, split)
                for split in splits
                if split is not None
            ]
            if needs and min(needs)[0] < 1:
                needed, split = min(needs)
                found.append(Suggestion(score.layer, split, needed, score.top[-1], score.agreement))
        if not found:
            return None
        least = min(each.needed for each in found)
        near = [each for each in found if each.needed <= least + _NEAR]
        return max(near, key=lambda each: each.agreement)

    def _limit(self, pace: Pace, setting: Setting, tick: float) -> str:
        """What would bring most if it cost nothing."""
        gains = {
            part: tick / max(1e-9, self._times.tick(setting, pace.steady, free=part))
            for part in (STAGE_0, LAST_STAGE, BOUNDARY)
        }
        gains[ACCEPTANCE] = setting.depth / pace.tokens_per_tick
        largest = max(gains, key=lambda part: gains[part])
        return largest if gains[largest] > _WORTH else "stages"

    def _plain(self, plain: Plain) -> Candidate:
        return Candidate(
            decoder="ar",
            split=(self._layout.layers,),
            devices=(plain.device,),
            processes=self._layout.processes,
            threads=plain.threads or 1,
            head=None,
            width=1,
            acceptance=None,
            tokens_per_tick=1.0,
            tick_seconds=plain.seconds,
            tokens_per_second=1 / plain.seconds,
        )


def _speed(pace: Pace, tick: float) -> float:
    return speed(tick, pace.answers) if pace.answers else pace.tokens_per_tick / tick


def _preferred(plains: Sequence[Plain]) -> Plain:
    """The fastest; the first if it has nearly that speed, because then the bits are the same."""
    best = min(plains, key=lambda each: each.seconds)
    return plains[0] if best.seconds >= _PREFERRED_LOSE * plains[0].seconds else best


def raw_guessers(name: str, layers: Sequence[LayerScore]) -> list[Guesser]:
    """One raw exit for each layer."""
    return [Guesser(name, (score.layer,), score.top) for score in layers]


def best_three(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The fastest, no two of the same head, exit, stages, width and depth."""
    chosen: dict[tuple[object, ...], Candidate] = {}
    for each in candidates:
        chosen.setdefault((each.head, each.exit_layer, each.stages, each.width, each.depth), each)
    return list(chosen.values())[:3]
