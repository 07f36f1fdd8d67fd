"""One answer: run it, show it, report it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any

from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.commands.answer_options import AnswerOptions, check_options
from ppsd_cli.commands.answer_output import Answer, AnswerOutput
from ppsd_cli.commands.answer_view import View
from ppsd_cli.commands.prompts import (
    PromptSource,
    check_length,
    encode_prompt,
    is_short,
    read_prompt,
)
from ppsd_cli.commands.session import ModelChoice, Plan, make_plan
from ppsd_cli.commands.signals import Interrupted, Signals
from ppsd_cli.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_TREE_SCALE, Settings
from ppsd_cli.core.events import Committed, Event, Finished, FinishReason, Ticked
from ppsd_cli.core.plan import Sampling
from ppsd_cli.core.schedule import Limits
from ppsd_cli.core.stats import StatsBuilder
from ppsd_cli.errors import PpsdError
from ppsd_cli.runtime.engine import Drafting, Engine, open_engine, serve_rank
from ppsd_cli.runtime.rank_devices import sharing_notes
from ppsd_cli.runtime.torchrun import is_torchrun, is_worker, join_warnings
from ppsd_cli.tasks.bench.faults import memory_errors
from ppsd_cli.ui.text import TextStream
from ppsd_cli.ui.trace import TraceWriter

_MEMORY_REMEDY = "use a smaller --context, or more or other --devices"


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
        serve_rank(plan.config)
        return 0
    notes = list(plan.notes)
    if is_torchrun():
        notes += join_warnings() + sharing_notes(plan.config.devices)
    for note in notes:
        say(note)
    output = AnswerOutput(plan, options, say)
    load = partial(_start_engine, plan, options.port, on_frozen=output.frozen)
    loading = load() if is_short(prompt, source, plan.config.slots) else None
    try:
        tokenizer = load_tokenizer(plan.files.folder)
        prompt_ids = encode_prompt(tokenizer, prompt, source)
        check_length(len(prompt_ids), plan.config.slots)
    except BaseException:
        if loading is not None:
            with contextlib.suppress(PpsdError):
                loading.result().close()
        raise
    with (loading or load()).result() as engine:
        answer = _answer(engine, plan, tokenizer, prompt_ids, options, output)
    output.write(answer)
    return _exit_code(answer)


def _start_engine(
    plan: Plan, port: int | None, *, on_frozen: Callable[[str], None]
) -> "Future[Engine]":
    """Load the stages in the background, while the caller may read the tokenizer.

    ``on_frozen``: see ``open_engine``.
    """

    def load() -> Engine:
        with memory_errors("loading the stages", remedy=_MEMORY_REMEDY):
            return open_engine(
                plan.config, processes=plan.processes, port=port, on_frozen=on_frozen
            )

    pool = ThreadPoolExecutor(1, thread_name_prefix="ppsd-load")
    future = pool.submit(load)
    pool.shutdown(wait=False)
    return future


def _answer(
    engine: Engine,
    plan: Plan,
    tokenizer: Any,
    prompt_ids: tuple[int, ...],
    options: AnswerOptions,
    output: AnswerOutput,
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
            depth=plan.config.depth,
            tree_scale=settings.tree_scale or DEFAULT_TREE_SCALE,
        ),
    )
    stages = engine.runner.stages
    trace = TraceWriter(stages) if options.trace is not None else None
    answer = Answer(len(prompt_ids), StatsBuilder(stages), trace)
    stream = TextStream(
        lambda ids: tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        options.stops,
    )
    with output.showing(answer) as view:
        try:
            with memory_errors("the answer", remedy=_MEMORY_REMEDY):
                _follow(answer, events, stream, view)
        except PpsdError as error:
            answer.error = error
        except Interrupted as signal:
            answer.signal, answer.reason = signal, FinishReason.INTERRUPTED
    return answer


def _follow(answer: Answer, events: Iterator[Event], stream: TextStream, view: View) -> None:
    """Take every event to the figures, the view and the trace, until the answer ends."""
    answer.began = perf_counter()
    fresh = False
    with contextlib.closing(events) as closing:  # type: ignore[type-var]
        for event in closing:
            answer.stats.add(event)
            if answer.trace is not None:
                answer.trace.add(event)
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
