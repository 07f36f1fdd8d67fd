"""Times of engines that run in this process: one GPU whose stages go in step, or several devices.

Short runs of the engine itself on the first few layers of the model, at two depths, so that time
is linear in the layers of a stage; a head stands in by its size. Guesses are forced right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ppsd_cli.calibration_records import Timing
from ppsd_cli.core.schedule import Limits
from ppsd_cli.model.random_weights import BLOCKS, RANDOM_BLOCK, RANDOM_DEEP
from ppsd_cli.runtime.engine import Engine, open_engine
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig
from ppsd_cli.tasks.bench.decoders import Answered, EngineDecoder
from ppsd_cli.tasks.calibrate.forecast import BOUNDARY, LAST_STAGE, STAGE_0, Plain, Setting

TOKENS = 64
_WARM = 8
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
class EngineBench:
    """Runs short answers on engines of a few layers. ``config``: one stage on the first device."""

    config: PipelineConfig
    prompt: tuple[int, ...]
    step: Callable[[], None]
    open: Open = lambda config: open_engine(config, processes=False)

    def tick(
        self, split: tuple[int, ...], devices: tuple[str, ...], head: str | None, vocabulary: int
    ) -> float:
        """Seconds of a tick of a chain; without a head, of a token of plain decoding."""
        config = replace(self.config, split=split, devices=devices, head=head)
        if head is not None:
            config = replace(config, draft_vocab=vocabulary)
        limits = Limits(TOKENS, config.slots)
        with self.open(config) as engine:
            plain = EngineDecoder(engine, drafting=False)
            answer = _best(plain, self.prompt, limits, None)
            if head is not None:
                guess = answer.token_ids
                answer = _best(EngineDecoder(engine, drafting=True), self.prompt, limits, guess)
        self.step()
        assert answer.counts is not None
        return answer.decode_seconds / (answer.counts.ticks - len(split))


def _best(
    decoder: EngineDecoder,
    prompt: tuple[int, ...],
    limits: Limits,
    forced: tuple[int, ...] | None,
) -> Answered:
    """The faster of two answers, after a short one."""
    decoder.answer(prompt, replace(limits, max_new_tokens=_WARM), forced)
    both = [decoder.answer(prompt, limits, forced) for _ in range(2)]
    return min(both, key=lambda answer: answer.decode_seconds)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Stages of one graph: the same layer number of all stages is one launch.

    ``base``: a tick without its layers, by number of stages; ``step``: one layer of so many
    stages; ``heads``: what each draft adds. One stage is plain decoding.
    """

    device: str
    layers: int
    threads: int
    base: dict[int, float]
    step: dict[int, float]
    heads: dict[str, float]

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
        return steps + around + last + head


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Stages on devices of one process, each for itself.

    ``layer``, ``fixed``: by device, a layer, and all but the layers of plain decoding there;
    ``hop``: what a tick adds; ``overlap``: share of the other stages' time that passes while the
    slowest one works (0: they take turns, 1: all at once).
    """

    devices: tuple[str, ...]
    layers: int
    threads: int
    layer: dict[str, float]
    fixed: dict[str, float]
    heads: dict[str, float]
    hop: float
    overlap: float

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
        return slowest + (1 - self.overlap) * (sum(times) - slowest) + hop


def time_steps(
    bench: EngineBench, *, layers: int, stages: Sequence[int], heads: Sequence[HeadSize]
) -> tuple[StepTimes, list[Timing]]:
    """Ticks of one GPU: two depths for each number of stages, and each head."""
    device = bench.config.devices[0]
    found, base, step = _Found(bench), {}, {}
    for count in (1, *stages):
        shallow, deep = _depths(layers, count)
        head = None if count == 1 else RAW_EXIT
        ticks = [found.tick((m,) * count, (device,) * count, head, _FEW) for m in (shallow, deep)]
        base[count], step[count] = _line(ticks, shallow, deep)
    extra = _head_times(found, heads, (_depths(layers, stages[0])[1],) * 2, (device,) * 2)
    return StepTimes(device, layers, bench.config.threads, base, step, extra), found.timings


def time_devices(
    bench: EngineBench, devices: tuple[str, ...], *, layers: int, heads: Sequence[HeadSize]
) -> tuple[DeviceTimes, list[Timing]]:
    """Layers of every device by itself, then two devices together."""
    found = _Found(bench)
    shallow, deep = _depths(layers, 2)
    layer, fixed = {}, {}
    for device in dict.fromkeys(devices):
        ticks = [found.tick((m,), (device,), None, _FEW) for m in (shallow, deep)]
        fixed[device], layer[device] = _line(ticks, shallow, deep)
    pair = devices[:2]
    both = [found.tick((m, m), pair, RAW_EXIT, _FEW) for m in (shallow, deep)]
    slope = (both[1] - both[0]) / (deep - shallow)
    one, other = sorted((layer[pair[0]], layer[pair[1]]))
    overlap = min(1.0, max(0.0, 1 - (slope - other) / one)) if one else 0.0
    times = DeviceTimes(
        devices, layers, bench.config.threads, layer, fixed, {"": 0.0}, 0.0, overlap
    )
    hop = max(0.0, both[1] - times.tick(Setting((deep, deep), "", (deep,)), 1.0))
    extra = _head_times(found, heads, (deep, deep), pair)
    return replace(times, hop=hop, heads=extra), found.timings


class _Found:
    """The ticks that were measured, each once, as records too."""

    def __init__(self, bench: EngineBench) -> None:
        self._bench = bench
        self._ticks: dict[tuple[object, ...], float] = {}
        self.timings: list[Timing] = []

    def tick(
        self, split: tuple[int, ...], devices: tuple[str, ...], head: str | None, vocabulary: int
    ) -> float:
        """Seconds of that tick."""
        key = split, devices, head, vocabulary
        if key not in self._ticks:
            seconds = self._bench.tick(split, devices, head, vocabulary)
            self._ticks[key] = seconds
            self.timings.append(
                Timing(
                    ",".join(dict.fromkeys(devices)),
                    threads=0,
                    busy=len(split),
                    layers=split[0],
                    length=len(self._bench.prompt) + TOKENS // 2,
                    seconds=seconds,
                    turns=2 * TOKENS,
                    lm=True,
                    head=None if head is None else f"{head} of {vocabulary} tokens",
                )
            )
        return self._ticks[key]


def _head_times(
    found: _Found, heads: Sequence[HeadSize], split: tuple[int, int], devices: tuple[str, ...]
) -> dict[str, float]:
    """What each head adds to a tick, by its vocabulary and blocks; the stand-ins have two."""
    least = found.tick(split, devices, RAW_EXIT, _FEW)
    extra = {}
    for head in heads:
        bare = found.tick(split, devices, RAW_EXIT, head.vocabulary)
        seconds = max(0.0, bare - least)
        if head.blocks:
            kind = RANDOM_DEEP if head.deep else RANDOM_BLOCK
            full = found.tick(split, devices, kind, head.vocabulary)
            seconds += max(0.0, full - bare) * head.blocks / BLOCKS
        extra[head.name] = seconds
    return extra


def _line(ticks: Sequence[float], shallow: int, deep: int) -> tuple[float, float]:
    """Seconds without layers, and of a layer, from the ticks at two depths; neither below 0."""
    layer = max(0.0, ticks[1] - ticks[0]) / (deep - shallow)
    return max(0.0, ticks[0] - shallow * layer), layer


def _depths(layers: int, stages: int) -> tuple[int, int]:
    """Layers of a stage for two runs, neither of them the even share of the model."""
    share = layers // stages
    deep = max(2, share - 1)
    return max(1, deep // 2), deep
