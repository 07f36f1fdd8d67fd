"""From flags to everything that a benchmark needs before weights load."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.bench_records import TaskInfo
from ppsd_cli.commands.bench_options import BenchOptions
from ppsd_cli.commands.find_head import UNTRAINED, find_head
from ppsd_cli.commands.follow_profile import profile_reason
from ppsd_cli.commands.session import ModelChoice, Plan, find_profile, make_plan
from ppsd_cli.config import DEFAULT_BENCH_TOKENS, DEFAULT_TREE_SCALE, Settings
from ppsd_cli.core.schedule import Limits
from ppsd_cli.errors import ConfigError
from ppsd_cli.model.head_files import read_info
from ppsd_cli.model.places import random_model
from ppsd_cli.model.random_weights import RANDOM_BLOCK, RANDOM_DEEP
from ppsd_cli.runtime.children import allowed_cores
from ppsd_cli.runtime.engine import check_engine, default_threads, has_graphs
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig
from ppsd_cli.tasks.bench.contenders import Shapes
from ppsd_cli.tasks.bench.environment import environment
from ppsd_cli.tasks.bench.measure import Asked, Course
from ppsd_cli.tasks.bench.pool import Shape
from ppsd_cli.tasks.bench.prompts import load_prompt_file, load_task, spread
from ppsd_cli.tasks.bench.talk import (
    NumberTalk,
    Talk,
    TokenizerTalk,
    prompt_checksum,
    user,
)
from ppsd_cli.tasks.bench.wish import Wish, check_shares, check_wish


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run will measure and how, decided but for what only trying can tell."""

    plan: Plan
    tasks: tuple[TaskInfo, ...]
    talk: Talk
    course: Course
    wish: Wish
    shapes: Shapes
    checksum: str
    environment: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def prepare(
    choice: ModelChoice, flags: Settings, options: BenchOptions, say: Callable[[str], None]
) -> Setup:
    """Read prompts, decide the pipelines, check that both go together."""
    check_wish(_wish(options, ("ar", "ppsd")))
    tasks, asked = _read_tasks(options, choice, say)
    widest = max(options.widths, default=None)
    plan = make_plan(choice, replace(flags, decoder="ppsd", width=widest), say)
    shapes = _shapes(choice, flags, plan)
    for shape in shapes.bursts:
        check_engine(shape.config, draft_length=options.draft_length or 0)
    talk = _talk(plan, options)
    limits = Limits(
        flags.max_new_tokens or DEFAULT_BENCH_TOKENS,
        plan.config.slots,
        frozenset() if options.ignore_eos else plan.eos_ids,
    )
    notes = [*_profile_note(choice, flags), *plan.notes]
    fits = [_fits(talk, each, limits) for each in asked]
    fitting = tuple(itertools.compress(asked, fits))
    notes += [
        f"left out, the prompt is beyond the context: {a.task} {a.question.question_id}"
        for a, fit in zip(asked, fits, strict=True)
        if not fit
    ]
    if not fitting:
        raise ConfigError(
            f"no prompt fits into the context of {limits.context} tokens; raise --context"
        )
    course = Course(
        asked=fitting,
        limits=limits,
        repetitions=options.repetitions,
        warmup=options.warmup,
        seed=options.seed,
        vocabulary=plan.spec.vocabulary,
    )
    widths = options.widths or (plan.config.width,)
    trees = tuple(width for width in widths if width > 1)
    wish = replace(_wish(options, _default_decoders(plan, options)), widths=trees)
    check_shares(wish)
    checksum = prompt_checksum(talk, (each.question for each in fitting))
    return Setup(
        plan=plan,
        tasks=tasks,
        talk=talk,
        course=course,
        wish=wish,
        shapes=shapes,
        checksum=checksum,
        environment=environment(plan.config.devices),
        settings=_settings(plan, options, wish, course),
        notes=tuple(notes),
    )


def _read_tasks(
    options: BenchOptions, choice: ModelChoice, say: Callable[[str], None]
) -> tuple[tuple[TaskInfo, ...], tuple[Asked, ...]]:
    if options.prompts is not None:
        loaded = [load_prompt_file(options.prompts)]
    else:
        loaded = [load_task(n, offline=choice.offline, progress=say) for n in options.tasks]
    asked = [
        Asked(info.name, question)
        for info, questions in loaded
        for question in spread(questions, options.limit)
    ]
    return tuple(info for info, _ in loaded), tuple(asked)


def _profile_note(choice: ModelChoice, flags: Settings) -> list[str]:
    """Why a calibrated profile has the decoder that it has; the benchmark runs ppsd in any case."""
    profile = find_profile(choice)
    decoder = profile.settings.decoder
    reason = None if decoder is None else profile_reason(flags, profile, decoder)
    return [] if reason is None else [f"the profile's decoder is {decoder}: {reason}"]


def _fits(talk: Talk, asked: Asked, limits: Limits) -> bool:
    return len(talk.encode([user(asked.question.turns[0])])) < limits.context


def _talk(plan: Plan, options: BenchOptions) -> Talk:
    if random_model(plan.files.folder) is not None:
        return NumberTalk(plan.spec.vocabulary)
    return TokenizerTalk(load_tokenizer(plan.files.folder), options.chat)


