"""Measures a machine with the bench that suits its devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ppsd_cli.calibration_records import Boundary, PartTimes, Timing
from ppsd_cli.errors import ConfigError
from ppsd_cli.model.head_files import HeadInfo
from ppsd_cli.model.places import spec_of
from ppsd_cli.model.random_weights import RANDOM_DEEP
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.runtime.engine import on_one_gpu
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig
from ppsd_cli.runtime.placement import Costs, choose_split
from ppsd_cli.tasks.calibrate.candidates import Layout
from ppsd_cli.tasks.calibrate.cpu_times import (
    ROUNDS,
    Group,
    fit_parts,
    fit_wide,
    time_group,
    time_plain,
)
from ppsd_cli.tasks.calibrate.engine_forecast import Level
from ppsd_cli.tasks.calibrate.engine_times import (
    EngineBench,
    HeadSize,
    time_devices,
    time_steps,
)
from ppsd_cli.tasks.calibrate.forecast import Parts, Plain, ProcessTimes, Times, between
from ppsd_cli.tasks.calibrate.layouts import core_places
from ppsd_cli.tasks.calibrate.probe import probe_boundary
from ppsd_cli.tasks.calibrate.shared_cores import WINDOWS, time_shared

STAND_IN = RANDOM_DEEP
"""A head of random numbers: what a trained one of its size would take."""
_LENGTHS = (64, 256, 768)
_ENGINE_WIDTHS = (4, 8)
"""On GPUs a level of 2 takes as long as one of 4, and every width has kernels to compile."""
Found = tuple[Times, tuple[Timing, ...], tuple[PartTimes, ...], Boundary | None]


@dataclass(frozen=True, slots=True)
class Subject:
    """What to measure. ``config``: one stage on the first device; ``heads``: folder and file of
    each; ``threads``: those of plain decoding; ``length``: at which to predict."""

    config: PipelineConfig
    layout: Layout
    heads: tuple[tuple[str, HeadInfo], ...]
    threads: tuple[int, ...]
    length: float
    prompt: tuple[int, ...]

    @property
    def head_names(self) -> tuple[str, ...]:
        """All that are timed: the given ones, a raw exit and the stand-in."""
        return (*(name for name, _ in self.heads), RAW_EXIT, STAND_IN)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Cache lengths that are timed."""
        return tuple(sorted({min(each, self.config.slots) for each in _LENGTHS}))


def measure_times(subject: Subject, step: Callable[[], None]) -> Found:
    """The times of this machine, with the records they come from."""
    if subject.layout.processes:
        return _measure_processes(subject, step)
    layers = subject.layout.layers
    devices = subject.layout.devices[max(subject.layout.devices)]
    bench = EngineBench(subject.config, subject.prompt, step)
    sizes = _sizes(subject, spec_of(subject.config.folder))
    together = max(subject.layout.devices) if on_one_gpu(devices) else 2
    if layers < 2 * together:
        raise ConfigError(
            f"calibrate times stages of one layer and of two: {layers} layers are too few for "
            f"{together} stages"
        )
    if on_one_gpu(devices):
        stages = sorted(subject.layout.devices)
        steps, timings = time_steps(
            bench, layers=layers, stages=stages, heads=sizes, levels=_engine_levels(subject)
        )
        return steps, tuple(timings), (), None
    times, timings = time_devices(
        bench, devices, layers=layers, heads=sizes, levels=_engine_levels(subject)
    )
    return times, tuple(timings), (), None


def _engine_levels(subject: Subject) -> tuple[Level, ...]:
    """Trees of the depths that a head can make."""
    depths = range(1, 1 + max((info.depth for _, info in subject.heads), default=1))
    return tuple(Level(width, depth) for depth in depths for width in _ENGINE_WIDTHS)


def windows(subject: Subject) -> int:
    """About how many steps ``measure_times`` takes."""
    if subject.layout.processes:
        groups = sum(group.windows for group in _groups(subject).values())
        plain = ROUNDS * len(subject.threads) * len(subject.lengths)
        return groups + plain + 1 + (WINDOWS if _crowd(subject) else 0)
    trees = len(_engine_levels(subject))
    return 2 * (1 + len(subject.layout.devices)) + 4 * trees + 2 * len(subject.head_names)


def _measure_processes(subject: Subject, step: Callable[[], None]) -> Found:
    alone: Parts = {}
    busy: Parts = {}
    timings: list[Timing] = []
    for stages, group in _groups(subject).items():
        found = time_group(group, step)
        timings += found
        for load, some in ((1, alone), (group.config.stages, busy)):
            some[stages, 1] = fit_parts(found, threads=group.config.threads, busy=load)
        for width in sorted({t.width for t in found} - {1}):
            wide = _wide(subject, found, (alone[stages, 1], busy[stages, 1]), width)
            alone[stages, width], busy[stages, width] = wide
    plain = time_plain(subject.config, subject.threads, subject.lengths, step)
    boundary = _probe(subject, alone, busy)
    step()
    boundary = _with_shared(subject, boundary, step)
    places = {n: core_places(n) for n in subject.layout.devices}
    times = ProcessTimes(alone, busy, boundary, places, subject.length, _plains(subject, plain))
    return times, (*timings, *plain), (*alone.values(), *busy.values()), boundary


