"""Things that answer a prompt and say when: our engine in its modes. All greedy.

Times are those of the runner's clock: a token is final at the boundary at which its target
arrived, so whoever reads the events late does not make them later.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import torch

from ppsd_cli.bench_records import Counts
from ppsd_cli.core.events import Committed, Event, Finished, FinishReason, Ticked
from ppsd_cli.core.plan import Plan, Runner, Sampling, TickResult
from ppsd_cli.core.schedule import Limits
from ppsd_cli.core.stats import RunStats, StatsBuilder
from ppsd_cli.runtime.engine import Drafting, Engine
from ppsd_cli.tasks.bench.faults import memory_errors
from ppsd_cli.tasks.bench.forced import ForcedTree
from ppsd_cli.tasks.bench.memory import GpuMeter

GREEDY = Sampling()
Forced = tuple[int, ...] | ForcedTree
"""Guesses for every token of an answer: of a chain or of bursts, or of a tree."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer with its times in seconds; ``events`` are those of our engine."""

    token_ids: tuple[int, ...]
    finish_reason: str
    first_token_seconds: float
    decode_seconds: float
    first_tokens: int
    counts: Counts | None = None
    events: tuple[Event, ...] = ()


class Decoder(Protocol):
    """Answers prompts, one at a time."""

    def answer(
        self, prompt: tuple[int, ...], limits: Limits, forced: Forced | None = None
    ) -> Answered:
        """Answer to the end. ``forced`` replaces the draft head's guesses (the head still runs)."""


@dataclass(frozen=True, slots=True)
class EngineDecoder:
    """Our engine: plain (``drafting`` false), PPSD, or EESD with a ``draft_length``.

    PPSD with a ``width`` above 1 is a tree, of ``depth`` depths per tick.
    """

    engine: Engine
    drafting: bool
    draft_length: int = 0
    width: int = 1
    tree_scale: float = 1.0
    depth: int = 1

    def answer(
        self, prompt: tuple[int, ...], limits: Limits, forced: Forced | None = None
    ) -> Answered:
        """Answer to the end, with counts of what the pipeline did."""
        drafting = Drafting(
            self.drafting,
            draft_length=self.draft_length,
            width=self.width,
            depth=self.depth,
            tree_scale=self.tree_scale,
        )
        if isinstance(forced, ForcedTree):
            drafting = replace(
                drafting,
                forced=forced.tokens,
                forced_ranks=forced.ranks,
                rank_scores=forced.scores,
            )
        elif forced is not None:
            drafting = replace(drafting, forced=forced)
        with memory_errors("the pipeline's answer"):
            events = self.engine.answer(prompt, sampling=GREEDY, limits=limits, drafting=drafting)
            return _follow(events, self.engine.runner.stages)


@dataclass(frozen=True, slots=True)
class Metered:
    """A decoder whose every answer its engine's meter counts."""

    decoder: Decoder
    meter: GpuMeter

    def answer(
        self, prompt: tuple[int, ...], limits: Limits, forced: Forced | None = None
    ) -> Answered:
        """The decoder's answer."""
        return self.meter.running(lambda: self.decoder.answer(prompt, limits, forced))


def _follow(events: Iterator[Event], stages: int) -> Answered:
    """Take all events of one answer, and stamp its tokens."""
    kept: list[Event] = []
    token_ids: list[int] = []
    times: list[float] = []
    reason = FinishReason.FAILED
    began = perf_counter()
    with contextlib.closing(events) as closing:  # type: ignore[type-var]
        for event in closing:
            kept.append(event)
            if isinstance(event, Committed):
                token_ids.append(event.token_id)
            elif isinstance(event, Ticked):
                times += [event.received] * (len(token_ids) - len(times))
            elif isinstance(event, Finished):
                reason = event.reason
    stats = StatsBuilder(stages)
    for event in kept:
        stats.add(event)
    return Answered(
        token_ids=tuple(token_ids),
        finish_reason=reason.value,
        first_token_seconds=times[0] - began,
        decode_seconds=times[-1] - times[0],
        first_tokens=times.count(times[0]),
        counts=counts_of(stats.snapshot()),
        events=tuple(kept),
    )


def counts_of(stats: RunStats) -> Counts:
    """The counts of one answer, as the records keep them."""
    tick = stats.tick_time
    return Counts(
        ticks=stats.ticks,
        verified=stats.verified,
        accepted=stats.accepted,
        void_drafts=stats.void_drafts,
        flushes=stats.flushes,
        runs=stats.runs,
        stage_busy=tuple((each.useful, each.void, each.bubble) for each in stats.stage_busy),
        stage_seconds=tuple(each.median for each in stats.stage_seconds),
        tick_seconds=None if tick is None else tick.total,
        wait_seconds=None if tick is None else tick.wait,
        draft_seconds=None if tick is None else tick.draft,
        layers_seconds=None if tick is None else tick.layers,
    )


class _KeepLogits:
    """A runner (``core.plan.Runner``) that remembers the logits of one token, counted from 0."""

    def __init__(self, runner: Runner, index: int) -> None:
        self._runner, self._left = runner, index
        self.logits: torch.Tensor | None = None

    @property
    def stages(self) -> int:
        return self._runner.stages

    @property
    def lookahead(self) -> int:
        return self._runner.lookahead

    @property
    def pending(self) -> int:
        return self._runner.pending

    def submit(self, plan: Plan) -> None:
        self._runner.submit(plan)

    def collect(self) -> TickResult:
        result = self._runner.collect()
        for target in result.targets:
            if target.logits is not None:
                self.logits = target.logits if self._left == 0 else self.logits
                self._left -= 1
        return result

    def close(self) -> None:
        self._runner.close()


def plain_logits(engine: Engine, prompt: tuple[int, ...], index: int = 0) -> torch.Tensor | None:
    """Plain decoding's logits [V] of token ``index`` after ``prompt``; None from a runner without.

    A token of the prompt and a token of the answer run through matrices of different widths.
    """
    keeper = _KeepLogits(engine.runner, index)
    limits = Limits(index + 1, len(prompt) + index + 1)
    events = Engine(engine.config, keeper).answer(
        prompt, sampling=GREEDY, limits=limits, drafting=Drafting(False, keep_logits=True)
    )
    with memory_errors("logits of plain decoding"):
        for _ in events:
            pass
    return keeper.logits
