"""Times of stage processes on this machine's cores, alone and while the others work."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ppsd_cli.calibration_records import PartTimes, Timing
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig
from ppsd_cli.runtime.timing import Work
from ppsd_cli.runtime.timing_children import TimingGroup

WARM, SECONDS = 0.06, 0.22
ROUNDS = 2
"""Every window is taken so often; the least median counts, because other programs only add."""
WIDTHS, WIDEST = (2, 4, 8), 16
"""Widths that are always timed, and one that is where it can pay."""
WIDE_WARM, WIDE_SECONDS = 0.05, 0.2
Plan = tuple[int, dict[int, Work]]
"""How many stages are at work (1: the others are idle), and what each process does."""


@dataclass(frozen=True, slots=True)
class Group:
    """Stage processes that are timed together: a config whose split says how many.

    ``heads``: all that are timed; ``wide_heads``: those that are timed on levels of a tree too, at
    the cache length ``wide_length``; ``deep_heads``: those of them that go on behind their guesses.
    """

    config: PipelineConfig
    heads: tuple[str, ...]
    lengths: tuple[int, ...]
    wide_heads: tuple[str, ...] = ()
    wide_length: int = 64
    deep_heads: tuple[str, ...] = ()

    @property
    def windows(self) -> int:
        """How many windows ``timings`` takes at most."""
        loads = 1 if self.config.stages == 1 else 2
        each = len(self.lengths) + 2 + len(self.heads)
        wide = len(_wide_plans(self, 2))
        return ROUNDS * (loads * each + (len(WIDTHS) + 1) * wide)


def time_group(group: Group, step: Callable[[], None]) -> list[Timing]:
    """All windows of one group; ``step`` is called after each."""
    stages = group.config.stages
    plans = [
        (load, _plan(group, work, alone=load == 1))
        for load in ((1, stages) if stages > 1 else (1,))
        for work in _works(group)
    ]
    wide = [plan for width in WIDTHS for plan in _wide_plans(group, width)]
    with TimingGroup(group.config, group.heads) as processes:
        bench = _Bench(group.config, processes, step)
        found = bench.times(plans, WARM, SECONDS)
        found += bench.times(wide, WIDE_WARM, WIDE_SECONDS)
        if _may_pay(found, stages, tokens=2 if group.deep_heads else 1):
            found += bench.times(_wide_plans(group, WIDEST), WIDE_WARM, WIDE_SECONDS)
        else:
            for _ in range(ROUNDS * len(_wide_plans(group, WIDEST))):
                step()
    return found


def _may_pay(timings: Sequence[Timing], stages: int, *, tokens: int) -> bool:
    """Whether the widest trees can be of use: not where a stage's share of the layers and of the LM
    matrix would take longer than a token of plain decoding (than two, where a tick can bring two
    ``tokens``), so that even a tree that is always right were slower.

    The step to the width before says how the time grows.
    """
    alone = [t for t in timings if t.busy == 1 and t.head is None]
    count = max(t.layers for t in alone if not t.lm)

    def parts(width: int) -> tuple[float, float]:
        own = [t for t in alone if t.width == width]
        layers = min(t.seconds for t in own if not t.lm and t.layers == count)
        ended = min(t.seconds for t in own if t.lm)
        return layers, max(0.0, ended - layers)

    shares = [layers + lm / stages for layers, lm in map(parts, WIDTHS[-2:])]
    layers, lm = parts(1)
    return shares[1] ** 2 / shares[0] < tokens * (stages * layers + lm)


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
    config = replace(config, threads=max(threads))
    with TimingGroup(config, ()) as processes:
        return _Bench(config, processes, step).times(plans, WARM, SECONDS)


@dataclass(frozen=True, slots=True)
class _Bench:
    """Processes that have loaded; ``step`` is called after each window."""

    config: PipelineConfig
    processes: TimingGroup
    step: Callable[[], None]

    def times(self, plans: Sequence[Plan], warm: float, seconds: float) -> list[Timing]:
        """The best round of every plan."""
        best: dict[tuple[int, int], Timing] = {}
        for _ in range(ROUNDS):
            for number, (load, plan) in enumerate(plans):
                times = self.processes.run(plan, warm=warm, seconds=seconds)
                for process, work in sorted(plan.items()):
                    found = _timing(self.config, work, times[process], load)
                    known = best.setdefault((number, process), found)
                    if found.seconds < known.seconds:
                        best[number, process] = found
                self.step()
        return list(best.values())


def fit_parts(timings: Sequence[Timing], *, threads: int, busy: int) -> PartTimes:
    """The parts' times from the timings of a group under one load, at width 1."""
    own = [t for t in timings if t.threads == threads and t.busy == busy and t.width == 1]
    bare = [t for t in own if not t.lm and t.head is None]
    full = max(t.layers for t in bare)
    fixed, layer, slot = _fit(bare)

    def beyond(some: Iterable[Timing]) -> float:
        rest = (t.seconds - (fixed + t.layers * (layer + t.length * slot)) for t in some)
        return max(0.0, median(rest))

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


def fit_wide(
    timings: Sequence[Timing], narrow: PartTimes, width: int, heads: Mapping[str, str]
) -> PartTimes:
    """The parts' times for levels of ``width`` nodes, under the load of ``narrow`` (width 1).

    ``heads``: which timed head stands for each one; a raw exit is an LM matrix on stage 0.
    """
    own = [t for t in timings if t.width == width and t.threads == narrow.threads]
    own = [t for t in own if t.busy == narrow.busy]
    slot = width * narrow.slot  # every row reads for itself
    bare = [t for t in own if not t.lm and t.head is None]
    layer = median((t.seconds - narrow.fixed) / t.layers - t.length * slot for t in bare)
    wide = replace(narrow, layer=max(0.0, layer), slot=slot, width=width, heads=())

    def beyond(some: Iterable[Timing]) -> float:
        return max(0.0, median(t.seconds - wide.turn(t.layers, t.length) for t in some))

    lm = beyond(t for t in own if t.lm)
    timed = {t.head for t in own if t.head is not None}
    drafts, second = [(RAW_EXIT, lm)], []
    for name, stand_in in heads.items():
        if stand_in not in timed:
            continue
        head = [t for t in own if t.head == stand_in]
        first = beyond(t for t in head if t.depth == 1)
        drafts.append((name, first))
        both = [t for t in head if t.depth > 1]
        if both:
            second.append((name, max(0.0, beyond(both) - first)))
    return replace(wide, lm=lm, heads=tuple(drafts), second=tuple(second))


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


def _wide_plans(group: Group, width: int) -> list[Plan]:
    """A level of a tree in each part: alone, and all at once with each head in turn."""
    last, length = group.config.stages - 1, group.wide_length
    every = {p: Work(_layers(group, p), length, width=width) for p in range(last + 1)}
    ended = every | {last: replace(every[last], lm=True)}
    plans: list[Plan] = [(1, {0: every[0]}), (1, {last: ended[last]})]
    drafts = [{0: replace(every[0], head=head)} for head in group.wide_heads]
    drafts += [{0: replace(every[0], head=head, depth=2)} for head in group.deep_heads]
    if not last:
        return plans + [(1, draft) for draft in drafts]
    return [*plans, (last + 1, ended), *((last + 1, ended | draft) for draft in drafts)]


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
        depth=work.depth,
    )


def _layers(group: Group, process: int) -> int:
    return group.config.split[process]


def _middle(group: Group) -> int:
    return sorted(group.lengths)[len(group.lengths) // 2]
