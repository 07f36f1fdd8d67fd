"""A whole calibration: answers, acceptance, times, predictions, and the best three by running."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Protocol

import torch

from ppsd_cli.calibration_records import (
    Boundary,
    Calibration,
    Candidate,
    Checked,
    DeviceMemory,
    HeadScore,
    LayerScore,
    PartTimes,
    Timing,
)
from ppsd_cli.core.schedule import Limits
from ppsd_cli.errors import ConfigError
from ppsd_cli.model.head_files import HeadInfo, read_head
from ppsd_cli.model.heads import HeadWeights
from ppsd_cli.model.load import Loader
from ppsd_cli.model.one_pass import Backbone
from ppsd_cli.model.places import open_checkpoint, spec_of
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.runtime.engine import open_engine
from ppsd_cli.runtime.memory_plan import check_memory, fits, plan_memory
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig
from ppsd_cli.tasks.bench.decoders import EngineDecoder
from ppsd_cli.tasks.bench.faults import memory_errors
from ppsd_cli.tasks.bench.measure import Asked, Course
from ppsd_cli.tasks.bench.talk import Talk, user
from ppsd_cli.tasks.calibrate.candidates import (
    Layout,
    Predictor,
    best_three,
    raw_guessers,
)
from ppsd_cli.tasks.calibrate.check import Track, run_candidates
from ppsd_cli.tasks.calibrate.exits import (
    HeadRanks,
    Text,
    answer_prompts,
    score_exits,
)
from ppsd_cli.tasks.calibrate.forecast import Times
from ppsd_cli.tasks.calibrate.guessers import Answer, Guesser
from ppsd_cli.tasks.calibrate.measure_times import STAND_IN, Subject, measure_times, windows
from ppsd_cli.tasks.calibrate.verdict import decide

WIDTHS = (1, 2, 4, 8, 16)
"""Guesses of a tick that are compared, where their times are known."""


class Meter(Protocol):
    """Shows how far a calibration is."""

    def begin(self, name: str, total: int) -> None:
        """A new part of so many steps."""

    def step(self) -> None:
        """One step is done."""


@dataclass(frozen=True, slots=True)
class GivenHead:
    """A trained head: where it lies, what it is called, what its file says."""

    folder: str
    name: str
    info: HeadInfo


@dataclass(frozen=True, slots=True)
class Job:
    """What to calibrate. ``config``: one stage on the first device."""

    model: str
    spec: ModelSpec
    config: PipelineConfig
    layout: Layout
    heads: tuple[GivenHead, ...]
    talk: Talk
    asked: tuple[Asked, ...]
    tokens: int
    end_ids: tuple[int, ...]
    threads: tuple[int, ...]
    machine: tuple[tuple[str, str], ...]
    prompts: str


@dataclass(frozen=True, slots=True)
class Scores:
    """What one pass over the answers found."""

    texts: tuple[Text, ...]
    layers: tuple[LayerScore, ...]
    heads: dict[str, HeadRanks]

    @property
    def length(self) -> float:
        """Mean cache length of a guessed token."""
        return fmean(len(t.prompt) + len(t.answer) / 2 for t in self.texts)


@dataclass(frozen=True, slots=True)
class Measured:
    """A machine's times as the forecast takes them, and what they were made from."""

    times: Times
    timings: tuple[Timing, ...]
    parts: tuple[PartTimes, ...]
    boundary: Boundary | None


