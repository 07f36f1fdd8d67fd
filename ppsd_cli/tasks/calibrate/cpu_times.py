"""Times of stage processes on this machine's cores, alone and while the others work."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ppsd_cli.calibration_records import PartTimes, Timing
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.runtime.timing import Work
from ppsd_cli.runtime.timing_children import TimingGroup

WARM, SECONDS = 0.1, 0.3
ROUNDS = 2
"""Every window is taken so often; the least median counts, because other programs only add."""
WIDTHS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Group:
    """Stage processes that are timed together: a config whose split says how many."""

    config: PipelineConfig
    heads: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def windows(self) -> int:
        """How many windows ``timings`` takes."""
        loads = 1 if self.config.stages == 1 else 2
        each = len(self.lengths) + 2 + len(self.heads)
        return ROUNDS * (loads * each + len(WIDTHS))


def time_group(group: Group, step: Callable[[], None]) -> list[Timing]:
    """All windows of one group; ``step`` is called after each."""
    last = group.config.stages - 1
    plans = [
        (load, _plan(group, work, alone=load == 1))
        for load in ((1, group.config.stages) if last else (1,))
        for work in _works(group)
    ]
    first = group.config.split[0]
    plans += [(1, {0: Work(first, _middle(group), width=width)}) for width in WIDTHS]
    return _time_plans(group.config, group.heads, plans, step)


def time_plain(
    config: PipelineConfig,
    threads: Sequence[int],
    lengths: Sequence[int],
    step: Callable[[], None],
) -> list[Timing]:
    """Plain decoding: all layers and the LM matrix in one process, with each thread count."""
    works = [
        Work(config.split[0], length, lm=True, threads=count)
        for count in threads
        for length in lengths
    ]
    plans = [(1, {0: work}) for work in works]
    return _time_plans(replace(config, threads=max(threads)), (), plans, step)


def _time_plans(
    config: PipelineConfig,
    heads: tuple[str, ...],
    plans: Sequence[tuple[int, dict[int, Work]]],
    step: Callable[[], None],
) -> list[Timing]:
    """The best round of every plan (load, work by process)."""
    best: dict[tuple[int, int], Timing] = {}
    with TimingGroup(config, heads) as processes:
        for _ in range(ROUNDS):
            for number, (load, plan) in enumerate(plans):
                times = processes.run(plan, warm=WARM, seconds=SECONDS)
                for process, work in sorted(plan.items()):
                    found = _timing(config, work, times[process], load)
                    known = best.setdefault((number, process), found)
                    if found.seconds < known.seconds:
                        best[number, process] = found
                step()
    return list(best.values())


def fit_parts(timings: Sequence[Timing], *, threads: int, busy: int) -> PartTimes:
    """The parts' times from the timings of a group under one load."""
    own = [t for t in timings if t.threads == threads and t.busy == busy and t.width == 1]
    bare = [t for t in own if not t.lm and t.head is None]
    full = max(t.layers for t in bare)
    fixed, layer, slot = _fit(bare)

    def beyond(some: Iterable[Timing]) -> float:
        return median(t.seconds - (fixed + t.layers * (layer + t.length * slot)) for t in some)

    heads = dict.fromkeys(t.head for t in own if t.head is not None)
    return PartTimes(
        device=own[0].device,
        threads=threads,
        busy=busy,
        fixed=fixed,
        layer=layer,
        slot=slot,
        lm=beyond(t for t in own if t.lm and t.layers >= full - 1),
        heads=tuple((name, beyond(t for t in own if t.head == name)) for name in heads),
    )


def _fit(bare: Sequence[Timing]) -> tuple[float, float, float]:
    """``fixed``, ``layer``, ``slot`` from turns of layers only: two counts, several lengths."""
    most, least = max(t.layers for t in bare), min(t.layers for t in bare)
    slot = _slope([(t.length, t.seconds / most) for t in bare if t.layers == most])
    level = {
        count: median(t.seconds - count * slot * t.length for t in bare if t.layers == count)
        for count in (least, most)
    }
    layer = (level[most] - level[least]) / (most - least) if most > least else level[most] / most
    layer = min(layer, level[most] / most)  # the rest is never negative
    return level[most] - most * layer, layer, slot


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares, at least 0: more to read takes no less time."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if not spread:
        return 0.0
    return max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in points) / spread)


def _works(group: Group) -> list[Work]:
    """What the first process is to do in each window of one load."""
    count, middle = _layers(group, 0), _middle(group)
    works = [Work(count, length) for length in group.lengths]
    works.append(Work(max(1, count // 3), middle))
    works.append(Work(count, middle, lm=True))  # stands for the last process
    return works + [Work(count, middle, head=head) for head in group.heads]


def _plan(group: Group, work: Work, *, alone: bool) -> dict[int, Work]:
    """Who does what: the LM matrix is the last process's, heads are the first one's."""
    last = group.config.stages - 1
    if alone:
        if work.lm:
            return {last: replace(work, layers=_layers(group, last))}
        return {0: work}
    bare = replace(work, lm=False)
    plan = {p: Work(_layers(group, p), work.length) for p in range(last + 1)} | {0: bare}
    if work.lm or work.head is not None:
        plan[last] = Work(_layers(group, last), work.length, lm=True)
    return plan


def _timing(config: PipelineConfig, work: Work, times: Sequence[float], load: int) -> Timing:
    return Timing(
        device=config.devices[0],
        threads=work.threads or config.threads,
        busy=load,
        layers=work.layers,
        length=work.length,
        seconds=median(times),
        turns=len(times),
        width=work.width,
        lm=work.lm,
        head=work.head,
    )


def _layers(group: Group, process: int) -> int:
    return group.config.split[process]


def _middle(group: Group) -> int:
    return sorted(group.lengths)[len(group.lengths) // 2]
