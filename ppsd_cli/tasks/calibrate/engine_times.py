"""Times of engines that run in this process: one GPU whose stages go in step, or several devices.

Short runs of the engine itself on the first few layers of the model, at two depths, so that time
is linear in the layers of a stage; a head stands in by its size. Guesses are forced right.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter

from ppsd_cli.calibration_records import Timing
from ppsd_cli.core.schedule import Limits
from ppsd_cli.model.random_weights import BLOCKS, RANDOM_BLOCK, RANDOM_DEEP
from ppsd_cli.runtime.engine import Engine, open_engine
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig
from ppsd_cli.tasks.bench.decoders import Answered, EngineDecoder
from ppsd_cli.tasks.calibrate.engine_forecast import CHAIN, DeviceTimes, Level, StepTimes
from ppsd_cli.tasks.calibrate.forecast import Setting

TOKENS = 64
_WARM = 8
_SETTLED = 0.4
"""Seconds of answers of which the fastest counts."""
_FEW = 64
"""Draft vocabulary of a raw exit that takes next to no time."""
Open = Callable[[PipelineConfig], Engine]


@dataclass(frozen=True, slots=True)
class HeadSize:
    """What a head costs: its blocks and draft vocabulary; ``deep``: it reads deeper states;
    ``depth`` 2: it goes on behind its own guesses."""

    name: str
    blocks: int
    vocabulary: int
    deep: bool
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Run:
    """An engine to time: layers and device of each stage, the head (None: plain decoding) with its
    draft vocabulary, and what enters in a tick."""

    split: tuple[int, ...]
    devices: tuple[str, ...]
    head: str | None = None
    vocabulary: int = _FEW
    level: Level = CHAIN


@dataclass(frozen=True, slots=True)
class EngineBench:
    """Runs short answers on engines of a few layers. ``config``: one stage on the first device."""

    config: PipelineConfig
    prompt: tuple[int, ...]
    step: Callable[[], None]
    open: Open = lambda config: open_engine(config, processes=False)

    def tick(self, run: "Run") -> float:
        """Seconds of a tick; without a head, of a token of plain decoding."""
        split, head, shape = run.split, run.head, asdict(run.level)
        config = replace(self.config, split=split, devices=run.devices, head=head, **shape)
        if head is not None:
            config = replace(config, draft_vocab=run.vocabulary)
        limits = Limits(TOKENS, config.slots)
        with self.open(config) as engine:
            plain = EngineDecoder(engine, drafting=False)
            if head is None:
                answer = _best(plain, self.prompt, limits, None)
            else:
                guess = plain.answer(self.prompt, limits).token_ids
                drafting = EngineDecoder(engine, drafting=True, **shape)
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


def time_steps(
    bench: EngineBench,
    *,
    layers: int,
    stages: Sequence[int],
    heads: Sequence[HeadSize],
    levels: Sequence[Level] = (),
) -> tuple[StepTimes, list[Timing]]:
    """Ticks of one GPU: two counts of layers for each number of stages, each head, and each sort of
    tree."""
    device = bench.config.devices[0]
    found, base, step = _Found(bench), {}, {}
    for count in (1, *stages):
        shallow, deep = _depths(layers, count)
        head = None if count == 1 else RAW_EXIT
        runs = [Run((m,) * count, (device,) * count, head) for m in (shallow, deep)]
        base[count], step[count] = _line([found.tick(run) for run in runs], shallow, deep)
    extra = _head_times(found, heads, (_depths(layers, stages[0])[1],) * 2, (device,) * 2)
    ends = {n: Run((_depths(layers, n)[1],) * n, (device,) * n) for n in (min(stages), max(stages))}
    wide = {
        level: _between({n: found.growth(run, heads, level) for n, run in ends.items()}, stages)
        for level in levels
    }
    times = StepTimes(device, layers, bench.config.threads, base, step, extra, wide)
    return times, found.timings


def time_devices(
    bench: EngineBench,
    devices: tuple[str, ...],
    *,
    layers: int,
    heads: Sequence[HeadSize],
    levels: Sequence[Level] = (),
) -> tuple[DeviceTimes, list[Timing]]:
    """Layers of every device by itself, then two devices together, with each sort of tree."""
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
    wide = {level: found.growth(Run((deep, deep), pair), heads, level) for level in levels}
    return replace(times, hop=hop, heads=extra, wide=wide), found.timings


class _Found:
    """The ticks that were measured, each once, as records too."""

    def __init__(self, bench: EngineBench) -> None:
        self._bench = bench
        self._ticks: dict[Run, float] = {}
        self.timings: list[Timing] = []

    def growth(self, run: Run, heads: Sequence[HeadSize], level: Level) -> float:
        """A tick of that sort over one of a chain, with the usual head that can."""
        head = _usual_head([each for each in heads if each.depth >= level.depth])
        own = replace(run, head=_kind(head), vocabulary=head.vocabulary)
        return self.tick(replace(own, level=level)) / self.tick(own)

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
                    lm=True,
                    head=None if run.head is None else f"{run.head} of {run.vocabulary} tokens",
                    **asdict(run.level),
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
    """The one with which trees are timed: the first trained one."""
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
