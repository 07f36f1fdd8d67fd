"""Ticks of engines that run in one process, from what ``engine_times`` measured. Pure.

One GPU whose stages go in step, or several devices, each for itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ppsd_cli.tasks.calibrate.forecast import BOUNDARY, LAST_STAGE, STAGE_0, Plain, Setting


@dataclass(frozen=True, slots=True)
class Level:
    """The guesses of a tick, and their depths."""

    width: int = 1
    depth: int = 1


CHAIN = Level()


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Stages of one graph: the same layer number of all stages is one launch.

    ``base``: a tick without its layers, by number of stages; ``step``: one layer of so many
    stages; ``heads``: what each draft adds. One stage is plain decoding. ``wide``: for each sort of
    tree, ticks of so many stages over those of a chain; a level takes the same time whatever it
    holds.
    """

    device: str
    layers: int
    threads: int
    base: dict[int, float]
    step: dict[int, float]
    heads: dict[str, float]
    wide: dict[Level, dict[int, float]] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """The chain and what was timed."""
        return (1, *_widths(self.wide, 1))

    @property
    def deep_widths(self) -> tuple[int, ...]:
        """What was timed."""
        return _widths(self.wide, 2)

    def plain(self) -> tuple[Plain, ...]:
        """All layers, one after the other."""
        seconds = self.base[1] + self.layers * self.step[1]
        return (Plain(self.threads, self.device, seconds),)

    def quick(self, setting: Setting) -> float:
        """The tick itself costs nothing to compute."""
        return self.tick(setting, 1.0)

    def tick(self, setting: Setting, acceptance: float, *, free: str | None = None) -> float:
        """Every tick drafts and runs all stages, so acceptance does not matter."""
        del acceptance
        split, stages = setting.split, len(setting.split)
        steps = sum(self.step[sum(n > at for n in split)] for at in range(max(split)))
        around = 0.0 if free == BOUNDARY else max(0.0, self.base[stages] - self.base[1])
        last = 0.0 if free == LAST_STAGE else min(self.base[1], self.base[stages])
        head = 0.0 if free == STAGE_0 else self.heads[setting.head]
        growth = 1.0 if setting.width == 1 else self.wide[_level(setting)][stages]
        return (steps + around + last + head) * growth


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Stages on devices of one process, each for itself.

    ``layer``, ``fixed``: by device, a layer, and all but the layers of plain decoding there;
    ``hop``: what a tick adds; ``overlap``: share of the other stages' time that passes while the
    slowest one works (0: they take turns, 1: all at once). ``wide``: for each sort of tree, a tick
    of two devices over that of a chain.
    """

    devices: tuple[str, ...]
    layers: int
    threads: int
    layer: dict[str, float]
    fixed: dict[str, float]
    heads: dict[str, float]
    hop: float
    overlap: float
    wide: dict[Level, float] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """The chain and what was timed."""
        return (1, *_widths(self.wide, 1))

    @property
    def deep_widths(self) -> tuple[int, ...]:
        """What was timed."""
        return _widths(self.wide, 2)

    def plain(self) -> tuple[Plain, ...]:
        """On each device; the first is the preferred one."""
        return tuple(
            Plain(self.threads, d, self.fixed[d] + self.layers * self.layer[d])
            for d in dict.fromkeys(self.devices)
        )

    def quick(self, setting: Setting) -> float:
        """The tick itself costs nothing to compute."""
        return self.tick(setting, 1.0)

    def tick(self, setting: Setting, acceptance: float, *, free: str | None = None) -> float:
        """The slowest stage, and of the others what does not pass beside it."""
        del acceptance
        split = setting.split
        last = len(split) - 1
        times = [n * self.layer[d] for n, d in zip(split, self.devices, strict=False)]
        if free != STAGE_0:
            times[0] += self.heads[setting.head]
        if free != LAST_STAGE:
            times[last] += self.fixed[self.devices[last]]
        hop = 0.0 if free == BOUNDARY else self.hop
        slowest = max(times)
        growth = 1.0 if setting.width == 1 else self.wide[_level(setting)]
        return (slowest + (1 - self.overlap) * (sum(times) - slowest) + hop) * growth


def _level(setting: Setting) -> Level:
    return Level(setting.width, setting.depth)


def _widths(known: Iterable[Level], depth: int) -> tuple[int, ...]:
    """Of the trees of that depth."""
    return tuple(sorted(level.width for level in known if level.depth == depth))
