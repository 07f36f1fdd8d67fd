"""Times of engines that run in this process: one GPU whose stages go in step, or several devices.

Short runs of the engine itself on the first few layers of the model, at two depths, so that time
is linear in the layers of a stage; a head stands in by its size. Guesses are forced right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

from ppsd_cli.calibration_records import Timing
from ppsd_cli.core.schedule import Limits
from ppsd_cli.model.random_weights import BLOCKS, RANDOM_BLOCK, RANDOM_DEEP
from ppsd_cli.runtime.engine import Engine, open_engine
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig
from ppsd_cli.tasks.bench.decoders import Answered, EngineDecoder
from ppsd_cli.tasks.calibrate.forecast import BOUNDARY, LAST_STAGE, STAGE_0, Plain, Setting

TOKENS = 64
_WARM = 8
_SETTLED = 0.4
"""Seconds of answers of which the fastest counts."""
_FEW = 64
"""Draft vocabulary of a raw exit that takes next to no time."""
Open = Callable[[PipelineConfig], Engine]


@dataclass(frozen=True, slots=True)
class HeadSize:
    """What a head costs: its blocks and draft vocabulary; ``deep``: it reads deeper states."""

    name: str
    blocks: int
    vocabulary: int
    deep: bool


@dataclass(frozen=True, slots=True)
class Run:
    """An engine to time: layers and device of each stage, the head (None: plain decoding) with its
    draft vocabulary, and the guesses of a tick."""

    split: tuple[int, ...]
    devices: tuple[str, ...]
    head: str | None = None
    vocabulary: int = _FEW
    width: int = 1


@dataclass(frozen=True, slots=True)
class EngineBench:
    """Runs short answers on engines of a few layers. ``config``: one stage on the first device."""

    config: PipelineConfig
    prompt: tuple[int, ...]
    step: Callable[[], None]
    open: Open = lambda config: open_engine(config, processes=False)

    def tick(self, run: "Run") -> float:
        """Seconds of a tick; without a head, of a token of plain decoding."""
        split, head = run.split, run.head
        config = replace(self.config, split=split, devices=run.devices, head=head, width=run.width)
        if head is not None:
            config = replace(config, draft_vocab=run.vocabulary)
        limits = Limits(TOKENS, config.slots)
        with self.open(config) as engine:
            plain = EngineDecoder(engine, drafting=False)
            if head is None:
                answer = _best(plain, self.prompt, limits, None)
            else:
                guess = plain.answer(self.prompt, limits).token_ids
                drafting = EngineDecoder(engine, drafting=True, width=run.width)
                answer = _best(drafting, self.prompt, limits, guess)
        self.step()
        assert answer.counts is not None
        return answer.decode_seconds / (answer.counts.ticks - len(split))


def _best(
    decoder: EngineDecoder,
    prompt: tuple[int, ...],
    limits: Limits,
    forced: tuple[int, ...] | None,
) -> Answered:
    """The fastest of at least two answers, after a short one.

    A busy host can hold a GPU up for several answers in a row (by a quarter for some 0.2 s, seen
    on an H200). So short answers are repeated beyond that.
    """
    decoder.answer(prompt, replace(limits, max_new_tokens=_WARM), forced)
    end = perf_counter() + _SETTLED
    answers = [decoder.answer(prompt, limits, forced) for _ in range(2)]
    while perf_counter() < end:
        answers.append(decoder.answer(prompt, limits, forced))
    return min(answers, key=lambda answer: answer.decode_seconds)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Stages of one graph: the same layer number of all stages is one launch.

    ``base``: a tick without its layers, by number of stages; ``step``: one layer of so many
    stages; ``heads``: what each draft adds. One stage is plain decoding. ``wide``: for each width,
    ticks of so many stages over those of a chain; a level takes the same time whatever it holds.
    """

    device: str
    layers: int
    threads: int
    base: dict[int, float]
    step: dict[int, float]
    heads: dict[str, float]
    wide: dict[int, dict[int, float]] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """The chain and what was timed."""
        return (1, *sorted(self.wide))

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
        growth = 1.0 if setting.width == 1 else self.wide[setting.width][stages]
        return (steps + around + last + head) * growth


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Stages on devices of one process, each for itself.

    ``layer``, ``fixed``: by device, a layer, and all but the layers of plain decoding there;
    ``hop``: what a tick adds; ``overlap``: share of the other stages' time that passes while the
    slowest one works (0: they take turns, 1: all at once). ``wide``: for each width, a tick of two
    devices over that of a chain.
    """

    devices: tuple[str, ...]
    layers: int
    threads: int
    layer: dict[str, float]
    fixed: dict[str, float]
    heads: dict[str, float]
    hop: float
    overlap: float
    wide: dict[int, float] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """The chain and what was timed."""
        return (1, *sorted(self.wide))

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
        growth = 1.0 if setting.width == 1 else self.wide[setting.width]
        return (slowest + (1 - self.overlap) * (sum(times) - slowest) + hop) * growth


def time_steps(
    bench: EngineBench,
    *,
    layers: int,
    stages: Sequence[int],
    heads: Sequence[HeadSize],
    widths: Sequence[int] = (1,),
) -> tuple[StepTimes, list[Timing]]:
    """Ticks of one GPU: two depths for each number of stages, each head, and each width."""
    device = bench.config.devices[0]
    found, base, step = _Found(bench), {}, {}
    for count in (1, *stages):
        shallow, deep = _depths(layers, count)
        head = None if count == 1 else RAW_EXIT
        runs = [Run((m,) * count, (device,) * count, head) for m in (shallow, deep)]
        base[count], step[count] = _line([found.tick(run) for run in runs], shallow, deep)
    extra = _head_times(found, heads, (_depths(layers, stages[0])[1],) * 2, (device,) * 2)
    usual = _usual_head(heads)
    ends = {n: Run((_depths(layers, n)[1],) * n, (device,) * n) for n in (min(stages), max(stages))}
    wide = {
        width: _between({n: found.growth(run, usual, width) for n, run in ends.items()}, stages)
        for width in widths
        if width > 1
    }
    times = StepTimes(device, layers, bench.config.threads, base, step, extra, wide)
    return times, found.timings


def time_devices(
    bench: EngineBench,
    devices: tuple[str, ...],
    *,
    layers: int,
    heads: Sequence[HeadSize],
    widths: Sequence[int] = (1,),
) -> tuple[DeviceTimes, list[Timing]]:
    """Layers of every device by itself, then two devices together, at each width."""
    found = _Found(bench)
    shallow, deep = _depths(layers, 2)
    layer, fixed = {}, {}
    for device in dict.fromkeys(devices):
        ticks = [found.tick(Run((m,), (device,))) for m in (shallow, deep)]
        fixed[device], layer[device] = _line(ticks, shallow, deep)
    pair = devices[:2]
    both = [found.tick(Run((m, m), pair, RAW_EXIT)) for m in (shallow, deep)]
    slope = (both[1] - both[0]) / (deep - shallow)
    one, other = sorted((layer[pair[0]], layer[pair[1]]))
    overlap = min(1.0, max(0.0, 1 - (slope - other) / one)) if one else 0.0
    times = DeviceTimes(
        devices, layers, bench.config.threads, layer, fixed, {"": 0.0}, 0.0, overlap
    )
    hop = max(0.0, both[1] - times.tick(Setting((deep, deep), "", (deep,)), 1.0))
    extra = _head_times(found, heads, (deep, deep), pair)
    head, run = _usual_head(heads), Run((deep, deep), pair)
    wide = {width: found.growth(run, head, width) for width in widths if width > 1}
    return replace(times, hop=hop, heads=extra, wide=wide), found.timings


class _Found:
    """The ticks that were measured, each once, as records too."""

    def __init__(self, bench: EngineBench) -> None:
        self._bench = bench
        self._ticks: dict[Run, float] = {}
        self.timings: list[Timing] = []

    def growth(self, run: Run, head: HeadSize, width: int) -> float:
        """A tick of that width over one of a chain, with a head of that size."""
        own = replace(run, head=_kind(head), vocabulary=head.vocabulary)
        return self.tick(replace(own, width=width)) / self.tick(own)

    def tick(self, run: Run) -> float:
        """Seconds of that tick."""
        if run not in self._ticks:
            seconds = self._bench.tick(run)
            self._ticks[run] = seconds
            self.timings.append(
                Timing(
                    ",".join(dict.fromkeys(run.devices)),
                    threads=0,
                    busy=len(run.split),
                    layers=run.split[0],
                    length=len(self._bench.prompt) + TOKENS // 2,
                    seconds=seconds,
                    turns=2 * TOKENS,
                    width=run.width,
                    lm=True,
                    head=None if run.head is None else f"{run.head} of {run.vocabulary} tokens",
                )
            )
        return self._ticks[run]


def _head_times(
    found: _Found, heads: Sequence[HeadSize], split: tuple[int, int], devices: tuple[str, ...]
) -> dict[str, float]:
    """What each head adds to a tick, by its vocabulary and blocks; the stand-ins have two."""
    run = Run(split, devices, RAW_EXIT)
    least = found.tick(run)
    extra = {}
    for head in heads:
        bare = found.tick(replace(run, vocabulary=head.vocabulary))
        seconds = max(0.0, bare - least)
        if head.blocks:
            full = found.tick(replace(run, head=_kind(head), vocabulary=head.vocabulary))
            seconds += max(0.0, full - bare) * head.blocks / BLOCKS
        extra[head.name] = seconds
    return extra


def _kind(head: HeadSize) -> str:
    """A head of random numbers like it."""
    if not head.blocks:
        return RAW_EXIT
    return RANDOM_DEEP if head.deep else RANDOM_BLOCK


def _usual_head(heads: Sequence[HeadSize]) -> HeadSize:
    """The one with which widths are timed: the first trained one."""
    return next((head for head in heads if head.blocks), heads[0])


def _between(known: dict[int, float], counts: Sequence[int]) -> dict[int, float]:
    """Figures for each of ``counts``, on the line between the least and the largest known one.

    Every width and number of stages has kernels of its own to compile, so not all are timed.
    """
    least, most = min(known), max(known)
    slope = (known[most] - known[least]) / max(1, most - least)
    return {n: known[least] + slope * (n - least) for n in counts}


def _line(ticks: Sequence[float], shallow: int, deep: int) -> tuple[float, float]:
    """Seconds without layers, and of a layer, from the ticks at two depths; neither below 0."""
    layer = max(0.0, ticks[1] - ticks[0]) / (deep - shallow)
    return max(0.0, ticks[0] - shallow * layer), layer


def _depths(layers: int, stages: int) -> tuple[int, int]:
    """Layers of a stage for two runs, neither of them the even share of the model."""
    share = layers // stages
    deep = max(2, share - 1)
    return max(1, deep // 2), deep