def _wide(
    subject: Subject, timings: Sequence[Timing], narrow: tuple[PartTimes, PartTimes], width: int
) -> tuple[PartTimes, PartTimes]:
    """The parts of a width, alone and busy. Heads are timed busy; alone they take so much less as
    they do at width 1."""
    stand_ins = _stand_ins(subject)
    alone, busy = (fit_wide(timings, each, width, stand_ins) for each in narrow)
    known = dict(alone.heads)
    for name, seconds in busy.heads:
        own, beside = (each.head(name) for each in narrow)
        known.setdefault(name, seconds * own / beside if own < beside else seconds)
    second = tuple((name, s * known[name] / max(1e-9, busy.head(name))) for name, s in busy.second)
    return replace(alone, heads=tuple(known.items()), second=second), busy


def _stand_ins(subject: Subject) -> dict[str, str]:
    """For each trained head the first one of its size, which is timed for it in trees."""
    first: dict[object, str] = {}
    return {
        name: first.setdefault(
            (info.kind, info.blocks, info.draft_vocabulary, info.taps, info.depth), name
        )
        for name, info in subject.heads
    }


def _crowd(subject: Subject) -> int | None:
    """The fewest stages that share cores; None where all have their own."""
    counts = sorted(subject.layout.devices)
    return next((n for n in counts if len(set(core_places(n))) < n), None)


def _with_shared(subject: Subject, boundary: Boundary, step: Callable[[], None]) -> Boundary:
    stages = _crowd(subject)
    if stages is None:
        return boundary
    config = replace(_even(subject, stages), threads=subject.layout.threads[stages])
    found = time_shared(config, core_places(stages), round(subject.length), step)
    return replace(boundary, shared_alone=found.alone, shared_busy=found.busy)


def _groups(subject: Subject) -> dict[int, Group]:
    """Processes to time for each number of stages that has its own cores; more stages share."""
    found: dict[int, Group] = {}
    wide = tuple(dict.fromkeys(_stand_ins(subject).values()))
    deep = {name for name, info in subject.heads if info.depth > 1}
    for stages in sorted(subject.layout.devices):
        count = len(set(core_places(stages)))
        if count < stages and found:
            continue
        config = _even(subject, count)
        config = replace(config, threads=subject.layout.threads[stages])
        found[stages] = Group(
            config,
            subject.head_names,
            subject.lengths,
            wide_heads=wide,
            deep_heads=tuple(name for name in wide if name in deep),
            wide_length=min(subject.lengths, key=lambda each: abs(each - subject.length)),
        )
    return found


def _even(subject: Subject, stages: int) -> PipelineConfig:
    layers = subject.layout.layers
    split = choose_split(layers, stages=stages, exit_layer=None, costs=Costs(0.0, 0.0))
    return replace(subject.config, split=split, devices=subject.config.devices[:1] * stages)


def _probe(subject: Subject, alone: Parts, busy: Parts) -> Boundary:
    """A short run of the fewest stages, of nearly equal size, with raw exits."""
    stages = min(count for count, _ in alone)
    config = _even(subject, stages)
    if config.split[0] > 1:  # not the very split that may be checked later
        first, second, *rest = config.split
        config = replace(config, split=(first - 1, second + 1, *rest))
    config = replace(config, head=RAW_EXIT, threads=subject.layout.threads[stages])
    return probe_boundary(config, subject.prompt, alone[stages, 1], busy[stages, 1])


def _plains(subject: Subject, timings: list[Timing]) -> tuple[Plain, ...]:
    """Plain decoding at the wanted cache length, by thread count."""
    found = []
    for threads in subject.threads:
        own = [t for t in timings if t.threads == threads]
        points = sorted((t.length, t.seconds) for t in own)
        found.append(Plain(threads, own[0].device, between(points, subject.length)))
    return tuple(found)


def _sizes(subject: Subject, spec: ModelSpec) -> list[HeadSize]:
    sizes = [
        HeadSize(
            name,
            info.blocks,
            info.draft_vocabulary or spec.vocabulary,
            deep=len(info.taps) > 1,
            depth=info.depth,
        )
        for name, info in subject.heads
    ]
    third = max(1, spec.vocabulary // 3)
    stand_in = HeadSize(STAND_IN, 2, third, deep=True)
    return [*sizes, HeadSize(RAW_EXIT, 0, spec.vocabulary, deep=False), stand_in]