def _wish(options: BenchOptions, default: tuple[str, ...]) -> Wish:
    return Wish(
        options.decoders or default,
        options.acceptance,
        options.draft_length,
        widths=options.widths,
        among=options.among,
    )


def _default_decoders(plan: Plan, options: BenchOptions) -> tuple[str, ...]:
    """The naive split only where stages work at the same time, on devices or in processes.

    The guesses of a random head are worthless: with ``--acceptance`` only forced ones run.
    """
    several = plan.processes or len(set(plan.config.devices)) > 1
    forced_only = bool(options.acceptance) and random_model(plan.files.folder) is not None
    names = ("ar",) if forced_only else ("ar", "ppsd")
    return (*names, "naive-split") if several else names


def _shapes(choice: ModelChoice, flags: Settings, plan: Plan) -> Shapes:
    """The pipelines of all contenders, made from that of PPSD.

    The graph runner's stages are the same for every width, so there one engine serves all and the
    weights are in memory once; elsewhere each width has stages of its own.
    """
    chain, layers = plan.config, plan.spec.layers
    if not has_graphs(chain):
        chain = replace(chain, width=1)
    on_cpu = chain.devices[0] == "cpu"
    random = random_model(plan.files.folder) is not None
    plain = replace(
        chain,
        width=1,
        depth=1,
        split=(layers,),
        devices=chain.devices[:1],
        head=None,
        draft_vocab=None,
    )
    return Shapes(
        plain=Shape(plain, processes=on_cpu),
        threads=_thread_counts(flags, chain.threads) if on_cpu else (chain.threads,),
        chain=Shape(chain, plan.processes, plan.head_name),
        bursts=_burst_shapes(choice, plan),
        layers=layers,
        transformers="transformers cannot load random weights" if random else None,
        tree_scale=plan.settings.tree_scale or DEFAULT_TREE_SCALE,
    )


def _thread_counts(flags: Settings, preferred: int) -> tuple[int, ...]:
    """Thread counts worth trying for what runs in one process."""
    if flags.threads is not None:
        return (flags.threads,)
    cores = allowed_cores()
    every = default_threads(1) * 2 if cores is None else len(cores)
    return tuple(dict.fromkeys((preferred, default_threads(1), every)))


def _burst_shapes(choice: ModelChoice, plan: Plan) -> tuple[Shape, ...]:
    """EESD's two stages on one device: with the given head, and with a plain block head."""
    chain = replace(plan.config, width=1, depth=1)
    split = (chain.split[0], sum(chain.split[1:]))
    config = replace(chain, split=split, devices=chain.devices[:1] * 2)
    shapes = [Shape(config, False, plan.head_name)]
    block = _block_head(choice, chain)
    if block is not None:
        name = block if block in UNTRAINED else Path(block).name
        shapes.append(Shape(replace(config, head=block), False, name))
    return tuple(shapes)


def _block_head(choice: ModelChoice, chain: PipelineConfig) -> str | None:
    """The profile's head without deeper taps for the same exit layer, unless it is the given one.

    A deep head sees no deeper states inside a burst, so the other may be better there.
    """
    if chain.head in (None, RAW_EXIT, RANDOM_BLOCK):
        return None
    if chain.head == RANDOM_DEEP:
        return RANDOM_BLOCK
    profile = find_profile(choice)
    for name in profile.heads:
        folder = find_head(Settings(head=name), profile)
        assert folder is not None
        taps = read_info(Path(folder)).taps
        if folder != chain.head and len(taps) == 1 and taps[0].depth == chain.split[0]:
            return folder
    return None


def _acceptance(wish: Wish) -> str:
    """As the flag says it."""
    pairs = itertools.zip_longest(wish.acceptance, wish.among)
    return ",".join(f"{a:g}" if b is None else f"{a:g}/{b:g}" for a, b in pairs)


def _settings(
    plan: Plan, options: BenchOptions, wish: Wish, course: Course
) -> tuple[tuple[str, str], ...]:
    """All that decides figures, as names and texts."""
    config = plan.config
    values = {
        "decoders": ",".join(wish.decoders),
        "acceptance": _acceptance(wish) or "the head's own",
        "width": ",".join(map(str, (1, *wish.widths))),
        "depth": str(config.depth),
        "draft_length": str(wish.draft_length or "best"),
        "max_new_tokens": str(course.limits.max_new_tokens),
        "ignore_eos": str(options.ignore_eos).lower(),
        "limit": str(options.limit or "none"),
        "repetitions": str(course.repetitions),
        "warmup": str(course.warmup),
        "seed": str(course.seed),
        "chat_template": str(options.chat).lower(),
        "context": str(config.slots),
        "dtype": config.dtype,
        "split": ",".join(map(str, config.split)),
        "devices": ",".join(config.devices),
        "stage_processes": str(plan.processes).lower(),
        "head": str(plan.head_name),
        "draft_vocab": str(config.draft_vocab or "the head's"),
        "threads": str(config.threads),
    }
    return tuple(values.items())
