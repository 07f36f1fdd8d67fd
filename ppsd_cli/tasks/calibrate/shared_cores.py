"""What stages lose that share a core: they drive each other's data out of its caches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.runtime.timing import Work
from ppsd_cli.runtime.timing_children import TimingGroup

WARM, SECONDS = 0.06, 0.36
ROUNDS = 2
WINDOWS = ROUNDS * 6


@dataclass(frozen=True, slots=True)
class Shared:
    """Time that work takes of a shared core, over what it takes of a core of its own: while the
    other cores rest, and while they work."""

    alone: float
    busy: float


def time_shared(
    config: PipelineConfig, places: Sequence[int], length: int, step: Callable[[], None]
) -> Shared:
    """Two processes of one core, each by itself and together; ``places``: each stage's core.

    The stages of ``config`` run their layers, and the last one the LM matrix.
    """
    last = config.stages - 1
    works = {
        stage: Work(config.split[stage], length, lm=stage == last) for stage in range(last + 1)
    }
    pair = _pair(places)
    others = {
        stage: works[stage]
        for stage in range(last + 1)
        if places[stage] != places[pair[0]] and places.index(places[stage]) == stage
    }
    both = {stage: works[stage] for stage in pair}
    with TimingGroup(config, ()) as processes:
        alone = [_best(processes, {stage: works[stage]}, step) for stage in pair]
        together = _best(processes, both, step)
        busy = [_best(processes, {stage: works[stage]} | others, step) for stage in pair]
        crowded = _best(processes, both | others, step)
    return Shared(_factor(pair, alone, together), _factor(pair, busy, crowded))


def _factor(
    pair: tuple[int, int], own: Sequence[dict[int, float]], together: dict[int, float]
) -> float:
    """A second of the core is filled with so many turns of each, which alone would take less."""
    filled = sum(each[stage] / together[stage] for stage, each in zip(pair, own, strict=True))
    return max(1.0, 1 / filled)


def _best(
    processes: TimingGroup, plan: dict[int, Work], step: Callable[[], None]
) -> dict[int, float]:
    """Mean seconds of a turn by process, in its better round: the scheduler's slices make turns of
    a shared core uneven, so a median would not do."""
    found: dict[int, float] = {}
    for _ in range(ROUNDS):
        times = processes.run(plan, warm=WARM, seconds=SECONDS)
        for stage in plan:
            mean = fmean(times[stage])
            found[stage] = min(mean, found.get(stage, mean))
        step()
    return found


def _pair(places: Sequence[int]) -> tuple[int, int]:
    """The last stage and another one of its core, or the first two that share one."""
    pairs = [(a, b) for b in range(len(places)) for a in range(b) if places[a] == places[b]]
    assert pairs, "no stages share a core"
    return next((pair for pair in pairs if pair[1] == len(places) - 1), pairs[0])