def calibrate(job: Job, meter: Meter) -> Calibration:
    """Everything, in order. Writes nothing but temporary files; an interrupt leaves nothing."""
    began = monotonic()
    needed = plan_memory(job.spec, job.config)
    check_memory(needed, "calibrating")
    scores = score(job, meter)
    measured = measure(job, scores.length, meter)
    predictor = predictor_of(job, measured.times)
    guessers = guessers_of(job, scores)
    candidates = predictor.candidates(guessers, WIDTHS)
    if not candidates:
        raise ConfigError("no pipeline fits this model and these devices; name other --devices")
    best = best_three(candidates)
    checked = check_candidates(job, predictor.plain, best, meter)
    verdict = decide(checked, names={h.folder: h.name for h in job.heads})
    chosen = verdict.chosen
    result = Calibration(
        model=job.model,
        model_hash=job.config.model_hash,
        machine=job.machine,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        dtype=job.config.dtype,
        context=job.config.slots,
        prompts=job.prompts,
        answers=len(scores.texts),
        answer_tokens=sum(len(text.answer) for text in scores.texts),
        length=scores.length,
        timings=measured.timings,
        parts=measured.parts,
        boundary=measured.boundary,
        layers=scores.layers,
        heads=tuple(_head_score(head, scores.heads[head.folder]) for head in job.heads),
        memory=memory_of(job, chosen),
        plain=predictor.plain,
        candidates=tuple(candidates),
        checked=tuple(checked),
        chosen=chosen,
        reason=verdict.reason,
        suggestion=predictor.suggest(STAND_IN, scores.layers),
        seconds=monotonic() - began,
    )
    return named_heads(result, {head.folder: head.name for head in job.heads})


def score(job: Job, meter: Meter) -> Scores:
    """The model's answers, and how often exits and heads guess them."""
    texts = _answers(job, meter)
    if not texts:
        raise ConfigError("the model ends every answer at once; give other --prompts")
    if job.config.devices[0] == "cpu":
        torch.set_num_threads(job.threads[0])  # with all cores, any other program halts it
    meter.begin("acceptance", len(texts) + job.spec.layers)
    with memory_errors("acceptance"):
        loader = loader_of(job.config)
        backbone = Backbone.load(loader)
        heads = {each.folder: _weights(each, loader, backbone) for each in job.heads}
        layers, found = score_exits(backbone, heads, texts, meter.step)
    return Scores(tuple(texts), layers, found)


def _answers(job: Job, meter: Meter) -> list[Text]:
    """The engine that writes them is gone when this returns, with its memory."""
    turns = (each.question.turns[0] for each in job.asked)
    prompts = [job.talk.encode([user(turn)]) for turn in turns]
    meter.begin("answers", len(prompts))
    with open_engine(job.config, processes=job.layout.processes) as engine:
        decoder = EngineDecoder(engine, drafting=False)
        return answer_prompts(decoder, prompts, limits_of(job), meter.step)


def measure(job: Job, length: float, meter: Meter) -> Measured:
    """Times of this machine."""
    subject = Subject(
        config=job.config,
        layout=job.layout,
        heads=tuple((head.folder, head.info) for head in job.heads),
        threads=job.threads,
        length=length,
        prompt=job.talk.encode([user(job.asked[0].question.turns[0])]),
    )
    meter.begin("times", windows(subject))
    with memory_errors("times"):
        return Measured(*measure_times(subject, meter.step))


def predictor_of(job: Job, times: Times) -> Predictor:
    """Predictions for the candidates that fit into memory."""
    return Predictor(times, job.layout, lambda candidate: fits(memory_of(job, candidate)))


def guessers_of(job: Job, scores: Scores) -> list[Guesser]:
    """The given heads and a raw exit behind every layer."""
    found = []
    for head in job.heads:
        ranks = scores.heads[head.folder]
        tokens = [text.answer for text in scores.texts]
        second = [None] * len(tokens) if ranks.second is None else ranks.second.guesses
        answers = [Answer(*each) for each in zip(tokens, ranks.guesses, second, strict=True)]
        taps = tuple(tap.depth for tap in head.info.taps)
        found.append(Guesser.of(head.folder, taps, ranks.top, answers))
    return found + raw_guessers(RAW_EXIT, scores.layers)


