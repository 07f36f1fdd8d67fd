"""One answer: run it, show it, report it."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.commands.answer_options import AnswerOptions, check_options
from ppsd_cli.commands.answer_view import View, answer_view
from ppsd_cli.commands.prompts import PromptSource, check_length, encode_prompt, read_prompt
from ppsd_cli.commands.report import answer_report
from ppsd_cli.commands.session import ModelChoice, Plan, make_plan, start_engine
from ppsd_cli.commands.signals import Interrupted, Signals
from ppsd_cli.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_TREE_SCALE, Settings
from ppsd_cli.core.events import Committed, Event, Finished, FinishReason, Ticked
from ppsd_cli.core.plan import Sampling
from ppsd_cli.core.schedule import Limits
from ppsd_cli.core.stats import StatsBuilder
from ppsd_cli.errors import PpsdError
from ppsd_cli.files import replace_bytes
from ppsd_cli.runtime.engine import Drafting, Engine
from ppsd_cli.runtime.torchrun import is_torchrun, is_worker, join_warnings, serve_worker
from ppsd_cli.ui.summary import final_line
from ppsd_cli.ui.text import TextStream
from ppsd_cli.ui.trace import TraceWriter


@dataclass(slots=True)
class Answer:
    """What one run gave; times in seconds of the monotonic clock."""

    prompt_tokens: int
    stats: StatsBuilder
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    reason: FinishReason = FinishReason.FAILED
    began: float = 0.0
    first: float | None = None
    last: float | None = None
    error: PpsdError | None = None
    signal: Interrupted | None = None

    def stamp(self, seconds: float) -> None:
        """A token was final at this time: the boundary at which its target arrived."""
        self.last = seconds
        self.first = self.first or seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed: tokens after the first, over the time since it."""
        if self.first is None or self.last is None or self.last <= self.first:
            return None
        return (len(self.token_ids) - 1) / (self.last - self.first)


def run_generate(
    choice: ModelChoice, flags: Settings, source: PromptSource, options: AnswerOptions
) -> int:
    """The whole command; returns the exit code."""
    check_options(options)
    say = _teller(options)
    with Signals():
        try:
            return _run(choice, flags, source, options, say)
        except Interrupted as signal:
            return signal.exit_code


def _run(
    choice: ModelChoice,
    flags: Settings,
    source: PromptSource,
    options: AnswerOptions,
    say: Callable[[str], None],
) -> int:
    prompt = "" if is_worker() else read_prompt(source)
    plan = make_plan(choice, flags, say)
    if is_worker():
        serve_worker(plan.config)
        return 0
    for note in (*plan.notes, *(join_warnings() if is_torchrun() else ())):
        say(note)
    loading = start_engine(plan, options.port)
    try:
        tokenizer = load_tokenizer(plan.files.folder)
        prompt_ids = encode_prompt(tokenizer, prompt, source)
        check_length(len(prompt_ids), plan.config.slots)
    except BaseException:
        with contextlib.suppress(PpsdError):
            loading.result().close()
        raise
    with loading.result() as engine:
        answer = _answer(engine, plan, tokenizer, prompt_ids, options)
    _save(answer, plan, options, say)
    return _exit_code(answer)


def _answer(
    engine: Engine,
    plan: Plan,
    tokenizer: Any,
    prompt_ids: tuple[int, ...],
    options: AnswerOptions,
) -> Answer:
    """Decode and show one answer. An error or signal ends it; what was committed is kept."""
    settings = plan.settings
    eos = frozenset() if options.ignore_eos else plan.eos_ids
    limits = Limits(settings.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, plan.config.slots, eos)
    events = engine.answer(
        prompt_ids,
        sampling=_sampling(settings, options.seed),
        limits=limits,
        drafting=Drafting(
            plan.decoder != "ar",
            draft_length=plan.draft_length,
            width=plan.config.width,
            tree_scale=settings.tree_scale or DEFAULT_TREE_SCALE,
        ),
    )
    answer = Answer(len(prompt_ids), StatsBuilder(engine.runner.stages))
    trace = TraceWriter(engine.runner.stages) if options.trace is not None else None
    stream = TextStream(
        lambda ids: tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        options.stops,
    )
    with answer_view(plan, options) as view:
        try:
            _follow(answer, events, stream, view, trace)
        except PpsdError as error:
            answer.error = error
        except Interrupted as signal:
            answer.signal, answer.reason = signal, FinishReason.INTERRUPTED
    if trace is not None and options.trace is not None:
        trace.write(options.trace)
    return answer


def _follow(
    answer: Answer,
    events: Iterator[Event],
    stream: TextStream,
    view: View,
    trace: TraceWriter | None,
) -> None:
    """Take every event to the figures, the view and the trace, until the answer ends."""
    answer.began = perf_counter()
    fresh = False
    with contextlib.closing(events) as closing:  # type: ignore[type-var]
        for event in closing:
            answer.stats.add(event)
            if trace is not None:
                trace.add(event)
            text = None
            if isinstance(event, Committed):
                fresh = True
                answer.token_ids.append(event.token_id)
                text = stream.push(event.token_id)
            elif isinstance(event, Ticked) and fresh:
                fresh = False
                answer.stamp(event.received)
            elif isinstance(event, Finished):
                answer.reason = event.reason
                text = stream.finish()
            if text:
                answer.text.append(text)
            view.handle(event, text)
            if stream.stopped:
                answer.reason = FinishReason.STOP
                answer.stamp(perf_counter())
                break


def _save(answer: Answer, plan: Plan, options: AnswerOptions, say: Callable[[str], None]) -> None:
    """Files, JSON and the closing line."""
    text = "".join(answer.text)
    if options.output is not None:
        replace_bytes(options.output, text.encode())
    stats = answer.stats.snapshot()
    if options.json:
        report = answer_report(answer, stats, plan, text, seed=options.seed)
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    elif answer.error is None:
        speed = answer.tokens_per_second
        width = plan.config.width
        say(final_line(stats, decoder=plan.decoder, tokens_per_second=speed, width=width))


def _exit_code(answer: Answer) -> int:
    if answer.error is not None:
        raise answer.error
    return 0 if answer.signal is None else answer.signal.exit_code


def _sampling(settings: Settings, seed: int) -> Sampling:
    return Sampling(
        temperature=settings.temperature or 0.0,
        top_k=settings.top_k or 0,
        top_p=1.0 if settings.top_p is None else settings.top_p,
        min_p=settings.min_p or 0.0,
        seed=seed,
    )


def _teller(options: AnswerOptions) -> Callable[[str], None]:
    """Notes and progress on stderr, unless quiet."""

    def say(line: str) -> None:
        if not options.quiet:
            sys.stderr.write(f"ppsd: {line}\n")

    return say