def check_candidates(
    job: Job, plain: Candidate, candidates: Sequence[Candidate], meter: Meter
) -> list[Checked]:
    """Run plain decoding and the candidates: side by side where all fit into memory at once, else
    one at a time beside plain decoding."""
    plans = [memory_of(job, each) for each in (plain, *candidates)]
    needed: dict[str, int] = {}
    for each in (each for plan in plans for each in plan):
        needed[each.device] = needed.get(each.device, 0) + each.needed
    free = {each.device: each.available for plan in plans for each in plan}
    together = tuple(DeviceMemory(d, count, free[d]) for d, count in needed.items())
    if fits(together):
        track = track_of(job, len(candidates) + 1, meter)
        return run_candidates(plain, candidates, track)
    runs = [run_candidates(plain, [each], track_of(job, 2, meter)) for each in candidates]
    return [runs[0][0], *(checked for _, checked in runs)]


def memory_of(job: Job, candidate: Candidate) -> tuple[DeviceMemory, ...]:
    """What a candidate needs of each device, its head included."""
    sizes = {
        head.folder: (head.info.blocks + head.info.depth - 1, head.info.draft_vocabulary)
        for head in job.heads  # a second level is a decoder layer, too
    }
    blocks, vocabulary = sizes.get(candidate.head or "", (0, None))
    config = replace(
        job.config,
        split=candidate.split,
        devices=candidate.devices,
        head=candidate.head,
        width=candidate.width,
        depth=candidate.depth,
    )
    return plan_memory(job.spec, config, blocks=blocks, draft_vocab=vocabulary)


def track_of(job: Job, contenders: int, meter: Meter) -> Track:
    """The prompts of the calibration, as a benchmark runs them."""
    course = Course(
        asked=tuple(
            replace(each, question=replace(each.question, turns=each.question.turns[:1]))
            for each in job.asked
        ),
        limits=limits_of(job),
        repetitions=1,
        warmup=1,
        seed=0,
        vocabulary=job.spec.vocabulary,
    )
    meter.begin("check", contenders * len(course.asked))
    return Track(job.config, job.talk, course, meter.step)


def limits_of(job: Job) -> Limits:
    """When an answer ends."""
    return Limits(job.tokens, job.config.slots, frozenset(job.end_ids))


def loader_of(config: PipelineConfig) -> Loader:
    """Reads the model for the first device."""
    device = torch.device(config.devices[0])
    checkpoint = open_checkpoint(config.folder, device)
    return Loader(checkpoint, spec_of(config.folder), getattr(torch, config.dtype), device)


def named_heads(calibration: Calibration, names: Mapping[str, str]) -> Calibration:
    """With the names of heads in place of the folders in which they lay while they were run."""

    def name(head: str | None) -> str | None:
        return names.get(head or "", head)

    def of(candidate: Candidate) -> Candidate:
        return replace(candidate, head=name(candidate.head))

    def times(heads: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        return tuple((names.get(head, head), seconds) for head, seconds in heads)

    return replace(
        calibration,
        timings=tuple(replace(each, head=name(each.head)) for each in calibration.timings),
        parts=tuple(
            replace(part, heads=times(part.heads), second=times(part.second))
            for part in calibration.parts
        ),
        plain=of(calibration.plain),
        candidates=tuple(map(of, calibration.candidates)),
        checked=tuple(named_heads_of(each, names) for each in calibration.checked),
        chosen=of(calibration.chosen),
    )


def named_heads_of(checked: Checked, names: Mapping[str, str]) -> Checked:
    """The same for one candidate that was run."""
    candidate = checked.candidate
    head = names.get(candidate.head or "", candidate.head)
    return replace(checked, candidate=replace(candidate, head=head))


def _weights(head: GivenHead, loader: Loader, backbone: Backbone) -> HeadWeights:
    return read_head(Path(head.folder), head.info, loader, backbone.output.lm_matrix)


def _head_score(head: GivenHead, ranks: HeadRanks) -> HeadScore:
    info = head.info
    second = None if ranks.second is None else ranks.second.top
    return HeadScore(head.name, info.exit_layer, info.stages, info.kind, ranks.top, second)
